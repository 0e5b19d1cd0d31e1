"""What is asked of a server: are its stems those of the CPU, and how fast is it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from stemserve.errors import ServerError
from stemserve.spec import INPUT_NAME, ModelSpec
from stemserve_export.gate.measures import snr_db

_WIRE: Final = {"fp32": np.float32, "fp16": np.float16}
_WARM_UP: Final = 2
_LEAST_REQUESTS: Final = 3
_REQUEST_LIMIT_S: Final = 300.0
Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast batches of one size are computed.

    Attributes:
        batch_size: chunks in a request, and in an execution.
        compute_ms: the server's mean time in the model per batch, copies to and from the GPU
            included.
        x_realtime: seconds of audio per second, while the server computes.
        client_ms: median time of a request for the client, gRPC included.
        requests: how many were measured.
    """

    batch_size: int
    compute_ms: float
    x_realtime: float
    client_ms: float
    requests: int


def batch_sizes(spec: ModelSpec) -> list[int]:
    """Powers of two up to the largest batch, and that one."""
    powers = [2**power for power in range(spec.max_batch_size.bit_length())]
    return sorted({*powers, spec.max_batch_size})


def example_chunks(spec: ModelSpec, count: int, audio: Path | None = None) -> Array:
    """Return chunks to send, ``[count, channels, chunk]`` float32.

    They come from the middle of an audio file at the model's sample rate, or are seeded notes
    over noise. The last one falls silent half-way: masks and normalisations divide by levels.
    """
    samples = count * spec.chunk_samples
    if audio is None:
        track = _notes(samples, spec.channels, spec.sample_rate)
    else:
        import soundfile

        with soundfile.SoundFile(audio) as file:
            file.seek(max(0, (file.frames - samples) // 2))
            track = file.read(samples, dtype="float32", always_2d=True).T
        track = np.resize(track, (spec.channels, samples))  # repeated where it is too short
    chunks = track.reshape(spec.channels, count, spec.chunk_samples).transpose(1, 0, 2).copy()
    chunks[-1, :, spec.chunk_samples // 2 :] = 0
    return chunks.astype(np.float32)


def _notes(samples: int, channels: int, sample_rate: int) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng(0)
    seconds = np.arange(samples) / sample_rate
    track = 0.01 * rng.standard_normal((channels, samples))
    for index in range(channels):
        for frequency, decay in zip(rng.uniform(60, 8000, 16), rng.uniform(1, 6, 16), strict=True):
            envelope = np.exp(-decay * ((seconds * rng.uniform(0.5, 3)) % 1.0))
            track[index] += 0.05 * envelope * np.sin(2 * np.pi * frequency * seconds)
    return track


def cpu_stems(spec: ModelSpec, graph: Path, chunks: Array) -> dict[str, Array]:
    """Compute the stems with ONNX Runtime on the CPU, ``[count, channels, chunk]`` each."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    wire = _WIRE[spec.wire_dtype]
    answers = [
        session.run(list(spec.stems), {INPUT_NAME: chunk[None].astype(wire)}) for chunk in chunks
    ]
    return {
        stem: np.concatenate([answer[index] for answer in answers]).astype(np.float32)
        for index, stem in enumerate(spec.stems)
    }


class ServedModel:
    """A model on a server; a context manager."""

    def __init__(self, url: str, spec: ModelSpec) -> None:
        self._client = InferenceServerClient(url)
        self._spec = spec

    def __enter__(self) -> ServedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def stems(self, batch: Array) -> dict[str, Array]:
        """Separate ``[B, channels, chunk]``; one array of that shape per stem.

        Raises:
            ServerError: the server answers with an error, or not in time.
        """
        samples = batch.astype(_WIRE[self._spec.wire_dtype])
        mixture = InferInput(INPUT_NAME, samples.shape, np_to_triton_dtype(samples.dtype))
        mixture.set_data_from_numpy(samples)
        wanted = [InferRequestedOutput(stem) for stem in self._spec.stems]
        with _sentences(self._spec.name):
            answer = self._client.infer(
                self._spec.name, [mixture], outputs=wanted, client_timeout=_REQUEST_LIMIT_S
            )
        return {stem: answer.as_numpy(stem).astype(np.float32) for stem in self._spec.stems}

    def parity_db(self, chunks: Array, expected: dict[str, Array]) -> dict[str, float]:
        """Compare with the expected stems, one by one and in the largest batch.

        Returns:
            The lower SNR of the two, in dB, by stem; minus infinity if a sample is not finite.
        """
        single = [self.stems(chunk[None]) for chunk in chunks]
        repeats = -(-self._spec.max_batch_size // len(chunks))
        full = np.concatenate([chunks] * repeats)[: self._spec.max_batch_size]
        together = self.stems(full)
        parity = {}
        for stem, want in expected.items():
            alone = np.concatenate([answer[stem] for answer in single])
            want_full = np.concatenate([want] * repeats)[: self._spec.max_batch_size]
            parity[stem] = min(snr_db(want, alone), snr_db(want_full, together[stem]))
        return parity

    def speed(self, chunks: Array, batch_size: int, seconds: float) -> Speed:
        """Send batches of one size one after the other for so many seconds."""
        batch = np.concatenate([chunks] * -(-batch_size // len(chunks)))[:batch_size]
        for _ in range(_WARM_UP):
            self.stems(batch)
        before = self._computed(batch_size)
        walls: list[float] = []
        start = time.perf_counter()
        while len(walls) < _LEAST_REQUESTS or time.perf_counter() - start < seconds:
            sent = time.perf_counter()
            self.stems(batch)
            walls.append(time.perf_counter() - sent)
        executions, nanoseconds = self._computed(batch_size, before[0] + len(walls))
        compute_s = (nanoseconds - before[1]) / 1e9 / (executions - before[0])
        audio_s = batch_size * self._spec.chunk_samples / self._spec.sample_rate
        return Speed(
            batch_size=batch_size,
            compute_ms=round(1000 * compute_s, 2),
            x_realtime=round(audio_s / compute_s, 1),
            client_ms=round(1000 * float(np.median(walls)), 2),
            requests=len(walls),
        )

    def _computed(self, batch_size: int, executions: int = 0) -> tuple[int, int]:
        """Executions of that batch size so far, and the nanoseconds that they took together.

        The statistics can trail the last answer: they are asked until they hold as many.
        """
        deadline = time.monotonic() + 5
        while True:
            with _sentences(self._spec.name):
                statistics = self._client.get_inference_statistics(self._spec.name)
            count = nanoseconds = 0
            for entry in statistics.model_stats[0].batch_stats:
                if entry.batch_size == batch_size:
                    count = entry.compute_infer.count
                    parts = (entry.compute_input, entry.compute_infer, entry.compute_output)
                    nanoseconds = sum(part.ns for part in parts)
            if count >= executions:
                return count, nanoseconds
            if time.monotonic() > deadline:
                raise ServerError(
                    f"The server counts {count} executions of '{self._spec.name}' in batches of "
                    f"{batch_size}; expected {executions}. Is something else batching or sending?"
                )
            time.sleep(0.02)


@contextlib.contextmanager
def _sentences(model: str) -> Iterator[None]:
    try:
        yield
    except InferenceServerException as error:
        raise ServerError(f"The server fails on '{model}': {error}.") from None
