"""What an artefact is held to, per family and precision, and why: the one place for it.

Levels are in dB below the signal that they disturb. The song that they are measured on is seeded
(:mod:`.signals`), so that a figure moves only if the artefact, ONNX Runtime or torch does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from stemserve.spec import ModelSpec, Precision


class Limit(NamedTuple):
    """The least or the most that passes, and why."""

    value: float
    reason: str


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Limits of one artefact.

    Attributes:
        snr_db: least SNR per stem against torch in fp32, over a track.
        peak_error: most absolute error against torch in fp32, in full scale.
        other_runtime_db: least SNR per stem of a server with another runtime or device than
            ONNX Runtime on this CPU, against the graph here.
        batch_db: least SNR per stem of an item in a batch against the same item alone.
        sdr_change_db: most that a stem's SDR may change against torch in fp32.
        gain: most that an output's peak may exceed its input's, as a factor.
        silence_peak: most absolute output on digital silence, in full scale.
        seam_step: most that a step at a seam may be, in multiples of the steps' rms around it.
        seam_energy_db: most that the stems' sum may lack at seams in excess of elsewhere.
        sum_db: least SNR of the stems' sum against the mixture, where the family promises it.
    """

    snr_db: Limit
    peak_error: Limit
    other_runtime_db: Limit
    batch_db: Limit
    sdr_change_db: Limit
    gain: Limit
    silence_peak: Limit
    seam_step: Limit
    seam_energy_db: Limit
    sum_db: Limit | None


# A stem that lies lower under the mixture than this is measured as if it lay there: what rounding
# leaves follows the mixture, not a stem that is all but silent.
QUIET_STEM_DB: Final = 40.0

# A wrong padding, axis, constant or activation leaves less than 40 dB.
SNR_DB: Final[dict[str, dict[Precision, Limit]]] = {
    "spleeter": {
        "fp32": Limit(110, "135 dB are measured; orders of summation differ"),
        "fp16": Limit(60, "72 dB are measured: 11 bits of mantissa through 13 layers"),
    },
    "openunmix": {
        "fp32": Limit(100, "123 dB are measured; the Wiener step divides small numbers"),
        "fp16": Limit(50, "57 dB are measured: 11 bits through a recurrence over 300 frames"),
    },
    "htdemucs": {
        "fp32": Limit(75, "97 dB are measured with seeded weights; trained ones may amplify more"),
        "fp16": Limit(50, "55 to 64 dB are expected: 11 bits of mantissa in the core"),
    },
    "hdemucs": {
        "fp32": Limit(75, "106 dB are measured with seeded weights; trained ones may amplify more"),
        "fp16": Limit(50, "55 to 64 dB are expected: 11 bits of mantissa in the core"),
    },
}
# For a family that has no row: far below what orders of summation cost in fp32 (110 dB and more).
MIN_PARITY_DB: Final = 90.0
_UNLISTED: Final[dict[Precision, Limit]] = {
    "fp32": Limit(MIN_PARITY_DB, "a family without limits of its own"),
    "fp16": Limit(50, "a family without limits of its own"),
}

# Rounding of a mixture to 11 bits leaves 71 dB of it; a stem at -10 dB keeps 61 of them.
_HALF_WIRE: Final = Limit(55, "70 dB are measured: samples travel in 11 bits of mantissa")

# On export, a module in half precision is compared with its graph: two roundings, on noise.
_EXPORT_HALF: Final = Limit(40, "49 dB and more are measured on white noise that stops at once")

# An error of this many dB over the one that the SNR allows on average is no rounding any more.
_PEAK_OVER_MEAN_DB: Final = 40.0
_SONG_RMS: Final = 0.15

