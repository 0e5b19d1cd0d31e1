"""The three that are compared: the torch module, its graph, and the server; all on whole chunks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2

from stemserve.errors import GateError, InvalidResponseError
from stemserve.spec import INPUT_NAME, ModelSpec
from stemserve.triton import (
    CHANNEL_OPTIONS,
    WIRE_DTYPES,
    Stub,
    bare_request,
    served_error,
    target_of,
)

if TYPE_CHECKING:
    from torch import nn

Samples = npt.NDArray[np.float32]

# A batch of a hybrid model on a slow CPU.
REQUEST_TIMEOUT_S: Final = 600.0
# What Triton and its backends answer a request with that they refuse.
_REFUSALS: Final = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)


def run_torch(module: nn.Module, batch: Samples) -> list[Samples]:
    """Run the module: [B, channels, chunk_samples] float32 -> one of the same shape per stem."""
    import torch

    with torch.inference_mode():
        return [stem.float().numpy() for stem in module(torch.from_numpy(batch))]


class GraphRunner:
    """A graph in ONNX Runtime on the CPU, with the session options that we serve with.

    Raises:
        GateError: ONNX Runtime does not take the graph.
    """

    def __init__(self, spec: ModelSpec, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its errors have no common class
            raise GateError(
                f"ONNX Runtime does not take '{path}' ({_first_line(error)})."
            ) from None
        self._spec = spec

    def __call__(self, batch: Samples) -> list[Samples]:
        """Run the graph: [B, channels, chunk_samples] float32 -> one such per stem.

        Raises:
            GateError: it fails.
        """
        feed = {INPUT_NAME: batch.astype(WIRE_DTYPES[self._spec.wire_dtype])}
        try:
            outputs = self._session.run(list(self._spec.stems), feed)
        except Exception as error:
            raise GateError(
                f"The graph of '{self._spec.name}' fails on a batch of {len(batch)} "
                f"({_first_line(error)})."
            ) from None
        return [output.astype(np.float32, copy=False) for output in outputs]


class ServedRunner:
    """A model of a running server, asked directly; a context manager.

    Args:
        url: gRPC address.
        spec: of the model.
    """

    def __init__(self, url: str, spec: ModelSpec) -> None:
        self._url = url
        self._spec = spec
        self._channel = grpc.insecure_channel(target_of(url), options=CHANNEL_OPTIONS)
        self._stub = Stub(self._channel)

    def __enter__(self) -> ServedRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def __call__(self, batch: Samples, stems: Sequence[str] | None = None) -> list[Samples]:
        """Infer [B, channels, chunk_samples] float32 -> one such per stem asked for.

        Raises:
            GateError: an output is missing or of another shape.
            ServerError: the server does not answer, or refuses.
        """
        wanted = self._spec.stems if stems is None else tuple(stems)
        try:
            response = self._infer(batch, wanted)
        except grpc.RpcError as error:
            raise served_error(error, self._url) from None
        return self._outputs(response, len(batch), wanted)

    def refusal(self, batch: Samples) -> str:
        """Say how a request that should be refused is refused; empty if it is not.

        One stem is asked for: where several steps of an ensemble refuse one request, Triton 24.10
        counts it as in flight for ever, and cannot be stopped before its exit timeout.
        """
        stems = self._spec.stems[:1]
        try:
            response = self._infer(batch, stems)
        except grpc.RpcError as error:
            if error.code() in _REFUSALS:
                return f"the server refuses: {error.details()}"
            raise served_error(error, self._url) from None
        outputs = self._outputs(response, len(batch), stems)
        if all(np.isfinite(output).all() for output in outputs):
            return ""
        return f"the client refuses the answer, as {InvalidResponseError.__name__}"

    def executions(self) -> dict[str, int]:
        """Return the number of inferences so far, by model."""
        try:
            answer = self._stub.ModelStatistics(
                service_pb2.ModelStatisticsRequest(), timeout=REQUEST_TIMEOUT_S
            )
        except grpc.RpcError as error:
            raise served_error(error, self._url) from None
        return {str(model.name): int(model.inference_count) for model in answer.model_stats}

    def server_version(self) -> str:
        """Return the server's name and version."""
        try:
            answer = self._stub.ServerMetadata(
                service_pb2.ServerMetadataRequest(), timeout=REQUEST_TIMEOUT_S
            )
        except grpc.RpcError as error:
            raise served_error(error, self._url) from None
        return f"{answer.name} {answer.version}"

    def _infer(self, batch: Samples, stems: Sequence[str]) -> Any:
        request = bare_request(self._spec, stems, "verify")
        request.inputs[0].shape[0] = len(batch)
        samples = np.ascontiguousarray(batch, dtype=WIRE_DTYPES[self._spec.wire_dtype])
        request.raw_input_contents.append(samples.tobytes())
        return self._stub.ModelInfer(request, timeout=REQUEST_TIMEOUT_S)

    def _outputs(self, response: Any, count: int, stems: Sequence[str]) -> list[Samples]:
        wire = WIRE_DTYPES[self._spec.wire_dtype]
        shape = (count, *self._spec.tensor_dims)
        size = int(np.prod(shape)) * np.dtype(wire).itemsize
        names = [output.name for output in response.outputs]
        # Fewer contents than names are a wrong answer, which is told below.
        found = dict(zip(names, response.raw_output_contents, strict=False))
        for stem in stems:
            if len(found.get(stem, b"")) != size:
                raise GateError(
                    f"The server answered with {len(found.get(stem, b''))} bytes for '{stem}' of "
                    f"'{self._spec.name}'; expected {size}."
                )
        return [
            np.frombuffer(found[stem], wire).reshape(shape).astype(np.float32) for stem in stems
        ]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
