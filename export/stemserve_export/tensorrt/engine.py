"""TensorRT engines in the model repository, built on the GPU that they will run on."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from stemserve.errors import ExportError
from stemserve.spec import ModelSpec
from stemserve_export.download import sha256_of
from stemserve_export.placement import CONFIGS_FOLDER
from stemserve_export.tensorrt.builder import (
    BuildSettings,
    BuiltPlan,
    GraphContract,
    build_plan,
    load_api,
)
from stemserve_export.tensorrt.configs import (
    TENSORRT_CONFIG,
    config_file_text,
    tensorrt_config,
)
from stemserve_export.tensorrt.graphs import exported_graph
from stemserve_export.tensorrt.machine import Gpu, same_tensorrt
from stemserve_export.tensorrt.manifest import (
    MANIFEST_NAME,
    Engine,
    manifest_text,
    plan_file,
    read_manifest,
)
from stemserve_export.tensorrt.trtexec import PATH_IN_IMAGES, Trtexec, find_trtexec


class EngineBuilder(Protocol):
    """What builds plans for the GPU of this machine."""

    @property
    def name(self) -> str:
        """What the manifest calls it."""

    def version(self) -> str:
        """Version of its TensorRT, as in ``10.5.0``."""

    def build(self, graph: Path, contract: GraphContract, settings: BuildSettings) -> BuiltPlan:
        """Build a plan; see :func:`builder.build_plan`."""


class PythonBuilder:
    """The Python package ``tensorrt``."""

    name = "tensorrt"

    def __init__(self, api: Any = None) -> None:
        self._api = load_api("tensorrt") if api is None else api

    def version(self) -> str:
        """Version of TensorRT, as in ``10.5.0``."""
        return str(self._api.__version__)

    def build(self, graph: Path, contract: GraphContract, settings: BuildSettings) -> BuiltPlan:
        """Build a plan; see :func:`builder.build_plan`."""
        return build_plan(self._api, graph, contract, settings)


def choose_builder(image: str | None = None) -> EngineBuilder:
    """Return ``trtexec`` of an image, else the Python package, else ``trtexec`` of this machine.

    Raises:
        MissingExtraError: there is none of them.
    """
    if image is not None:
        return Trtexec(PATH_IN_IMAGES, image)
    if find_spec("tensorrt") is None and (local := find_trtexec()) is not None:
        return local
    return PythonBuilder()


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine of the repository.

    Attributes:
        path: its plan.
        built: whether it was built now, or found up to date.
        engine: what the manifest says of it.
    """

    path: Path
    built: bool
    engine: Engine


def default_cache() -> Path:
    """Return the folder that timing caches are kept in."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stemserve/tensorrt"


def build_engine(
    repository: Path,
    name: str,
    builder: EngineBuilder,
    gpu: Gpu,
    *,
    tf32: bool = False,
    workspace_bytes: int | None = None,
    cuda_graphs: bool = False,
    cache: Path | None = None,
    report: Callable[[str], None] = print,
) -> BuiltEngine:
    """Build the engine of a model for a GPU, and tell Triton of it in ``configs/tensorrt.pbtxt``.

    Nothing is built if the repository has the engine already. Engines of this graph for other
    GPUs stay; engines of an earlier graph are removed.

    Args:
        repository: the model repository.
        name: the model.
        builder: TensorRT of the version that will serve.
        gpu: the GPU of this machine.
        tf32: whether fp32 products may be computed in TF32; docs/gpu.md has what it costs.
        workspace_bytes: see :class:`builder.BuildSettings`.
        cuda_graphs: see :func:`configs.tensorrt_config`.
        cache: folder for timing caches; :func:`default_cache` if None.
        report: told what is being done.

    Raises:
        TensorRTError: the graph does not build.
        ExportError: the repository cannot be written to.
    """
    spec, graph = exported_graph(repository, name)
    folder = graph.parent
    contract = GraphContract.of(spec)
    version = builder.version()
    file = plan_file(gpu.compute_capability)
    wanted: dict[str, Any] = {
        "compute_capability": gpu.compute_capability,
        "graph_sha256": sha256_of(graph),
        "profile": {kind: list(shape) for kind, shape in contract.profile.items()},
        "precision": spec.precision,
        "tf32": tf32,
    }
    engines = _current(read_manifest(folder), wanted["graph_sha256"])
    found = engines.get(file)
    up_to_date = (
        found is not None
        and all(asdict(found)[key] == value for key, value in wanted.items())
        and same_tensorrt(found.tensorrt_version, version)
        and (folder / file).is_file()
        and sha256_of(folder / file) == found.plan_sha256
    )
    if up_to_date and found is not None:
        _write(repository, spec, folder, engines, cuda_graphs)
        return BuiltEngine(folder / file, False, found)
    report(f"Building {file} of {name} with TensorRT {version} for {gpu.name}; this takes minutes.")
    settings = BuildSettings(
        tf32=wanted["tf32"],
        workspace_bytes=workspace_bytes,
        timing_cache=(cache or default_cache()) / f"{version}-{file}.timing",
    )
    plan = builder.build(graph, contract, settings)
    engine = Engine(
        tensorrt_version=version,
        builder=builder.name,
        gpu_name=gpu.name,
        plan_sha256=hashlib.sha256(plan.data).hexdigest(),
        build_seconds=round(plan.build_seconds, 1),
        built_at=datetime.now(UTC).isoformat(timespec="seconds"),
        **wanted,
    )
    _write(repository, spec, folder, {**engines, file: engine}, cuda_graphs, {file: plan.data})
    return BuiltEngine(folder / file, True, engine)


def _current(engines: Mapping[str, Engine], graph_sha256: str) -> dict[str, Engine]:
    return {file: one for file, one in engines.items() if one.graph_sha256 == graph_sha256}


def _write(
    repository: Path,
    spec: ModelSpec,
    folder: Path,
    engines: Mapping[str, Engine],
    cuda_graphs: bool,
    plans: Mapping[str, bytes] | None = None,
) -> None:
    """Put plans, manifest and configuration in place, in this order, each at once.

    A stop in between leaves a plan that its manifest does not describe, which is refused and
    built again.
    """
    files = {engine.compute_capability: file for file, engine in engines.items()}
    config = tensorrt_config(spec, files, cuda_graphs=cuda_graphs)
    contents: dict[Path, bytes] = {
        **{folder / file: data for file, data in (plans or {}).items()},
        folder / MANIFEST_NAME: manifest_text(engines).encode(),
        repository / spec.name / CONFIGS_FOLDER / f"{TENSORRT_CONFIG}.pbtxt": config_file_text(
            config, f"stemserve build-engine {spec.name}"
        ).encode(),
    }
    try:
        # Inside the model's folder: the same file system, and hidden from Triton.
        with tempfile.TemporaryDirectory(prefix=".staging-", dir=repository / spec.name) as scratch:
            for path, data in contents.items():
                if path.exists() and path.read_bytes() == data:
                    continue
                path.parent.mkdir(exist_ok=True)
                staged = Path(scratch) / path.name
                staged.write_bytes(data)
                staged.replace(path)
        for stale in set(folder.glob("model.sm*.plan")) - {folder / file for file in engines}:
            stale.unlink()
    except OSError as error:
        raise ExportError(
            f"The repository '{repository}' cannot be written to ({error.strerror}); the engine "
            "was not stored."
        ) from None
