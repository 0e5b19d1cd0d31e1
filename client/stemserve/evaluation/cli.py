"""``stemserve evaluate``."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stemserve.options import separation_options

if TYPE_CHECKING:
    from stemserve.evaluation.dataset import Track
    from stemserve.evaluation.results import Evaluation
    from stemserve.evaluation.run import Estimator

_METRICS = ("sdr", "sir", "sar", "global_sdr", "si_sdr")
_BSS = _METRICS[:3]
_PLOT_FORMATS = (".png", ".svg", ".pdf")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--estimates",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Score DIR/[train|test/]<track>/<stem>.wav instead of separating.",
)
@separation_options
@click.option(
    "--keep-estimates",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the separated stems there, for --estimates. [default: they are removed]",
)
@click.option(
    "--subset", type=click.Choice(["train", "test"]), help="Only these tracks. [default: all]"
)
@click.option(
    "--metrics",
    default=",".join(_METRICS),
    show_default=True,
    metavar="A,B",
    help="Scores to compute. sdr, sir and sar take most of the time.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tracks that are scored at once. [default: one per core, as far as memory goes]",
)
@click.option(
    "--baseline",
    "baseline_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Compare medians with this earlier result; exit with 70 if one fell.",
)
@click.option(
    "--tolerance",
    "tolerances",
    multiple=True,
    metavar="[METRIC=]DB",
    help="By how much a median may fall; may be repeated. [default: 0.1]",
)
@click.option(
    "--save-baseline",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the result there, unless it is worse than --baseline.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw the scores (png, svg or pdf).",
)
@click.option("--per-track", is_flag=True, help="Print the scores of each track, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on stdout.")
def evaluate(
    folder: Path,
    estimates: Path | None,
    url: str | None,
    model: str | None,
    repository: Path | None,
    shared_memory: bool,
    overlap: float | None,
    shifts: int,
    shift_seed: int,
    keep_estimates: Path | None,
    subset: str | None,
    metrics: str,
    jobs: int | None,
    baseline_path: Path | None,
    tolerances: tuple[str, ...],
    save_baseline: Path | None,
    plot: Path | None,
    per_track: bool,
    as_json: bool,
) -> None:
    """Score a model on the tracks of DIR, a data set in MUSDB's layout.

    DIR/[train|test/]<track>/ holds mixture.wav and <stem>.wav, or flac. Shown are SDR, SIR and SAR
    (BSS Eval v4, median over frames of 1 s), global SDR and SI-SDR per stem, as medians over
    tracks.
    """
    chosen = _parse_metrics(metrics)
    tolerances_db = _parse_tolerances(tolerances, chosen)
    separation = {"overlap": overlap, "shifts": shifts, "shift_seed": shift_seed}
    serving = (model, repository, shared_memory, keep_estimates, overlap, shifts)
    if estimates is not None and any(serving):
        raise click.UsageError("--estimates goes without a model: nothing is separated.")
    if tolerances and baseline_path is None:
        raise click.UsageError("--tolerance goes with --baseline.")
    if plot is not None and plot.suffix.lower() not in _PLOT_FORMATS:
        raise click.UsageError(f"--plot takes a png, svg or pdf file, got '{plot}'.")
    _check_extra(chosen, plot)

    from rich.console import Console

    from stemserve.evaluation.baseline import check_regressions, compare
    from stemserve.evaluation.dataset import find_tracks
    from stemserve.evaluation.report import print_summary, print_tracks
    from stemserve.evaluation.results import load_evaluation, save_json

    baseline = None if baseline_path is None else load_evaluation(baseline_path)
    tracks = find_tracks(folder, subset)
    shown = sys.stderr.isatty() and not as_json
    with contextlib.ExitStack() as stack:
        estimator, source = _estimator(
            stack,
            tracks,
            estimates,
            url,
            model,
            repository,
            shared_memory,
            separation,
            keep_estimates,
        )
        evaluation = _evaluate(tracks, estimator, source, chosen, jobs, shown=shown)
    changes = None
    if baseline is not None and baseline_path is not None:
        changes = compare(evaluation, baseline, tolerances_db, baseline_path)
    if as_json:
        click.echo(json.dumps(evaluation.to_json(), indent=2))
    else:
        console = Console()
        if per_track:
            print_tracks(console, evaluation)
        print_summary(console, evaluation, changes)
    if plot is not None:
        from stemserve.evaluation.plot import save_plot

        save_plot(plot, evaluation, baseline)
    if changes is not None and baseline_path is not None:
        check_regressions(changes, baseline_path)
    if save_baseline is not None:
        save_json(save_baseline, evaluation.to_json())


def _estimator(
    stack: contextlib.ExitStack,
    tracks: Sequence[Track],
    estimates: Path | None,
    url: str | None,
    model: str | None,
    repository: Path | None,
    shared_memory: bool,
    separation: dict[str, Any],
    keep: Path | None,
) -> tuple[Estimator, dict[str, Any]]:
    """Return where estimates come from, and what is written down about it."""
    from stemserve.evaluation.run import FolderEstimator, ServedEstimator, writable_folder
    from stemserve.separator import Separator
    from stemserve.server import embedded_server
    from stemserve.tensors import shared_memory_has_room

    if estimates is not None:
        return FolderEstimator(estimates, tracks), {"estimates": str(estimates)}
    if keep is not None:
        work = writable_folder(keep)
    else:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stemserve-")))
    if url is None:
        url = stack.enter_context(embedded_server(repository, model)).url
        shared_memory = shared_memory_has_room()
    separator = stack.enter_context(Separator(url, model, shared_memory=shared_memory))
    spec = separator.spec
    source = {
        "model": spec.name,
        "version": spec.version,
        "checkpoint": asdict(spec.checkpoint),
        "options": dict(spec.options),
        **separation,
    }
    return ServedEstimator(separator, work, keep=keep is not None, options=separation), source


def _evaluate(
    tracks: Sequence[Track],
    estimator: Estimator,
    source: dict[str, Any],
    metrics: tuple[str, ...],
    jobs: int | None,
    *,
    shown: bool,
) -> Evaluation:
    from stemserve.evaluation.metrics import FILTER_TAPS, WINDOW_S, museval_version
    from stemserve.evaluation.report import progress_bars
    from stemserve.evaluation.results import Evaluation
    from stemserve.evaluation.run import plan_tracks, score_tracks, unscored_notes
    from stemserve.evaluation.workers import default_jobs, scoring_bytes
    from stemserve.process import SafeStop

    plans = plan_tracks(tracks, estimator)
    notes = unscored_notes(plans)
    if jobs is None:
        needed = [
            scoring_bytes(track.frames, track.channels, len(plans[track.key].references))
            for track in tracks
        ]
        jobs = default_jobs(metrics, max(needed))
    with (
        SafeStop() as stop,
        progress_bars(("estimates", "scores"), shown=shown) as (separated, scored),
    ):
        results = score_tracks(
            tracks,
            plans,
            estimator,
            metrics,
            jobs=jobs,
            separated=separated,
            scored=scored,
            check=stop.check,
        )
    settings: dict[str, Any] = {}
    if any(metric in _BSS for metric in metrics):
        settings = {"window_s": WINDOW_S, "filter_taps": FILTER_TAPS, "museval": museval_version()}
    stems = {stem: None for result in results for stem in result.scores}
    return Evaluation(
        source=source,
        settings=settings,
        metrics=metrics,
        stems=tuple(stems),
        scores={result.key: result.scores for result in results},
        durations_s={result.key: result.duration_s for result in results},
        notes=(*notes, *(note for result in results for note in result.notes)),
    )


def _parse_metrics(text: str) -> tuple[str, ...]:
    names = {name.strip() for name in text.split(",") if name.strip()}
    unknown = sorted(names - set(_METRICS))
    if unknown or not names:
        got = ", ".join(unknown) or "none"
        raise click.UsageError(f"--metrics takes some of {', '.join(_METRICS)}; got {got}.")
    return tuple(metric for metric in _METRICS if metric in names)


def _parse_tolerances(texts: tuple[str, ...], metrics: tuple[str, ...]) -> dict[str, float]:
    for_all: dict[str, float] = {}
    named: dict[str, float] = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1
        if not 0 <= value < float("inf") or (equals and name not in metrics):
            raise click.UsageError(
                f"--tolerance takes decibels, 0 or more, e.g. 0.2 or sir=0.5; got '{text}'."
            )
        if equals:
            named[name] = value
        else:
            for_all = dict.fromkeys(metrics, value)
    return for_all | named


def _check_extra(metrics: tuple[str, ...], plot: Path | None) -> None:
    from stemserve.evaluation.metrics import missing_package

    needed = ["museval"] if any(metric in _BSS for metric in metrics) else []
    needed += [] if plot is None else ["matplotlib"]
    for package in needed:
        if find_spec(package) is None:
            raise missing_package(package)
