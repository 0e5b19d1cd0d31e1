"""Checkpoints that TensorFlow wrote ("V2": a tensor bundle), read without TensorFlow.

A bundle is an index, ``NAME.index``, and its shards, ``NAME.data-00000-of-00001`` and so on. The
index is a sorted table of LevelDB's format: tensor name -> dtype, shape, shard, offset, size and
CRC-32C; the shards are the values, one after the other. Both are data only: nothing is run, and
the graph beside them (``NAME.meta``) is not looked at.

Source: github.com/tensorflow/tensorflow, core/util/tensor_bundle/tensor_bundle.h (bundle),
core/protobuf/tensor_bundle.proto (entries); github.com/google/leveldb, doc/table_format.md (table).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from stemserve.errors import CheckpointError
from stemserve_export.weights.tensorflow_files import BundleFiles, open_bundle
from stemserve_export.weights.tensorflow_table import crc_is_right, read_table

Arrays = dict[str, npt.NDArray[np.float32]]

_MAX_RANK: Final = 8
# Of tensorflow/core/framework/types.proto.
_DT_FLOAT: Final = 1
_BIG_ENDIAN: Final = 1

# The fields of BundleHeaderProto and BundleEntryProto that are needed.
_SCHEMA: Final = """
name: "tensor_bundle.proto" package: "stemserve" syntax: "proto3"
message_type { name: "Header"
  field { name: "num_shards" number: 1 type: TYPE_INT32 label: LABEL_OPTIONAL }
  field { name: "endianness" number: 2 type: TYPE_INT32 label: LABEL_OPTIONAL }
}
message_type { name: "Dim"
  field { name: "size" number: 1 type: TYPE_INT64 label: LABEL_OPTIONAL }
}
message_type { name: "Shape"
  field { name: "dim" number: 2 type: TYPE_MESSAGE type_name: "Dim" label: LABEL_REPEATED }
}
message_type { name: "Entry"
  field { name: "dtype" number: 1 type: TYPE_INT32 label: LABEL_OPTIONAL }
  field { name: "shape" number: 2 type: TYPE_MESSAGE type_name: "Shape" label: LABEL_OPTIONAL }
  field { name: "shard_id" number: 3 type: TYPE_INT32 label: LABEL_OPTIONAL }
  field { name: "offset" number: 4 type: TYPE_INT64 label: LABEL_OPTIONAL }
  field { name: "size" number: 5 type: TYPE_INT64 label: LABEL_OPTIONAL }
  field { name: "crc32c" number: 6 type: TYPE_FIXED32 label: LABEL_OPTIONAL }
  field { name: "slices" number: 7 type: TYPE_BYTES label: LABEL_REPEATED }
}
"""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies; ``size`` and ``offset`` in bytes, ``crc`` masked as stored."""

    name: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int


def read_arrays(path: Path, wanted: Callable[[str], bool] = lambda _: True) -> Arrays:
    """Read the float32 tensors of a checkpoint.

    Tensors of another dtype (the step counter) are left out; so are those that are not wanted,
    which a training run leaves behind (an optimiser's moments).

    Args:
        path: a tar archive of a bundle, compressed or not, or a folder of one, or one's index.
        wanted: tells by its name whether a tensor is read.

    Returns:
        Name -> array, C order, in the machine's byte order.

    Raises:
        CheckpointError: it is no bundle, is damaged or cut short, or a value is not finite.
    """
    with open_bundle(path) as files:
        entries = read_table(files.index, files.index_name)
        shards, byte_order = _header(entries, files)
        places = [
            place
            for key, value in entries.items()
            if key and (place := _place(key, value, shards, files.index_name, wanted)) is not None
        ]
        if not places:
            raise CheckpointError(
                f"'{files.index_name}' lists none of the float32 tensors that are looked for; "
                "expected the weights of a network that we know."
            )
        # In the order in which they lie: a compressed archive is read from front to back.
        places.sort(key=lambda place: (place.shard, place.offset))
        arrays: Arrays = {}
        for shard, of_shard in itertools.groupby(places, key=lambda place: place.shard):
            arrays.update(_read_shard(files, shard, shards, of_shard, byte_order))
    return arrays


