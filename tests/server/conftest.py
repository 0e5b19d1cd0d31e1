"""Fixtures with a real Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from support.models import identity_spec, write_identity

from stemserve.server import LocalServer
from stemserve_export.catalog import find_model
from stemserve_export.exporter import export_model
from stemserve_export.song import place_song

IDENTITIES = {
    "identity": identity_spec(),
    "identity_edges": identity_spec(
        "identity_edges", 8192, edge_samples=1024, lead_samples=2048, overlap=0.0
    ),
    "identity_half": identity_spec("identity_half", 16384, wire_dtype="fp16"),
    "identity_track": identity_spec("identity_track", 16384, normalization="track", overlap=0.25),
}


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """A repository with Spleeter from the published weights, and identity models."""
    folder = tmp_path_factory.mktemp("model_repository")
    export_model(find_model("spleeter_2stems"), folder)
    for spec in IDENTITIES.values():
        write_identity(folder, spec)
    return folder


@pytest.fixture(scope="session")
def server(repository):
    with LocalServer(repository, http_port=0, metrics_port=0) as server:
        yield server


@pytest.fixture(scope="session")
def song(tmp_path_factory) -> Path:
    """The real clip: 10.9 s, stereo, 44.1 kHz, mp3, peak above full scale."""
    return place_song("audio_example", tmp_path_factory.mktemp("song"))


@pytest.fixture(scope="session")
def song_samples(song):
    """The real clip as [2, n] float32."""
    return soundfile.read(song, dtype="float32", always_2d=True)[0].T


@pytest.fixture
def run_cli():
    """Run the command as a user does; never through a terminal."""

    def run(*arguments, timeout=120, **changes):
        return subprocess.run(
            [sys.executable, "-m", "stemserve.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **changes.pop("env", {})},
            **changes,
        )

    return run
