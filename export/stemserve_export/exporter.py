"""Catalogue entry + checkpoint -> model repository: idempotent and atomic."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from stemserve.errors import CheckpointError, ExportError
from stemserve.repository import CONFIG_NAME, MODEL_FILE
from stemserve.spec import Checkpoint, ModelSpec
from stemserve_export.catalog import CatalogEntry, PinnedFile
from stemserve_export.checkpoints import Report, fetch, sha256_of
from stemserve_export.triton_config import config_text

RECORD_NAME: Final = "export.json"


@dataclass(frozen=True, slots=True)
class Exported:
    """An artefact in the repository.

    Attributes:
        path: the graph's file.
        built: whether it was built now, or found up to date.
        record: content of ``export.json`` beside it.
    """

    path: Path
    built: bool
    record: Mapping[str, Any]


def model_spec(entry: CatalogEntry, checkpoint_sha256: str | None = None) -> ModelSpec:
    """Return the spec of a catalogue entry, framed by its family.

    Args:
        entry: the catalogue's row, its options as they are wanted.
        checkpoint_sha256: digest of the file that is used; the pinned one if None.
    """
    family = _family(entry)
    chunk_samples, edge_samples, lead_samples = family.framing(entry.options)
    return ModelSpec(
        name=entry.name,
        version=entry.version,
        family=entry.family,
        domain=entry.domain,  # type: ignore[arg-type]  # ModelSpec checks it
        stems=entry.stems,
        sample_rate=entry.sample_rate,
        channels=2,
        chunk_samples=chunk_samples,
        edge_samples=edge_samples,
        lead_samples=lead_samples,
        overlap=entry.overlap,
        window=entry.window,  # type: ignore[arg-type]
        normalization=entry.normalization,  # type: ignore[arg-type]
        wire_dtype=entry.wire_dtype,  # type: ignore[arg-type]
        max_batch_size=entry.max_batch_size,
        checkpoint=Checkpoint(
            source=entry.checkpoint.source,
            sha256=checkpoint_sha256 or entry.checkpoint.sha256 or "",
            licence=entry.licence,
            training_data=entry.training_data,
        ),
        options=dict(entry.options),
    )


def with_options(entry: CatalogEntry, options: Mapping[str, str]) -> CatalogEntry:
    """Return the entry with other choices; raises ExportError for one that it does not have."""
    for name in options:
        if name not in entry.options:
            known = ", ".join(entry.options) or "none"
            raise ExportError(f"Model '{entry.name}' has no option '{name}'; it has {known}.")
    return replace(entry, options={**entry.options, **options})


def with_checkpoint(entry: CatalogEntry, uri: str) -> CatalogEntry:
    """Return the entry with a checkpoint of the user's instead of the pinned one."""
    if uri == entry.checkpoint.source:
        return entry
    return replace(
        entry,
        checkpoint=PinnedFile(uri, None, None),
        licence="unknown",
        training_data="unknown",
    )


def export_model(
    entry: CatalogEntry, repository: Path, *, cache: Path | None = None, report: Report = print
) -> Exported:
    """Build a model's graph and configuration in a repository.

    Nothing is done if the artefact there was built from the same checkpoint, spec and exporter.
    Until the last step everything happens in a hidden folder: an export that is interrupted
    leaves the repository as it was.

    Raises:
        DownloadError, DigestMismatchError, CheckpointError, ExportError: see each.
    """
    checkpoint = fetch(entry.checkpoint, cache=cache, report=report)
    digest = entry.checkpoint.sha256 or sha256_of(checkpoint)
    spec = model_spec(entry, digest)
    recipe = _recipe(spec)
    folder = repository / spec.name
    target = folder / str(spec.version)
    found = _up_to_date(folder, target, spec, recipe)
    if found is not None:
        return Exported(target / MODEL_FILE, False, found)

    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _staging(folder) as staging:
            artefact = staging / "artefact"
            artefact.mkdir()
            record = _build(entry, spec, checkpoint, artefact / MODEL_FILE, report)
            record["recipe"] = recipe
            (artefact / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")
            (staging / CONFIG_NAME).write_text(config_text(spec), encoding="utf-8")
            _commit(staging, artefact, target)
    except BaseException as error:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise ExportError(
                f"The repository '{repository}' cannot be written to ({error.strerror}); choose "
                "another with --repository."
            ) from None
        raise
    return Exported(target / MODEL_FILE, True, record)


def _build(
    entry: CatalogEntry, spec: ModelSpec, checkpoint: Path, path: Path, report: Report
) -> dict[str, Any]:
    from stemserve_export.onnx_graph import export_graph
    from stemserve_export.verify import graph_parity_db

    report(f"Exporting {spec.name} (version {spec.version})")
    try:
        module = _family(entry).load(checkpoint, entry.members, entry.stems, entry.options)
    except OSError as error:  # ours to write to is the repository only
        raise CheckpointError(
            f"The checkpoint '{checkpoint}' of '{spec.name}' cannot be read ({error})."
        ) from None
    model = export_graph(module, spec, path)
    parity_db = graph_parity_db(module, spec, path)
    if parity_db is not None:
        worst = min(parity_db.values())
        report(f"Graph against PyTorch: {worst:.0f} dB or better per stem")
    return {
        "stemserve": version("stemserve"),
        "torch": version("torch"),
        "onnx": version("onnx"),
        "nodes": len(model.graph.node),
        "opset": model.opset_import[0].version,
        "ir_version": model.ir_version,
        "graph_sha256": sha256_of(path),
        "parity_db": parity_db,
        "spec": spec.to_parameters(),
    }


def _family(entry: CatalogEntry) -> Any:
    return importlib.import_module(f"stemserve_export.families.{entry.family}")


def _recipe(spec: ModelSpec) -> str:
    """Digest of everything that the artefact follows from: spec, checkpoint, exporter's code."""
    digest = hashlib.sha256()
    digest.update(
        json.dumps([spec.name, spec.tensor_dims, spec.stems, spec.to_parameters()]).encode()
    )
    package = files("stemserve_export")
    family = sorted(
        (file for file in (package / "families").iterdir() if file.name.startswith(spec.family)),
        key=lambda file: file.name,
    )
    for file in (package / "spectral.py", package / "onnx_graph.py", *family):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _up_to_date(folder: Path, target: Path, spec: ModelSpec, recipe: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((target / RECORD_NAME).read_text())
        if (
            record["recipe"] == recipe
            and record["graph_sha256"] == sha256_of(target / MODEL_FILE)
            and (folder / CONFIG_NAME).read_text(encoding="utf-8") == config_text(spec)
        ):
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    # Inside the model's folder: the same file system, and no model of its own to Triton.
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _commit(staging: Path, artefact: Path, target: Path) -> None:
    """Move a finished artefact into place; signals wait until that is done."""
    blocked = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        replaced = staging / "replaced"
        if target.exists():
            target.rename(replaced)
        try:
            artefact.rename(target)
            (staging / CONFIG_NAME).replace(target.parent / CONFIG_NAME)
        except OSError:
            if target.exists():
                target.rename(artefact)
            if replaced.exists():
                replaced.rename(target)
            raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
