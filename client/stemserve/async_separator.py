"""AsyncSeparator: the public API on asyncio, with the names of :class:`stemserve.Separator`."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc
from tritonclient.grpc import model_config_pb2, service_pb2

from stemserve.result import Result
from stemserve.separator import (
    DEFAULT_CHUNK_TIMEOUT_S,
    DEFAULT_IN_FLIGHT,
    DRAIN_S,
    STATISTICS_PATIENCE_S,
    UNFINISHED,
    InFlight,
    Progress,
    counted_failures,
)
from stemserve.spec import ModelSpec
from stemserve.stem_files import Format
from stemserve.tensors import Request, SharedTensors, Ticket, cannot_share
from stemserve.track import TrackJob, TrackOptions, track_folder
from stemserve.triton import (
    CHANNEL_OPTIONS,
    CONNECT_TIMEOUT_S,
    ServedModel,
    ServerTimes,
    Stub,
    default_model,
    first_step,
    model_missing,
    served_error,
    served_model,
    target_of,
)

T = TypeVar("T")


class AsyncSeparator:
    """Separates tracks through one model of a Triton server, on asyncio.

    An async context manager; arguments and errors are those of :class:`stemserve.Separator`,
    raised on entry where that raises them on construction. Decoding, joining and encoding run in
    worker threads, so the event loop stays free.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        in_flight: int = DEFAULT_IN_FLIGHT,
        shared_memory: bool = False,
        chunk_timeout_s: float = DEFAULT_CHUNK_TIMEOUT_S,
    ) -> None:
        if in_flight < 1:
            raise ValueError(f"in_flight must be 1 or more, got {in_flight}")
        self.url = url
        self._model = model
        self._in_flight = in_flight
        self._slots = in_flight + 1 if shared_memory else 0  # one more is made ready
        self._chunk_timeout_s = chunk_timeout_s
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> AsyncSeparator:
        self._channel = grpc.aio.insecure_channel(target_of(self.url), options=CHANNEL_OPTIONS)
        self._stub = Stub(self._channel)
        try:
            self._served = await self._look_up(self._model)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        if self._channel is not None:
            await self._channel.close()

    @property
    def spec(self) -> ModelSpec:
        """The served model's description of itself."""
        return self._served.spec

    @property
    def device(self) -> str:
        """``gpu`` or ``cpu``: where the server runs the model."""
        return self._served.device

    async def separate(
        self,
        path: str | os.PathLike[str],
        out_dir: str | os.PathLike[str],
        *,
        stems: Sequence[str] | None = None,
        file_format: Format = "wav",
        sample_rate: int | None = None,
        normalize: bool = False,
        overlap: float | None = None,
        shifts: int = 0,
        shift_seed: int = 0,
        progress: Progress | None = None,
    ) -> Result:
        """Separate one file; as :meth:`stemserve.Separator.separate`.

        Cancelling the task cancels what is in flight and leaves no file behind.
        """
        options = TrackOptions(
            stems, file_format, sample_rate, normalize, overlap, shifts, shift_seed
        )
        source = Path(path)
        with counted_failures(self.spec.name):
            job = await self._open(source, track_folder(source, Path(out_dir)), options)
            try:
                async with self._mapped(job.shared):
                    before = await self._server_times()
                    await self._run(job, progress)
                    chunks = len(job.latency.round_trips_s)
                    job.latency.server = await self._server_times_since(before, chunks)
                    return await _in_thread(job.finish)
            finally:
                job.close()

    async def _open(self, source: Path, folder: Path, options: TrackOptions) -> TrackJob:
        opening = asyncio.ensure_future(
            asyncio.to_thread(TrackJob, source, folder, self._served, options, self._slots)
        )
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            (await opening).close()
            raise

    async def _run(self, job: TrackJob, progress: Progress | None) -> None:
        window: deque[InFlight] = deque()
        try:
            while True:
                following = await _in_thread(job.next_request)
                if following is not None and len(window) < self._in_flight:
                    window.append(self._send(*following))
                    continue
                if not window:
                    return
                await self._take_turn(job, window, following)
                if progress is not None:
                    progress(len(job.latency.round_trips_s), job.expected_chunks)
        except grpc.RpcError as error:
            raise served_error(error, self.url, midway=True) from None
        finally:
            for waiting in window:
                if job.shared is None:
                    waiting.call.cancel()
                else:  # the server must not be left writing to memory that goes away
                    job.shared.in_doubt |= not await _has_ended(waiting.call)

    @asynccontextmanager
    async def _mapped(self, shared: SharedTensors | None) -> AsyncIterator[None]:
        """Have the server map a track's shared memory, and unmap it in the end."""
        if shared is None:
            yield
            return
        try:
            await self._stub.SystemSharedMemoryRegister(
                shared.registration(), timeout=CONNECT_TIMEOUT_S
            )
        except grpc.RpcError as error:
            raise cannot_share(self.url, error.details() or "") from None
        shared.registered()
        try:
            yield
        finally:
            if not shared.in_doubt:
                with suppress(grpc.RpcError):
                    await self._stub.SystemSharedMemoryUnregister(
                        shared.unregistration(), timeout=CONNECT_TIMEOUT_S
                    )

    def _send(self, request: service_pb2.ModelInferRequest, ticket: Ticket) -> InFlight:
        call = self._stub.ModelInfer(request, timeout=self._chunk_timeout_s)
        return InFlight(call, self.spec.name, ticket)

    async def _take_turn(
        self, job: TrackJob, window: deque[InFlight], following: Request | None
    ) -> None:
        response = await window[0].call  # a call that fails stays in the window
        oldest = window.popleft()
        if following is not None:
            window.append(self._send(*following))
        await _in_thread(job.accept, response, oldest.ticket, oldest.round_trip_s)

    async def _look_up(self, model: str | None) -> ServedModel:
        try:
            if model is None:
                ready = [await self._config_of(name) for name in await self._list_ready()]
                model = default_model(self.url, ready)
            try:
                config = await self._config_of(model)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.NOT_FOUND:
                    raise
                raise model_missing(self.url, model, await self._list_ready()) from None
            step = first_step(config)
            return served_model(config, await self._config_of(step) if step else None)
        except grpc.RpcError as error:
            raise served_error(error, self.url) from None

    async def _config_of(self, model: str) -> model_config_pb2.ModelConfig:
        request = service_pb2.ModelConfigRequest(name=model)
        return (await self._stub.ModelConfig(request, timeout=CONNECT_TIMEOUT_S)).config

    async def _list_ready(self) -> list[str]:
        request = service_pb2.RepositoryIndexRequest(ready=True)
        index = await self._stub.RepositoryIndex(request, timeout=CONNECT_TIMEOUT_S)
        return sorted(model.name for model in index.models)

    async def _server_times(self) -> ServerTimes | None:
        try:
            return ServerTimes.from_statistics(
                await self._stub.ModelStatistics(
                    service_pb2.ModelStatisticsRequest(name=self.spec.name),
                    timeout=CONNECT_TIMEOUT_S,
                )
            )
        except grpc.RpcError:
            return None

    async def _server_times_since(
        self, before: ServerTimes | None, chunks: int
    ) -> ServerTimes | None:
        if before is None:
            return None
        deadline = time.monotonic() + STATISTICS_PATIENCE_S
        while True:
            now = await self._server_times()
            if now is None or (now - before).requests >= chunks or time.monotonic() > deadline:
                return None if now is None else now - before
            await asyncio.sleep(0.01)


async def _has_ended(call: Any) -> bool:
    """Wait for a call; tell whether the server is done with it for certain."""
    waiting = asyncio.ensure_future(call.code())
    done, _ = await asyncio.wait([waiting], timeout=DRAIN_S)
    return bool(done) and waiting.result() not in UNFINISHED


async def _in_thread(function: Callable[..., T], *args: object) -> T:
    """Run a blocking step in a worker thread, to its end even if the task is cancelled.

    The job's files must not be closed while a thread still writes to them.
    """
    work = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
