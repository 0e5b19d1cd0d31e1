"""Open-Unmix's networks: the published layers, merged where they are linear.

Source: github.com/sigsep/open-unmix-pytorch v1.3.0 (MIT), openunmix/model.py; Stöter et al.,
"Open-Unmix - A Reference Implementation for Music Source Separation", JOSS 4(41), 2019. Per target:
shift and scale of the magnitudes, fc1, BatchNorm, tanh, three bidirectional LSTM layers with a
skip connection around them, fc2, BatchNorm, relu, fc3, BatchNorm, scale and shift, relu. What
comes out is the factor that the mixture's magnitudes are multiplied by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stemserve_export.weights.openunmix import CHANNELS, TargetWeights

_NORM_EPSILON: Final = 1e-5  # of torch.nn.BatchNorm1d
# torch keeps the gates as input, forget, cell, output; ONNX as input, output, forget, cell.
_ONNX_GATES: Final = (0, 3, 1, 2)
_TORCH_GATES: Final = (0, 2, 3, 1)


class Encoder(nn.Module):
    """First layer of all targets: magnitudes to what the LSTMs read.

    ``forward``: ``[B, 2 max_bin, T]`` -> one ``[T, B, hidden]`` per target, in the dtype of the
    weights. The targets' layers are one product: they read the same magnitudes.
    """

    def __init__(self, targets: Sequence[TargetWeights]) -> None:
        super().__init__()
        self.hidden = targets[0].hidden
        layers = [_encoder_layer(target) for target in targets]
        self.weight = _parameter(torch.cat([weight for weight, _ in layers]))
        self.bias = _parameter(torch.cat([bias for _, bias in layers])[:, None])

    def forward(self, magnitude: Tensor) -> list[Tensor]:
        """``[B, 2 max_bin, T]`` -> targets x ``[T, B, hidden]``."""
        squashed = torch.tanh(torch.matmul(self.weight, magnitude) + self.bias)
        return [part.permute(2, 0, 1) for part in torch.split(squashed, self.hidden, dim=1)]


class BidirectionalLstm(nn.Module):
    """One LSTM layer in both directions, with its weights as the ONNX operator takes them.

    ``forward``: ``[T, B, inputs]`` -> ``[T, B, 2 cell]``; the second half of the last axis read
    the frames backwards. As torch exports ``nn.LSTM`` with a dynamic batch axis, every layer comes
    with some thirty operators that cut and join weights and make zeros for the initial state;
    here it is one.
    """

    def __init__(self, weights: TargetWeights, layer: int) -> None:
        super().__init__()
        self.cell = weights.hidden // 2

        def both(name: str) -> Tensor:
            """The parameter of both directions, its gates in ONNX's order."""
            return torch.stack(
                [
                    _reorder_gates(weights.tensors[f"lstm.{name}_l{layer}{direction}"], _ONNX_GATES)
                    for direction in ("", "_reverse")
                ]
            )

        self.input_weight = _parameter(both("weight_ih"))
        self.recurrent_weight = _parameter(both("weight_hh"))
        self.bias = _parameter(torch.cat([both("bias_ih"), both("bias_hh")], dim=1))

    def forward(self, frames: Tensor) -> Tensor:
        """``[T, B, inputs]`` -> ``[T, B, 2 cell]``."""
        n_frames, batch = frames.shape[:2]
        if not torch.compiler.is_exporting():
            state = frames.new_zeros(2, batch, self.cell)
            return torch.lstm(
                frames, (state, state), self._torch_weights(), True, 1, 0.0, False, True, False
            )[0]
        output: Tensor = torch.onnx.ops.symbolic(
            "LSTM",
            (frames, self.input_weight, self.recurrent_weight, self.bias),
            {"direction": "bidirectional", "hidden_size": self.cell},
            dtype=frames.dtype,
            shape=(n_frames, 2, batch, self.cell),
            version=18,
        )
        return output.transpose(1, 2).reshape(n_frames, -1, 2 * self.cell)

    def _torch_weights(self) -> list[Tensor]:
        weights = []
        for direction in range(2):
            bias_ih, bias_hh = self.bias[direction].chunk(2)
            weights += [
                _reorder_gates(value, _TORCH_GATES)
                for value in (
                    self.input_weight[direction],
                    self.recurrent_weight[direction],
                    bias_ih,
                    bias_hh,
                )
            ]
        return weights


