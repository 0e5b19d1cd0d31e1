"""Runs an evaluation: estimates come one track at a time, scores from several processes."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Final, Protocol

from stemserve.errors import EvaluationDataError, OutputNotWritableError
from stemserve.evaluation.dataset import Track, audio_files, check_estimates
from stemserve.evaluation.scoring import (
    ScoringTask,
    StemPlan,
    TrackScores,
    plan_stems,
    score_track,
)
from stemserve.evaluation.workers import scoring_processes
from stemserve.separator import Separator

# How often a pending Ctrl-C is looked for while nothing but scoring goes on.
_LOOK_UP_S: Final = 0.2

Step = Callable[[float, float], None]


class Estimator(Protocol):
    """Where a track's estimates come from."""

    def stems(self, track: Track) -> tuple[str, ...]:
        """Return the stems that there are for a track."""

    def estimate(
        self, track: Track, stems: Sequence[str], step: Callable[[float], None]
    ) -> Mapping[str, Path]:
        """Return the files of these stems; ``step`` is called with the share that is done."""

    def release(self, track: Track) -> None:
        """Say that a track's files are no longer needed."""


class FolderEstimator:
    """Estimates that lie in a folder: ``DIR/[<subset>/]<track>/<stem>.wav`` (or flac)."""

    def __init__(self, folder: Path, tracks: Sequence[Track]) -> None:
        self._files = {track.key: self._find(folder, track) for track in tracks}

    def stems(self, track: Track) -> tuple[str, ...]:
        """See :class:`Estimator`."""
        return tuple(self._files[track.key])

    def estimate(
        self, track: Track, stems: Sequence[str], step: Callable[[float], None]
    ) -> Mapping[str, Path]:
        """See :class:`Estimator`."""
        step(1)
        return {stem: self._files[track.key][stem] for stem in stems}

    def release(self, track: Track) -> None:
        """See :class:`Estimator`."""

    @staticmethod
    def _find(folder: Path, track: Track) -> dict[str, Path]:
        places = [folder / track.subset / track.folder.name, folder / track.folder.name]
        for place in places:
            if place.is_dir() and (files := audio_files(place)):
                scored = plan_stems(tuple(track.references), tuple(files)).references
                check_estimates(track, {stem: files[stem] for stem in scored})
                return files
        raise EvaluationDataError(
            f"There is no estimate of '{track.key}'; expected '{places[0]}/<stem>.wav'."
        )


class ServedEstimator:
    """Estimates of a served model, in a folder of their own.

    Args:
        separator: the model.
        folder: where they are written, as :class:`FolderEstimator` reads them.
        keep: whether they stay there.
        options: further arguments of ``Separator.separate``.
    """

    def __init__(
        self, separator: Separator, folder: Path, *, keep: bool, options: Mapping[str, Any]
    ) -> None:
        self._separator = separator
        self._folder = folder
        self._keep = keep
        self._options = options

    def stems(self, track: Track) -> tuple[str, ...]:
        """See :class:`Estimator`."""
        del track
        return self._separator.spec.stems

    def estimate(
        self, track: Track, stems: Sequence[str], step: Callable[[float], None]
    ) -> Mapping[str, Path]:
        """See :class:`Estimator`."""
        # `separate` names its folder after the file, and all of these are called mixture.
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".separated-") as scratch:
            result = self._separator.separate(
                track.mixture,
                scratch,
                stems=stems,
                progress=lambda done, expected: step(done / max(1, done, expected)),
                **self._options,
            )
            place = self._place(track)
            place.mkdir(parents=True, exist_ok=True)
            return {stem: path.replace(place / path.name) for stem, path in result.stems.items()}

    def release(self, track: Track) -> None:
        """See :class:`Estimator`."""
        if not self._keep:
            shutil.rmtree(self._place(track), ignore_errors=True)

    def _place(self, track: Track) -> Path:
        return self._folder / track.subset / track.folder.name


