"""Encoder and decoder layers of HDemucs and HTDemucs; see ``demucs_layers`` for their parts.

Source: demucs 4.1.0 (MIT), ``HEncLayer`` and ``HDecLayer`` of demucs/hdemucs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from stemserve_export.families.demucs_layers import (
    Axis,
    GatedConv,
    GroupNorm,
    NormalizedGatedConv,
    Residual,
    Spread,
    Upsample,
    conv,
    gelu,
)
from stemserve_export.families.hdemucs_recurrent import RecurrentResidual
from stemserve_export.weights.demucs import Weights


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one level of a branch, which its encoder and its decoder share.

    Attributes:
        axis: along which the encoder samples down and the decoder up.
        inputs: channels at the outer end, towards the audio.
        outputs: channels at the inner end.
        kernel: taps of the strided convolution along ``axis``.
        stride: of that convolution.
        groups: of the group normalisations, 0 for none.
        hidden: channels inside DConv.
        depth: residual branches of DConv.
        dilated: whether their dilations are 1, 2, 4 …, or all 1.
        recurrent: whether DConv has LSTM and local attention.
        encoder_dconv: whether the encoder has a DConv.
        decoder_dconv: whether the decoder has one.
        steps: positions along ``axis`` at the inner end.
        whole: the kernel covers all bins that are left, and one comes out; no padding.
    """

    axis: Axis
    inputs: int
    outputs: int
    kernel: int
    stride: int
    groups: int
    hidden: int
    depth: int
    dilated: bool
    recurrent: bool
    encoder_dconv: bool
    decoder_dconv: bool
    steps: int
    whole: bool = False


class Encoder(nn.Module):
    """Strided convolution, GELU, DConv, and a gated 1x1 convolution.

    ``forward``: ``[B, inputs, H, W]`` -> ``[B, outputs, H', W']``, ``W' = ceil(W / stride)`` along
    the axis. ``inject`` is added to the convolution's output.
    """

    def __init__(self, weights: Weights, shape: LayerShape) -> None:
        super().__init__()
        self.conv = StridedConv(weights, shape)
        self.norm = _norm(weights, shape, "norm1", shape.outputs)
        self.dconv = _dconv(weights, shape) if shape.encoder_dconv else nn.Identity()
        self.rewrite = _rewrite(weights, shape, "norm2", context=0)

    def forward(self, x: Tensor, inject: Tensor | None = None) -> Tensor:
        """``[B, inputs, H, W]`` -> ``[B, outputs, H', W']``."""
        x = self.conv(x)
        if inject is not None:
            x = x + inject
        y: Tensor = self.rewrite(self.dconv(gelu(self.norm(x))))
        return y


