"""`stemserve verify` on the command line, without a server."""

import json

import pytest
from click.testing import CliRunner
from support.models import identity_spec, write_identity

from stemserve.errors import DownloadError, GateError, ModelFileMissingError
from stemserve_export.gate import gate
from stemserve_export.gate.cli import verify
from stemserve_export.gate.figures import Figures, Verification
from stemserve_export.gate.thresholds import Limit
from stemserve_export.triton_config import config_text


@pytest.fixture
def verified(monkeypatch):
    """Stands in for the measuring: SNR per model, or the error that it raises."""

    class Verified:
        snr: dict = {}  # noqa: RUF012
        seen: list = []  # noqa: RUF012

    done = Verified()
    done.snr, done.seen = {}, []

    def verify_model(repository, name, options):
        done.seen.append((name, options.quick, options.url, options.audio))
        options.report(f"{name}: measuring")
        value = done.snr.get(name, 100.0)
        if isinstance(value, Exception):
            raise value
        figures = Figures()
        figures.at_least("onnx", "SNR against torch", "vocals", value, Limit(60, "why"), "dB")
        figures.holds("onnx", "deterministic", "", True, "seen")
        figures.at_least("torch", "SDR", "vocals", 7.5, None, "dB")
        return Verification(name, 1, "0" * 64, {}, {}, "2026", 1.0, figures.found)

    monkeypatch.setattr(gate, "verify_model", verify_model)
    return done


@pytest.fixture
def repository(tmp_path):
    """Two models, and one that joins specialists."""
    parts = [identity_spec(f"ensemble_{stem}", stems=(stem,)) for stem in ("same", "half")]
    for spec in (identity_spec("b"), identity_spec("z"), *parts):
        write_identity(tmp_path, spec)
    (tmp_path / "ensemble" / "1").mkdir(parents=True)
    (tmp_path / "ensemble" / "config.pbtxt").write_text(
        config_text(identity_spec("ensemble"), parts)
    )
    return tmp_path


def run(repository, *arguments):
    """Returns what was printed, and what was raised."""
    done = CliRunner().invoke(
        verify, [*map(str, arguments), "--repository", str(repository)], standalone_mode=False
    )
    return done.stdout, done.stderr, done.exception


def test_models_that_pass(verified, repository):
    out, err, error = run(repository, "b", "z", "--quick")
    assert error is None
    assert verified.seen == [("b", True, None, None), ("z", True, None, None)]
    assert "b version 1: passed, 2 checks" in out
    assert "100.00 dB" in out
    assert ">= 60 dB" in out
    assert "b: measuring" in err


def test_a_model_that_fails(verified, repository):
    verified.snr = {"z": 42.0}
    out, _, error = run(repository, "b", "z")
    assert isinstance(error, GateError)
    assert error.exit_code == 56
    assert str(error).startswith("z failed 1 of the release gate's checks")
    assert "failed onnx SNR against torch vocals: 42 dB; expected at least 60 dB" in out


def test_all_models_specialists_first(verified, repository):
    run(repository)
    names = [seen[0] for seen in verified.seen]
    assert names == ["b", "ensemble_same", "ensemble_half", "z", "ensemble"]


def test_an_ensemble_brings_its_specialists(verified, repository):
    run(repository, "ensemble")
    assert [seen[0] for seen in verified.seen] == ["ensemble_same", "ensemble_half", "ensemble"]


def test_one_model_that_cannot_be_measured_does_not_keep_the_others_from_it(verified, repository):
    verified.snr = {"b": DownloadError("no network")}
    out, err, error = run(repository, "b", "z")
    assert isinstance(error, SystemExit)
    assert error.code == DownloadError.exit_code
    assert "Error: no network" in err
    assert "z version 1: passed" in out
    assert isinstance(run(repository, "b")[2], DownloadError)


def test_reports_as_json(verified, repository, tmp_path):
    out, _, _ = run(repository, "b", "--json", "-")
    assert [record["model"] for record in json.loads(out)] == ["b"]
    out, _, _ = run(repository, "b", "--json", tmp_path / "all.json")
    assert "passed" in out
    assert json.loads((tmp_path / "all.json").read_text())[0]["passed"] is True


def test_a_model_that_is_not_there(verified, repository):
    assert isinstance(run(repository, "none")[2], ModelFileMissingError)


def test_a_server_and_none(verified, repository):
    _, _, error = run(repository, "b", "--quick", "--url", "localhost:8001")
    assert "goes without --url" in str(error)
