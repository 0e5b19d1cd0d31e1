"""The graphs of a model repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stemserve.repository import model_file, read_config
from stemserve.spec import ModelSpec
from stemserve_export.tensorrt.errors import TensorRTError


def exported_graph(repository: Path, name: str) -> tuple[ModelSpec, Path]:
    """Return the spec of a model of the repository and the path of its graph.

    Raises:
        ModelFileMissingError: the repository does not describe it.
        SpecError: its configuration is not one of ours.
        TensorRTError: its graph is missing.
    """
    spec = ModelSpec.from_config(read_config(repository, name))
    graph = repository / name / str(spec.version) / model_file(repository, name)
    if not graph.is_file():
        raise TensorRTError(
            f"Model '{name}' has no graph: '{graph}' is missing. Build it with `stemserve export "
            f"{name}`."
        )
    return spec, graph


def graph_names(repository: Path, names: Sequence[str]) -> list[str]:
    """Replace every ensemble among the names by the models that it joins, each of them once."""
    found: dict[str, None] = {}
    for name in names:
        steps = read_config(repository, name).ensemble_scheduling.step
        found.update(dict.fromkeys([step.model_name for step in steps] or [name]))
    return list(found)
