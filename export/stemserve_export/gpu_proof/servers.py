"""Starts a Triton for a staged repository and ends it, in a container or on this machine."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from stemserve.errors import LocalServerError, StartupError
from stemserve.server import LocalServer

# A batch of stems is 100 MB and more; Triton's default pool is 256 MB.
PINNED_POOL_BYTES: Final = 1 << 30
_GRPC_PORT: Final = 8001
_STOP_S: Final = 30


@contextlib.contextmanager
def triton(
    repository: Path,
    model: str,
    *,
    image: str | None,
    environment: Mapping[str, str],
    deadline_s: float,
) -> Iterator[str]:
    """Serve one model; yield the gRPC address.

    Args:
        repository: a staged repository.
        model: its model.
        image: container image of Triton; the tritonserver of this machine if None.
        environment: variables of the server.
        deadline_s: seconds to be ready in. ONNX Runtime builds TensorRT engines in them.

    Raises:
        LocalServerError: it cannot be started; see its subclasses.
    """
    if image is None:
        with (
            _environment(environment),
            LocalServer(repository, [model], startup_deadline_s=deadline_s) as server,
        ):
            yield server.url
    else:
        with _container(repository, image, environment, deadline_s) as url:
            yield url


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables of this process, which a server that it starts inherits."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def container_command(
    name: str, repository: Path, image: str, environment: Mapping[str, str], port: int
) -> list[str]:
    """Return the command that serves a repository in a container, on loopback."""
    return [
        *("docker", "run", "--rm", f"--name={name}", "--gpus=all", "--shm-size=1g"),
        f"--publish=127.0.0.1:{port}:{_GRPC_PORT}",
        f"--volume={repository.resolve()}:/models:ro",
        *(f"--env={key}={value}" for key, value in environment.items()),
        image,
        *("tritonserver", "--model-repository=/models", "--exit-timeout-secs=30"),
        f"--pinned-memory-pool-byte-size={PINNED_POOL_BYTES}",
    ]


@contextlib.contextmanager
def _container(
    repository: Path, image: str, environment: Mapping[str, str], deadline_s: float
) -> Iterator[str]:
    name = f"stemserve-proof-{uuid.uuid4().hex[:12]}"
    port = _free_port()
    log = repository / "tritonserver.log"
    try:
        with log.open("wb") as stream:
            process = subprocess.Popen(
                container_command(name, repository, image, environment, port),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
    except FileNotFoundError:
        raise LocalServerError(
            "Docker is not installed; it is needed to run the image that was named. Without "
            "--image the tritonserver on PATH is used."
        ) from None
    try:
        _wait_until_ready(process, port, log, deadline_s)
        yield f"127.0.0.1:{port}"
    finally:
        for command in (["stop", f"--time={_STOP_S}"], ["rm", "--force"]):
            subprocess.run(["docker", *command, name], capture_output=True, check=False)
        process.wait()


def _wait_until_ready(
    process: subprocess.Popen[bytes], port: int, log: Path, deadline_s: float
) -> None:
    deadline = time.monotonic() + deadline_s
    with contextlib.closing(InferenceServerClient(f"127.0.0.1:{port}")) as client:
        while True:
            if process.poll() is not None:
                raise StartupError(
                    f"The container ended with status {process.returncode} while it was starting. "
                    f"Its log ends with:\n{_tail(log)}"
                )
            with contextlib.suppress(InferenceServerException):
                if client.is_server_ready(client_timeout=2):
                    return
            if time.monotonic() > deadline:
                raise StartupError(
                    f"The container was not ready within {deadline_s:g} s. Its log ends with:\n"
                    f"{_tail(log)}"
                )
            time.sleep(0.5)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-15:]
    return "\n".join(f"  {line}" for line in lines)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
