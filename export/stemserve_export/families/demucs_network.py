"""The hybrid U-Net of HDemucs and HTDemucs, and the separator that is exported.

Source: demucs 4.1.0 (MIT), ``forward`` of demucs/hdemucs.py and demucs/htdemucs.py. Spectrogram and
waveform go down two branches of their own. In HDemucs they meet where one bin is left, and go on as
one; in HTDemucs a transformer stands between the encoders and the decoders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from stemserve.errors import ExportError
from stemserve_export.families.demucs_architecture import Architecture
from stemserve_export.families.demucs_branches import (
    DecoderBody,
    DecoderUp,
    Encoder,
    StridedConv,
    transposed_kernel,
)
from stemserve_export.families.demucs_layers import Float32, to_half
from stemserve_export.families.demucs_spectrum import (
    CHANNELS,
    PARTS,
    Spectrogram,
    SpectrogramFraming,
    SpectrogramHead,
    inverse_of_ones,
)
from stemserve_export.precision import Precision
from stemserve_export.weights.demucs import Weights

# Makes what stands between encoders and decoders of a network with two branches.
MakeBottleneck = Callable[[Weights, Architecture, "Sizes"], nn.Module]


class Sizes:
    """Positions of every level of the network for one chunk.

    Attributes:
        frames: of the spectrogram.
        bins: from the input to the innermost level, 1 from where the branches merge.
        samples: of the waveform branch, from the input to its innermost level.
        merged: positions in time of the levels from the one on where the branches merge.
    """

    def __init__(self, architecture: Architecture, framing: SpectrogramFraming) -> None:
        self.frames = framing.plan.n_frames
        self.bins = [framing.plan.n_bins]
        self.samples = [framing.chunk]
        self.merged: dict[int, int] = {}
        merging = architecture.merging
        for level in range(architecture.depth):
            if merging is not None and level >= merging:
                before = self.merged.get(level - 1)
                self.merged[level] = self.frames if before is None else -(-before // 2)
            self.bins.append(1 if level in self.merged else self.bins[-1] // 4)
            if merging is None or level <= merging:
                self.samples.append(-(-self.samples[-1] // 4))


class HybridNetwork(nn.Module):
    """Standardized spectrogram and waveform to those of the stems.

    ``forward``: ``[B, 4, n_bins, n_frames]``, ``[B, 2, chunk]``, both in the network's precision ->
    2 x ``[B, n_stems, 2, chunk]`` float32: what the spectrogram branch and what the waveform branch
    say, both as waveforms. ``stems`` are those of the checkpoint that are computed, in order.
    """

    def __init__(
        self,
        weights: Weights,
        architecture: Architecture,
        framing: SpectrogramFraming,
        stems: Sequence[int],
        make_bottleneck: MakeBottleneck | None,
    ) -> None:
        super().__init__()
        sizes = Sizes(architecture, framing)
        depth, merging = architecture.depth, architecture.merging
        self.depth = depth
        self.branched = depth if merging is None else merging + 1
        self.merging = merging
        self.n_stems = len(stems)
        spectral = [
            architecture.spectral(level, sizes.merged.get(level, sizes.bins[level + 1]))
            for level in range(depth)
        ]
        waveform = [
            architecture.waveform(level, sizes.samples[level + 1]) for level in range(self.branched)
        ]
        self.encoder = nn.ModuleList(
            Encoder(weights.at(f"encoder.{level}"), shape) for level, shape in enumerate(spectral)
        )
        self.time_encoder = nn.ModuleList(
            (StridedConv if level == merging else Encoder)(weights.at(f"tencoder.{level}"), shape)
            for level, shape in enumerate(waveform)
        )
        self.embedding: Tensor
        self.register_buffer("embedding", _bin_embedding(weights, architecture, sizes))
        self.bottleneck = make_bottleneck(weights, architecture, sizes) if make_bottleneck else None
        # The outermost level's outputs are the stems.
        n_sources = len(architecture.sources)
        spectral[0] = replace(spectral[0], inputs=n_sources * CHANNELS * PARTS)
        waveform[0] = replace(waveform[0], inputs=n_sources * CHANNELS)
        self.body = nn.ModuleList()
        self.up = nn.ModuleList()
        for level in range(depth - 1, -1, -1):
            below = weights.at(f"decoder.{depth - 1 - level}")
            self.body.append(DecoderBody(below, spectral[level]))
            if level:
                length = sizes.merged.get(level - 1, sizes.bins[level])
                self.up.append(DecoderUp(below, spectral[level], length))
            else:
                kernel = transposed_kernel(below, spectral[0], _picked(stems, CHANNELS * PARTS))
                self.up.append(SpectrogramHead(*kernel, spectral[0].stride, framing))
        self.time_body = nn.ModuleList()
        self.time_up = nn.ModuleList()
        for level in range(self.branched - 1, -1, -1):
            below = weights.at(f"tdecoder.{self.branched - 1 - level}")
            if level != merging:
                self.time_body.append(DecoderBody(below, waveform[level]))
            picked = None if level else _picked(stems, CHANNELS)
            self.time_up.append(DecoderUp(below, waveform[level], sizes.samples[level], picked))

    def forward(self, spectrogram: Tensor, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, 4, n_bins, n_frames]``, ``[B, 2, chunk]`` -> 2 x ``[B, n_stems, 2, chunk]``."""
        samples = waveform.shape[2]
        x, time = spectrogram, waveform[:, :, None]
        skips: list[Tensor] = []
        time_skips: list[Tensor] = []
        for level, encode in enumerate(self.encoder):
            inject = None
            if level < self.branched:
                time = self.time_encoder[level](time)
                if level == self.merging:
                    inject = time
                else:
                    time_skips.append(time)
            x = encode(x, inject)
            if level == 0:
                x = x + self.embedding
            skips.append(x)
        inner: Tensor | None = None
        if self.bottleneck is not None:
            inner, time = self.bottleneck(x, time)
        time_bodies = iter(self.time_body)
        for index, (body, up) in enumerate(zip(self.body, self.up, strict=True)):
            level = self.depth - 1 - index
            outer = body(inner, skips.pop())
            if level == self.merging:
                time = outer
            elif level < self.branched:
                time = next(time_bodies)(time, time_skips.pop())
            if level < self.branched:
                time = self.time_up[self.branched - 1 - level](time)
            inner = up(outer)
        assert inner is not None
        return inner, time.float().reshape(-1, self.n_stems, CHANNELS, samples)