_OTHER_RUNTIME: Final[dict[Precision, Limit]] = {
    "fp32": Limit(
        40,
        "GPUs use TF32's 10 bits of mantissa unasked: emulated, 69 dB are left of Spleeter and 48 "
        "of Open-Unmix (seeded weights)",
    ),
    "fp16": Limit(40, "half precision sums in another order"),
}
_OTHER_RUNTIME_SDR_CHANGE: Final = Limit(0.1, "an error at -40 dB moves an SDR of 10 dB by 0.03 dB")
_BATCH: Final = Limit(100, "120 dB and more are measured: an item must not see the others")
_SDR_CHANGE: Final[dict[Precision, Limit]] = {
    "fp32": Limit(0.01, "published scores have two decimals"),
    "fp16": Limit(0.05, "far below what a listener or a benchmark tells apart"),
}
_GAIN: Final[dict[str, Limit]] = {
    "mask": Limit(4.0, "a mask takes away; what it leaves of an impulse rings around it"),
    "hybrid": Limit(50.0, "14 is measured on DC, seeded weights; a missing epsilon has no bound"),
}
_SILENCE: Final = Limit(1e-5, "-100 dBFS: nothing comes from nothing")
_SEAM_STEP: Final = Limit(8.0, "times the rms of steps nearby: noise reaches 4, a click far more")
_SEAM_ENERGY: Final = Limit(6.0, "a dip to silence leaves 10 dB over the error of a weak model")
_SUM: Final[dict[Precision, Limit]] = {
    "fp32": Limit(110, "one stem is the mixture less the others: 150 dB are measured"),
    "fp16": Limit(110, "masks and their complement are in fp32 whatever the core is in"),
}


def thresholds_for(spec: ModelSpec) -> Thresholds:
    """Return the limits of an artefact."""
    core = snr_limit(spec)
    precision: Precision = "fp16" if "fp16" in (spec.precision, spec.wire_dtype) else "fp32"
    return Thresholds(
        snr_db=core,
        peak_error=_peak_error(core.value),
        other_runtime_db=_OTHER_RUNTIME[precision],
        batch_db=max(core, _BATCH) if precision == "fp32" else core,
        sdr_change_db=_SDR_CHANGE[precision],
        gain=_GAIN[spec.domain],
        silence_peak=_SILENCE,
        seam_step=_SEAM_STEP,
        seam_energy_db=_SEAM_ENERGY,
        sum_db=_sum_limit(spec, precision),
    )


def with_other_runtime(limits: Thresholds) -> Thresholds:
    """Return the limits of what a server with another runtime or device answers.

    A GPU has its own order of summation and, unless told otherwise, TF32.
    """
    level = limits.other_runtime_db
    return replace(
        limits,
        snr_db=min(limits.snr_db, level),
        peak_error=max(limits.peak_error, _peak_error(level.value)),
        batch_db=min(limits.batch_db, level),
        sdr_change_db=max(limits.sdr_change_db, _OTHER_RUNTIME_SDR_CHANGE),
        sum_db=None if limits.sum_db is None else min(limits.sum_db, level),
    )


def snr_limit(spec: ModelSpec) -> Limit:
    """Return the least SNR per stem against torch in fp32."""
    core = SNR_DB.get(spec.family, _UNLISTED)[spec.precision]
    return min(core, _HALF_WIRE) if spec.wire_dtype == "fp16" else core


def export_limit(spec: ModelSpec) -> Limit:
    """Return the least SNR per stem of a new graph against torch in fp32, on noise and silence."""
    limit = snr_limit(spec)
    return min(limit, _EXPORT_HALF) if spec.precision == "fp16" else limit


def _peak_error(snr: float) -> Limit:
    most = _SONG_RMS * 10 ** ((_PEAK_OVER_MEAN_DB - snr) / 20)
    return Limit(most, f"{_PEAK_OVER_MEAN_DB:g} dB over the mean error that {snr:g} dB allow")


def _sum_limit(spec: ModelSpec, precision: Precision) -> Limit | None:
    promised = (
        spec.family == "spleeter"
        and spec.options.get("mask_extension") == "average"
        and len(spec.stems) > 1
    )
    if not promised:
        return None
    return min(_SUM[precision], _HALF_WIRE) if spec.wire_dtype == "fp16" else _SUM[precision]
