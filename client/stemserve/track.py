"""One track on its way through a server, without the waiting.

:class:`TrackJob` decodes and cuts the next chunk when asked, takes the answers back in order,
joins them and writes them. Who sends the requests and waits for the answers (sync or async) is
not its concern.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2

import stemserve
from stemserve import metrics
from stemserve.audio import AudioReader
from stemserve.errors import EmptyAudioError, OutputError
from stemserve.overlap import ChunkPlan
from stemserve.result import (
    LatencyLog,
    Result,
    as_dicts,
    input_warnings,
    output_warnings,
)
from stemserve.shifts import Passes, shift_delays
from stemserve.stem_files import Format, StemProperties, TrackWriter
from stemserve.tensors import InlineTensors, Request, SharedTensors, Tensors, Ticket
from stemserve.triton import ServedModel, check_stems

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TrackOptions:
    """How a track is to be separated.

    Attributes:
        stems: stems to ask for; all that the model has for None.
        file_format: ``wav`` (32-bit float), ``flac`` (24 bit) or ``mp3`` (320 kbit/s).
        sample_rate: of the stems, Hz; the input's own for None.
        normalize: one gain for all stems such that the loudest peaks at -1 dBFS.
        overlap: share of a chunk in common with its neighbour; the model's default for None.
        shifts: passes with random delays of up to 0.5 s to average over; 0 for one without delay.
        shift_seed: seed of the delays.
    """

    stems: Sequence[str] | None = None
    file_format: Format = "wav"
    sample_rate: int | None = None
    normalize: bool = False
    overlap: float | None = None
    shifts: int = 0
    shift_seed: int = 0


@dataclass(frozen=True, slots=True)
class _TrackLevel:
    """Mean and standard deviation that a model with normalization "track" wants removed."""

    mean: float = 0.0
    scale: float = 1.0


class TrackJob:
    """Separates one file into a folder of stems; a context manager that leaves nothing half done.

    Args:
        path: the input file.
        folder: destination of the stems.
        served: the model as the server offers it.
        options: how to separate.
        shared_slots: requests in flight whose samples go through shared memory, to be registered
            with the server by the caller; 0 for none.

    Raises:
        AudioInputError, OutputError, UnknownStemError, SpecError: see each.
    """

    def __init__(
        self,
        path: Path,
        folder: Path,
        served: ServedModel,
        options: TrackOptions,
        shared_slots: int = 0,
    ) -> None:
        self._started = time.monotonic()
        self._served = served
        self._spec = served.spec
        self._options = options
        self.stems = check_stems(served.spec, options.stems)
        self.plan = ChunkPlan.from_spec(served.spec, options.overlap)
        self.latency = LatencyLog()
        self.model_version = ""
        self._folder = folder
        self._energy = 0.0  # of the mixture at the model's rate
        self._model_samples = 0
        self._sent = 0
        if folder.resolve() == path.resolve():
            raise OutputError(f"The stems of '{path}' would replace it; choose another --out.")
        with ExitStack() as stack:
            self._reader = stack.enter_context(AudioReader(path))
            properties = self._reader.properties
            self._out_rate = options.sample_rate or properties.sample_rate
            self._level = self._measure_level(path)
            self._writer = stack.enter_context(
                TrackWriter(
                    folder,
                    self.stems,
                    channels=served.spec.channels,
                    model_rate=served.spec.sample_rate,
                    sample_rate=self._out_rate,
                    file_format=options.file_format,
                    announced_frames=self._frames_out(self._reader.announced_frames),
                    normalize=options.normalize,
                )
            )
            self.shared: SharedTensors | None = None
            self._tensors: Tensors = InlineTensors(served.spec, self.stems)
            if shared_slots:
                self.shared = SharedTensors(served.spec, self.stems, shared_slots)
                stack.callback(self.shared.close)
                self._tensors = self.shared
            self._passes = Passes(
                self._mixture(),
                self.plan,
                shift_delays(options.shifts, served.spec.sample_rate, options.shift_seed),
                len(self.stems),
                served.spec.channels,
            )
            self._chunks = self._passes.chunks()
            self._resources = stack.pop_all()

    def __enter__(self) -> TrackJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; remove what was written unless :meth:`finish` has moved it."""
        self._resources.close()

    @cached_property
    def expected_chunks(self) -> int:
        """Number of chunks by the header's length (for progress)."""
        announced = self._reader.announced_frames
        length = math.ceil(announced * self._spec.sample_rate / self._reader.properties.sample_rate)
        return self._passes.expected_chunks(max(1, length))

    def next_request(self) -> Request | None:
        """Decode, resample and cut the next chunk; None after the last one."""
        chunk = next(self._chunks, None)
        if chunk is None:
            return None
        self._sent += 1
        track = self._folder.name.encode("utf-8", "replace").decode()  # protobuf takes UTF-8 only
        request_id = f"{track}-{self._sent}"
        return self._tensors.request(chunk.samples, chunk.track_samples, request_id)

    def accept(
        self,
        response: service_pb2.ModelInferResponse,
        ticket: Ticket,
        round_trip_s: float,
    ) -> None:
        """Join and write a chunk's stems; chunks must come in order.

        Args:
            response: the server's answer.
            ticket: of the request that it answers.
            round_trip_s: seconds from sending to having the answer.

        Raises:
            InvalidResponseError, OutputError: see each.
        """
        self.latency.round_trips_s.append(round_trip_s)
        metrics.CHUNK_SECONDS.labels(self._spec.name).observe(round_trip_s)
        self.model_version = response.model_version
        outputs = self._tensors.receive(response, ticket)
        blocks = self._passes.add(outputs, ticket.track_samples)
        del outputs
        self._tensors.release(ticket)
        if self._spec.normalization == "track":
            blocks = [block * self._level.scale + self._level.mean for block in blocks]
        self._writer.write(blocks)

    def finish(self) -> Result:
        """Complete the files, move them into place and report."""
        properties = self._reader.properties
        if not self.latency.round_trips_s:
            raise EmptyAudioError(
                f"'{properties.path}' is too short: less than one sample is left at the model's "
                f"{self._spec.sample_rate} Hz."
            )
        frames = self._frames_out(properties.frames)
        stems = self._writer.finish(frames)
        metadata = self._metadata(stems, frames)
        paths = self._writer.commit(metadata)
        metrics.AUDIO_SECONDS.labels(self._spec.name).inc(properties.duration_s)
        metrics.TRACK_SECONDS.labels(self._spec.name).observe(time.monotonic() - self._started)
        return Result(self._folder, paths, metadata)

    def _mixture(self) -> Iterator[Samples]:
        for block in self._reader.blocks(self._spec.sample_rate):
            self._energy += float(np.vdot(block, block))
            self._model_samples += block.shape[1]
            if self._spec.normalization == "track":
                yield (block - np.float32(self._level.mean)) / np.float32(self._level.scale)
            else:
                yield block

    def _measure_level(self, path: Path) -> _TrackLevel:
        """Read the track once more if the model wants to be fed normalized audio.

        As ``demucs.apply``'s callers do: mean and unbiased standard deviation of the mono mixture,
        1e-8 added to the latter.
        """
        if self._spec.normalization != "track":
            return _TrackLevel()
        count, total, squares = 0, 0.0, 0.0
        with AudioReader(path) as reader:
            for block in reader.blocks(self._spec.sample_rate):
                mono = block.mean(axis=0, dtype=np.float64)
                count += len(mono)
                total += float(mono.sum())
                squares += float(mono @ mono)
        mean = total / max(1, count)
        variance = max(0.0, squares - count * mean * mean) / max(1, count - 1)
        return _TrackLevel(mean, math.sqrt(variance) + 1e-8)

    def _frames_out(self, frames_in: int) -> int:
        rate_in = self._reader.properties.sample_rate
        return max(1, round(frames_in * self._out_rate / rate_in))

    def _metadata(self, stems: dict[str, StemProperties], frames: int) -> dict[str, Any]:
        properties, spec = self._reader.properties, self._spec
        runtime_s = time.monotonic() - self._started
        mean_square = self._energy / max(1, self._model_samples * spec.channels)
        mixture_rms_db = 10 * math.log10(mean_square) if mean_square > 0 else -math.inf
        warnings = input_warnings(properties, spec)
        silent = any(warning.code == "silent_input" for warning in warnings)
        warnings += output_warnings(stems, mixture_rms_db, silent=silent)
        return {
            "track": self._folder.name,
            "model_name": spec.name,
            "model_version": self.model_version,
            "checkpoint": {
                "files": [
                    {"source": file.source, "sha256": file.sha256} for file in spec.checkpoint.files
                ],
                "licence": spec.checkpoint.licence,
                "commercial_use": spec.checkpoint.commercial_use,
            },
            "options": dict(spec.options),
            "precision": spec.precision,
            "stemserve_version": stemserve.__version__,
            "device": self._served.device,
            "transport": "grpc" if self.shared is None else "shared memory",
            "runtime_seconds": round(runtime_s, 3),
            "x_realtime": round(properties.duration_s / runtime_s, 2),
            "input": {
                "path": properties.path,
                "duration_seconds": round(properties.duration_s, 6),
                "frames": properties.frames,
                "sample_rate": properties.sample_rate,
                "channels": properties.channels,
                "peak": round(properties.peak, 6),
            },
            "output": {
                "format": self._options.file_format,
                "sample_rate": self._out_rate,
                "channels": spec.channels,
                "frames": frames,
                "gain_db": round(20 * math.log10(self._writer.gain), 3),
            },
            "stems": {
                name: {
                    "file": stem.file,
                    "peak": round(stem.peak, 6),
                    "rms_db": round(stem.rms_db, 2) if stem.rms_db > -math.inf else None,
                    "clipped_samples": stem.clipped_samples,
                }
                for name, stem in stems.items()
            },
            "chunks": {
                "count": len(self.latency.round_trips_s),
                "samples": self.plan.chunk,
                "seconds": round(self.plan.chunk / spec.sample_rate, 3),
                "stride": self.plan.stride,
                "shifts": self._options.shifts,
                "joined_by": "crossfade" if self.plan.crossfade else "published framing",
            },
            "latency_ms": self.latency.summary_ms(),
            "client_peak_rss_mb": round(peak_rss_mb(), 1),
            "warnings": as_dicts(warnings),
        }


def track_folder(path: Path, out_dir: Path) -> Path:
    """Return the folder of a track's stems, ``out_dir/<track>``.

    Raises:
        OutputError: the file's name less its extension is no name of a folder.
    """
    if path.stem in ("", ".", ".."):
        raise OutputError(
            f"'{path}' gives no name for the folder of its stems; rename it, e.g. to song.wav."
        )
    return out_dir / path.stem


def peak_rss_mb() -> float:
    """Peak resident memory of this process so far, in MB (10^6 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
