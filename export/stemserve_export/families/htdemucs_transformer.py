"""Cross-domain transformer of HTDemucs, rewritten for inference engines.

Source: github.com/adefossez/demucs 4.1.0 (MIT), demucs/transformer.py; Rouard, Massa, Defossez,
"Hybrid Transformers for Music Source Separation", ICASSP 2023.

Tokens are rows of a matrix ``[B x tokens, width]``, so that every linear layer is one matrix
product with its bias. The residual stream, normalisations and softmax are float32 in any precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stemserve_export.families.demucs_layers import NORM_EPSILON, Float32, gelu, linear
from stemserve_export.weights.demucs import Weights

# Queries whose scores are in memory at once: the scores of the published model's 2688 tokens and 8
# heads are 231 MB. Measured with ONNX Runtime: 400 MB less at its peak, in the same time.
QUERY_BLOCK = 672


@dataclass(frozen=True)
class TransformerShape:
    """Sizes of the transformer.

    Attributes:
        width: features of a token.
        heads: of every attention.
        hidden: features inside the feed-forward layers.
        layers: per branch; every second one is a cross attention.
        cross_first: whether the first one is.
    """

    width: int
    heads: int
    hidden: int
    layers: int
    cross_first: bool


class TokenNorm(Float32):
    """Layer normalisation of every token: ``[N, width]`` float32 -> the same."""

    def __init__(self, weights: Weights, name: str, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        with torch.no_grad():
            self.norm.weight.copy_(weights.take(f"{name}.weight", (width,)))
            self.norm.bias.copy_(weights.take(f"{name}.bias", (width,)))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, width]`` -> ``[N, width]``."""
        y: Tensor = self.norm(x)
        return y


class SequenceNorm(Float32):
    """GroupNorm(1) of a whole sequence: ``[B x tokens, width]`` float32 -> the same."""

    def __init__(self, weights: Weights, width: int, tokens: int) -> None:
        super().__init__()
        self.width = width
        self.tokens = tokens
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", weights.take("norm_out.weight", (width,)))
        self.register_buffer("bias", weights.take("norm_out.bias", (width,)))

    def forward(self, x: Tensor) -> Tensor:
        """``[B x tokens, width]`` -> ``[B x tokens, width]``."""
        x = x.reshape(-1, self.tokens, self.width)
        centred = x - _mean(x)
        scale = torch.rsqrt(_mean(centred * centred) + NORM_EPSILON)
        return (centred * (scale * self.weight) + self.bias).reshape(-1, self.width)


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=2, keepdim=True).mean(dim=1, keepdim=True)


class Attention(nn.Module):
    """Multi-head attention with its layer scale: 2 x ``[B x tokens, width]`` -> ``[B x …, width]``.

    Of the published parameters, the bias of the keys is left out, since softmax does not see it;
    the bias of the values passes through it and joins the output's; the layer scale and
    1/sqrt(head width) are folded into the products.
    """

    def __init__(self, weights: Weights, name: str, shape: TransformerShape, scale: Tensor) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.head = width // shape.heads
        attention = weights.at(name)
        weight = attention.take("in_proj_weight", (3 * width, width)).double()
        bias = attention.take("in_proj_bias", (3 * width,)).double()
        out = attention.take("out_proj.weight", (width, width)).double()
        out_bias = attention.take("out_proj.bias", (width,)).double()
        out_bias = (out_bias + out @ bias[2 * width :]) * scale.double()
        root = 1 / math.sqrt(self.head)
        self.query = linear(weight[:width] * root, bias[:width] * root)
        self.key = linear(weight[width : 2 * width], None)
        self.value = linear(weight[2 * width :], None)
        self.out = linear(out * scale.double()[:, None], out_bias)

    def forward(self, x: Tensor, other: Tensor, tokens: int, others: int) -> Tensor:
        """Queries of ``x``, keys and values of ``other``."""
        query = self._heads(self.query(x), tokens)
        key = self._heads(self.key(other), others).transpose(2, 3)
        value = self._heads(self.value(other), others)
        blocks = []
        for part in torch.split(query, QUERY_BLOCK, dim=2):
            scores = torch.matmul(part, key).float()
            blocks.append(torch.matmul(torch.softmax(scores, dim=-1).to(value.dtype), value))
        mixed = (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)).transpose(1, 2)
        y: Tensor = self.out(mixed.reshape(-1, self.heads * self.head))
        return y

    def _heads(self, x: Tensor, tokens: int) -> Tensor:
        return x.reshape(-1, tokens, self.heads, self.head).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with GELU between, and the layer scale: ``[N, width]`` -> the same."""

    def __init__(self, weights: Weights, shape: TransformerShape, scale: Tensor) -> None:
        super().__init__()
        width, hidden = shape.width, shape.hidden
        self.into = linear(
            weights.take("linear1.weight", (hidden, width)), weights.take("linear1.bias", (hidden,))
        )
        self.out = linear(
            weights.take("linear2.weight", (width, hidden)) * scale[:, None],
            weights.take("linear2.bias", (width,)) * scale,
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, width]`` -> ``[N, width]``."""
        y: Tensor = self.out(gelu(self.into(x)))
        return y


