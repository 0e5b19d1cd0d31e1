"""What an evaluation found, and the JSON that keeps it."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stemserve.errors import EvaluationDataError, OutputNotWritableError

FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of many tracks.

    Attributes:
        source: what made the estimates: ``model``, ``version``, ``checkpoint`` and
            ``options`` of a served model, or ``estimates``, a folder.
        settings: what the scores depend on besides audio.
        metrics: names, in the order in which they are shown.
        stems: scored stems, in the model's order.
        scores: dB by track, stem and metric; NaN where nothing could be measured.
        durations_s: length of each track.
        notes: sentences about what was left out.
    """

    source: Mapping[str, Any]
    settings: Mapping[str, Any]
    metrics: tuple[str, ...]
    stems: tuple[str, ...]
    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    durations_s: Mapping[str, float]
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What was evaluated, on how many tracks."""
        count = len(self.scores)
        tracks = "1 track" if count == 1 else f"median of {count} tracks"
        if "model" in self.source:
            return f"{self.source['model']} version {self.source['version']}: {tracks}"
        return f"Estimates in {self.source['estimates']}: {tracks}"

    def values(self, stem: str, metric: str) -> list[float]:
        """Return a stem's scores over the tracks where it could be measured, in dB."""
        found = (track.get(stem, {}).get(metric, math.nan) for track in self.scores.values())
        return [value for value in found if not math.isnan(value)]

    def median(self, stem: str, metric: str) -> float:
        """Return the median over tracks in dB; NaN if it was measured on none."""
        values = self.values(stem, metric)
        return statistics.median(values) if values else math.nan

    def mean(self, stem: str, metric: str) -> float:
        """Return the mean over tracks in dB, as the Music Demixing Challenge ranks."""
        values = self.values(stem, metric)
        return sum(values) / len(values) if values else math.nan

    def to_json(self) -> dict[str, Any]:
        """Return plain data; NaN becomes null, infinity the text ``inf`` or ``-inf``."""
        return {
            "format": FORMAT,
            "source": dict(self.source),
            "settings": dict(self.settings),
            "metrics": list(self.metrics),
            "stems": list(self.stems),
            "summary": {
                stem: {
                    metric: {
                        "median": _encoded(self.median(stem, metric)),
                        "mean": _encoded(self.mean(stem, metric)),
                        "tracks": len(self.values(stem, metric)),
                    }
                    for metric in self.metrics
                }
                for stem in self.stems
            },
            "tracks": {
                key: {
                    "duration_s": round(self.durations_s[key], 3),
                    "scores": {
                        stem: {metric: _encoded(value) for metric, value in values.items()}
                        for stem, values in stems.items()
                    },
                }
                for key, stems in self.scores.items()
            },
            "notes": list(self.notes),
        }


def load_evaluation(path: Path) -> Evaluation:
    """Read what :func:`save_json` wrote.

    Raises:
        EvaluationDataError: there is no such file, or it is none of ours.
    """
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise EvaluationDataError(
            f"There is no baseline '{path}'; make one with --save-baseline '{path}'."
        ) from None
    except OSError as error:
        raise EvaluationDataError(
            f"The baseline '{path}' cannot be read ({error.strerror}); check the path."
        ) from None
    except ValueError:
        raise _not_ours(path, "it is no JSON") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise _not_ours(path, f'expected the field "format" to be {FORMAT}')
    try:
        return Evaluation(
            source=dict(data["source"]),
            settings=dict(data["settings"]),
            metrics=tuple(map(str, data["metrics"])),
            stems=tuple(map(str, data["stems"])),
            scores={
                key: {
                    stem: {metric: _decoded(value) for metric, value in values.items()}
                    for stem, values in track["scores"].items()
                }
                for key, track in data["tracks"].items()
            },
            durations_s={key: float(track["duration_s"]) for key, track in data["tracks"].items()},
            notes=tuple(data["notes"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _not_ours(path, f"{type(error).__name__}: {error}") from None


def save_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON, all or nothing."""
    save_bytes(path, (json.dumps(data, indent=2) + "\n").encode())


def save_bytes(path: Path, data: bytes) -> None:
    """Write a file, all or nothing.

    Raises:
        OutputNotWritableError: it cannot be written.
    """
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise OutputNotWritableError(
            f"'{path}' cannot be written ({error.strerror}); choose another place."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def text_db(value: float, *, signed: bool = False) -> str:
    """Return a number of dB as it is shown."""
    if math.isnan(value):
        return "-"
    value = round(value, 2) + 0.0  # no -0.00
    return f"{value:+.2f}" if signed else f"{value:.2f}"


def _encoded(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return round(value, 6) if math.isfinite(value) else str(value)


def _decoded(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def _not_ours(path: Path, why: str) -> EvaluationDataError:
    return EvaluationDataError(
        f"'{path}' is not a baseline that this version of stemserve reads ({why}); make a new one "
        f"with --save-baseline '{path}'."
    )


def listed(words: Sequence[str]) -> str:
    """Return words as a list for a sentence: ``'a', 'b'``, shortened after five."""
    shown = ", ".join(f"'{word}'" for word in words[:5])
    return shown if len(words) <= 5 else f"{shown} and {len(words) - 5} more"
