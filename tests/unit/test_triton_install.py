import importlib.util
import platform
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from stemserve import triton_install
from stemserve.errors import EnvironmentMismatchError, PlatformError
from stemserve.triton_install import find_triton

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(autouse=True)
def suitable_machine(monkeypatch):
    """A machine on which everything is as it should be; each test spoils one thing."""
    monkeypatch.setenv("PATH", "/nonexistent")  # no tritonserver of a container
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(triton_install, "version", lambda _package: "1.26.4")
    monkeypatch.setattr(triton_install, "_libpython_folder", lambda: "/lib/of/python")


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """The parts of an installed nvidia-pytriton that are looked for."""
    package = tmp_path / "site-packages" / "pytriton"
    triton = package / "tritonserver"
    for file in (
        "bin/tritonserver",
        "backends/python/libtriton_python.so",
        "backends/python/triton_python_backend_utils.py",
        f"python_backend_stubs/{PYTHON}/triton_python_backend_stub",
        "python_backend_stubs/3.8/triton_python_backend_stub",
    ):
        (triton / file).parent.mkdir(parents=True, exist_ok=True)
        (triton / file).write_text(file)
    found = {
        "pytriton": SimpleNamespace(submodule_search_locations=[str(package)]),
        "onnxruntime": SimpleNamespace(submodule_search_locations=["/x"]),
    }
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    return SimpleNamespace(package=package, triton=triton, found=found)


@pytest.fixture
def scratch(tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def test_a_tritonserver_on_path_is_taken_as_it_is(tmp_path, scratch, monkeypatch):
    binary = tmp_path / "tritonserver"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")  # NVIDIA's container has one
    install = find_triton(scratch)
    assert install.binary == binary
    assert install.arguments == ()
    assert install.environment == {}


def test_the_wheel_is_given_our_backend(wheel, scratch):
    install = find_triton(scratch)
    backends = scratch / "backends"
    assert install.binary == wheel.triton / "bin" / "tritonserver"
    assert install.arguments == (f"--backend-directory={backends}",)
    assert install.environment["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    libraries = install.environment["LD_LIBRARY_PATH"].split(":")
    assert libraries[0] == str(wheel.package.parent / "nvidia_pytriton.libs")
    assert "/lib/of/python" in libraries
    assert "" not in libraries  # the loader would take it for the working directory
    stub = backends / "python" / "triton_python_backend_stub"
    assert stub.resolve().parent.name == PYTHON
    assert (backends / "python" / "libtriton_python.so").is_file()
    stand_in = (backends / "onnxruntime" / "model.py").read_text()
    assert "class TritonPythonModel" in stand_in


@pytest.mark.parametrize(
    ("system", "machine"),
    [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "aarch64"), ("Darwin", "x86_64")],
)
def test_an_unsupported_platform(wheel, scratch, monkeypatch, system, machine):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(PlatformError) as caught:
        find_triton(scratch)
    assert str(caught.value) == (
        f"NVIDIA publishes no tritonserver wheel for {system} on {machine}; expected Linux on "
        "x86_64. Run the server in NVIDIA's container (nvcr.io/nvidia/tritonserver) or on another "
        "machine, and name it with --url."
    )


def test_a_glibc_that_is_too_old(wheel, scratch, monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.31"))
    with pytest.raises(PlatformError) as caught:
        find_triton(scratch)
    assert str(caught.value) == (
        "tritonserver needs glibc 2.35 or later, and this system has 2.31; use Debian 12, Ubuntu "
        "22.04 or later, or NVIDIA's container."
    )


@pytest.mark.parametrize("libc", [("glibc", "2.35"), ("glibc", "2.100"), ("", "")])
def test_a_glibc_that_will_do(wheel, scratch, monkeypatch, libc):
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    assert find_triton(scratch).arguments


@pytest.mark.parametrize(
    ("module", "package"), [("pytriton", "nvidia-pytriton"), ("onnxruntime", "onnxruntime")]
)
def test_a_missing_package(wheel, scratch, module, package):
    wheel.found[module] = None
    with pytest.raises(EnvironmentMismatchError) as caught:
        find_triton(scratch)
    assert str(caught.value) == (
        f"The local server needs the package {package}, which is not installed; install the extra "
        "with `pip install 'stemserve[server]'`, or name a running server with --url."
    )


def test_numpy_2(wheel, scratch, monkeypatch):
    monkeypatch.setattr(triton_install, "version", lambda _package: "2.1.0")
    with pytest.raises(EnvironmentMismatchError) as caught:
        find_triton(scratch)
    assert str(caught.value) == (
        "The local server needs numpy 1.x and numpy 2.1.0 is installed: with numpy 2 it answers "
        "with empty tensors. Downgrade it, or install the extra with `pip install "
        "'stemserve[server]'` in a fresh venv."
    )


def test_no_numpy(wheel, scratch, monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(triton_install, "version", missing)
    with pytest.raises(EnvironmentMismatchError, match=r"needs numpy 1\.x"):
        find_triton(scratch)


def test_a_python_without_a_stub(wheel, scratch):
    stubs = wheel.triton / "python_backend_stubs"
    (stubs / PYTHON).rename(stubs / "3.9")
    (stubs / "3.10").mkdir()
    with pytest.raises(EnvironmentMismatchError) as caught:
        find_triton(scratch)
    assert str(caught.value) == (
        f"The tritonserver wheel has no stub for Python {PYTHON}; expected one of 3.8, 3.9, 3.10. "
        "Make the venv with one of these."
    )


def test_a_python_without_its_shared_library(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(triton_install.sysconfig, "get_config_var", lambda _name: None)
    monkeypatch.setattr(
        triton_install, "sys", SimpleNamespace(base_prefix=tmp_path, version_info=SimpleNamespace(
            major=3, minor=99))
    )  # fmt: skip
    with pytest.raises(EnvironmentMismatchError) as caught:
        triton_install._libpython_folder()
    assert str(caught.value) == (
        "The local server needs libpython3.99.so.1.0, which this Python does not bring; install it "
        "with `apt-get install libpython3.99`."
    )
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libpython3.99.so.1.0").touch()
    assert triton_install._libpython_folder() == str(tmp_path / "lib")
