"""The command ``stemserve``."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections import Counter
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import stemserve
from stemserve.errors import OutputError, SpecError, StemserveError
from stemserve.options import separation_options
from stemserve.process import SafeStop, reuse_freed_chunks, terminate

if TYPE_CHECKING:
    from stemserve.result import Result

_PLUGIN_GROUP = "stemserve.commands"


class _Commands(click.Group):
    """Our own commands, and those that the other rooms register as entry points."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        plugins = [point.name for point in entry_points(group=_PLUGIN_GROUP)]
        return sorted({*super().list_commands(ctx), *plugins})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        for point in entry_points(group=_PLUGIN_GROUP, name=cmd_name):
            command: click.Command = point.load()
            return command
        return None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(stemserve.__version__, prog_name="stemserve")
def cli() -> None:
    """Music stem separation served by NVIDIA Triton."""


@cli.command()
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE..."
)
@separation_options
@click.option("--stems", metavar="A,B", help="Stems to ask for; only they travel. [default: all]")
@click.option(
    "--out",
    "out_dir",
    type=click.Path(path_type=Path),
    default=Path("separated"),
    show_default=True,
    metavar="DIR",
    help="Stems go to DIR/<track>/<stem>.<format>.",
)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["wav", "flac", "mp3"]),
    default="wav",
    show_default=True,
    help="wav is 32-bit float, flac 24 bit, mp3 320 kbit/s.",
)
@click.option(
    "--sample-rate",
    type=click.Choice(["44100", "48000"]),
    help="Sample rate of the stems in Hz. [default: the input's]",
)
@click.option(
    "--normalize",
    is_flag=True,
    help="One gain for all stems, such that the loudest peaks at -1 dBFS.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print metadata, and nothing else, on stdout."
)
def separate(
    files: tuple[Path, ...],
    url: str | None,
    model: str | None,
    stems: str | None,
    out_dir: Path,
    file_format: str,
    sample_rate: str | None,
    normalize: bool,
    overlap: float | None,
    shifts: int,
    shift_seed: int,
    repository: Path | None,
    shared_memory: bool,
    as_json: bool,
) -> None:
    """Separate FILEs into stems.

    Several files that fail or succeed are reported one by one; the exit status is that of the
    first failure.
    """
    from rich.console import Console

    from stemserve.audio import AudioReader
    from stemserve.report import print_result, progress_bar
    from stemserve.separator import Separator
    from stemserve.server import embedded_server
    from stemserve.tensors import shared_memory_has_room

    _check_track_names(files, out_dir)
    if len(files) == 1:  # before a server is started for it
        AudioReader(files[0]).close()
    console = Console()
    options: dict[str, Any] = {
        "stems": None if stems is None else [stem.strip() for stem in stems.split(",") if stem],
        "file_format": file_format,
        "sample_rate": None if sample_rate is None else int(sample_rate),
        "normalize": normalize,
        "overlap": overlap,
        "shifts": shifts,
        "shift_seed": shift_seed,
    }
    done: list[Result] = []
    failures: list[StemserveError] = []
    with contextlib.ExitStack() as stack:
        server = None
        if url is None:
            server = stack.enter_context(embedded_server(repository, model))
            url = server.url
            shared_memory = shared_memory_has_room()
        separator = stack.enter_context(Separator(url, model, shared_memory=shared_memory))
        stop = stack.enter_context(SafeStop())
        for file in files:
            stop.check()
            shown = sys.stderr.isatty() and not as_json
            try:
                with progress_bar(file.name, shown=shown, check=stop.check) as progress:
                    result = separator.separate(file, out_dir, progress=progress, **options)
            except StemserveError as error:
                if len(files) == 1:
                    raise
                click.echo(f"Error: {error}", err=True)
                failures.append(error)
                continue
            done.append(result)
            if not as_json:
                print_result(console, result, None if server is None else server.peak_rss_mb())
    if as_json:
        records = [result.metadata for result in done]
        click.echo(json.dumps(records[0] if len(files) == 1 else records, indent=2))
    if failures:
        click.echo(f"{len(failures)} of {len(files)} files failed.", err=True)
        raise SystemExit(failures[0].exit_code)


