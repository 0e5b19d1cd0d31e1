"""Spleeter's U-Net: as published, and the same network for an inference engine.

Source: github.com/deezer/spleeter v2.3 (MIT), spleeter/model/functions/unet.py.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stemserve_export.precision import Precision

Activation = Literal["leaky_relu", "elu"]

CHANNELS = 2
N_BINS = 1024
NORM_EPSILON = 1e-3
LEAK = 0.2
DOWN_CHANNELS = (16, 32, 64, 128, 256, 512)
UP_CHANNELS = (256, 128, 64, 32, 16, 1)
LEVELS = len(DOWN_CHANNELS)

_Module = TypeVar("_Module", bound=nn.Module)


class UNet(nn.Module):
    """The published U-Net of one stem.

    ``forward``: magnitudes ``[B, 2, n_frames, 1024]`` float32 -> logits of the same shape. Their
    sigmoid, or their softmax over the stems, is a factor; a factor times the magnitude is the
    stem's estimate. ``n_frames`` is a multiple of 64. ``activation`` tells what the network was
    trained with: "leaky_relu" is LeakyReLU(0.2) in the encoder and ReLU in the decoder, "elu" is
    ELU in both. No weight tells them apart.
    TensorFlow's "same" padding for a 5x5 kernel and stride 2 is 1 before and 2 after.
    """

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        up_inputs = (DOWN_CHANNELS[-1], *(2 * c for c in DOWN_CHANNELS[-2::-1]))
        self.down = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 5, stride=2)
            for inputs, outputs in zip((CHANNELS, *DOWN_CHANNELS), DOWN_CHANNELS, strict=False)
        )
        # The last level feeds the decoder before its normalisation, which is thus never used.
        self.down_norm = nn.ModuleList(
            nn.BatchNorm2d(channels, eps=NORM_EPSILON) for channels in DOWN_CHANNELS[:-1]
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(inputs, outputs, 5, stride=2)
            for inputs, outputs in zip(up_inputs, UP_CHANNELS, strict=True)
        )
        self.up_norm = nn.ModuleList(
            nn.BatchNorm2d(channels, eps=NORM_EPSILON) for channels in UP_CHANNELS
        )
        self.logits = nn.Conv2d(1, CHANNELS, 4, dilation=2, padding=3)

    def forward(self, magnitude: Tensor) -> Tensor:
        """``[B, 2, n_frames, 1024]`` -> ``[B, 2, n_frames, 1024]``."""
        x = magnitude
        skips: list[Tensor] = []
        for level in range(LEVELS):
            x = self.down[level](F.pad(x, (1, 2, 1, 2)))
            if level < LEVELS - 1:
                skips.append(x)
                x = self.down_norm[level](x)
                x = F.elu(x) if self.activation == "elu" else F.leaky_relu(x, LEAK)
        for level in range(LEVELS):
            if level > 0:
                x = torch.cat([skips.pop(), x], dim=1)
            x = self.up[level](x)[:, :, 1:-2, 1:-2]
            x = self.up_norm[level](F.elu(x) if self.activation == "elu" else F.relu(x))
        logits: Tensor = self.logits(x)
        return logits


# --- the same network, for an inference engine ------------------------------------------------

# Phases of the bins in the last two layers; see ExportUNet.
BIN_PHASES = 8


class ExportUNet(nn.Module):
    """The U-Net of one stem, rewritten exactly for inference engines.

    ``forward``: magnitudes ``[B, 2, 1024, n_frames]`` -> minus the logits, of the same shape, their
    bins in the order :func:`phase_order`.

    * Bins come before frames, as the STFT delivers them; the kernels are transposed instead.
    * A transposed convolution spends most of its time scattering. Its even and odd outputs are
      four plain convolutions with a part of the kernel each, interleaved afterwards.
    * CPU kernels compute 16 channels at a time, and the last two layers have 1 and 2. They compute
      8 neighbouring bins as channels: few wasted multiplications, and no padding to 16.
    * BatchNormalization is a depthwise 1x1 convolution: ONNX Runtime keeps its blocked layout
      through convolutions and concatenations, and fuses the activation that follows.
    """

    def __init__(self, unet: UNet, precision: Precision = "fp32") -> None:
        super().__init__()
        self.dtype = torch.float16 if precision == "fp16" else torch.float32
        self.activation = unet.activation
        down = _members(unet.down, nn.Conv2d)
        down_norm = _members(unet.down_norm, nn.BatchNorm2d)
        *up, last_up = _members(unet.up, nn.ConvTranspose2d)
        *up_norm, last_norm = _members(unet.up_norm, nn.BatchNorm2d)
        self.down = nn.ModuleList(_conv(*_bins_first(conv), stride=(2, 2)) for conv in down)
        self.down_norm = nn.ModuleList(_depthwise(norm) for norm in down_norm)
        self.up = nn.ModuleList(InterleavedUp(conv, unet.activation) for conv in up)
        self.up_norm = nn.ModuleList(_depthwise(norm) for norm in up_norm)
        self.last_up = _last_up(last_up)
        self.last_scale: Tensor
        self.last_shift: Tensor
        scale, shift = _scale_and_shift(last_norm)
        self.register_buffer("last_scale", scale)
        self.register_buffer("last_shift", shift)
        self.negative_logits = _negative_logits(unet.logits)
        self.to(self.dtype)

    def forward(self, magnitude: Tensor) -> Tensor:
        """``[B, 2, 1024, n_frames]`` -> ``[B, 2, 1024, n_frames]``."""
        bins, frames = magnitude.shape[2:]
        x = magnitude.to(self.dtype)
        skips: list[Tensor] = []
        for level in range(LEVELS):
            x = self.down[level](F.pad(x, (1, 2, 1, 2)))
            if level < LEVELS - 1:
                skips.append(x)
                x = self.down_norm[level](x)
                x = elu(x) if self.activation == "elu" else F.leaky_relu(x, LEAK)
        for level in range(LEVELS - 1):
            if level > 0:
                x = torch.cat([skips.pop(), x], dim=1)
            x = self.up_norm[level](self.up[level](x))
        x = self.last_up(torch.cat([skips.pop(), x], dim=1))
        x = elu(x) if self.activation == "elu" else F.relu(x)
        # [B, (bin phase, frame phase), bin / 8, frame / 2] -> [B, 1, bin, frame]
        x = x.permute(0, 2, 3, 1).reshape(-1, bins // BIN_PHASES, frames // 2, BIN_PHASES, 2)
        x = x.transpose(2, 3).reshape(-1, 1, bins, frames) * self.last_scale + self.last_shift
        negative: Tensor = self.negative_logits(x)
        return negative.reshape(-1, CHANNELS, bins, frames).to(magnitude.dtype)


class InterleavedUp(nn.Module):
    """5x5 transposed convolution of stride 2, cropped to twice the input, and its activation.

    ``forward``: ``[B, in, H, W]`` -> ``[B, out, 2 H, 2 W]``.
    """

    def __init__(self, published: nn.ConvTranspose2d, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.channels = published.out_channels
        weight, bias = _bins_first(published)
        kernels = upsampling_kernels(weight, 1)
        # The even outputs use two taps, the odd ones three. With 16 channels a convolution is too
        # narrow for the CPU to reach its speed: there, even and odd columns share one, with zeros.
        columns = (slice(0, 1), slice(1, 2)) if self.channels > 16 else (slice(0, 2),)
        self.phases = nn.ModuleList()
        for row in range(2):
            for column in columns:
                kernel = kernels[row, column, :, :, : 2 + row, : 1 + column.stop].flatten(0, 1)
                self.phases.append(_conv(kernel, bias.repeat(len(kernel) // self.channels)))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in, H, W]`` -> ``[B, out, 2 H, 2 W]``."""
        height, width = x.shape[2:]
        parts = []
        for phase in _members(self.phases, nn.Conv2d):
            rows, columns = phase.kernel_size
            part = phase(F.pad(x, (1, columns - 2, 1, rows - 2)))
            parts.append(part if self.activation == "elu" else F.relu(part))
        # [B, (row, column, out), H, W] -> [B, H, row, W, column, out]: with the channels last,
        # interleaving moves blocks; DepthToSpace, which moves single values, takes twice the time.
        x = torch.cat(parts, dim=1).permute(0, 2, 3, 1)
        if self.activation == "elu":
            x = elu(x)
        x = x.reshape(-1, height, width, 2, 2 * self.channels).transpose(2, 3)
        return x.reshape(-1, 2 * height, 2 * width, self.channels).permute(0, 3, 1, 2)


