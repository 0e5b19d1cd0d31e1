"""What every export is checked for before it is kept."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stemserve.errors import ExportError
from stemserve.spec import ModelSpec
from stemserve.triton import WIRE_DTYPES
from stemserve_export.gate.measures import snr_db
from stemserve_export.gate.runners import GraphRunner, run_torch
from stemserve_export.gate.thresholds import export_limit

if TYPE_CHECKING:
    from torch import nn


def graph_parity_db(module: nn.Module, spec: ModelSpec, path: Path) -> dict[str, float] | None:
    """Compare the exported graph with a torch module: the one that it was built from, in fp32.

    The batch holds seeded noise that falls silent half-way, and a chunk of silence: optimisers of
    graphs have been seen to drop small constants, which shows in silence alone.

    Returns:
        SNR in dB per stem, or None if ONNX Runtime is not installed.

    Raises:
        ExportError: a stem differs by more than rounding.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    mixture = np.random.default_rng(0).normal(0, 0.1, (2, *spec.tensor_dims)).astype(np.float32)
    mixture[0, :, spec.chunk_samples // 2 :] = 0
    mixture[1] = 0
    # What travels in half precision is rounded for both alike.
    mixture = mixture.astype(WIRE_DTYPES[spec.wire_dtype]).astype(np.float32)
    outputs = GraphRunner(spec, path)(mixture)
    expected = run_torch(module, mixture)
    parity = {
        stem: round(min(snr_db(want, got), 999.0), 1)
        for stem, want, got in zip(spec.stems, expected, outputs, strict=True)
    }
    least = export_limit(spec).value
    for stem, value in parity.items():
        if not value >= least:  # NaN fails, too
            raise ExportError(
                f"The graph of '{spec.name}' gives '{stem}' at {value:.1f} dB of what PyTorch "
                f"gives; expected at least {least:.0f} dB. The export is wrong: please "
                "report it with the versions of torch and onnxruntime."
            )
    return parity
