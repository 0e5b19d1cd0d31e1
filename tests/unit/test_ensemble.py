"""A model of specialists: one folder per stem, and an ensemble that joins them."""

import json
from dataclasses import replace

import onnx
import pytest
from google.protobuf import text_format
from support.toy_family import STEMS, ToyFamily, everything, toy_entry, write_weights
from tritonclient.grpc import model_config_pb2

from stemserve.errors import CheckpointError, DownloadError
from stemserve.repository import exported_models, models_to_serve, read_config
from stemserve.spec import ModelSpec
from stemserve_export import placement
from stemserve_export.choices import with_checkpoint, with_name, with_precision
from stemserve_export.exporter import export_model
from stemserve_export.triton_config import HEADER, config_text, ensemble_config


@pytest.fixture
def family(monkeypatch, tmp_path):
    return ToyFamily.installed(monkeypatch, tmp_path)


@pytest.fixture
def weights(tmp_path):
    return write_weights(tmp_path, *STEMS)


@pytest.fixture
def entry(weights):
    return toy_entry(weights, specialists=True)


@pytest.fixture
def repository(tmp_path):
    return tmp_path / "model_repository"


def export(entry, repository):
    return export_model(entry, repository, report=lambda text: None)


def spec_of(repository, name):
    return ModelSpec.from_config(read_config(repository, name))


# --- the configuration ----------------------------------------------------------------------


@pytest.fixture
def specs(make_spec):
    spec = make_spec(name="pair")
    return spec, [make_spec(name=f"pair_{stem}", stems=(stem,)) for stem in spec.stems]


@pytest.mark.parametrize("wire", ["fp32", "fp16"])
def test_an_ensemble_has_the_contract_of_any_model(make_spec, wire):
    spec = make_spec(name="pair", wire_dtype=wire, max_batch_size=5)
    parts = [make_spec(name=f"pair_{stem}", stems=(stem,)) for stem in spec.stems]
    config = ensemble_config(spec, parts)
    assert ModelSpec.from_config(config) == spec
    assert (config.name, config.platform, config.max_batch_size) == ("pair", "ensemble", 5)
    # Triton refuses these for an ensemble: its steps batch, and run on instances of their own.
    assert not config.HasField("dynamic_batching")
    assert not config.instance_group
    assert not config.model_warmup


def test_each_stem_is_the_output_of_its_specialist(specs):
    spec, parts = specs
    steps = ensemble_config(spec, parts).ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["pair_vocals", "pair_accompaniment"]
    assert [dict(step.input_map) for step in steps] == [{"mixture": "mixture"}] * 2
    assert [dict(step.output_map) for step in steps] == [
        {"vocals": "vocals"}, {"accompaniment": "accompaniment"},
    ]  # fmt: skip
    assert {step.model_version for step in steps} == {-1}  # the latest


def test_the_text_is_the_ensembles(specs):
    spec, parts = specs
    text = config_text(spec, parts)
    assert text.startswith(HEADER)
    parsed = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert parsed == ensemble_config(spec, parts)
    assert text == config_text(spec, parts)
    assert text != config_text(spec)


def test_a_specialist_too_few_is_a_mistake_of_ours(specs):
    spec, parts = specs
    with pytest.raises(ValueError, match="shorter"):
        ensemble_config(spec, parts[:1])


# --- the export -----------------------------------------------------------------------------


def test_an_export_of_specialists(entry, family, repository, weights):
    done = export(entry, repository)
    assert done.built
    assert done.folder == repository / "tiny" / "2"
    files = {str(path.relative_to(repository)) for path in repository.rglob("*.*")}
    assert {file for file in files if "/configs/" not in file} == {
        "tiny/2/export.json", "tiny/config.pbtxt",
        "tiny_accompaniment/2/export.json", "tiny_accompaniment/2/model.onnx",
        "tiny_accompaniment/config.pbtxt",
        "tiny_vocals/2/export.json", "tiny_vocals/2/model.onnx", "tiny_vocals/config.pbtxt",
    }  # fmt: skip
    # Triton runs an ensemble by its steps' configurations: it has none of its own to choose from.
    assert {file.partition("/")[0] for file in files if "/configs/" in file} == {
        "tiny_accompaniment", "tiny_vocals",
    }  # fmt: skip
    assert family.builds == [(f"tiny_{stem}", {"model": weights[stem]}, "fp32") for stem in STEMS]
    assert done.record["specialists"] == ["tiny_vocals", "tiny_accompaniment"]
    assert json.loads((done.folder / "export.json").read_text()) == done.record
    assert models_to_serve(repository, ["tiny"]) == ["tiny"]
    assert exported_models(repository) == ["tiny", "tiny_accompaniment", "tiny_vocals"]


