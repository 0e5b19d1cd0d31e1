import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from stemserve.errors import CheckpointError, DownloadError, ExportError, UnknownModelError
from stemserve.repository import read_config
from stemserve.spec import ModelSpec
from stemserve_export import exporter, onnx_graph
from stemserve_export.catalog import CatalogEntry, PinnedFile, find_model, load_catalog
from stemserve_export.exporter import export_model, model_spec, with_checkpoint, with_options
from stemserve_export.onnx_graph import check_graph, export_graph
from stemserve_export.verify import MIN_PARITY_DB, graph_parity_db, snr_db


class Scaled(nn.Module):
    """Two stems: the mixture by a gain, and the rest."""

    def __init__(self, gain=0.25):
        super().__init__()
        self.gain = gain

    def forward(self, mixture):
        vocals = mixture * self.gain
        return vocals, mixture - vocals


def scaled_graph(spec, gain=0.25, **changes):
    """The same as an ONNX model made by hand; keywords spoil it."""
    opset = changes.get("opset", 18)
    batch = changes.get("batch", "batch")
    outputs = changes.get("outputs", spec.stems)
    dtype = changes.get("dtype", TensorProto.FLOAT)
    shape = [batch, *changes.get("dims", spec.tensor_dims)]
    numpy_dtype = helper.tensor_dtype_to_np_dtype(dtype)
    nodes = [
        helper.make_node("Mul", ["mixture", "gain"], [outputs[0]]),
        helper.make_node("Sub", ["mixture", outputs[0]], [outputs[1]]),
        *changes.get("nodes", ()),
    ]
    graph = helper.make_graph(
        nodes,
        "scaled",
        [helper.make_tensor_value_info(changes.get("input", "mixture"), dtype, shape)],
        [helper.make_tensor_value_info(name, dtype, shape) for name in outputs],
        [
            numpy_helper.from_array(np.array(gain, numpy_dtype), "gain"),
            *changes.get("initializers", ()),
        ],
    )
    opsets = [helper.make_opsetid("", opset), *changes.get("opsets", ())]
    return helper.make_model(graph, opset_imports=opsets, ir_version=changes.get("ir", 10))


# --- a model of no catalogue ----------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(b"\x01weights")
    return path


@pytest.fixture
def entry(weights):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    return CatalogEntry(
        name="tiny",
        version=2,
        family="tiny",
        domain="mask",
        stems=("vocals", "accompaniment"),
        sample_rate=44_100,
        overlap=0.0,
        window="triangle",
        normalization="none",
        wire_dtype="fp32",
        max_batch_size=4,
        checkpoint=PinnedFile(weights.as_uri(), digest, None),
        members={"vocals": "v", "accompaniment": "a"},
        licence="MIT",
        commercial_use=True,
        training_data="none",
        options={"colour": "red"},
    )


@pytest.fixture
def family(monkeypatch, tmp_path):
    """The family "tiny", its source files, and a graph export that takes no time."""
    sources = tmp_path / "sources"
    (sources / "families").mkdir(parents=True)
    for name in ("spectral.py", "onnx_graph.py", "families/tiny.py"):
        (sources / name).write_text("# code\n")

    def load(checkpoint, members, stems, options):
        family.loads.append(checkpoint)
        if family.interruption is not None:
            raise family.interruption
        return Scaled()

    def export_fast(module, spec, path):
        model = scaled_graph(spec, module.gain)
        onnx.save(model, path)
        if family.export_interruption is not None:
            raise family.export_interruption
        return model

    family = SimpleNamespace(
        framing=lambda options: (1000, 0, 0), load=load, loads=[], sources=sources,
        interruption=None, export_interruption=None,
    )  # fmt: skip
    monkeypatch.setattr(exporter, "_family", lambda entry: family)
    monkeypatch.setattr(exporter, "files", lambda package: sources)
    monkeypatch.setattr(onnx_graph, "export_graph", export_fast)
    return family


@pytest.fixture
def repository(tmp_path):
    """A repository that holds another model."""
    folder = tmp_path / "model_repository"
    (folder / "other" / "1").mkdir(parents=True)
    (folder / "other" / "config.pbtxt").write_text('name: "other"\n')
    return folder


def export(entry, repository):
    said = []
    return export_model(entry, repository, report=said.append), said


def everything(folder):
    """Paths, contents, times and modes of all below a folder."""
    return {
        str(path.relative_to(folder)): (
            path.read_bytes() if path.is_file() else None,
            path.stat().st_mtime_ns if path.is_file() else None,
            path.stat().st_mode,
        )
        for path in sorted(folder.rglob("*"))
    }