def _header(entries: Mapping[bytes, bytes], files: BundleFiles) -> tuple[int, str]:
    """Return the number of shards, and numpy's letter of the byte order."""
    if b"" not in entries:
        raise CheckpointError(
            f"'{files.index_name}' has no header; expected the index of a TensorFlow checkpoint."
        )
    header = _message("Header", entries[b""], files.index_name)
    if not 1 <= header.num_shards <= 99_999:  # as many as the shards' names have digits for
        raise CheckpointError(
            f"'{files.index_name}' says that the checkpoint has {header.num_shards} data files; "
            "expected at least one. The index is damaged."
        )
    return header.num_shards, ">" if header.endianness == _BIG_ENDIAN else "<"


def _place(
    key: bytes, value: bytes, shards: int, index: str, wanted: Callable[[str], bool]
) -> _Place | None:
    """Return where a tensor lies, if it is a float32 one that is wanted."""
    try:
        name = key.decode()
    except UnicodeDecodeError:
        raise CheckpointError(
            f"'{index}' lists a tensor whose name is no text ({key!r}); the index is damaged."
        ) from None
    if not wanted(name):
        return None
    entry = _message("Entry", value, index)
    if entry.dtype != _DT_FLOAT:
        return None
    if entry.slices:
        raise CheckpointError(
            f"'{name}' in '{index}' is stored in slices (a partitioned variable), which is not "
            "supported; save the model again without a partitioner."
        )
    shape = tuple(dim.size for dim in entry.shape.dim)
    if len(shape) > _MAX_RANK or any(size < 0 for size in shape):
        raise CheckpointError(
            f"'{name}' in '{index}' has the shape {shape}; expected at most {_MAX_RANK} sizes, "
            "none negative. The index is damaged."
        )
    if entry.size != 4 * math.prod(shape) or entry.offset < 0 or not 0 <= entry.shard_id < shards:
        raise CheckpointError(
            f"'{name}' in '{index}' has the shape {shape} and is said to take {entry.size} bytes "
            f"from byte {entry.offset} of data file {entry.shard_id} of {shards}, which cannot be; "
            "the index is damaged."
        )
    return _Place(name, shape, entry.shard_id, entry.offset, entry.size, entry.crc32c)


def _read_shard(
    files: BundleFiles, shard: int, shards: int, places: Iterator[_Place], byte_order: str
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    name = files.index_name.removesuffix(".index") + f".data-{shard:05d}-of-{shards:05d}"
    end = 0
    stream, available = files.open(name)
    with stream:
        for place in places:
            # Before anything is allocated: a length that lies must not cost memory.
            if place.offset < end or place.offset + place.size > available:
                raise CheckpointError(
                    f"'{place.name}' is said to lie at bytes {place.offset} to "
                    f"{place.offset + place.size} of '{name}', of which bytes {end} to {available} "
                    "are left; the file is cut short, or belongs to another index."
                )
            end = place.offset + place.size
            yield place.name, _read_tensor(stream, place, name, byte_order)


def _read_tensor(
    stream: BinaryIO, place: _Place, file: str, byte_order: str
) -> npt.NDArray[np.float32]:
    stream.seek(place.offset)
    data = stream.read(place.size)
    if len(data) != place.size or not crc_is_right(place.crc, data):
        raise CheckpointError(
            f"'{place.name}' in '{file}' does not have the checksum that the index gives; the file "
            "is damaged, or belongs to another index. Fetch or save the checkpoint again."
        )
    values = np.frombuffer(data, byte_order + "f4").reshape(place.shape)
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"'{place.name}' in '{file}' has NaN or infinity; its training failed."
        )
    return values.astype(np.float32, copy=False)


def _message(name: str, data: bytes, index: str) -> Any:
    """Decode a protocol buffer of :data:`_SCHEMA`."""
    from google.protobuf.message import DecodeError

    try:
        return _messages()[name].FromString(data)
    except DecodeError:
        raise CheckpointError(
            f"'{index}' has an entry that cannot be decoded; it is damaged, or no index of a "
            "TensorFlow checkpoint."
        ) from None


@functools.cache
def _messages() -> Mapping[str, Any]:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    schema = text_format.Parse(_SCHEMA, descriptor_pb2.FileDescriptorProto())
    pool = descriptor_pool.DescriptorPool()  # of our own: TensorFlow may be loaded, too
    pool.AddSerializedFile(schema.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"stemserve.{name}"))
        for name in ("Header", "Entry")
    }
