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


class Traces:
    """What servers of one repository leave on the machine: processes and shared memory."""

    def __init__(self, repository):
        self._repository = str(repository)
        self._prefixes = set()

    def processes(self):
        """Servers and stubs that are alive, by pid."""
        found = set()
        for process in psutil.process_iter(["cmdline", "status"]):
            command = process.info["cmdline"] or []
            if "triton" in " ".join(command[:1]) and self._repository in " ".join(command):
                found.add(process.pid)
                self._prefixes |= {
                    part.partition("shm-region-prefix-name=")[2]
                    for part in command
                    if "shm-region-prefix-name=" in part
                }
        return found

    def regions(self):
        """Shared memory of the servers that were seen."""
        return {path for prefix in self._prefixes for path in Path("/dev/shm").glob(f"{prefix}*")}

    def gone_within(self, seconds):
        deadline = time.monotonic() + seconds
        while (self.processes() or self.regions()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.processes() and not self.regions()


@pytest.fixture
def traces(small_repository):
    return Traces(small_repository)


def test_nothing_is_left_behind(small_repository, traces):
    with LocalServer(small_repository) as server:
        assert len(traces.processes()) == 2  # the server and its stub
        assert traces.regions()
        scratch = server.log.parent
        assert server.peak_rss_mb() > 30
    assert traces.gone_within(5)
    assert not scratch.exists()


def test_a_server_that_was_killed_is_cleaned_up(small_repository, traces):
    with LocalServer(small_repository) as server:
        assert traces.processes()
        os.kill(server.pid, signal.SIGKILL)
    assert traces.gone_within(10)


def start_serving(repository):
    return subprocess.Popen(
        [sys.executable, "-m", "stemserve.cli", "serve", "--repository", str(repository),
         "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_serve_command(small_repository, traces, how):
    process = start_serving(small_repository)
    try:
        lines = [process.stdout.readline() for _ in range(5)]
        assert lines[0].startswith("Serving identity (process ")
        http = lines[2].split()[-1]
        metrics = lines[3].split()[-1]
        with urllib.request.urlopen(f"{http}/v2/health/ready", timeout=5) as reply:
            assert reply.status == 200
        with urllib.request.urlopen(metrics, timeout=5) as reply:
            assert b"nv_inference_count" in reply.read()
        assert traces.processes()
    finally:
        process.send_signal(how)
        process.communicate(timeout=60)
    assert process.returncode == (143 if how == signal.SIGTERM else 130)
    assert traces.gone_within(5)


def test_a_launcher_that_is_killed_takes_the_server_along(small_repository, traces):
    process = start_serving(small_repository)
    process.stdout.readline()
    assert traces.processes()
    process.kill()
    process.communicate(timeout=10)
    assert traces.gone_within(20)


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


def test_damaged_graph_shows_the_log(small_repository, traces):
    (small_repository / "identity" / "1" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(StartupError, match=r"(?s)ended with status.*starting.*identity"):
        LocalServer(small_repository)
    assert traces.gone_within(5)


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
