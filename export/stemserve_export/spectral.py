"""STFT and inverse STFT as small real matrix products that any inference engine runs.

The ONNX operators STFT and DFT are slow on ONNX Runtime's CPU and missing from TensorRT, and a
dense DFT costs ten times the arithmetic. Here one frame of ``n_fft`` samples goes through the
four-step FFT (Bailey, "FFTs in external or hierarchical memory", 1990): with ``n = B a + b`` and
``k = p + A q``, ``n_fft = A B``,

    X[k] = sum_b e^(-2 pi i k b / n_fft) * ( sum_a x[B a + b] e^(-2 pi i p a / A) )

that is, ``B`` products with an A x A matrix, one transposition, and ``A/2`` products with a
``4 Q x 2 B`` matrix. Three properties keep it small:

* The samples are real, so residue ``A - p`` is the conjugate of residue ``p``: only the residues
  ``0 .. A/2`` are computed. Residues 0 and ``A/2`` are real themselves and share a slot, as in a
  real FFT, which leaves exactly ``A/2`` complex slots.
* Only the ``Q`` columns that hold the lowest ``n_bins`` bins are computed.
* ``B`` divides ``hop``: a frame is the concatenation of ``n_fft / hop`` slices of one array.

Time is the last axis from the first step to the last, so that every permutation on the way moves
whole rows of ``n_frames`` values. Frames are not centred: frame ``t`` covers the samples
``t hop .. t hop + n_fft - 1``; who wants another framing pads the signal first.

**Packed spectrogram** ``[N, packed_rows, n_frames]`` float32: the order in which the products
deliver real and imaginary parts. It is a permutation of the natural order; :meth:`Stft.real`,
:meth:`Stft.imag` and :meth:`InverseStft.pack` translate, and :class:`PackedMask` multiplies by a
mask without unpacking.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stemserve.errors import ExportError

_Float64Array = npt.NDArray[np.float64]
_Int64Array = npt.NDArray[np.int64]


def hann_window(n_fft: int) -> _Float64Array:
    """Periodic Hann window ``0.5 - 0.5 cos(2 pi n / n_fft)``, ``[n_fft]`` float64."""
    window: _Float64Array = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    return window


@dataclass(frozen=True)
class StftPlan:
    """Sizes of one transform, and the order of its packed rows.

    ``n_fft`` and ``hop`` are in samples; ``n_bins`` is the number of lowest bins that are wanted,
    up to ``n_fft // 2 + 1``; ``n_frames`` is the number of frames of one signal.
    """

    n_fft: int
    hop: int
    n_bins: int
    n_frames: int

    def __post_init__(self) -> None:
        if self.n_fft < 4 or self.hop < 1 or self.n_fft % self.hop:
            raise ExportError(
                f"The hop must divide the FFT size; got hop {self.hop} and n_fft {self.n_fft}. "
                "Choose a hop of n_fft / 2, n_fft / 4 …"
            )
        if not 1 <= self.n_bins <= self.n_fft // 2 + 1:
            raise ExportError(
                f"An FFT of {self.n_fft} samples has bins 0 to {self.n_fft // 2}; "
                f"n_bins must be 1 to {self.n_fft // 2 + 1} and is {self.n_bins}."
            )
        if self.n_frames < 1:
            raise ExportError(f"n_frames must be at least 1 and is {self.n_frames}.")
        _ = self.inner  # raises if there is no factorisation

    @property
    def n_samples(self) -> int:
        """Samples that ``n_frames`` whole frames cover."""
        return (self.n_frames - 1) * self.hop + self.n_fft

    @property
    def hops_per_frame(self) -> int:
        """Rows of ``hop`` samples that one frame covers."""
        return self.n_fft // self.hop

    @property
    def n_hops(self) -> int:
        """Rows of ``hop`` samples that the whole signal covers."""
        return self.n_frames - 1 + self.hops_per_frame

    @property
    def inner(self) -> int:
        """``B``: a divisor of ``hop`` with ``A = n_fft / B`` even, as near to A as there is."""
        candidates = [
            b for b in range(1, self.hop + 1) if self.hop % b == 0 and self.n_fft // b % 2 == 0
        ]
        if not candidates:
            raise ExportError(f"n_fft must be even; it is {self.n_fft}. Choose a power of two.")
        return min(candidates, key=lambda b: (b + self.n_fft // b, b))

    @property
    def outer(self) -> int:
        """``A``: the number of residues ``p``."""
        return self.n_fft // self.inner

    @property
    def columns(self) -> int:
        """``Q``: columns per residue that hold the lowest ``n_bins`` bins."""
        return -(-self.n_bins // self.outer)

    @property
    def packed_rows(self) -> int:
        """Rows of a packed spectrogram: slots x (real, imaginary) x (p, A - p) x columns."""
        return self.outer // 2 * 4 * self.columns

    def slot_bins(self) -> _Int64Array:
        """Bin of every complex value of every slot, ``[A/2, 2 Q]``; -1 where it is not wanted.

        The first ``Q`` columns hold the bins of residue ``slot``; the second ``Q`` those of
        residue ``A - slot``, except in slot 0, where they are the bins of residue ``A/2``.
        """
        slot = np.arange(self.outer // 2)[:, None]
        first_of_row = self.outer * np.arange(self.columns)[None, :]
        mirrored = np.where(slot == 0, self.outer // 2, self.outer - slot)
        bins = np.concatenate([slot + first_of_row, mirrored + first_of_row], axis=1)
        return np.where(bins < self.n_bins, bins, -1).astype(np.int64)

    def natural_rows(self) -> tuple[_Int64Array, _Int64Array]:
        """Packed rows of the real and of the imaginary parts of bins 0, 1, 2 …: 2 x [n_bins]."""
        width = 2 * self.columns
        slot, column = np.nonzero(self.slot_bins() >= 0)
        order = np.argsort(self.slot_bins()[slot, column])
        real = (slot * 2 * width + column)[order]
        return real, real + width


def residue_matrix(plan: StftPlan) -> _Float64Array:
    """``[A, A]``: rows (slot, real | imaginary), columns ``a``; see the module's formula.

    Slot 0 holds the two real residues, 0 and ``A/2``.
    """
    a = np.arange(plan.outer)
    angle = 2 * np.pi * np.outer(np.arange(plan.outer // 2), a) / plan.outer
    matrix: _Float64Array = np.stack([np.cos(angle), -np.sin(angle)], axis=1)
    matrix[0, 1] = np.cos(np.pi * a)
    return matrix.reshape(plan.outer, plan.outer)


def bin_matrix(plan: StftPlan) -> _Float64Array:
    """``[A/2, 4 Q, 2 B]``: rows (real | imaginary, column), columns (``b``, real | imaginary).

    ``X[k] = sum_b e^(-i theta) Y_b`` with ``theta = 2 pi k b / n_fft``, where ``Y_b`` is the slot's
    value for residue ``slot``, its conjugate for residue ``A - slot``, and in slot 0 the real or
    the imaginary component alone. Rows of bins that are not wanted are zero.
    """
    bins = plan.slot_bins()
    theta = 2 * np.pi * bins[:, :, None] * np.arange(plan.inner) / plan.n_fft
    cos, sin = np.cos(theta), np.sin(theta)
    conjugate = np.where(np.arange(2 * plan.columns) < plan.columns, 1.0, -1.0)[None, :, None]
    # [slot, real | imaginary of X, column, b, real | imaginary of Y]
    matrix: _Float64Array = np.stack(
        [
            np.stack([cos, conjugate * sin], axis=-1),
            np.stack([-sin, conjugate * cos], axis=-1),
        ],
        axis=1,
    )
    first, second = slice(0, plan.columns), slice(plan.columns, None)
    matrix[0, 0, second, :, 1], matrix[0, 1, second, :, 1] = cos[0, second], -sin[0, second]
    matrix[0, :, first, :, 1] = 0.0
    matrix[0, :, second, :, 0] = 0.0
    matrix *= (bins >= 0)[:, None, :, None, None]
    return matrix.reshape(plan.outer // 2, 4 * plan.columns, 2 * plan.inner)


class Stft(nn.Module):
    """Packed spectrogram of the windowed, non-centred frames of a signal.

    ``forward``: signal ``[N, n_samples]`` float32 -> ``[N, packed_rows, n_frames]`` float32, the
    same values as ``torch.stft(signal, n_fft, hop, window=hann, center=False)``.
    """

    def __init__(self, plan: StftPlan) -> None:
        super().__init__()
        self.plan = plan
        window = hann_window(plan.n_fft).reshape(plan.outer, plan.inner).T  # [b, a]
        residues = residue_matrix(plan)[None] * window[:, None, :]
        real_rows, imag_rows = plan.natural_rows()
        self.residues: Tensor
        self.bins: Tensor
        self.real_rows: Tensor
        self.imag_rows: Tensor
        self.register_buffer("residues", _float32(residues), persistent=False)
        self.register_buffer("bins", _float32(bin_matrix(plan)), persistent=False)
        self.register_buffer("real_rows", torch.from_numpy(real_rows), persistent=False)
        self.register_buffer("imag_rows", torch.from_numpy(imag_rows), persistent=False)

    def forward(self, signal: Tensor) -> Tensor:
        """``[N, n_samples]`` -> ``[N, packed_rows, n_frames]``."""
        p = self.plan
        a_per_hop = p.hop // p.inner
        # Transposed and permuted as rows of `hop` samples: a frame holds every sample
        # hops_per_frame times, so later would be that much dearer.
        hops = signal.reshape(-1, p.n_hops, p.hop).transpose(1, 2)
        hops = hops.reshape(-1, a_per_hop, p.inner, p.n_hops).transpose(1, 2)
        frames = torch.cat(
            [hops[..., r : r + p.n_frames] for r in range(p.hops_per_frame)], dim=2
        )  # [N, b, a, frame]
        slots = torch.matmul(self.residues, frames)  # [N, b, (slot, 2), frame]
        slots = slots.reshape(-1, p.inner, p.outer // 2, 2 * p.n_frames).transpose(1, 2)
        slots = slots.reshape(-1, p.outer // 2, 2 * p.inner, p.n_frames)
        return torch.matmul(self.bins, slots).reshape(-1, p.packed_rows, p.n_frames)

    def real(self, packed: Tensor) -> Tensor:
        """Real parts in natural order: ``[N, packed_rows, T]`` -> ``[N, n_bins, T]``."""
        return torch.index_select(packed, 1, self.real_rows)

    def imag(self, packed: Tensor) -> Tensor:
        """Imaginary parts in natural order: ``[N, packed_rows, T]`` -> ``[N, n_bins, T]``."""
        return torch.index_select(packed, 1, self.imag_rows)


class InverseStft(nn.Module):
    """Windowed overlap-add of the inverse FFT of every frame.

    ``forward``: ``[N, packed_rows, n_frames]`` float32 -> ``[N, n_samples]`` float32, equal to
    ``gain * sum_t window * irfft(frame_t)`` with each frame at ``t hop``. There is no division by
    the summed squared window: that is :func:`window_envelope`, and who needs it divides by it.
    Bins at and above ``n_bins`` count as zero.
    """

    def __init__(self, plan: StftPlan, gain: float = 1.0) -> None:
        super().__init__()
        self.plan = plan
        # The transposes of the forward matrices, with the weights of a real inverse DFT: every
        # bin stands for itself and its conjugate, DC and Nyquist only for themselves.
        bins = plan.slot_bins()
        weight = np.where((bins == 0) | (2 * bins == plan.n_fft), 1.0, 2.0) * gain / plan.n_fft
        weighted = bin_matrix(plan) * np.tile(weight, (1, 2))[:, :, None]
        window = hann_window(plan.n_fft).reshape(plan.outer, plan.inner).T  # [b, a]
        residues = residue_matrix(plan).T[None] * window[:, :, None]
        # Where [real, imaginary] in natural order holds each packed row; rows that are not wanted
        # have zero weight here, so any value may stand there.
        wanted = np.maximum(bins, 0)
        pack_rows = np.stack([wanted, wanted + plan.n_bins], axis=1).reshape(-1)
        self.bins: Tensor
        self.residues: Tensor
        self.pack_rows: Tensor
        self.register_buffer("bins", _float32(weighted.transpose(0, 2, 1)), persistent=False)
        self.register_buffer("residues", _float32(residues), persistent=False)
        self.register_buffer("pack_rows", torch.from_numpy(pack_rows), persistent=False)

    def forward(self, packed: Tensor) -> Tensor:
        """``[N, packed_rows, n_frames]`` -> ``[N, n_samples]``."""
        p = self.plan
        a_per_hop = p.hop // p.inner
        spectrum = packed.reshape(-1, p.outer // 2, 4 * p.columns, p.n_frames)
        slots = torch.matmul(self.bins, spectrum)  # [N, slot, (b, 2), frame]
        slots = slots.reshape(-1, p.outer // 2, p.inner, 2 * p.n_frames).transpose(1, 2)
        slots = slots.reshape(-1, p.inner, p.outer, p.n_frames)
        frames = torch.matmul(self.residues, slots)  # [N, b, a, frame]
        hops = overlap_add(
            [frames[:, :, r * a_per_hop : (r + 1) * a_per_hop] for r in range(p.hops_per_frame)]
        )  # [N, b, a of one hop, hop]
        hops = hops.transpose(1, 2).reshape(-1, p.hop, p.n_hops)
        return hops.transpose(1, 2).reshape(-1, p.n_samples)

    def pack(self, real: Tensor, imag: Tensor) -> Tensor:
        """Natural order to packed: 2 x ``[N, n_bins, T]`` -> ``[N, packed_rows, T]``."""
        return torch.index_select(torch.cat([real, imag], dim=1), 1, self.pack_rows)


class PackedMask(nn.Module):
    """Multiplication of a packed spectrogram by one real factor per bin.

    ``order`` ``[n_bins]`` tells which bin each row of the factors belongs to, natural order if it
    is left out: a network may deliver its bins in any fixed order at no cost.
    ``forward``: ``[N, packed_rows, T]``, ``[N, n_bins, T]`` -> ``[N, packed_rows, T]``, float32.
    """

    def __init__(self, plan: StftPlan, order: _Int64Array | None = None) -> None:
        super().__init__()
        self.plan = plan
        row_of_bin = np.arange(plan.n_bins) if order is None else np.argsort(order)
        # A bin that is not wanted is given any factor: the inverse takes no notice of it.
        rows = row_of_bin[np.maximum(plan.slot_bins(), 0)].reshape(-1)
        self.rows: Tensor
        self.register_buffer("rows", torch.from_numpy(rows.astype(np.int64)), persistent=False)

    def forward(self, packed: Tensor, factors: Tensor) -> Tensor:
        """``[N, packed_rows, T]``, ``[N, n_bins, T]`` -> ``[N, packed_rows, T]``."""
        p = self.plan
        # Real and imaginary parts share one factor, by broadcasting over the axis of size 2.
        shared = torch.index_select(factors, 1, self.rows)
        shared = shared.reshape(-1, p.outer // 2, 1, 2 * p.columns * p.n_frames)
        parts = packed.reshape(-1, p.outer // 2, 2, 2 * p.columns * p.n_frames)
        return (parts * shared).reshape(-1, p.packed_rows, p.n_frames)


def overlap_add(parts: list[Tensor]) -> Tensor:
    """Sum of the parts, part ``r`` delayed by ``r``: R x ``[…, T]`` -> ``[…, T + R - 1]``."""
    last = len(parts) - 1
    total = F.pad(parts[0], (0, last))
    for delay, part in enumerate(parts[1:], start=1):
        total = total + F.pad(part, (delay, last - delay))
    return total


def window_envelope(plan: StftPlan) -> _Float64Array:
    """Sum of the squared windows of all frames at every sample, ``[n_samples]`` float64."""
    envelope = np.zeros(plan.n_samples)
    for frame in range(plan.n_frames):
        start = frame * plan.hop
        envelope[start : start + plan.n_fft] += hann_window(plan.n_fft) ** 2
    return envelope


def _float32(values: _Float64Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