def elu(x: Tensor) -> Tensor:
    """ELU with alpha 1: x where it is positive, else exp(x) - 1, which is never less than x.

    ONNX Runtime's CPU kernel of Elu takes 7 times as long as these four (7.2 ms to 1.1 ms for two
    million values): its Exp is vectorised for the machine that it runs on, its Elu is not.
    """
    return torch.maximum(x, torch.exp(torch.clamp(x, max=0.0)) - 1.0)


def phase_order() -> npt.NDArray[np.int64]:
    """Bin of every row of :class:`ExportUNet`'s output: by bin modulo 8, then by bin."""
    return np.arange(N_BINS).reshape(-1, BIN_PHASES).T.reshape(-1)


def upsampling_kernels(weight: Tensor, stride: int) -> Tensor:
    """A cropped 5x5 transposed convolution of stride 2 as plain convolution kernels.

    ``weight`` ``[in, out, 5, 5]`` -> ``[2 stride, 2, out, in, stride + 2, 3]``: the kernel of each
    of the 2 x ``stride`` output rows and 2 output columns that belong to ``stride`` input rows and
    one input column. Output ``y`` is fed by input ``i`` through tap ``y + 1 - 2 i``; the kernels
    start one input before their own.
    """
    inputs, outputs = weight.shape[:2]
    kernels = weight.new_zeros(2 * stride, 2, outputs, inputs, stride + 2, 3)
    for row, column, i, j in np.ndindex(2 * stride, 2, stride + 2, 3):
        tap_row, tap_column = row + 3 - 2 * i, column + 3 - 2 * j
        if 0 <= tap_row < 5 and 0 <= tap_column < 5:
            kernels[row, column, :, :, i, j] = weight[:, :, tap_row, tap_column].T
    return kernels