class Layer(nn.Module):
    """Self attention, or cross attention into the other branch, and the feed-forward part."""

    def __init__(
        self, weights: Weights, shape: TransformerShape, tokens: int, *, cross: bool
    ) -> None:
        super().__init__()
        width = shape.width
        gains = [weights.take(f"gamma_{i}.scale", (width,)) for i in (1, 2)]
        self.cross = cross
        self.norm_query = TokenNorm(weights, "norm1", width)
        self.norm_other = TokenNorm(weights, "norm2", width) if cross else self.norm_query
        self.norm_forward = TokenNorm(weights, "norm3" if cross else "norm2", width)
        name = "cross_attn" if cross else "self_attn"
        self.attention = Attention(weights, name, shape, gains[0])
        self.forward_part = FeedForward(weights, shape, gains[1])
        self.norm_out = SequenceNorm(weights, width, tokens)
        self.tokens = tokens

    def forward(self, x: Tensor, other: Tensor, others: int) -> Tensor:
        """``[B x tokens, width]``, ``[B x others, width]`` -> ``[B x tokens, width]``, float32."""
        dtype = self.attention.query.weight.dtype
        query = self.norm_query(x).to(dtype)
        source = self.norm_other(other).to(dtype) if self.cross else query
        x = x + self.attention(query, source, self.tokens, others).float()
        x = x + self.forward_part(self.norm_forward(x).to(dtype)).float()
        y: Tensor = self.norm_out(x)
        return y


class Positions(Float32):
    """Normalisation of the incoming tokens, and their constant positional embedding."""

    def __init__(self, weights: Weights, name: str, embedding: Tensor) -> None:
        super().__init__()
        tokens, width = embedding.shape
        self.tokens, self.width = tokens, width
        self.norm = TokenNorm(weights, name, width)
        self.embedding: Tensor
        self.register_buffer("embedding", embedding.float())

    def forward(self, x: Tensor) -> Tensor:
        """``[B x tokens, width]`` -> the same."""
        normalized: Tensor = self.norm(x)
        y = normalized.reshape(-1, self.tokens, self.width) + self.embedding
        return y.reshape(-1, self.width)


class CrossTransformer(nn.Module):
    """Both branches' layers: 2 x ``[B x tokens, width]`` float32 -> the same.

    ``embeddings`` are the positional ones, ``[tokens, width]`` per branch, spectrogram first.
    """

    def __init__(
        self, weights: Weights, shape: TransformerShape, embeddings: tuple[Tensor, Tensor]
    ) -> None:
        super().__init__()
        self.tokens = tuple(len(embedding) for embedding in embeddings)
        self.enter = Positions(weights, "norm_in", embeddings[0])
        self.enter_time = Positions(weights, "norm_in_t", embeddings[1])
        crosses = [index % 2 == (0 if shape.cross_first else 1) for index in range(shape.layers)]
        self.layers = nn.ModuleList(
            Layer(weights.at(f"layers.{i}"), shape, self.tokens[0], cross=cross)
            for i, cross in enumerate(crosses)
        )
        self.layers_time = nn.ModuleList(
            Layer(weights.at(f"layers_t.{i}"), shape, self.tokens[1], cross=cross)
            for i, cross in enumerate(crosses)
        )

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """2 x ``[B x tokens, width]`` -> 2 x ``[B x tokens, width]``."""
        n, n_time = self.tokens
        x, time = self.enter(x), self.enter_time(time)
        for layer, layer_time in zip(self.layers, self.layers_time, strict=True):
            if layer.cross:
                x, time = layer(x, time, n_time), layer_time(time, x, n)
            else:
                x, time = layer(x, x, n), layer_time(time, time, n_time)
        return x, time


def time_positions(tokens: int, width: int, max_period: float) -> Tensor:
    """Sinusoidal embedding of ``create_sin_embedding``, ``[tokens, width]`` float64."""
    half = width // 2
    position = torch.arange(tokens, dtype=torch.float64)[:, None]
    rate = max_period ** (torch.arange(half, dtype=torch.float64) / (half - 1))
    phase = position / rate
    return torch.cat([torch.cos(phase), torch.sin(phase)], dim=1)


def plane_positions(bins: int, frames: int, width: int, max_period: float) -> Tensor:
    """Embedding of ``create_2d_sin_embedding``, ``[bins x frames, width]`` float64.

    The first half of the features encodes the frame, the second the bin; sines and cosines
    alternate.
    """
    half = width // 2
    rate = torch.exp(torch.arange(0, half, 2, dtype=torch.float64) * (-math.log(max_period) / half))
    table = torch.zeros(bins, frames, width, dtype=torch.float64)
    for start, count, shape in ((0, frames, (1, frames)), (half, bins, (bins, 1))):
        phase = torch.arange(count, dtype=torch.float64)[:, None] * rate
        table[..., start : start + half : 2] = torch.sin(phase).reshape(*shape, -1)
        table[..., start + 1 : start + half : 2] = torch.cos(phase).reshape(*shape, -1)
    return table.reshape(bins * frames, width)
