"""Engines in the repository: built once, described, refused where they do not fit."""

import hashlib
import json
import os
from dataclasses import replace

import pytest
from google.protobuf import text_format
from support import fake_tensorrt
from support.models import identity_spec, write_identity
from tritonclient.grpc import model_config_pb2

from stemserve.errors import ExportError
from stemserve_export.tensorrt import engine as engine_module
from stemserve_export.tensorrt.engine import PythonBuilder, build_engine
from stemserve_export.tensorrt.errors import EngineMismatchError, TensorRTError
from stemserve_export.tensorrt.machine import Gpu
from stemserve_export.tensorrt.manifest import read_manifest, verify_engines

L4 = Gpu("NVIDIA L4", "8.9")
A100 = Gpu("NVIDIA A100", "8.0")


class Repository:
    """A repository with one exported model, and builders to count what they build."""

    def __init__(self, root):
        self.root = root
        self.spec = identity_spec(chunk_samples=256)
        write_identity(root, self.spec)
        self.version = root / "identity" / "1"
        self.api = fake_tensorrt.make()
        self.cache = root.parent / "cache"

    def build(self, gpu=L4, api=None, **choices):
        return build_engine(
            self.root,
            "identity",
            PythonBuilder(api or self.api),
            gpu,
            cache=self.cache,
            report=lambda text: None,
            **choices,
        )

    def config(self):
        text = (self.root / "identity/configs/tensorrt.pbtxt").read_text()
        return text_format.Parse(text, model_config_pb2.ModelConfig())

    def files(self):
        return {
            str(path.relative_to(self.root)): path.read_bytes()
            for path in self.root.rglob("*")
            if path.is_file()
        }

    def change_graph(self):
        graph = self.version / "model.onnx"
        graph.write_bytes(graph.read_bytes() + b"\x3a\x00")  # an empty field: another digest


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "repository"
    root.mkdir()
    return Repository(root)


def test_a_build_leaves_plan_manifest_and_configuration(repository):
    done = repository.build()
    assert done.built
    assert done.path == repository.version / "model.sm89.plan"
    told = json.loads(done.path.read_bytes())
    assert told["strongly_typed"] and not told["tf32"]
    [(file, engine)] = read_manifest(repository.version).items()
    assert file == "model.sm89.plan"
    assert engine.tensorrt_version == "10.5.0"
    assert engine.compute_capability == "8.9"
    assert engine.gpu_name == "NVIDIA L4"
    assert engine.precision == "fp32"
    assert engine.tf32 is False
    assert engine.profile == {"min": [1, 2, 256], "opt": [2, 2, 256], "max": [4, 2, 256]}
    graph = (repository.version / "model.onnx").read_bytes()
    assert engine.graph_sha256 == hashlib.sha256(graph).hexdigest()
    assert engine.plan_sha256 == hashlib.sha256(done.path.read_bytes()).hexdigest()
    assert dict(repository.config().cc_model_filenames) == {"8.9": "model.sm89.plan"}
    assert not list(repository.root.rglob(".staging*"))


def test_nothing_is_built_twice(repository):
    repository.build()
    before = repository.files()
    done = repository.build()
    assert not done.built
    assert len(repository.api.built) == 1
    assert repository.files() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda repo: repo.change_graph(),
        lambda repo: (repo.version / "model.sm89.plan").write_bytes(b"damaged"),
        lambda repo: (repo.version / "model.sm89.plan").unlink(),
        lambda repo: (repo.version / "engines.json").unlink(),
    ],
    ids=["graph", "plan damaged", "plan gone", "manifest gone"],
)
def test_what_no_longer_fits_is_built_again(repository, change):
    repository.build()
    change(repository)
    assert repository.build().built
    assert verify_engines(repository.root, "identity")


def test_other_choices_are_built_again(repository):
    repository.build()
    assert repository.build(tf32=True).built
    assert read_manifest(repository.version)["model.sm89.plan"].tf32
    assert json.loads((repository.version / "model.sm89.plan").read_bytes())["tf32"]
    newer = fake_tensorrt.make("10.7.0")
    assert repository.build(tf32=True, api=newer).built
    # The fourth number is a build of the same release: its engines load.
    assert not repository.build(tf32=True, api=fake_tensorrt.make("10.7.0.23")).built


