"""HTDemucs: hybrid separation with a transformer between encoders and decoders.

Source: github.com/adefossez/demucs 4.1.0 (MIT), demucs/htdemucs.py; Rouard, Massa, Defossez,
"Hybrid Transformers for Music Source Separation", ICASSP 2023.

**Framing.** The published code always runs the segment that the network was trained on (7.8 s), and
centres a shorter last chunk in it, with what really precedes it in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torch import Tensor, nn

from stemserve.errors import CheckpointError
from stemserve_export.catalog import SINGLE_FILE
from stemserve_export.families import Framing
from stemserve_export.families.demucs_architecture import Architecture, architecture
from stemserve_export.families.demucs_layers import linear
from stemserve_export.families.demucs_network import Sizes, segment_seconds, separator
from stemserve_export.families.htdemucs_transformer import (
    CrossTransformer,
    TransformerShape,
    plane_positions,
    time_positions,
)
from stemserve_export.weights.demucs import Weights, read_checkpoint

if TYPE_CHECKING:
    from stemserve_export.catalog import CatalogEntry
    from stemserve_export.precision import Precision

SAMPLE_RATE: Final = 44100
# Of the published checkpoints; a network that was trained on another needs the option.
PUBLISHED_SEGMENT: Final = "39/5"


def framing(options: Mapping[str, str]) -> Framing:
    """Return the framing; the option ``segment_seconds`` is that of the checkpoint.

    Raises:
        ExportError: ``segment_seconds`` is no number of seconds in range.
    """
    return Framing(int(_segment(options) * SAMPLE_RATE), tail="centred")


def build(
    entry: CatalogEntry, files: Mapping[str, Path], precision: Precision = "fp32"
) -> nn.Module:
    """Build the separator from a published checkpoint; see :class:`families.Family`.

    Only the stems of the entry are computed: the last layers of the others are left out.

    Raises:
        CheckpointError: the file is damaged, of another network, or was trained on another
            segment than the option says.
        ExportError: ``segment_seconds`` is no number of seconds in range.
    """
    segment = _segment(entry.options)
    checkpoint = read_checkpoint(files[SINGLE_FILE])
    network = architecture(checkpoint, "HTDemucs", entry.stems, entry.sample_rate)
    if network.segment != segment:
        raise CheckpointError(
            f"'{checkpoint.what}' was trained on segments of {network.segment} s, and runs on no "
            f"others; the option segment_seconds is {segment}. Export with "
            f"--option segment_seconds={network.segment}."
        )
    weights = Weights(checkpoint.tensors, checkpoint.what)
    chunk = framing(entry.options).chunk_samples
    return separator(weights, network, chunk, entry.stems, precision, Bottleneck)


def _segment(options: Mapping[str, str]) -> Fraction:
    return segment_seconds(options.get("segment_seconds", PUBLISHED_SEGMENT))


class Bottleneck(nn.Module):
    """Cross-domain transformer with a change of width before and after, where there is one.

    ``forward``: ``[B, C, bins, n_frames]``, ``[B, C, 1, samples]`` -> the same shapes and dtype.
    """

    def __init__(self, weights: Weights, network: Architecture, sizes: Sizes) -> None:
        super().__init__()
        values = network.values
        channels = network.channels(network.depth - 1)
        width = int(values["bottom_channels"]) or channels
        if width % 4 or width % values["t_heads"]:
            raise CheckpointError(
                f"A transformer of width {width} and {values['t_heads']} heads cannot be built; "
                "the width must be a multiple of both 4 and the heads."
            )
        shape = TransformerShape(
            width=width,
            heads=values["t_heads"],
            hidden=int(width * values["t_hidden_scale"]),
            layers=values["t_layers"],
            cross_first=values["t_cross_first"],
        )
        bins, samples, period = sizes.bins[-1], sizes.samples[-1], float(values["t_max_period"])
        weight = float(values["t_weight_pos_embed"])
        self.transformer = CrossTransformer(
            weights.at("crosstransformer"),
            shape,
            (
                plane_positions(bins, sizes.frames, width, period) * weight,
                time_positions(samples, width, period) * weight,
            ),
        )
        self.wider = nn.ModuleList()
        self.narrower = nn.ModuleList()
        if values["bottom_channels"]:
            for branch in ("", "_t"):
                up = weights.at(f"channel_upsampler{branch}")
                down = weights.at(f"channel_downsampler{branch}")
                self.wider.append(_pointwise(up, channels, width))
                self.narrower.append(_pointwise(down, width, channels))

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, C, bins, n_frames]``, ``[B, C, 1, samples]`` -> the same."""
        branches = [x, time]
        tokens = [
            branch.flatten(2).transpose(1, 2).reshape(-1, branch.shape[1]) for branch in branches
        ]
        if self.wider:
            tokens = [layer(rows) for layer, rows in zip(self.wider, tokens, strict=True)]
        tokens = list(self.transformer(tokens[0].float(), tokens[1].float()))
        tokens = [rows.to(x.dtype) for rows in tokens]
        if self.narrower:
            tokens = [layer(rows) for layer, rows in zip(self.narrower, tokens, strict=True)]
        outputs = []
        for rows, branch in zip(tokens, branches, strict=True):
            channels, height, width = branch.shape[1:]
            columns = rows.reshape(-1, height * width, channels).transpose(1, 2)
            outputs.append(columns.reshape(-1, channels, height, width))
        return outputs[0], outputs[1]


def _pointwise(weights: Weights, inputs: int, outputs: int) -> nn.Linear:
    weight = weights.take("weight", (outputs, inputs, 1))[..., 0]
    return linear(weight, weights.take("bias", (outputs,)))
