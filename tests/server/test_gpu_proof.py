"""The GPU owner's script on a CPU: staged, served by a real Triton, compared, measured, told."""

import json
import math

import numpy as np
import pytest
from support.models import identity_spec, write_identity

from stemserve.errors import GateError, StartupError
from stemserve_export.gpu_proof import __main__ as script
from stemserve_export.gpu_proof import measure
from stemserve_export.gpu_proof.servers import container_command, triton
from stemserve_export.gpu_proof.ways import CPU_WAYS, GPU_WAYS, Way, stage


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "repository"
    root.mkdir()
    write_identity(root, identity_spec(max_batch_size=3))
    return root


def run(repository, ways=CPU_WAYS, models=("identity",), limit_s=100.0):
    return script.run(
        repository,
        list(models),
        ways,
        image=None,
        gpu=None,
        builder=None,
        audio=None,
        seconds=0.1,
        clock=script.Clock(limit_s),
        say=lambda text: None,
    )


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_batch_size_is_compared_and_measured(repository):
    before = contents(repository)
    [outcome] = run(repository)
    assert outcome.problem is None
    assert outcome.parity_db == {"same": math.inf, "half": math.inf}
    assert [speed.batch_size for speed in outcome.speed] == [1, 2, 3]
    for speed in outcome.speed:
        assert 0 < speed.compute_ms <= 1.5 * speed.client_ms
        audio_s = speed.batch_size * 11025 / 44100
        assert speed.x_realtime == pytest.approx(audio_s / (speed.compute_ms / 1000), rel=0.3)
        assert speed.requests >= 3
    assert contents(repository) == before


def test_a_stem_that_differs_fails(repository, monkeypatch):
    true = measure.cpu_stems

    def louder(*arguments):
        stems = true(*arguments)
        return {**stems, "half": stems["half"] * np.float32(1.01)}

    monkeypatch.setattr(measure, "cpu_stems", louder)
    [outcome] = run(repository)
    assert outcome.problem == "Parity below 65 dB: half 40.1 dB."


def test_a_way_that_does_not_start_is_an_outcome(repository):
    # It asks for a GPU, which the test's machine must not have for this.
    ways = (Way("ORT TensorRT", "onnxruntime_tensorrt"), *CPU_WAYS)
    failed, done = run(repository, ways)
    assert "tritonserver ended" in failed.problem
    assert done.problem is None


def test_what_is_not_begun_in_time_is_a_failure(repository):
    [outcome] = run(repository, limit_s=-1.0)
    assert "not begun" in outcome.problem


def test_half_precision_is_compared_with_the_fp32_artefact(repository):
    write_identity(repository, identity_spec("identity_fp16", precision="fp16", max_batch_size=3))
    [outcome] = run(repository, models=["identity_fp16"])
    assert (outcome.reference, outcome.precision) == ("identity", "fp16")
    write_identity(repository, identity_spec("lonely_fp16", precision="fp16", max_batch_size=3))
    [outcome] = run(repository, models=["lonely_fp16"])
    assert outcome.reference == "lonely_fp16"


def test_the_command(repository, tmp_path, capsys, monkeypatch):
    report = tmp_path / "reports" / "proof.json"
    arguments = ["--cpu", "--repository", str(repository), "--seconds", "0.1"]
    script.prove([*arguments, "--report", str(report)], standalone_mode=False)
    record = json.loads(report.read_text())
    assert record["gpu"] is None
    [outcome] = record["outcomes"]
    assert outcome["parity_db"] == {"same": "inf", "half": "inf"}
    assert [speed["batch_size"] for speed in outcome["speed"]] == [1, 2, 3]
    shown = capsys.readouterr().out
    assert "identical" in shown and "Throughput" in shown
    monkeypatch.setitem(script.LEAST_DB, "fp32", math.nan)  # nothing is good enough
    with pytest.raises(GateError, match="1 of 1 failed"):
        script.prove([*arguments, "--report", str(report)], standalone_mode=False)


@pytest.mark.parametrize(
    ("level", "tf32", "fails"),
    [(70.0, False, False), (60.0, False, True), (60.0, True, False), (-math.inf, True, True)],
)
def test_tf32_is_measured_and_not_judged(level, tf32, fails):
    outcome = script.Outcome("m", "fp32", "way", tf32, "m", {"vocals": level})
    outcome.judge()
    assert bool(outcome.problem) is fails


def test_the_ways_differ_in_what_they_say():
    assert len({way.name for way in GPU_WAYS}) == len(GPU_WAYS)
    for way in GPU_WAYS:
        # The TensorRT provider has no option for it.
        forced = way.environment.get("NVIDIA_TF32_OVERRIDE") == "0"
        assert forced == (way.runtime == "onnxruntime_tensorrt" and not way.tf32)


def test_staging_sets_tf32_and_leaves_batches_alone(repository, tmp_path):
    for index, way in enumerate(way for way in GPU_WAYS if way.runtime == "cuda"):
        staging = tmp_path / f"staged{index}"
        staging.mkdir()
        stage(repository, "identity", way, staging)
        text = (staging / "identity" / "config.pbtxt").read_text()
        value = '"1"' if way.tf32 else '"0"'
        assert f'key: "use_tf32"\n        value: {value}' in text
        assert "dynamic_batching" not in text


def test_the_container_listens_on_loopback_and_goes_by_itself(tmp_path):
    command = container_command("n", tmp_path, "image:1", {"NVIDIA_TF32_OVERRIDE": "0"}, 1234)
    assert command[:3] == ["docker", "run", "--rm"]
    assert "--publish=127.0.0.1:1234:8001" in command
    assert f"--volume={tmp_path}:/models:ro" in command
    assert command.index("--env=NVIDIA_TF32_OVERRIDE=0") < command.index("image:1")


def test_a_container_that_ends_says_why_and_is_removed(tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    docker = tmp_path / "docker"
    docker.write_text(
        f'#!/bin/sh\necho "$1" >> {calls}\n[ "$1" = run ] && echo "no such image" && exit 125\n'
    )
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    staged = tmp_path / "staged"
    staged.mkdir()
    with (
        pytest.raises(StartupError, match=r"status 125[^$]*no such image"),
        triton(staged, "m", image="image:1", environment={}, deadline_s=20),
    ):
        pass
    assert calls.read_text().split() == ["run", "stop", "rm"]