# --- building -------------------------------------------------------------------------------


def test_an_export(entry, family, repository, weights):
    done, said = export(entry, repository)
    folder = repository / "tiny"
    assert done.built
    assert done.path == folder / "2" / "model.onnx"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == [
        "2", "2/export.json", "2/model.onnx", "config.pbtxt",
    ]  # fmt: skip
    spec = ModelSpec.from_config(read_config(repository, "tiny"))
    assert spec == model_spec(entry)
    assert spec.checkpoint.sha256 == entry.checkpoint.sha256
    assert spec.options == {"colour": "red"}
    record = json.loads((folder / "2" / "export.json").read_text())
    assert record == done.record
    assert record["graph_sha256"] == hashlib.sha256(done.path.read_bytes()).hexdigest()
    assert record["nodes"] == 2
    assert min(record["parity_db"].values()) >= MIN_PARITY_DB
    assert record["spec"] == spec.to_parameters()
    assert family.loads == [weights]
    assert said[0] == "Exporting tiny (version 2)"
    assert said[1].startswith("Graph against PyTorch: ")


def test_the_second_export_does_nothing(entry, family, repository):
    export(entry, repository)
    before = everything(repository)
    done, said = export(entry, repository)
    assert not done.built
    assert done.record["nodes"] == 2
    assert said == []
    assert everything(repository) == before
    assert len(family.loads) == 1


def other_option(entry, repository, weights, family):
    return with_options(entry, {"colour": "blue"})


def other_weights(entry, repository, weights, family):
    weights.write_bytes(b"\x01others")
    return with_checkpoint(entry, weights.as_uri() + "?mine")


def other_code(entry, repository, weights, family):
    (family.sources / "families" / "tiny.py").write_text("# better code\n")
    return entry


def tampered_graph(entry, repository, weights, family):
    path = repository / "tiny" / "2" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    return entry


def tampered_config(entry, repository, weights, family):
    path = repository / "tiny" / "config.pbtxt"
    path.write_text(path.read_text().replace("max_queue_size: 64", "max_queue_size: 1"))
    return entry


def no_record(entry, repository, weights, family):
    (repository / "tiny" / "2" / "export.json").unlink()
    return entry


def no_graph(entry, repository, weights, family):
    (repository / "tiny" / "2" / "model.onnx").unlink()
    return entry


def damaged_record(entry, repository, weights, family):
    (repository / "tiny" / "2" / "export.json").write_text("[1")
    return entry


@pytest.mark.parametrize(
    "change",
    [other_option, other_weights, other_code, tampered_graph, tampered_config, no_record,
     no_graph, damaged_record],
)  # fmt: skip
def test_what_changed_is_built_again(entry, family, repository, weights, change):
    export(entry, repository)
    changed = change(entry, repository, weights, family)
    done, _ = export(changed, repository)
    assert done.built
    assert len(family.loads) == 2
    assert not export(changed, repository)[0].built
    assert sorted(path.name for path in (repository / "tiny").iterdir()) == ["2", "config.pbtxt"]
    onnx.checker.check_model(onnx.load(done.path))
    spec = ModelSpec.from_config(read_config(repository, "tiny"))
    assert spec == model_spec(changed, hashlib.sha256(weights.read_bytes()).hexdigest())


def test_a_new_version_leaves_the_old_one(entry, family, repository):
    export(entry, repository)
    export(replace(entry, version=3), repository)
    names = sorted(path.name for path in (repository / "tiny").iterdir())
    assert names == ["2", "3", "config.pbtxt"]


def test_weights_of_the_users_own(entry, family, repository, tmp_path):
    mine = tmp_path / "mine.ckpt"
    mine.write_bytes(b"mine")
    changed = with_checkpoint(entry, mine.as_uri())
    assert changed.checkpoint == PinnedFile(mine.as_uri(), None, None)
    done, _ = export(changed, repository)
    parameters = done.record["spec"]
    assert parameters["stemserve.checkpoint.sha256"] == hashlib.sha256(b"mine").hexdigest()
    assert parameters["stemserve.checkpoint.licence"] == "unknown"
    assert with_checkpoint(entry, entry.checkpoint.source) is entry


# --- interruptions --------------------------------------------------------------------------


INTERRUPTIONS = [
    CheckpointError("the weights are odd"),
    RuntimeError("torch ran out of luck"),
    KeyboardInterrupt(),
    SystemExit(143),
]


