"""TensorRT's builder behind one function: graph in, plan out.

Written against the Python API of TensorRT 10 and 11 and of TensorRT-RTX 1, which share the names
used here (docs.nvidia.com/deeplearning/tensorrt, "Python API"). Networks are strongly typed:
every tensor keeps the type that the graph gives it, so that STFT, normalisations and masks of an
fp16 artefact stay in fp32. There is no precision flag.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from stemserve.errors import MissingExtraError
from stemserve.spec import ModelSpec, WireDtype
from stemserve_export.tensorrt.errors import TensorRTError

Package = Literal["tensorrt", "tensorrt_rtx"]
Shape = tuple[int, ...]
# Of what TensorRT logs, the last lines go into an error: the cause comes last, twice or thrice.
_LOG_LINES: Final = 3
INSTALL_HINT: Final[dict[Package, str]] = {
    "tensorrt": "Building engines needs the package tensorrt, which is not installed; install the "
    "version of the Triton image that will serve them, as in `pip install tensorrt-cu12==10.5.0`, "
    "or name that image with --image.",
    "tensorrt_rtx": "Checking graphs without a GPU needs the package tensorrt-rtx-cu12, which is "
    "not installed; install the extra with `pip install 'stemserve[tensorrt-check]'`.",
}


@dataclass(frozen=True, slots=True)
class GraphContract:
    """What the builder holds a graph to: the part of a spec that is about tensors.

    Attributes:
        name: the model's name.
        inputs: names of the inputs.
        outputs: names of the outputs, in order.
        dims: dimensions of every tensor behind the batch axis.
        wire_dtype: their type.
        profile: shapes ``min``, ``opt`` and ``max`` of the input, [B, channels, samples] each.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dims: Shape
    wire_dtype: WireDtype
    profile: Mapping[str, Shape]

    @classmethod
    def of(cls, spec: ModelSpec) -> GraphContract:
        """Return what a spec says about its tensors."""
        profile = {str(kind): shape for kind, shape in spec.batch_profile.items()}
        return cls(
            spec.name,
            spec.input_names,
            spec.output_names,
            spec.tensor_dims,
            spec.wire_dtype,
            profile,
        )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> GraphContract:
        """Read back what ``dataclasses.asdict`` and JSON made of a contract."""
        return cls(
            record["name"],
            tuple(record["inputs"]),
            tuple(record["outputs"]),
            tuple(record["dims"]),
            record["wire_dtype"],
            {kind: tuple(shape) for kind, shape in record["profile"].items()},
        )


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """What is asked of the builder.

    Attributes:
        tf32: whether fp32 matrix products and convolutions may round their operands to 10 bits.
        workspace_bytes: most scratch memory of a layer on the GPU; the GPU's memory if None.
        compute_capabilities: what to build for, as in ``8.6``; the machine's own GPU if empty.
            Others than that are known to ``tensorrt_rtx`` only.
        timing_cache: file of measured kernel times, read if it exists and written; none if None.
    """

    tf32: bool = False
    workspace_bytes: int | None = None
    compute_capabilities: Sequence[str] = ()
    timing_cache: Path | None = None


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    """A serialized engine, and what building it took.

    Attributes:
        data: the plan, as Triton reads it from its file.
        layers: layers of the parsed network, if the builder tells.
        build_seconds: wall time of the build, without parsing.
    """

    data: bytes
    layers: int | None
    build_seconds: float


