"""Spectrograms as HDemucs and HTDemucs frame them, and back.

Source: demucs 4.1.0 (MIT), demucs/hdemucs.py ``_spec`` and ``_ispec``. The published code pads by
reflection, lets ``torch.stft`` pad once more, and drops two frames at either end again, so that the
second padding never shows: what is left are frames that are not centred, of the signal padded by
``3/8 n_fft`` and to whole hops. The highest bin is dropped. ``normalized=True`` divides the STFT by
``sqrt(n_fft)``.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stemserve.errors import ExportError
from stemserve_export.families.demucs_layers import conv
from stemserve_export.spectral import InverseStft, Stft, StftPlan, hann_window

CHANNELS = 2
# Real and imaginary parts are channels of the network ("complex as channels").
PARTS = 2


class SpectrogramFraming:
    """Sizes of the spectrogram of one chunk.

    Attributes:
        chunk: samples.
        plan: of the padded chunk.
        left: samples of padding before it; those after it are ``right``.
    """

    def __init__(self, chunk: int, n_fft: int) -> None:
        hop = n_fft // 4
        n_frames = math.ceil(chunk / hop)
        self.chunk = chunk
        self.left = hop // 2 * 3
        self.right = self.left + n_frames * hop - chunk
        self.plan = StftPlan(n_fft, hop, n_fft // 2, n_frames)
        if chunk <= self.right:
            raise ExportError(
                f"A segment of {chunk} samples is too short to be padded by reflection; expected "
                f"more than {self.right} samples."
            )

    @property
    def norm(self) -> float:
        """What the published STFT is divided by."""
        return float(self.plan.n_fft**0.5)


class Spectrogram(nn.Module):
    """``[B, 2, chunk]`` float32 -> ``[B, 4, n_bins, n_frames]`` float32.

    Channels are left real, left imaginary, right real, right imaginary.
    """

    def __init__(self, framing: SpectrogramFraming) -> None:
        super().__init__()
        self.framing = framing
        self.stft = Stft(framing.plan)
        before = np.arange(framing.left, 0, -1)
        after = framing.chunk - 2 - np.arange(framing.right)
        rows = np.concatenate(framing.plan.natural_rows())
        self.before: Tensor
        self.after: Tensor
        self.rows: Tensor
        self.register_buffer("before", torch.from_numpy(before), persistent=False)
        self.register_buffer("after", torch.from_numpy(after), persistent=False)
        self.register_buffer("rows", torch.from_numpy(rows), persistent=False)

    def forward(self, mixture: Tensor) -> Tensor:
        """``[B, 2, chunk]`` -> ``[B, 4, n_bins, n_frames]``."""
        plan = self.framing.plan
        signal = mixture.reshape(-1, self.framing.chunk) * (1.0 / self.framing.norm)
        before = torch.index_select(signal, 1, self.before)
        after = torch.index_select(signal, 1, self.after)
        packed = self.stft(torch.cat([before, signal, after], dim=1))
        natural = torch.index_select(packed, 1, self.rows)
        return natural.reshape(-1, CHANNELS * PARTS, plan.n_bins, plan.n_frames)


class SpectrogramHead(nn.Module):
    """Last transposed convolution of the spectrogram branch, and the inverse STFT of its output.

    ``forward``: ``[B, C, n_bins / stride, n_frames]`` -> ``[B, n_stems, 2, chunk]`` float32.

    Putting the phases of the transposed convolution side by side, cropping them, and bringing them
    into the order in which the inverse STFT wants them only moves rows of ``n_frames`` values: one
    gather does all three.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, stride: int, framing: SpectrogramFraming
    ) -> None:
        super().__init__()
        plan = framing.plan
        self.framing = framing
        self.n_stems = weight.shape[1] // (CHANNELS * PARTS)
        taps = weight.flatten(2)
        pair = torch.stack([taps[..., stride:], taps[..., :stride]], dim=-1)  # [in, out, r, 2]
        kernel = pair.permute(1, 2, 0, 3).flatten(0, 1)[..., None]
        self.conv = conv(kernel, bias.repeat_interleave(stride), padding=(1, 0))
        # torch.istft divides by the summed squared window, which is 1.5 wherever 4 frames overlap;
        # that holds for all that is kept.
        self.inverse = InverseStft(plan, gain=framing.norm / 1.5)
        blocks = plan.n_bins // stride + 1
        bins = np.maximum(plan.slot_bins(), 0)[:, None] + stride // 2
        signal = np.arange(self.n_stems * CHANNELS)[:, None, None, None]
        part = np.arange(PARTS)[:, None]
        channel = (signal * PARTS + part) * stride + bins % stride
        self.rows: Tensor
        self.register_buffer(
            "rows",
            torch.from_numpy((channel * blocks + bins // stride).reshape(-1)),
            persistent=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, n_bins / stride, n_frames]`` -> ``[B, n_stems, 2, chunk]``."""
        framing = self.framing
        plan = framing.plan
        y = self.conv(x).float()
        y = y.reshape(-1, y.shape[1] * y.shape[2], plan.n_frames)
        packed = torch.index_select(y, 1, self.rows).reshape(-1, plan.packed_rows, plan.n_frames)
        waves: Tensor = self.inverse(packed)
        waves = waves[:, framing.left : framing.left + framing.chunk]
        return waves.reshape(-1, self.n_stems, CHANNELS, framing.chunk)


def inverse_of_ones(framing: SpectrogramFraming) -> npt.NDArray[np.float64]:
    """Chunk whose spectrogram holds ``1 + i`` everywhere, ``[chunk]`` float64.

    What a constant that is added to all real and imaginary parts adds to the waveform.
    """
    plan = framing.plan
    spectrum = np.full(plan.n_fft // 2 + 1, 1 + 1j)
    spectrum[plan.n_bins :] = 0
    frame = np.fft.irfft(spectrum) * hann_window(plan.n_fft) * framing.norm / 1.5
    wave = np.zeros(plan.n_samples)
    for index in range(plan.n_frames):
        wave[index * plan.hop : index * plan.hop + plan.n_fft] += frame
    return wave[framing.left : framing.left + framing.chunk]
