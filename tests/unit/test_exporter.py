import hashlib
import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from support.toy_family import (
    GAINS,
    STEMS,
    ToyFamily,
    everything,
    gains_graph,
    toy_entry,
    write_weights,
)

from stemserve.errors import CheckpointError, DownloadError, ExportError
from stemserve.repository import read_config
from stemserve.spec import CheckpointFile, ModelSpec
from stemserve_export import onnx_graph
from stemserve_export.catalog import SINGLE_FILE
from stemserve_export.choices import with_checkpoint, with_options, with_precision
from stemserve_export.exporter import export_model, model_spec
from stemserve_export.gate.thresholds import MIN_PARITY_DB


@pytest.fixture
def weights(tmp_path):
    return write_weights(tmp_path)[SINGLE_FILE]


@pytest.fixture
def entry(weights):
    return toy_entry({SINGLE_FILE: weights}, members={"vocals": "v", "accompaniment": "a"})


@pytest.fixture
def family(monkeypatch, tmp_path):
    return ToyFamily.installed(monkeypatch, tmp_path)


@pytest.fixture
def repository(tmp_path):
    """A repository that holds another model."""
    folder = tmp_path / "model_repository"
    (folder / "other" / "1").mkdir(parents=True)
    (folder / "other" / "config.pbtxt").write_text('name: "other"\n')
    return folder


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def export(entry, repository):
    said = []
    return export_model(entry, repository, report=said.append), said


# --- building -------------------------------------------------------------------------------


def test_an_export(entry, family, repository, weights):
    done, said = export(entry, repository)
    folder = repository / "tiny"
    assert done.built
    assert done.folder == folder / "2"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == [
        "2", "2/export.json", "2/model.onnx", "config.pbtxt", "configs",
        "configs/onnxruntime_tensorrt.pbtxt",
    ]  # fmt: skip
    spec = ModelSpec.from_config(read_config(repository, "tiny"))
    assert spec == model_spec(entry)
    assert spec.checkpoint.files == (CheckpointFile(weights.as_uri(), sha256(weights)),)
    assert spec.options == {"colour": "red"}
    record = json.loads((folder / "2" / "export.json").read_text())
    assert record == done.record
    assert record["graph_sha256"] == sha256(done.folder / "model.onnx")
    assert record["nodes"] == 2
    assert min(record["parity_db"].values()) >= MIN_PARITY_DB
    assert record["spec"] == spec.to_parameters()
    assert record["files"] == {"model": {"source": weights.as_uri(), "sha256": sha256(weights)}}
    assert record["members"] == {"vocals": "v", "accompaniment": "a"}
    assert record["parameters"] == len(STEMS)
    assert family.builds == [("tiny", {"model": weights}, "fp32")]
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
    assert len(family.builds) == 1


def other_option(entry, repository, weights, family):
    return with_options(entry, {"colour": "blue"})


def other_weights(entry, repository, weights, family):
    weights.write_bytes(b"\x01others")
    return with_checkpoint(entry, [weights.as_uri() + "?mine"])


def other_code(entry, repository, weights, family):
    (family.sources / "families" / "tiny.py").write_text("# better code\n")
    return entry


def other_reader(entry, repository, weights, family):
    (family.sources / "weights" / "tiny.py").write_text("# better code\n")
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


