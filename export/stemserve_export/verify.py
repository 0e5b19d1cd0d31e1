"""Numbers that say whether an artefact does what its checkpoint does."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stemserve.errors import ExportError
from stemserve.spec import INPUT_NAME, ModelSpec

if TYPE_CHECKING:
    from torch import nn

# Far below what differing summation orders cost in fp32 (110 dB and more are measured), far above
# what a wrong padding, axis or constant leaves (under 40 dB).
MIN_PARITY_DB = 90.0


def snr_db(reference: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Signal-to-noise ratio of ``other`` against ``reference`` (same shape), in dB."""
    signal = float(np.sum(np.square(reference, dtype=np.float64)))
    noise = float(np.sum(np.square(np.subtract(reference, other, dtype=np.float64))))
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def graph_parity_db(module: nn.Module, spec: ModelSpec, path: Path) -> dict[str, float] | None:
    """Compare the exported graph with its torch module.

    The batch holds seeded noise that falls silent half-way, and a chunk of silence: optimisers of
    graphs have been seen to drop small constants, which shows in silence alone.

    Returns:
        SNR in dB per stem, or None if ONNX Runtime is not installed.

    Raises:
        ExportError: a stem differs by more than rounding.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime
    import torch

    mixture = np.random.default_rng(0).normal(0, 0.1, (2, *spec.tensor_dims)).astype(np.float32)
    mixture[0, :, spec.chunk_samples // 2 :] = 0
    mixture[1] = 0
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(list(spec.stems), {INPUT_NAME: mixture})
    with torch.inference_mode():
        expected = module(torch.from_numpy(mixture))
    parity = {
        stem: round(min(snr_db(want.numpy(), got), 999.0), 1)
        for stem, want, got in zip(spec.stems, expected, outputs, strict=True)
    }
    for stem, value in parity.items():
        if not value >= MIN_PARITY_DB:  # NaN fails, too
            raise ExportError(
                f"The graph of '{spec.name}' gives '{stem}' at {value:.1f} dB of what PyTorch "
                f"gives; expected at least {MIN_PARITY_DB:.0f} dB. The export is wrong: please "
                "report it with the versions of torch and onnxruntime."
            )
    return parity
