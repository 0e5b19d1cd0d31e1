import dataclasses

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from stemserve.spec import CheckpointFile, ModelSpec
from stemserve_export.triton_config import HEADER, config_text, model_config


def parsed(text):
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_the_text_is_the_same_for_the_same_spec(make_spec):
    spec = make_spec(options={"b": "1", "a": "2", "c": "3"})
    again = make_spec(options={"c": "3", "b": "1", "a": "2"})
    assert config_text(spec) == config_text(again)


@pytest.mark.parametrize("wire", ["fp32", "fp16"])
def test_the_text_parses_back_into_the_same_message(make_spec, wire):
    spec = make_spec(wire_dtype=wire)
    assert parsed(config_text(spec)) == model_config(spec)
    assert ModelSpec.from_config(parsed(config_text(spec))) == spec


def test_another_spec_is_another_text(make_spec):
    texts = {config_text(make_spec())}
    changes = {
        "version": 4, "family": "other", "stems": ("a",), "sample_rate": 48_000, "channels": 1,
        "chunk_samples": 65, "lead_samples": 1, "overlap": 0.26,
        "normalization": "track", "wire_dtype": "fp16", "max_batch_size": 4, "domain": "hybrid",
        "options": {}, "tail": "centred", "precision": "fp16",
    }  # fmt: skip
    specs = [make_spec(**{field: value}) for field, value in changes.items()]
    of_checkpoint = {
        "files": (CheckpointFile("file:///w.ckpt", "1" * 64),), "licence": "GPL-3.0",
        "commercial_use": "forbidden", "training_data": "other songs",
    }  # fmt: skip
    for field, value in of_checkpoint.items():
        changed = dataclasses.replace(make_spec().checkpoint, **{field: value})
        specs.append(make_spec(checkpoint=changed))
    texts |= {config_text(spec) for spec in specs}
    assert len(texts) == 1 + len(specs)


def test_the_header_says_where_it_comes_from(make_spec):
    text = config_text(make_spec())
    assert text.startswith(HEADER.format(name="tiny"))
    assert "do not edit" in text.splitlines()[0]
    assert text.endswith("\n")


def test_the_tensor_contract(make_spec):
    config = model_config(make_spec(wire_dtype="fp16", max_batch_size=5))
    assert config.name == "tiny"
    assert config.platform == "onnxruntime_onnx"
    assert config.max_batch_size == 5
    assert [tensor.name for tensor in config.input] == ["mixture"]
    assert [tensor.name for tensor in config.output] == ["vocals", "accompaniment"]
    for tensor in (*config.input, *config.output):
        assert list(tensor.dims) == [2, 64]
        assert tensor.data_type == model_config_pb2.TYPE_FP16


def test_dynamic_batching_with_priorities_and_a_bounded_queue(make_spec):
    batching = model_config(make_spec()).dynamic_batching
    assert 0 < batching.max_queue_delay_microseconds <= 10_000
    assert batching.priority_levels == 2
    assert batching.default_priority_level == 2  # bulk: callers ask for the interactive level
    assert not batching.preserve_ordering
    policy = batching.default_queue_policy
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    assert 0 < policy.default_timeout_microseconds <= 60_000_000
    assert policy.allow_timeout_override
    assert 0 < policy.max_queue_size <= 1000
    assert not batching.priority_queue_policy  # so that the default holds for both levels


def test_one_instance_where_there_is_room(make_spec):
    [group] = model_config(make_spec()).instance_group
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_AUTO
    assert group.count == 1


def test_warm_up_with_silence(make_spec):
    [warmup] = model_config(make_spec()).model_warmup
    assert warmup.batch_size == 1
    [(name, tensor)] = warmup.inputs.items()
    assert name == "mixture"
    assert list(tensor.dims) == [2, 64]
    assert tensor.data_type == model_config_pb2.TYPE_FP32
    assert tensor.zero_data
