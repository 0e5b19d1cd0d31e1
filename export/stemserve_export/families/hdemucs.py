"""HDemucs: hybrid separation in two branches that merge, with LSTMs and local attention inside.

Source: github.com/adefossez/demucs 4.1.0 (MIT), demucs/hdemucs.py; Defossez, "Hybrid Spectrogram
and Waveform Source Separation", ISMIR 2021 workshop on music source separation.

**Framing.** The network takes any length. The published bag says segments of 44 s, which bounds
memory and is no property of the network: such a chunk is 16 MB of mixture and 62 MB of stems,
gigabytes inside the network per entry of a batch, and nothing is answered before all of it is done.
The default here is 11 s, a quarter: its 474 frames hold more than two of the spans of 200 that the
LSTMs look at, and local attention decays with distance; what sees less of the track are the
statistics of the group normalisations. ``segment_seconds=44`` builds the published length. Parity
is with ``demucs --segment`` of the same value; the published code runs its last chunk at its true
length, where ours is centred in a full one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torch import nn

from stemserve_export.catalog import SINGLE_FILE
from stemserve_export.families import Framing
from stemserve_export.families.demucs_architecture import architecture
from stemserve_export.families.demucs_network import segment_seconds, separator
from stemserve_export.weights.demucs import Weights, read_checkpoint

if TYPE_CHECKING:
    from stemserve_export.catalog import CatalogEntry
    from stemserve_export.precision import Precision

SAMPLE_RATE: Final = 44100
DEFAULT_SEGMENT: Final = "11"


def framing(options: Mapping[str, str]) -> Framing:
    """Return the framing; the option ``segment_seconds`` is the length of a chunk.

    Raises:
        ExportError: ``segment_seconds`` is no number of seconds in range.
    """
    seconds = segment_seconds(options.get("segment_seconds", DEFAULT_SEGMENT))
    return Framing(int(seconds * SAMPLE_RATE), tail="centred")


def build(
    entry: CatalogEntry, files: Mapping[str, Path], precision: Precision = "fp32"
) -> nn.Module:
    """Build the separator from a published checkpoint; see :class:`families.Family`.

    Raises:
        CheckpointError: the file is damaged, or of another network.
        ExportError: ``segment_seconds`` is no number of seconds in range.
    """
    chunk = framing(entry.options).chunk_samples
    checkpoint = read_checkpoint(files[SINGLE_FILE])
    network = architecture(checkpoint, "HDemucs", entry.stems, entry.sample_rate)
    weights = Weights(checkpoint.tensors, checkpoint.what)
    return separator(weights, network, chunk, entry.stems, precision)
