"""Numeric precision of a graph's core."""

from __future__ import annotations

from typing import Final

from stemserve.spec import Precision

__all__ = ["ARTEFACT_SUFFIX", "Precision"]

# What the name of an artefact of that precision ends in.
ARTEFACT_SUFFIX: Final[dict[Precision, str]] = {"fp32": "", "fp16": "_fp16"}
