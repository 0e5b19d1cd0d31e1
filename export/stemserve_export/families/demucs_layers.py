"""Convolutional layers that HDemucs and HTDemucs share, rewritten for inference engines.

Source: github.com/adefossez/demucs 4.1.0 (MIT), demucs/hdemucs.py and demucs/demucs.py; Defossez,
"Hybrid Spectrogram and Waveform Source Separation", ISMIR 2021 workshop on music source
separation. Both branches are 4-D here, so that they share their layers: the spectrogram branch
``[B, C, bins, frames]``, the waveform branch ``[B, C, 1, samples]``.

What differs from the published layers, and gives the same values:

* A gated linear unit is two convolutions instead of one that is split: its sigmoid fuses with the
  convolution, and no half is copied.
* DConv works on the 4-D tensor with kernels of height 1, where the published code moves the bins
  into the batch axis and back.
* The second normalisation of DConv never sees its wide input: :class:`Expansion`.
* A transposed convolution is a plain one with the phases of its output as channels, interleaved
  afterwards: :class:`Upsample`.
* Layer scales are folded into the convolution before them.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stemserve_export.spectral import InverseStft
from stemserve_export.weights.demucs import Weights

Axis = Literal["bins", "samples"]

# nn.GroupNorm's default, which demucs uses everywhere.
NORM_EPSILON = 1e-5


class Float32(nn.Module):
    """A module whose parameters stay float32 when the network around it is made half precision."""


def to_half(core: nn.Module) -> None:
    """Make the parameters of a network half precision, but for :class:`Float32` and transforms."""
    if isinstance(core, Float32 | InverseStft):
        return
    for parameter in core.parameters(recurse=False):
        parameter.data = parameter.data.half()
    for name, buffer in core.named_buffers(recurse=False):
        if buffer.is_floating_point():
            setattr(core, name, buffer.half())
    for child in core.children():
        to_half(child)


def gelu(x: Tensor) -> Tensor:
    """Exact GELU, in the order of operations that ONNX Runtime fuses into one.

    The exporter's own order, ``x * (0.5 * (1 + erf(x / sqrt 2)))``, is run as five passes.
    """
    return x * (torch.erf(x / math.sqrt(2.0)) + 1.0) * 0.5


def conv(weight: Tensor, bias: Tensor, **geometry: tuple[int, int]) -> nn.Conv2d:
    """A convolution with given parameters: ``weight`` ``[out, in, height, width]``."""
    height, width = weight.shape[2:]
    module = nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        (height, width),
        **geometry,  # type: ignore[arg-type]
    )
    assert module.bias is not None
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    return module


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with given parameters: ``weight`` ``[out, in]``."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        module.weight.copy_(weight)
        if bias is not None:
            module.bias.copy_(bias)
    return module


class GroupNorm(Float32):
    """nn.GroupNorm over channels and positions, exact in float32.

    ``forward``: ``[B, C, H, W]`` -> the same shape and dtype. With ``per_row`` every row ``H`` has
    statistics of its own (what the published code gets by moving the bins into the batch axis).

    Written out in two passes because ONNX Runtime's InstanceNormalization and GroupNormalization
    lose half of float32's digits on a CPU (80 dB). One axis is reduced at a time: that is what its
    ReduceMean has fast loops for.
    """

    def __init__(self, groups: int, weight: Tensor, bias: Tensor, *, per_row: bool) -> None:
        super().__init__()
        self.groups = groups
        self.per_row = per_row
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", weight.reshape(1, -1, 1, 1).clone())
        self.register_buffer("bias", bias.reshape(1, -1, 1, 1).clone())

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, C, H, W]``."""
        channels, height, width = x.shape[1:]
        y = x.float()
        if self.groups > 1:
            y = y.reshape(-1, channels // self.groups, height, width)
        centred = y - self._mean(y)
        scale = torch.rsqrt(self._mean(centred * centred) + NORM_EPSILON)
        if self.groups > 1:
            y = (centred * scale).reshape(-1, channels, height, width)
            return (y * self.weight + self.bias).to(x.dtype)
        return (centred * (scale * self.weight) + self.bias).to(x.dtype)

    def _mean(self, x: Tensor) -> Tensor:
        x = x.mean(dim=3, keepdim=True)
        if not self.per_row and x.shape[2] > 1:
            x = x.mean(dim=2, keepdim=True)
        return x.mean(dim=1, keepdim=True)


class GatedConv(nn.Module):
    """Convolution and gated linear unit: ``[B, C, H, W]`` -> ``[B, C', H, W]``."""

    def __init__(self, weight: Tensor, bias: Tensor, **geometry: tuple[int, int]) -> None:
        super().__init__()
        half = len(weight) // 2
        self.value = conv(weight[:half], bias[:half], **geometry)
        self.gate = conv(weight[half:], bias[half:], **geometry)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, C', H, W]``."""
        value: Tensor = self.value(x)
        return value * torch.sigmoid(self.gate(x))


class NormalizedGatedConv(nn.Module):
    """Convolution, group normalisation and gated linear unit."""

    def __init__(
        self, weight: Tensor, bias: Tensor, norm: nn.Module, **geometry: tuple[int, int]
    ) -> None:
        super().__init__()
        self.conv = conv(weight, bias, **geometry)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, C', H, W]``."""
        return F.glu(self.norm(self.conv(x)), dim=1)


class Statistics(Float32):
    """Input of :class:`Expansion`'s convolutions: what they need to normalise their own output.

    ``forward``: ``[B, hidden, H, W]`` -> ``[B, hidden + 2, H, W]``, same dtype: the input divided
    by the deviation that ``weight @ input + bias`` has over channels and ``W``, one over that
    deviation, and the mean over it.

    With ``m`` the input's mean over ``W``, the output of channel ``c`` less the mean over all of it
    is ``w_c (h - m) + d_c``; the two parts are orthogonal, so the variance is the mean of
    ``|W (h - m)|^2 = |R (h - m)|^2``, where ``R^T R = W^T W`` has only hidden x hidden values, plus
    that of ``d_c^2``: sums of squares, nothing cancels.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        w = weight.double().flatten(1)
        # R of a QR decomposition; signs do not matter, and it exists for any rank.
        root = torch.linalg.qr(w, mode="r").R / len(w) ** 0.5
        self.outer = conv(weight.double().flatten(1)[:, :, None, None], bias)
        self.root = nn.Conv2d(root.shape[1], root.shape[0], 1, bias=False)
        with torch.no_grad():
            self.root.weight.copy_(root[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """``[B, hidden, H, W]`` -> ``[B, hidden + 2, H, W]``."""
        h = x.float()
        centre = h.mean(dim=3, keepdim=True)
        spread = self.root(h - centre)
        within = (spread * spread).mean(dim=3, keepdim=True).sum(dim=1, keepdim=True)
        means = self.outer(centre)
        mean = means.mean(dim=1, keepdim=True)
        offsets = means - mean
        between = (offsets * offsets).mean(dim=1, keepdim=True)
        scale = torch.rsqrt(within + between + NORM_EPSILON)
        shape = (-1, -1, -1, h.shape[3])
        parts = [h * scale, scale.expand(*shape), (mean * scale).expand(*shape)]
        return torch.cat(parts, dim=1).to(x.dtype)


class Expansion(nn.Module):
    """End of a DConv branch: 1x1 convolution, GroupNorm(1) per row, gate and layer scale.

    ``forward``: ``[B, hidden, H, W]`` -> ``[B, C, H, W]``. The convolution's output is the widest
    tensor of the network, 2 C channels, and normalising it takes longer than computing it. Its mean
    and variance follow from the narrow input (:class:`Statistics`), and normalising is linear: two
    more input channels carry the statistics, and the convolution delivers normalised values.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor, scale: Tensor
    ) -> None:
        super().__init__()
        self.statistics = Statistics(weight, bias)
        w, b, g = weight.double().flatten(1), bias.double(), gain.double()
        kernel = torch.cat([g[:, None] * w, (g * b)[:, None], -g[:, None]], dim=1)
        offset = shift.double().clone()
        half = len(w) // 2
        # value * sigmoid(gate) * scale: the values take the layer scale.
        kernel[:half] *= scale.double()[:, None]
        offset[:half] *= scale.double()
        self.gated = GatedConv(kernel[:, :, None, None], offset)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, hidden, H, W]`` -> ``[B, C, H, W]``."""
        y: Tensor = self.gated(self.statistics(x))
        return y


class Residual(nn.Module):
    """One residual branch of DConv: ``[B, C, H, W]`` -> ``[B, C, H, W]``.

    ``members`` is the number of layers that the published module has between its activation and
    its second convolution; its names count them.
    """

    def __init__(
        self, weights: Weights, channels: int, hidden: int, dilation: int, members: int = 0
    ) -> None:
        super().__init__()
        self.squeeze = conv(
            weights.take("0.weight", (hidden, channels, 3))[:, :, None],
            weights.take("0.bias", (hidden,)),
            dilation=(1, dilation),
            padding=(0, dilation),
        )
        self.norm = GroupNorm(
            1, weights.take("1.weight", (hidden,)), weights.take("1.bias", (hidden,)), per_row=True
        )
        convolution, norm, scale = 3 + members, 4 + members, 6 + members
        self.expand = Expansion(
            weights.take(f"{convolution}.weight", (2 * channels, hidden, 1)),
            weights.take(f"{convolution}.bias", (2 * channels,)),
            weights.take(f"{norm}.weight", (2 * channels,)),
            weights.take(f"{norm}.bias", (2 * channels,)),
            weights.take(f"{scale}.scale", (channels,)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, C, H, W]``."""
        y: Tensor = x + self.expand(self.between(gelu(self.norm(self.squeeze(x)))))
        return y

    def between(self, x: Tensor) -> Tensor:
        """What else the branch does: ``[B, hidden, H, W]`` -> the same."""
        return x


