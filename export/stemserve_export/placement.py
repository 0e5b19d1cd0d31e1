"""An artefact's place in the repository: what is up to date stays, the rest is replaced at once."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stemserve.errors import ExportError
from stemserve.repository import CONFIG_NAME, MODEL_FILE
from stemserve.spec import ModelSpec
from stemserve_export.download import sha256_of

CONFIGS_FOLDER: Final = "configs"
RECORD_NAME: Final = "export.json"


@dataclass(frozen=True, slots=True)
class Exported:
    """An artefact in the repository.

    Attributes:
        folder: the version's folder, with the graph (none for an ensemble) and ``export.json``.
        built: whether it was built now, or found up to date.
        record: content of ``export.json`` beside it.
    """

    folder: Path
    built: bool
    record: Mapping[str, Any]


def place(
    repository: Path,
    spec: ModelSpec,
    configs: Mapping[str, str],
    recipe: str,
    build: Callable[[Path], dict[str, Any]],
) -> Exported:
    """Put an artefact and its configurations into the repository, unless they are there.

    Until the last step everything happens in a hidden folder. Configurations that are not among
    those given go with the artefact that they were made for.

    Args:
        repository: the model repository.
        spec: of the artefact.
        configs: text by path in the model's folder; ``config.pbtxt`` and files of ``configs/``.
        recipe: digest of all that the artefact follows from.
        build: writes the artefact's files into the folder that it is given, returns their record.

    Raises:
        ExportError: the repository cannot be written to.
    """
    folder = repository / spec.name
    target = folder / str(spec.version)
    found = _up_to_date(folder, target, configs, recipe)
    if found is not None:
        return Exported(target, False, found)
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _staging(folder) as staging:
            artefact = staging / "artefact"
            artefact.mkdir()
            record = build(artefact)
            record["recipe"] = recipe
            (artefact / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")
            for name, text in configs.items():
                (staging / name).parent.mkdir(exist_ok=True)
                (staging / name).write_text(text, encoding="utf-8")
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
    return Exported(target, True, record)


def _up_to_date(
    folder: Path, target: Path, configs: Mapping[str, str], recipe: str
) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((target / RECORD_NAME).read_text())
        if (
            record["recipe"] == recipe
            and (
                "specialists" in record or record["graph_sha256"] == sha256_of(target / MODEL_FILE)
            )
            and all(
                (folder / name).read_text(encoding="utf-8") == text
                for name, text in configs.items()
            )
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
        moves = [(artefact, target), (staging / CONFIGS_FOLDER, target.parent / CONFIGS_FOLDER)]
        before_us = [(place, staging / f"replaced-{place.name}") for _, place in moves]
        done: list[tuple[Path, Path]] = []
        try:
            for source, destination in (*before_us, *moves):
                if source.exists():
                    source.rename(destination)
                    done.append((source, destination))
            (staging / CONFIG_NAME).replace(target.parent / CONFIG_NAME)
        except OSError:
            for source, destination in reversed(done):
                destination.rename(source)
            raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
