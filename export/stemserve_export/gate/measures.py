"""Numbers about stems: pure functions of arrays, in double precision."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]

# A ratio of equal signals is infinite, which JSON lacks; 24 bits of mantissa give 150 dB.
MAX_DB = 999.0
_ROUNDING = 1e-10


def energy(samples: Samples) -> float:
    """Sum of squares."""
    return float(np.sum(np.square(samples, dtype=np.float64)))


def snr_db(reference: Samples, other: Samples, floor: float = 0.0) -> float:
    """Signal-to-noise ratio of ``other`` against ``reference`` (same shape), in dB.

    Args:
        reference: what it should be.
        other: what it is.
        floor: energy that the signal is taken to have at least.

    Returns:
        inf where both are equal, -inf where ``other`` is not finite or the signal has no energy.
    """
    signal = max(energy(reference), floor)
    with np.errstate(invalid="ignore"):  # inf - inf
        noise = float(np.sum(np.square(np.subtract(reference, other, dtype=np.float64))))
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def max_abs_error(reference: Samples, other: Samples) -> float:
    """Largest absolute difference, in full scale; NaN if either is not finite."""
    with np.errstate(invalid="ignore"):
        return float(np.max(np.abs(np.subtract(reference, other, dtype=np.float64)), initial=0.0))


def peak(samples: Samples) -> float:
    """Largest absolute sample; NaN if one is NaN."""
    return float(np.max(np.abs(samples), initial=0.0))


def sum_error_db(mixture: Samples, stems: Sequence[Samples]) -> float:
    """Ratio of the mixture to what the stems' sum lacks of it, in dB."""
    return snr_db(mixture, np.sum(stems, axis=0, dtype=np.float64).astype(np.float32))


def seam_step(samples: Samples, seams: Sequence[int], reach: int) -> float:
    """Largest step between two samples at a seam, in multiples of the steps' rms around it.

    Noise reaches 3 to 4, a tone 1.4. NaN where a sample is not finite.

    Args:
        samples: [channels, n].
        seams: positions where a chunk's part in the track begins or ends.
        reach: samples on either side of a seam that the rms is taken over.
    """
    if not np.isfinite(samples).all():
        return math.nan
    steps = np.abs(np.diff(samples.astype(np.float64), axis=1))
    worst = 0.0
    for seam in seams:
        here = steps[:, max(0, seam - 2) : seam + 1].max(axis=1, initial=0.0)
        around = np.sqrt(np.square(steps[:, max(0, seam - reach) : seam + reach]).mean(axis=1))
        ratios = here / np.maximum(around, np.finfo(np.float64).tiny)
        worst = max(worst, float(ratios.max(initial=0.0)))
    return worst


def seam_energy_db(
    mixture: Samples, stems: Sequence[Samples], seams: Sequence[int], reach: int
) -> float:
    """What the stems' sum lacks of the mixture near seams, over what it lacks elsewhere, in dB.

    Either is taken as a share of the mixture's energy there. A lack of less than -100 dB counts
    as that much: below it there is nothing but rounding.

    Args:
        mixture: [channels, n].
        stems: the same shape each.
        seams: positions where a chunk's part in the track begins or ends.
        reach: samples on either side of a seam that count as near.

    Returns:
        dB; NaN where a stem is not finite.
    """
    if not all(np.isfinite(stem).all() for stem in stems):
        return math.nan
    lack = np.square(mixture - np.sum(stems, axis=0, dtype=np.float64)).sum(axis=0)
    music = np.square(mixture, dtype=np.float64).sum(axis=0)
    near = _near(len(music), seams, reach)
    shares = [
        lack[part].sum() / max(float(music[part].sum()), np.finfo(np.float64).tiny) + _ROUNDING
        for part in (near, ~near)
    ]
    return float(10 * np.log10(shares[0] / shares[1]))


def seam_positions(starts: Sequence[int], chunk: int, edge: int, length: int) -> list[int]:
    """Return where in a track the parts of its chunks begin and end.

    Args:
        starts: start of every chunk, samples of the track.
        chunk: samples of a chunk.
        edge: samples at each end of a chunk that hold partial sums.
        length: samples of the track.
    """
    borders = (
        position
        for start in starts
        for position in (start, start + edge, start + chunk - edge, start + chunk)
    )
    return sorted({position for position in borders if 0 < position < length})


def capped_db(value: float) -> float:
    """A ratio that JSON can hold: within +-MAX_DB, and rounded to 0.01 dB."""
    if math.isnan(value):
        return -MAX_DB
    return round(min(max(value, -MAX_DB), MAX_DB), 2)


def _near(count: int, seams: Sequence[int], reach: int) -> npt.NDArray[np.bool_]:
    near = np.zeros(count, bool)
    for seam in seams:
        near[max(0, seam - reach) : seam + reach] = True
    return near
