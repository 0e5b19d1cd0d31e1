"""The core dependencies alone separate against a running server."""

import json
import subprocess
import sys
from pathlib import Path

import soundfile

ROOT = Path(__file__).parents[2]


def test_a_venv_with_the_core_alone_separates(server, song, tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, timeout=120)
    python = venv / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", ROOT],
        check=True, capture_output=True, timeout=280,
    )  # fmt: skip
    installed = json.loads(
        subprocess.run(
            [python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"],
            check=True, capture_output=True, text=True,
        ).stdout
    )  # fmt: skip
    names = {package["name"].lower() for package in installed}
    assert "stemserve" in names
    assert not names & {"torch", "onnx", "onnxruntime", "nvidia-pytriton", "onnxscript"}
    done = subprocess.run(
        [venv / "bin" / "stemserve", "separate", song, "--url", server.url,
         "--model", "spleeter_2stems", "--out", tmp_path / "out", "--json"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model_name"] == "spleeter_2stems"
    vocals = tmp_path / "out" / "audio_example" / "vocals.wav"
    assert soundfile.info(vocals).frames == soundfile.info(song).frames
    # Without its extra, a command says which one to install.
    for command, extra in (
        (["export", "spleeter_2stems"], "stemserve[export]"),
        (["separate", song, "--repository", server.repository], "stemserve[server]"),
    ):
        refused = subprocess.run(
            [venv / "bin" / "stemserve", *command], capture_output=True, text=True, timeout=60
        )
        assert refused.returncode in (44, 60)
        assert f"pip install '{extra}'" in refused.stderr
        assert "Traceback" not in refused.stderr
