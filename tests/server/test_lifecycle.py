"""The local server comes up in time, goes down without a trace, and says what is wrong."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from support.models import identity_spec, write_identity

from stemserve.errors import EnvironmentMismatchError, StartupError
from stemserve.server import LocalServer
from stemserve.triton_install import find_triton


@pytest.fixture
def small_repository(tmp_path):
    write_identity(tmp_path / "repository", identity_spec())
    return tmp_path / "repository"


def traces():
    """What a server may leave behind: processes, shared memory."""
    processes = {
        process.pid
        for process in psutil.process_iter(["name"])
        if "triton" in (process.info["name"] or "")
    }
    return processes, set(Path("/dev/shm").glob("*stemserve*")) | set(
        Path("/dev/shm").glob("*triton*")
    )


def gone_within(before, seconds):
    deadline = time.monotonic() + seconds
    while traces() != before and time.monotonic() < deadline:
        time.sleep(0.1)
    return traces() == before


def test_nothing_is_left_behind(small_repository):
    before = traces()
    with LocalServer(small_repository) as server:
        processes, shared = traces()
        assert len(processes - before[0]) >= 2  # the server and its stub
        assert any("stemserve_" in path.name for path in shared - before[1])
        scratch = server.log.parent
        assert server.peak_rss_mb() > 30
    assert gone_within(before, 5)
    assert not scratch.exists()


def test_a_server_that_was_killed_is_cleaned_up(small_repository):
    before = traces()
    with LocalServer(small_repository) as server:
        os.kill(server.pid, signal.SIGKILL)
    assert gone_within(before, 10)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_serve_command(small_repository, how):
    before = traces()
    process = subprocess.Popen(
        [sys.executable, "-m", "stemserve.cli", "serve", "--repository", str(small_repository),
         "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        lines = [process.stdout.readline() for _ in range(5)]
        assert lines[0].startswith("Serving identity (process ")
        http = lines[2].split()[-1]
        metrics = lines[3].split()[-1]
        with urllib.request.urlopen(f"{http}/v2/health/ready", timeout=5) as reply:
            assert reply.status == 200
        with urllib.request.urlopen(metrics, timeout=5) as reply:
            assert b"nv_inference_count" in reply.read()
    finally:
        process.send_signal(how)
        process.communicate(timeout=60)
    assert process.returncode == (143 if how == signal.SIGTERM else 130)
    assert gone_within(before, 5)


def test_a_launcher_that_is_killed_takes_the_server_along(small_repository):
    before = traces()
    process = subprocess.Popen(
        [sys.executable, "-m", "stemserve.cli", "serve", "--repository", str(small_repository),
         "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.readline()
    process.kill()
    process.communicate(timeout=10)
    deadline = time.monotonic() + 20
    while traces()[0] != before[0] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert traces()[0] == before[0]


def test_port_taken(small_repository, run_cli):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        done = run_cli("serve", "--repository", small_repository, "--grpc-port", port)
    assert done.returncode == 42
    assert f"127.0.0.1:{port} cannot be listened on" in done.stderr
    assert "choose another port" in done.stderr


def test_missing_weights(small_repository, run_cli):
    (small_repository / "identity" / "1" / "model.onnx").unlink()
    named = run_cli("serve", "--repository", small_repository, "--model", "identity")
    assert named.returncode == 43
    assert "Model 'identity' has no weights" in named.stderr
    assert "stemserve export identity" in named.stderr
    unnamed = run_cli("serve", "--repository", small_repository)
    assert unnamed.returncode == 43


def test_damaged_graph_shows_the_log(small_repository):
    before = traces()
    (small_repository / "identity" / "1" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(StartupError, match=r"(?s)ended with status.*starting.*identity"):
        LocalServer(small_repository)
    assert gone_within(before, 5)


def test_numpy_2_is_refused_by_the_backend_itself(small_repository, tmp_path):
    """Should the check before the start be passed by, the backend still refuses."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    install = find_triton(scratch)
    model = scratch / "backends" / "onnxruntime" / "model.py"
    # What numpy 2 would tell: PYTHONPATH does not reach the stub, so another numpy cannot be put
    # before the venv's.
    model.write_text(model.read_text().replace("np.__version__", "'2.2.6'"))
    done = subprocess.run(
        [install.binary, *install.arguments, f"--model-repository={small_repository}",
         "--grpc-port=0", "--allow-http=false", "--allow-metrics=false"],
        env={**os.environ, **install.environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0
    assert "numpy 2.2.6 makes this server answer with empty tensors" in done.stderr


def test_numpy_2_is_refused_before_the_start(small_repository, monkeypatch):
    monkeypatch.setattr("stemserve.triton_install.version", lambda name: "2.2.6")
    with pytest.raises(EnvironmentMismatchError, match=r"needs numpy 1.x and numpy 2.2.6 is"):
        LocalServer(small_repository)
