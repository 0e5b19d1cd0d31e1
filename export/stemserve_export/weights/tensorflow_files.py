"""Where the files of a TensorFlow checkpoint lie: in a tar archive, in a folder, side by side."""

from __future__ import annotations

import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final, Protocol

from stemserve.errors import CheckpointError

_INDEX_SUFFIX: Final = ".index"
_STATE_NAME: Final = "checkpoint"
_MAX_INDEX_BYTES: Final = 16 << 20
_MAX_STATE_BYTES: Final = 1 << 20
_MAX_FILE_BYTES: Final = 4 << 30
_MAX_MEMBERS: Final = 10_000
# What decompressors and tarfile raise for a file that is damaged or cut short.
_DAMAGE: Final = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)


class _Store(Protocol):
    """Files by name."""

    what: str

    def sizes(self) -> Mapping[str, int]:
        """Return name -> bytes."""

    def open(self, name: str) -> BinaryIO:
        """Open one of them."""


class BundleFiles:
    """The files of one checkpoint.

    Attributes:
        index_name: the index's name, as it is to be called in errors.
        index: its content.
    """

    def __init__(self, store: _Store, index_name: str) -> None:
        self._store = store
        self._sizes = store.sizes()
        self.index_name = index_name
        if index_name not in self._sizes:
            raise CheckpointError(
                f"'{store.what}' has no '{index_name}'; expected the index of a TensorFlow "
                "checkpoint there. Check the path."
            )
        if self._sizes[index_name] > _MAX_INDEX_BYTES:
            raise CheckpointError(
                f"'{index_name}' has {self._sizes[index_name]} bytes; the index of a checkpoint "
                f"has at most {_MAX_INDEX_BYTES}. It is another file."
            )
        with store.open(index_name) as stream:
            self.index = stream.read()

    def open(self, name: str) -> tuple[BinaryIO, int]:
        """Open a data file; returns it with its size in bytes.

        Raises:
            CheckpointError: there is none of that name.
        """
        if name not in self._sizes:
            raise CheckpointError(
                f"'{self._store.what}' has no '{name}', which '{self.index_name}' needs; bring "
                "all files of the checkpoint."
            )
        return self._store.open(name), self._sizes[name]


@contextmanager
def open_bundle(path: Path) -> Iterator[BundleFiles]:
    """Open the checkpoint in an archive, in a folder, or that an index belongs to.

    Nothing is unpacked. Where several checkpoints lie side by side, the file ``checkpoint`` beside
    them tells which is the latest, as TensorFlow itself does.

    Raises:
        CheckpointError: there is no checkpoint, it cannot be read, or the archive has members that
            no published one has (links, devices, places outside of it).
    """
    try:
        if path.is_dir():
            folder = _Folder(path)
            yield BundleFiles(folder, _index_of(folder))
        elif path.suffix == _INDEX_SUFFIX:
            yield BundleFiles(_Folder(path.parent), path.name)
        else:
            with tarfile.open(path) as opened:
                archive = _Archive(opened, str(path))
                yield BundleFiles(archive, _index_of(archive))
    except _DAMAGE as error:
        raise CheckpointError(
            f"'{path}' cannot be read as a TensorFlow checkpoint ({error}); expected a tar archive "
            "or a folder with NAME.index and NAME.data-00000-of-00001, or the path of NAME.index."
        ) from None


class _Folder:
    def __init__(self, folder: Path) -> None:
        self.what = str(folder)
        self._folder = folder

    def sizes(self) -> Mapping[str, int]:
        return {file.name: file.stat().st_size for file in self._folder.iterdir() if file.is_file()}

    def open(self, name: str) -> BinaryIO:
        return (self._folder / name).open("rb")


class _Archive:
    def __init__(self, archive: tarfile.TarFile, what: str) -> None:
        self.what = what
        self._archive = archive
        self._members: dict[str, tarfile.TarInfo] = {}
        # Headers one by one, each checked before what follows it is skipped.
        for count, member in enumerate(archive):
            self._check(member, count)
            if member.isfile():
                self._members[str(PurePosixPath(member.name))] = member

    def _check(self, member: tarfile.TarInfo, count: int) -> None:
        place = PurePosixPath(member.name)
        if not (member.isfile() or member.isdir()) or place.is_absolute() or ".." in place.parts:
            raise CheckpointError(
                f"'{self.what}' has the member '{member.name}', a link, a device or a path that "
                "leads out of it; a published checkpoint has none. Do not trust this file."
            )
        if not 0 <= member.size <= _MAX_FILE_BYTES or count == _MAX_MEMBERS:
            raise CheckpointError(
                f"'{self.what}' has a member of {member.size} bytes as its {count + 1}th; expected "
                f"at most {_MAX_FILE_BYTES} bytes and {_MAX_MEMBERS} members. It is no checkpoint."
            )

    def sizes(self) -> Mapping[str, int]:
        return {name: member.size for name, member in self._members.items()}

    def open(self, name: str) -> BinaryIO:
        stream = self._archive.extractfile(self._members[name])
        assert stream is not None  # only files are listed
        return stream  # type: ignore[return-value]  # typeshed has IO[bytes]


def _index_of(store: _Store) -> str:
    """Return the name of the latest checkpoint's index."""
    sizes = store.sizes()
    # What macOS writes beside a file ("._model.index") is none.
    found = [
        name
        for name in sizes
        if name.endswith(_INDEX_SUFFIX) and not PurePosixPath(name).name.startswith(".")
    ]
    if len(found) == 1:
        return found[0]
    latest = [
        index
        for name, size in sizes.items()
        if PurePosixPath(name).name == _STATE_NAME and size <= _MAX_STATE_BYTES
        if (index := _latest(store, name)) in found
    ]
    if len(latest) == 1:
        return latest[0]
    raise CheckpointError(
        f"'{store.what}' has {len(found)} files {_INDEX_SUFFIX}, and no file '{_STATE_NAME}' that "
        "tells which is the latest; expected the files of one TensorFlow checkpoint. Name the "
        "index that is meant, or leave only one."
    )


def _latest(store: _Store, state: str) -> str:
    """Return the index that a state file names: text with ``model_checkpoint_path: "NAME"``."""
    with store.open(state) as stream:
        text = stream.read().decode(errors="replace")
    match = re.search(r'^model_checkpoint_path: "([^"\n]+)"', text, re.MULTILINE)
    # A path from another machine: only its last part says anything here.
    name = PurePosixPath(match[1]).name if match else ""
    return str(PurePosixPath(state).with_name(name + _INDEX_SUFFIX)) if name else ""
