"""A verification as a table."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from stemserve_export.gate.figures import Figure, Verification
from stemserve_export.gate.measures import MAX_DB


def print_verification(console: Console, verification: Verification) -> None:
    """Print a line per check, a column per step."""
    verdict = "[green]passed[/green]" if verification.passed else "[red]FAILED[/red]"
    held = sum(figure.passed is not None for figure in verification.figures)
    table = Table(
        title=f"{verification.model} version {verification.version}: {verdict}, "
        f"{held} checks in {verification.seconds:.0f} s",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("check")
    table.add_column("of", overflow="fold")
    steps = verification.steps
    for step in steps:
        table.add_column(step, justify="right", no_wrap=True)
    table.add_column("limit", justify="right", no_wrap=True)
    rows: dict[tuple[str, str], dict[str, Figure]] = {}
    for figure in verification.figures:
        rows.setdefault((figure.check, figure.subject), {})[figure.step] = figure
    for (check, subject), by_step in rows.items():
        cells = [_cell(by_step[step]) if step in by_step else "" for step in steps]
        table.add_row(check, subject, *cells, _limit(next(reversed(by_step.values()))))
    console.print(table)
    for sentence in verification.failures:
        console.print(f"[red]failed[/red] {sentence}", highlight=False)


def _cell(figure: Figure) -> str:
    if figure.value is None:
        text = "not finite"
    elif figure.unit == "yes/no":
        text = "yes" if figure.value else "no"
    elif figure.unit == "dB":
        text = "exact" if figure.value >= MAX_DB else f"{figure.value:.2f} dB"
    else:
        text = f"{figure.value:.3g}"
    return f"[red]{text}[/red]" if figure.passed is False else text


def _limit(figure: Figure) -> str:
    if figure.limit is None:
        return ""
    sign = ">=" if figure.sense == "least" else "<="
    return f"{sign} {figure.limit:.3g}{' dB' if figure.unit == 'dB' else ''}"
