"""Reports of the release gate, as far as someone who serves a model asks for them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from stemserve.repository import model_file, read_config

REPORT_NAME: Final = "verification.json"
REPORT_VERSION: Final = 1


def verification_warning(repository: Path, name: str) -> str | None:
    """Return why a model of a repository should not be trusted, None if its report is in order.

    An ensemble answers for the models that it joins.

    Raises:
        ModelFileMissingError: the model's configuration is missing or damaged.
    """
    folder = _newest_version(repository / name)
    advice = f"run `stemserve verify {name}`"
    if folder is None or not (path := folder / REPORT_NAME).is_file():
        return f"Model '{name}' has not been verified; {advice}."
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, passed = report["report_version"], report["passed"]
        failures, verified = list(report["failures"]), _measured_graphs(name, report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"The report '{path}' cannot be read ({error!r}); {advice}."
    if version != REPORT_VERSION:
        return f"The report '{path}' has the version {version}, not {REPORT_VERSION}; {advice}."
    if verified != _served_graphs(repository, name):
        return f"Model '{name}' was verified with another graph than the one here; {advice}."
    if passed is not True:
        return (
            f"Model '{name}' failed its verification in {len(failures)} of its checks (see "
            f"'{path}'); export it again, then {advice}."
        )
    return None


def _measured_graphs(name: str, report: dict[str, Any]) -> dict[str, str]:
    return dict(report["parts"]) or {name: str(report["graph_sha256"])}


def _served_graphs(repository: Path, name: str) -> dict[str, str | None]:
    config = read_config(repository, name)
    steps = [str(step.model_name) for step in config.ensemble_scheduling.step]
    return {model: _graph_sha256(repository, model) for model in steps or [name]}


def _graph_sha256(repository: Path, name: str) -> str | None:
    folder = _newest_version(repository / name)
    try:
        if folder is None:
            return None
        with (folder / model_file(repository, name)).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None


def _newest_version(folder: Path) -> Path | None:
    """The version that Triton serves."""
    versions = [path for path in folder.glob("[0-9]*") if path.name.isdigit() and path.is_dir()]
    return max(versions, key=lambda path: int(path.name), default=None)