def _last_up(published: nn.ConvTranspose2d) -> nn.Conv2d:
    """The last transposed convolution, with 8 bins x 2 frames of output as channels."""
    weight, bias = _bins_first(published)
    stride = BIN_PHASES // 2
    kernel = upsampling_kernels(weight, stride).flatten(0, 2)
    return _conv(kernel, bias.repeat(len(kernel)), stride=(stride, 1), padding=1)


def _negative_logits(published: nn.Conv2d) -> nn.Conv2d:
    """Minus the 4x4 convolution of dilation 2, with 2 channels x 8 bins of output as channels."""
    weight, bias = _bins_first(published)
    taps = weight.shape[2]
    kernel = weight.new_zeros(CHANNELS, BIN_PHASES, 1, BIN_PHASES + 2 * (taps - 1), taps)
    for phase in range(BIN_PHASES):
        kernel[:, phase, :, phase : phase + 2 * taps : 2] = weight
    bias = bias.repeat_interleave(BIN_PHASES)
    return _conv(-kernel.flatten(0, 1), -bias, stride=(BIN_PHASES, 1), dilation=(1, 2), padding=3)


def _depthwise(norm: nn.BatchNorm2d) -> nn.Conv2d:
    """BatchNormalization with stored statistics as a depthwise 1x1 convolution."""
    scale, shift = _scale_and_shift(norm)
    return _conv(scale[:, None, None, None], shift, groups=norm.num_features)


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What BatchNormalization with stored statistics does: 2 x ``[channels]``."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach()
    return scale, (norm.bias - norm.running_mean * scale).detach()


def _bins_first(conv: nn.Conv2d | nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """Kernel, turned from ``[frames, bins]`` to ``[bins, frames]``, and bias."""
    assert conv.bias is not None
    return conv.weight.detach().transpose(2, 3), conv.bias.detach()


def _conv(
    kernel: Tensor,
    bias: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    padding: int = 0,
    groups: int = 1,
) -> nn.Conv2d:
    outputs, inputs, height, width = kernel.shape
    size = (height, width)
    conv = nn.Conv2d(inputs * groups, outputs, size, stride, padding, dilation, groups)
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight.copy_(kernel)
        conv.bias.copy_(bias)
    return conv


def _members(modules: nn.ModuleList, kind: type[_Module]) -> list[_Module]:
    """The list's members with their type, which nn.ModuleList forgets."""
    return [module for module in modules if isinstance(module, kind)]
