"""The model repository as a folder: which models it describes, which of them are exported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from stemserve.errors import ModelFileMissingError

CONFIG_NAME: Final = "config.pbtxt"
MODEL_FILE: Final = "model.onnx"


def default_repository() -> Path:
    """Return the repository to use when none is named.

    ``$STEMSERVE_REPOSITORY``; else ``./model_repository`` where it exists (a checkout); else
    ``stemserve/model_repository`` in the user's data folder.
    """
    named = os.environ.get("STEMSERVE_REPOSITORY")
    if named:
        return Path(named)
    here = Path("model_repository")
    if here.is_dir():
        return here
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "stemserve" / "model_repository"


def described_models(repository: Path) -> list[str]:
    """Return the names of the models that have a configuration."""
    return sorted(entry.parent.name for entry in repository.glob(f"*/{CONFIG_NAME}"))


def exported_models(repository: Path) -> list[str]:
    """Return the names of the models that have a configuration and weights."""
    return [name for name in described_models(repository) if _is_exported(repository, name)]


def _is_exported(repository: Path, name: str) -> bool:
    joined = _joined_models(repository, name)
    if joined:
        # An ensemble of ensembles is none of ours, and one that joins itself would have no end.
        described = described_models(repository)
        return any(path.name.isdigit() for path in (repository / name).glob("*/")) and all(
            part in described
            and not _joined_models(repository, part)
            and _is_exported(repository, part)
            for part in joined
        )
    file = model_file(repository, name)
    return any(path.parent.name.isdigit() for path in (repository / name).glob(f"*/{file}"))


def _joined_models(repository: Path, name: str) -> list[str]:
    """Return the specialists that an ensemble joins; none for a model of its own."""
    steps = read_config(repository, name).ensemble_scheduling.step
    return [str(step.model_name) for step in steps]


def model_file(repository: Path, name: str) -> str:
    """Return the file name of a model's graph, as its configuration says."""
    return read_config(repository, name).default_model_filename or MODEL_FILE


def read_config(repository: Path, name: str) -> model_config_pb2.ModelConfig:
    """Parse a model's ``config.pbtxt``.

    Raises:
        ModelFileMissingError: there is none, or it is no valid text of Triton's ModelConfig.
    """
    path = repository / name / CONFIG_NAME
    try:
        text = path.read_text(encoding="utf-8")
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except FileNotFoundError:
        known = ", ".join(described_models(repository)) or "none"
        raise ModelFileMissingError(
            f"The repository '{repository}' has no model '{name}' (it has {known}); export it "
            f"with `stemserve export {name}`."
        ) from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ModelFileMissingError(
            f"'{path}' is no valid model configuration ({error}); export the model again with "
            f"`stemserve export {name}`."
        ) from None


def models_to_serve(repository: Path, names: Sequence[str]) -> list[str]:
    """Return the models to load: those named, or all that are exported.

    Raises:
        ModelFileMissingError: a named model, or every model, lacks its configuration or weights.
    """
    if not repository.is_dir():
        raise ModelFileMissingError(
            f"There is no model repository '{repository}'; make one with `stemserve export "
            "spleeter_2stems`, or name another with --repository."
        )
    for name in names:  # others may be broken
        if not _is_exported(repository, name):
            file = model_file(repository, name)
            joined = ", ".join(_joined_models(repository, name))
            if joined:
                raise ModelFileMissingError(
                    f"Model '{name}' joins {joined}, and not all of them are built in "
                    f"'{repository}'. Build them with `stemserve export {name}`."
                )
            raise ModelFileMissingError(
                f"Model '{name}' has no weights: '{repository}/{name}/<version>/{file}' is "
                f"missing. Build it with `stemserve export {name}`."
            )
    if names:
        return list(names)
    exported = exported_models(repository)
    if not exported:
        described = described_models(repository)
        raise ModelFileMissingError(
            f"No model in '{repository}' has its weights; build one with `stemserve export "
            f"{described[0] if described else 'spleeter_2stems'}`."
        )
    return exported
