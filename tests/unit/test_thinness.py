"""What the client must not carry, and in which direction the rooms may look."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def modules_after(code):
    """Names in sys.modules after a fresh interpreter has run the code."""
    report = "import sys, json; sys.stderr.write(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr))


def test_the_client_imports_nothing_heavy():
    modules = modules_after(
        "import stemserve\nfrom stemserve import Separator, AsyncSeparator, ModelSpec, Result"
    )
    assert "stemserve.separator" in modules
    heavy = {"torch", "onnx", "onnxruntime", "onnxscript", "stemserve_export", "stemserve_loadtest"}
    assert modules & heavy == set()


def test_the_package_itself_imports_next_to_nothing():
    modules = modules_after("import stemserve; stemserve.__version__")
    assert modules & {"grpc", "numpy", "soundfile", "soxr", "rich", "click"} == set()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["separate", "--help"], ["export", "--help"], ["--version"]],
)
def test_help_pays_for_no_library(arguments):
    code = (
        "import sys, contextlib\n"
        f"sys.argv = ['stemserve', *{arguments}]\n"
        "from stemserve.cli import main\n"
        "with contextlib.suppress(SystemExit):\n    main()"
    )
    modules = modules_after(code)
    assert "click" in modules
    assert modules & {"grpc", "soundfile", "soxr", "torch", "onnx"} == set()


def test_listing_the_catalogue_needs_none_of_the_exporters_libraries():
    code = (
        "import sys, contextlib, io\n"
        "sys.argv = ['stemserve', 'export', '--list']\n"
        "from stemserve.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    main()"
    )
    modules = modules_after(code)
    assert "stemserve_export.listing" in modules
    assert modules & {"torch", "onnx", "onnxruntime", "requests"} == set()


def test_an_unknown_name_of_the_package():
    import stemserve

    with pytest.raises(AttributeError, match="module 'stemserve' has no attribute 'Seperator'"):
        stemserve.Seperator  # noqa: B018


def imported_by(path):
    """Top-level packages that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("client", {"stemserve_export", "stemserve_loadtest", "torch", "onnx"}),
        ("export", {"stemserve_loadtest"}),
    ],
)
def test_import_directions(room, forbidden):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        assert imported_by(file) & forbidden == set(), file


def test_the_stand_in_backend_imports_nothing_of_ours():
    """It runs in Triton's stub, where stemserve need not be installed."""
    backend = ROOT / "client/stemserve/backends/onnxruntime/model.py"
    assert imported_by(backend) & {"stemserve", "stemserve_export"} == set()