CHANGES = [
    other_option, other_weights, other_code, other_reader, tampered_graph, tampered_config,
    no_record, no_graph, damaged_record,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_built_again(entry, family, repository, weights, change):
    export(entry, repository)
    changed = change(entry, repository, weights, family)
    done, _ = export(changed, repository)
    assert done.built
    assert len(family.builds) == 2
    assert not export(changed, repository)[0].built
    names = sorted(path.name for path in (repository / "tiny").iterdir())
    assert names == ["2", "config.pbtxt", "configs"]
    onnx.checker.check_model(onnx.load(done.folder / "model.onnx"))
    spec = ModelSpec.from_config(read_config(repository, "tiny"))
    assert spec == model_spec(changed, {SINGLE_FILE: sha256(weights)})


def test_a_new_version_leaves_the_old_one(entry, family, repository):
    export(entry, repository)
    export(replace(entry, version=3), repository)
    names = sorted(path.name for path in (repository / "tiny").iterdir())
    assert names == ["2", "3", "config.pbtxt", "configs"]


def test_weights_of_the_users_own(entry, family, repository, tmp_path):
    mine = tmp_path / "mine.ckpt"
    mine.write_bytes(b"mine")
    done, _ = export(with_checkpoint(entry, [mine.as_uri()]), repository)
    parameters = done.record["spec"]
    digest = hashlib.sha256(b"mine").hexdigest()
    assert parameters["stemserve.checkpoint.files"] == f"{mine.as_uri()}#sha256={digest}"
    assert parameters["stemserve.checkpoint.licence"] == "unknown"
    assert parameters["stemserve.checkpoint.commercial_use"] == "unknown"


def test_a_file_per_stem(family, repository, tmp_path):
    files = write_weights(tmp_path, *STEMS)
    done, _ = export(toy_entry(files), repository)
    assert family.builds == [("tiny", files, "fp32")]
    spec = ModelSpec.from_config(read_config(repository, "tiny"))
    assert [file.source for file in spec.checkpoint.files] == [
        files[stem].as_uri() for stem in STEMS
    ]
    assert {key: file["sha256"] for key, file in done.record["files"].items()} == {
        stem: sha256(files[stem]) for stem in STEMS
    }


def test_a_folder_of_weights_is_pinned_by_all_that_is_in_it(entry, family, repository, tmp_path):
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "model.index").write_bytes(b"index")
    mine = with_checkpoint(entry, [folder.as_uri()])
    assert export(mine, repository)[0].built
    assert family.builds == [("tiny", {"model": folder}, "fp32")]
    assert not export(mine, repository)[0].built
    (folder / "model.data").write_bytes(b"data")
    assert export(mine, repository)[0].built


def test_precisions_are_models_side_by_side(entry, family, repository):
    export(entry, repository)
    done, _ = export(with_precision(entry, "fp16"), repository)
    assert done.folder == repository / "tiny_fp16" / "2"
    # The last one is what the half-precision graph is compared with.
    assert [precision for _, _, precision in family.builds] == ["fp32", "fp16", "fp32"]
    precisions = [
        ModelSpec.from_config(read_config(repository, name)).precision
        for name in ("tiny", "tiny_fp16")
    ]
    assert precisions == ["fp32", "fp16"]
    assert not export(entry, repository)[0].built


def test_half_precision_on_the_wire(entry, family, repository):
    done, _ = export(with_precision(entry, "fp32", "fp16"), repository)
    assert done.folder == repository / "tiny" / "2"
    config = read_config(repository, "tiny")
    assert ModelSpec.from_config(config).wire_dtype == "fp16"
    graph = onnx.load(done.folder / "model.onnx").graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert export(entry, repository)[0].built  # the other wire replaces it


# --- interruptions --------------------------------------------------------------------------


INTERRUPTIONS = [
    CheckpointError("the weights are odd"),
    RuntimeError("torch ran out of luck"),
    KeyboardInterrupt(),
    SystemExit(143),
]


@pytest.mark.parametrize("interruption", INTERRUPTIONS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["build_failure", "export_failure"])
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
        model = gains_graph(spec, {**GAINS, "vocals": 0.26})
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
    family.build_failure = FileNotFoundError(2, "No such file or directory", "weights.yaml")
    with pytest.raises(CheckpointError) as caught:
        export(entry, repository)
    assert str(caught.value) == (
        "The checkpoint of 'tiny' cannot be read ([Errno 2] No such file or directory: "
        "'weights.yaml')."
    )


def test_weights_that_are_missing(entry, family, repository, weights):
    weights.unlink()
    before = everything(repository)
    with pytest.raises(DownloadError, match="There is no file"):
        export(entry, repository)
    assert everything(repository) == before