class MaskNetwork(nn.Module):
    """What follows the encoder for one target.

    ``forward``: ``[T, B, hidden]`` -> factors from 0 upwards: per channel ``[B, len(bins), T]`` if
    ``channels_apart``, else one ``[B, 2 len(bins), T]``. ``bins`` ``[n]`` tells the bin of every
    row, -1 for a row of zeros: the last layer delivers any order at no cost.
    """

    def __init__(
        self, weights: TargetWeights, bins: npt.NDArray[np.int64], *, channels_apart: bool
    ) -> None:
        super().__init__()
        self.lstm = nn.ModuleList(BidirectionalLstm(weights, i) for i in range(weights.layers))
        narrow, narrow_bias = _narrow_layer(weights)
        self.narrow = _parameter(narrow.T)
        self.narrow_bias = _parameter(narrow_bias)
        wide, wide_bias = _mask_layer(weights, bins)
        parts = CHANNELS if channels_apart else 1
        self.wide = nn.ParameterList(_parameter(part) for part in wide.chunk(parts))
        self.wide_bias = nn.ParameterList(_parameter(part) for part in wide_bias.chunk(parts))

    def forward(self, frames: Tensor) -> list[Tensor]:
        """``[T, B, hidden]`` -> factors, see the class."""
        x = frames
        for layer in self.lstm:
            x = layer(x)
        x = torch.matmul(torch.cat([frames, x], dim=2), self.narrow) + self.narrow_bias
        # In this order on purpose: ONNX Runtime 1.32 crashes while it optimises a float16 graph
        # where the product below takes the transposed values directly.
        x = torch.relu(x.permute(1, 2, 0))
        return [
            torch.relu(torch.matmul(weight, x) + bias)
            for weight, bias in zip(self.wide, self.wide_bias, strict=True)
        ]


def _encoder_layer(target: TargetWeights) -> tuple[Tensor, Tensor]:
    """Input shift and scale, fc1 and bn1 as one layer: ``[hidden, 2 max_bin]``, ``[hidden]``."""
    t = target.tensors
    weight = t["fc1.weight"].double() * t["input_scale"].double().repeat(CHANNELS)
    bias = weight @ t["input_mean"].double().repeat(CHANNELS)
    scale, shift = _scale_and_shift(target, "bn1")
    return scale[:, None] * weight, scale * bias + shift


def _narrow_layer(target: TargetWeights) -> tuple[Tensor, Tensor]:
    """fc2 and bn2 as one layer: ``[hidden, 2 hidden]``, ``[hidden]``."""
    scale, shift = _scale_and_shift(target, "bn2")
    return scale[:, None] * target.tensors["fc2.weight"].double(), shift


def _mask_layer(target: TargetWeights, bins: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """fc3, bn3, output scale and shift: ``[2 len(bins), hidden]``, ``[2 len(bins), 1]``."""
    t = target.tensors
    scale, shift = _scale_and_shift(target, "bn3")
    output_scale, output_mean = t["output_scale"].double(), t["output_mean"].double()
    scale = scale.reshape(CHANNELS, -1) * output_scale
    shift = shift.reshape(CHANNELS, -1) * output_scale + output_mean
    weight = scale[:, :, None] * t["fc3.weight"].double().reshape(CHANNELS, -1, target.hidden)
    wanted = torch.from_numpy(bins >= 0)[:, None]
    index = torch.from_numpy(np.maximum(bins, 0))
    weight, bias = weight[:, index] * wanted, shift[:, index, None] * wanted
    return weight.flatten(0, 1), bias.flatten(0, 1)


def _scale_and_shift(target: TargetWeights, norm: str) -> tuple[Tensor, Tensor]:
    """What BatchNorm with stored statistics does: 2 x ``[features]`` float64."""
    weight, bias, mean, variance = (
        target.tensors[f"{norm}.{name}"].double()
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / torch.sqrt(variance + _NORM_EPSILON)
    return scale, bias - mean * scale


def _reorder_gates(values: Tensor, order: Sequence[int]) -> Tensor:
    gates = values.chunk(4)
    return torch.cat([gates[gate] for gate in order])


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.float().contiguous(), requires_grad=False)
