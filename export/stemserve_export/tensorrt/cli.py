"""``stemserve check-tensorrt``, ``build-engine`` and ``check-engine``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stemserve.errors import StemserveError
from stemserve_export.tensorrt.errors import EngineMismatchError, GpuError, TensorRTError

if TYPE_CHECKING:
    from stemserve_export.tensorrt.ahead_of_time import AheadOfTimeBuild

# TensorRT-RTX has no fp32 matrix products for Turing, which every STFT here needs. That is its
# own limit: plain TensorRT has them.
_NOT_BY_DEFAULT = ("7.5",)

_names = click.argument("names", nargs=-1, metavar="[NAME]...")
_repository = click.option(
    "--repository",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Model repository. [default: ./model_repository, or the user's data folder]",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


@click.command()
@_names
@_repository
@click.option(
    "--compute-capability",
    "capabilities",
    multiple=True,
    metavar="X.Y",
    help="Build for this one; may be repeated. [default: all that TensorRT-RTX knows, less 7.5]",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    default=900.0,
    show_default=True,
    metavar="S",
    help="Seconds for each build.",
)
@_json
def check_tensorrt(
    names: tuple[str, ...],
    repository: Path | None,
    capabilities: tuple[str, ...],
    time_limit: float,
    as_json: bool,
) -> None:
    """Build the graphs of the models NAME with TensorRT-RTX, without a GPU.

    All exported models if none is named. The plans are thrown away: they show that TensorRT takes
    the graph and has kernels for it. Needs Linux on x86-64.
    """
    from stemserve_export.tensorrt.ahead_of_time import check_graph, find_checker
    from stemserve_export.tensorrt.graphs import exported_graph

    folder = _folder(repository)
    graphs = [exported_graph(folder, name) for name in _models(folder, names)]
    checker = find_checker()
    wanted = capabilities or tuple(
        known for known in checker.compute_capabilities if known not in _NOT_BY_DEFAULT
    )
    shown = sys.stderr.isatty() and not as_json

    def progress(build: AheadOfTimeBuild) -> None:
        if shown:
            outcome = "fails" if build.problem else f"{build.seconds} s"
            click.echo(f"{build.model} for {build.compute_capability}: {outcome}", err=True)

    builds = [
        build
        for spec, graph in graphs
        for build in check_graph(spec, graph, wanted, time_limit_s=time_limit, report=progress)
    ]
    failed = [build for build in builds if build.problem]
    if as_json:
        record = {"tensorrt_rtx": checker.version, "builds": [build.record() for build in builds]}
        click.echo(json.dumps(record, indent=2))
    else:
        _print_builds(checker.version, builds)
    if failed:
        reasons = dict.fromkeys(f"{build.model}: {build.problem}" for build in failed)
        raise TensorRTError(f"{len(failed)} of {len(builds)} builds failed.\n" + "\n".join(reasons))


@click.command()
@_names
@_repository
@click.option(
    "--image",
    metavar="IMAGE",
    help="Build with trtexec of this container image, the one that will serve. [default: the "
    "Python package tensorrt, else trtexec of this machine]",
)
@click.option(
    "--tf32",
    is_flag=True,
    help="Let fp32 products be computed in TF32, with operands of 10 bits: some 60 dB less.",
)
@click.option(
    "--workspace",
    "workspace_mib",
    type=click.IntRange(min=1),
    metavar="MIB",
    help="Most scratch memory of a layer on the GPU. [default: the GPU's memory]",
)
@click.option("--cuda-graphs", is_flag=True, help="Have the server capture CUDA graphs.")
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for measured kernel times, which make later builds short. "
    "[default: the user's cache folder]",
)
def build_engine(
    names: tuple[str, ...],
    repository: Path | None,
    image: str | None,
    tf32: bool,
    workspace_mib: int | None,
    cuda_graphs: bool,
    timing_cache: Path | None,
) -> None:
    """Build TensorRT engines of the models NAME for the GPU of this machine.

    All exported models if none is named. TensorRT must be of the version that the server has.
    Serve them with `tritonserver --model-config-name=tensorrt`.
    """
    from stemserve_export.tensorrt import engine
    from stemserve_export.tensorrt.machine import first_gpu

    folder = _folder(repository)
    models = _models(folder, names)
    gpu = first_gpu()
    builder = engine.choose_builder(image)
    for name in models:
        done = engine.build_engine(
            folder,
            name,
            builder,
            gpu,
            tf32=tf32,
            workspace_bytes=None if workspace_mib is None else workspace_mib << 20,
            cuda_graphs=cuda_graphs,
            cache=timing_cache,
            report=click.echo,
        )
        state = "Built" if done.built else "Up to date:"
        click.echo(f"{state} {done.path} ({done.path.stat().st_size / 1e6:.1f} MB)")


@click.command()
@_names
@_repository
@click.option(
    "--tensorrt-version",
    metavar="V",
    help="The server's TensorRT, as in 10.5.0. [default: the library of this machine]",
)
@click.option(
    "--compute-capability", metavar="X.Y", help="The serving GPU's. [default: this machine's]"
)
@_json
def check_engine(
    names: tuple[str, ...],
    repository: Path | None,
    tensorrt_version: str | None,
    compute_capability: str | None,
    as_json: bool,
) -> None:
    """Check that the engines of the models NAME fit their graphs and the serving machine.

    To be run before `tritonserver --model-config-name=tensorrt`: Triton notices a missing engine
    only while it loads, and one of an older graph never.
    """
    from stemserve_export.tensorrt.machine import first_gpu, installed_tensorrt
    from stemserve_export.tensorrt.manifest import verify_engines

    folder = _folder(repository)
    if compute_capability is None:
        try:
            compute_capability = first_gpu().compute_capability
        except GpuError as error:
            click.echo(
                f"Not compared with a GPU: {error} Or name its --compute-capability.", err=True
            )
    version = tensorrt_version or installed_tensorrt()
    if version is None and compute_capability is not None:
        click.echo(
            "Not compared with a TensorRT: there is none here. Name the server's with "
            "--tensorrt-version.",
            err=True,
        )
    records: list[dict[str, Any]] = []
    problems: list[str] = []
    for name in _models(folder, names):
        try:
            engines = verify_engines(
                folder, name, tensorrt_version=version, compute_capability=compute_capability
            )
        except StemserveError as error:
            problems.append(str(error))
            records.append({"model": name, "problem": str(error)})
            continue
        capabilities = [engine.compute_capability for engine in engines.values()]
        records.append({"model": name, "problem": None, "compute_capabilities": capabilities})
        if not as_json:
            click.echo(f"{name}: engines for {', '.join(capabilities)} fit")
    if as_json:
        click.echo(json.dumps(records, indent=2))
    if problems:
        raise EngineMismatchError("\n".join(problems))


def _folder(repository: Path | None) -> Path:
    from stemserve.repository import default_repository

    return repository or default_repository()


def _models(repository: Path, names: tuple[str, ...]) -> list[str]:
    from stemserve.repository import models_to_serve
    from stemserve_export.tensorrt.graphs import graph_names

    return graph_names(repository, models_to_serve(repository, names))


def _print_builds(version: str, builds: list[AheadOfTimeBuild]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"TensorRT-RTX {version}, ahead of time", title_justify="left")
    table.add_column("model")
    for heading in ("compute capability", "build", "layers", "plan", "peak memory"):
        table.add_column(heading, justify="right")
    for build in builds:
        cells = ["fails", "", "", ""]
        if build.problem is None:
            assert build.plan_bytes is not None and build.peak_rss_bytes is not None
            cells = [
                f"{build.seconds:.1f} s",
                str(build.layers),
                f"{build.plan_bytes / 1e6:.0f} MB",
                f"{build.peak_rss_bytes / 1e6:.0f} MB",
            ]
        table.add_row(build.model, build.compute_capability, *cells)
    Console().print(table)
