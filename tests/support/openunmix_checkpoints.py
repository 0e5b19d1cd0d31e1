"""Open-Unmix checkpoints in the published format: names, shapes, seeded values that all matter."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

STEMS = ("vocals", "drums", "bass", "other")
N_BINS = 2049
MAX_BIN = 1487  # of 16 kHz at 44.1 kHz
UMXHQ_HIDDEN = 512
UMXL_HIDDEN = 1024
SMALL_HIDDEN = 16


def seeded_state(
    seed: int, hidden: int, max_bin: int = MAX_BIN, layers: int = 3
) -> dict[str, Tensor]:
    """The state dict of one target, as ``torch.save(openunmix.model.OpenUnmix.state_dict())``.

    Every parameter and statistic is in the range of trained ones: inputs are whitened for music
    (magnitudes that fall with frequency), the recurrence remembers for a second or so, and the
    mask varies with time and frequency, is partly cut off at 0 and partly above 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    def matrix(outputs: int, inputs: int, gain: float = 1.0) -> Tensor:
        bound = gain * (3 / inputs) ** 0.5  # keeps the variance
        return uniform(-bound, bound, outputs, inputs)

    def norm(name: str, features: int) -> dict[str, Tensor]:
        return {
            f"{name}.weight": uniform(0.5, 1.5, features),
            f"{name}.bias": uniform(-0.5, 0.5, features),
            f"{name}.running_mean": uniform(-0.3, 0.3, features),
            f"{name}.running_var": uniform(0.5, 2.0, features),
            f"{name}.num_batches_tracked": torch.tensor(80_000),
        }

    falling = torch.exp(-torch.arange(max_bin) / 200)
    state = {
        "input_mean": -(20 * falling + 0.3) * uniform(0.8, 1.2, max_bin),
        "input_scale": 1 / ((40 * falling + 0.5) * uniform(0.8, 1.2, max_bin)),
        "output_scale": uniform(0.5, 1.5, N_BINS),
        "output_mean": uniform(0.0, 0.8, N_BINS),
        "fc1.weight": matrix(hidden, 2 * max_bin),
        **norm("bn1", hidden),
    }
    cell = hidden // 2
    for layer in range(layers):
        for direction in ("", "_reverse"):
            suffix = f"_l{layer}{direction}"
            state[f"lstm.weight_ih{suffix}"] = matrix(4 * cell, hidden, 1.5)
            state[f"lstm.weight_hh{suffix}"] = matrix(4 * cell, cell)
            bias = uniform(-0.2, 0.2, 4 * cell)
            bias[cell : 2 * cell] += 2.0  # the forget gate
            state[f"lstm.bias_ih{suffix}"] = bias
            state[f"lstm.bias_hh{suffix}"] = uniform(-0.2, 0.2, 4 * cell)
    state |= {
        "fc2.weight": matrix(hidden, 2 * hidden, 1.5),
        **norm("bn2", hidden),
        "fc3.weight": matrix(2 * N_BINS, hidden),
        **norm("bn3", 2 * N_BINS),
    }
    return state


def write_checkpoints(
    folder: Path, hidden: int, stems: Iterable[str] = STEMS, **shape: int
) -> dict[str, Path]:
    """Write one seeded ``.pth`` per target, named as published, and return them by target.

    umxhq's files are of 2019: torch's format before the zip archive, and with the window of the
    STFT, which openunmix's loader passes over.
    """
    files = {}
    for stem in stems:
        state = seeded_state(STEMS.index(stem) + 1, hidden, **shape)
        window = torch.hann_window(4096)
        state |= {"stft.window": window, "transform.0.window": window}
        files[stem] = folder / f"{stem}-0a1b2c3d.pth"
        torch.save(state, files[stem], _use_new_zipfile_serialization=hidden != UMXHQ_HIDDEN)
    return files