def load_api(package: Package) -> Any:
    """Import TensorRT's Python API.

    Raises:
        MissingExtraError: the package is not installed.
        TensorRTError: it is, and its libraries cannot be loaded.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(INSTALL_HINT[package])
    try:
        return importlib.import_module(package)
    except (ImportError, OSError, RuntimeError) as error:
        raise TensorRTError(
            f"The package {package} is installed and cannot be loaded ({error}); it needs Linux on "
            "x86-64 or a machine that its wheel was made for."
        ) from None


def known_compute_capabilities(api: Any) -> list[str]:
    """Return what ``tensorrt_rtx`` can build ahead of time, as in ``['7.5', '8.0', …]``."""
    return [
        _dotted(name)
        for name in api.ComputeCapability.__members__
        if name.removeprefix("SM") != name
    ]


def build_plan(
    api: Any, graph: Path, contract: GraphContract, settings: BuildSettings
) -> BuiltPlan:
    """Parse a graph and build a plan.

    Args:
        api: what :func:`load_api` returned.
        graph: the ONNX file.
        contract: what the graph must be, and the batches that it is built for.
        settings: see there.

    Raises:
        TensorRTError: the graph is not taken, is not what the spec says, or does not build.
    """
    log = _log(api)
    builder = api.Builder(log)
    # TensorRT 11 has strongly typed networks only, and may lack the flag.
    typed = getattr(api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    _parse(api, network, log, graph, contract)
    _check_tensors(api, network, contract)
    config = builder.create_builder_config()
    _configure(api, builder, config, contract, settings)
    cache = _attach_timing_cache(config, settings.timing_cache)
    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if plan is None:
        raise TensorRTError(
            f"{_product(api)} cannot build '{contract.name}': {log.explanation()}. "
            "Rewrite the module around what it names, or build for a smaller batch."
        )
    if cache is not None and settings.timing_cache is not None:
        _keep(settings.timing_cache, bytes(config.get_timing_cache().serialize()))
    return BuiltPlan(bytes(plan), network.num_layers, seconds)


def _log(api: Any) -> Any:
    """A logger for TensorRT that keeps errors instead of printing them."""

    class Log(api.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(api.ILogger.Severity.ERROR):
                self.errors.append(" ".join(message.split()))

        def explanation(self) -> str:
            return "; ".join(self.errors[-_LOG_LINES:]) or "it gave no reason"

    return Log()


def _parse(api: Any, network: Any, log: Any, graph: Path, contract: GraphContract) -> None:
    parser = api.OnnxParser(network, log)
    if parser.parse_from_file(str(graph)):
        return
    if not graph.is_file():
        raise TensorRTError(f"There is no graph '{graph}'; export the model first.")
    problems = [_sentence(parser.get_error(index)) for index in range(parser.num_errors)]
    raise TensorRTError(
        f"{_product(api)} does not take the graph of '{contract.name}': "
        f"{'; '.join(problems) or log.explanation()}. Rewrite the module without it."
    )


def _sentence(error: Any) -> str:
    """What a parser's error says, with the node and the operator that it is about."""
    text = " ".join(error.desc().split()).rstrip(".")
    node, operator = error.node_name(), error.node_operator()
    return f"node '{node}' (operator {operator}): {text}" if node or operator else text


def _check_tensors(api: Any, network: Any, contract: GraphContract) -> None:
    """Check names, shapes and types: Triton would refuse the plan only once it serves it."""
    dtype = {"fp32": api.float32, "fp16": api.float16}[contract.wire_dtype]
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for kind, tensors, names in (
        ("inputs", inputs, contract.inputs),
        ("outputs", outputs, contract.outputs),
    ):
        found = [(tensor.name, tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        if found != [(name, (-1, *contract.dims), dtype) for name in names]:
            raise TensorRTError(
                f"The graph of '{contract.name}' has the {kind} {found}; expected "
                f"{', '.join(names)} of {contract.wire_dtype} with the shape "
                f"{[-1, *contract.dims]}. Export the model again."
            )


def _configure(
    api: Any, builder: Any, config: Any, contract: GraphContract, settings: BuildSettings
) -> None:
    profile = builder.create_optimization_profile()
    for name in contract.inputs:
        profile.set_shape(name, *(contract.profile[kind] for kind in ("min", "opt", "max")))
    if config.add_optimization_profile(profile) < 0:
        raise TensorRTError(
            f"{_product(api)} refuses the batch profile {dict(contract.profile)} of "
            f"'{contract.name}'."
        )
    # On by default; what it costs is in docs/gpu.md.
    change = config.set_flag if settings.tf32 else config.clear_flag
    change(api.BuilderFlag.TF32)
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if settings.compute_capabilities:
        config.num_compute_capabilities = len(settings.compute_capabilities)
        for index, dotted in enumerate(settings.compute_capabilities):
            member = "SM" + dotted.replace(".", "")
            if not hasattr(api.ComputeCapability, member) or not config.set_compute_capability(
                getattr(api.ComputeCapability, member), index
            ):
                known = ", ".join(known_compute_capabilities(api))
                raise TensorRTError(
                    f"{_product(api)} cannot build for compute capability {dotted}; it knows "
                    f"{known}."
                )


def _attach_timing_cache(config: Any, file: Path | None) -> Any:
    """Give the builder the kernel times of earlier builds; a cache of another GPU is left out."""
    if file is None:
        return None
    data = file.read_bytes() if file.exists() else b""
    cache = config.create_timing_cache(data)
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache  # must live until the plan is built


def _keep(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(data)
    partial.replace(file)


def _product(api: Any) -> str:
    name = "TensorRT-RTX" if api.__name__ == "tensorrt_rtx" else "TensorRT"
    return f"{name} {api.__version__}"


def _dotted(member: str) -> str:
    """``SM86`` -> ``8.6``, ``SM120`` -> ``12.0``."""
    digits = member.removeprefix("SM")
    return f"{digits[:-1]}.{digits[-1]}"
