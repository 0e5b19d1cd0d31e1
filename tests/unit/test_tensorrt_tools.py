"""The GPU's and TensorRT's identity, trtexec, the child process that builds ahead of time."""

import json
import os
import stat
import sys
from types import SimpleNamespace

import pytest
from support.models import identity_spec, write_identity

from stemserve.errors import MissingExtraError, PlatformError
from stemserve_export.tensorrt import ahead_of_time
from stemserve_export.tensorrt.ahead_of_time import check_graph, find_checker
from stemserve_export.tensorrt.builder import BuildSettings, GraphContract
from stemserve_export.tensorrt.errors import GpuError, TensorRTError
from stemserve_export.tensorrt.machine import (
    Gpu,
    first_gpu,
    installed_tensorrt,
    same_tensorrt,
    version_text,
)
from stemserve_export.tensorrt.trtexec import PATH_IN_IMAGES, Trtexec

# --- machine --------------------------------------------------------------------------------


def driver(count=1, capability=(8, 9), name=b"NVIDIA L4", status=0):
    """A libcuda.so.1 that answers as the driver API does."""

    def put(pointer, value):
        pointer._obj.value = value
        return 0

    def attribute(pointer, which, device):
        return put(pointer, capability[{75: 0, 76: 1}[which]])

    def get_name(buffer, size, device):
        assert len(name) < size
        buffer.value = name
        return 0

    return SimpleNamespace(
        cuInit=lambda flags: status,
        cuDeviceGetCount=lambda pointer: put(pointer, count),
        cuDeviceGet=lambda pointer, index: put(pointer, index) if index < count else 101,
        cuDeviceGetAttribute=attribute,
        cuDeviceGetName=get_name,
    )


def test_the_first_gpu():
    assert first_gpu(lambda file: driver()) == Gpu("NVIDIA L4", "8.9")
    assert first_gpu(lambda file: driver(capability=(12, 0))).compute_capability == "12.0"


def test_no_driver():
    def missing(file):
        raise OSError(f"{file}: cannot open shared object file")

    with pytest.raises(GpuError, match=r"no NVIDIA driver \(libcuda\.so\.1"):
        first_gpu(missing)
    assert installed_tensorrt(missing) is None


@pytest.mark.parametrize(("kind", "code"), [({"status": 100}, 100), ({"count": 0}, 101)])
def test_a_driver_without_a_gpu(kind, code):
    with pytest.raises(GpuError, match=f"CUDA error {code}.*nvidia-smi"):
        first_gpu(lambda file: driver(**kind))


def test_the_installed_tensorrt():
    def load(file):
        if file != "libnvinfer.so.10":
            raise OSError(file)
        return SimpleNamespace(getInferLibVersion=lambda: 100500)

    assert installed_tensorrt(load) == "10.5.0"


def test_versions():
    assert version_text(100500) == "10.5.0"
    assert version_text(101303) == "10.13.3"
    assert version_text(110001) == "11.0.1"
    assert same_tensorrt("10.5.0", "10.5.0.18")
    assert not same_tensorrt("10.5.0", "10.5.1")
    assert not same_tensorrt("10.5.0", "10.15.0")


# --- trtexec --------------------------------------------------------------------------------

SCRIPT = """\
#!{python}
import json, sys
print("&&&& RUNNING TensorRT.trtexec [TensorRT v100500] [b18] # trtexec", *sys.argv[1:])
if "--help" in sys.argv:
    sys.exit(0)
options = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:])
if {fails}:
    print("[11/24/2026-00:00:00] [E] Error[2]: out of memory")
    print("&&&& FAILED TensorRT.trtexec")
    sys.exit(1)
cache = options["timingCacheFile"]
try:
    before = open(cache).read()
except FileNotFoundError:
    before = ""
open(cache, "w").write(before + "+")
json.dump({{"options": options, "cache": before}}, open(options["saveEngine"], "w"))
"""


@pytest.fixture
def trtexec(tmp_path):
    def make(fails=False):
        path = tmp_path / "trtexec"
        path.write_text(SCRIPT.format(python=sys.executable, fails=fails))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return Trtexec(str(path))

    return make