def test_each_specialist_is_a_model_of_one_stem(entry, family, repository, weights):
    export(entry, repository)
    whole = spec_of(repository, "tiny")
    assert whole.stems == STEMS
    for stem, file in zip(STEMS, whole.checkpoint.files, strict=True):
        part = spec_of(repository, f"tiny_{stem}")
        assert part.stems == (stem,)
        assert part.checkpoint.files == (file,)
        assert file.source == weights[stem].as_uri()
        for field in ("tensor_dims", "wire_dtype", "overlap", "tail", "normalization", "version"):
            assert getattr(part, field) == getattr(whole, field)
        graph = onnx.load(repository / f"tiny_{stem}" / "2" / "model.onnx").graph
        assert [output.name for output in graph.output] == [stem]


def test_the_second_export_does_nothing(entry, family, repository):
    export(entry, repository)
    before = everything(repository)
    done = export(entry, repository)
    assert not done.built
    assert done.record["specialists"] == ["tiny_vocals", "tiny_accompaniment"]
    assert everything(repository) == before
    assert len(family.builds) == len(STEMS)


def test_only_the_specialist_that_changed_is_built_again(entry, family, repository, tmp_path):
    export(entry, repository)
    mine = tmp_path / "mine.ckpt"
    mine.write_bytes(b"mine")
    # The licence of the weights is part of every specialist's spec: keep it the same.
    changed = with_checkpoint(entry, [f"accompaniment={mine.as_uri()}"])
    changed = replace(changed, licence=entry.licence, commercial_use=entry.commercial_use,
                      training_data=entry.training_data)  # fmt: skip
    family.builds.clear()
    assert export(changed, repository).built
    assert [name for name, _, _ in family.builds] == ["tiny_accompaniment"]
    assert spec_of(repository, "tiny").checkpoint.files[1].source == mine.as_uri()


def test_a_configuration_that_was_changed_is_written_again(entry, family, repository):
    export(entry, repository)
    path = repository / "tiny" / "config.pbtxt"
    written = path.read_text()
    path.write_text(written.replace("tiny_vocals", "other"))
    assert export(entry, repository).built
    assert path.read_text() == written
    assert len(family.builds) == len(STEMS)


def test_precision_and_name_go_to_the_specialists_too(entry, family, repository):
    export(with_precision(entry, "fp16"), repository)
    assert exported_models(repository) == [
        "tiny_fp16", "tiny_fp16_accompaniment", "tiny_fp16_vocals",
    ]  # fmt: skip
    built = [name for name, _, precision in family.builds if precision == "fp16"]
    assert built == ["tiny_fp16_vocals", "tiny_fp16_accompaniment"]
    assert spec_of(repository, "tiny_fp16").precision == "fp16"
    steps = read_config(repository, "tiny_fp16").ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["tiny_fp16_vocals", "tiny_fp16_accompaniment"]
    export(with_name(entry, "mine"), repository)
    assert {"mine", "mine_vocals", "mine_accompaniment"} < set(exported_models(repository))


# --- failures -------------------------------------------------------------------------------


FAILURES = [CheckpointError("the weights are odd"), KeyboardInterrupt(), RuntimeError("bad luck")]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["build_failure", "export_failure"])
def test_a_broken_specialist_leaves_no_ensemble(entry, family, repository, where, failure):
    setattr(family, where, failure)
    family.failing = "tiny_accompaniment"
    with pytest.raises(type(failure)):
        export(entry, repository)
    assert sorted(path.name for path in repository.iterdir()) == ["tiny_vocals"]
    assert exported_models(repository) == ["tiny_vocals"]  # a whole model, and found next time
    setattr(family, where, None)
    family.builds.clear()
    assert export(entry, repository).built
    assert [name for name, _, _ in family.builds] == ["tiny_accompaniment"]


def test_a_missing_file_of_a_specialist_leaves_no_ensemble(entry, family, repository, weights):
    weights["vocals"].unlink()
    with pytest.raises(DownloadError, match="There is no file"):
        export(entry, repository)
    assert not repository.exists() or list(repository.iterdir()) == []


@pytest.mark.parametrize("existed", [False, True])
def test_an_ensemble_that_cannot_be_put_in_place(entry, family, repository, monkeypatch, existed):
    if existed:
        export(entry, repository)
        (repository / "tiny" / "2" / "export.json").unlink()  # so that it is built again
    before = everything(repository / "tiny") if existed else None
    original = placement._commit

    def fail(staging, artefact, target):
        if target.parent.name == "tiny":
            raise KeyboardInterrupt
        original(staging, artefact, target)

    monkeypatch.setattr(placement, "_commit", fail)
    with pytest.raises(KeyboardInterrupt):
        export(entry, repository)
    assert (everything(repository / "tiny") if existed else None) == before
    assert (repository / "tiny").exists() == existed
