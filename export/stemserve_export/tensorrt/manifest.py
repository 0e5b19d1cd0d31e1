"""``engines.json`` in a version's folder: what every plan there was built from, with and for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from stemserve.repository import read_config
from stemserve.spec import ModelSpec
from stemserve_export.download import sha256_of
from stemserve_export.placement import CONFIGS_FOLDER
from stemserve_export.tensorrt.configs import TENSORRT_CONFIG
from stemserve_export.tensorrt.errors import EngineMismatchError
from stemserve_export.tensorrt.graphs import exported_graph
from stemserve_export.tensorrt.machine import same_tensorrt

MANIFEST_NAME: Final = "engines.json"
_FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Engine:
    """A plan of the repository.

    Attributes:
        tensorrt_version: TensorRT that built it, the only one that loads it.
        builder: what drove it, ``tensorrt`` (Python) or ``trtexec``.
        compute_capability: the GPU's, as in ``8.9``, the only one that runs it.
        gpu_name: the GPU that it was built and timed on.
        graph_sha256: digest of the ``model.onnx`` that it was built from.
        plan_sha256: digest of the plan.
        profile: shapes ``min``, ``opt`` and ``max`` of the input.
        precision: of the graph's core.
        tf32: whether fp32 products may round their operands to 10 bits.
        build_seconds: what the build took.
        built_at: UTC, ISO 8601.
    """

    tensorrt_version: str
    builder: str
    compute_capability: str
    gpu_name: str
    graph_sha256: str
    plan_sha256: str
    profile: Mapping[str, list[int]]
    precision: str
    tf32: bool
    build_seconds: float
    built_at: str


def plan_file(compute_capability: str) -> str:
    """``8.9`` -> ``model.sm89.plan``."""
    return f"model.sm{compute_capability.replace('.', '')}.plan"


def read_manifest(folder: Path) -> dict[str, Engine]:
    """Return the engines of a version's folder by file name; none if there is no manifest.

    Raises:
        EngineMismatchError: the manifest cannot be read.
    """
    path = folder / MANIFEST_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != _FORMAT:
            raise ValueError(f"format {record['format']} instead of {_FORMAT}")
        return {name: _engine(entry) for name, entry in record["engines"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineMismatchError(
            f"'{path}' is no list of engines ({type(error).__name__}: {error}); delete it and "
            "build the engines again with `stemserve build-engine`."
        ) from None


def manifest_text(engines: Mapping[str, Engine]) -> str:
    """Return the content of ``engines.json``."""
    entries = {name: asdict(engine) for name, engine in sorted(engines.items())}
    return json.dumps({"format": _FORMAT, "engines": entries}, indent=2) + "\n"


def verify_engines(
    repository: Path,
    name: str,
    *,
    tensorrt_version: str | None = None,
    compute_capability: str | None = None,
) -> dict[str, Engine]:
    """Check a model's engines before a server is started with ``--model-config-name=tensorrt``.

    Triton itself finds a missing engine only while it loads, and an engine of an older graph
    never: it serves the old weights.

    Args:
        repository: the model repository.
        name: the model.
        tensorrt_version: version of the server's TensorRT; not compared if None.
        compute_capability: the serving GPU's; not compared if None.

    Returns:
        The engines by file name.

    Raises:
        EngineMismatchError: the first thing that would go wrong, and what to do about it.
    """
    spec, graph = exported_graph(repository, name)
    again = f"Build it on that GPU with `stemserve build-engine {name}`."
    engines = read_manifest(graph.parent)
    if not engines:
        raise EngineMismatchError(
            f"Model '{name}' has no TensorRT engine in '{graph.parent}'. {again}"
        )
    _check_config(repository, name, spec, engines)
    digest = sha256_of(graph)
    for file, engine in engines.items():
        path = graph.parent / file
        if not path.is_file():
            raise EngineMismatchError(f"'{path}' is listed in {MANIFEST_NAME} and missing. {again}")
        if sha256_of(path) != engine.plan_sha256:
            raise EngineMismatchError(
                f"'{path}' is not the plan that {MANIFEST_NAME} describes (its sha256 differs). "
                f"{again}"
            )
        if engine.graph_sha256 != digest:
            raise EngineMismatchError(
                f"'{path}' was built from another graph than the '{graph.name}' beside it. {again}"
            )
    if compute_capability is None:
        return engines
    fitting = engines.get(plan_file(compute_capability))
    if fitting is None:
        known = ", ".join(engine.compute_capability for engine in engines.values())
        raise EngineMismatchError(
            f"Model '{name}' has no engine for compute capability {compute_capability}; it has "
            f"engines for {known}. {again}"
        )
    if tensorrt_version is not None and not same_tensorrt(
        fitting.tensorrt_version, tensorrt_version
    ):
        raise EngineMismatchError(
            f"The engine of '{name}' for compute capability {compute_capability} was built by "
            f"TensorRT {fitting.tensorrt_version}, and the server has TensorRT {tensorrt_version}: "
            f"engines load in the version that built them only. {again}"
        )
    return engines


def _engine(entry: Mapping[str, Any]) -> Engine:
    names = {field.name for field in fields(Engine)}
    if set(entry) != names:
        raise ValueError(f"an entry has the fields {sorted(entry)}")
    return Engine(**entry)


def _check_config(
    repository: Path, name: str, spec: ModelSpec, engines: Mapping[str, Engine]
) -> None:
    path = repository / name / CONFIGS_FOLDER / f"{TENSORRT_CONFIG}.pbtxt"
    again = f"Write it again with `stemserve build-engine {name}`."
    try:
        text = path.read_text(encoding="utf-8")
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
    except FileNotFoundError:
        raise EngineMismatchError(
            f"'{path}' is missing: with --model-config-name={TENSORRT_CONFIG} the server would "
            f"run ONNX Runtime instead. {again}"
        ) from None
    except (OSError, text_format.ParseError, UnicodeDecodeError) as error:
        raise EngineMismatchError(f"'{path}' is no configuration ({error}). {again}") from None
    expected = {engine.compute_capability: file for file, engine in engines.items()}
    if dict(config.cc_model_filenames) != expected:
        raise EngineMismatchError(
            f"'{path}' names the plans {dict(config.cc_model_filenames)}; the repository has "
            f"{expected}. {again}"
        )
    if ModelSpec.from_config(config) != spec:
        served = read_config(repository, name).name
        raise EngineMismatchError(
            f"'{path}' describes another export of '{served}' than config.pbtxt. {again}"
        )
