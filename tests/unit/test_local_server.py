"""LocalServer with a shell script in tritonserver's place."""

import os
import shutil
import socket
import stat
import time
from pathlib import Path

import pytest

from stemserve import server
from stemserve.errors import LocalServerError, ModelFileMissingError, PortTakenError, StartupError
from stemserve.server import LocalServer


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "model_repository"
    (folder / "tiny" / "1").mkdir(parents=True)
    (folder / "tiny" / "config.pbtxt").write_text('name: "tiny"\n')
    (folder / "tiny" / "1" / "model.onnx").touch()
    return folder


@pytest.fixture
def fake_triton(tmp_path, monkeypatch):
    """Put a shell script named tritonserver first on PATH; it writes down its process and call."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def install(script):
        binary = folder / "tritonserver"
        binary.write_text(
            f'#!/bin/sh\necho $$ > "{tmp_path}/pid"\n'
            f'printf "%s\\n" "$@" > "{tmp_path}/arguments"\n{script}\n'
        )
        binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Temporary folders of this test, to see what is left of them."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def process_of(tmp_path):
    return int((tmp_path / "pid").read_text())


def is_gone(pid):
    return not Path(f"/proc/{pid}").exists()


def test_a_server_that_ends_at_once(tmp_path, repository, fake_triton, scratch):
    fake_triton(
        'for n in $(seq 1 40); do echo "line $n"; done\n'
        'echo "E1123 failed to load tiny: out of luck" >&2\nexit 7'
    )
    with pytest.raises(StartupError) as caught:
        LocalServer(repository, startup_deadline_s=30)
    text = str(caught.value)
    assert text.startswith(
        "tritonserver ended with status 7 while it was starting. Its log ends with:\n"
    )
    assert text.endswith("  line 40\n  E1123 failed to load tiny: out of luck")
    assert "line 5\n" not in text  # the tail alone
    assert is_gone(process_of(tmp_path))
    assert list(scratch.iterdir()) == []


def test_a_server_that_says_nothing(repository, fake_triton):
    fake_triton("exit 1")
    with pytest.raises(StartupError, match="ended with status 1 while it was starting"):
        LocalServer(repository)


def test_a_server_that_never_opens_its_port(tmp_path, repository, fake_triton, scratch):
    fake_triton("echo still loading\nexec sleep 60")
    started = time.monotonic()
    with pytest.raises(StartupError) as caught:
        LocalServer(repository, startup_deadline_s=1)
    assert time.monotonic() - started < 10
    assert str(caught.value) == (
        "tritonserver was not ready within 1 s; raise the deadline or look at its log, which ends "
        "with:\n  still loading"
    )
    assert is_gone(process_of(tmp_path))
    assert list(scratch.iterdir()) == []


def test_a_server_that_ignores_term_is_killed(tmp_path, repository, fake_triton, monkeypatch):
    monkeypatch.setattr(server, "EXIT_TIMEOUT_S", -4.7)  # 5 s of grace are added
    fake_triton("trap '' TERM\nexec sleep 60")
    started = time.monotonic()
    with pytest.raises(StartupError):
        LocalServer(repository, startup_deadline_s=0.3)
    assert time.monotonic() - started < 10
    assert is_gone(process_of(tmp_path))


def test_an_interrupt_while_starting_ends_the_server(
    tmp_path, repository, fake_triton, scratch, monkeypatch
):
    fake_triton("exec sleep 60")

    def interrupt(_self):
        while not (tmp_path / "arguments").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalServer, "_wait_until_ready", interrupt)
    with pytest.raises(KeyboardInterrupt):
        LocalServer(repository)
    assert is_gone(process_of(tmp_path))
    assert list(scratch.iterdir()) == []


def test_shared_memory_of_the_run_is_removed(repository, fake_triton, monkeypatch, tmp_path):
    """Regions of others stay."""
    shm = tmp_path / "shm"
    shm.mkdir()
    (shm / "stemserve_other_1").touch()
    monkeypatch.setattr(server, "_SHM", shm)
    fake_triton(
        "prefix=$(printf '%s\\n' \"$@\" | sed -n 's/.*python,shm-region-prefix-name=//p')\n"
        f'touch "{shm}/${{prefix}}1" "{shm}/${{prefix}}2"\nls "{shm}"\nexit 1'
    )
    with pytest.raises(StartupError) as caught:
        LocalServer(repository)
    assert str(caught.value).count("  stemserve_") == 3  # they were there
    assert [path.name for path in shm.iterdir()] == ["stemserve_other_1"]


def test_the_server_is_told_what_to_serve_and_where(tmp_path, repository, fake_triton):
    fake_triton("exit 1")
    with pytest.raises(StartupError):
        LocalServer(repository, ["tiny"], metrics_port=0)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert f"--model-repository={repository}" in arguments
    assert "--model-control-mode=explicit" in arguments
    assert "--load-model=tiny" in arguments
    assert "--grpc-address=127.0.0.1" in arguments
    assert "--metrics-address=127.0.0.1" in arguments
    assert "--allow-http=false" in arguments
    assert any(text.startswith("--grpc-port=") and int(text[12:]) > 0 for text in arguments)


def test_the_log_may_be_kept(tmp_path, repository, fake_triton):
    fake_triton("echo hello\nexit 1")
    log = tmp_path / "server.log"
    with pytest.raises(StartupError):
        LocalServer(repository, log=log)
    assert log.read_text() == "hello\n"


def test_a_log_that_cannot_be_written(tmp_path, repository, fake_triton, scratch):
    fake_triton("exit 1")
    log = tmp_path / "none" / "server.log"
    with pytest.raises(LocalServerError) as caught:
        LocalServer(repository, log=log)
    assert f"'{log}'" in str(caught.value)
    assert "No such file or directory" in str(caught.value)
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("which", ["grpc_port", "http_port", "metrics_port"])
def test_a_port_that_is_taken(repository, fake_triton, scratch, which):
    fake_triton("exit 1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTakenError) as caught:
            LocalServer(repository, **{which: port})
    assert str(caught.value) == (
        f"127.0.0.1:{port} cannot be listened on ([Errno 98] Address already in use); choose "
        "another port, or stop the process that has it."
    )
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 65_536), ("192.0.2.1", 0)])
def test_an_address_that_cannot_be_listened_on(repository, host, port):
    with pytest.raises(PortTakenError, match=rf"^{host}:{port} cannot be listened on \("):
        LocalServer(repository, host=host, grpc_port=port)


def test_a_model_without_weights(repository):
    shutil.rmtree(repository / "tiny" / "1")
    with pytest.raises(ModelFileMissingError, match="No model in"):
        LocalServer(repository)
