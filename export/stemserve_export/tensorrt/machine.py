"""What this machine runs engines with: its GPU and its TensorRT, asked without Python packages."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from stemserve_export.tensorrt.errors import GpuError

# CUDA driver API, enum CUdevice_attribute.
_CAPABILITY_MAJOR: Final = 75
_CAPABILITY_MINOR: Final = 76
_NVINFER: Final = ("libnvinfer.so.11", "libnvinfer.so.10")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as its driver says, ``NVIDIA L4``.
        compute_capability: as in ``8.9``.
    """

    name: str
    compute_capability: str


def first_gpu(load: Callable[[str], Any] = ctypes.CDLL) -> Gpu:
    """Return the first GPU that CUDA programs see, ``CUDA_VISIBLE_DEVICES`` respected.

    Raises:
        GpuError: there is none, or no driver.
    """
    try:
        driver = load("libcuda.so.1")
    except OSError:
        raise GpuError(
            "This machine has no NVIDIA driver (libcuda.so.1 is missing); run this where the GPU "
            "is, in a container with --gpus all."
        ) from None
    device, count = ctypes.c_int(), ctypes.c_int()
    major, minor = ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    status = (
        driver.cuInit(0)
        or driver.cuDeviceGetCount(ctypes.byref(count))
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
        or driver.cuDeviceGetName(name, len(name), device)
    )
    if status:
        raise GpuError(
            f"The NVIDIA driver finds no GPU (CUDA error {status}); see whether nvidia-smi lists "
            "one, and whether CUDA_VISIBLE_DEVICES hides it."
        )
    return Gpu(name.value.decode(), f"{major.value}.{minor.value}")


def installed_tensorrt(load: Callable[[str], Any] = ctypes.CDLL) -> str | None:
    """Return the version of the TensorRT library that a server here would load, as ``10.5.0``."""
    for file in _NVINFER:
        try:
            return version_text(int(load(file).getInferLibVersion()))
        except (OSError, AttributeError):
            continue
    return None


def version_text(number: int) -> str:
    """TensorRT's version number as text: ``100500`` -> ``10.5.0`` (NvInferVersion.h, 10 and up)."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def same_tensorrt(one: str, other: str) -> bool:
    """Whether an engine of one version loads in the other: the first three numbers agree."""
    return one.split(".")[:3] == other.split(".")[:3]
