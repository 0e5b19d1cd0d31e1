"""What a separation returns: where the stems are, and what happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from stemserve.audio import InputProperties
from stemserve.spec import ModelSpec
from stemserve.stem_files import StemProperties
from stemserve.triton import ServerTimes

PERCENTILES: Final = (50, 90, 95, 99)

_SILENT_PEAK: Final = 10 ** (-80 / 20)
_SHORT_S: Final = 1.0
_FOUND_DB: Final = -40.0


@dataclass(frozen=True, slots=True)
class Warning:
    """Something about a track that its owner should know.

    Attributes:
        code: stable name for scripts.
        message: a sentence.
        value: the measure that raised it.
    """

    code: str
    message: str
    value: float


@dataclass(frozen=True, slots=True)
class Result:
    """One separated track.

    Attributes:
        folder: where the stems and ``metadata.json`` are.
        stems: path of each stem's file.
        metadata: the content of ``metadata.json``.
    """

    folder: Path
    stems: dict[str, Path]
    metadata: dict[str, Any]


@dataclass(slots=True)
class LatencyLog:
    """Latencies of a track's chunks, and the server's own account of the same time.

    Attributes:
        round_trips_s: seconds from sending a chunk to having its stems, per chunk.
        server: what Triton's statistics for the model grew by during the run, all callers
            together; None if the server does not tell.
    """

    round_trips_s: list[float] = field(default_factory=list)
    server: ServerTimes | None = None

    def summary_ms(self) -> dict[str, Any]:
        """Percentiles of the round trip and its split into queue, compute and network, in ms.

        Triton tells queue and compute times as sums over requests, so the split is one of means;
        it covers all callers of the model (``server_requests``) and is exact when this run was
        the only one. Network is the rest: transport, (de)serialisation and waiting in the client.
        """
        trips = np.array(self.round_trips_s) * 1e3
        summary: dict[str, Any] = {
            "round_trip": {
                **{f"p{p}": round(float(np.percentile(trips, p)), 1) for p in PERCENTILES},
                "mean": round(float(trips.mean()), 1),
                "max": round(float(trips.max()), 1),
            }
        }
        if self.server is None or self.server.requests < 1:
            return summary
        queue = self.server.queue_ns / self.server.requests / 1e6
        compute = self.server.compute_ns / self.server.requests / 1e6
        summary["queue"] = {"mean": round(queue, 1)}
        summary["compute"] = {"mean": round(compute, 1)}
        rest = max(0.0, float(trips.mean()) - queue - compute)
        summary["network"] = {"mean": round(rest, 1)}
        summary["server_requests"] = self.server.requests
        return summary


def input_warnings(properties: InputProperties, spec: ModelSpec) -> list[Warning]:
    """Warnings that the input alone raises."""
    warnings = []
    if properties.sample_rate != spec.sample_rate:
        warnings.append(
            Warning(
                "resampled",
                f"The input has {properties.sample_rate} Hz and was resampled to the model's "
                f"{spec.sample_rate} Hz"
                + (
                    f"; there is nothing above {properties.sample_rate // 2} Hz in it."
                    if properties.sample_rate < spec.sample_rate / 2
                    else "."
                ),
                properties.sample_rate,
            )
        )
    if properties.channels != spec.channels:
        how = "copied to both channels" if properties.channels == 1 else "mixed down to stereo"
        warnings.append(
            Warning(
                "channels_converted",
                f"The input has {properties.channels} channel(s) and was {how}.",
                properties.channels,
            )
        )
    if properties.duration_s < _SHORT_S:
        warnings.append(
            Warning(
                "short_file",
                f"The input is {properties.duration_s:.3f} s long; models need about a second of "
                "context to separate well.",
                properties.duration_s,
            )
        )
    if properties.peak < _SILENT_PEAK:
        warnings.append(
            Warning(
                "silent_input",
                "The input is silent (peak below -80 dBFS); so are its stems.",
                properties.peak,
            )
        )
    return warnings


def output_warnings(
    stems: dict[str, StemProperties], mixture_rms_db: float, *, silent: bool
) -> list[Warning]:
    """Warnings that the stems raise.

    Args:
        stems: what was measured of each stem.
        mixture_rms_db: level of the mixture at the model's rate, dB relative to full scale.
        silent: whether the input is silent anyway.
    """
    warnings = []
    peak = max(stem.peak for stem in stems.values())
    if peak > 1:
        clipped = sum(stem.clipped_samples for stem in stems.values())
        done = (
            f"{clipped} samples were cut off at full scale; use --normalize or --format wav."
            if clipped
            else "float files keep them; players and integer formats may clip. Use --normalize."
        )
        warnings.append(
            Warning("clipping_risk", f"Stems peak at {peak:.3f} of full scale: {done}", peak)
        )
    if not silent:
        for name, stem in stems.items():
            level = stem.rms_db - mixture_rms_db
            if level < _FOUND_DB:
                warnings.append(
                    Warning(
                        "low_confidence",
                        f"Almost nothing was found for '{name}' (more than {-_FOUND_DB:.0f} dB "
                        "below the mixture); the track may have none.",
                        max(level, -200.0),
                    )
                )
    return warnings


def as_dicts(warnings: Sequence[Warning]) -> list[dict[str, Any]]:
    """Return warnings as metadata holds them."""
    return [{**asdict(warning), "value": round(warning.value, 4)} for warning in warnings]