def test_trtexec_builds_what_the_package_would(trtexec, tmp_path):
    spec = identity_spec(chunk_samples=256)
    settings = BuildSettings(workspace_bytes=4 << 30, timing_cache=tmp_path / "caches" / "one")
    tool = trtexec()
    assert tool.version() == "10.5.0"
    graph = tmp_path / "model.onnx"
    plans = [json.loads(tool.build(graph, GraphContract.of(spec), settings).data) for _ in range(2)]
    options = plans[0]["options"]
    assert options["onnx"] == str(graph)
    assert options["minShapes"] == "mixture:1x2x256"
    assert options["optShapes"] == "mixture:2x2x256"
    assert options["maxShapes"] == "mixture:4x2x256"
    assert options["memPoolSize"] == "workspace:4096"
    assert {"stronglyTyped", "noTF32", "skipInference"} <= set(options)
    assert [plan["cache"] for plan in plans] == ["", "+"]
    allowed = tool.build(graph, GraphContract.of(spec), BuildSettings(tf32=True))
    assert "noTF32" not in json.loads(allowed.data)["options"]


def test_trtexec_that_fails(trtexec, tmp_path):
    with pytest.raises(TensorRTError, match=r"status 1: Error\[2\]: out of memory\."):
        trtexec(fails=True).build(
            tmp_path / "model.onnx", GraphContract.of(identity_spec()), BuildSettings()
        )


def test_trtexec_that_is_missing(tmp_path):
    with pytest.raises(TensorRTError, match="is not installed"):
        Trtexec(str(tmp_path / "none")).version()


def test_trtexec_of_an_image(tmp_path, monkeypatch):
    """A docker that writes down how it was called, and runs the command without a container."""
    calls = tmp_path / "calls"
    (tmp_path / "tool").write_text(SCRIPT.format(python=sys.executable, fails=False))
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"open({str(calls)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "if sys.argv[1] == 'run':\n"
        "    options = sys.argv[sys.argv.index('image:1') + 1:]\n"
        f"    command = [{sys.executable!r}, {str(tmp_path / 'tool')!r}, *options]\n"
        "    os.execv(command[0], command)\n"
    )
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{docker.parent}{os.pathsep}{os.environ['PATH']}")
    graph = tmp_path / "models" / "model.onnx"
    plan = Trtexec(PATH_IN_IMAGES, "image:1").build(
        graph, GraphContract.of(identity_spec()), BuildSettings()
    )
    assert json.loads(plan.data)["options"]["onnx"] == str(graph)
    run, removed = [json.loads(line) for line in calls.read_text().splitlines()]
    assert run[:2] == ["run", "--rm"] and "--gpus=all" in run
    assert f"--volume={graph.parent}:{graph.parent}:ro" in run
    assert f"--entrypoint={PATH_IN_IMAGES}" in run
    [name] = [word.removeprefix("--name=") for word in run if word.startswith("--name=")]
    assert removed == ["rm", "--force", name]


# --- ahead of time --------------------------------------------------------------------------

WORKER = """\
import json, os, signal, sys, time
question = json.load(sys.stdin)
if question["task"] == "describe":
    print(json.dumps({"version": "1.7", "compute_capabilities": ["7.5", "8.6"]}))
    sys.exit(0)
capability = question["compute_capability"]
print("what the builder says", file=sys.stderr)
if capability == "1.0":
    os.abort()
if capability == "2.0":
    os.kill(os.getpid(), signal.SIGKILL)
if capability == "3.0":
    time.sleep(60)
if capability == "4.0":
    sys.exit(3)
if capability == "5.0":
    print(json.dumps({"problem": "It cannot."}))
    sys.exit(0)
profile = question["contract"]["profile"]["max"]
print(json.dumps({"seconds": 1.5, "layers": 7, "plan_bytes": profile[0], "peak_rss_bytes": 9}))
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A worker that ends in every way that a builder can."""
    (tmp_path / "fake_worker.py").write_text(WORKER)
    monkeypatch.setattr(ahead_of_time, "WORKER", "fake_worker")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(ahead_of_time.importlib.util, "find_spec", lambda name: object())
    return tmp_path


