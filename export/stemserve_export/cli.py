"""``stemserve export``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import click

from stemserve.errors import MissingExtraError


@click.command()
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option(
    "--repository",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Model repository. [default: ./model_repository, or the user's data folder]",
)
@click.option(
    "--checkpoint",
    metavar="URI",
    help="Weights of your own in the model's published format (https, file, pypi).",
)
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="A choice that the graph is built with, e.g. mask_extension=zeros.",
)
@click.option("--list", "listing", is_flag=True, help="List the models that can be exported.")
def export(
    names: tuple[str, ...],
    repository: Path | None,
    checkpoint: str | None,
    options: tuple[str, ...],
    listing: bool,
) -> None:
    """Export the models NAME... into a Triton model repository."""
    from stemserve.repository import default_repository
    from stemserve_export.catalog import find_model

    if listing:
        _print_catalog()
        return
    if not names:
        raise click.UsageError("Name a model, or list them with --list.")
    if checkpoint is not None and len(names) > 1:
        raise click.UsageError("--checkpoint goes with one model.")
    entries = [find_model(name) for name in names]
    for package in ("torch", "onnx", "onnxscript"):
        if find_spec(package) is None:
            raise MissingExtraError(
                f"Exporting needs the package {package}, which is not installed; install the "
                "extra with `pip install 'stemserve[export]'`."
            )
    from stemserve_export.exporter import export_model, with_checkpoint, with_options

    folder = repository or default_repository()
    for entry in entries:
        chosen = with_options(entry, _parse_options(options))
        if checkpoint is not None:
            chosen = with_checkpoint(chosen, checkpoint)
        done = export_model(chosen, folder, report=click.echo)
        size = done.path.stat().st_size / 1e6
        state = "Built" if done.built else "Up to date:"
        click.echo(f"{state} {done.path} ({size:.1f} MB, {done.record['nodes']} nodes)")


def _parse_options(options: tuple[str, ...]) -> dict[str, str]:
    parsed = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise click.UsageError(f"--option takes NAME=VALUE, got '{option}'.")
        parsed[name] = value
    return parsed


def _print_catalog() -> None:
    from rich.console import Console
    from rich.table import Table

    from stemserve_export.catalog import load_catalog

    table = Table(title="Models that can be exported", title_justify="left")
    table.add_column("model", no_wrap=True)
    for column in ("family", "stems", "weights", "licence", "commercial use"):
        table.add_column(column, overflow="fold")
    for name, entry in sorted(load_catalog().items()):
        size = f"{entry.checkpoint.size / 1e6:.0f} MB" if entry.checkpoint.size else "?"
        table.add_row(
            name,
            f"{entry.family} ({entry.domain})",
            ", ".join(entry.stems),
            f"{entry.checkpoint.source} ({size})",
            entry.licence,
            "yes" if entry.commercial_use else "no",
        )
    Console().print(table)
