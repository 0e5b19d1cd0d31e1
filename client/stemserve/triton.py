"""Triton's gRPC protocol as stemserve speaks it: requests, replies, errors.

Sync and async clients share everything but the waiting: both build their messages and read their
answers here, over the same generated stub (``grpc`` or ``grpc.aio`` channel).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from stemserve.errors import (
    DeadlineError,
    InvalidResponseError,
    ModelNotFoundError,
    OverloadedError,
    ServerError,
    ServerLostError,
    ServerUnreachableError,
    UnknownStemError,
)
from stemserve.spec import INPUT_NAME, ModelSpec

Samples = npt.NDArray[np.float32]
Stub = service_pb2_grpc.GRPCInferenceServiceStub

CONNECT_TIMEOUT_S: Final = 10.0

# tritonclient's own defaults are lost as soon as options are given, hence the message limits.
# gRPC re-resolves at most every 30 s and backs off up to 120 s by default: pods come and go faster.
CHANNEL_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.dns_min_time_between_resolutions_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

WIRE_DTYPES: Final[dict[str, type[np.floating[Any]]]] = {"fp32": np.float32, "fp16": np.float16}
_WIRE_NAMES: Final = {"fp32": "FP32", "fp16": "FP16"}
_OVERLOAD_MARKS: Final = ("exceeds maximum queue size", "request timeout expired")


def target_of(url: str) -> str:
    """Return the gRPC target of an address.

    Accepts ``host:port`` and gRPC's own schemes (``dns:///``, ``ipv4:``, ``ipv6:``, ``unix:``);
    strips ``grpc://``.

    Raises:
        ServerUnreachableError: the address is of the HTTP port, or has no port.
    """
    target = url.strip().removeprefix("grpc://").rstrip("/")
    if target.startswith(("http://", "https://")):
        raise ServerUnreachableError(
            f"'{url}' is an HTTP address; expected the gRPC one as host:port (Triton's default "
            "gRPC port is 8001)."
        )
    if target.startswith(("dns:", "ipv4:", "ipv6:", "unix:")):
        return target
    host, _, port = target.rpartition(":")
    digits = port.isascii() and port.isdigit()
    if not host or not digits or not 0 < int(port) < 65536:
        raise ServerUnreachableError(
            f"'{url}' is no address of a server; expected host:port, e.g. localhost:8001."
        )
    return target


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as a server offers it.

    Attributes:
        spec: the model's own description.
        device: ``gpu`` if any instance runs on one, ``cpu`` otherwise.
        instances: number of instances over all groups.
    """

    spec: ModelSpec
    device: str
    instances: int


def first_step(config: model_config_pb2.ModelConfig) -> str | None:
    """Return the name of the first model of an ensemble, None for a model of its own."""
    if not config.HasField("ensemble_scheduling"):
        return None
    return str(config.ensemble_scheduling.step[0].model_name)


def served_model(
    config: model_config_pb2.ModelConfig, step: model_config_pb2.ModelConfig | None = None
) -> ServedModel:
    """Read a served configuration; raises SpecError as :meth:`ModelSpec.from_config`.

    Args:
        config: the model's.
        step: of the first model of an ensemble, which says where that runs.
    """
    groups = (step or config).instance_group
    on_gpu = any(
        group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
        or (group.kind == model_config_pb2.ModelInstanceGroup.KIND_AUTO and group.gpus)
        for group in groups
    )
    instances = sum(group.count * max(1, len(group.gpus)) for group in groups)
    return ServedModel(ModelSpec.from_config(config), "gpu" if on_gpu else "cpu", instances or 1)


def check_stems(spec: ModelSpec, stems: Sequence[str] | None) -> tuple[str, ...]:
    """Return the stems to ask for, in the model's order; all of them for None.

    Raises:
        UnknownStemError: the model has no stem of that name, or none is left.
    """
    if stems is None:
        return spec.stems
    offered = ", ".join(spec.stems)
    unknown = [stem for stem in stems if stem not in spec.stems]
    if unknown:
        raise UnknownStemError(
            f"Model '{spec.name}' has no stem '{unknown[0]}'; it offers {offered}."
        )
    if not stems:
        raise UnknownStemError(f"No stem was asked for; model '{spec.name}' offers {offered}.")
    return tuple(stem for stem in spec.stems if stem in stems)


def bare_request(
    spec: ModelSpec, stems: Sequence[str], request_id: str
) -> service_pb2.ModelInferRequest:
    """Build the request for one chunk, but for its samples."""
    request = service_pb2.ModelInferRequest(model_name=spec.name, id=request_id)
    tensor = request.inputs.add(name=INPUT_NAME, datatype=_WIRE_NAMES[spec.wire_dtype])
    tensor.shape.extend((1, *spec.tensor_dims))
    for stem in stems:
        request.outputs.add(name=stem)
    return request


def infer_request(
    spec: ModelSpec, chunk: Samples, stems: Sequence[str], request_id: str
) -> service_pb2.ModelInferRequest:
    """Build the request for one chunk [channels, chunk_samples] float32."""
    request = bare_request(spec, stems, request_id)
    samples = np.ascontiguousarray(chunk, dtype=WIRE_DTYPES[spec.wire_dtype])
    request.raw_input_contents.append(samples.tobytes())
    return request


