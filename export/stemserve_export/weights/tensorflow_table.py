"""Sorted tables of LevelDB's format, as TensorFlow writes them: the index of a checkpoint.

A table is data blocks, an index block that points to them, and a footer that points to that. A
block is a list of entries, each with the length of the prefix that its key shares with the one
before; behind every block stand its compression and its CRC-32C.

Source: github.com/google/leveldb, doc/table_format.md and table/block_builder.cc; TensorFlow's copy
is in core/lib/io (tsl/lib/io), which writes checkpoints uncompressed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from stemserve.errors import CheckpointError

_FOOTER_BYTES: Final = 48
_MAGIC: Final = 0xDB4775248B80FB57
_TRAILER_BYTES: Final = 5  # compression, CRC
_MAX_VARINT_BYTES: Final = 10
# Spleeter's names have 40 characters and a network some hundreds of tensors. A table of a few MB
# that shares prefixes could otherwise unfold into gigabytes.
_MAX_KEY_BYTES: Final = 1024
_MAX_ENTRIES: Final = 100_000
# leveldb/util/crc32c.h: stored checksums are rotated and shifted by this.
_CRC_MASK: Final = 0xA282EAD8


def crc_is_right(stored: int, data: bytes) -> bool:
    """Tell whether a stored, masked CRC-32C belongs to the data."""
    import google_crc32c

    crc: int = google_crc32c.value(data)
    return stored == ((crc >> 15 | crc << 17) + _CRC_MASK) & 0xFFFFFFFF


def read_table(data: bytes, what: str) -> dict[bytes, bytes]:
    """Return the entries of a table, in the order of their keys.

    Args:
        data: the file's content.
        what: its name, for errors.

    Raises:
        CheckpointError: it is no such table, is damaged or cut short, or is compressed.
    """
    if len(data) < _FOOTER_BYTES or int.from_bytes(data[-8:], "little") != _MAGIC:
        raise CheckpointError(
            f"'{what}' is no index of a TensorFlow checkpoint: it does not end as one does. It is "
            "cut short, or another file."
        )
    try:
        footer = data[-_FOOTER_BYTES:]
        _, position = _handle(footer, 0)  # of the block of meta data, which is empty
        handle, _ = _handle(footer, position)
        table: dict[bytes, bytes] = {}
        last: bytes | None = None
        for _, block_handle in _entries(_block(data, handle, what)):
            for key, value in _entries(_block(data, _handle(block_handle, 0)[0], what)):
                if (last is not None and key <= last) or len(table) == _MAX_ENTRIES:
                    raise ValueError
                table[key] = value
                last = key
    except (IndexError, ValueError):
        raise CheckpointError(
            f"The entries of '{what}' contradict each other; it is damaged, or no index of a "
            "TensorFlow checkpoint."
        ) from None
    return table


def _block(data: bytes, handle: tuple[int, int], what: str) -> bytes:
    """Return a block's entries: its content without the restart points, which only a search needs.

    Raises:
        ValueError: the handle or the restart points lie outside the file.
    """
    offset, size = handle
    end = offset + size
    if size < 4 or end + _TRAILER_BYTES > len(data) - _FOOTER_BYTES:
        raise ValueError
    content, compression = data[offset:end], data[end]
    # The checksum covers the compression, too.
    stored = int.from_bytes(data[end + 1 : end + _TRAILER_BYTES], "little")
    if not crc_is_right(stored, data[offset : end + 1]):
        raise CheckpointError(
            f"A block of '{what}' does not have the checksum that is stored with it; the file is "
            "damaged. Fetch or save the checkpoint again."
        )
    if compression:
        raise CheckpointError(
            f"'{what}' is compressed (type {compression}), which TensorFlow's checkpoints are not; "
            "save the model again with tf.compat.v1.train.Saver."
        )
    restarts = int.from_bytes(content[-4:], "little")
    if 4 * (restarts + 1) > size:
        raise ValueError
    return content[: size - 4 * (restarts + 1)]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield key and value of every entry; raises ValueError or IndexError where one cannot be."""
    position, key = 0, b""
    while position < len(block):
        shared, position = _varint(block, position)
        own, position = _varint(block, position)
        length, position = _varint(block, position)
        end = position + own + length
        if shared > len(key) or shared + own > _MAX_KEY_BYTES or end > len(block):
            raise ValueError
        key = key[:shared] + block[position : position + own]
        yield key, block[position + own : end]
        position = end


def _handle(data: bytes, position: int) -> tuple[tuple[int, int], int]:
    """Return offset and size of a block, and where the next handle starts."""
    offset, position = _varint(data, position)
    size, position = _varint(data, position)
    return (offset, size), position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return an integer of 7 bits per byte, lowest first, and the position behind it."""
    value = 0
    for count in range(_MAX_VARINT_BYTES):
        byte = data[position + count]
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return value, position + count + 1
    raise ValueError
