"""Residual branch of HDemucs' inner levels: LSTM over overlapping spans, and local attention.

Source: demucs 4.1.0 (MIT), ``BLSTM`` and ``LocalState`` of demucs/demucs.py.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn

from stemserve_export.families.demucs_layers import Float32, Residual, linear
from stemserve_export.weights.demucs import Weights

# Steps of a span; spans start half of that apart, and the middle half of each is kept.
SPAN: Final = 200
LSTM_LAYERS: Final = 2
HEADS: Final = 4
DECAYS: Final = 4
# torch keeps the gates as input, forget, cell, output; ONNX as input, output, forget, cell.
_ONNX_GATES: Final = (0, 3, 1, 2)
_TORCH_GATES: Final = (0, 2, 3, 1)
# What a step's score for itself is set to.
_SELF_SCORE: Final = -100.0


class RecurrentResidual(Residual):
    """Residual branch with an LSTM and local attention.

    ``forward``: ``[B, C, 1, steps]`` -> ``[B, C, 1, steps]``.
    """

    def __init__(
        self, weights: Weights, channels: int, hidden: int, dilation: int, steps: int
    ) -> None:
        super().__init__(weights, channels, hidden, dilation, members=2)
        self.lstm = SpanLstm(weights.at("3"), hidden)
        self.attention = LocalAttention(weights.at("4"), hidden, steps)

    def between(self, x: Tensor) -> Tensor:
        """``[B, hidden, 1, W]`` -> ``[B, hidden, 1, W]``."""
        y: Tensor = self.attention(self.lstm(x[:, :, 0].transpose(1, 2)))
        return y.transpose(1, 2)[:, :, None]


class BidirectionalLstm(nn.Module):
    """One LSTM layer in both directions: ``[T, N, inputs]`` -> ``[T, N, 2 hidden]``.

    The weights are kept as the ONNX operator takes them, so that the graph has this one operator;
    torch's own export of ``nn.LSTM`` adds some thirty that cut and join weights.
    """

    def __init__(self, weights: Weights, layer: int, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden

        def both(name: str, *trailing: int) -> Tensor:
            taken = [
                weights.take(f"lstm.{name}_l{layer}{direction}", (4 * hidden, *trailing))
                for direction in ("", "_reverse")
            ]
            return torch.stack([_reorder(value, _ONNX_GATES) for value in taken])

        self.input_weight: Tensor
        self.recurrent_weight: Tensor
        self.bias: Tensor
        self.register_buffer("input_weight", both("weight_ih", inputs))
        self.register_buffer("recurrent_weight", both("weight_hh", hidden))
        self.register_buffer("bias", torch.cat([both("bias_ih"), both("bias_hh")], dim=1))

    def forward(self, steps: Tensor) -> Tensor:
        """``[T, N, inputs]`` -> ``[T, N, 2 hidden]``."""
        n_steps, batch = steps.shape[:2]
        if not torch.compiler.is_exporting():
            state = steps.new_zeros(2, batch, self.hidden)
            return torch.lstm(
                steps, (state, state), self._torch_weights(), True, 1, 0.0, False, True, False
            )[0]
        output: Tensor = torch.onnx.ops.symbolic(
            "LSTM",
            (steps, self.input_weight, self.recurrent_weight, self.bias),
            {"direction": "bidirectional", "hidden_size": self.hidden},
            dtype=steps.dtype,
            shape=(n_steps, 2, batch, self.hidden),
            version=18,
        )
        return output.transpose(1, 2).reshape(n_steps, -1, 2 * self.hidden)

    def _torch_weights(self) -> list[Tensor]:
        weights = []
        for direction in range(2):
            bias_ih, bias_hh = self.bias[direction].chunk(2)
            values = (
                self.input_weight[direction],
                self.recurrent_weight[direction],
                bias_ih,
                bias_hh,
            )
            weights += [_reorder(value, _TORCH_GATES) for value in values]
        return weights


def _reorder(value: Tensor, gates: tuple[int, ...]) -> Tensor:
    parts = value.chunk(4)
    return torch.cat([parts[gate] for gate in gates])


class SpanLstm(nn.Module):
    """LSTM over spans of 200 steps, a linear layer, and a skip connection.

    ``forward``: ``[B, T, hidden]`` -> ``[B, T, hidden]``. Up to 200 steps are one span. More are
    cut into spans that start 100 steps apart, of which the middle 100 steps are kept, and the ends
    of the first and the last; the linear layer sees only those.
    """

    def __init__(self, weights: Weights, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            BidirectionalLstm(weights, layer, (2 if layer else 1) * hidden, hidden)
            for layer in range(LSTM_LAYERS)
        )
        self.linear = linear(
            weights.take("linear.weight", (hidden, 2 * hidden)),
            weights.take("linear.bias", (hidden,)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, hidden]`` -> ``[B, T, hidden]``."""
        steps, hidden = x.shape[1:]
        if steps <= SPAN:
            y = self._run(x.transpose(0, 1)).transpose(0, 1)
        else:
            stride, margin = SPAN // 2, SPAN // 4
            spans = -(-steps // stride)
            padded = nn.functional.pad(x, (0, 0, 0, (spans + 1) * stride - steps))
            halves = padded.reshape(-1, spans + 1, stride, hidden)
            framed = torch.cat([halves[:, :-1], halves[:, 1:]], dim=2)  # [B, span, step, hidden]
            out = self._run(framed.reshape(-1, SPAN, hidden).transpose(0, 1)).transpose(0, 1)
            out = out.reshape(-1, spans, SPAN, 2 * hidden)
            middle = out[:, :, margin:-margin].reshape(-1, spans * stride, 2 * hidden)
            y = torch.cat([out[:, 0, :margin], middle, out[:, -1, -margin:]], dim=1)[:, :steps]
        z: Tensor = self.linear(y.reshape(-1, 2 * hidden))
        return x + z.reshape(-1, steps, hidden)

    def _run(self, steps: Tensor) -> Tensor:
        for layer in self.layers:
            steps = layer(steps)
        return steps


class Distances(Float32):
    """Constants of :class:`LocalAttention`: ``|t - s|``, where it is 0, and the decays' weights."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        position = torch.arange(steps, dtype=torch.float32)
        rates = torch.arange(1, DECAYS + 1, dtype=torch.float32) / (2 * math.sqrt(DECAYS))
        self.distance: Tensor
        self.itself: Tensor
        self.rates: Tensor
        self.register_buffer("distance", (position[None] - position[:, None]).abs())
        self.register_buffer("itself", torch.eye(steps, dtype=torch.bool))
        self.register_buffer("rates", rates[:, None])


class LocalAttention(nn.Module):
    """Attention that decays with distance and leaves out the step itself, and a skip connection.

    ``forward``: ``[B, steps, hidden]`` -> ``[B, steps, hidden]``. The published sum of four decays
    per head, ``(f + 1) |t - s| sigmoid(d_f) / 2 / sqrt(4)``, is one slope times the distance.
    """

    def __init__(self, weights: Weights, hidden: int, steps: int) -> None:
        super().__init__()
        self.head = hidden // HEADS

        def pointwise(name: str, outputs: int, factor: float = 1.0) -> nn.Linear:
            weight = weights.take(f"{name}.weight", (outputs, hidden, 1))[..., 0]
            return linear(weight * factor, weights.take(f"{name}.bias", (outputs,)) * factor)

        self.query = pointwise("query", hidden, 1 / math.sqrt(self.head))
        self.key = pointwise("key", hidden)
        self.content = pointwise("content", hidden)
        self.decay = pointwise("query_decay", HEADS * DECAYS)
        self.proj = pointwise("proj", hidden)
        self.constants = Distances(steps)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, steps, hidden]`` -> ``[B, steps, hidden]``."""
        steps, hidden = x.shape[1:]
        rows = x.reshape(-1, hidden)
        query = self._heads(self.query(rows), steps)
        key = self._heads(self.key(rows), steps).transpose(2, 3)
        content = self._heads(self.content(rows), steps)
        opening = torch.sigmoid(self.decay(rows).float()).reshape(-1, steps, HEADS, DECAYS)
        slope = torch.matmul(opening, self.constants.rates).transpose(1, 2)  # [B, head, query, 1]
        scores = torch.matmul(query, key).float() - slope * self.constants.distance
        scores = torch.where(self.constants.itself, _SELF_SCORE, scores)
        mixed = torch.matmul(torch.softmax(scores, dim=-1).to(x.dtype), content)
        y: Tensor = self.proj(mixed.transpose(1, 2).reshape(-1, hidden))
        return x + y.reshape(-1, steps, hidden)

    def _heads(self, x: Tensor, steps: int) -> Tensor:
        return x.reshape(-1, steps, HEADS, self.head).transpose(1, 2)
