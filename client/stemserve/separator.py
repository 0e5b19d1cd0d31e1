"""Separator: the public API, blocking."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from tritonclient.grpc import model_config_pb2, service_pb2

from stemserve import metrics
from stemserve.errors import SpecError, StemserveError
from stemserve.result import Result
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

# Enough to keep a server busy while one answer is joined and written; more only adds memory
# (a two-stem chunk is 4 MB on its way out and 8 MB on its way back).
DEFAULT_IN_FLIGHT: Final = 4
DEFAULT_CHUNK_TIMEOUT_S: Final = 120.0
# Statistics may trail the last answer by one request.
STATISTICS_PATIENCE_S: Final = 0.25
# How long a call is waited for whose answer nobody wants any more, before its memory is unmapped.
DRAIN_S: Final = 30.0
# How calls end that the server may still be working on.
UNFINISHED: Final = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class InFlight:
    """A request on its way.

    Attributes:
        call: the gRPC call.
        model: name of the model that is called.
        ticket: of the request.
    """

    call: Any
    model: str
    ticket: Ticket
    sent_s: float = field(default_factory=time.monotonic)
    done_s: float | None = None

    def __post_init__(self) -> None:
        metrics.IN_FLIGHT.labels(self.model).inc()
        self.call.add_done_callback(self._done)

    def _done(self, _call: object) -> None:
        self.done_s = time.monotonic()
        metrics.IN_FLIGHT.labels(self.model).dec()

    @property
    def round_trip_s(self) -> float:
        """Seconds from sending to the answer."""
        return (self.done_s or time.monotonic()) - self.sent_s


def _config_of(stub: Stub, model: str) -> model_config_pb2.ModelConfig:
    request = service_pb2.ModelConfigRequest(name=model)
    return stub.ModelConfig(request, timeout=CONNECT_TIMEOUT_S).config


def served_models(url: str) -> list[tuple[str, str, ServedModel | SpecError]]:
    """Return name, version and description of every model that is ready on a server.

    A model without a spec that this client reads comes with the error that says why.

    Raises:
        ServerUnreachableError, ServerError: the server does not answer as a Triton.
    """
    found: list[tuple[str, str, ServedModel | SpecError]] = []
    with grpc.insecure_channel(target_of(url), options=CHANNEL_OPTIONS) as channel:
        stub = Stub(channel)
        try:
            for name, version in sorted(_list_ready(stub).items()):
                config = _config_of(stub, name)
                step = first_step(config)
                placed = _config_of(stub, step) if step else None
                try:
                    found.append((name, version, served_model(config, placed)))
                except SpecError as error:
                    found.append((name, version, error))
        except grpc.RpcError as error:
            raise served_error(error, url) from None
    return found


def _list_ready(stub: Stub) -> dict[str, str]:
    request = service_pb2.RepositoryIndexRequest(ready=True)
    index = stub.RepositoryIndex(request, timeout=CONNECT_TIMEOUT_S)
    return {model.name: model.version for model in index.models}


def _has_ended(call: Any) -> bool:
    """Wait for a call; tell whether the server is done with it for certain."""
    try:
        call.exception(timeout=DRAIN_S)
    except (grpc.FutureTimeoutError, grpc.FutureCancelledError):
        return False
    return call.code() not in UNFINISHED


@contextmanager
def counted_failures(model: str) -> Iterator[None]:
    """Count a track that fails, by the class of the error."""
    try:
        yield
    except StemserveError as error:
        metrics.FAILURES.labels(model, type(error).__name__).inc()
        raise


class Separator:
    """Separates tracks through one model of a Triton server.

    Thread-safe: one Separator may be shared, each call keeps its own window of chunks in flight.

    Args:
        url: ``host:port`` of Triton's gRPC endpoint, or a gRPC target (``dns:///…``, ``ipv4:…``).
        model: name of the model; may be left out if the server has only one.
        in_flight: chunks of a track that are sent before the first answer is awaited. Bounds the
            memory of a call.
        shared_memory: hand samples over through system shared memory instead of inside the
            messages. For a server on the same machine with the same ``/dev/shm`` only; spares most
            of the transport's CPU time.
        chunk_timeout_s: seconds within which each chunk must be answered, queueing included.

    Raises:
        ServerUnreachableError: nothing answers at the address.
        ModelNotFoundError: the server does not have the model, or several and none is named.
        SpecError: the model is not one that stemserve exported, or from a newer one.
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
        self._in_flight = in_flight
        self._slots = in_flight + 1 if shared_memory else 0  # one more is made ready
        self._chunk_timeout_s = chunk_timeout_s
        self._channel = grpc.insecure_channel(target_of(url), options=CHANNEL_OPTIONS)
        self._stub = Stub(self._channel)
        try:
            self._served = self._look_up(model)
        except BaseException:
            self._channel.close()
            raise

    def __enter__(self) -> Separator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        self._channel.close()

    @property
    def spec(self) -> ModelSpec:
        """The served model's description of itself."""
        return self._served.spec

    @property
    def device(self) -> str:
        """``gpu`` or ``cpu``: where the server runs the model."""
        return self._served.device

    def separate(
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
        """Separate one file into ``out_dir/<track>/<stem>.<ext>`` and ``metadata.json``.

        Args:
            path: the input (wav, flac, ogg, mp3, aiff; 8 to 192 kHz; mono to 7.1).
            out_dir: where the track's folder is made.
            stems: stems to ask for; only they travel. All for None.
            file_format: ``wav`` (32-bit float), ``flac`` (24 bit) or ``mp3`` (320 kbit/s).
            sample_rate: of the stems, Hz; the input's own for None, which gives stems of exactly
                the input's length.
            normalize: one gain for all stems such that the loudest peaks at -1 dBFS.
            overlap: share of a chunk in common with its neighbour, in [0, 1); the model's default
                for None.
            shifts: passes with random delays of up to 0.5 s to average over, each of which costs as
                much as one without; 0 for one pass without delay.
            shift_seed: seed of the delays.
            progress: called with (chunks done, chunks expected) after each chunk.

        Raises:
            AudioInputError: the input is missing, unreadable, not audio, truncated, empty, …
            OutputError: the stems cannot be written.
            ServerError: the server is lost, overloaded, or answers wrongly.
        """
        options = TrackOptions(
            stems, file_format, sample_rate, normalize, overlap, shifts, shift_seed
        )
        source = Path(path)
        with (
            counted_failures(self.spec.name),
            TrackJob(
                source, track_folder(source, Path(out_dir)), self._served, options, self._slots
            ) as job,
            self._mapped(job.shared),
        ):
            before = self._server_times()
            self._run(job, progress)
            job.latency.server = self._server_times_since(before, len(job.latency.round_trips_s))
            return job.finish()

    def _run(self, job: TrackJob, progress: Progress | None) -> None:
        window: deque[InFlight] = deque()
        try:
            while True:
                following = job.next_request()
                if following is not None and len(window) < self._in_flight:
                    self._send(job, window, following)
                    continue
                if not window:
                    return
                self._take_turn(job, window, following)
                if progress is not None:
                    progress(len(job.latency.round_trips_s), job.expected_chunks)
        except grpc.RpcError as error:
            raise served_error(error, self.url, midway=True) from None
        finally:
            for waiting in window:
                if job.shared is None:
                    waiting.call.cancel()
                else:  # the server must not be left writing to memory that goes away
                    job.shared.in_doubt |= not _has_ended(waiting.call)

    @contextmanager
    def _mapped(self, shared: SharedTensors | None) -> Iterator[None]:
        """Have the server map a track's shared memory, and unmap it in the end."""
        if shared is None:
            yield
            return
        try:
            self._stub.SystemSharedMemoryRegister(shared.registration(), timeout=CONNECT_TIMEOUT_S)
        except grpc.RpcError as error:
            raise cannot_share(self.url, error.details() or "") from None
        shared.registered()
        try:
            yield
        finally:
            if not shared.in_doubt:
                with suppress(grpc.RpcError):
                    self._stub.SystemSharedMemoryUnregister(
                        shared.unregistration(), timeout=CONNECT_TIMEOUT_S
                    )

    def _send(self, job: TrackJob, window: deque[InFlight], following: Request) -> None:
        request, ticket = following
        if job.shared is not None:  # an interrupt may leave a call that no window knows of
            job.shared.in_doubt = True
        call = self._stub.ModelInfer.future(request, timeout=self._chunk_timeout_s)
        window.append(InFlight(call, self.spec.name, ticket))
        if job.shared is not None:
            job.shared.in_doubt = False

    def _take_turn(self, job: TrackJob, window: deque[InFlight], following: Request | None) -> None:
        """Await the oldest answer, send the next chunk, and only then work on the answer.

        A server that had batched the whole window would stand idle during that work.
        """
        response = window[0].call.result()  # a call that fails stays in the window
        oldest = window.popleft()
        if following is not None:
            self._send(job, window, following)
        job.accept(response, oldest.ticket, oldest.round_trip_s)

    def _look_up(self, model: str | None) -> ServedModel:
        try:
            if model is None:
                ready = [_config_of(self._stub, name) for name in _list_ready(self._stub)]
                model = default_model(self.url, ready)
            try:
                config = _config_of(self._stub, model)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.NOT_FOUND:
                    raise
                raise model_missing(self.url, model, sorted(_list_ready(self._stub))) from None
            step = first_step(config)
            return served_model(config, _config_of(self._stub, step) if step else None)
        except grpc.RpcError as error:
            raise served_error(error, self.url) from None

    def _server_times(self) -> ServerTimes | None:
        try:
            return ServerTimes.from_statistics(
                self._stub.ModelStatistics(
                    service_pb2.ModelStatisticsRequest(name=self.spec.name),
                    timeout=CONNECT_TIMEOUT_S,
                )
            )
        except grpc.RpcError:  # a gateway may route inference only; the split is then not told
            return None

    def _server_times_since(self, before: ServerTimes | None, chunks: int) -> ServerTimes | None:
        if before is None:
            return None
        deadline = time.monotonic() + STATISTICS_PATIENCE_S
        while True:
            now = self._server_times()
            if now is None or (now - before).requests >= chunks or time.monotonic() > deadline:
                return None if now is None else now - before
            time.sleep(0.01)
