"""A writer of TensorFlow's checkpoints (V2, "tensor bundle"), for tests: no TensorFlow needed.

Written after the format's description (leveldb/doc/table_format.md, tensor_bundle.proto) on its
own, with parameters that make damage and hostile values possible.
"""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import google_crc32c
import numpy as np

DT_FLOAT, DT_INT64 = 1, 9
MAGIC = 0xDB4775248B80FB57
DATA_NAME = "model.data-00000-of-00001"


def masked_crc(data: bytes) -> int:
    """CRC-32C as LevelDB stores it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(value: int) -> bytes:
    """7 bits per byte, lowest first; negative numbers as protocol buffers write them."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    """A protocol buffer's field: an integer, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def header(shards: int = 1, big_endian: bool = False) -> bytes:
    """A BundleHeaderProto."""
    return field(1, shards) + field(2, int(big_endian)) + field(3, field(1, 1))


def entry(
    dtype: int,
    shape: Sequence[int],
    offset: int,
    size: int,
    crc: int,
    *,
    shard: int = 0,
    sliced: bool = False,
) -> bytes:
    """A BundleEntryProto; zeros are left out, as protocol buffers do."""
    dims = b"".join(field(2, field(1, n) if n else b"") for n in shape)
    parts = [field(1, dtype), field(2, dims)]
    parts += [field(number, n) for number, n in ((3, shard), (4, offset), (5, size)) if n]
    parts.append(varint(6 << 3 | 5) + crc.to_bytes(4, "little"))
    if sliced:
        parts.append(field(7, b""))
    return b"".join(parts)


def table(
    entries: Mapping[bytes, bytes], *, block_entries: int = 20, compression: int = 0
) -> bytes:
    """A sorted table: keys in the mapping's order, so many of them per block."""
    out = bytearray()
    index: dict[bytes, bytes] = {}
    pairs = list(entries.items())
    for start in range(0, len(pairs), block_entries):
        part = dict(pairs[start : start + block_entries])
        index[pairs[start : start + block_entries][-1][0]] = _append(out, part, compression)
    meta = _append(out, {}, 0)
    footer = meta + _append(out, index, 0, restart_interval=1)
    return bytes(out) + footer.ljust(40, b"\0") + MAGIC.to_bytes(8, "little")


def _append(
    out: bytearray, entries: Mapping[bytes, bytes], compression: int, restart_interval: int = 16
) -> bytes:
    """Append a block; returns its handle."""
    block, restarts, last = bytearray(), [0], b""
    for count, (key, value) in enumerate(entries.items()):
        shared = 0
        if count % restart_interval == 0:
            if count:
                restarts.append(len(block))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        block += varint(shared) + varint(len(key) - shared) + varint(len(value))
        block += key[shared:] + value
        last = key
    for restart in (*restarts, len(restarts)):
        block += restart.to_bytes(4, "little")
    handle = varint(len(out)) + varint(len(block))
    block.append(compression)
    out += block + masked_crc(bytes(block)).to_bytes(4, "little")
    return handle


def bundle(
    tensors: Mapping[str, np.ndarray], *, shards: int = 1, big_endian: bool = False
) -> dict[str, bytes]:
    """Name -> content of the files of a checkpoint: index, data files, and what lies beside."""
    order = ">" if big_endian else "<"
    data = [bytearray() for _ in range(shards)]
    entries = {b"": header(shards, big_endian)}
    for count, name in enumerate(sorted(tensors, key=str.encode)):
        array = tensors[name]
        dtype = {"f": DT_FLOAT, "i": DT_INT64}[array.dtype.kind]
        raw = array.astype(array.dtype.newbyteorder(order)).tobytes()
        shard = count % shards
        entries[name.encode()] = entry(
            dtype, array.shape, len(data[shard]), len(raw), masked_crc(raw), shard=shard
        )
        data[shard] += raw
    files = {"checkpoint": b'model_checkpoint_path: "model"\nall_model_checkpoint_paths: "model"\n'}
    files |= {
        f"model.data-{n:05d}-of-{shards:05d}": bytes(content) for n, content in enumerate(data)
    }
    return files | {"model.index": table(entries), "model.meta": b"a graph, never read"}


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write files side by side; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(path: Path, files: Mapping[str, bytes], mode: str = "w:gz") -> Path:
    """Write files as an archive like Deezer's, in their order."""
    # Weights do not compress: the quickest level.
    options = {"compresslevel": 1} if mode == "w:gz" else {}
    with tarfile.open(path, mode, **options) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
