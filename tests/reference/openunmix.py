"""The published Open-Unmix: the package openunmix 1.3.0 itself, in eager PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from support.torchaudio_stub import ensure_torchaudio
from torch import Tensor

ensure_torchaudio()

from openunmix.model import OpenUnmix, Separator  # noqa: E402


def published_separator(
    states: Mapping[str, Mapping[str, Tensor]],
    wiener_iterations: int,
    dtype: torch.dtype = torch.float32,
) -> Separator:
    """The separator that ``openunmix.umxhq()`` gives, with these state dicts by target."""
    targets = {}
    for stem, state in states.items():
        network = OpenUnmix(
            nb_bins=2049,
            nb_channels=2,
            hidden_size=state["fc1.weight"].shape[0],
            nb_layers=sum(name.startswith("lstm.weight_ih") for name in state) // 2,
            max_bin=state["input_mean"].shape[0],
        )
        network.load_state_dict(dict(state), strict=False)
        targets[stem] = network
    separator = Separator(targets, niter=wiener_iterations).to(dtype)
    separator.freeze()
    return separator


def separate(separator: Separator, mixture: Tensor) -> dict[str, Tensor]:
    """``[B, 2, n]`` -> one ``[B, 2, n]`` per target; n is a chunk or a whole track."""
    with torch.inference_mode():
        stems = separator(mixture.to(separator.stft.window.dtype))
    return {name: stems[:, i] for i, name in enumerate(separator.target_models)}
