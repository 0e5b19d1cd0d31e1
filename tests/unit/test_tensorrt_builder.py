"""The adapter of TensorRT's builder: with a stand-in everywhere, with TensorRT-RTX where it is."""

import importlib
import importlib.util
import json

import onnx
import pytest
from onnx import TensorProto, helper
from support import fake_tensorrt
from support.models import identity_spec, write_identity

from stemserve.errors import MissingExtraError
from stemserve_export.tensorrt import builder
from stemserve_export.tensorrt.builder import BuildSettings, GraphContract, build_plan, load_api
from stemserve_export.tensorrt.errors import TensorRTError

REAL = ["tensorrt_rtx"] if importlib.util.find_spec("tensorrt_rtx") else []


@pytest.fixture(params=["stand-in", *REAL])
def api(request):
    """TensorRT's API, and the settings that let it build without a GPU."""
    return fake_tensorrt.make() if request.param == "stand-in" else load_api(request.param)


@pytest.fixture
def settings(api):
    def make(**choices):
        ahead = {"compute_capabilities": ["8.6"]} if api.__name__ == "tensorrt_rtx" else {}
        return BuildSettings(**ahead, **choices)

    return make


@pytest.fixture(params=["fp32", "fp16"])
def model(request, tmp_path):
    spec = identity_spec(chunk_samples=256, wire_dtype=request.param)
    write_identity(tmp_path, spec)
    return spec, tmp_path / "identity" / "1" / "model.onnx"


def test_builds_a_plan(api, settings, model):
    spec, graph = model
    plan = build_plan(api, graph, GraphContract.of(spec), settings())
    assert len(plan.data) > 100
    assert plan.layers is not None and plan.layers >= 2
    assert plan.build_seconds >= 0


def test_what_the_builder_is_told(model):
    spec, graph = model
    api = fake_tensorrt.make()
    told = json.loads(
        build_plan(api, graph, GraphContract.of(spec), BuildSettings(workspace_bytes=1 << 30)).data
    )
    assert told["strongly_typed"]
    assert not told["tf32"]
    assert told["profile"] == {"mixture": [[1, 2, 256], [2, 2, 256], [4, 2, 256]]}
    assert told["limits"] == {"WORKSPACE": 1 << 30}
    allowed = build_plan(api, graph, GraphContract.of(spec), BuildSettings(tf32=True))
    assert json.loads(allowed.data)["tf32"]


def test_a_contract_survives_json(model):
    from dataclasses import asdict

    contract = GraphContract.of(model[0])
    assert GraphContract.from_record(json.loads(json.dumps(asdict(contract)))) == contract


def test_a_refused_operator_is_named(tmp_path):
    spec = identity_spec(chunk_samples=256)
    write_identity(tmp_path, spec)
    graph = tmp_path / "identity/1/model.onnx"
    model = onnx.load(graph)
    model.graph.node[1].name = "halve"
    onnx.save(model, graph)
    api = fake_tensorrt.make(refuses=("Mul",))
    with pytest.raises(TensorRTError, match=r"10\.5\.0.*'identity'.*'halve' \(operator Mul\): no"):
        build_plan(api, graph, GraphContract.of(spec), BuildSettings())


def test_a_failed_build_says_why(model):
    spec, graph = model
    api = fake_tensorrt.make(fails="Myelin: out of\n memory")
    with pytest.raises(TensorRTError, match=r"cannot build 'identity': Myelin: out of memory\."):
        build_plan(api, graph, GraphContract.of(spec), BuildSettings())


@pytest.mark.parametrize(
    "changes",
    [{"stems": ("same", "other")}, {"stems": ("same",)}, {"chunk_samples": 128}, {"channels": 1}],
    ids=str,
)
def test_a_graph_of_another_spec_is_refused(api, settings, model, changes):
    spec, graph = model
    other = identity_spec(**{"chunk_samples": 256, "wire_dtype": spec.wire_dtype, **changes})
    with pytest.raises(TensorRTError, match="Export the model again"):
        build_plan(api, graph, GraphContract.of(other), settings())


