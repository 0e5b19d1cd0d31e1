"""How ONNX Runtime's CUDA provider computes, in the words of Triton's configuration."""

from __future__ import annotations

from typing import Final

from tritonclient.grpc import model_config_pb2

# 1: cuDNN's heuristic. 0, the default, times all algorithms whenever a batch size is new, in the
# midst of traffic.
_CUDNN_HEURISTIC: Final = "1"


def with_cuda_provider(
    config: model_config_pb2.ModelConfig, *, tf32: bool = False
) -> model_config_pb2.ModelConfig:
    """Add to an ONNX Runtime configuration how its CUDA provider computes; return the same object.

    Args:
        config: any that has the platform of ONNX Runtime; on a CPU the addition has no effect.
        tf32: whether fp32 products may round their operands to 10 bits. It takes an fp32 artefact
            to what an fp16 artefact has (docs/gpu.md has the figures).

    The server must have ONNX Runtime 1.18 or later, which knows ``use_tf32``: Triton 24.10 does.
    """
    # Not among the accelerator's parameters: there Triton replaces it by its default.
    config.parameters["cudnn_conv_algo_search"].string_value = _CUDNN_HEURISTIC
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    kept = [one for one in accelerators if one.name != "cuda"]
    del accelerators[:]
    accelerators.extend(kept)
    cuda = accelerators.add(name="cuda")
    cuda.parameters["use_tf32"] = "1" if tf32 else "0"
    return config
