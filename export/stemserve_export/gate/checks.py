"""Questions put to a graph or a server; each answer becomes a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from stemserve.evaluation.metrics import global_sdr
from stemserve_export.gate.figures import Figures, Step
from stemserve_export.gate.material import Material
from stemserve_export.gate.measures import (
    energy,
    max_abs_error,
    peak,
    seam_energy_db,
    seam_step,
    snr_db,
    sum_error_db,
)
from stemserve_export.gate.signals import odd_inputs
from stemserve_export.gate.thresholds import QUIET_STEM_DB, Thresholds

Samples = npt.NDArray[np.float32]
Runner = Callable[[Samples], list[Samples]]

# Some 20 ms: what the ear takes for one moment.
_SEAM_REACH: Final = 1024
# Times the rms of steps: noise reaches it now and then.
_MUSICAL_STEP: Final = 4.0


def quiet_floor(material: Material) -> float:
    """Return the energy that a stem is taken to have at least."""
    return energy(material.song.mixture) * 10 ** (-QUIET_STEM_DB / 10)


def sdr_db(material: Material, stems: Sequence[Samples]) -> dict[str, float]:
    """Return the SDR of each stem [channels, n] whose truth the song has, in dB.

    The ratio of energies over the whole song, as in the Music Demixing Challenge.
    """
    found = {}
    for name, stem in zip(material.spec.stems, stems, strict=True):
        truth = material.song.reference(name, material.spec.stems)
        if truth is not None and truth.any():
            found[name] = global_sdr(truth, stem) if np.isfinite(stem).all() else -np.inf
    return found


def check_song(
    figures: Figures,
    step: Step,
    material: Material,
    reference: Sequence[Samples],
    stems: Sequence[Samples],
    limits: Thresholds,
) -> None:
    """Compare the stems of a whole song with torch's, with the truth and with the mixture.

    Args:
        figures: what the answers are added to.
        step: whose stems they are.
        material: the song.
        reference: torch's in fp32, one [channels, n] per stem.
        stems: the step's own, likewise.
        limits: of the artefact.
    """
    floor = quiet_floor(material)
    where = "" if material.song.name == "rendered song" else f" ({material.song.name})"
    truth = sdr_db(material, reference)
    ours = sdr_db(material, stems)
    for name, want, got in zip(material.spec.stems, reference, stems, strict=True):
        subject = name + where
        snr = snr_db(want, got, floor)
        error = max_abs_error(want, got)
        figures.at_least(step, "SNR against torch", subject, snr, limits.snr_db, "dB")
        figures.at_most(step, "max abs error", subject, error, limits.peak_error, "")
        if name in truth:
            change = ours[name] - truth[name]
            figures.at_most(step, "SDR change", subject, abs(change), limits.sdr_change_db, "dB")
            figures.at_least(step, "SDR", subject, ours[name], None, "dB")
    if len(stems) > 1:
        error_db = sum_error_db(material.song.mixture, stems)
        subject = "all stems" + where
        figures.at_least(step, "sum against mixture", subject, error_db, limits.sum_db, "dB")
    check_seams(figures, step, material, stems, limits, where)


def check_seams(
    figures: Figures,
    step: Step,
    material: Material,
    stems: Sequence[Samples],
    limits: Thresholds,
    where: str,
) -> None:
    """Look for the places where chunks were joined: where a chunk's part begins or ends.

    A jump shows in each stem's step at a seam, against the steps around it; where the mixture has
    one there (a drum), its own is the measure. A dip or a swell, which parts that don't complete
    each other leave, shows in what the stems' sum lacks of the mixture near seams, against what it
    lacks elsewhere.
    """
    if not material.seams:
        return
    mixture = material.song.mixture
    reach = min(_SEAM_REACH, material.plan.stride // 16)
    usual = max(1.0, seam_step(mixture, material.seams, reach) / _MUSICAL_STEP)
    for name, stem in zip(material.spec.stems, stems, strict=True):
        excess = seam_step(stem, material.seams, reach) / usual
        figures.at_most(step, "seam step", name + where, excess, limits.seam_step, "")
    lack = seam_energy_db(mixture, stems, material.seams, reach)
    figures.at_most(step, "seam energy", "all stems" + where, lack, limits.seam_energy_db, "dB")


def check_repeated(
    figures: Figures, step: Step, run: Runner, chunk: Samples, before: Sequence[Samples]
) -> None:
    """Ask the same once more; the answers must have the same bytes."""
    again = run(chunk)
    same = all(one.tobytes() == other.tobytes() for one, other in zip(before, again, strict=True))
    figures.holds(step, "deterministic", "", same, "The same chunk twice gives the same bytes.")


def check_batch(
    figures: Figures,
    step: Step,
    run: Runner,
    chunks: Sequence[Samples],
    alone: Sequence[Sequence[Samples]],
    stems: Sequence[str],
    limits: Thresholds,
) -> None:
    """Run two chunks as one batch; each must be what it is alone.

    Args:
        figures: what the answers are added to.
        step: who is asked.
        run: asks.
        chunks: [1, channels, chunk_samples] each.
        alone: the stems of each, when it was asked for by itself.
        stems: names of the stems.
        limits: of the artefact.
    """
    together = run(np.concatenate(chunks))
    for position, name in enumerate(stems):
        worst, error = np.inf, 0.0
        for item, (chunk, single) in enumerate(zip(chunks, alone, strict=True)):
            want, got = single[position][0], together[position][item]
            floor = energy(chunk) * 10 ** (-QUIET_STEM_DB / 10)
            worst = min(worst, snr_db(want, got, floor))
            error = max(error, max_abs_error(want, got))
        figures.at_least(step, "batch against single", name, worst, limits.batch_db, "dB")
        figures.at_most(step, "batch max abs difference", name, error, limits.peak_error, "")


def check_odd_inputs(
    figures: Figures, step: Step, run: Runner, dims: tuple[int, int], limits: Thresholds
) -> None:
    """Feed what breaks careless arithmetic; what comes must be finite and in proportion."""
    for name, chunk in odd_inputs(*dims):
        figures.report(f"{step}: {name}")
        outputs = run(chunk)
        finite = all(np.isfinite(output).all() for output in outputs)
        figures.holds(step, "finite output", name, finite, "No sample may be NaN or infinite.")
        loudest = max(peak(output) for output in outputs) if finite else float("nan")
        if chunk.any():
            gain = loudest / peak(chunk)
            figures.at_most(step, "peak over input's", name, gain, limits.gain, "")
        else:
            figures.at_most(step, "peak", name, loudest, limits.silence_peak, "")


def check_same(
    figures: Figures,
    expected: Mapping[str, Samples],
    found: Mapping[str, Samples],
    limits: Thresholds,
    *,
    same_runtime: bool,
) -> None:
    """Compare a served chunk with the graph's.

    Args:
        figures: what the answers are added to.
        expected: stem -> [1, channels, chunk_samples] of the graph here.
        found: the same of the server.
        limits: of the artefact.
        same_runtime: whether the server runs the ONNX Runtime of this environment on this CPU:
            then every bit must be the same.
    """
    for name, want in expected.items():
        got = found[name]
        if same_runtime:
            same = want.tobytes() == got.tobytes()
            seen = f"SNR {snr_db(want, got):.1f} dB; the server runs the same ONNX Runtime."
            figures.holds("served", "same bits as the graph", name, same, seen)
        else:
            limit = limits.other_runtime_db
            figures.at_least(
                "served", "SNR against the graph", name, snr_db(want, got), limit, "dB"
            )
