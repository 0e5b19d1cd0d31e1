"""The Wiener step of Open-Unmix: one iteration of expectation maximization, in closed form.

Source: github.com/sigsep/open-unmix-pytorch v1.3.0 (MIT), openunmix/filtering.py, ``wiener`` with
``iterations=1, softmask=False, residual=False``; Duong, Vincent and Gribonval, "Under-determined
reverberant audio source separation using a full-rank spatial covariance model", IEEE TASLP 18(7),
2010. With the mixture ``x(t)`` of a bin, a vector of 2 channels, and the factors ``a_jc(t)`` of
target ``j``, whose first estimate is ``y_jc = a_jc x_c``:

    v_j(t) = 1/2 sum_c |y_jc(t)|^2
    R_j    = sum_t y_j(t) y_j(t)^H / (eps s^2 + sum_t v_j(t))
    C(t)   = sqrt(eps) s^2 I + sum_j v_j(t) R_j
    stem_j = v_j(t) R_j C(t)^-1 x(t)

with ``s = max(1, max |x| / 10)`` over the whole excerpt. The published code divides ``x`` by ``s``
first and multiplies the stems by it at last; with ``s^2`` at the two regularisations, the same
comes out. ``C`` and ``R`` are Hermitian 2 x 2 matrices, and ``C^-1 x`` serves all targets.

One side effect of the published code is not repeated: where the mixture is exactly 0, it takes it
for 1 from then on. That shows where one channel is digital silence while the other plays on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from stemserve_export.spectral import StftPlan
from stemserve_export.weights.openunmix import CHANNELS

EPSILON: Final = 1e-10
SCALE_FACTOR: Final = 10.0
# The published separator works on excerpts of so many frames at a time (wiener_win_len).
MAX_FRAMES: Final = 300


class Hermitian(NamedTuple):
    """A Hermitian 2 x 2 matrix per bin, and per frame if ``T`` is not 1.

    ``left`` and ``right`` are the diagonal; ``real`` and ``imag`` the parts of the element in the
    first row. All ``[B, 1, slots, 1, columns, T]`` float32.
    """

    left: Tensor
    right: Tensor
    real: Tensor
    imag: Tensor


class WienerStep(nn.Module):
    """Factors of all targets to the packed spectrograms of those that are wanted.

    ``forward``: packed mixture ``[B x 2, packed_rows, T]``; per target the factors of the left and
    of the right channel, each ``[B, packed_rows / 2, T]``; the indices of the targets that are
    wanted. Returns a packed spectrogram ``[B x 2, packed_rows, T]`` for each of these.

    Everything stays in the packed order, as ``[B, channel, slot, real | imaginary, column, T]``.
    """

    def __init__(self, plan: StftPlan) -> None:
        super().__init__()
        self.plan = plan
        self.slots, self.columns = plan.outer // 2, 2 * plan.columns
        # The blocks (channel, slot, part) with the channels exchanged, and with both exchanged.
        blocks = torch.arange(CHANNELS * self.slots * 2).reshape(CHANNELS, self.slots, 2)
        signs = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).reshape(CHANNELS, 1, 2, 1, 1)
        self.exchanged: Tensor
        self.turned: Tensor
        self.signs: Tensor
        self.register_buffer("exchanged", blocks.flip(0).reshape(-1), persistent=False)
        self.register_buffer("turned", blocks.flip(0, 2).reshape(-1), persistent=False)
        self.register_buffer("signs", signs, persistent=False)

    def forward(
        self, packed: Tensor, factors: Sequence[Sequence[Tensor]], wanted: Sequence[int]
    ) -> list[Tensor]:
        """``[B x 2, packed_rows, T]``, targets x channels x ``[B, packed_rows / 2, T]``."""
        x = packed.reshape(-1, CHANNELS, self.slots, 2, self.columns, self.plan.n_frames)
        squares = x * x
        power = squares[:, :, :, :1] + squares[:, :, :, 1:]
        loudest = torch.amax(power, dim=(1, 2, 3, 4, 5), keepdim=True)
        scale = torch.clamp(loudest * SCALE_FACTOR**-2, min=1.0)  # s^2
        cross = _cross_spectrum(x)
        variances, covariances = [], []
        for left, right in factors:
            variance, covariance = self._model(left, right, power, cross, scale * EPSILON)
            variances.append(variance)
            covariances.append(covariance)
        solved = self._solve(x, variances, covariances, scale * EPSILON**0.5)
        exchanged, turned = self._rearranged(solved)
        stems = []
        for index in wanted:
            stem = variances[index] * _product(covariances[index], solved, exchanged, turned)
            stems.append(stem.reshape(-1, self.plan.packed_rows, self.plan.n_frames))
        return stems

    def _model(
        self,
        left: Tensor,
        right: Tensor,
        power: Tensor,
        cross: tuple[Tensor, Tensor],
        epsilon: Tensor,
    ) -> tuple[Tensor, Hermitian]:
        """``2 v`` of a target ``[B, 1, slots, 1, columns, T]``, and ``R / 2``."""
        shape = (-1, 1, self.slots, 1, self.columns, self.plan.n_frames)
        left, right = left.reshape(shape), right.reshape(shape)
        left_power = left * left * power[:, :1]
        right_power = right * right * power[:, 1:]
        both = left * right
        left_total, right_total = _total(left_power), _total(right_power)
        weight = 0.5 / (0.5 * (left_total + right_total) + epsilon)
        covariance = Hermitian(
            left_total * weight,
            right_total * weight,
            _total(both * cross[0]) * weight,
            _total(both * cross[1]) * weight,
        )
        return left_power + right_power, covariance

    def _solve(
        self,
        x: Tensor,
        variances: Sequence[Tensor],
        covariances: Sequence[Hermitian],
        regularisation: Tensor,
    ) -> Tensor:
        """``C^-1 x``, of the shape of ``x``."""
        left, right = [
            regularisation
            + _sum([v * r[side] for v, r in zip(variances, covariances, strict=True)])
            for side in range(2)
        ]
        real, imag = [
            _sum([v * r[part] for v, r in zip(variances, covariances, strict=True)])
            for part in (2, 3)
        ]
        inverse = 1.0 / (left * right - (real * real + imag * imag))
        negative = -inverse
        adjugate = Hermitian(right * inverse, left * inverse, real * negative, imag * negative)
        return _product(adjugate, x, *self._rearranged(x))

    def _rearranged(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the elements beside the diagonal meet.

        For ``(x_1, x_2)``: ``(x_2, x_1)`` meets their real part, ``(i x_2, -i x_1)`` the imaginary.
        """
        blocks = x.reshape(-1, len(self.exchanged), self.columns * self.plan.n_frames)
        exchanged = torch.index_select(blocks, 1, self.exchanged).reshape(-1, *x.shape[1:])
        turned = torch.index_select(blocks, 1, self.turned).reshape(-1, *x.shape[1:])
        return exchanged, turned * self.signs


def _product(matrix: Hermitian, x: Tensor, exchanged: Tensor, turned: Tensor) -> Tensor:
    """The matrix times ``x``."""
    diagonal = torch.cat([matrix.left, matrix.right], dim=1)
    return diagonal * x + matrix.real * exchanged + matrix.imag * turned


def _cross_spectrum(x: Tensor) -> tuple[Tensor, Tensor]:
    """The left channel times the conjugate of the right one, real and imaginary parts."""
    real_left, imag_left = x[:, :1, :, :1], x[:, :1, :, 1:]
    real_right, imag_right = x[:, 1:, :, :1], x[:, 1:, :, 1:]
    return (
        real_left * real_right + imag_left * imag_right,
        imag_left * real_right - real_left * imag_right,
    )


def _total(values: Tensor) -> Tensor:
    return torch.sum(values, dim=-1, keepdim=True)


def _sum(values: Sequence[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
