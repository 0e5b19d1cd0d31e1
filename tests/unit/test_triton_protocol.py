import grpc
import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2, service_pb2

from stemserve import errors
from stemserve.errors import InvalidResponseError, ModelNotFoundError, UnknownStemError
from stemserve.triton import (
    ServerTimes,
    check_stems,
    default_model,
    first_step,
    infer_request,
    model_missing,
    read_response,
    served_error,
    served_model,
    target_of,
)
from stemserve_export.triton_config import ensemble_config, model_config

URL = "gpu-1:8001"
Group = model_config_pb2.ModelInstanceGroup


# --- addresses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("localhost:8001", "localhost:8001"),
        (" localhost:8001\n", "localhost:8001"),
        ("grpc://triton:8001", "triton:8001"),
        ("grpc://triton:8001/", "triton:8001"),
        ("10.0.0.1:1", "10.0.0.1:1"),
        ("[::1]:65535", "[::1]:65535"),
        ("dns:///triton.svc:8001", "dns:///triton.svc:8001"),
        ("ipv4:10.0.0.1:8001,10.0.0.2:8001", "ipv4:10.0.0.1:8001,10.0.0.2:8001"),
        ("ipv6:[::1]:8001", "ipv6:[::1]:8001"),
        ("unix:/run/triton.sock", "unix:/run/triton.sock"),
    ],
)
def test_target_of(url, target):
    assert target_of(url) == target


@pytest.mark.parametrize("url", ["http://localhost:8000", "https://triton/"])
def test_an_http_address(url):
    with pytest.raises(errors.ServerUnreachableError) as caught:
        target_of(url)
    assert str(caught.value) == (
        f"'{url}' is an HTTP address; expected the gRPC one as host:port (Triton's default gRPC "
        "port is 8001)."
    )


@pytest.mark.parametrize(
    "url", ["", "localhost", "localhost:", "localhost:grpc", "localhost:0", "localhost:65536",
            "localhost:8001/v2", "localhost:-1", "localhost:²", ":8001"]
)  # fmt: skip
def test_no_address(url):
    with pytest.raises(errors.ServerUnreachableError) as caught:
        target_of(url)
    assert str(caught.value) == (
        f"'{url}' is no address of a server; expected host:port, e.g. localhost:8001."
    )


# --- served models --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "device", "instances"),
    [
        ([], "cpu", 1),
        ([{"kind": Group.KIND_CPU, "count": 2}], "cpu", 2),
        ([{"kind": Group.KIND_AUTO, "count": 1}], "cpu", 1),
        ([{"kind": Group.KIND_AUTO, "count": 1, "gpus": [0]}], "gpu", 1),
        ([{"kind": Group.KIND_GPU, "count": 3, "gpus": [0, 1]}], "gpu", 6),
        ([{"kind": Group.KIND_CPU, "count": 1}, {"kind": Group.KIND_GPU, "count": 2}], "gpu", 3),
    ],
)
def test_device_and_instances_of_a_served_model(make_spec, groups, device, instances):
    spec = make_spec()
    config = model_config(spec)
    config.ClearField("instance_group")
    for group in groups:
        config.instance_group.add(**group)
    served = served_model(config)
    assert served.spec == spec
    assert (served.device, served.instances) == (device, instances)


@pytest.fixture
def ensemble(make_spec):
    """Configurations of a pair of specialists and of the model that joins them."""
    spec = make_spec(name="pair")
    parts = [make_spec(name=f"pair_{stem}", stems=(stem,)) for stem in spec.stems]
    return ensemble_config(spec, parts), [model_config(part) for part in parts]


@pytest.mark.parametrize(
    ("group", "device", "instances"),
    [
        ({"kind": Group.KIND_CPU, "count": 3}, "cpu", 3),
        ({"kind": Group.KIND_AUTO, "count": 2, "gpus": [0, 1]}, "gpu", 4),
    ],
)
def test_an_ensemble_runs_where_its_first_specialist_does(ensemble, group, device, instances):
    joined, parts = ensemble
    assert first_step(joined) == parts[0].name == "pair_vocals"
    parts[0].ClearField("instance_group")
    parts[0].instance_group.add(**group)
    served = served_model(joined, parts[0])
    assert (served.spec.name, served.spec.stems) == ("pair", ("vocals", "accompaniment"))
    assert (served.device, served.instances) == (device, instances)