@pytest.mark.parametrize("interruption", INTERRUPTIONS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["interruption", "export_interruption"])
@pytest.mark.parametrize("existed", [False, True])
def test_an_interrupted_export_leaves_the_repository_as_it_was(
    entry, family, repository, where, interruption, existed
):
    if existed:
        export(entry, repository)
    before = everything(repository)
    setattr(family, where, interruption)
    with pytest.raises(type(interruption)) as caught:
        export(with_options(entry, {"colour": "blue"}), repository)
    assert caught.value is interruption
    assert everything(repository) == before


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("failing", ["rename", "replace"])
def test_a_failure_in_the_last_step_leaves_the_repository_as_it_was(
    entry, family, repository, monkeypatch, existed, failing
):
    """The artefact cannot be moved into place, or the configuration cannot."""
    if existed:
        export(entry, repository)
    before = everything(repository)
    original = getattr(Path, failing)

    def fail(self, target):
        if self.name in ("artefact", "config.pbtxt") and ".staging-" in str(self):
            raise PermissionError(13, "Permission denied")
        return original(self, target)

    monkeypatch.setattr(Path, failing, fail)
    with pytest.raises(ExportError):
        export(with_options(entry, {"colour": "blue"}), repository)
    assert everything(repository) == before


@pytest.mark.parametrize("existed", [False, True])
def test_a_graph_that_is_wrong_is_not_kept(entry, family, repository, monkeypatch, existed):
    if existed:
        export(entry, repository)
    before = everything(repository)

    def export_wrong(module, spec, path):
        model = scaled_graph(spec, 0.26)
        onnx.save(model, path)
        return model

    monkeypatch.setattr(onnx_graph, "export_graph", export_wrong)
    with pytest.raises(ExportError, match="The graph of 'tiny' gives 'vocals' at"):
        export(with_options(entry, {"colour": "blue"}), repository)
    assert everything(repository) == before


# --- errors ---------------------------------------------------------------------------------


