"""Spleeter, 2 to 5 stems: the published networks, and the separator that is exported.

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
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stemserve.errors import ExportError
from stemserve_export.catalog import SINGLE_FILE, CatalogEntry
from stemserve_export.families import Framing
from stemserve_export.families.spleeter_unet import (
    BIN_PHASES,
    CHANNELS,
    LEVELS,
    N_BINS,
    Activation,
    ExportUNet,
    UNet,
    phase_order,
)
from stemserve_export.families.spleeter_weights import load_unets
from stemserve_export.precision import Precision
from stemserve_export.spectral import (
    InverseStft,
    PackedMask,
    Stft,
    StftPlan,
    hann_window,
    window_envelope,
)

MaskExtension = Literal["zeros", "average"]
Output = Literal["sigmoid", "softmax"]

N_FFT = 4096
HOP = 1024
SEGMENT_FRAMES = 512
EDGE_SAMPLES = N_FFT - HOP

WINDOW_COMPENSATION = 2.0 / 3.0
MASK_EPSILON = 1e-10


class SpleeterSeparator(nn.Module):
    """Mixture to stems, one segment at a time: the graph that is exported.

    ``forward``: mixture ``[B, 2, chunk]`` float32 -> one ``[B, 2, chunk]`` per kept U-Net, in the
    order of ``kept``; ``chunk`` is ``(n_frames - 1) * 1024 + 4096`` samples.

    Args:
        unets: one per stem that the model was trained for: all of them share the mixture.
        kept: indices of those whose stems are delivered; all of them if None.
        output: what makes factors of the logits: "sigmoid" for each stem alone, or "softmax" over
            the stems.
        mask_extension: what happens above the networks' bins (11 kHz at 44.1 kHz): "zeros" drops
            them from every stem, as the published configurations say; "average" shares them by
            each frame's mean mask.
        precision: of the U-Nets; everything around them is float32.
        n_frames: of a segment.

    Raises:
        ExportError: there is no such configuration.
    """

    def __init__(
        self,
        unets: Sequence[UNet],
        *,
        mask_extension: MaskExtension,
        output: Output = "sigmoid",
        kept: Sequence[int] | None = None,
        precision: Precision = "fp32",
        n_frames: int = SEGMENT_FRAMES,
    ) -> None:
        super().__init__()
        if len(unets) < 2:
            raise ExportError(f"Spleeter has a U-Net per stem, at least 2; got {len(unets)}.")
        if n_frames < 1 or n_frames % 2**LEVELS:
            raise ExportError(
                f"The U-Net halves the frames {LEVELS} times: n_frames must be a multiple of "
                f"{2**LEVELS} and is {n_frames}. The published segment is {SEGMENT_FRAMES}."
            )
        self.mask_extension = mask_extension
        self.output = output
        self.kept = tuple(range(len(unets)) if kept is None else kept)
        self.plan = StftPlan(N_FFT, HOP, N_BINS, n_frames)
        self.chunk = self.plan.n_samples
        self.unets = nn.ModuleList(ExportUNet(unet, precision) for unet in unets)
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
        # The masks of all stems sum to one and the transforms are linear: if all are kept, the
        # last one is what the others leave of the mixture, which takes no inverse of its own.
        residual = len(masks) == len(self.unets)
        stems = [
            self.masked(signal, spectrogram, mask) for mask in masks[: -1 if residual else None]
        ]
        if residual:
            if self.mask_extension == "average":
                rest = signal * self.envelope
            else:
                rest = self.inverse(spectrogram)
            for stem in stems:
                rest = rest - stem
            stems.append(rest)
        return tuple(stem.reshape(-1, CHANNELS, self.chunk) for stem in stems)

    def masked(self, signal: Tensor, spectrogram: Tensor, mask: Tensor) -> Tensor:
        """One stem: ``[N, chunk]``, its packed spectrogram, ``[N, 1024, T]`` -> ``[N, chunk]``."""
        if self.mask_extension == "zeros":
            stem: Tensor = self.inverse(self.mask(spectrogram, mask))
            return stem
        mean = mask.mean(dim=1, keepdim=True)
        inverse: Tensor = self.inverse(self.mask(spectrogram, mask - mean))
        return inverse + self.scaled_frames(signal, mean)

    def masks(self, spectrogram: Tensor) -> list[Tensor]:
        """Packed spectrogram -> one ``[B x 2, 1024, n_frames]`` per kept stem, in phase order.

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
        negative_logits = [
            unet(magnitude).reshape(-1, N_BINS, self.plan.n_frames) for unet in self.unets
        ]
        factors, scale = self.factors(negative_logits)
        estimates = [factor * factor * by_phase for factor in factors]
        total = _sum(estimates) + scale
        share = scale / len(estimates)
        return [(estimates[index] + share) / total for index in self.kept]

    def factors(self, negative_logits: list[Tensor]) -> tuple[list[Tensor], Tensor | float]:
        """Factors of all stems times a common scale, and the square of that scale."""
        if self.output == "sigmoid":
            # ONNX Runtime's Sigmoid is exact to 1e-7 of 1, not of its value, and the masks are
            # ratios of values that may all be tiny: 60 dB instead of 125 where every stem says no.
            return [torch.reciprocal(1.0 + torch.exp(each)) for each in negative_logits], 1.0
        # exp(z_i - max z) / sum_j exp(z_j - max z); the masks are ratios, so that the division by
        # the sum is left out and the ratio's constants are multiplied instead.
        least = negative_logits[0]
        for each in negative_logits[1:]:
            least = torch.minimum(least, each)
        powers = [torch.exp(least - each) for each in negative_logits]
        total = _sum(powers)
        return powers, total * total

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


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


