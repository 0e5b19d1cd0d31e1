"""A small separator that ``demucs.apply.apply_model`` takes, sensitive to how a track is framed."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Samples = npt.NDArray[np.float32]


class Contextual(nn.Module):
    """Two stems that depend on where in the chunk a sample lies and on what surrounds it.

    Moving a chunk by a sample, or putting zeros where the track goes on, changes every output.

    Args:
        chunk: samples of a chunk.
        sample_rate: Hz.
    """

    sources = ("sum", "square")
    audio_channels = 2

    def __init__(self, chunk: int, sample_rate: int = 100) -> None:
        super().__init__()
        self.chunk = chunk
        self.samplerate = sample_rate
        self.segment = chunk / sample_rate
        self.unused = nn.Parameter(torch.zeros(1))  # where it lies tells apply_model the device

    def forward(self, mixture: Tensor) -> Tensor:
        position = torch.linspace(0.5, 1.5, mixture.shape[-1])
        running = torch.cumsum(mixture, -1) / mixture.shape[-1]
        return torch.stack([running + mixture * position, mixture * mixture.flip(-1)], 1)

    def valid_length(self, _length: int) -> int:
        return self.chunk

    def stems_of(self, samples: Samples) -> list[Samples]:
        """The stems of one chunk [2, chunk]."""
        with torch.inference_mode():
            return list(self(torch.from_numpy(samples)[None])[0].numpy())


def random_track(length: int) -> Samples:
    """A track [2, length], seeded by its length."""
    return np.random.default_rng(length).uniform(-1, 1, (2, length)).astype(np.float32)


def blocks_of(track: Samples, size: int) -> list[Samples]:
    """The track in consecutive blocks of ``size`` samples; the last may be shorter."""
    return [track[:, start : start + size] for start in range(0, track.shape[1], size)]
