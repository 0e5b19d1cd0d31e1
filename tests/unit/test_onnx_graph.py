"""torch modules become graphs that Triton and TensorRT take; anything else is refused."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from support.toy_family import GAINS, Gains, gains_graph

from stemserve.errors import ExportError
from stemserve_export.gate.export_check import graph_parity_db
from stemserve_export.gate.measures import snr_db
from stemserve_export.gate.thresholds import MIN_PARITY_DB
from stemserve_export.onnx_graph import check_graph, export_graph

# --- the rules of a graph -------------------------------------------------------------------


def refused_graph(model, spec):
    with pytest.raises(ExportError) as caught:
        check_graph(model, spec)
    return str(caught.value)


def test_a_good_graph_is_accepted(make_spec):
    check_graph(gains_graph(make_spec()), make_spec())
    check_graph(gains_graph(make_spec(), opset=20), make_spec())


def test_operators_off_the_list(make_spec):
    nodes = [
        helper.make_node("ScatterND", ["mixture", "indices", "updates"], ["scattered"]),
        helper.make_node("DFT", ["signal", "length"], ["spectrum"]),
    ]
    initializers = [
        numpy_helper.from_array(np.array([[0, 0, 0]], np.int64), "indices"),
        numpy_helper.from_array(np.zeros(1, np.float32), "updates"),
        numpy_helper.from_array(np.zeros((1, 8, 1), np.float32), "signal"),
        numpy_helper.from_array(np.array(8, np.int64), "length"),
    ]
    model = gains_graph(make_spec(), nodes=nodes, initializers=initializers)
    assert refused_graph(model, make_spec()) == (
        "The graph of 'tiny' has the operators DFT, ScatterND, which are not on the list that "
        "TensorRT is known to take; rewrite the module, or extend the list in onnx_graph.py with "
        "proof."
    )


def test_operators_of_another_domain(make_spec):
    nodes = [helper.make_node("FusedMatMul", ["mixture"], ["x"], domain="com.microsoft")]
    opsets = [helper.make_opsetid("com.microsoft", 1)]
    model = gains_graph(make_spec(), nodes=nodes, opsets=opsets)
    assert refused_graph(model, make_spec()) == (
        "The graph of 'tiny' uses operators of 'com.microsoft', which Triton does not have; "
        "rewrite the module without them."
    )


@pytest.mark.parametrize("opset", [21, 22])
def test_an_opset_that_is_too_new(make_spec, opset):
    assert refused_graph(gains_graph(make_spec(), opset=opset), make_spec()) == (
        f"The graph of 'tiny' has opset {opset}; at most 20 is served by Triton 24.10."
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_axis_that_is_fixed(make_spec, batch):
    assert refused_graph(gains_graph(make_spec(), batch=batch), make_spec()) == (
        f"'mixture' of the graph of 'tiny' has the shape [{batch}, 2, 64]; expected a dynamic "
        "batch axis and [2, 64]."
    )


def test_a_chunk_of_another_length(make_spec):
    model = gains_graph(make_spec(), dims=(2, 65))
    assert "has the shape ['batch', 2, 65]; expected" in refused_graph(model, make_spec())


def test_outputs_of_another_name_or_order(make_spec):
    model = gains_graph(make_spec(), outputs=("accompaniment", "vocals"))
    assert refused_graph(model, make_spec()) == (
        "The graph of 'tiny' has the outputs ('accompaniment', 'vocals'); expected ('vocals', "
        "'accompaniment')."
    )


def test_an_input_of_another_name(make_spec):
    model = gains_graph(make_spec(), input="audio")
    for node in model.graph.node:
        node.input[0] = "audio"
    assert refused_graph(model, make_spec()) == (
        "The graph of 'tiny' has the inputs ('audio',); expected ('mixture',)."
    )


@pytest.mark.parametrize(
    ("wire", "dtype"), [("fp16", TensorProto.FLOAT), ("fp32", TensorProto.FLOAT16)]
)
def test_tensors_of_another_dtype_than_the_wire(make_spec, wire, dtype):
    """config.pbtxt would say one dtype and the graph have the other: Triton refuses to load it."""
    spec = make_spec(wire_dtype=wire)
    assert "dtype" in refused_graph(gains_graph(spec, dtype=dtype), spec)


def test_a_graph_that_is_no_graph(make_spec):
    model = gains_graph(make_spec())
    model.graph.node[0].input[0] = "nowhere"
    assert "'tiny'" in refused_graph(model, make_spec())


def test_export_graph(make_spec, tmp_path):
    """The real thing, once: names, axes, limits, and the spec inside."""
    spec = make_spec(chunk_samples=128)
    path = tmp_path / "model.onnx"
    export_graph(Gains(), spec, path)
    model = onnx.load(path)
    check_graph(model, spec)
    assert model.ir_version <= 10
    assert model.opset_import[0].version <= 20
    assert {prop.key: prop.value for prop in model.metadata_props} == spec.to_parameters()
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]  # no external data
    assert min(graph_parity_db(Gains(), spec, path).values()) >= MIN_PARITY_DB


def run(path, spec, mixture):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return dict(zip(spec.stems, session.run(list(spec.stems), {"mixture": mixture}), strict=True))


def test_the_batch_axis_of_an_exported_graph_is_free(make_spec, tmp_path, noise):
    spec = make_spec(chunk_samples=128, max_batch_size=8)
    export_graph(Gains(), spec, tmp_path / "model.onnx")
    for batch in (1, 3, 8):
        mixture = noise(batch * 128).reshape(batch, 2, 128)
        for stem, samples in run(tmp_path / "model.onnx", spec, mixture).items():
            np.testing.assert_allclose(samples, mixture * np.float32(GAINS[stem]), rtol=1e-6)


class Careful(torch.nn.Module):
    """What would overflow, or lose most of its digits, in float16: the wire must not reach it."""

    def forward(self, mixture):
        assert mixture.dtype == torch.float32
        loud = mixture * 1e6
        return loud * 3e-7, mixture * 0.5 + (mixture * 1e-7) * 2e6


def test_half_precision_on_the_wire_alone(make_spec, tmp_path, noise):
    """Half the bytes at the boundaries; inside, everything is computed as without it."""
    spec = make_spec(chunk_samples=4000, wire_dtype="fp16")
    path = tmp_path / "model.onnx"
    check_graph(export_graph(Careful(), spec, path), spec)
    mixture = noise(8000).T.reshape(2, 2, 4000).astype(np.float16)
    for stem, samples in run(path, spec, mixture).items():
        assert samples.dtype == np.float16
        exact = mixture.astype(np.float64) * {"vocals": 0.3, "accompaniment": 0.7}[stem]
        # One rounding to 11 bits at the output: 20 log10(2^11 sqrt(3)) = 71 dB for noise whose
        # mantissas are spread evenly.
        assert 70 < snr_db(exact, samples.astype(np.float64)) < 80
        np.testing.assert_allclose(samples, exact, rtol=2**-11, atol=2**-25)


def test_the_wire_makes_no_difference_to_the_spec_in_the_graph(make_spec, tmp_path):
    spec = make_spec(wire_dtype="fp16", precision="fp16", tail="centred")
    model = export_graph(Gains(), spec, tmp_path / "model.onnx")
    assert {prop.key: prop.value for prop in model.metadata_props} == spec.to_parameters()
    values = [*model.graph.input, *model.graph.output]
    assert {value.type.tensor_type.elem_type for value in values} == {TensorProto.FLOAT16}


# --- the numbers of a graph -----------------------------------------------------------------


@pytest.fixture
def saved_graph(make_spec, tmp_path):
    """Save a graph whose second stem has passed through more nodes."""
    spec = make_spec(chunk_samples=1000)

    def save(*nodes, gain=0.25, initializers=()):
        path = tmp_path / "model.onnx"
        model = gains_graph(spec, {**GAINS, "vocals": gain}, initializers=initializers)
        if nodes:
            model.graph.node[1].output[0] = "rest"
            model.graph.node.extend(nodes)
        onnx.save(model, path)
        return spec, path

    return save


def test_a_graph_that_does_what_torch_does(saved_graph):
    spec, path = saved_graph()
    parity = graph_parity_db(Gains(), spec, path)
    assert parity.keys() == {"vocals", "accompaniment"}
    assert min(parity.values()) >= 120


def test_a_graph_that_differs(saved_graph):
    spec, path = saved_graph(gain=0.2501)
    with pytest.raises(ExportError) as caught:
        graph_parity_db(Gains(), spec, path)
    # 20 log10(0.25 / 0.0001)
    assert str(caught.value) == (
        "The graph of 'tiny' gives 'vocals' at 68.0 dB of what PyTorch gives; expected at least 90 "
        "dB. The export is wrong: please report it with the versions of torch and onnxruntime."
    )


def on_silence(value):
    """Nodes that replace the second stem's samples where the mixture is silent."""
    return (
        [
            helper.make_node("Equal", ["mixture", "zero"], ["silent"]),
            helper.make_node("Where", ["silent", "value", "rest"], ["accompaniment"]),
        ],
        [
            numpy_helper.from_array(np.array(0, np.float32), "zero"),
            numpy_helper.from_array(np.array(value, np.float32), "value"),
        ],
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.01])
def test_a_graph_that_is_wrong_on_silence_alone(saved_graph, value):
    nodes, initializers = on_silence(value)
    spec, path = saved_graph(*nodes, initializers=initializers)
    with pytest.raises(ExportError, match=r"gives 'accompaniment' at .* dB of what PyTorch"):
        graph_parity_db(Gains(), spec, path)


def test_the_silent_half_of_a_chunk_is_compared(saved_graph):
    """A graph that is right everywhere passes the same way."""
    nodes, initializers = on_silence(0.0)
    spec, path = saved_graph(*nodes, initializers=initializers)
    assert graph_parity_db(Gains(), spec, path)["accompaniment"] >= 120


def test_parity_is_not_told_without_onnx_runtime(saved_graph, monkeypatch):
    spec, path = saved_graph(gain=0.9)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert graph_parity_db(Gains(), spec, path) is None
