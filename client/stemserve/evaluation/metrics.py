"""How far an estimated stem is from its reference, in dB. Higher is better.

- ``sdr``, ``sir``, ``sar``: BSS Eval v4 as the SiSEC 2018 campaign defines it (Stöter, Liutkus and
  Ito, "The 2018 Signal Separation Evaluation Campaign", LVA/ICA 2018), computed by museval: images,
  one set of distortion filters of 512 taps per track, frames of 1 s without overlap.
- ``global_sdr``: the Music Demixing Challenge's (Mitsufuji et al., "Music Demixing Challenge 2021",
  Frontiers in Signal Processing 2022): one ratio of energies over the whole track.
- ``si_sdr``: scale-invariant SDR (Le Roux et al., "SDR - half-baked or well done?", ICASSP 2019).
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Final

import numpy as np
import numpy.typing as npt

from stemserve.errors import MissingExtraError

Samples = npt.NDArray[np.float32]

BSS_METRICS: Final = ("sdr", "sir", "sar")
METRICS: Final = (*BSS_METRICS, "global_sdr", "si_sdr")
LABELS: Final = {
    "sdr": "SDR",
    "sir": "SIR",
    "sar": "SAR",
    "global_sdr": "global SDR",
    "si_sdr": "SI-SDR",
}
WINDOW_S: Final = 1.0
FILTER_TAPS: Final = 512
# Added to both energies; the constant of the challenge's scoring program.
_CHALLENGE_DELTA: Final = 1e-7
_BLOCK: Final = 1 << 20


def global_sdr(reference: Samples, estimate: Samples) -> float:
    """Return ``10 log10((sum s^2 + d) / (sum (s - e)^2 + d))`` over all samples and channels.

    Args:
        reference: [channels, n] float32.
        estimate: the same shape.

    Returns:
        dB; NaN where the reference is silent, which the ratio says nothing about.
    """
    signal = error = 0.0
    for s, e in _blocks(reference, estimate):
        signal += float(np.vdot(s, s))
        error += float(np.vdot(s - e, s - e))
    if signal == 0:
        return math.nan
    return 10 * math.log10((signal + _CHALLENGE_DELTA) / (error + _CHALLENGE_DELTA))


def si_sdr(reference: Samples, estimate: Samples) -> float:
    """Return the ratio of the estimate's part along the reference to the rest of it.

    ``10 log10(|a s|^2 / |a s - e|^2)`` with ``a = <e, s> / <s, s>``: equation 6 of the paper. The
    channels are one long signal with one scale, and no mean is removed.

    Args:
        reference: [channels, n] float32.
        estimate: the same shape.

    Returns:
        dB; inf for a scaled copy, -inf for an estimate orthogonal to the reference, NaN where the
        reference or the estimate is silent.
    """
    energy = overlap = level = 0.0
    for s, e in _blocks(reference, estimate):
        energy += float(np.vdot(s, s))
        overlap += float(np.vdot(s, e))
        level += float(np.vdot(e, e))
    if energy == 0 or level == 0:
        return math.nan
    scale = overlap / energy
    rest = 0.0
    for s, e in _blocks(reference, estimate):
        rest += float(np.vdot(scale * s - e, scale * s - e))
    target = scale * scale * energy
    if target == 0:
        return -math.inf
    return math.inf if rest == 0 else 10 * math.log10(target / rest)


def bss_eval(references: Samples, estimates: Samples, sample_rate: int) -> npt.NDArray[np.float64]:
    """Return the medians over frames of SDR, SIR and SAR.

    Frames in which any reference or any estimate is silent do not count, as in SiSEC.

    Args:
        references: [sources, channels, n] float32, two sources or more, none of them silent (see
            :func:`is_silent`).
        estimates: the same shape, none silent.
        sample_rate: Hz.

    Returns:
        [3, sources] in dB, in the order of :data:`BSS_METRICS`; NaN where no frame counts.
    """
    window = int(WINDOW_S * sample_rate)
    with np.errstate(all="ignore"):
        sdr, _isr, sir, sar, _order = _museval().bss_eval(
            references.transpose(0, 2, 1),
            estimates.transpose(0, 2, 1),
            window=window,
            hop=window,
            filters_len=FILTER_TAPS,
        )
    frames = np.stack([sdr, sir, sar])
    medians = np.full(frames.shape[:2], np.nan)
    for index in np.ndindex(medians.shape):
        values = frames[index][~np.isnan(frames[index])]
        if len(values):
            medians[index] = np.median(values)
    return medians


def is_silent(samples: Samples) -> bool:
    """Tell whether museval takes [channels, n] for silent: channels that always sum to zero."""
    return not samples.sum(axis=0).any()


def museval_version() -> str:
    """Return the version of museval that is installed."""
    from importlib.metadata import version

    return version("museval")


def _blocks(reference: Samples, estimate: Samples) -> Iterator[tuple[npt.NDArray[np.float64], ...]]:
    if reference.shape != estimate.shape:
        raise ValueError(f"reference {reference.shape} and estimate {estimate.shape} differ")
    for at in range(0, reference.shape[1], _BLOCK):
        part = slice(at, at + _BLOCK)
        yield reference[:, part].astype(np.float64), estimate[:, part].astype(np.float64)


@functools.cache
def _museval() -> ModuleType:
    """Load ``museval/metrics.py`` by itself.

    ``import museval`` fails on a machine without the programs ffmpeg and ffprobe, which its reader
    of the MUSDB data set wants and the metrics don't.
    """
    package = importlib.util.find_spec("museval")
    if package is None or not package.submodule_search_locations:
        raise missing_package("museval")
    path = Path(package.submodule_search_locations[0]) / "metrics.py"
    spec = importlib.util.spec_from_file_location("stemserve_museval_metrics", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def missing_package(name: str) -> MissingExtraError:
    """Build the error for a package of the extra that is not installed."""
    return MissingExtraError(
        f"Evaluating needs the package {name}, which is not installed; install the extra with "
        "`pip install 'stemserve[evaluate]'`."
    )
