"""An artefact as it lies in a repository: its spec, its record, and the weights it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stemserve.errors import CheckpointError, ExportError
from stemserve.repository import MODEL_FILE, read_config
from stemserve.spec import ModelSpec
from stemserve_export.catalog import CatalogEntry, PinnedFile
from stemserve_export.download import Report, fetch, sha256_of
from stemserve_export.placement import RECORD_NAME


@dataclass(frozen=True)
class Artefact:
    """What ``stemserve export`` has put into a repository.

    Attributes:
        repository: the model repository.
        spec: of the model, from its ``config.pbtxt``.
        record: content of ``export.json``.
        specialists: names of the models that an ensemble joins, by its stems; else empty.
    """

    repository: Path
    spec: ModelSpec
    record: Mapping[str, Any]
    specialists: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """The version's folder."""
        return self.repository / self.spec.name / str(self.spec.version)

    @property
    def graph(self) -> Path:
        """The ONNX file."""
        return self.folder / MODEL_FILE

    def graph_sha256(self) -> str:
        """Digest of the graph that lies there now."""
        return sha256_of(self.graph)

    def entry(self) -> CatalogEntry:
        """Return a catalogue entry that the artefact's own weights are built by."""
        spec = self.spec
        return CatalogEntry(
            name=spec.name,
            version=spec.version,
            family=spec.family,
            domain=spec.domain,
            stems=spec.stems,
            sample_rate=spec.sample_rate,
            overlap=spec.overlap,
            window=spec.window,
            normalization=spec.normalization,
            max_batch_size=spec.max_batch_size,
            files={
                key: PinnedFile(file["source"], file["sha256"])
                for key, file in self.record["files"].items()
            },
            licence=spec.checkpoint.licence,
            licence_source="",
            commercial_use=spec.checkpoint.commercial_use,
            training_data=spec.checkpoint.training_data,
            members=dict(self.record["members"]),
            options=dict(spec.options),
            precision=spec.precision,
            wire_dtype=spec.wire_dtype,
        )

    def fetch_files(self, cache: Path | None, report: Report) -> dict[str, Path]:
        """Return local, verified copies of the weights; raises DownloadError and the like."""
        files = self.entry().files
        return {key: fetch(file, cache=cache, report=report) for key, file in files.items()}


def read_artefact(repository: Path, name: str) -> Artefact:
    """Read what a repository says of a model.

    Raises:
        ModelFileMissingError: it has no such model.
        SpecError: the model is not one of ours.
        ExportError: it was not exported, or its two descriptions contradict each other.
    """
    config = read_config(repository, name)
    spec = ModelSpec.from_config(config)
    path = repository / name / str(spec.version) / RECORD_NAME
    again = f"Export it again with `stemserve export {name}`."
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        described = dict(record["spec"])
    except FileNotFoundError:
        raise ExportError(
            f"Model '{name}' has no '{path}', which tells what it was built from. {again}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"'{path}' cannot be read ({error!r}). {again}") from None
    if described != spec.to_parameters():
        raise ExportError(
            f"'{path}' and the configuration of '{name}' describe different models. {again}"
        )
    specialists = {
        stem: str(step.model_name)
        for step in config.ensemble_scheduling.step
        for stem in step.output_map.values()
    }
    return Artefact(repository, spec, record, specialists)


def unreadable(artefact: Artefact, error: OSError) -> CheckpointError:
    """Build the error for weights that cannot be read."""
    return CheckpointError(
        f"The checkpoint of '{artefact.spec.name}' cannot be read ({error}); check its source."
    )
