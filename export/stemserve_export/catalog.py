"""The catalogue of known models, ``catalog.toml``, as typed entries."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from stemserve.errors import UnknownModelError


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """A published file and what it must be.

    Attributes:
        source: URI (``pypi:``, ``https:``, ``file:``).
        sha256: hex digest, or None for a file that a user brings.
        size: bytes, or None if unknown.
    """

    source: str
    sha256: str | None
    size: int | None


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One model of the catalogue; fields as in :class:`stemserve.spec.ModelSpec`."""

    name: str
    version: int
    family: str
    domain: str
    stems: tuple[str, ...]
    sample_rate: int
    overlap: float
    window: str
    normalization: str
    wire_dtype: str
    max_batch_size: int
    checkpoint: PinnedFile
    members: Mapping[str, str]
    licence: str
    commercial_use: bool
    training_data: str
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Song:
    """A song for demonstrations, inside a published archive."""

    archive: PinnedFile
    member: str
    member_sha256: str


def _read() -> dict[str, Any]:
    return tomllib.loads((files("stemserve_export") / "catalog.toml").read_text(encoding="utf-8"))


def load_catalog() -> dict[str, CatalogEntry]:
    """Return all models by name."""
    entries = {}
    for name, table in _read()["models"].items():
        checkpoint = table["checkpoint"]
        entries[name] = CatalogEntry(
            name=name,
            stems=tuple(table["stems"]),
            checkpoint=_pinned(checkpoint),
            members=checkpoint["members"],
            licence=checkpoint["licence"],
            commercial_use=checkpoint["commercial_use"],
            training_data=checkpoint["training_data"],
            options=table.get("options", {}),
            **{
                key: table[key]
                for key in (
                    "version", "family", "domain", "sample_rate", "overlap", "window",
                    "normalization", "wire_dtype", "max_batch_size",
                )
            },
        )  # fmt: skip
    return entries


def find_model(name: str) -> CatalogEntry:
    """Return a model of the catalogue; raises UnknownModelError with what there is."""
    catalog = load_catalog()
    if name not in catalog:
        raise UnknownModelError(
            f"The catalogue has no model '{name}'; it has {', '.join(sorted(catalog))} (see "
            "`stemserve export --list`)."
        )
    return catalog[name]


def find_song(name: str) -> Song:
    """Return a song of the catalogue."""
    table = _read()["songs"][name]
    return Song(_pinned(table), table["member"], table["member_sha256"])


def _pinned(table: Mapping[str, Any]) -> PinnedFile:
    return PinnedFile(table["source"], table["sha256"], table["size"])
