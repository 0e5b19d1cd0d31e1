"""Builds a graph with TensorRT-RTX for GPUs that this machine does not have.

It proves that TensorRT's parser takes the graph and that its compiler finds kernels for every
layer, at the batch profile that is served. The plans are thrown away: Triton serves plans of
plain TensorRT, which are built on the GPU that they run on (:mod:`engine`).

Each build is a child process (:mod:`build_worker`), since a builder that fails may abort or be
killed for its memory; that must end in a sentence.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from stemserve.errors import MissingExtraError, PlatformError
from stemserve.spec import ModelSpec
from stemserve_export.tensorrt.builder import INSTALL_HINT, GraphContract
from stemserve_export.tensorrt.errors import TensorRTError

WORKER: Final = "stemserve_export.tensorrt.build_worker"
_START_LIMIT_S: Final = 120.0
_SECONDS_TO_DIE: Final = 10.0


@dataclass(frozen=True, slots=True)
class AheadOfTimeBuild:
    """What became of one graph on one compute capability.

    Attributes:
        model: the model's name.
        compute_capability: as in ``8.6``.
        problem: a sentence saying what went wrong, or None.
        seconds: wall time of the build, parsing left out; None if it failed.
        layers: layers of the parsed network; None if it failed.
        plan_bytes: size of the plan; None if it failed.
        peak_rss_bytes: most memory that the building process had; None if it failed.
    """

    model: str
    compute_capability: str
    problem: str | None = None
    seconds: float | None = None
    layers: int | None = None
    plan_bytes: int | None = None
    peak_rss_bytes: int | None = None

    def record(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Checker:
    """A TensorRT-RTX that was found on this machine.

    Attributes:
        version: as in ``1.7.1.116``.
        compute_capabilities: what it can build for, as in ``('7.5', '8.0', …)``.
    """

    version: str
    compute_capabilities: tuple[str, ...]


def find_checker() -> Checker:
    """Find TensorRT-RTX.

    Raises:
        PlatformError: it is not published for this machine.
        MissingExtraError: it is not installed.
        TensorRTError: it is, and does not start.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise PlatformError(
            f"TensorRT-RTX is not published for {platform.system()} on {platform.machine()}; run "
            "this check on Linux on x86-64."
        )
    if importlib.util.find_spec("tensorrt_rtx") is None:
        raise MissingExtraError(INSTALL_HINT["tensorrt_rtx"])
    answer = _ask({"task": "describe"}, _START_LIMIT_S)
    if isinstance(answer, str):
        raise TensorRTError(f"TensorRT-RTX does not start: {answer}")
    return Checker(answer["version"], tuple(answer["compute_capabilities"]))


def check_graph(
    spec: ModelSpec,
    graph: Path,
    compute_capabilities: Sequence[str],
    *,
    time_limit_s: float,
    report: Callable[[AheadOfTimeBuild], None] = lambda build: None,
) -> list[AheadOfTimeBuild]:
    """Build a graph for each compute capability, one after the other.

    Args:
        spec: the model's spec; its batch profile is the plan's.
        graph: the ONNX file; only read.
        compute_capabilities: as in ``['8.0', '8.6']``.
        time_limit_s: seconds for each build, after which it is ended and counts as failed.
        report: told of every build as it ends.
    """
    builds = []
    for dotted in compute_capabilities:
        question = {
            "task": "build",
            "graph": str(graph.resolve()),
            "contract": asdict(GraphContract.of(spec)),
            "compute_capability": dotted,
        }
        answer = _ask(question, time_limit_s)
        build = (
            AheadOfTimeBuild(spec.name, dotted, problem=answer)
            if isinstance(answer, str)
            else AheadOfTimeBuild(spec.name, dotted, **answer)
        )
        report(build)
        builds.append(build)
    return builds


def _ask(question: dict[str, Any], time_limit_s: float) -> dict[str, Any] | str:
    """Run the worker; return its answer, or a sentence that says why there is none."""
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        try:
            stdout, _ = process.communicate(json.dumps(question).encode(), time_limit_s)
        except subprocess.TimeoutExpired:
            return (
                f"It took longer than {time_limit_s:g} s and was ended; allow more with "
                "--time-limit."
            )
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=_SECONDS_TO_DIE)
        if process.returncode == 0:
            answer: dict[str, Any] = json.loads(stdout)
            problem = answer.get("problem")
            return str(problem) if problem else answer
        stderr.seek(0)
        return _obituary(process.returncode, stderr.read().decode(errors="replace"))


def _obituary(status: int, stderr: str) -> str:
    """Why a builder that ended without an answer did so."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = f" Its last words were: {lines[-1]}" if lines else ""
    if status == -signal.SIGKILL:
        return (
            "The builder was killed, as the system does when memory runs out; check a smaller "
            f"model, or on a machine with more memory.{last}"
        )
    if status < 0:
        return f"The builder crashed ({signal.Signals(-status).name}).{last}"
    return f"The builder ended with status {status}.{last}"
