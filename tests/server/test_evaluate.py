"""A served model is scored on a rendered data set."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from support.musdb import RATE, mix, render_stems, write_signals, write_track

import stemserve.cli
from stemserve import Separator
from stemserve.evaluation import cli as command
from stemserve.evaluation.dataset import read_audio
from stemserve.evaluation.metrics import global_sdr

CHEAP = ("--metrics", "global_sdr,si_sdr")


@pytest.fixture(autouse=True)
def _registered(monkeypatch, tmp_path):
    """The command, whether or not the installed package's entry points know it already."""
    monkeypatch.setitem(stemserve.cli.cli.commands, "evaluate", command.evaluate)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


@pytest.fixture
def run_cli_evaluate(tmp_path):
    """Run the command in a process of its own."""
    script = tmp_path / "run.py"
    script.write_text(
        "import stemserve.cli\n"
        "from stemserve.evaluation.cli import evaluate\n"
        "if __name__ == '__main__':\n"
        "    stemserve.cli.cli.add_command(evaluate, 'evaluate')\n"
        "    stemserve.cli.main()\n"
    )

    def run(*arguments):
        return subprocess.run(
            [sys.executable, script, "evaluate", *map(str, arguments)],
            env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """References of both identity stems are the mixture: `same` is perfect, `half` is 6 dB off."""
    folder = tmp_path_factory.mktemp("mixtures")
    for seed, name in enumerate(["Ünïcode – 夜", "B"]):
        mixture = mix(render_stems(0.7, seed))
        write_signals(folder / name, {"mixture": mixture, "same": mixture, "half": mixture})
    return folder


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """One track with vocals, drums, bass and other."""
    folder = tmp_path_factory.mktemp("songs")
    write_track(folder / "test/A", render_stems(2.2))
    return folder


def test_known_scores_through_a_server(cli, server, mixtures, tmp_path):
    """Scores of a model whose answers are known; estimates are removed, or kept and read again."""
    done = cli(
        "evaluate", mixtures, "--url", server.url, "--model", "identity", *CHEAP, "--json",
        "--keep-estimates", tmp_path / "kept",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    data = json.loads(done.out)
    assert data["source"]["model"] == "identity"
    assert data["source"]["overlap"] is None
    assert list(data["tracks"]) == ["B", "Ünïcode – 夜"]
    for track in data["tracks"].values():
        assert track["duration_s"] == pytest.approx(0.7, abs=1e-3)
        assert track["scores"]["half"]["global_sdr"] == pytest.approx(6.0206, abs=1e-4)
        # 1e-7 in both energies is all that limits a perfect estimate, and float32 rounding.
        assert track["scores"]["same"]["global_sdr"] > 90
        assert float(track["scores"]["half"]["si_sdr"]) > 120
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["B", "Ünïcode – 夜"]
    assert sorted(path.name for path in (tmp_path / "kept/B").iterdir()) == ["half.wav", "same.wav"]
    again = cli("evaluate", mixtures, "--estimates", tmp_path / "kept", *CHEAP, "--json")
    assert json.loads(again.out)["tracks"] == data["tracks"]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_worse_model_is_found_out(cli, server, mixtures, tmp_path):
    """The baseline is the model's own; half precision on the wire costs a lot of `same`."""
    baseline = tmp_path / "baseline.json"
    first = cli(
        "evaluate", mixtures, "--url", server.url, "--model", "identity", *CHEAP,
        "--save-baseline", baseline,
    )  # fmt: skip
    assert (first.code, first.err) == (0, "")
    assert "identity version 1: median of 2 tracks, dB" in first.out
    compared = ("--url", server.url, *CHEAP, "--baseline", baseline)
    assert cli("evaluate", mixtures, "--model", "identity", *compared).code == 0
    worse = cli("evaluate", mixtures, "--model", "identity_half", *compared)
    assert worse.code == 70
    assert "Worse than the baseline" in worse.err
    assert "'same' (global SDR " in worse.err
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_two_stem_model_on_four_references(cli, server, songs, tmp_path):
    """Spleeter's accompaniment is scored against the sum of drums, bass and other."""
    done = cli(
        "evaluate", songs, "--url", server.url, "--model", "spleeter_2stems", "--json",
        "--shared-memory",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    data = json.loads(done.out)
    assert data["stems"] == ["vocals", "accompaniment"]
    assert data["notes"] == []
    scores = data["tracks"]["test/A"]["scores"]
    assert all(math.isfinite(value) for stem in scores.values() for value in stem.values())
    stems = render_stems(2.2)
    with Separator(server.url, "spleeter_2stems") as separator:
        result = separator.separate(songs / "test/A/mixture.wav", tmp_path)
    references = {"vocals": stems["vocals"], "accompaniment": mix(stems) - stems["vocals"]}
    for stem, reference in references.items():
        expected = global_sdr(reference.T, read_audio(result.stems[stem], 2))
        assert scores[stem]["global_sdr"] == pytest.approx(expected, abs=1e-3)


def test_a_model_without_a_stem_of_the_data_set(cli, server, songs):
    done = cli("evaluate", songs, "--url", server.url, "--model", "identity", *CHEAP)
    assert done.code == 71
    assert "has references for bass, drums, other, vocals and estimates of same, half" in done.err


def test_a_local_server_is_started_for_it(run_cli_evaluate, repository, mixtures, tmp_path):
    done = run_cli_evaluate(mixtures, "--repository", repository, "--model", "identity", *CHEAP)
    assert done.returncode == 0, done.stderr
    assert "identity version 1: median of 2 tracks, dB" in done.stdout
    assert "6.02" in done.stdout
    # ONNX Runtime, in the server, leaves a file .ses of its own.
    assert list((tmp_path / "tmp").glob("stemserve*")) == []


def test_an_interrupt_while_a_track_is_separated(cli, server, tmp_path):
    """The first track is scored, the second one on its way; kept estimates are whole tracks."""
    stems = render_stems(0.5)
    for name in "AB":
        write_track(tmp_path / "set" / name, {"same": stems["bass"], "half": stems["vocals"]})
    long = render_stems(120.0)["bass"]
    write_signals(tmp_path / "set/B", {"mixture": long, "same": long, "half": long})

    def interrupt():
        deadline = time.monotonic() + 30
        while not list((tmp_path / "kept").glob("A/*.wav")) and time.monotonic() < deadline:
            time.sleep(0.001)
        while not list((tmp_path / "kept").glob(".separated-*")) and time.monotonic() < deadline:
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    done = cli(
        "evaluate", tmp_path / "set", "--url", server.url, "--model", "identity", *CHEAP,
        "--keep-estimates", tmp_path / "kept",
    )  # fmt: skip
    thread.join()
    assert done.code == 130
    assert done.err.strip() == "Interrupted."
    assert done.out == ""
    assert {path.name for path in (tmp_path / "kept").iterdir()} <= {"A"}
    assert len(read_audio(tmp_path / "kept/A/same.wav", 2)[0]) == RATE // 2
