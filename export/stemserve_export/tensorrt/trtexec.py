"""Builds plans with ``trtexec``, TensorRT's own command, of a container image or of this machine.

An image of Triton has the very TensorRT that will load the plan, and a Python that may be too old
for stemserve: 24.10 has 3.10.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stemserve_export.tensorrt.builder import BuildSettings, BuiltPlan, GraphContract, Shape
from stemserve_export.tensorrt.errors import TensorRTError
from stemserve_export.tensorrt.machine import version_text

NAME: Final = "trtexec"
# Where NVIDIA's images have it (triton-inference-server/server uses this path in its own tests).
PATH_IN_IMAGES: Final = "/usr/src/tensorrt/bin/trtexec"
_VERSION_LIMIT_S: Final = 600.0  # Docker may have to fetch the image first
_BANNER: Final = re.compile(r"\[TensorRT v(\d{6,})\]")


@dataclass(frozen=True, slots=True)
class Trtexec:
    """A ``trtexec`` that can be run.

    Attributes:
        path: the command, in this machine or in the image.
        image: container image to run it in with Docker; on this machine if None.
    """

    path: str
    image: str | None = None

    name = NAME

    def version(self) -> str:
        """Return the TensorRT version, as in ``10.5.0``.

        Raises:
            TensorRTError: it does not run, or does not say.
        """
        output = self._run(["--help"], {}, _VERSION_LIMIT_S)
        banner = _BANNER.search(output)
        if banner is None:
            raise TensorRTError(
                f"{self._where()} does not say its version; expected TensorRT 10 or later."
            )
        return version_text(int(banner.group(1)))

    def build(self, graph: Path, contract: GraphContract, settings: BuildSettings) -> BuiltPlan:
        """Build a plan for the GPU of this machine; see :func:`builder.build_plan`."""
        with tempfile.TemporaryDirectory(prefix="stemserve-engine-") as scratch:
            plan = Path(scratch) / "model.plan"
            cache = Path(scratch) / "timing.cache"
            if settings.timing_cache is not None and settings.timing_cache.exists():
                shutil.copyfile(settings.timing_cache, cache)
            start = time.perf_counter()
            output = self._run(
                arguments(graph, plan, cache, contract, settings),
                {scratch: "rw", str(graph.resolve().parent): "ro"},
                None,
            )
            seconds = time.perf_counter() - start
            if not plan.is_file():
                raise TensorRTError(
                    f"{self._where()} wrote no plan for '{contract.name}': {_cause(output)}."
                )
            if settings.timing_cache is not None and cache.exists():
                settings.timing_cache.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(cache, settings.timing_cache)
            return BuiltPlan(plan.read_bytes(), None, seconds)

    def _run(self, options: Sequence[str], mounts: Mapping[str, str], limit_s: float | None) -> str:
        container = f"stemserve-trtexec-{uuid.uuid4().hex[:12]}"
        command = [self.path, *options]
        if self.image is not None:
            volumes = [f"--volume={path}:{path}:{mode}" for path, mode in mounts.items()]
            user = f"--user={os.getuid()}:{os.getgid()}"
            run = ["docker", "run", "--rm", "--gpus=all", f"--name={container}", user, *volumes]
            command = [*run, f"--entrypoint={self.path}", self.image, *options]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=limit_s
            )
        except FileNotFoundError:
            raise TensorRTError(
                f"'{command[0]}' is not installed; it is needed to run {self._where()}."
            ) from None
        except subprocess.TimeoutExpired:
            raise TensorRTError(f"{self._where()} did not end within {limit_s:g} s.") from None
        finally:
            if self.image is not None:  # ended already, unless this process is being ended
                with contextlib.suppress(OSError):
                    subprocess.run(
                        ["docker", "rm", "--force", container], capture_output=True, check=False
                    )
        output = done.stdout + done.stderr
        if done.returncode:
            raise TensorRTError(
                f"{self._where()} ended with status {done.returncode}: {_cause(output)}."
            )
        return output

    def _where(self) -> str:
        return f"trtexec of {self.image}" if self.image else f"'{self.path}'"


def find_trtexec() -> Trtexec | None:
    """Return the ``trtexec`` of this machine, or None."""
    found = shutil.which(NAME) or shutil.which(PATH_IN_IMAGES)
    return None if found is None else Trtexec(found)


def arguments(
    graph: Path, plan: Path, cache: Path, contract: GraphContract, settings: BuildSettings
) -> list[str]:
    """Return the options of ``trtexec`` that build what :func:`builder.build_plan` builds."""
    options = [
        f"--onnx={graph.resolve()}",
        f"--saveEngine={plan}",
        f"--timingCacheFile={cache}",
        "--stronglyTyped",
        "--skipInference",
        *(
            f"--{kind}Shapes={','.join(f'{name}:{_by_x(shape)}' for name in contract.inputs)}"
            for kind, shape in contract.profile.items()
        ),
    ]
    if not settings.tf32:
        options.append("--noTF32")
    if settings.workspace_bytes is not None:
        options.append(f"--memPoolSize=workspace:{settings.workspace_bytes / 2**20:g}")
    return options


def _by_x(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _cause(output: str) -> str:
    """The last errors that were logged, or the last line if none is marked as one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.partition("[E]")[2].strip() for line in lines if "[E]" in line]
    return "; ".join(errors[-3:]) or (lines[-1] if lines else "it printed nothing")