class HybridSeparator(nn.Module):
    """Mixture to stems, one chunk at a time: the graph that is exported.

    ``forward``: mixture ``[B, 2, chunk]`` float32 -> one ``[B, 2, chunk]`` float32 per stem.
    """

    def __init__(self, network: HybridNetwork, framing: SpectrogramFraming) -> None:
        super().__init__()
        self.network = network
        self.spectrogram = Spectrogram(framing)
        self.standardize = Standardize()
        ones = torch.from_numpy(inverse_of_ones(framing)).float()
        self.ones: Tensor
        self.register_buffer("ones", ones)

    def forward(self, mixture: Tensor) -> tuple[Tensor, ...]:
        """``[B, 2, chunk]`` -> n_stems x ``[B, 2, chunk]``."""
        dtype = self.network.embedding.dtype
        spectrogram, mean, std = self.standardize(self.spectrogram(mixture))
        waveform, time_mean, time_std = self.standardize(mixture)
        x, time = self.network(spectrogram.to(dtype), waveform.to(dtype))
        # The inverse STFT is linear: mean and deviation are undone on its output, which has a
        # quarter of the values.
        offset = self.ones * mean + time_mean[:, None]
        stems = x * std + time * time_std[:, None] + offset
        return tuple(stems[:, index] for index in range(self.network.n_stems))


class Standardize(Float32):
    """Mean and unbiased deviation over all but the first axis, as the published code takes them.

    ``forward``: ``[B, …]`` float32 -> the standardized tensor, the mean and the deviation (both
    with axes of size 1).
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, …]`` -> ``[B, …]``, ``[B, 1, …]``, ``[B, 1, …]``."""
        count = x.shape[1:].numel()
        mean = _mean(x)
        centred = x - mean
        # torch.std is unbiased.
        std = torch.sqrt(_mean(centred * centred) * (count / (count - 1)))
        return centred / (std + 1e-5), mean, std


def _mean(x: Tensor) -> Tensor:
    # One axis at a time: ONNX Runtime's ReduceMean has fast loops for that.
    for axis in range(x.dim() - 1, 0, -1):
        x = x.mean(dim=axis, keepdim=True)
    return x


def separator(
    weights: Weights,
    architecture: Architecture,
    chunk: int,
    stems: Sequence[str],
    precision: Precision,
    make_bottleneck: MakeBottleneck | None = None,
) -> HybridSeparator:
    """Build the separator of one chunk; raises CheckpointError if a tensor does not fit."""
    framing = SpectrogramFraming(chunk, architecture.n_fft)
    picked = [architecture.sources.index(stem) for stem in stems]
    network = HybridNetwork(weights, architecture, framing, picked, make_bottleneck)
    weights.check_all_taken()
    if precision == "fp16":
        to_half(network)
    return HybridSeparator(network, framing).eval()


def _picked(stems: Sequence[int], channels: int) -> list[int]:
    return [stem * channels + channel for stem in stems for channel in range(channels)]


def _bin_embedding(weights: Weights, architecture: Architecture, sizes: Sizes) -> Tensor:
    table = weights.take("freq_emb.embedding.weight", (sizes.bins[1], architecture.channels(0)))
    factor = float(architecture.values["emb_scale"]) * float(architecture.values["freq_emb"])
    return (table * factor).T[None, :, :, None].contiguous()


def segment_seconds(text: str) -> Fraction:
    """Value of the option ``segment_seconds``: a whole number or a fraction like 39/5.

    Raises:
        ExportError: it is none, or is out of range.
    """
    try:
        seconds = Fraction(text) if len(text) <= 12 else Fraction(0)
    except (ValueError, ZeroDivisionError):
        seconds = Fraction(0)
    if not Fraction(1, 2) <= seconds <= 60:
        raise ExportError(
            f"segment_seconds must be a number of seconds from 1/2 to 60, like 11 or 39/5; it is "
            f"'{text}'."
        )
    return seconds
