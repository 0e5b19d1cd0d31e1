"""torch module -> ONNX file, held to the rules that Triton and TensorRT set."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stemserve.errors import ExportError
from stemserve.spec import ModelSpec

if TYPE_CHECKING:
    import onnx
    from torch import nn

# The ONNX Runtime of Triton 24.10 (1.19.2) refuses opset 22 and IR 11; older ones less.
OPSET: Final = 18
MAX_OPSET: Final = 20
MAX_IR_VERSION: Final = 10

# Operators that TensorRT's parser takes with static shapes behind a dynamic batch axis
# (github.com/onnx/onnx-tensorrt, docs/operators.md), as far as separators need them. Left out on
# purpose: STFT and DFT (not supported), Loop, If and Scan (control flow), ScatterND and Range
# (signs of an export that computes shapes at run time).
_ALLOWED: Final = """
    Abs Add AveragePool BatchNormalization Cast Clip Concat Constant Conv ConvTranspose Cos
    DepthToSpace Div Elu Erf Exp Expand Flatten Gather Gelu Gemm GroupNormalization Identity
    InstanceNormalization LSTM LayerNormalization LeakyRelu MatMul Max Min Mul Neg Pad Pow
    PRelu Reciprocal ReduceMax ReduceMean ReduceSum Relu Reshape Shape Sigmoid Sin Slice Softmax
    Split Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where
"""
# onnx.TensorProto.FLOAT and FLOAT16
_ELEMENT_TYPES: Final = {"fp32": 1, "fp16": 10}
ALLOWED_OPERATORS: Final = frozenset(_ALLOWED.split())


def export_graph(module: nn.Module, spec: ModelSpec, path: Path) -> onnx.ModelProto:
    """Export a separator to ``path`` and check it against its spec.

    Args:
        module: maps [B, channels, chunk_samples] float32 to a tuple of one such per stem. With an
            fp16 wire the graph casts at its boundaries.
        spec: names and shapes.
        path: the file to write.

    Returns:
        The model as written.

    Raises:
        ExportError: the graph breaks the spec or a rule of this module.
    """
    import onnx
    import torch

    example = torch.zeros(2, *spec.tensor_dims)
    if spec.wire_dtype == "fp16":
        module, example = _half_wire(module), example.half()
    batch = torch.export.Dim("batch", min=1, max=max(2, spec.max_batch_size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _quiet_exporter()
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(spec.input_names),
            output_names=list(spec.output_names),
            dynamic_shapes=({0: batch},),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model.ir_version = min(model.ir_version, MAX_IR_VERSION)
    model.producer_name = "stemserve"
    onnx.helper.set_model_props(model, spec.to_parameters())
    check_graph(model, spec)
    onnx.save(model, path)
    return model


def _half_wire(module: nn.Module) -> nn.Module:
    """The module with float16 at its boundaries and whatever it computes in inside."""
    import torch

    class HalfWire(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, mixture: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(stem.half() for stem in self.inner(mixture.float()))

    return HalfWire()


def check_graph(model: onnx.ModelProto, spec: ModelSpec) -> None:
    """Check a graph against its spec and the rules of this module.

    Raises:
        ExportError: names the first thing that is wrong.
    """
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"The graph of '{spec.name}' is no valid ONNX ({error}); rewrite the module."
        ) from None
    for opset in model.opset_import:
        if opset.domain not in ("", "ai.onnx"):
            raise ExportError(
                f"The graph of '{spec.name}' uses operators of '{opset.domain}', which Triton "
                "does not have; rewrite the module without them."
            )
        if opset.version > MAX_OPSET:
            raise ExportError(
                f"The graph of '{spec.name}' has opset {opset.version}; at most {MAX_OPSET} is "
                "served by Triton 24.10."
            )
    foreign = sorted({node.op_type for node in model.graph.node} - ALLOWED_OPERATORS)
    if foreign:
        raise ExportError(
            f"The graph of '{spec.name}' has the operators {', '.join(foreign)}, which are not on "
            "the list that TensorRT is known to take; rewrite the module, or extend the list in "
            "onnx_graph.py with proof."
        )
    _check_tensors(spec, "inputs", model.graph.input, spec.input_names)
    _check_tensors(spec, "outputs", model.graph.output, spec.output_names)


def _check_tensors(spec: ModelSpec, kind: str, values, names: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    found = tuple(value.name for value in values)
    if found != names:
        raise ExportError(f"The graph of '{spec.name}' has the {kind} {found}; expected {names}.")
    for value in values:
        dims = value.type.tensor_type.shape.dim
        shape = tuple(dim.dim_value for dim in dims[1:])
        dtype = value.type.tensor_type.elem_type
        if dtype != _ELEMENT_TYPES[spec.wire_dtype]:
            raise ExportError(
                f"'{value.name}' of the graph of '{spec.name}' has ONNX's dtype {dtype}; expected "
                f"{_ELEMENT_TYPES[spec.wire_dtype]} for {spec.wire_dtype}."
            )
        if not dims[0].dim_param or shape != spec.tensor_dims:
            raise ExportError(
                f"'{value.name}' of the graph of '{spec.name}' has the shape "
                f"{[dim.dim_param or dim.dim_value for dim in dims]}; expected a dynamic batch "
                f"axis and {list(spec.tensor_dims)}."
            )


def _quiet_exporter() -> None:
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
