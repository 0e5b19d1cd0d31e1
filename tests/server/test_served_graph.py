"""The graph behind Triton gives what the graph alone gives, and only what was asked for."""

import grpc
import numpy as np
import onnxruntime
import pytest
from tritonclient.grpc import service_pb2

from stemserve.separator import served_models
from stemserve.spec import INPUT_NAME
from stemserve.triton import CHANNEL_OPTIONS, Stub, infer_request, read_response


@pytest.fixture(scope="module")
def stub(server):
    with grpc.insecure_channel(server.url, options=CHANNEL_OPTIONS) as channel:
        yield Stub(channel)


@pytest.fixture(scope="module")
def spec(server):
    return {name: model.spec for name, _, model in served_models(server.url)}["spleeter_2stems"]


@pytest.fixture(scope="module")
def chunk(spec, song_samples):
    chunk = np.zeros(spec.tensor_dims, np.float32)
    chunk[:, spec.lead_samples : spec.lead_samples + song_samples.shape[1]] = song_samples
    return chunk


@pytest.fixture(scope="module")
def bare(repository):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        repository / "spleeter_2stems" / "1" / "model.onnx", options
    )


def test_served_equals_bare_graph(stub, spec, chunk, bare):
    reply = stub.ModelInfer(infer_request(spec, chunk, spec.stems, "1"), timeout=60)
    served = read_response(spec, reply, spec.stems)
    for stem, alone in zip(
        served, bare.run(list(spec.stems), {INPUT_NAME: chunk[None]}), strict=True
    ):
        np.testing.assert_array_equal(stem, alone[0])


def test_concurrent_requests_equal_single_ones(stub, spec, chunk, bare):
    """Requests that the dynamic batcher puts together do not mix."""
    chunks = [chunk * np.float32(gain) for gain in (1, 0.5, 0.25, 0.125)]
    calls = [
        stub.ModelInfer.future(infer_request(spec, one, spec.stems, str(i)), timeout=120)
        for i, one in enumerate(chunks)
    ]
    for one, call in zip(chunks, calls, strict=True):
        alone = bare.run(list(spec.stems), {INPUT_NAME: one[None]})
        for stem, expected in zip(
            read_response(spec, call.result(), spec.stems), alone, strict=True
        ):
            np.testing.assert_array_equal(stem, expected[0])


def test_only_requested_outputs_travel(stub, spec, chunk):
    both = stub.ModelInfer(infer_request(spec, chunk, spec.stems, "1"), timeout=60)
    for index, stem in enumerate(spec.stems):
        reply = stub.ModelInfer(infer_request(spec, chunk, [stem], "1"), timeout=60)
        assert [output.name for output in reply.outputs] == [stem]
        assert len(reply.raw_output_contents) == 1
        assert reply.ByteSize() < both.ByteSize() * 0.51
        assert reply.raw_output_contents[0] == both.raw_output_contents[index]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_samples_are_refused_alone(stub, spec, chunk, bad):
    poisoned = chunk.copy()
    poisoned[1, 1000] = bad
    chunks = [chunk, poisoned, chunk]
    calls = [
        stub.ModelInfer.future(infer_request(spec, one, spec.stems, str(i)), timeout=120)
        for i, one in enumerate(chunks)
    ]
    with pytest.raises(grpc.RpcError) as refused:
        calls[1].result()
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "NaN or infinite samples" in refused.value.details()
    for call in (calls[0], calls[2]):
        read_response(spec, call.result(), spec.stems)  # raises if a sample is not finite


def test_large_finite_samples_are_not_refused(stub, server):
    """The quick check by a sum of squares overflows here; the slow one must clear it."""
    identity = {name: model.spec for name, _, model in served_models(server.url)}["identity"]
    loud = np.full(identity.tensor_dims, 1e25, np.float32)
    reply = stub.ModelInfer(infer_request(identity, loud, ["same"], "1"), timeout=10)
    np.testing.assert_array_equal(read_response(identity, reply, ["same"])[0], loud)


def test_a_batch_in_one_request(stub, spec, chunk, bare):
    batch = np.stack([chunk, chunk[::-1] / 2])
    request = service_pb2.ModelInferRequest(model_name=spec.name)
    tensor = request.inputs.add(name=INPUT_NAME, datatype="FP32")
    tensor.shape.extend(batch.shape)
    request.raw_input_contents.append(batch.tobytes())
    reply = stub.ModelInfer(request, timeout=120)
    assert [output.name for output in reply.outputs] == list(spec.stems)  # all, in order
    vocals = np.frombuffer(reply.raw_output_contents[0], np.float32).reshape(batch.shape)
    expected = bare.run(["vocals"], {INPUT_NAME: batch})[0]
    # A batch of two may take other kernels than twice one: equal but for rounding.
    np.testing.assert_allclose(vocals, expected, atol=1e-5)


def test_wrong_shape_is_refused(stub, spec):
    request = infer_request(spec, np.zeros((2, 1000), np.float32), spec.stems, "1")
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(request, timeout=10)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_both_priorities_are_served(stub, spec, chunk):
    for level in (1, 2):
        request = infer_request(spec, chunk, ["vocals"], "1")
        request.parameters["priority"].uint64_param = level
        assert len(stub.ModelInfer(request, timeout=60).outputs) == 1