class Upsample(nn.Module):
    """Transposed convolution along one axis whose kernel is twice its stride.

    ``forward``: ``[B, in, H, W]`` -> ``[B, out, stride (H + 1), W]``, or the same along ``W``,
    which is what the published layer has before it crops.

    Sample ``stride m + r`` of the output is made of the inputs ``m`` and ``m - 1``, with the taps
    ``r`` and ``stride + r``: a plain convolution of width 2 with ``stride x out`` channels. ONNX
    Runtime's ConvTranspose scatters a product of the same size and takes much longer.
    """

    def __init__(self, weight: Tensor, bias: Tensor, stride: int, axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        self.stride = stride
        self.channels = weight.shape[1]
        taps = weight.flatten(2)
        pair = torch.stack([taps[..., stride:], taps[..., :stride]], dim=-1)  # [in, out, r, 2]
        if axis == "bins":
            kernel = pair.permute(2, 1, 0, 3).flatten(0, 1)[..., None]
            self.conv = conv(kernel, bias.repeat(stride), padding=(1, 0))
        else:
            kernel = pair.permute(1, 2, 0, 3).flatten(0, 1)[:, :, None]
            self.conv = conv(kernel, bias.repeat_interleave(stride), padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in, H, W]`` -> ``[B, out, H', W']``."""
        height, width = x.shape[2:]
        y: Tensor = self.conv(x)
        if self.axis == "bins":
            y = y.reshape(-1, self.stride, self.channels, height + 1, width)
            y = y.permute(0, 2, 3, 1, 4)  # [B, out, row, phase, W]
            return y.reshape(-1, self.channels, self.stride * (height + 1), width)
        y = y.reshape(-1, self.channels, self.stride, width + 1).transpose(2, 3)
        return y.reshape(-1, self.channels, 1, self.stride * (width + 1))


class Spread(nn.Module):
    """Transposed convolution of a single bin: ``[B, in, 1, W]`` -> ``[B, out, kernel, W]``."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.channels, self.taps = weight.shape[1:]
        kernel = weight.permute(1, 2, 0).flatten(0, 1)[:, :, None, None]
        self.conv = conv(kernel, bias.repeat_interleave(self.taps))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in, 1, W]`` -> ``[B, out, kernel, W]``."""
        width = x.shape[3]
        y: Tensor = self.conv(x)
        return y.reshape(-1, self.channels, self.taps, width)