def read_response(
    spec: ModelSpec, response: service_pb2.ModelInferResponse, stems: Sequence[str]
) -> list[Samples]:
    """Return one array [channels, chunk_samples] float32 per stem.

    Raises:
        InvalidResponseError: a stem is missing, of another shape or dtype, or not finite.
    """
    wire = WIRE_DTYPES[spec.wire_dtype]
    size = int(np.prod(spec.tensor_dims)) * np.dtype(wire).itemsize
    outputs: list[Samples] = []
    for stem in stems:
        position = output_position(spec, response, stem)
        contents = response.raw_output_contents
        raw = contents[position] if position < len(contents) else b""  # a copy, not a view
        if len(raw) != size:
            raise InvalidResponseError(
                f"Model '{spec.name}' answered with {len(raw)} bytes for '{stem}'; expected "
                f"{size} bytes of {spec.wire_dtype}. A server environment with numpy 2 does this."
            )
        samples = np.frombuffer(raw, dtype=wire).reshape(spec.tensor_dims)
        outputs.append(checked_samples(spec, stem, samples))
    return outputs


def output_position(spec: ModelSpec, response: service_pb2.ModelInferResponse, stem: str) -> int:
    """Return where a stem is among a response's outputs.

    Raises:
        InvalidResponseError: it is not there, or of another shape.
    """
    expected = [1, *spec.tensor_dims]
    for position, output in enumerate(response.outputs):
        if output.name == stem:
            if list(output.shape) != expected:
                raise InvalidResponseError(
                    f"Model '{spec.name}' answered with the shape {list(output.shape)} for "
                    f"'{stem}'; expected {expected}. Check that server and model are of the same "
                    "release."
                )
            return position
    raise InvalidResponseError(
        f"Model '{spec.name}' answered without the stem '{stem}' that was asked for; check that "
        "server and model are of the same release."
    )


def checked_samples(spec: ModelSpec, stem: str, samples: npt.NDArray[Any]) -> Samples:
    """Return a stem's samples as float32; raises InvalidResponseError unless all are finite."""
    samples = samples.astype(np.float32, copy=False)
    # The sum of squares is finite unless a sample is not (or squares overflow).
    if not np.isfinite(np.vdot(samples, samples)) and not np.isfinite(samples).all():
        raise InvalidResponseError(
            f"Model '{spec.name}' answered with NaN or infinite samples in '{stem}'; verify the "
            "exported model."
        )
    return samples


def served_error(error: grpc.RpcError, url: str, *, midway: bool = False) -> ServerError:
    """Turn a gRPC error into one of ours.

    Args:
        error: what the call raised (sync or aio).
        url: the address that was called, for the sentence.
        midway: whether the server had answered before.
    """
    code, details = error.code(), (error.details() or "").strip()
    text = details.lower()
    if code == grpc.StatusCode.UNAVAILABLE:
        if any(mark in text for mark in _OVERLOAD_MARKS):
            return OverloadedError(
                f"The server at {url} is overloaded ({details}); try again later, or send less "
                "at once."
            )
        if midway:
            return ServerLostError(
                f"The server at {url} went away while the track was being separated "
                f"({details}); nothing was kept of this track. Start it again and repeat."
            )
        return ServerUnreachableError(
            f"No server answers at {url} ({details or 'unavailable'}); start one with "
            "`stemserve serve`, or check --url."
        )
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        if midway:
            return DeadlineError(
                f"The server at {url} did not answer in time; it hangs or is overloaded. Raise "
                "the time-out or look at the server."
            )
        return ServerUnreachableError(
            f"Nothing answers at {url} in time; check the address, the firewall and the server."
        )
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return ServerError(
            f"The server at {url} is no Triton inference server ({details}); expected Triton's "
            "gRPC port (8001 by default)."
        )
    if code == grpc.StatusCode.NOT_FOUND:
        return ModelNotFoundError(f"The server at {url} says: {details}.")
    return ServerError(f"The server at {url} refused the request ({code.name}: {details}).")


def model_missing(url: str, model: str, served: Sequence[str]) -> ModelNotFoundError:
    """Build the error for a model that a server does not have."""
    offer = f"it serves {', '.join(served)}" if served else "it serves no model that is ready"
    return ModelNotFoundError(f"The server at {url} has no model '{model}'; {offer}.")


def default_model(url: str, configs: Sequence[model_config_pb2.ModelConfig]) -> str:
    """Return the only served model; raises ModelNotFoundError if there is another number.

    Args:
        url: of the server, for errors.
        configs: of all models that are ready; those that an ensemble joins do not count.
    """
    joined = {step.model_name for config in configs for step in config.ensemble_scheduling.step}
    served = sorted(str(config.name) for config in configs if config.name not in joined)
    if len(served) == 1:
        return served[0]
    if not served:
        raise ModelNotFoundError(
            f"The server at {url} serves no model that is ready; export one with `stemserve "
            "export spleeter_2stems` and start it again."
        )
    raise ModelNotFoundError(
        f"The server at {url} serves {', '.join(served)}; choose one with --model."
    )


@dataclass(frozen=True, slots=True)
class ServerTimes:
    """Cumulative times of a model from Triton's statistics; subtract two to get a run's.

    Attributes:
        requests: successful requests.
        queue_ns: time spent in the scheduler's queue.
        compute_ns: time spent in input copies, inference and output copies.
    """

    requests: int
    queue_ns: int
    compute_ns: int

    @classmethod
    def from_statistics(cls, response: service_pb2.ModelStatisticsResponse) -> ServerTimes:
        """Sum over the versions in a ModelStatistics answer."""
        requests = queue = compute = 0
        for model in response.model_stats:
            stats = model.inference_stats
            requests += stats.success.count
            queue += stats.queue.ns
            compute += stats.compute_input.ns + stats.compute_infer.ns + stats.compute_output.ns
        return cls(requests, queue, compute)

    def __sub__(self, other: ServerTimes) -> ServerTimes:
        return ServerTimes(
            self.requests - other.requests,
            self.queue_ns - other.queue_ns,
            self.compute_ns - other.compute_ns,
        )
