"""What the gate found out: single figures, and the report that travels with an artefact."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from stemserve.verification import REPORT_NAME, REPORT_VERSION
from stemserve_export.gate.measures import capped_db
from stemserve_export.gate.thresholds import Limit

Step = Literal["torch", "onnx", "served"]
STEPS: Final[tuple[Step, ...]] = ("torch", "onnx", "served")


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value.

    Attributes:
        step: what was measured: the torch module, the graph in ONNX Runtime, or a server.
        check: what was measured of it.
        subject: the stem or the input that it was measured on; empty for all.
        value: the measured value, None if it is not finite.
        unit: of value and limit; ``""`` for a ratio, ``yes/no`` for 1 and 0.
        limit: what it is held to, None if it is only reported.
        sense: whether the limit is the least or the most that passes.
        passed: None if it is only reported.
        reason: why the limit is what it is, or what was seen.
    """

    step: Step
    check: str
    subject: str
    value: float | None
    unit: str = ""
    limit: float | None = None
    sense: Literal["least", "most", ""] = ""
    passed: bool | None = None
    reason: str = ""

    def sentence(self) -> str:
        """Say what the figure is and what it should be."""
        what = " ".join(part for part in (self.step, self.check, self.subject) if part)
        if self.unit == "yes/no":
            return f"{what}: {'yes' if self.value else 'no'}. {self.reason}".strip()
        value = "not finite" if self.value is None else f"{self.value:g} {self.unit}".strip()
        if self.limit is None:
            return f"{what}: {value}"
        bound = f"{self.limit:g} {self.unit}".strip()
        return f"{what}: {value}; expected at {self.sense} {bound}"


@dataclass
class Figures:
    """Figures as they are gathered, and who is told of progress."""

    report: Callable[[str], None] = lambda text: None
    found: list[Figure] = field(default_factory=list)

    def at_least(
        self, step: Step, check: str, subject: str, value: float, limit: Limit | None, unit: str
    ) -> None:
        """Note a value that must not be below a limit; one without a limit is reported only."""
        value = capped_db(value) if unit == "dB" else value
        self._note(step, check, subject, value, unit, limit, "least")

    def at_most(
        self, step: Step, check: str, subject: str, value: float, limit: Limit | None, unit: str
    ) -> None:
        """Note a value that must not be above a limit; one without a limit is reported only."""
        if unit == "dB" and not math.isnan(value):
            value = capped_db(value)
        self._note(step, check, subject, value, unit, limit, "most")

    def holds(self, step: Step, check: str, subject: str, truth: bool, reason: str) -> None:
        """Note a statement that must be true, and what was seen."""
        self.found.append(
            Figure(step, check, subject, float(truth), "yes/no", passed=truth, reason=reason)
        )

    def _note(
        self,
        step: Step,
        check: str,
        subject: str,
        value: float,
        unit: str,
        limit: Limit | None,
        sense: Literal["least", "most"],
    ) -> None:
        finite = value if math.isfinite(value) else None
        if finite is not None and unit != "dB":
            finite = float(f"{finite:.4g}")
        if limit is None:
            self.found.append(Figure(step, check, subject, finite, unit))
            return
        # NaN compares false, and fails
        passed = value >= limit.value if sense == "least" else value <= limit.value
        self.found.append(
            Figure(step, check, subject, finite, unit, limit.value, sense, passed, limit.reason)
        )


@dataclass(frozen=True)
class Verification:
    """A report on one artefact.

    Attributes:
        model: its name.
        version: number of the artefact.
        graph_sha256: digest of the graph that was measured, None for an ensemble.
        parts: name -> digest of the graphs that an ensemble joins.
        versions: of what it was measured with.
        verified_at: date and time, ISO 8601, UTC.
        seconds: what the measuring took.
        figures: all of them, in the order of the steps.
    """

    model: str
    version: int
    graph_sha256: str | None
    parts: Mapping[str, str]
    versions: Mapping[str, str]
    verified_at: str
    seconds: float
    figures: Sequence[Figure]

    @property
    def failures(self) -> list[str]:
        """A sentence per figure that failed."""
        return [figure.sentence() for figure in self.figures if figure.passed is False]

    @property
    def passed(self) -> bool:
        """Whether no figure failed, and any was held to a limit."""
        verdicts = [figure.passed for figure in self.figures if figure.passed is not None]
        return bool(verdicts) and all(verdicts)

    @property
    def steps(self) -> list[str]:
        """The steps that were measured."""
        return [step for step in STEPS if any(figure.step == step for figure in self.figures)]

    def as_dict(self) -> dict[str, Any]:
        """Return what is written to JSON."""
        return {
            "report_version": REPORT_VERSION,
            "model": self.model,
            "version": self.version,
            "passed": self.passed,
            "failures": self.failures,
            "graph_sha256": self.graph_sha256,
            "parts": dict(self.parts),
            "steps": self.steps,
            "verified_at": self.verified_at,
            "seconds": round(self.seconds, 1),
            "versions": dict(self.versions),
            "figures": [asdict(figure) for figure in self.figures],
        }

    def write(self, folder: Path) -> Path:
        """Write the report into an artefact's folder, at once or not at all; returns its path.

        A run without a server does not replace the report of a run with one, unless it failed.
        """
        path = folder / REPORT_NAME
        record = self.as_dict()
        if self.passed and "served" not in record["steps"] and self._is_known_better(path):
            return path
        partial = path.with_name(f".{REPORT_NAME}.partial")
        partial.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
        return path

    def _is_known_better(self, path: Path) -> bool:
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            return bool(
                known["passed"]
                and "served" in known["steps"]
                and known["graph_sha256"] == self.graph_sha256
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False
