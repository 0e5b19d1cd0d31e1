"""Put a song of the catalogue into a folder: ``python -m stemserve_export.song NAME FOLDER``."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from stemserve.errors import DigestMismatchError, StemserveError
from stemserve_export.catalog import find_song
from stemserve_export.download import fetch
from stemserve_export.weights.archive import read_member


def place_song(name: str, folder: Path) -> Path:
    """Fetch a song, verify it and write it to ``folder``; returns its path."""
    song = find_song(name)
    data = read_member(fetch(song.archive), song.member)
    if hashlib.sha256(data).hexdigest() != song.member_sha256:
        raise DigestMismatchError(f"'{song.member}' is not the song that the catalogue pins.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / Path(song.member).name
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)
    return path


if __name__ == "__main__":
    try:
        place_song(sys.argv[1], Path(sys.argv[2]))
    except StemserveError as error:
        sys.exit(f"Error: {error}")
