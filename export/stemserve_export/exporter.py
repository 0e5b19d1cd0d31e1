"""Catalogue entry + checkpoint -> model repository: idempotent and atomic."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from stemserve.errors import CheckpointError, LicenceError
from stemserve.repository import CONFIG_NAME, MODEL_FILE, read_config
from stemserve.spec import Checkpoint, CheckpointFile, ModelSpec
from stemserve_export.catalog import CatalogEntry
from stemserve_export.download import CheckpointLock, Report, fetch, sha256_of
from stemserve_export.families import Family
from stemserve_export.placement import CONFIGS_FOLDER, Exported, place
from stemserve_export.tensorrt.configs import (
    ONNXRUNTIME_TENSORRT_CONFIG,
    config_file_text,
    onnxruntime_tensorrt_config,
)
from stemserve_export.triton_config import config_text


def model_spec(
    entry: CatalogEntry,
    digests: Mapping[str, str] | None = None,
) -> ModelSpec:
    """Return the spec of a catalogue entry, framed by its family.

    Args:
        entry: the catalogue's row, its options, precision and wire dtype as they are wanted.
        digests: sha256 of the files that are used, by ``entry.files``' keys; the pinned ones, or
            where only a prefix is known that prefix filled up with zeros, if None.
    """
    framing = _family(entry).framing(entry.options)
    return ModelSpec(
        name=entry.name,
        version=entry.version,
        family=entry.family,
        domain=entry.domain,
        stems=entry.stems,
        sample_rate=entry.sample_rate,
        channels=2,
        chunk_samples=framing.chunk_samples,
        edge_samples=framing.edge_samples,
        lead_samples=framing.lead_samples,
        tail=framing.tail,
        overlap=entry.overlap,
        window=entry.window,
        normalization=entry.normalization,
        wire_dtype=entry.wire_dtype,
        precision=entry.precision,
        max_batch_size=entry.max_batch_size,
        checkpoint=Checkpoint(
            files=tuple(
                CheckpointFile(
                    file.source,
                    digests[key] if digests else file.sha256 or file.sha256_prefix.ljust(64, "0"),
                )
                for key, file in entry.files.items()
            ),
            licence=entry.licence,
            commercial_use=entry.commercial_use,
            training_data=entry.training_data,
        ),
        options=dict(entry.options),
    )


def export_model(
    entry: CatalogEntry,
    repository: Path,
    *,
    cache: Path | None = None,
    accept_licence: bool = False,
    report: Report = print,
) -> Exported:
    """Build a model's graph and configuration in a repository.

    A model of specialists becomes one folder per specialist and an ensemble that joins them;
    should a later specialist fail, those before it stay, each a model of its own.
    Nothing is done if the artefact there was built from the same checkpoint, spec and exporter.
    Until the last step everything happens in a hidden folder: an export that is interrupted
    leaves the repository as it was.

    Args:
        entry: the catalogue's row, its choices as they are wanted.
        repository: the model repository.
        cache: folder to keep downloads in.
        accept_licence: whether the user agrees to a licence that forbids commercial use.
        report: told what is being done.

    Raises:
        LicenceError: the licence must be accepted first.
        DownloadError, DigestMismatchError, CheckpointError, ExportError: see each.
    """
    if entry.commercial_use == "forbidden" and not accept_licence:
        raise LicenceError(
            f"The weights of '{entry.name}' are licensed for {entry.licence} and not for "
            f"commercial use ({entry.licence_source}). If you agree to that, export with "
            "--accept-licence."
        )
    parts = [_export_one(part, repository, cache, report) for part in entry.parts()]
    if not parts:
        return _export_one(entry, repository, cache, report)
    specs = [ModelSpec.from_config(read_config(repository, p.name)) for p in entry.parts()]
    digests = {
        stem: spec.checkpoint.files[0].sha256 for stem, spec in zip(entry.stems, specs, strict=True)
    }
    spec = model_spec(entry, digests)

    def build(artefact: Path) -> dict[str, Any]:
        del artefact  # an ensemble has no file of its own
        return {"specialists": [part.name for part in specs], "spec": spec.to_parameters()}

    recipe = _recipe(spec)
    return place(repository, spec, {CONFIG_NAME: config_text(spec, specs)}, recipe, build)


def _export_one(
    entry: CatalogEntry, repository: Path, cache: Path | None, report: Report
) -> Exported:
    lock = CheckpointLock(repository)
    files = {
        key: fetch(lock.pinned(file), cache=cache, report=report)
        for key, file in entry.files.items()
    }
    digests = {
        key: lock.pinned(entry.files[key]).sha256 or sha256_of(path) for key, path in files.items()
    }
    spec = model_spec(entry, digests)

    def build(artefact: Path) -> dict[str, Any]:
        return _build(entry, spec, files, artefact / MODEL_FILE, report)

    recipe = _recipe(spec)
    tensorrt = onnxruntime_tensorrt_config(spec, recipe)
    configs = {
        CONFIG_NAME: config_text(spec),
        f"{CONFIGS_FOLDER}/{ONNXRUNTIME_TENSORRT_CONFIG}.pbtxt": config_file_text(
            tensorrt, "stemserve export"
        ),
    }
    done = place(repository, spec, configs, recipe, build)
    for key, file in entry.files.items():
        lock.pin(file, digests[key])
    return done


def _build(
    entry: CatalogEntry, spec: ModelSpec, files: Mapping[str, Path], path: Path, report: Report
) -> dict[str, Any]:
    from stemserve_export.gate.export_check import graph_parity_db
    from stemserve_export.onnx_graph import export_graph

    report(f"Exporting {spec.name} (version {spec.version})")
    try:
        module = _family(entry).build(entry, files, entry.precision)
        # Eager half precision is slow on a CPU, and fp32 is what the artefact stands for.
        exact = module if entry.precision == "fp32" else _family(entry).build(entry, files)
    except OSError as error:  # ours to write to is the repository only
        raise CheckpointError(
            f"The checkpoint of '{spec.name}' cannot be read ({error})."
        ) from None
    model = export_graph(module, spec, path)
    parity_db = graph_parity_db(exact, spec, path)
    if parity_db is not None:
        worst = min(parity_db.values())
        report(f"Graph against PyTorch: {worst:.0f} dB or better per stem")
    return {
        "stemserve": version("stemserve"),
        "torch": version("torch"),
        "onnx": version("onnx"),
        "parameters": sum(tensor.numel() for tensor in module.parameters()),
        "nodes": len(model.graph.node),
        "opset": model.opset_import[0].version,
        "ir_version": model.ir_version,
        "graph_sha256": sha256_of(path),
        "parity_db": parity_db,
        "files": {
            key: {"source": file.source, "sha256": file.sha256}
            for key, file in zip(entry.files, spec.checkpoint.files, strict=True)
        },
        "members": dict(entry.members),
        "spec": spec.to_parameters(),
    }


def _family(entry: CatalogEntry) -> Family:
    return cast(Family, importlib.import_module(f"stemserve_export.families.{entry.family}"))


def _recipe(spec: ModelSpec) -> str:
    """Digest of everything that the artefact follows from: spec, checkpoint, exporter's code."""
    digest = hashlib.sha256()
    digest.update(
        json.dumps([spec.name, spec.tensor_dims, spec.stems, spec.to_parameters()]).encode()
    )
    package = files("stemserve_export")
    for part in ("families", "weights"):
        sources = [file for file in (package / part).iterdir() if file.name.endswith(".py")]
        for file in sorted(sources, key=lambda file: file.name):
            digest.update(file.read_bytes())
    for name in ("spectral.py", "onnx_graph.py", "precision.py"):
        digest.update((package / name).read_bytes())
    return digest.hexdigest()