def test_every_end_of_a_builder_is_a_result(worker):
    spec = identity_spec(chunk_samples=256)
    seen = []
    builds = check_graph(
        spec,
        worker / "model.onnx",
        ["1.0", "2.0", "4.0", "5.0", "8.6"],
        time_limit_s=30,
        report=seen.append,
    )
    assert seen == builds
    crashed, killed, status, refused, built = builds
    assert "crashed (SIGABRT)" in crashed.problem
    assert "what the builder says" in crashed.problem
    assert "memory runs out" in killed.problem
    assert "ended with status 3" in status.problem
    assert refused.problem == "It cannot."
    assert built.problem is None
    assert (built.seconds, built.layers, built.plan_bytes) == (1.5, 7, 4)
    assert built.record()["compute_capability"] == "8.6"


def test_a_builder_that_takes_too_long_is_ended(worker):
    [build] = check_graph(identity_spec(), worker / "model.onnx", ["3.0"], time_limit_s=1)
    assert "longer than 1 s" in build.problem and "--time-limit" in build.problem


def test_what_the_checker_knows(worker):
    checker = find_checker()
    assert (checker.version, checker.compute_capabilities) == ("1.7", ("7.5", "8.6"))


def test_a_machine_that_has_no_wheel(monkeypatch):
    monkeypatch.setattr(ahead_of_time.platform, "machine", lambda: "aarch64")
    with pytest.raises(PlatformError, match="Linux on aarch64"):
        find_checker()


def test_a_missing_wheel(monkeypatch):
    monkeypatch.setattr(ahead_of_time.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"stemserve\[tensorrt-check\]"):
        find_checker()


# --- the commands ---------------------------------------------------------------------------


@pytest.fixture
def commands(monkeypatch):
    """The commands, called as click calls them."""
    from click.testing import CliRunner

    from stemserve_export.tensorrt import cli

    def run(name, *arguments):
        return CliRunner().invoke(getattr(cli, name), list(map(str, arguments)))

    return run


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "repository"
    root.mkdir()
    write_identity(root, identity_spec(chunk_samples=256))
    return root


def test_check_tensorrt_prints_json(worker, repository, commands):
    before = sorted(repository.rglob("*"))
    done = commands("check_tensorrt", "identity", "--repository", repository, "--json")
    assert done.exit_code == 0
    record = json.loads(done.stdout)
    # Without 7.5, which TensorRT-RTX cannot build any STFT for.
    assert [build["compute_capability"] for build in record["builds"]] == ["8.6"]
    assert record["tensorrt_rtx"] == "1.7"
    assert sorted(repository.rglob("*")) == before


def test_check_tensorrt_fails_with_the_reason(worker, repository, commands):
    done = commands(
        "check_tensorrt", "--repository", repository,
        "--compute-capability", "5.0", "--compute-capability", "8.6",
    )  # fmt: skip
    assert isinstance(done.exception, TensorRTError)
    assert str(done.exception) == "1 of 2 builds failed.\nidentity: It cannot."
    assert "fails" in done.stdout and "1.5 s" in done.stdout


def test_build_and_check_an_engine(repository, commands, monkeypatch, tmp_path):
    from support import fake_tensorrt

    from stemserve_export.tensorrt import engine, machine

    monkeypatch.setattr(machine, "first_gpu", lambda: Gpu("NVIDIA L4", "8.9"))
    builder = engine.PythonBuilder(fake_tensorrt.make())
    monkeypatch.setattr(engine, "choose_builder", lambda image: builder)
    arguments = ("identity", "--repository", repository, "--timing-cache", tmp_path / "timing")
    assert "Built" in commands("build_engine", *arguments).stdout
    assert "Up to date" in commands("build_engine", *arguments).stdout
    fits = commands("check_engine", "--repository", repository, "--tensorrt-version", "10.5.0")
    assert fits.exit_code == 0 and "engines for 8.9 fit" in fits.stdout
    other = commands(
        "check_engine", "--repository", repository, "--tensorrt-version", "10.6.0", "--json"
    )
    assert "TensorRT 10.6.0" in str(other.exception)
    assert "TensorRT 10.6.0" in json.loads(other.stdout)[0]["problem"]