def test_a_model_of_its_own_has_no_steps(make_spec):
    assert first_step(model_config(make_spec())) is None


def test_the_only_model_is_the_default(make_spec):
    assert default_model(URL, [model_config(make_spec())]) == "tiny"


def test_specialists_do_not_count_where_their_ensemble_is_served(ensemble):
    joined, parts = ensemble
    assert default_model(URL, [*parts, joined]) == "pair"
    assert default_model(URL, [parts[0]]) == "pair_vocals"
    with pytest.raises(ModelNotFoundError, match="serves pair_accompaniment, pair_vocals; choose"):
        default_model(URL, parts)


def test_no_default_among_several(ensemble, make_spec):
    joined, parts = ensemble
    with pytest.raises(ModelNotFoundError) as caught:
        default_model(URL, [model_config(make_spec()), joined, *parts])
    assert str(caught.value) == (
        "The server at gpu-1:8001 serves pair, tiny; choose one with --model."
    )


def test_no_default_where_nothing_is_served():
    with pytest.raises(ModelNotFoundError) as caught:
        default_model(URL, [])
    assert str(caught.value) == (
        "The server at gpu-1:8001 serves no model that is ready; export one with `stemserve "
        "export spleeter_2stems` and start it again."
    )


def test_a_missing_model_is_told_with_what_there_is():
    error = model_missing(URL, "x", ["a", "b"])
    assert type(error) is ModelNotFoundError
    assert str(error) == "The server at gpu-1:8001 has no model 'x'; it serves a, b."
    assert str(model_missing(URL, "x", [])) == (
        "The server at gpu-1:8001 has no model 'x'; it serves no model that is ready."
    )


def test_stems_are_asked_for_in_the_models_order(make_spec):
    spec = make_spec(stems=("vocals", "drums", "bass"))
    assert check_stems(spec, None) == ("vocals", "drums", "bass")
    assert check_stems(spec, ["bass", "vocals", "bass"]) == ("vocals", "bass")


@pytest.mark.parametrize(
    ("stems", "sentence"),
    [
        (["piano"], "Model 'tiny' has no stem 'piano'; it offers vocals, accompaniment."),
        (["vocals", ""], "Model 'tiny' has no stem ''; it offers vocals, accompaniment."),
        ([], "No stem was asked for; model 'tiny' offers vocals, accompaniment."),
    ],
)
def test_an_unknown_stem(make_spec, stems, sentence):
    with pytest.raises(UnknownStemError) as caught:
        check_stems(make_spec(), stems)
    assert str(caught.value) == sentence


# --- requests and answers -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire", "name", "dtype"), [("fp32", "FP32", np.float32), ("fp16", "FP16", np.float16)]
)
def test_infer_request(make_spec, noise, wire, name, dtype):
    spec = make_spec(wire_dtype=wire)
    chunk = noise(64).T  # not contiguous
    request = infer_request(spec, chunk, ("accompaniment",), "song-7")
    assert request.model_name == "tiny"
    assert request.id == "song-7"
    [tensor] = request.inputs
    assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("mixture", name, [1, 2, 64])
    assert [output.name for output in request.outputs] == ["accompaniment"]
    [raw] = request.raw_input_contents
    np.testing.assert_array_equal(np.frombuffer(raw, dtype).reshape(2, 64), chunk.astype(dtype))


def answer(spec, stems, dtype=np.float32, shape=None):
    """A server's answer; stems by name, [2, 64] each."""
    response = service_pb2.ModelInferResponse(model_name=spec.name, model_version="3")
    for name, samples in stems.items():
        tensor = response.outputs.add(name=name, datatype="FP32")
        tensor.shape.extend(shape or (1, *samples.shape))
        response.raw_output_contents.append(samples.astype(dtype).tobytes())
    return response


