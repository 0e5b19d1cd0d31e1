"""Finds a tritonserver to start locally, and gives it what it needs to run.

Either the one on PATH (NVIDIA's container has it, with the real ONNX Runtime backend), or the one
in the wheel nvidia-pytriton, which has the Python backend only and is therefore given our
stand-in ``onnxruntime`` backend.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import as_file, files
from pathlib import Path

from stemserve.errors import EnvironmentMismatchError, PlatformError


@dataclass(frozen=True, slots=True)
class TritonInstall:
    """A tritonserver that can be started.

    Attributes:
        binary: the executable.
        arguments: options that it needs to find its backends.
        environment: variables to set for it.
    """

    binary: Path
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def find_triton(scratch: Path) -> TritonInstall:
    """Find a tritonserver and prepare its backends under ``scratch``.

    Raises:
        PlatformError: there is none on PATH and none is published for this platform.
        EnvironmentMismatchError: a package or library that it needs is missing or unsuitable.
    """
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        return TritonInstall(Path(on_path))
    _check_platform()
    _check_packages()
    spec = importlib.util.find_spec("pytriton")
    assert spec is not None and spec.submodule_search_locations is not None
    package = Path(spec.submodule_search_locations[0])
    backends = _assemble_backends(package / "tritonserver", scratch)
    return TritonInstall(
        package / "tritonserver" / "bin" / "tritonserver",
        (f"--backend-directory={backends}",),
        {
            # The stub runs the python3 that comes first on PATH.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "LD_LIBRARY_PATH": os.pathsep.join(
                part
                for part in (
                    str(package.parent / "nvidia_pytriton.libs"),
                    _libpython_folder(),
                    os.environ.get("LD_LIBRARY_PATH", ""),
                )
                if part
            ),
        },
    )


def _check_platform() -> None:
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        raise PlatformError(
            f"NVIDIA publishes no tritonserver wheel for {system} on {machine}; expected Linux "
            "on x86_64. Run the server in NVIDIA's container (nvcr.io/nvidia/tritonserver) or on "
            "another machine, and name it with --url."
        )
    libc, libc_version = platform.libc_ver()
    if libc == "glibc" and tuple(map(int, libc_version.split(".")[:2])) < (2, 35):
        raise PlatformError(
            f"tritonserver needs glibc 2.35 or later, and this system has {libc_version}; use "
            "Debian 12, Ubuntu 22.04 or later, or NVIDIA's container."
        )


def _check_packages() -> None:
    hint = "install the extra with `pip install 'stemserve[server]'`"
    for module, package in (("pytriton", "nvidia-pytriton"), ("onnxruntime", "onnxruntime")):
        if importlib.util.find_spec(module) is None:
            raise EnvironmentMismatchError(
                f"The local server needs the package {package}, which is not installed; {hint}, "
                "or name a running server with --url."
            )
    try:
        numpy_version = version("numpy")
    except PackageNotFoundError:
        numpy_version = "0"
    if int(numpy_version.split(".")[0]) != 1:
        raise EnvironmentMismatchError(
            f"The local server needs numpy 1.x and numpy {numpy_version} is installed: with "
            f"numpy 2 it answers with empty tensors. Downgrade it, or {hint} in a fresh venv."
        )


def _assemble_backends(triton: Path, scratch: Path) -> Path:
    """Lay out a backend directory: NVIDIA's Python backend and our stand-in."""
    name = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = triton / "python_backend_stubs" / name / "triton_python_backend_stub"
    if not stub.exists():
        known = sorted(
            (entry.name for entry in (triton / "python_backend_stubs").iterdir()),
            key=lambda text: tuple(map(int, text.split("."))),
        )
        raise EnvironmentMismatchError(
            f"The tritonserver wheel has no stub for Python {name}; expected one of "
            f"{', '.join(known)}. Make the venv with one of these."
        )
    backends = scratch / "backends"
    python = backends / "python"
    python.mkdir(parents=True)
    # A Python-based backend may not link out of its directory, so these are copied; the stub's
    # library path is relative to itself, so it is linked.
    for file in ("libtriton_python.so", "triton_python_backend_utils.py"):
        shutil.copy2(triton / "backends" / "python" / file, python / file)
    (python / stub.name).symlink_to(stub)
    stand_in = backends / "onnxruntime"
    stand_in.mkdir()
    with as_file(files("stemserve.backends") / "onnxruntime" / "model.py") as model:
        shutil.copy2(model, stand_in / "model.py")
    return backends


def _libpython_folder() -> str:
    """Folder of the interpreter's shared library, which the stub is linked against.

    Returns:
        The folder, or "" if the system's loader finds the library by itself.
    """
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    for folder in (sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix) / "lib"):
        if folder and (Path(folder) / name).exists():
            return str(folder)
    multiarch = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
    for folder in ("/usr/lib", f"/usr/lib/{multiarch}", f"/lib/{multiarch}", "/usr/lib64"):
        if (Path(folder) / name).exists():
            return ""
    raise EnvironmentMismatchError(
        f"The local server needs {name}, which this Python does not bring; install it with "
        f"`apt-get install {name.removesuffix('.so.1.0')}`."
    )
