"""``stemserve verify``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stemserve.errors import GateError, StemserveError
from stemserve_export.cli import require_extra

if TYPE_CHECKING:
    from stemserve_export.download import Report
    from stemserve_export.gate.figures import Verification


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--repository",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Model repository. [default: ./model_repository, or the user's data folder]",
)
@click.option("--quick", is_flag=True, help="Leave the server out: torch and ONNX Runtime only.")
@click.option(
    "--url",
    metavar="HOST:PORT",
    help="Measure the models of a running server (with a GPU, say) instead of starting one here.",
)
@click.option(
    "--audio",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Songs in MUSDB's layout to measure the SDR on, too; an excerpt of each.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Write all reports there, too; '-' prints them instead of tables.",
)
def verify(
    names: tuple[str, ...],
    repository: Path | None,
    quick: bool,
    url: str | None,
    audio: Path | None,
    json_path: Path | None,
) -> None:
    """Measure what the models NAME... do, from checkpoint to served stems.

    Each is compared in steps: PyTorch in fp32, the graph in ONNX Runtime, a real Triton. The
    report lies beside the graph as verification.json. Exits with 56 if a figure misses its limit.
    All models of the repository are verified if none is named; one that joins specialists brings
    these along.
    """
    if quick and url is not None:
        raise click.UsageError("--quick leaves the server out; it goes without --url.")
    require_extra("torch", "onnxruntime")

    from rich.console import Console

    from stemserve.repository import default_repository
    from stemserve_export.gate.gate import GateOptions, verify_model
    from stemserve_export.gate.table import print_verification

    folder = repository or default_repository()
    todo = _with_specialists(folder, names)
    to_stdout = json_path is not None and str(json_path) == "-"
    done: list[Verification] = []
    errors: list[StemserveError] = []
    with _progress() as report:
        options = GateOptions(quick, url, audio, report=report)
        for name in todo:
            try:
                verification = verify_model(folder, name, options)
            except StemserveError as error:
                if len(todo) == 1:
                    raise
                click.echo(f"Error: {error}", err=True)
                errors.append(error)
                continue
            done.append(verification)
            if not to_stdout:
                print_verification(Console(), verification)
    _write_json(json_path, done, to_stdout=to_stdout)
    failed = [verification.model for verification in done if not verification.passed]
    if failed:
        sentences = sum(len(verification.failures) for verification in done)
        raise GateError(
            f"{', '.join(failed)} failed {sentences} of the release gate's checks; the lines above "
            "and verification.json say which. Export again, and report it if it stays."
        )
    if errors:
        raise SystemExit(errors[0].exit_code)


def _with_specialists(repository: Path, names: tuple[str, ...]) -> list[str]:
    """The models to verify: those named or all, each after the specialists that it joins."""
    from stemserve.repository import models_to_serve, read_config

    ordered: dict[str, None] = {}
    for name in models_to_serve(repository, names):
        for step in read_config(repository, name).ensemble_scheduling.step:
            ordered[str(step.model_name)] = None
        ordered[name] = None
    joined = {
        name: read_config(repository, name).HasField("ensemble_scheduling") for name in ordered
    }
    return sorted(ordered, key=lambda name: joined[name])  # stable: ensembles last


def _write_json(path: Path | None, done: list[Verification], *, to_stdout: bool) -> None:
    if path is None:
        return
    text = json.dumps([verification.as_dict() for verification in done], indent=2)
    if to_stdout:
        click.echo(text)
        return
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"'{path}' cannot be written to ({error.strerror}).") from None


@contextlib.contextmanager
def _progress() -> Iterator[Report]:
    """One line that changes on a terminal, a line per step elsewhere; both on stderr."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: click.echo(text, err=True)
        return
    with console.status("Verifying …") as status:
        yield status.update