class StridedConv(nn.Module):
    """First convolution of an encoder: ``[B, inputs, H, W]`` -> ``[B, outputs, H', W']``."""

    def __init__(self, weights: Weights, shape: LayerShape) -> None:
        super().__init__()
        self.shape = shape
        pad = 0 if shape.whole else shape.kernel // 4
        kernel = (shape.outputs, shape.inputs, shape.kernel)
        bias = weights.take("conv.bias", (shape.outputs,))
        if shape.axis == "bins":
            weight = weights.take("conv.weight", (*kernel, 1))
            self.conv = conv(weight, bias, stride=(shape.stride, 1), padding=(pad, 0))
        else:
            weight = weights.take("conv.weight", kernel)[:, :, None]
            self.conv = conv(weight, bias, stride=(1, shape.stride), padding=(0, pad))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` -> ``[B, outputs, H', W']``."""
        short = -x.shape[3] % self.shape.stride
        if self.shape.axis == "samples" and short:
            x = F.pad(x, (0, short))
        y: Tensor = self.conv(x)
        return y


class DecoderBody(nn.Module):
    """Skip connection, gated convolution with context, and DConv.

    ``forward``: 2 x ``[B, outputs, H, W]`` -> ``[B, outputs, H, W]``; the innermost decoder has
    nothing but the skip connection.
    """

    def __init__(self, weights: Weights, shape: LayerShape) -> None:
        super().__init__()
        self.rewrite = _rewrite(weights, shape, "norm1", context=1)
        self.dconv = _dconv(weights, shape) if shape.decoder_dconv else nn.Identity()

    def forward(self, x: Tensor | None, skip: Tensor) -> Tensor:
        """``[B, outputs, H, W]``, the same -> ``[B, outputs, H, W]``."""
        y: Tensor = self.dconv(self.rewrite(skip if x is None else x + skip))
        return y


class DecoderUp(nn.Module):
    """Transposed convolution, cropped to what the encoder read, and GELU but for the last layer.

    ``forward``: ``[B, outputs, H, W]`` -> ``[B, inputs, H', W']``; ``length`` is the size that is
    wanted along the axis. ``channels`` picks some of the ``inputs`` of the last layer.
    """

    def __init__(
        self,
        weights: Weights,
        shape: LayerShape,
        length: int,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.length = length
        self.last = channels is not None
        weight, bias = transposed_kernel(weights, shape, channels)
        self.up = (
            Spread(weight, bias)
            if shape.whole
            else Upsample(weight, bias, shape.stride, shape.axis)
        )
        # The last layer is at level 0, which has a normalisation in no supported network.
        self.norm = _norm(weights, shape, "norm2", shape.inputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, outputs, H, W]`` -> ``[B, inputs, H', W']``."""
        # Group normalisation counts what is cropped afterwards, as in the published code.
        x = self.norm(self.up(x))
        if not self.shape.whole:
            start = self.shape.kernel // 4
            kept = slice(start, start + self.length)
            x = x[:, :, kept] if self.shape.axis == "bins" else x[..., kept]
        return x if self.last else gelu(x)


def transposed_kernel(
    weights: Weights, shape: LayerShape, channels: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Kernel ``[outputs, inputs, kernel]`` and bias of a decoder's transposed convolution."""
    trailing = (1,) if shape.axis == "bins" else ()
    weight = weights.take("conv_tr.weight", (shape.outputs, shape.inputs, shape.kernel, *trailing))
    weight, bias = weight.flatten(2), weights.take("conv_tr.bias", (shape.inputs,))
    if channels is None:
        return weight, bias
    return weight[:, list(channels)], bias[list(channels)]


def _dconv(weights: Weights, shape: LayerShape) -> nn.Module:
    branches: list[nn.Module] = []
    for index in range(shape.depth):
        dilation = 2**index if shape.dilated else 1
        sizes = (weights.at(f"dconv.layers.{index}"), shape.outputs, shape.hidden, dilation)
        branches.append(
            RecurrentResidual(*sizes, shape.steps) if shape.recurrent else Residual(*sizes)
        )
    return nn.Sequential(*branches)


def _norm(weights: Weights, shape: LayerShape, name: str, channels: int) -> nn.Module:
    if not shape.groups:
        return nn.Identity()
    return GroupNorm(
        shape.groups,
        weights.take(f"{name}.weight", (channels,)),
        weights.take(f"{name}.bias", (channels,)),
        per_row=False,
    )


def _rewrite(weights: Weights, shape: LayerShape, norm: str, context: int) -> nn.Module:
    channels, taps = shape.outputs, 1 + 2 * context
    bias = weights.take("rewrite.bias", (2 * channels,))
    padding = (context, context)
    if shape.axis == "samples":
        weight = weights.take("rewrite.weight", (2 * channels, channels, taps))[:, :, None]
        padding = (0, context)
    else:
        weight = weights.take("rewrite.weight", (2 * channels, channels, taps, taps))
    if shape.whole:
        # One bin is left, and its neighbours are padding.
        weight, padding = weight[:, :, context : context + 1], (0, context)
    if not shape.groups:
        return GatedConv(weight, bias, padding=padding)
    return NormalizedGatedConv(
        weight, bias, _norm(weights, shape, norm, 2 * channels), padding=padding
    )