class _Choices(NamedTuple):
    """The options of an entry, checked."""

    mask_extension: MaskExtension
    activation: Activation
    output: Output

    @classmethod
    def of(cls, options: Mapping[str, str]) -> _Choices:
        """Check the options; raises ExportError for a value that is not known."""
        known = {"mask_extension": MaskExtension, "activation": Activation, "output": Output}
        for name, values in known.items():
            if options.get(name) not in get_args(values):
                raise ExportError(
                    f"{name} must be {' or '.join(map(_quoted, get_args(values)))} and is "
                    f"{_quoted(options.get(name, ''))}."
                )
        return cls(*(options[name] for name in known))  # type: ignore[arg-type]


def _quoted(text: str) -> str:
    return f'"{text}"'


def framing(options: Mapping[str, str]) -> Framing:
    """Return the framing of a published segment.

    The published code puts one frame of zeros in front of a track.

    Raises:
        ExportError: an option has an unknown value.
    """
    _Choices.of(options)  # every variant is framed alike
    return Framing((SEGMENT_FRAMES - 1) * HOP + N_FFT, EDGE_SAMPLES, N_FFT)


def build(
    entry: CatalogEntry, files: Mapping[str, Path], precision: Precision = "fp32"
) -> SpleeterSeparator:
    """Build the separator from published weights.

    Args:
        entry: its options are ``mask_extension``, ``activation`` and ``output`` (see
            :class:`SpleeterSeparator` and :class:`UNet`; they are nowhere in the weights, and with
            a wrong one the stems are garbage) and, for outputs that are a part of what the weights
            offer, ``instruments``: all of them in the checkpoint's order, joined by commas.
        files: ``model``: see :func:`load_unets`.
        precision: of the U-Nets.

    Raises:
        CheckpointError: the file is not what the networks need, or has another number of them.
        ExportError: an option has an unknown value, or a stem is none of the instruments.
    """
    choices = _Choices.of(entry.options)
    instruments = _instruments(entry)
    unets = load_unets(files[SINGLE_FILE], instruments, choices.activation, entry.members)
    return SpleeterSeparator(
        unets,
        mask_extension=choices.mask_extension,
        output=choices.output,
        kept=[instruments.index(stem) for stem in entry.stems],
        precision=precision,
    ).eval()


def _instruments(entry: CatalogEntry) -> tuple[str, ...]:
    """Return all stems that the weights offer, in their order."""
    listed = entry.options.get("instruments")
    instruments = tuple(listed.split(",")) if listed else tuple(entry.members) or entry.stems
    for stem in entry.stems:
        if stem not in instruments:
            raise ExportError(
                f"'{entry.name}' has no stem '{stem}'; it has {', '.join(instruments)}."
            )
    return instruments
