"""The catalogue of known models, ``catalog.toml``, as typed entries."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any, Final

from stemserve.errors import UnknownModelError
from stemserve.spec import CommercialUse, Domain, Normalization, Precision, Window, WireDtype

# Key of a model's file where one holds all stems.
SINGLE_FILE: Final = "model"


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """A published file and what it must be.

    Attributes:
        source: URI (``pypi:``, ``https:``, ``file:``).
        sha256: hex digest, or None if it is not known in full.
        size: bytes, or None if unknown.
        sha256_prefix: leading digits of the digest where only they are published, else empty.
    """

    source: str
    sha256: str | None = None
    size: int | None = None
    sha256_prefix: str = ""


@dataclass(frozen=True, slots=True)
class Scores:
    """Published separation quality.

    Attributes:
        metric: what was measured, on what.
        source: where it is published.
        stems: stem -> dB.
    """

    metric: str
    source: str
    stems: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One model of the catalogue; fields as in :class:`stemserve.spec.ModelSpec`.

    Attributes:
        files: what the weights are read from: one file, or one per stem.
        members: stem -> member of an archive with its weights, where the format has such.
        licence_source: where the licence of the weights is stated.
        scores: as published, None if nothing is.
        specialists: whether every stem has a network of its own, served as a model of its own.
    """

    name: str
    version: int
    family: str
    domain: Domain
    stems: tuple[str, ...]
    sample_rate: int
    overlap: float
    window: Window
    normalization: Normalization
    max_batch_size: int
    files: Mapping[str, PinnedFile]
    licence: str
    licence_source: str
    commercial_use: CommercialUse
    training_data: str
    members: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    scores: Scores | None = None
    specialists: bool = False
    precision: Precision = "fp32"
    wire_dtype: WireDtype = "fp32"

    def parts(self) -> tuple[CatalogEntry, ...]:
        """Return the entries of the specialists, one per stem; none for a whole model."""
        if not self.specialists:
            return ()
        return tuple(
            replace(
                self,
                name=f"{self.name}_{stem}",
                stems=(stem,),
                files={SINGLE_FILE: self.files[stem]},
                scores=None,
                specialists=False,
            )
            for stem in self.stems
        )

    def served_entries(self) -> tuple[CatalogEntry, ...]:
        """Return every entry that becomes a folder of the repository: the parts, then itself."""
        return (*self.parts(), self)


@dataclass(frozen=True, slots=True)
class Song:
    """A song for demonstrations, inside a published archive."""

    archive: PinnedFile
    member: str
    member_sha256: str


def load_catalog() -> dict[str, CatalogEntry]:
    """Return all models by name."""
    return {name: _entry(name, table) for name, table in _read()["models"].items()}


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
    table = dict(_read()["songs"][name])
    member, digest = table.pop("member"), table.pop("member_sha256")
    return Song(PinnedFile(**table), member, digest)


@cache
def _read() -> dict[str, Any]:
    return tomllib.loads((files("stemserve_export") / "catalog.toml").read_text(encoding="utf-8"))


def _entry(name: str, table: Mapping[str, Any]) -> CatalogEntry:
    converted: dict[str, Any] = {
        "stems": tuple(table["stems"]),
        "files": {key: PinnedFile(**file) for key, file in table["files"].items()},
    }
    if "scores" in table:
        converted["scores"] = Scores(**table["scores"])
    return CatalogEntry(name=name, **{**table, **converted})