def test_a_graph_of_another_wire_is_refused(api, settings, model):
    spec, graph = model
    wire = "fp16" if spec.wire_dtype == "fp32" else "fp32"
    other = identity_spec(chunk_samples=256, wire_dtype=wire)
    with pytest.raises(TensorRTError, match=f"of {wire} with the shape"):
        build_plan(api, graph, GraphContract.of(other), settings())


def test_a_missing_graph(api, settings, tmp_path):
    with pytest.raises(TensorRTError, match=r"no graph '.*none\.onnx'"):
        build_plan(api, tmp_path / "none.onnx", GraphContract.of(identity_spec()), settings())


def test_the_timing_cache_is_read_and_kept(model, tmp_path):
    spec, graph = model
    api = fake_tensorrt.make()
    file = tmp_path / "new folder" / "timing"
    settings = BuildSettings(timing_cache=file)
    plans = [build_plan(api, graph, GraphContract.of(spec), settings) for _ in range(3)]
    assert [json.loads(plan.data)["cache"] for plan in plans] == ["", "+", "++"]
    file.write_bytes(b"other GPU")
    plan = build_plan(api, graph, GraphContract.of(spec), settings)
    assert json.loads(plan.data)["cache"] == ""
    assert file.read_bytes() == b"+"


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"stemserve\[tensorrt-check\]"):
        load_api("tensorrt_rtx")
    with pytest.raises(MissingExtraError, match="tensorrt-cu12=="):
        load_api("tensorrt")


def test_a_package_that_does_not_load(tmp_path, monkeypatch):
    (tmp_path / "tensorrt.py").write_text("raise OSError('libcudart.so.12: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(TensorRTError, match="libcudart"):
        load_api("tensorrt")


if REAL:  # what only the real package can show

    def test_an_operator_that_tensorrt_lacks_is_named(tmp_path):
        spec = identity_spec(chunk_samples=256, stems=("same",))
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            [
                helper.make_node("Unsqueeze", ["mixture", "axis"], ["one"]),
                helper.make_node("DFT", ["one"], ["spectrum"], name="transform", axis=2),
                helper.make_node("ReduceMax", ["spectrum", "axis"], ["same"], keepdims=0),
            ],
            "dft",
            [value("mixture", TensorProto.FLOAT, ["batch", 2, 256])],
            [value("same", TensorProto.FLOAT, ["batch", 2, 256])],
            [helper.make_tensor("axis", TensorProto.INT64, [1], [3])],
        )
        path = tmp_path / "model.onnx"
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
            path,
        )
        with pytest.raises(TensorRTError, match=r"does not take the graph of 'identity'.*DFT"):
            build_plan(
                load_api("tensorrt_rtx"),
                path,
                GraphContract.of(spec),
                BuildSettings(compute_capabilities=["8.6"]),
            )

    @pytest.mark.filterwarnings(
        "ignore:Use Deprecated:DeprecationWarning"
    )  # nothing is timed there
    def test_the_timing_cache_of_tensorrt_itself(model, tmp_path):
        spec, graph = model
        file = tmp_path / "timing"
        settings = BuildSettings(timing_cache=file, compute_capabilities=["8.6"])
        for _ in range(2):
            build_plan(load_api("tensorrt_rtx"), graph, GraphContract.of(spec), settings)
            assert file.stat().st_size > 0

    def test_unknown_compute_capability(model):
        spec, graph = model
        api = load_api("tensorrt_rtx")
        assert "8.6" in builder.known_compute_capabilities(api)
        assert "12.0" in builder.known_compute_capabilities(api)
        settings = BuildSettings(compute_capabilities=["3.5"])
        with pytest.raises(TensorRTError, match=r"compute capability 3\.5; it knows .*8\.6"):
            build_plan(api, graph, GraphContract.of(spec), settings)
