"""One module per family of separators, each with the two functions of :class:`Family`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from stemserve.spec import Precision, Tail

if TYPE_CHECKING:
    from torch import nn

    from stemserve_export.catalog import CatalogEntry


class Framing(NamedTuple):
    """How a track is cut for a family's graphs; fields as in :class:`stemserve.spec.ModelSpec`."""

    chunk_samples: int
    edge_samples: int = 0
    lead_samples: int = 0
    tail: Tail = "padded"


class Family(Protocol):
    """What a family's module provides."""

    def framing(self, options: Mapping[str, str]) -> Framing:
        """Return the framing of the graph that is built with these options.

        Raises:
            ExportError: an option has a value that the family does not know.
        """

    def build(
        self, entry: CatalogEntry, files: Mapping[str, Path], precision: Precision = "fp32"
    ) -> nn.Module:
        """Build the separator from published weights.

        Args:
            entry: the catalogue's row; ``entry.stems`` is the order of the outputs and may be a
                subset of what the weights offer.
            files: local copies of ``entry.files``, by the same keys.
            precision: of the core. Normalisations, softmax, mask ratios and the transforms are
                float32 in any case.

        Returns:
            A module in evaluation mode: mixture [B, channels, chunk_samples] float32 -> a tuple
            of one such per stem.

        Raises:
            CheckpointError: a file is not what the network needs.
            ExportError: an option has a value that the family does not know.
        """
