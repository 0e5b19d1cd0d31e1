"""The scores of one track: which stems, against which references, in which company."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from stemserve.evaluation.dataset import Track, read_audio
from stemserve.evaluation.metrics import (
    BSS_METRICS,
    bss_eval,
    global_sdr,
    is_silent,
    si_sdr,
)

Samples = npt.NDArray[np.float32]

ACCOMPANIMENT: Final = "accompaniment"
VOCALS: Final = "vocals"


@dataclass(frozen=True, slots=True)
class StemPlan:
    """Which stems of a track are scored.

    Attributes:
        references: the references that are summed for each scored stem, in the order of the
            estimates; one, but for an accompaniment that the data set does not have as a file.
        unreferenced: estimated stems without a reference.
        unestimated: references without an estimate.
    """

    references: Mapping[str, tuple[str, ...]]
    unreferenced: tuple[str, ...]
    unestimated: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ScoringTask:
    """What a scoring process needs.

    Attributes:
        track: the track.
        plan: which stems are scored.
        estimates: file of every stem of the plan.
        metrics: names out of ``metrics.METRICS``.
    """

    track: Track
    plan: StemPlan
    estimates: Mapping[str, Path]
    metrics: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TrackScores:
    """The scores of one track.

    Attributes:
        key: of the track.
        duration_s: its length.
        scores: dB by stem and metric; NaN where there is nothing to measure.
        notes: sentences about what was left out.
    """

    key: str
    duration_s: float
    scores: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...] = ()


def plan_stems(references: Sequence[str], estimated: Sequence[str]) -> StemPlan:
    """Match stems by name.

    An accompaniment without a file is the sum of all references but the vocals.
    """
    chosen: dict[str, tuple[str, ...]] = {}
    for stem in estimated:
        if stem in references:
            chosen[stem] = (stem,)
        elif stem == ACCOMPANIMENT:
            parts = tuple(name for name in references if name != VOCALS)
            if parts:
                chosen[stem] = parts
    used = {name for parts in chosen.values() for name in parts}
    return StemPlan(
        chosen,
        tuple(stem for stem in estimated if stem not in chosen),
        tuple(name for name in references if name not in used),
    )


def score_track(task: ScoringTask) -> TrackScores:
    """Read a track's files and score its stems.

    Raises:
        AudioInputError: a file is damaged or holds NaN or infinite samples.
    """
    track, plan = task.track, task.plan
    references = {
        stem: _sum([read_audio(track.references[name], track.channels) for name in parts])
        for stem, parts in plan.references.items()
    }
    estimates = {stem: read_audio(task.estimates[stem], track.channels) for stem in references}
    scores: dict[str, dict[str, float]] = {
        stem: dict.fromkeys(task.metrics, math.nan) for stem in references
    }
    notes = []
    sounding = []
    for stem, reference in references.items():
        estimate = estimates[stem]
        if "global_sdr" in task.metrics:
            scores[stem]["global_sdr"] = global_sdr(reference, estimate)
        if "si_sdr" in task.metrics:
            scores[stem]["si_sdr"] = si_sdr(reference, estimate)
        silent = [
            what
            for what, samples in (("reference", reference), ("estimate", estimate))
            if is_silent(samples)
        ]
        if silent:
            notes.append(
                f"{track.key}: silent {' and '.join(silent)} of '{stem}'; scores that say nothing "
                "then are left out."
            )
        else:
            sounding.append(stem)
    if any(metric in BSS_METRICS for metric in task.metrics):
        for group in bss_groups(sounding, plan):
            for stem, values in _score_group(track, group, references, estimates, notes).items():
                scores[stem].update({m: values[m] for m in BSS_METRICS if m in task.metrics})
    return TrackScores(track.key, track.duration_s, scores, tuple(notes))


def bss_groups(stems: Sequence[str], plan: StemPlan) -> list[list[str]]:
    """Return which stems BSS Eval sees together as all sources of the mixture.

    An accompaniment beside its own parts is scored against the vocals alone, and the vocals
    against it alone, as museval does it for MUSDB: later groups replace earlier ones' scores.
    """
    parts = set(plan.references.get(ACCOMPANIMENT, ()))
    if ACCOMPANIMENT not in stems or not (parts - {ACCOMPANIMENT}) & set(plan.references):
        return [list(stems)] if stems else []
    inner = [stem for stem in stems if stem != ACCOMPANIMENT]
    outer = [stem for stem in stems if stem in (VOCALS, ACCOMPANIMENT)]
    return [inner, outer] if inner else [outer]


def _score_group(
    track: Track,
    group: Sequence[str],
    references: Mapping[str, Samples],
    estimates: Mapping[str, Samples],
    notes: list[str],
) -> dict[str, dict[str, float]]:
    """Score stems that make up the mixture; a single one against the rest of the mixture."""
    true = [references[stem] for stem in group]
    found = [estimates[stem] for stem in group]
    if len(group) == 1:
        mixture = read_audio(track.mixture, track.channels)
        true.append(mixture - true[0])
        found.append(mixture - found[0])
        if is_silent(true[1]) or is_silent(found[1]):
            notes.append(
                f"{track.key}: there is nothing in the mixture beside '{group[0]}'; its SDR, SIR "
                "and SAR are left out."
            )
            return {}
    medians = bss_eval(np.stack(true), np.stack(found), track.sample_rate)
    if np.isnan(medians).all():
        notes.append(
            f"{track.key}: no second has sound in every stem of {', '.join(group)}; their SDR, "
            "SIR and SAR are left out."
        )
    return {
        stem: dict(zip(BSS_METRICS, map(float, medians[:, index]), strict=True))
        for index, stem in enumerate(group)
    }


def _sum(parts: Sequence[Samples]) -> Samples:
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total
