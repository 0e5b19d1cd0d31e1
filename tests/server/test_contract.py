"""One spec, five readers: graph, TensorRT profile, config.pbtxt, served config and chunk plan."""

from pathlib import Path

import onnx
import pytest

from stemserve import Separator
from stemserve.overlap import ChunkPlan
from stemserve.repository import read_config
from stemserve.spec import ModelSpec
from stemserve_export.catalog import find_model, load_catalog
from stemserve_export.exporter import model_spec
from stemserve_export.triton_config import config_text

ROOT = Path(__file__).parents[2]
MODEL = "spleeter_2stems"


@pytest.fixture(scope="module")
def spec():
    return model_spec(find_model(MODEL))


@pytest.fixture(scope="module")
def graph(repository):
    return onnx.load(repository / MODEL / "1" / "model.onnx")


def shape(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_graph_follows_the_spec(graph, spec):
    assert [value.name for value in graph.graph.input] == list(spec.input_names)
    assert [value.name for value in graph.graph.output] == list(spec.output_names)
    for value in (*graph.graph.input, *graph.graph.output):
        batch, *dims = shape(value)
        assert isinstance(batch, str)
        assert tuple(dims) == spec.tensor_dims
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert {entry.key: entry.value for entry in graph.metadata_props} == spec.to_parameters()


def test_graph_is_servable_by_a_two_year_old_triton(graph):
    assert graph.ir_version <= 10
    assert [(opset.domain, opset.version <= 20) for opset in graph.opset_import] == [("", True)]


def test_profile_follows_the_spec(spec):
    profile = spec.batch_profile
    assert [profile[point][1:] for point in ("min", "opt", "max")] == [spec.tensor_dims] * 3
    assert profile["min"][0] == 1 <= profile["opt"][0] <= profile["max"][0] == spec.max_batch_size


def test_config_follows_the_spec(repository, spec):
    assert ModelSpec.from_config(read_config(repository, MODEL)) == spec


def test_served_config_follows_the_spec(server, spec):
    with Separator(server.url, MODEL) as separator:
        assert separator.spec == spec


def test_chunk_plan_follows_the_spec(spec):
    plan = ChunkPlan.from_spec(spec)
    assert (plan.chunk, plan.lead, plan.edge) == (527360, 4096, 3072)
    # The published framing: segments of 512 frames of hop 1024 side by side.
    assert plan.stride == 512 * 1024
    assert not plan.crossfade
    assert ChunkPlan.from_spec(spec, 0.25).crossfade


def catalogue_configs():
    """Text of ``config.pbtxt`` by model, specialists included."""
    configs = {}
    for entry in load_catalog().values():
        parts = [model_spec(part) for part in entry.parts()]
        configs[entry.name] = config_text(model_spec(entry), parts)
        configs |= {part.name: config_text(part) for part in parts}
    return configs


def test_committed_configs_are_what_the_exporter_writes():
    committed = {
        path.parent.name: path.read_text(encoding="utf-8")
        for path in (ROOT / "model_repository").glob("*/config.pbtxt")
    }
    assert committed == catalogue_configs(), (
        "commit model_repository/*/config.pbtxt as `stemserve export` writes them"
    )