def test_a_lost_configuration_is_written_again_without_a_build(repository):
    repository.build()
    path = repository.root / "identity/configs/tensorrt.pbtxt"
    text = path.read_text()
    path.unlink()
    assert not repository.build().built
    assert path.read_text() == text


def test_engines_of_several_gpus_live_together(repository):
    repository.build(L4)
    repository.build(A100)
    assert dict(repository.config().cc_model_filenames) == {
        "8.0": "model.sm80.plan",
        "8.9": "model.sm89.plan",
    }
    assert set(read_manifest(repository.version)) == {"model.sm80.plan", "model.sm89.plan"}


def test_engines_of_an_earlier_graph_go(repository):
    repository.build(L4)
    repository.change_graph()
    repository.build(A100)
    assert dict(repository.config().cc_model_filenames) == {"8.0": "model.sm80.plan"}
    assert not (repository.version / "model.sm89.plan").exists()


def test_timing_caches_are_kept_apart_by_version_and_gpu(repository):
    repository.build(L4)
    repository.build(L4, tf32=True)
    repository.build(A100)
    caches = [json.loads(json.dumps(plan))["cache"] for plan in repository.api.built]
    assert caches == ["", "+", ""]
    assert len(list(repository.cache.iterdir())) == 2


def test_a_failed_build_leaves_the_repository_alone(repository):
    repository.build()
    repository.change_graph()
    before = repository.files()
    with pytest.raises(TensorRTError, match="out of memory"):
        repository.build(api=fake_tensorrt.make(fails="out of memory"))
    assert repository.files() == before


def test_a_repository_that_cannot_be_written_to(repository, monkeypatch):
    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(engine_module.tempfile, "TemporaryDirectory", full)
    with pytest.raises(ExportError, match="No space left on device"):
        repository.build()


def verify(repository, **machine):
    return verify_engines(repository.root, "identity", **machine)


def test_engines_that_fit(repository):
    repository.build()
    assert set(verify(repository)) == {"model.sm89.plan"}
    assert verify(repository, tensorrt_version="10.5.0.18", compute_capability="8.9")


def test_no_engine(repository):
    with pytest.raises(EngineMismatchError, match=r"no TensorRT engine.*stemserve build-engine"):
        verify(repository)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda repo: repo.change_graph(), "built from another graph"),
        (lambda repo: (repo.version / "model.sm89.plan").write_bytes(b"x"), "sha256 differs"),
        (lambda repo: (repo.version / "model.sm89.plan").unlink(), "listed .* and missing"),
        (lambda repo: (repo.version / "engines.json").write_text("{"), "is no list of engines"),
        (
            lambda repo: (repo.version / "engines.json").write_text('{"format": 2, "engines": {}}'),
            "format 2 instead of 1",
        ),
        (
            lambda repo: (repo.root / "identity/configs/tensorrt.pbtxt").unlink(),
            "would run ONNX Runtime instead",
        ),
        (
            lambda repo: (repo.root / "identity/configs/tensorrt.pbtxt").write_text("name: }"),
            "is no configuration",
        ),
    ],
)
def test_a_mismatch_is_a_sentence(repository, change, sentence):
    repository.build()
    change(repository)
    with pytest.raises(EngineMismatchError, match=sentence):
        verify(repository)


def test_another_machine(repository):
    repository.build()
    with pytest.raises(
        EngineMismatchError, match=r"compute capability 9\.0; it has engines for 8\.9"
    ):
        verify(repository, compute_capability="9.0")
    with pytest.raises(EngineMismatchError, match=r"TensorRT 10\.5\.0, and .* TensorRT 10\.7\.0"):
        verify(repository, tensorrt_version="10.7.0", compute_capability="8.9")


def test_a_configuration_of_another_export(repository):
    from stemserve_export.triton_config import config_text

    repository.build()
    other = replace(repository.spec, overlap=0.5)
    (repository.root / "identity/config.pbtxt").write_text(config_text(other))
    with pytest.raises(EngineMismatchError, match="another export"):
        verify(repository)


def test_a_configuration_that_names_another_plan(repository):
    repository.build()
    path = repository.root / "identity/configs/tensorrt.pbtxt"
    path.write_text(path.read_text().replace("sm89", "sm90"))
    with pytest.raises(EngineMismatchError, match="names the plans"):
        verify(repository)
