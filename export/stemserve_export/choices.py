"""What a user may choose about an export: options, precision, wire dtype, name, checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from stemserve.errors import ExportError
from stemserve.spec import Precision, WireDtype
from stemserve_export.catalog import SINGLE_FILE, CatalogEntry, PinnedFile
from stemserve_export.precision import ARTEFACT_SUFFIX

_SUFFIXES: Final = (".pth", ".th", ".safetensors", ".tar.gz")


def with_options(entry: CatalogEntry, options: Mapping[str, str]) -> CatalogEntry:
    """Return the entry with other choices; raises ExportError for one that it does not have."""
    for name in options:
        if name not in entry.options:
            known = ", ".join(entry.options) or "none"
            raise ExportError(f"Model '{entry.name}' has no option '{name}'; it has {known}.")
    return replace(entry, options={**entry.options, **options})


def with_precision(
    entry: CatalogEntry, precision: Precision, wire_dtype: WireDtype = "fp32"
) -> CatalogEntry:
    """Return the entry as an artefact of that precision, named after it (``htdemucs_fp16``)."""
    return replace(
        entry,
        name=entry.name + ARTEFACT_SUFFIX[precision],
        precision=precision,
        wire_dtype=wire_dtype,
    )


def with_name(entry: CatalogEntry, name: str) -> CatalogEntry:
    """Return the entry under another name; raises ExportError for one that is no folder's name."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ExportError(
            f"'{name}' is no name for a model; use letters, digits, '_', '-' and '.', with a "
            "letter or digit first."
        )
    return replace(entry, name=name)


def with_checkpoint(entry: CatalogEntry, choices: Sequence[str]) -> CatalogEntry:
    """Return the entry with checkpoints of the user's instead of the pinned ones.

    Args:
        entry: the catalogue's row.
        choices: a URI each; ``STEM=URI`` for a model with a file per stem, whose other files stay
            the published ones; or one ``file:`` URI of a folder with a file per stem, named by
            the stem (``vocals.pth``, ``vocals-b62c91ce.pth``).

    Raises:
        ExportError: a choice does not fit the model.
    """
    chosen: dict[str, str] = {}
    for choice in choices:
        for key, uri in _named_files(entry, choice).items():
            if key in chosen:
                of = f" of '{key}'" if key != SINGLE_FILE else ""
                raise ExportError(
                    f"The checkpoint{of} for model '{entry.name}' is named twice, as "
                    f"'{chosen[key]}' and '{uri}'; name one."
                )
            if not uri or re.search(r"\s", uri):
                raise ExportError(
                    f"'{uri}' is no URI of a checkpoint; expected one without white space (%20 "
                    "stands for a blank), e.g. file:///folder/model.pth."
                )
            chosen[key] = uri
    changed = {
        key: PinnedFile(uri) for key, uri in chosen.items() if uri != entry.files[key].source
    }
    if not changed:
        return entry
    files = {**entry.files, **changed}
    if set(changed) != set(entry.files):  # what is still published keeps its licence
        forbidden = entry.commercial_use == "forbidden"
        return replace(
            entry,
            files=files,
            licence=f"{entry.licence} and unknown",
            commercial_use="forbidden" if forbidden else "unknown",
            training_data=f"{entry.training_data} and unknown",
            scores=None,
        )
    return replace(
        entry,
        files=files,
        licence="unknown",
        licence_source="",
        commercial_use="unknown",
        training_data="unknown",
        scores=None,
    )


def _named_files(entry: CatalogEntry, choice: str) -> dict[str, str]:
    """Return the URIs that one choice of the user's stands for, by the keys of the files."""
    key, equals, uri = choice.partition("=")
    if equals and key in entry.files:
        return {key: uri}
    if set(entry.files) == {SINGLE_FILE}:
        return {SINGLE_FILE: choice}
    folder = _local_folder(choice)
    if folder is not None:
        return _file_per_stem(entry, folder)
    raise ExportError(
        f"Model '{entry.name}' has a checkpoint per stem; name them as "
        f"{next(iter(entry.files))}=URI, or name a folder that holds them."
    )


def _local_folder(uri: str) -> Path | None:
    path = Path(unquote(urlsplit(uri).path))
    return path if uri.startswith("file:") and path.is_dir() else None


def _file_per_stem(entry: CatalogEntry, folder: Path) -> dict[str, str]:
    found = {}
    for stem in entry.files:
        candidates = [
            path
            for path in sorted(folder.iterdir())
            if path.name.endswith(_SUFFIXES) and path.name.partition(".")[0].split("-")[0] == stem
        ]
        if len(candidates) != 1:
            raise ExportError(
                f"The folder '{folder}' holds {len(candidates)} checkpoints for '{stem}'; expected "
                f"one, named like {stem}.pth. Name the files one by one as {stem}=URI."
            )
        found[stem] = candidates[0].resolve().as_uri()
    return found
