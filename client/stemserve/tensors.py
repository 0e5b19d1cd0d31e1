"""How a chunk's samples get to the server and its stems back.

Inside the gRPC messages, or, where client and server share a machine, through system shared
memory: the messages then only say where the samples are, which spares several copies of 12 MB per
two-stem chunk.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2

from stemserve.errors import DiskFullError, ServerError
from stemserve.spec import ModelSpec
from stemserve.triton import (
    WIRE_DTYPES,
    bare_request,
    checked_samples,
    infer_request,
    output_position,
    read_response,
)

Samples = npt.NDArray[np.float32]
_SHM: Final = Path("/dev/shm")
_ROOM_BYTES: Final = 512_000_000


@dataclass(frozen=True, slots=True)
class Ticket:
    """What must be remembered of a request until it is answered.

    Attributes:
        track_samples: length of the track with its last chunk, None before.
        slot: place in shared memory, None if the samples are in the message.
    """

    track_samples: int | None
    slot: int | None = None


Request = tuple[service_pb2.ModelInferRequest, Ticket]


class Tensors(Protocol):
    """One track's way of handing over samples."""

    def request(self, chunk: Samples, track_samples: int | None, request_id: str) -> Request:
        """Build the request for a chunk [channels, chunk_samples] float32."""

    def receive(self, response: service_pb2.ModelInferResponse, ticket: Ticket) -> list[Samples]:
        """Return a chunk's stems; valid until :meth:`release`. Raises InvalidResponseError."""

    def release(self, ticket: Ticket) -> None:
        """Say that the stems of a chunk are no longer looked at."""


class InlineTensors:
    """Samples travel inside the gRPC messages."""

    def __init__(self, spec: ModelSpec, stems: Sequence[str]) -> None:
        self._spec = spec
        self._stems = stems

    def request(self, chunk: Samples, track_samples: int | None, request_id: str) -> Request:
        """See :class:`Tensors`."""
        message = infer_request(self._spec, chunk, self._stems, request_id)
        return message, Ticket(track_samples)

    def receive(self, response: service_pb2.ModelInferResponse, ticket: Ticket) -> list[Samples]:
        """See :class:`Tensors`."""
        del ticket
        return read_response(self._spec, response, self._stems)

    def release(self, ticket: Ticket) -> None:
        """See :class:`Tensors`."""


class SharedTensors:
    """Samples lie in shared memory that client and server both map.

    One region with a slot for every request in flight: the mixture, then every stem. The caller
    registers it with the server (:meth:`registration`), calls :meth:`registered`, and at the end
    sends :meth:`unregistration` once no request is in flight any more: a server that still writes
    to memory that it has unmapped dies.

    Attributes:
        in_doubt: set when a request was given up that the server may still be working on. The
            region then stays registered until the server ends.

    Raises:
        DiskFullError: ``/dev/shm`` has no room for the region.
    """

    in_doubt = False

    def __init__(self, spec: ModelSpec, stems: Sequence[str], slots: int) -> None:
        self._spec = spec
        self._stems = tuple(stems)
        self._dtype = np.dtype(WIRE_DTYPES[spec.wire_dtype])
        self._tensor_bytes = int(np.prod(spec.tensor_dims)) * self._dtype.itemsize
        self._slot_bytes = (1 + len(self._stems)) * self._tensor_bytes
        self._size = slots * self._slot_bytes
        self._free = deque(range(slots))
        self._name = f"stemserve_{uuid.uuid4().hex}"
        self._path = _SHM / self._name
        self._memory = self._map()

    def registration(self) -> service_pb2.SystemSharedMemoryRegisterRequest:
        """Return the request that makes the server map the region."""
        return service_pb2.SystemSharedMemoryRegisterRequest(
            name=self._name, key=f"/{self._name}", byte_size=self._size
        )

    def registered(self) -> None:
        """Take the region's name away: mapped by both, it vanishes with the last of them."""
        self._path.unlink(missing_ok=True)

    def unregistration(self) -> service_pb2.SystemSharedMemoryUnregisterRequest:
        """Return the request that makes the server unmap the region."""
        return service_pb2.SystemSharedMemoryUnregisterRequest(name=self._name)

    def close(self) -> None:
        """Give the memory back."""
        self.registered()
        with contextlib.suppress(BufferError):  # the end of a view that is alive closes the map
            self._memory.close()

    def request(self, chunk: Samples, track_samples: int | None, request_id: str) -> Request:
        """See :class:`Tensors`."""
        slot = self._free.popleft()
        self._tensor(slot, 0)[...] = chunk
        for index in range(1, 1 + len(self._stems)):
            # Found out by `receive` if the server, against its word, writes nothing.
            self._tensor(slot, index)[:, -1] = np.nan
        message = bare_request(self._spec, self._stems, request_id)
        for index, tensor in enumerate((message.inputs[0], *message.outputs)):
            tensor.parameters["shared_memory_region"].string_param = self._name
            tensor.parameters["shared_memory_byte_size"].int64_param = self._tensor_bytes
            tensor.parameters["shared_memory_offset"].int64_param = self._offset(slot, index)
        return message, Ticket(track_samples, slot)

    def receive(self, response: service_pb2.ModelInferResponse, ticket: Ticket) -> list[Samples]:
        """See :class:`Tensors`."""
        assert ticket.slot is not None
        stems = []
        for index, stem in enumerate(self._stems, start=1):
            output_position(self._spec, response, stem)
            view = self._tensor(ticket.slot, index)
            stems.append(checked_samples(self._spec, stem, view))
        return stems

    def release(self, ticket: Ticket) -> None:
        """See :class:`Tensors`."""
        assert ticket.slot is not None
        self._free.append(ticket.slot)

    def _map(self) -> mmap.mmap:
        descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            # Takes the pages now: a write to a page that a full /dev/shm lacks would kill us.
            os.posix_fallocate(descriptor, 0, self._size)
            return mmap.mmap(descriptor, self._size)
        except OSError as error:
            self._path.unlink(missing_ok=True)
            raise DiskFullError(
                f"'{_SHM}' has no room for {self._size / 1e6:.0f} MB of shared memory "
                f"({error.strerror}); enlarge it (docker: --shm-size), or do without shared "
                "memory."
            ) from None
        finally:
            os.close(descriptor)

    def _offset(self, slot: int, index: int) -> int:
        return slot * self._slot_bytes + index * self._tensor_bytes

    def _tensor(self, slot: int, index: int) -> npt.NDArray[np.floating[npt.NBitBase]]:
        offset = self._offset(slot, index)
        count = self._tensor_bytes // self._dtype.itemsize
        flat = np.frombuffer(self._memory, self._dtype, count, offset)
        return flat.reshape(self._spec.tensor_dims)


def shared_memory_has_room() -> bool:
    """Tell whether ``/dev/shm`` has room for a window of chunks, the server's own included."""
    try:
        return shutil.disk_usage(_SHM).free > _ROOM_BYTES
    except OSError:
        return False


def cannot_share(url: str, details: str) -> ServerError:
    """Build the error for a server that cannot map this machine's shared memory."""
    return ServerError(
        f"The server at {url} cannot map the shared memory of this machine ({details}); use it "
        "with a server on the same machine only, and with a common /dev/shm."
    )