@pytest.mark.parametrize(("wire", "dtype"), [("fp32", np.float32), ("fp16", np.float16)])
def test_read_response_gives_stems_in_the_order_asked_for(make_spec, noise, wire, dtype):
    spec = make_spec(wire_dtype=wire)
    vocals, rest = noise(64, seed=1).T, noise(64, seed=2).T
    response = answer(spec, {"accompaniment": rest, "vocals": vocals}, dtype)
    outputs = read_response(spec, response, ("vocals", "accompaniment"))
    for output, expected in zip(outputs, (vocals, rest), strict=True):
        assert output.dtype == np.float32
        np.testing.assert_array_equal(output, expected.astype(dtype))


def test_samples_whose_squares_overflow_are_finite(make_spec):
    spec = make_spec()
    loud = np.full((2, 64), 1e30, np.float32)
    [output] = read_response(spec, answer(spec, {"vocals": loud}), ("vocals",))
    np.testing.assert_array_equal(output, loud)


def bad_answer(spec, response, stems=("vocals",)):
    with pytest.raises(InvalidResponseError) as caught:
        read_response(spec, response, stems)
    return str(caught.value)


def test_an_answer_without_a_stem(make_spec, noise):
    spec = make_spec()
    response = answer(spec, {"vocals": noise(64).T})
    assert bad_answer(spec, response, ("vocals", "accompaniment")) == (
        "Model 'tiny' answered without the stem 'accompaniment' that was asked for; check that "
        "server and model are of the same release."
    )


def test_an_answer_without_data(make_spec, noise):
    spec = make_spec()
    response = answer(spec, {"vocals": noise(64).T})
    response.ClearField("raw_output_contents")
    assert "answered with 0 bytes for 'vocals'; expected 512 bytes" in bad_answer(spec, response)


@pytest.mark.parametrize(
    ("samples", "dtype", "shape", "told"),
    [
        (np.zeros((2, 0)), np.float32, (1, 2, 64), "0 bytes"),
        (np.zeros((2, 64)), np.float16, None, "256 bytes"),
        (np.zeros((2, 64)), np.float64, None, "1024 bytes"),
    ],
)
def test_an_answer_of_another_size(make_spec, samples, dtype, shape, told):
    spec = make_spec()
    assert bad_answer(spec, answer(spec, {"vocals": samples}, dtype, shape)) == (
        f"Model 'tiny' answered with {told} for 'vocals'; expected 512 bytes of fp32. A server "
        "environment with numpy 2 does this."
    )


@pytest.mark.parametrize(
    ("samples", "shape", "told"),
    [
        (np.zeros((2, 0)), None, "[1, 2, 0]"),
        (np.zeros((2, 64)), (2, 64), "[2, 64]"),
        (np.zeros((64, 2)), None, "[1, 64, 2]"),
    ],
)
def test_an_answer_of_another_shape(make_spec, samples, shape, told):
    spec = make_spec()
    assert bad_answer(spec, answer(spec, {"vocals": samples}, np.float32, shape)) == (
        f"Model 'tiny' answered with the shape {told} for 'vocals'; expected [1, 2, 64]. Check "
        "that server and model are of the same release."
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("wire", "dtype"), [("fp32", np.float32), ("fp16", np.float16)])
def test_an_answer_that_is_not_finite(make_spec, noise, value, wire, dtype):
    spec = make_spec(wire_dtype=wire)
    samples = noise(64).T.copy()
    samples[1, 63] = value
    assert bad_answer(spec, answer(spec, {"vocals": samples}, dtype)) == (
        "Model 'tiny' answered with NaN or infinite samples in 'vocals'; verify the exported model."
    )


# --- gRPC errors ----------------------------------------------------------------------------


class FakeRpcError(grpc.RpcError):
    def __init__(self, code, details):
        self._code, self._details = code, details

    def code(self):
        return self._code

    def details(self):
        return self._details


Status = grpc.StatusCode
QUEUE_FULL = "[request id: x] Exceeds maximum queue size"
QUEUE_TIMEOUT = "Request timeout expired"


