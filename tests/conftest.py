"""Fixtures that several rooms share: specs, audio files, the command line in this process."""

import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from stemserve.spec import Checkpoint, CheckpointFile, ModelSpec

# A shell that starts us in the background has us ignore SIGINT, and commands would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def make_spec():
    """A valid spec with two stems; keywords replace its fields."""

    def make(**changes) -> ModelSpec:
        fields = {
            "name": "tiny",
            "version": 3,
            "family": "tiny",
            "domain": "mask",
            "stems": ("vocals", "accompaniment"),
            "sample_rate": 44100,
            "channels": 2,
            "chunk_samples": 64,
            "edge_samples": 0,
            "lead_samples": 0,
            "tail": "padded",
            "overlap": 0.25,
            "window": "triangle",
            "normalization": "none",
            "wire_dtype": "fp32",
            "precision": "fp32",
            "max_batch_size": 8,
            "checkpoint": Checkpoint(
                (CheckpointFile("file:///w.ckpt", "0" * 64),),
                "MIT",
                "allowed",
                "a catalogue, “quoted”",
            ),
            "options": {"mask_extension": "average", "a": "b=c"},
        }
        return ModelSpec(**{**fields, **changes})

    return make


@pytest.fixture(scope="session")
def noise():
    """Seeded noise, [frames, channels] float32, peak below 1."""

    def make(frames, channels=2, seed=0):
        samples = np.random.default_rng(seed).uniform(-0.5, 0.5, (frames, channels))
        return samples.astype(np.float32)

    return make


@pytest.fixture
def write_audio(tmp_path):
    """Write [frames, channels] to a file of this test's folder and return its path."""

    def write(name, samples, rate=44100, subtype=None, **options):
        path = tmp_path / name
        soundfile.write(path, samples, rate, subtype=subtype, **options)
        return path

    return write


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the command line in this process; returns exit code, stdout and stderr."""
    from stemserve.cli import main

    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["stemserve", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    yield run
    signal.signal(signal.SIGTERM, handler)
