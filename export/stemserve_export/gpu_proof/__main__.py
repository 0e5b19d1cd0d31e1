"""``python -m stemserve_export.gpu_proof``; see the package for what it is and has not run."""

from __future__ import annotations

import json
import math
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import click
import numpy as np

from stemserve.errors import GateError, StemserveError
from stemserve.repository import default_repository, models_to_serve
from stemserve.spec import ModelSpec, Precision
from stemserve_export.gpu_proof import measure
from stemserve_export.gpu_proof.servers import triton
from stemserve_export.gpu_proof.ways import CPU_WAYS, GPU_WAYS, Way, stage
from stemserve_export.precision import ARTEFACT_SUFFIX
from stemserve_export.tensorrt.engine import EngineBuilder, choose_builder
from stemserve_export.tensorrt.graphs import exported_graph, graph_names
from stemserve_export.tensorrt.machine import Gpu, first_gpu

# Against the fp32 graph on the CPU. fp32: other orders of summation leave 110 dB and more, but
# for ONNX Runtime's InstanceNormalization on the CPU, the reference here, which leaves 70. fp16:
# 60 dB and more on music. TF32 is measured and not judged.
LEAST_DB: Final[dict[Precision, float]] = {"fp32": 65.0, "fp16": 50.0}


@dataclass(slots=True)
class Outcome:
    """What one model did, served one way.

    Attributes:
        model: its name.
        precision: of its core.
        way: name of the way.
        tf32: whether TF32 was allowed.
        reference: the model whose fp32 graph it was compared with.
        parity_db: SNR by stem.
        speed: by batch size.
        problem: a sentence if it failed, else None.
    """

    model: str
    precision: Precision
    way: str
    tf32: bool
    reference: str
    parity_db: dict[str, float] = field(default_factory=dict)
    speed: list[measure.Speed] = field(default_factory=list)
    problem: str | None = None

    def judge(self) -> None:
        """Turn a parity that is too low into a problem."""
        least = LEAST_DB[self.precision]
        low = [f"{stem} {db:.1f} dB" for stem, db in self.parity_db.items() if not db >= least]
        if low and not (self.tf32 and all(map(math.isfinite, self.parity_db.values()))):
            self.problem = f"Parity below {least:g} dB: {', '.join(low)}."


class Clock:
    """Says when the time that the user allowed is over."""

    def __init__(self, limit_s: float) -> None:
        self._end = time.monotonic() + limit_s

    def left_s(self) -> float:
        """Seconds that are left; below 0 if none are."""
        return self._end - time.monotonic()


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--repository", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--image",
    metavar="IMAGE",
    help="Triton's container image, as in nvcr.io/nvidia/tritonserver:24.10-py3; it serves, and "
    "its trtexec builds the engines. [default: tritonserver and TensorRT of this machine]",
)
@click.option(
    "--audio",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Music to send. [default: rendered notes]",
)
@click.option("--cpu", is_flag=True, help="Try the script itself, on a machine without a GPU.")
@click.option("--seconds", default=5.0, show_default=True, help="Per batch size.")
@click.option(
    "--time-limit",
    default=7200.0,
    show_default=True,
    metavar="S",
    help="What is not begun by then is left out, and the outcome is a failure.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    default=Path("build/gpu-proof.json"),
    show_default=True,
    metavar="FILE",
)
def prove(
    names: tuple[str, ...],
    repository: Path | None,
    image: str | None,
    audio: Path | None,
    cpu: bool,
    seconds: float,
    time_limit: float,
    report: Path,
) -> None:
    """Serve the models NAME on a GPU in every way and compare them with the CPU.

    All exported models if none is named; export with --precision fp16 as well to compare
    precisions.
    """
    folder = repository or default_repository()
    models = graph_names(folder, models_to_serve(folder, names))
    gpu = None if cpu else first_gpu()
    builder = None if cpu else choose_builder(image)
    outcomes = run(
        folder,
        models,
        CPU_WAYS if cpu else GPU_WAYS,
        image=image,
        gpu=gpu,
        builder=builder,
        audio=audio,
        seconds=seconds,
        clock=Clock(time_limit),
        say=lambda text: click.echo(text, err=True),
    )
    record = {
        "gpu": None if gpu is None else asdict(gpu),
        "tensorrt": None if builder is None else builder.version(),
        "image": image,
        "machine": platform.platform(),
        "least_db": LEAST_DB,
        "outcomes": [_plain(asdict(outcome)) for outcome in outcomes],
    }
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print_tables(outcomes)
    click.echo(f"Report: {report}")
    failed = [outcome for outcome in outcomes if outcome.problem]
    if failed:
        lines = [f"{outcome.model}, {outcome.way}: {outcome.problem}" for outcome in failed]
        raise GateError(f"{len(failed)} of {len(outcomes)} failed.\n" + "\n".join(lines))