@pytest.mark.parametrize(
    ("code", "details", "midway", "kind", "sentence"),
    [
        (
            Status.UNAVAILABLE, "connection refused", False, errors.ServerUnreachableError,
            "No server answers at gpu-1:8001 (connection refused); start one with `stemserve "
            "serve`, or check --url.",
        ),
        (
            Status.UNAVAILABLE, None, False, errors.ServerUnreachableError,
            "No server answers at gpu-1:8001 (unavailable); start one with `stemserve serve`, or "
            "check --url.",
        ),
        (
            Status.UNAVAILABLE, "Socket closed ", True, errors.ServerLostError,
            "The server at gpu-1:8001 went away while the track was being separated (Socket "
            "closed); nothing was kept of this track. Start it again and repeat.",
        ),
        (
            Status.UNAVAILABLE, QUEUE_FULL, True, errors.OverloadedError,
            f"The server at gpu-1:8001 is overloaded ({QUEUE_FULL}); try again later, or send "
            "less at once.",
        ),
        (
            Status.UNAVAILABLE, QUEUE_TIMEOUT, True, errors.OverloadedError,
            f"The server at gpu-1:8001 is overloaded ({QUEUE_TIMEOUT}); try again later, or send "
            "less at once.",
        ),
        (
            Status.DEADLINE_EXCEEDED, "Deadline Exceeded", False, errors.ServerUnreachableError,
            "Nothing answers at gpu-1:8001 in time; check the address, the firewall and the "
            "server.",
        ),
        (
            Status.DEADLINE_EXCEEDED, "Deadline Exceeded", True, errors.DeadlineError,
            "The server at gpu-1:8001 did not answer in time; it hangs or is overloaded. Raise "
            "the time-out or look at the server.",
        ),
        (
            Status.UNIMPLEMENTED, "Method not found", False, errors.ServerError,
            "The server at gpu-1:8001 is no Triton inference server (Method not found); expected "
            "Triton's gRPC port (8001 by default).",
        ),
        (
            Status.NOT_FOUND, "unknown model 'x'", True, errors.ModelNotFoundError,
            "The server at gpu-1:8001 says: unknown model 'x'.",
        ),
        (
            Status.INVALID_ARGUMENT, "bad shape", True, errors.ServerError,
            "The server at gpu-1:8001 refused the request (INVALID_ARGUMENT: bad shape).",
        ),
        (
            Status.INTERNAL, "", True, errors.ServerError,
            "The server at gpu-1:8001 refused the request (INTERNAL: ).",
        ),
    ],
)  # fmt: skip
def test_served_error(code, details, midway, kind, sentence):
    error = served_error(FakeRpcError(code, details), URL, midway=midway)
    assert type(error) is kind
    assert str(error) == sentence


@pytest.mark.parametrize("code", list(Status))
@pytest.mark.parametrize("midway", [False, True])
def test_every_code_has_a_sentence(code, midway):
    error = served_error(FakeRpcError(code, "why"), URL, midway=midway)
    assert isinstance(error, errors.ServerError)
    assert str(error).endswith(".")
    assert URL in str(error)


# --- statistics -----------------------------------------------------------------------------


def statistics(*versions):
    response = service_pb2.ModelStatisticsResponse()
    for count, queue, read, infer, write in versions:
        stats = response.model_stats.add(name="tiny").inference_stats
        stats.success.count = count
        stats.success.ns = 10**12  # not what is asked for
        stats.queue.ns = queue
        stats.compute_input.ns = read
        stats.compute_infer.ns = infer
        stats.compute_output.ns = write
    return response


def test_server_times_are_summed_over_versions():
    times = ServerTimes.from_statistics(statistics((2, 10, 1, 20, 3), (5, 100, 2, 200, 4)))
    assert times == ServerTimes(requests=7, queue_ns=110, compute_ns=230)
    assert ServerTimes.from_statistics(statistics()) == ServerTimes(0, 0, 0)


def test_the_times_of_a_run_are_a_difference():
    assert ServerTimes(9, 800, 70) - ServerTimes(4, 300, 60) == ServerTimes(5, 500, 10)