def writable_folder(folder: Path) -> Path:
    """Make a folder for estimates.

    Raises:
        OutputNotWritableError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputNotWritableError(
            f"The folder '{folder}' cannot be made ({error.strerror}); choose another place."
        ) from None
    return folder


def plan_tracks(tracks: Sequence[Track], estimator: Estimator) -> dict[str, StemPlan]:
    """Match references and estimates of all tracks, by key.

    Raises:
        EvaluationDataError: a track has no stem in common.
    """
    plans = {}
    for track in tracks:
        offered = estimator.stems(track)
        plan = plan_stems(tuple(track.references), offered)
        if not plan.references:
            raise EvaluationDataError(
                f"'{track.key}' has references for {', '.join(track.references)} and estimates of "
                f"{', '.join(offered)}: no stem in common. Name the files after the stems."
            )
        plans[track.key] = plan
    return plans


def unscored_notes(plans: Mapping[str, StemPlan]) -> list[str]:
    """Return a sentence for each stem that has only a reference or only an estimate."""
    notes = []
    for attribute, sentence in (
        ("unreferenced", "has no reference"),
        ("unestimated", "has a reference and no estimate"),
    ):
        stems = {stem: None for plan in plans.values() for stem in getattr(plan, attribute)}
        for stem in stems:
            count = sum(stem in getattr(plan, attribute) for plan in plans.values())
            where = "" if count == len(plans) else f" in {count} of {len(plans)} tracks"
            notes.append(f"'{stem}' {sentence}{where} and is not scored there.")
    return notes


def score_tracks(
    tracks: Sequence[Track],
    plans: Mapping[str, StemPlan],
    estimator: Estimator,
    metrics: tuple[str, ...],
    *,
    jobs: int,
    separated: Step,
    scored: Step,
    check: Callable[[], None],
) -> list[TrackScores]:
    """Estimate and score all tracks; the order is that of ``tracks``, whatever ``jobs``.

    Args:
        tracks: the tracks.
        plans: of :func:`plan_tracks`.
        estimator: where estimates come from, one track after the other.
        metrics: names out of ``metrics.METRICS``.
        jobs: processes that score. At most one track more than that lies on disk.
        separated: called with (seconds of audio done, of all).
        scored: the same for scores.
        check: called often; may raise to stop.

    Raises:
        StemserveError: a track cannot be separated or scored; nothing is scored then.
    """
    total_s = sum(track.duration_s for track in tracks)
    found: dict[str, TrackScores] = {}
    pending: dict[Future[TrackScores], Track] = {}
    separated_s = 0.0

    def collect(at_most: int) -> None:
        while len(pending) > at_most:
            check()
            done, _ = wait(pending, timeout=_LOOK_UP_S, return_when=FIRST_COMPLETED)
            for future in done:
                track = pending.pop(future)
                with _told(track):
                    found[track.key] = future.result()
                estimator.release(track)
                scored(sum(result.duration_s for result in found.values()), total_s)

    def step(track: Track, share: float) -> None:
        check()
        separated(separated_s + share * track.duration_s, total_s)

    with scoring_processes(min(jobs, len(tracks))) as pool:
        for track in tracks:
            collect(jobs)
            plan = plans[track.key]
            files = estimator.estimate(
                track, tuple(plan.references), functools.partial(step, track)
            )
            separated_s += track.duration_s
            task = ScoringTask(track, plan, files, metrics)
            with _told(track):
                pending[pool.submit(score_track, task)] = track
        collect(0)
    return [found[track.key] for track in tracks]


@contextlib.contextmanager
def _told(track: Track) -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise EvaluationDataError(
            f"A scoring process died (while '{track.key}' was waited for), most likely for want "
            "of memory; lower --jobs, or leave SDR, SIR and SAR out with "
            "--metrics global_sdr,si_sdr."
        ) from None
