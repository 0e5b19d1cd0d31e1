"""``stemserve export``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import click

from stemserve.errors import MissingExtraError
from stemserve.spec import Precision, WireDtype


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
    "checkpoints",
    multiple=True,
    metavar="URI",
    help="Weights of your own in the model's published format (https, file, pypi). For a model "
    "with a file per stem: STEM=URI, or a file: URI of the folder with all of them.",
)
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default="fp32",
    show_default=True,
    help="What the graph's core computes in; an fp16 model is named NAME_fp16.",
)
@click.option(
    "--wire",
    "wire_dtype",
    type=click.Choice(get_args(WireDtype)),
    default="fp32",
    show_default=True,
    help="What samples travel in; fp16 halves the bytes and leaves 71 dB.",
)
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="A choice that the graph is built with, e.g. mask_extension=zeros.",
)
@click.option("--name", "rename", metavar="NAME", help="Name of the model in the repository.")
@click.option(
    "--accept-licence",
    is_flag=True,
    help="Agree to a licence of weights that forbids commercial use.",
)
@click.option("--list", "listing", is_flag=True, help="List the models that can be exported.")
def export(
    names: tuple[str, ...],
    repository: Path | None,
    checkpoints: tuple[str, ...],
    precision: Precision,
    wire_dtype: WireDtype,
    options: tuple[str, ...],
    rename: str | None,
    accept_licence: bool,
    listing: bool,
) -> None:
    """Export the models NAME... into a Triton model repository."""
    from stemserve.repository import MODEL_FILE, default_repository
    from stemserve_export.catalog import find_model

    if listing:
        from stemserve_export.listing import print_catalog

        print_catalog()
        return
    if not names:
        raise click.UsageError("Name a model, or list them with --list.")
    if len(names) > 1 and (checkpoints or rename):
        raise click.UsageError("--checkpoint and --name go with one model.")
    entries = [find_model(name) for name in names]
    require_extra("torch", "onnx", "onnxscript")
    from stemserve_export.choices import (
        with_checkpoint,
        with_name,
        with_options,
        with_precision,
    )
    from stemserve_export.exporter import export_model

    folder = repository or default_repository()
    for entry in entries:
        chosen = with_checkpoint(with_options(entry, _parse_options(options)), checkpoints)
        chosen = with_precision(chosen, precision, wire_dtype)
        if rename is not None:
            chosen = with_name(chosen, rename)
        done = export_model(chosen, folder, accept_licence=accept_licence, report=click.echo)
        state = "Built" if done.built else "Up to date:"
        path = done.folder / MODEL_FILE
        if path.exists():
            size = path.stat().st_size / 1e6
            click.echo(f"{state} {path} ({size:.1f} MB, {done.record['nodes']} nodes)")
        else:
            click.echo(f"{state} {done.folder.parent} ({', '.join(done.record['specialists'])})")


def require_extra(*packages: str) -> None:
    """Raise MissingExtraError unless the packages of the extra ``export`` are installed."""
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtraError(
                f"Exporting needs the package {package}, which is not installed; install the "
                "extra with `pip install 'stemserve[export]'`."
            )


def _parse_options(options: tuple[str, ...]) -> dict[str, str]:
    parsed = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise click.UsageError(f"--option takes NAME=VALUE, got '{option}'.")
        parsed[name] = value
    return parsed
