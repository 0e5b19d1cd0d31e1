"""The demucs package itself as the peer: what a user's ``demucs --shifts 0`` computes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from support.torchaudio_stub import ensure_torchaudio


def load_network(checkpoint: Path) -> Any:
    """The package's network. Reading a ``.th`` runs its pickle: only for files that tests wrote."""
    ensure_torchaudio()
    from demucs.hf import load_safetensors_model
    from demucs.states import load_model

    if checkpoint.suffix == ".safetensors":
        return load_safetensors_model(checkpoint).eval()
    return load_model(checkpoint).eval()


def separate_track(
    checkpoint: Path,
    mixture: npt.NDArray[np.float32],
    stems: Sequence[str],
    *,
    segment_seconds: float | Fraction | None = None,
    overlap: float = 0.25,
) -> dict[str, npt.NDArray[np.float32]]:
    """Stems of a whole track ``[2, n]``, each ``[2, n]`` float32.

    As ``demucs.api.Separator`` does: the track is normalized by mean and deviation of its mono
    downmix, cut into segments (of the checkpoint's length unless told), and joined with triangles.
    """
    network = load_network(checkpoint)
    from demucs.apply import apply_model

    wave = torch.from_numpy(np.ascontiguousarray(mixture))
    mono = wave.mean(0)
    mean, std = mono.mean(), mono.std() + 1e-8
    with torch.no_grad():
        separated = apply_model(
            network,
            ((wave - mean) / std)[None],
            shifts=0,
            split=True,
            overlap=overlap,
            segment=segment_seconds,
        )[0]
    separated = separated * std + mean
    return {stem: separated[network.sources.index(stem)].numpy() for stem in stems}
