"""Comparison with an earlier evaluation: has a new version of a model become worse?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stemserve.errors import EvaluationDataError, RegressionError
from stemserve.evaluation.metrics import LABELS
from stemserve.evaluation.results import Evaluation, listed, text_db

DEFAULT_TOLERANCE_DB: Final = 0.1
# Beyond this, scores measure the rounding of float32 samples (about 150 dB): a perfect estimate
# may have 290 dB today and 310 tomorrow, or inf.
CEILING_DB: Final = 120.0
# What JSON's six decimals and sums in another order may change.
_ROUNDING_DB: Final = 2e-6


@dataclass(frozen=True, slots=True)
class Change:
    """A stem's median then and now, in dB.

    Attributes:
        before, after: medians over tracks.
        tracks_before, tracks_after: tracks on which it could be measured.
        tolerance_db: by how much it may fall.
    """

    stem: str
    metric: str
    before: float
    after: float
    tracks_before: int
    tracks_after: int
    tolerance_db: float

    @property
    def rise_db(self) -> float:
        """How much better it has become; NaN where one side was not measured."""
        return _capped(self.after) - _capped(self.before)

    @property
    def regressed(self) -> bool:
        """Whether it fell by more than the tolerance, or cannot be measured any more."""
        if self.tracks_after < self.tracks_before:
            return True
        return self.rise_db < -self.tolerance_db - _ROUNDING_DB  # False for NaN

    def __str__(self) -> str:
        name = LABELS[self.metric]
        if self.tracks_after < self.tracks_before:
            return (
                f"{name} measured on {self.tracks_before} tracks then and {self.tracks_after} now"
            )
        return f"{name} {text_db(self.before)} to {text_db(self.after)}"


def compare(
    now: Evaluation, baseline: Evaluation, tolerances_db: Mapping[str, float], path: Path
) -> list[Change]:
    """Return how each median changed, for every stem of the baseline and every metric of now.

    Args:
        now: the new scores.
        baseline: the earlier ones.
        tolerances_db: by metric; :data:`DEFAULT_TOLERANCE_DB` for those left out.
        path: where the baseline came from, for errors.

    Raises:
        EvaluationDataError: the two were not measured on the same tracks, or not alike.
    """
    gone = sorted(set(baseline.scores) - set(now.scores))
    new = sorted(set(now.scores) - set(baseline.scores))
    if gone or new:
        differences = [f"{listed(gone)} of the baseline missing now"] if gone else []
        differences += [f"{listed(new)} missing in the baseline"] if new else []
        raise EvaluationDataError(
            f"The baseline '{path}' was measured on other tracks ({'; '.join(differences)}), so "
            "medians cannot be compared; evaluate the same tracks, or save a new baseline."
        )
    longer = [
        key for key, value in now.durations_s.items()
        if abs(value - baseline.durations_s[key]) > 2e-3
    ]  # fmt: skip
    if longer:
        raise EvaluationDataError(
            f"The baseline '{path}' was measured on other audio ({listed(longer)} had another "
            "length); evaluate the same tracks, or save a new baseline."
        )
    for name in now.settings.keys() & baseline.settings.keys():
        if now.settings[name] != baseline.settings[name]:
            raise EvaluationDataError(
                f"The baseline '{path}' was measured with {name} {baseline.settings[name]} and "
                f"this is {now.settings[name]}; save a new baseline."
            )
    return [
        Change(
            stem,
            metric,
            baseline.median(stem, metric),
            now.median(stem, metric),
            len(baseline.values(stem, metric)),
            len(now.values(stem, metric)),
            tolerances_db.get(metric, DEFAULT_TOLERANCE_DB),
        )
        for stem in baseline.stems
        for metric in now.metrics
        if metric in baseline.metrics
    ]


def check_regressions(changes: list[Change], path: Path) -> None:
    """Raise RegressionError with a sentence about everything that fell."""
    fallen: dict[str, list[str]] = {}
    for change in changes:
        if change.regressed:
            fallen.setdefault(change.stem, []).append(str(change))
    if fallen:
        what = "; ".join(f"'{stem}' ({', '.join(parts)})" for stem, parts in fallen.items())
        raise RegressionError(
            f"Worse than the baseline '{path}' by more than the tolerance, in dB: {what}. Find out "
            "why or, if it is meant to be so, save a new baseline."
        )


def _capped(value: float) -> float:
    return value if math.isnan(value) else max(-CEILING_DB, min(CEILING_DB, value))