def test_a_repository_that_cannot_be_written_to(entry, family, tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "model_repository"
    with pytest.raises(ExportError) as caught:
        export(entry, folder)
    assert str(caught.value) == (
        f"The repository '{folder}' cannot be written to (Not a directory); choose another with "
        "--repository."
    )


def test_a_file_error_of_the_family_is_not_blamed_on_the_repository(entry, family, repository):
    family.interruption = FileNotFoundError(2, "No such file or directory", "weights.yaml")
    with pytest.raises((ExportError, FileNotFoundError)) as caught:
        export(entry, repository)
    assert "cannot be written to" not in str(caught.value)


def test_weights_that_are_missing(entry, family, repository, weights):
    weights.unlink()
    before = everything(repository)
    with pytest.raises(DownloadError, match="There is no file"):
        export(entry, repository)
    assert everything(repository) == before


def test_an_unknown_option(entry):
    with pytest.raises(ExportError) as caught:
        with_options(entry, {"shape": "round"})
    assert str(caught.value) == "Model 'tiny' has no option 'shape'; it has colour."
    assert with_options(entry, {"colour": "blue"}).options == {"colour": "blue"}
    assert entry.options == {"colour": "red"}


def test_a_model_without_options(entry):
    with pytest.raises(ExportError, match=r"has no option 'a'; it has none\."):
        with_options(replace(entry, options={}), {"a": "b"})


def test_an_unknown_model():
    with pytest.raises(UnknownModelError) as caught:
        find_model("demix")
    assert str(caught.value) == (
        f"The catalogue has no model 'demix'; it has {', '.join(sorted(load_catalog()))} (see "
        "`stemserve export --list`)."
    )


# --- the rules of a graph -------------------------------------------------------------------


def refused_graph(model, spec):
    with pytest.raises(ExportError) as caught:
        check_graph(model, spec)
    return str(caught.value)


def test_a_good_graph_is_accepted(make_spec):
    check_graph(scaled_graph(make_spec()), make_spec())
    check_graph(scaled_graph(make_spec(), opset=20), make_spec())


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
    model = scaled_graph(make_spec(), nodes=nodes, initializers=initializers)
    assert refused_graph(model, make_spec()) == (
        "The graph of 'tiny' has the operators DFT, ScatterND, which are not on the list that "
        "TensorRT is known to take; rewrite the module, or extend the list in onnx_graph.py with "
        "proof."
    )


def test_operators_of_another_domain(make_spec):
    nodes = [helper.make_node("FusedMatMul", ["mixture"], ["x"], domain="com.microsoft")]
    opsets = [helper.make_opsetid("com.microsoft", 1)]
    model = scaled_graph(make_spec(), nodes=nodes, opsets=opsets)
    assert refused_graph(model, make_spec()) == (
        "The graph of 'tiny' uses operators of 'com.microsoft', which Triton does not have; "
        "rewrite the module without them."
    )


@pytest.mark.parametrize("opset", [21, 22])
def test_an_opset_that_is_too_new(make_spec, opset):
    assert refused_graph(scaled_graph(make_spec(), opset=opset), make_spec()) == (
        f"The graph of 'tiny' has opset {opset}; at most 20 is served by Triton 24.10."
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_axis_that_is_fixed(make_spec, batch):
    assert refused_graph(scaled_graph(make_spec(), batch=batch), make_spec()) == (
        f"'mixture' of the graph of 'tiny' has the shape [{batch}, 2, 64]; expected a dynamic "
        "batch axis and [2, 64]."
    )


def test_a_chunk_of_another_length(make_spec):
    model = scaled_graph(make_spec(), dims=(2, 65))
    assert "has the shape ['batch', 2, 65]; expected" in refused_graph(model, make_spec())


def test_outputs_of_another_name_or_order(make_spec):
    model = scaled_graph(make_spec(), outputs=("accompaniment", "vocals"))
    assert refused_graph(model, make_spec()) == (
        "The graph of 'tiny' has the outputs ('accompaniment', 'vocals'); expected ('vocals', "
        "'accompaniment')."
    )


def test_an_input_of_another_name(make_spec):
    model = scaled_graph(make_spec(), input="audio")
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
    assert "dtype" in refused_graph(scaled_graph(spec, dtype=dtype), spec)


def test_a_graph_that_is_no_graph(make_spec):
    model = scaled_graph(make_spec())
    model.graph.node[0].input[0] = "nowhere"
    assert "'tiny'" in refused_graph(model, make_spec())


def test_export_graph(make_spec, tmp_path):
    """The real thing, once: names, axes, limits, and the spec inside."""
    spec = make_spec(chunk_samples=128)
    path = tmp_path / "model.onnx"
    export_graph(Scaled(), spec, path)
    model = onnx.load(path)
    check_graph(model, spec)
    assert model.ir_version <= 10
    assert model.opset_import[0].version <= 20
    assert {prop.key: prop.value for prop in model.metadata_props} == spec.to_parameters()
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]  # no external data
    assert min(graph_parity_db(Scaled(), spec, path).values()) >= MIN_PARITY_DB


# --- the numbers of a graph -----------------------------------------------------------------


@pytest.fixture
def saved_graph(make_spec, tmp_path):
    """Save a graph whose second stem has passed through more nodes."""
    spec = make_spec(chunk_samples=1000)

    def save(*nodes, gain=0.25, initializers=()):
        path = tmp_path / "model.onnx"
        model = scaled_graph(spec, gain, initializers=initializers)
        if nodes:
            model.graph.node[1].output[0] = "rest"
            model.graph.node.extend(nodes)
        onnx.save(model, path)
        return spec, path

    return save


def test_a_graph_that_does_what_torch_does(saved_graph):
    spec, path = saved_graph()
    parity = graph_parity_db(Scaled(), spec, path)
    assert parity.keys() == {"vocals", "accompaniment"}
    assert min(parity.values()) >= 120


def test_a_graph_that_differs(saved_graph):
    spec, path = saved_graph(gain=0.2501)
    with pytest.raises(ExportError) as caught:
        graph_parity_db(Scaled(), spec, path)
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
        graph_parity_db(Scaled(), spec, path)


def test_the_silent_half_of_a_chunk_is_compared(saved_graph):
    """A graph that is right everywhere passes the same way."""
    nodes, initializers = on_silence(0.0)
    spec, path = saved_graph(*nodes, initializers=initializers)
    assert graph_parity_db(Scaled(), spec, path)["accompaniment"] >= 120


def test_parity_is_not_told_without_onnx_runtime(saved_graph, monkeypatch):
    spec, path = saved_graph(gain=0.9)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert graph_parity_db(Scaled(), spec, path) is None


def test_snr_db():
    signal = np.array([[3.0, 4.0]], np.float32)
    assert snr_db(signal, signal) == np.inf
    assert snr_db(signal, signal * np.float32(0.5)) == pytest.approx(6.0206, abs=1e-3)
    assert snr_db(signal, -signal) == pytest.approx(-6.0206, abs=1e-3)
    assert snr_db(signal * 0, signal) == -np.inf
    assert not snr_db(signal, signal * np.nan) >= MIN_PARITY_DB
    assert snr_db(signal, np.full_like(signal, np.inf)) == -np.inf
