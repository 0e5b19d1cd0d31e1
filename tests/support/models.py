"""Small models with a stemserve spec, written into a repository the way the exporter does."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from stemserve.spec import Checkpoint, CheckpointFile, ModelSpec
from stemserve_export.triton_config import config_text


def identity_spec(name="identity", chunk_samples=11025, **changes) -> ModelSpec:
    """A model with two stems: the mixture itself, and half of it."""
    fields = {
        "name": name,
        "version": 1,
        "family": "identity",
        "domain": "mask",
        "stems": ("same", "half"),
        "sample_rate": 44100,
        "channels": 2,
        "chunk_samples": chunk_samples,
        "edge_samples": 0,
        "lead_samples": 0,
        "tail": "padded",
        "overlap": 0.0,
        "window": "triangle",
        "normalization": "none",
        "wire_dtype": "fp32",
        "precision": "fp32",
        "max_batch_size": 4,
        "checkpoint": Checkpoint(
            (CheckpointFile("file:///none", "0" * 64),), "CC0-1.0", "allowed", "none"
        ),
    }
    return ModelSpec(**{**fields, **changes})


def edge_ramp(spec: ModelSpec) -> np.ndarray:
    """Partial sums at both ends of a chunk that add up to 1 with the neighbour's."""
    envelope = np.ones(spec.chunk_samples, np.float32)
    if spec.edge_samples:
        rise = np.linspace(0, 1, spec.edge_samples + 2, dtype=np.float32)[1:-1]
        envelope[: spec.edge_samples] = rise
        envelope[-spec.edge_samples :] = 1 - rise
    return envelope


def write_identity(repository: Path, spec: ModelSpec, extra_config: str = "") -> None:
    """Write graph and configuration of an identity model."""
    dtype = TensorProto.FLOAT if spec.wire_dtype == "fp32" else TensorProto.FLOAT16
    numpy_dtype = np.float32 if spec.wire_dtype == "fp32" else np.float16
    shape = ["batch", *spec.tensor_dims]
    envelope = edge_ramp(spec).astype(numpy_dtype)
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["mixture", "envelope"], ["same"]),
            helper.make_node("Mul", ["mixture", "halved"], ["half"]),
        ],
        "identity",
        [helper.make_tensor_value_info("mixture", dtype, shape)],
        [helper.make_tensor_value_info(stem, dtype, shape) for stem in spec.stems],
        [
            numpy_helper.from_array(envelope, "envelope"),
            numpy_helper.from_array((envelope / 2).astype(numpy_dtype), "halved"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    folder = repository / spec.name
    (folder / str(spec.version)).mkdir(parents=True)
    onnx.save(model, folder / str(spec.version) / "model.onnx")
    (folder / "config.pbtxt").write_text(config_text(spec) + extra_config)
