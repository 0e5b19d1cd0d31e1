"""What the command line shows a person: tables and progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from stemserve.result import Result
    from stemserve.triton import ServedModel


@contextlib.contextmanager
def progress_bar(
    title: str, *, shown: bool, check: Callable[[], None]
) -> Iterator[Callable[[int, int], None]]:
    """Show chunks done on a terminal; yields the callback that :class:`Separator` takes.

    Args:
        title: what is shown before the bar.
        shown: whether there is a bar at all.
        check: called after each chunk; may raise to stop.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(title, total=None)

        def update(done: int, expected: int) -> None:
            check()
            progress.update(task, completed=done, total=max(done, expected))

        yield update


def print_result(console: Console, result: Result, server_peak_rss_mb: float | None) -> None:
    """Print where the stems are and how the separation went."""
    metadata = result.metadata
    table = Table(title=f"{metadata['track']}", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, path in result.stems.items():
        table.add_row(name, str(path))
    table.add_row(
        "model",
        f"{metadata['model_name']} version {metadata['model_version']} on {metadata['device']}",
    )
    table.add_row(
        "speed",
        f"{metadata['input']['duration_seconds']:.1f} s of audio in "
        f"{metadata['runtime_seconds']:.2f} s: {metadata['x_realtime']:.1f} x real time",
    )
    latency = metadata["latency_ms"]
    trips = latency["round_trip"]
    table.add_row(
        "chunk latency",
        f"p50 {trips['p50']:.0f} ms, p95 {trips['p95']:.0f} ms, p99 {trips['p99']:.0f} ms "
        f"({_count(metadata['chunks']['count'], 'chunk')} of "
        f"{metadata['chunks']['seconds']:.1f} s)",
    )
    if "queue" in latency:
        table.add_row(
            "mean split",
            f"queue {latency['queue']['mean']:.0f} ms, compute {latency['compute']['mean']:.0f} "
            f"ms, network {latency['network']['mean']:.0f} ms",
        )
    memory = f"client {metadata['client_peak_rss_mb']:.0f} MB"
    if server_peak_rss_mb is not None:
        memory += f", server {server_peak_rss_mb:.0f} MB"
    table.add_row("peak memory", memory)
    for warning in metadata["warnings"]:
        table.add_row("[yellow]warning[/yellow]", f"{warning['code']}: {warning['message']}")
    console.print(table)


def print_models(console: Console, url: str, models: Sequence[tuple[str, ServedModel]]) -> None:
    """Print the models of a server that carry a spec."""
    table = Table(title=f"Models at {url}", title_justify="left")
    for column in ("model", "version", "stems", "chunk", "device", "licence"):
        table.add_column(column, no_wrap=column in ("model", "version", "device"))
    for version, model in models:
        spec = model.spec
        table.add_row(
            spec.name,
            version,
            ", ".join(spec.stems),
            f"{spec.chunk_samples / spec.sample_rate:.2f} s",
            model.device,
            spec.checkpoint.licence,
        )
    console.print(table)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
