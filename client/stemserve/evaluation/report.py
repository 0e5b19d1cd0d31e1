"""What the command line shows of an evaluation: tables and progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from stemserve.evaluation.baseline import Change
from stemserve.evaluation.metrics import LABELS
from stemserve.evaluation.results import Evaluation, text_db

Step = Callable[[float, float], None]


@contextlib.contextmanager
def progress_bars(titles: Sequence[str], *, shown: bool) -> Iterator[list[Step]]:
    """Show a bar per title on a terminal; yields what each is moved with: (done, of all)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"),
               TimeElapsedColumn())  # fmt: skip
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not shown
    ) as progress:

        def mover(title: str) -> Step:
            task = progress.add_task(title, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield [mover(title) for title in titles]


def print_summary(
    console: Console, evaluation: Evaluation, changes: Sequence[Change] | None
) -> None:
    """Print the medians over tracks, and against a baseline how they changed."""
    count = len(evaluation.scores)
    console.print(escape(f"{evaluation.title}, dB"), highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("stem", no_wrap=True)
    for metric in evaluation.metrics:
        table.add_column(LABELS[metric], justify="right")
    by_place = {(change.stem, change.metric): change for change in changes or ()}
    for stem in evaluation.stems:
        cells = []
        for metric in evaluation.metrics:
            cell = text_db(evaluation.median(stem, metric))
            measured = len(evaluation.values(stem, metric))
            if 0 < measured < count:
                cell += f" ({measured})"
            change = by_place.get((stem, metric))
            if change is not None:
                style = "red" if change.regressed else "green" if change.rise_db > 0 else "dim"
                cell += f"\n[{style}]{text_db(change.rise_db, signed=True)}[/{style}]"
            cells.append(cell)
        table.add_row(escape(stem), *cells)
    console.print(table)
    for note in evaluation.notes:
        console.print(f"[yellow]note[/yellow] {escape(note)}", highlight=False)


def print_tracks(console: Console, evaluation: Evaluation) -> None:
    """Print every score."""
    table = Table(title="Scores per track, dB", title_justify="left")
    table.add_column("track", overflow="fold")
    table.add_column("stem", no_wrap=True)
    for metric in evaluation.metrics:
        table.add_column(LABELS[metric], justify="right")
    for key, stems in evaluation.scores.items():
        for index, (stem, scores) in enumerate(stems.items()):
            table.add_row(
                escape(key) if index == 0 else "",
                escape(stem),
                *(text_db(scores[metric]) for metric in evaluation.metrics),
                end_section=index == len(stems) - 1,
            )
    console.print(table)