def run(
    repository: Path,
    models: Sequence[str],
    ways: Sequence[Way],
    *,
    image: str | None,
    gpu: Gpu | None,
    builder: EngineBuilder | None,
    audio: Path | None,
    seconds: float,
    clock: Clock,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Serve every model in every way, one after the other; a failure is an outcome like others."""
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="stemserve-proof-") as scratch:
        for name in models:
            spec, _ = exported_graph(repository, name)
            reference, graph = _reference(repository, spec)
            # One that falls silent and one that does not.
            chunks = measure.example_chunks(spec, 2, audio)
            say(f"{name}: computing the reference on the CPU")
            expected = measure.cpu_stems(reference, graph, chunks)
            for way in ways:
                say(f"{name}: {way.name}")
                outcome = Outcome(name, spec.precision, way.name, way.tf32, reference.name)
                outcomes.append(outcome)
                staging = Path(scratch) / "staged"
                try:
                    if clock.left_s() <= 0:
                        raise GateError("It was not begun: the time that was allowed is over.")
                    staging.mkdir()
                    stage(
                        repository, name, way, staging,
                        builder=builder, gpu=gpu, cache=Path(scratch) / "timing", report=say,
                    )  # fmt: skip
                    with (
                        triton(
                            staging, name, image=image, environment=way.environment,
                            deadline_s=max(60.0, clock.left_s()),
                        ) as url,
                        measure.ServedModel(url, spec) as served,
                    ):  # fmt: skip
                        outcome.parity_db = served.parity_db(chunks, expected)
                        for batch_size in measure.batch_sizes(spec):
                            outcome.speed.append(served.speed(chunks, batch_size, seconds))
                    outcome.judge()
                except StemserveError as error:
                    outcome.problem = str(error)
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
    return outcomes


def _reference(repository: Path, spec: ModelSpec) -> tuple[ModelSpec, Path]:
    """The fp32 artefact of the same model where the repository has it, else the model itself."""
    suffix = ARTEFACT_SUFFIX["fp16"]
    if spec.precision == "fp16" and spec.name.endswith(suffix):
        try:
            found, graph = exported_graph(repository, spec.name.removesuffix(suffix))
        except StemserveError:
            return exported_graph(repository, spec.name)
        if (found.stems, found.tensor_dims) == (spec.stems, spec.tensor_dims):
            return found, graph
    return exported_graph(repository, spec.name)


def print_tables(outcomes: Sequence[Outcome]) -> None:
    """Print parity by stem and throughput by batch size."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    parity = Table(title="Against the fp32 graph on the CPU", title_justify="left")
    for heading in ("model", "served by", "SNR per stem, dB", "reference"):
        parity.add_column(heading)
    speed = Table(title="Throughput", title_justify="left")
    speed.add_column("model")
    speed.add_column("served by")
    for heading in ("batch", "compute", "x real time", "client"):
        speed.add_column(heading, justify="right")
    for outcome in outcomes:
        levels = ", ".join(f"{stem} {_level(db)}" for stem, db in outcome.parity_db.items())
        shown = "fails" if outcome.problem and not levels else levels
        parity.add_row(outcome.model, outcome.way, shown, outcome.reference)
        for one in outcome.speed:
            speed.add_row(
                outcome.model,
                outcome.way,
                str(one.batch_size),
                f"{one.compute_ms:.1f} ms",
                f"{one.x_realtime:.0f}",
                f"{one.client_ms:.1f} ms",
            )
    console.print(parity)
    console.print(speed)


def _level(db: float) -> str:
    return "identical" if db == math.inf else f"{db:.1f}"


def _plain(value: Any) -> Any:
    """JSON has no infinity: a level that is not finite becomes its name."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 2) if math.isfinite(value) else str(value)
    return value


def main() -> None:
    """Run the command; what stemserve raises becomes a sentence and an exit status."""
    try:
        prove(standalone_mode=False)
    except StemserveError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)


if __name__ == "__main__":
    main()
