"""What Triton's configurations say about GPUs: three ways to run one graph.

========================  ==================================  =====================================
configuration             runs the graph with                 engines
========================  ==================================  =====================================
``config.pbtxt``          ONNX Runtime, CUDA provider or CPU  none
``onnxruntime_tensorrt``  ONNX Runtime, TensorRT provider     built by the server as it starts, kept
``tensorrt``              TensorRT                            built before by ``build-engine``
========================  ==================================  =====================================

A server is told which by ``--model-config-name``; models without a configuration of that name,
ensembles among them, keep their ``config.pbtxt``. Keys and their traps were read in the sources
of Triton 24.10 (onnxruntime_backend ``src/onnxruntime.cc``, tensorrt_backend
``src/instance_state.cc``): accelerator ``tensorrt`` refuses an unknown key, accelerator ``cuda``
hands every key to ONNX Runtime, which refuses it, and both are passed over on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from stemserve.errors import ExportError
from stemserve.spec import INPUT_NAME, ModelSpec
from stemserve_export.tensorrt.cuda_provider import with_cuda_provider
from stemserve_export.triton_config import model_config

TENSORRT_CONFIG: Final = "tensorrt"
ONNXRUNTIME_TENSORRT_CONFIG: Final = "onnxruntime_tensorrt"

# ONNX Runtime makes the last folder of this path itself; mount a volume there to keep engines.
ENGINE_CACHE: Final = "/tmp/stemserve-engines"
# TensorRT's own default is all memory and ONNX Runtime's is 1 GiB, which hides fast kernels.
WORKSPACE_BYTES: Final = 4 << 30


def onnxruntime_tensorrt_config(spec: ModelSpec, digest: str) -> model_config_pb2.ModelConfig:
    """Configure ONNX Runtime's TensorRT provider.

    Args:
        spec: the model's.
        digest: changes whenever the graph or its weights do. ONNX Runtime finds a kept engine by
            the graph's structure alone and would go on with the weights of the one before.

    TF32 cannot be switched off here: the provider has no option for it
    (github.com/microsoft/onnxruntime/issues/26029). The server must be started with
    ``NVIDIA_TF32_OVERRIDE=0`` in its environment.

    Before Triton 25.04 the provider takes GPU 0 whatever the instance's is: one GPU per server.
    """
    config = model_config(spec)
    del config.optimization.execution_accelerators.gpu_execution_accelerator[:]
    _one_gpu_instance(config)
    tensorrt = config.optimization.execution_accelerators.gpu_execution_accelerator.add(
        name="tensorrt"
    )
    # Without an explicit profile the engine is built again for every batch size that is new.
    shapes = {
        f"trt_profile_{kind}_shapes": f"{INPUT_NAME}:" + "x".join(map(str, shape))
        for kind, shape in spec.batch_profile.items()
    }
    options = {
        # Types as the graph has them. FP16 would let TensorRT compute the STFT in fp16, too.
        "precision_mode": "FP32",
        "max_workspace_size_bytes": str(WORKSPACE_BYTES),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": ENGINE_CACHE,
        "trt_engine_cache_prefix": f"{spec.name}-{digest[:16]}",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": ENGINE_CACHE,
        **shapes,
    }
    for key, value in options.items():
        tensorrt.parameters[key] = value
    return with_cuda_provider(config)  # for nodes that TensorRT leaves over


def tensorrt_config(
    spec: ModelSpec, plans: Mapping[str, str], *, cuda_graphs: bool = False
) -> model_config_pb2.ModelConfig:
    """Configure the TensorRT backend.

    Args:
        spec: the model's.
        plans: file of the plan by compute capability, as in ``{"8.6": "model.sm86.plan"}``.
        cuda_graphs: whether to capture a CUDA graph per batch size. It saves the launches of
            hundreds of kernels and takes memory per batch size and start-up time.
    """
    config = model_config(spec)
    config.platform = "tensorrt_plan"
    for key in [key for key in config.parameters if not key.startswith("stemserve.")]:
        del config.parameters[key]  # ONNX Runtime's
    config.ClearField("optimization")
    _one_gpu_instance(config)
    # Another version in the repository has other engines, or none yet.
    config.version_policy.specific.versions.append(spec.version)
    for capability, file in sorted(plans.items()):
        config.cc_model_filenames[capability] = file
    # Stems leave the GPU while the next batch is computed: a batch of stems is 100 MB and more.
    config.optimization.cuda.output_copy_stream = True
    if cuda_graphs:
        config.optimization.cuda.graphs = True
        for batch_size in range(1, spec.max_batch_size + 1):
            config.optimization.cuda.graph_spec.add(batch_size=batch_size)
    return config


def config_file_text(config: model_config_pb2.ModelConfig, command: str) -> str:
    """Return the text of a configuration file, having read it back.

    Args:
        config: what it must say.
        command: the command that generates it, for the header.
    """
    body: str = text_format.MessageToString(config, as_utf8=True)
    text = (
        f"# Generated by `{command}` from the model's spec; do not edit.\n"
        f"# Served with --model-config-name; config.pbtxt is the other choice.\n{body}"
    )
    if text_format.Parse(text, model_config_pb2.ModelConfig()) != config:
        raise ExportError(f"The configuration of '{config.name}' does not survive being written.")
    return text


def _one_gpu_instance(config: model_config_pb2.ModelConfig) -> None:
    """One instance per GPU: a second one would double activations for what batching does."""
    del config.instance_group[:]
    config.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_GPU, count=1)
