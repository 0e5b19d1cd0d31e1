import os
from pathlib import Path

import pytest

from stemserve.errors import ModelFileMissingError
from stemserve.repository import (
    default_repository,
    described_models,
    exported_models,
    model_file,
    models_to_serve,
    read_config,
)
from stemserve_export.triton_config import config_text


@pytest.fixture
def add_model(tmp_path):
    """Describe a model in the repository ``tmp_path``, with files below its folder."""

    def add(name, *files, config=None):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.pbtxt").write_text(config or f'name: "{name}"\n', encoding="utf-8")
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).touch()

    return add


def refusal(*arguments):
    with pytest.raises(ModelFileMissingError) as caught:
        models_to_serve(*arguments)
    return str(caught.value)


def test_exported_models_have_configuration_and_weights(tmp_path, add_model):
    add_model("b", "2/model.onnx")
    add_model("a", "1/model.onnx", "3/model.onnx")
    add_model("described_only")
    add_model("other_folder", "configs/model.onnx", ".staging-x/model.onnx")
    add_model("plan", "1/model.plan", config='default_model_filename: "model.plan"')
    (tmp_path / "no_model").mkdir()
    assert described_models(tmp_path) == ["a", "b", "described_only", "other_folder", "plan"]
    assert exported_models(tmp_path) == ["a", "b", "plan"]
    assert models_to_serve(tmp_path, []) == ["a", "b", "plan"]
    assert models_to_serve(tmp_path, ["plan", "a"]) == ["plan", "a"]
    assert model_file(tmp_path, "plan") == "model.plan"
    assert model_file(tmp_path, "a") == "model.onnx"


def test_no_repository(tmp_path):
    folder = tmp_path / "none"
    assert refusal(folder, []) == (
        f"There is no model repository '{folder}'; make one with `stemserve export "
        "spleeter_2stems`, or name another with --repository."
    )


def test_an_empty_repository(tmp_path):
    assert refusal(tmp_path, []) == (
        f"No model in '{tmp_path}' has its weights; build one with `stemserve export "
        "spleeter_2stems`."
    )


def test_a_repository_of_configurations_alone(tmp_path, add_model):
    add_model("demucs")
    assert refusal(tmp_path, []).endswith("build one with `stemserve export demucs`.")


def test_a_named_model_without_weights(tmp_path, add_model):
    add_model("a", "1/model.onnx")
    add_model("b")
    assert refusal(tmp_path, ["a", "b"]) == (
        f"Model 'b' has no weights: '{tmp_path}/b/<version>/model.onnx' is missing. Build it with "
        "`stemserve export b`."
    )


def test_a_named_model_that_is_not_there(tmp_path, add_model):
    assert refusal(tmp_path, ["x"]) == (
        f"The repository '{tmp_path}' has no model 'x' (it has none); export it with `stemserve "
        "export x`."
    )
    add_model("b")
    add_model("a", "1/model.onnx")
    assert "has no model 'x' (it has a, b);" in refusal(tmp_path, ["x"])


@pytest.mark.parametrize("config", ["name: 7", "colour: 'red'", "{"])
def test_a_configuration_that_triton_would_not_read(tmp_path, add_model, config):
    add_model("a", config=config)
    with pytest.raises(ModelFileMissingError) as caught:
        read_config(tmp_path, "a")
    text = str(caught.value)
    assert text.startswith(f"'{tmp_path}/a/config.pbtxt' is no valid model configuration (")
    assert text.endswith("); export the model again with `stemserve export a`.")


def test_a_configuration_that_is_no_text(tmp_path, add_model):
    add_model("a")
    (tmp_path / "a" / "config.pbtxt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelFileMissingError, match="is no valid model configuration"):
        read_config(tmp_path, "a")


@pytest.fixture
def add_ensemble(add_model, make_spec):
    """Describe an ensemble of two specialists that need not be there."""

    def add(name, *files):
        spec = make_spec(name=name)
        parts = [make_spec(name=f"{name}_{stem}", stems=(stem,)) for stem in spec.stems]
        add_model(name, *files, config=config_text(spec, parts))
        return [part.name for part in parts]

    return add


def test_an_ensemble_is_exported_once_all_its_specialists_are(tmp_path, add_model, add_ensemble):
    vocals, rest = add_ensemble("pair", "1/export.json")
    add_model("single", "1/model.onnx")
    assert exported_models(tmp_path) == ["single"]
    add_model(vocals, "1/model.onnx")
    assert exported_models(tmp_path) == [vocals, "single"]
    assert models_to_serve(tmp_path, []) == [vocals, "single"]  # the rest can be served
    add_model(rest)
    assert refusal(tmp_path, ["pair"]) == (
        f"Model 'pair' joins pair_vocals, pair_accompaniment, and not all of them are built in "
        f"'{tmp_path}'. Build them with `stemserve export pair`."
    )
    (tmp_path / rest / "1").mkdir()
    (tmp_path / rest / "1" / "model.onnx").touch()
    assert models_to_serve(tmp_path, ["pair"]) == ["pair"]
    assert exported_models(tmp_path) == ["pair", rest, vocals, "single"]


def test_an_ensemble_without_a_version_is_none_that_triton_loads(tmp_path, add_model, add_ensemble):
    """As in a checkout, where the configurations are and nothing that was built."""
    for name in add_ensemble("pair"):
        add_model(name, "1/model.onnx")
    assert exported_models(tmp_path) == ["pair_accompaniment", "pair_vocals"]
    assert "`stemserve export pair`" in refusal(tmp_path, ["pair"])


def test_an_ensemble_that_joins_itself(tmp_path, add_model):
    config = 'platform: "ensemble" ensemble_scheduling { step { model_name: "loop" } }'
    add_model("loop", "1/export.json", config=config)
    assert exported_models(tmp_path) == []


def test_another_models_broken_configuration_does_not_stop_a_named_one(tmp_path, add_model):
    add_model("good", "1/model.onnx")
    add_model("broken", "1/model.onnx", config="{")
    assert models_to_serve(tmp_path, ["good"]) == ["good"]


def test_the_default_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_repository() == Path("/data/stemserve/model_repository")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/a")
    assert default_repository() == Path("/home/a/.local/share/stemserve/model_repository")
    (tmp_path / "model_repository").mkdir()
    assert default_repository() == Path("model_repository")
    monkeypatch.setenv("STEMSERVE_REPOSITORY", os.fspath(tmp_path / "mine"))
    assert default_repository() == tmp_path / "mine"
