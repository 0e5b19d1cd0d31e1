"""A local tritonserver: started with a deadline, ended without leaving anything behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import grpc
from tritonclient.grpc import service_pb2

from stemserve.errors import LocalServerError, PortTakenError, StartupError
from stemserve.repository import default_repository, models_to_serve
from stemserve.triton import Stub
from stemserve.triton_install import find_triton

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_STARTUP_DEADLINE_S: Final = 120.0
EXIT_TIMEOUT_S: Final = 30
_LOG_TAIL_LINES: Final = 15
_SHM: Final = Path("/dev/shm")


class LocalServer:
    """A tritonserver serving a model repository on this machine; a context manager.

    Args:
        repository: the model repository; :func:`stemserve.repository.default_repository` if None.
        models: names of the models to load; all that are exported if empty.
        host: address to bind to. Loopback by default: Triton itself would listen everywhere.
        grpc_port: port of the gRPC endpoint; a free one if 0.
        http_port: port of the HTTP endpoint; none is opened if None, a free one if 0.
        metrics_port: port of the Prometheus metrics; likewise.
        startup_deadline_s: seconds within which every model must be loaded and warm.
        log: file for the server's log; a temporary one, shown on failure, if None.

    Raises:
        LocalServerError: see its subclasses for the causes.
    """

    def __init__(
        self,
        repository: str | os.PathLike[str] | None = None,
        models: Sequence[str] = (),
        *,
        host: str = DEFAULT_HOST,
        grpc_port: int = 0,
        http_port: int | None = None,
        metrics_port: int | None = None,
        startup_deadline_s: float = DEFAULT_STARTUP_DEADLINE_S,
        log: Path | None = None,
    ) -> None:
        self.repository = Path(repository) if repository is not None else default_repository()
        self.models = models_to_serve(self.repository, models)
        self.host = host
        self.grpc_port = _usable_port(host, grpc_port)
        self.http_port = None if http_port is None else _usable_port(host, http_port)
        self.metrics_port = None if metrics_port is None else _usable_port(host, metrics_port)
        self._startup_deadline_s = startup_deadline_s
        self._scratch = Path(tempfile.mkdtemp(prefix="stemserve-"))
        self._shm_prefix = f"stemserve_{uuid.uuid4().hex[:12]}_"
        self.log = log if log is not None else self._scratch / "tritonserver.log"
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        """``host:port`` of the gRPC endpoint."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.grpc_port}"

    @property
    def pid(self) -> int:
        """Process id of the tritonserver."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> LocalServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait(self) -> int:
        """Block until the server ends by itself; return its exit status."""
        assert self._process is not None
        while True:
            # Again and again: a signal that comes just before a wait without end is not acted upon.
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(1.0)

    def peak_rss_mb(self) -> float:
        """Peak resident memory of the server and its stubs together, in MB (10^6 bytes)."""
        return sum(_peak_rss_kib(pid) for pid in (self.pid, *_descendants(self.pid))) * 1024 / 1e6

    def stop(self) -> None:
        """End the server: TERM, let it drain, then KILL; reap stubs and shared memory."""
        process = self._process
        if process is not None and process.poll() is None:
            stubs = _descendants(process.pid)
            process.terminate()
            try:
                process.wait(EXIT_TIMEOUT_S + 5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pid in stubs:
                # Gone already after a clean exit; the pid check keeps a reused pid alive.
                if _is_stub(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        for region in _SHM.glob(f"{self._shm_prefix}*"):
            region.unlink(missing_ok=True)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _start(self) -> None:
        install = find_triton(self._scratch)
        command = [
            # Should this process be killed outright, the server is told to end, too.
            *(("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()),
            str(install.binary),
            *install.arguments,
            f"--model-repository={self.repository.resolve()}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in self.models),
            f"--grpc-address={self.host}",
            f"--grpc-port={self.grpc_port}",
            *_endpoint("http", self.host, self.http_port),
            *_endpoint("metrics", self.host, self.metrics_port),
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            f"--backend-config=onnxruntime,shm-region-prefix-name={self._shm_prefix}",
        ]
        if not Path("/dev/nvidiactl").exists():
            command += ["--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]
        try:
            log = self.log.open("wb")
        except OSError as error:
            raise LocalServerError(
                f"The log '{self.log}' cannot be written to ({error.strerror}); choose another "
                "with --log."
            ) from None
        with log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **install.environment},
                start_new_session=True,  # Ctrl-C is ours to handle
            )
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._startup_deadline_s
        with grpc.insecure_channel(
            self.url, options=(("grpc.max_reconnect_backoff_ms", 100),
                               ("grpc.initial_reconnect_backoff_ms", 50),
                               ("grpc.min_reconnect_backoff_ms", 50))
        ) as channel:  # fmt: skip
            stub = Stub(channel)
            while True:
                if self._process.poll() is not None:
                    raise StartupError(
                        f"tritonserver ended with status {self._process.returncode} while it was "
                        f"starting. Its log ends with:\n{self.log_tail()}"
                    )
                with contextlib.suppress(grpc.RpcError, OSError):
                    ready = stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=1).ready
                    # Triton opens these after the gRPC port.
                    for port in (self.http_port, self.metrics_port):
                        if port is not None:
                            socket.create_connection((self.host, port), timeout=1).close()
                    if ready:
                        return
                if time.monotonic() > deadline:
                    raise StartupError(
                        f"tritonserver was not ready within {self._startup_deadline_s:g} s; "
                        f"raise the deadline or look at its log, which ends with:\n"
                        f"{self.log_tail()}"
                    )
                time.sleep(0.05)

    def log_tail(self) -> str:
        """Return the last lines of the server's log."""
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").splitlines()
            return "\n".join(f"  {line}" for line in lines[-_LOG_TAIL_LINES:])
        return "  (no log)"


@contextlib.contextmanager
def embedded_server(repository: Path | None, model: str | None) -> Iterator[LocalServer]:
    """Serve one model, or all that are exported, for the time of a command; tells the user."""
    from rich.console import Console

    wanted = [] if model is None else [model]
    with contextlib.ExitStack() as stack:
        with Console(stderr=True).status("Starting a local Triton server …"):
            server = stack.enter_context(LocalServer(repository, wanted))
        yield server


def _endpoint(name: str, host: str, port: int | None) -> list[str]:
    if port is None:
        return [f"--allow-{name}=false"]
    return [f"--allow-{name}=true", f"--{name}-address={host}", f"--{name}-port={port}"]


def _usable_port(host: str, port: int) -> int:
    """Return the port if nothing listens on it, or a free one for 0."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise PortTakenError(
                f"{host}:{port} cannot be listened on ({error}); choose another port, or stop "
                "the process that has it."
            ) from None
        return int(probe.getsockname()[1])


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        new = children.get(waiting.pop(), [])
        found += new
        waiting += new
    return found


def _is_stub(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"triton_python_backend_stub" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _peak_rss_kib(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return 0
