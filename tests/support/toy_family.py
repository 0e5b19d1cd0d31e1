"""A family of separators that only scale the mixture, and exports of it that take no time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from stemserve.spec import ModelSpec
from stemserve_export import exporter, onnx_graph
from stemserve_export.catalog import SINGLE_FILE, CatalogEntry, PinnedFile
from stemserve_export.families import Framing

STEMS = ("vocals", "accompaniment")
GAINS = {"vocals": 0.25, "accompaniment": 0.75}
CHUNK = 1000


class Gains(nn.Module):
    """Each stem is the mixture by a gain of its own."""

    def __init__(self, stems: tuple[str, ...] = STEMS) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.tensor([GAINS[stem] for stem in stems]))

    def forward(self, mixture: Tensor) -> tuple[Tensor, ...]:
        return tuple(mixture * self.gains[index] for index in range(len(self.gains)))


def gains_graph(
    spec: ModelSpec, gains: Mapping[str, float] = GAINS, **changes: Any
) -> onnx.ModelProto:
    """The same as an ONNX model made by hand; keywords spoil it."""
    opset = changes.get("opset", 18)
    outputs = changes.get("outputs", spec.stems)
    dtype = changes.get(
        "dtype", {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}[spec.wire_dtype]
    )
    shape = [changes.get("batch", "batch"), *changes.get("dims", spec.tensor_dims)]
    numpy_dtype = helper.tensor_dtype_to_np_dtype(dtype)
    graph = helper.make_graph(
        [
            *(helper.make_node("Mul", ["mixture", f"gain_{name}"], [name]) for name in outputs),
            *changes.get("nodes", ()),
        ],
        "gains",
        [helper.make_tensor_value_info(changes.get("input", "mixture"), dtype, shape)],
        [helper.make_tensor_value_info(name, dtype, shape) for name in outputs],
        [
            *(
                numpy_helper.from_array(np.array(gains[name], numpy_dtype), f"gain_{name}")
                for name in outputs
            ),
            *changes.get("initializers", ()),
        ],
    )
    opsets = [helper.make_opsetid("", opset), *changes.get("opsets", ())]
    return helper.make_model(graph, opset_imports=opsets, ir_version=changes.get("ir", 10))


def toy_entry(files: Mapping[str, Path], **changes: Any) -> CatalogEntry:
    """A row of no catalogue, of local files that are pinned as they are now."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "version": 2,
        "family": "tiny",
        "domain": "mask",
        "stems": STEMS,
        "sample_rate": 44_100,
        "overlap": 0.0,
        "window": "triangle",
        "normalization": "none",
        "max_batch_size": 4,
        "files": {
            key: PinnedFile(path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest())
            for key, path in files.items()
        },
        "licence": "MIT",
        "licence_source": "https://host/licence",
        "commercial_use": "allowed",
        "training_data": "none",
        "options": {"colour": "red"},
    }
    return CatalogEntry(**{**fields, **changes})


def write_weights(folder: Path, *keys: str) -> dict[str, Path]:
    """Write a file of weights per key, each of its own content."""
    files = {}
    for key in keys or (SINGLE_FILE,):
        files[key] = folder / f"{key}.ckpt"
        files[key].write_bytes(f"weights of {key}".encode())
    return files


class ToyFamily:
    """Stands in for a family's module; knows what was built, and fails on demand.

    Attributes:
        builds: name, files and precision of every module that was built.
        sources: folder with what the exporter takes for its own source files.
        build_failure: raised instead of building ``failing``, or anything where that is None.
        export_failure: raised by the export, after the graph was written.
    """

    def __init__(self, sources: Path) -> None:
        self.builds: list[tuple[str, dict[str, Path], str]] = []
        self.sources = sources
        self.build_failure: BaseException | None = None
        self.export_failure: BaseException | None = None
        self.failing: str | None = None

    @classmethod
    def installed(cls, monkeypatch: pytest.MonkeyPatch, folder: Path) -> ToyFamily:
        """Let the exporter find this family whatever an entry says, and export without torch."""
        sources = folder / "sources"
        for name in (
            "spectral.py",
            "onnx_graph.py",
            "precision.py",
            "families/tiny.py",
            "weights/tiny.py",
        ):
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            (sources / name).write_text("# code\n")
        family = cls(sources)
        monkeypatch.setattr(exporter, "_family", lambda entry: family)
        monkeypatch.setattr(exporter, "files", lambda package: sources)
        monkeypatch.setattr(onnx_graph, "export_graph", family.export_graph)
        return family

    def framing(self, options: Mapping[str, str]) -> Framing:
        return Framing(CHUNK)

    def build(
        self, entry: CatalogEntry, files: Mapping[str, Path], precision: str = "fp32"
    ) -> Gains:
        self.builds.append((entry.name, dict(files), precision))
        if self.build_failure is not None and self.failing in (None, entry.name):
            raise self.build_failure
        return Gains(entry.stems)

    def export_graph(self, module: nn.Module, spec: ModelSpec, path: Path) -> onnx.ModelProto:
        model = gains_graph(spec)
        onnx.save(model, path)
        if self.export_failure is not None and self.failing in (None, spec.name):
            raise self.export_failure
        return model


def everything(folder: Path) -> dict[str, tuple[bytes | None, int | None, int]]:
    """Paths, contents, times and modes of all below a folder."""
    return {
        str(path.relative_to(folder)): (
            path.read_bytes() if path.is_file() else None,
            path.stat().st_mtime_ns if path.is_file() else None,
            path.stat().st_mode,
        )
        for path in sorted(folder.rglob("*"))
    }