@cli.command()
@click.option(
    "--repository",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Model repository. [default: ./model_repository, or the user's data folder]",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help="Model to load; may be repeated. [default: all that are exported]",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, metavar="H", help="Address to listen on."
)
@click.option("--grpc-port", type=click.IntRange(0, 65535), default=8001, show_default=True)
@click.option("--http-port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--metrics-port", type=click.IntRange(0, 65535), default=8002, show_default=True)
@click.option(
    "--startup-deadline",
    type=float,
    default=120.0,
    show_default=True,
    metavar="S",
    help="Seconds within which every model must be loaded and warm.",
)
@click.option("--log", type=click.Path(path_type=Path), metavar="FILE", help="The server's log.")
def serve(
    repository: Path | None,
    models: tuple[str, ...],
    host: str,
    grpc_port: int,
    http_port: int,
    metrics_port: int,
    startup_deadline: float,
    log: Path | None,
) -> None:
    """Serve the repository with a local tritonserver until Ctrl-C or SIGTERM."""
    from stemserve.errors import ServerLostError
    from stemserve.server import LocalServer
    from stemserve.verification import verification_warning

    with LocalServer(
        repository,
        models,
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        startup_deadline_s=startup_deadline,
        log=log,
    ) as server:
        for name in server.models:
            if (warning := verification_warning(server.repository, name)) is not None:
                click.echo(f"Warning: {warning}", err=True)
        click.echo(f"Serving {', '.join(server.models)} (process {server.pid})")
        click.echo(f"  gRPC    {server.url}")
        click.echo(f"  HTTP    http://{host}:{server.http_port}")
        click.echo(f"  metrics http://{host}:{server.metrics_port}/metrics")
        click.echo(f"  log     {server.log}")
        click.echo(f"Try: stemserve separate --url {server.url} song.mp3")
        try:
            status = server.wait()
        except (KeyboardInterrupt, SystemExit):
            click.echo("Stopping: requests in flight are finished first.", err=True)
            raise
        raise ServerLostError(
            f"tritonserver ended by itself with status {status}. Its log ends with:\n"
            f"{server.log_tail()}"
        )


@cli.command()
@click.option(
    "--url",
    envvar="STEMSERVE_URL",
    default="localhost:8001",
    show_default=True,
    metavar="HOST:PORT",
    help="Triton's gRPC address.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def models(url: str, as_json: bool) -> None:
    """List the models of a server."""
    from dataclasses import asdict

    from rich.console import Console

    from stemserve.report import print_models
    from stemserve.separator import served_models

    found, foreign = [], []
    for name, version, model in served_models(url):
        if isinstance(model, SpecError):
            foreign.append((name, model))
        else:
            found.append((version, model))
    if as_json:
        records = [
            {**asdict(model.spec), "version": version, "device": model.device}
            for version, model in found
        ]
        click.echo(json.dumps(records, indent=2))
    else:
        print_models(Console(), url, found)
    for name, error in foreign:
        click.echo(f"Left out '{name}': {error}", err=True)


def _check_track_names(files: tuple[Path, ...], out_dir: Path) -> None:
    from stemserve.track import track_folder

    for file in files:
        track_folder(file, out_dir)
    names = Counter(file.stem for file in files)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        clashing = ", ".join(f"'{file}'" for file in files if file.stem == repeated[0])
        raise OutputError(
            f"{clashing} would all be written to the folder '{repeated[0]}'; separate them one "
            "at a time with a different --out."
        )


def main() -> None:
    """Run the command line; errors become a sentence on stderr and an exit status."""
    signal.signal(signal.SIGTERM, terminate)
    reuse_freed_chunks()
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except StemserveError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
