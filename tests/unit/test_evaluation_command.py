"""`stemserve evaluate` on estimates in a folder, in real processes."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from support.musdb import leaky, mix, render_stems, write_dataset, write_signals, write_track

import stemserve.cli
from stemserve.evaluation import cli as command

CHEAP = ("--metrics", "global_sdr,si_sdr")
NAMES = ("Ä – 夜", "B", "C")


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """The command, whether or not the installed package's entry points know it already."""
    monkeypatch.setitem(stemserve.cli.cli.commands, "evaluate", command.evaluate)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three tracks of 1.2 s in `set`; estimates in `out`, worse ones in `worse`, two in `pair`."""
    folder = tmp_path_factory.mktemp("musdb")
    write_dataset(folder / "set/test", NAMES, folder / "out/test", seconds=1.2)
    for seed, name in enumerate(NAMES):
        stems = render_stems(1.2, seed)
        write_signals(folder / "worse/test" / name, leaky(stems, leak=0.15))
        pair = {"vocals": stems["vocals"], "accompaniment": mix(stems) - stems["vocals"]}
        write_signals(folder / "pair/test" / name, leaky(pair))
    return folder


@pytest.fixture
def evaluate(cli, data):
    def run(*arguments, estimates="out"):
        return cli("evaluate", data / "set", "--estimates", data / estimates, *arguments)

    return run


def test_the_table(evaluate):
    done = evaluate(*CHEAP)
    assert (done.code, done.err) == (0, "")
    assert "median of 3 tracks, dB" in done.out
    rows = [line.split("│")[1:-1] for line in done.out.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["bass", "drums", "other", "vocals"]
    assert all(math.isfinite(float(cell)) for row in rows for cell in row[1:])
    assert "global SDR" in done.out
    assert "SIR" not in done.out


def test_scores_per_track(evaluate):
    done = evaluate(*CHEAP, "--per-track")
    for name in NAMES:
        assert f"│ test/{name} " in done.out


def test_json_of_all_metrics_whatever_the_jobs(evaluate):
    """Several processes give what one gives, to the last digit."""
    runs = [evaluate("--json", "--jobs", jobs, estimates="pair") for jobs in (1, 3)]
    assert [run.code for run in runs] == [0, 0]
    assert runs[0].out == runs[1].out
    data = json.loads(runs[0].out)
    assert list(data["tracks"]) == sorted(f"test/{name}" for name in NAMES)
    assert data["metrics"] == ["sdr", "sir", "sar", "global_sdr", "si_sdr"]
    assert data["settings"]["window_s"] == 1.0
    assert data["stems"] == ["accompaniment", "vocals"]
    for stem in data["stems"]:
        summary = data["summary"][stem]
        values = [track["scores"][stem] for track in data["tracks"].values()]
        for metric in data["metrics"]:
            expected = sorted(value[metric] for value in values)[1]
            assert summary[metric]["median"] == pytest.approx(expected)
            assert summary[metric]["tracks"] == 3
        # SDR over 1 s of 1.2 s and over all of it: nearly the same number.
        assert abs(summary["sdr"]["median"] - summary["global_sdr"]["median"]) < 1


def test_a_baseline_that_holds(evaluate, tmp_path):
    baseline = tmp_path / "baseline.json"
    assert evaluate(*CHEAP, "--save-baseline", baseline).code == 0
    done = evaluate(*CHEAP, "--baseline", baseline, "--tolerance", "0")
    assert (done.code, done.err) == (0, "")
    assert done.out.count("+0.00") == 8


def test_a_regression(evaluate, tmp_path):
    baseline = tmp_path / "baseline.json"
    evaluate(*CHEAP, "--save-baseline", baseline)
    before = baseline.read_bytes()
    picture = tmp_path / "scores.png"
    done = evaluate(
        *CHEAP, "--baseline", baseline, "--save-baseline", baseline, "--plot", picture,
        estimates="worse",
    )  # fmt: skip
    assert done.code == 70
    assert done.err.startswith(f"Error: Worse than the baseline '{baseline}' by more than ")
    assert "'bass' (global SDR " in done.err
    for stem in ("vocals", "drums", "bass", "other"):
        assert f"'{stem}'" in done.err
    assert "\n│        │      -3." in done.out  # the table shows the changes all the same
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert baseline.read_bytes() == before
    done = evaluate(
        *CHEAP, "--baseline", baseline, "--tolerance", "0.1", "--tolerance", "si_sdr=20",
        estimates="worse",
    )  # fmt: skip
    assert done.code == 70
    assert "SI-SDR" not in done.err
    assert (
        evaluate(*CHEAP, "--baseline", baseline, "--tolerance", "20", estimates="worse").code == 0
    )


@pytest.mark.parametrize("suffix", ["png", "svg", "PDF"])
def test_a_plot_of_few_tracks_and_infinite_scores(evaluate, data, cli, tmp_path, suffix):
    picture = tmp_path / "new" / f"scores.{suffix}"
    (tmp_path / "same").symlink_to(data / "set")
    done = cli(
        "evaluate", data / "set", "--estimates", tmp_path / "same", *CHEAP, "--plot", picture
    )
    assert (done.code, done.err) == (0, "")
    assert "inf" in done.out
    assert picture.stat().st_size > 5000


def test_missing_stems_are_told(cli, tmp_path):
    write_track(tmp_path / "set/A", render_stems(0.5))
    stems = render_stems(0.5)
    write_signals(tmp_path / "out/A", {"vocals": stems["vocals"], "guitar": stems["bass"]})
    done = cli("evaluate", tmp_path / "set", "--estimates", tmp_path / "out", *CHEAP)
    assert done.code == 0
    assert "note 'guitar' has no reference" in done.out
    assert "note 'bass' has a reference and no estimate" in done.out


def test_a_bad_sample_ends_it_with_a_sentence(cli, tmp_path):
    """Raised in another process, it is the same error here."""
    stems = render_stems(0.5)
    write_track(tmp_path / "set/A", stems)
    stems["drums"][1000] = np.nan
    write_signals(tmp_path / "out/A", stems)
    done = cli("evaluate", tmp_path / "set", "--estimates", tmp_path / "out", *CHEAP)
    assert done.code == 14
    assert "drums.wav' has a NaN or infinite sample at 0.023 s" in done.err
    assert "Traceback" not in done.err


def test_other_tracks_than_the_baselines(cli, evaluate, data, tmp_path):
    baseline = tmp_path / "baseline.json"
    evaluate(*CHEAP, "--save-baseline", baseline)
    stems = write_track(tmp_path / "set/A", render_stems(0.5))
    write_signals(tmp_path / "out/A", stems)
    done = cli(
        "evaluate", tmp_path / "set", "--estimates", tmp_path / "out", *CHEAP,
        "--baseline", baseline,
    )  # fmt: skip
    assert done.code == 71
    assert "was measured on other tracks" in done.err


def test_a_missing_baseline_is_found_out_before_the_work(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_evaluate", lambda *_, **__: pytest.fail("evaluated"))
    assert evaluate("--baseline", tmp_path / "none.json").code == 71


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--metrics", "sdr,loudness"], "--metrics takes some of sdr, sir, sar, global_sdr"),
        (["--metrics", ","], "got none"),
        (["--tolerance", "1"], "--tolerance goes with --baseline"),
        (["--baseline", "b", "--tolerance", "-1"], "takes decibels, 0 or more"),
        (["--baseline", "b", "--tolerance", "nan"], "takes decibels, 0 or more"),
        (["--baseline", "b", "--tolerance", "loudness=1"], "got 'loudness=1'"),
        (["--model", "x"], "--estimates goes without a model"),
        (["--plot", "x.bmp"], "--plot takes a png, svg or pdf file"),
        (["--jobs", "0"], "0 is not in the range x>=1"),
    ],
)
def test_wrong_usage(evaluate, arguments, complaint):
    done = evaluate(*arguments)
    assert done.code == 2
    assert complaint in done.err


def test_a_missing_extra(evaluate, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    done = evaluate()
    assert done.code == 60
    assert "needs the package museval" in done.err
    assert "pip install 'stemserve[evaluate]'" in done.err
    assert evaluate(*CHEAP).code == 0
    assert "matplotlib" in evaluate(*CHEAP, "--plot", "x.png").err


# --- interruption ---------------------------------------------------------------------------

RUN = (
    "import sys, stemserve.cli\n"
    "from stemserve.evaluation.cli import evaluate\n"
    "if __name__ == '__main__':\n"
    "    stemserve.cli.cli.add_command(evaluate, 'evaluate')\n"
    "    stemserve.cli.main()\n"
)


def eventually(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def is_alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def alive(processes):
    return [process for process in processes if is_alive(process)]


@pytest.fixture
def running(data, tmp_path):
    """A run that takes a while, with its scoring processes at work."""
    (tmp_path / "tmp").mkdir()
    stems = render_stems(8.0)
    for name in "AB":
        write_signals(tmp_path / "out" / name, write_track(tmp_path / "set" / name, stems))
    code = tmp_path / "run.py"
    code.write_text(RUN)
    arguments = ["evaluate", tmp_path / "set", "--estimates", tmp_path / "out", "--jobs", "2"]
    arguments += ["--save-baseline", tmp_path / "baseline.json"]
    process = subprocess.Popen(
        [sys.executable, code, *arguments],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    parent = psutil.Process(process.pid)

    def at_work():
        children = parent.children(recursive=True)
        busy = [child for child in children if sum(child.cpu_times()[:2]) > 1.0]
        return children if len(busy) >= 2 else None

    children = eventually(at_work)
    yield process, children, tmp_path
    for left in [*alive(children), process]:
        left.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("signum", "code", "whole_group"),
    [(signal.SIGINT, 130, True), (signal.SIGTERM, 143, False)],
)
def test_an_interrupt_leaves_nothing(running, signum, code, whole_group):
    process, children, folder = running
    if whole_group:  # as a terminal's Ctrl-C does
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    out, err = process.communicate(timeout=10)
    assert process.returncode == code
    assert "Traceback" not in err
    assert out == ""
    eventually(lambda: not alive(children))
    assert sorted(path.name for path in folder.iterdir()) == ["out", "run.py", "set", "tmp"]
    assert list((folder / "tmp").iterdir()) == []


def test_scoring_processes_end_with_the_one_that_started_them(running):
    process, children, _folder = running
    process.kill()
    process.wait()
    eventually(lambda: not alive(children))


def test_a_scoring_process_that_dies(running):
    process, children, _folder = running
    worker = max(children, key=lambda child: sum(child.cpu_times()[:2]))
    worker.kill()  # as the kernel does when memory runs out
    _out, err = process.communicate(timeout=20)
    assert process.returncode == 71
    assert "A scoring process died" in err
    assert "lower --jobs" in err
    assert "Traceback" not in err
    eventually(lambda: not alive(children))
