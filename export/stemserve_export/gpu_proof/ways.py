"""The ways to serve a graph that are compared, and a staged repository for each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from stemserve.repository import CONFIG_NAME, MODEL_FILE
from stemserve.spec import ModelSpec
from stemserve_export.placement import CONFIGS_FOLDER
from stemserve_export.tensorrt.configs import (
    TENSORRT_CONFIG,
    onnxruntime_tensorrt_config,
)
from stemserve_export.tensorrt.cuda_provider import with_cuda_provider
from stemserve_export.tensorrt.engine import EngineBuilder, build_engine
from stemserve_export.tensorrt.graphs import exported_graph
from stemserve_export.tensorrt.machine import Gpu
from stemserve_export.triton_config import model_config

Runtime = Literal["cuda", "onnxruntime_tensorrt", "tensorrt"]
# Switches TF32 off in every NVIDIA library of a process (cuBLAS, cuDNN, TensorRT).
_NO_TF32: Final = {"NVIDIA_TF32_OVERRIDE": "0"}


@dataclass(frozen=True, slots=True)
class Way:
    """One way to serve a graph.

    Attributes:
        name: as the tables call it.
        runtime: what runs the graph.
        tf32: whether fp32 products may be computed in TF32.
        cuda_graphs: whether the TensorRT backend captures CUDA graphs.
        environment: variables of the server.
    """

    name: str
    runtime: Runtime
    tf32: bool = False
    cuda_graphs: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


GPU_WAYS: Final = (
    Way("cuda", "cuda"),
    Way("cuda, TF32", "cuda", tf32=True),
    Way("ORT TensorRT", "onnxruntime_tensorrt", environment=_NO_TF32),
    Way("ORT TensorRT, TF32", "onnxruntime_tensorrt", tf32=True),
    Way("TensorRT", "tensorrt"),
    Way("TensorRT, TF32", "tensorrt", tf32=True),
    Way("TensorRT, CUDA graphs", "tensorrt", cuda_graphs=True),
)
# The configuration of the first way, on a machine without a GPU: Triton passes the provider over.
CPU_WAYS: Final = (Way("cpu", "cuda"),)


def stage(
    repository: Path,
    name: str,
    way: Way,
    staging: Path,
    *,
    builder: EngineBuilder | None = None,
    gpu: Gpu | None = None,
    cache: Path | None = None,
    report: Callable[[str], None] = print,
) -> ModelSpec:
    """Make a repository with one model, configured for one way.

    Requests are not batched together there: a request of B chunks must be an execution of B.

    Args:
        repository: where the model is; only read.
        name: the model.
        way: how it is to be served.
        staging: an empty folder; becomes the repository.
        builder: builds the engine of the runtime ``tensorrt``.
        gpu: what it builds it for.
        cache: folder for timing caches.
        report: told what is being done.

    Raises:
        TensorRTError: the engine does not build.
    """
    spec, graph = exported_graph(repository, name)
    folder = staging / name / str(spec.version)
    folder.mkdir(parents=True)
    _link(graph, folder / MODEL_FILE)
    (staging / name / CONFIG_NAME).write_text(_text(model_config(spec)), encoding="utf-8")
    if way.runtime == "tensorrt":
        assert builder is not None and gpu is not None
        build_engine(
            staging,
            name,
            builder,
            gpu,
            tf32=way.tf32,
            cuda_graphs=way.cuda_graphs,
            cache=cache,
            report=report,
        )
        named = staging / name / CONFIGS_FOLDER / f"{TENSORRT_CONFIG}.pbtxt"
        config = text_format.Parse(
            named.read_text(encoding="utf-8"), model_config_pb2.ModelConfig()
        )
    elif way.runtime == "onnxruntime_tensorrt":
        # The folder of engines is the server's own, new with it: any digest will do.
        config = onnxruntime_tensorrt_config(spec, "0" * 64)
    else:
        config = model_config(spec)
        with_cuda_provider(config, tf32=way.tf32)
    config.ClearField("dynamic_batching")
    (staging / name / CONFIG_NAME).write_text(_text(config), encoding="utf-8")
    return spec


def _text(config: model_config_pb2.ModelConfig) -> str:
    text: str = text_format.MessageToString(config, as_utf8=True)
    return text


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
