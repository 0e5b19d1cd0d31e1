"""Everything that can be wrong with a job: one sentence, its own exit code, no partial file."""

import json
import os
import re
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import soundfile
from google.protobuf import text_format
from support.models import identity_spec, write_identity

from stemserve.repository import read_config
from stemserve.server import LocalServer


def noise(samples, channels=2):
    return np.random.default_rng(0).normal(0, 0.1, (samples, channels)).astype(np.float32)


def write_wav(path, samples=44100, channels=2, rate=44100):
    soundfile.write(path, noise(samples, channels), rate, subtype="FLOAT")


def not_audio(path):
    path.write_text("this is no audio\n" * 1000)


def empty(path):
    path.write_bytes(b"")


def zero_length(path):
    write_wav(path, 0)


def truncated(path):
    write_wav(path)
    path.write_bytes(path.read_bytes()[:-100_000])


def truncated_flac(path):
    soundfile.write(path, noise(200_000), 44100, format="FLAC")
    path.write_bytes(path.read_bytes()[:-100_000])


def with_nan(path):
    samples = noise(44100)
    samples[40_000, 1] = np.nan
    soundfile.write(path, samples, 44100, subtype="FLOAT")


def with_inf(path):
    samples = noise(44100)
    samples[0, 0] = -np.inf
    soundfile.write(path, samples, 44100, subtype="FLOAT")


def many_channels(path):
    write_wav(path, 1000, channels=200)


def low_rate(path):
    write_wav(path, rate=4000)


def folder(path):
    path.mkdir()


BAD_FILES = [
    (not_audio, 11, "is not audio that can be decoded"),
    (truncated, 12, "is truncated: its header announces 352800 bytes of audio and 252800"),
    (truncated_flac, 12, "is truncated or damaged: 4.54 s are announced"),
    (empty, 13, r"is empty \(0 bytes\)"),
    (zero_length, 13, "has a header and no samples"),
    (with_nan, 14, "has a NaN or infinite sample at 0.907 s"),
    (with_inf, 14, "has a NaN or infinite sample at 0.000 s"),
    (many_channels, 15, "has 200 channels; expected 1"),
    (low_rate, 16, "has a sample rate of 4000 Hz; expected 8000 to 192000"),
    (lambda path: None, 17, "There is no file"),
    (folder, 18, "is a folder"),
]


def assert_refused(done, code, text, out):
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert re.search(text, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists() or list(out.iterdir()) == []


@pytest.mark.parametrize(("make", "code", "text"), BAD_FILES)
def test_bad_file(server, run_cli, tmp_path, make, code, text):
    path, out = tmp_path / "track.wav", tmp_path / "out"
    make(path)
    done = run_cli("separate", path, "--url", server.url, "--model", "identity", "--out", out)
    assert_refused(done, code, text, out)


def test_8_khz_is_separated_with_a_warning(server, run_cli, tmp_path):
    write_wav(tmp_path / "phone.wav", rate=8000)
    done = run_cli(
        "separate", tmp_path / "phone.wav", "--url", server.url, "--model", "identity",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "resampled" in done.stdout
    assert "nothing above 4000 Hz" in " ".join(done.stdout.replace("│", " ").split())


def test_one_bad_file_of_three(server, run_cli, tmp_path):
    for name in ("a", "b", "c"):
        write_wav(tmp_path / f"{name}.wav")
    with_nan(tmp_path / "b.wav")
    out = tmp_path / "out"
    done = run_cli(
        "separate", *(tmp_path / f"{name}.wav" for name in "abc"),
        "--url", server.url, "--model", "identity", "--out", out,
    )  # fmt: skip
    assert done.returncode == 14
    assert "1 of 3 files failed" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["a", "c"]


@pytest.mark.parametrize("below_file", [True, False])
def test_output_folder_not_writable(server, run_cli, tmp_path, below_file):
    write_wav(tmp_path / "track.wav")
    if below_file:  # holds for root, too
        (tmp_path / "file").write_text("")
        out = tmp_path / "file" / "out"
    else:
        out = "/proc/stemserve"
    done = run_cli(
        "separate", tmp_path / "track.wav", "--url", server.url, "--model", "identity", "--out", out
    )
    assert done.returncode == 21, done.stderr
    assert "cannot be written to" in done.stderr


def test_disk_full(server, tmp_path):
    """A 1 MB file system of our own, in a mount namespace: two stems of 0.7 MB do not fit."""
    write_wav(tmp_path / "track.wav", 88_200)
    out = tmp_path / "out"
    out.mkdir()
    command = (
        f"mount -t tmpfs -o size=1m none '{out}' && "
        f"'{sys.executable}' -m stemserve.cli separate '{tmp_path}/track.wav' --url {server.url} "
        f"--model identity --out '{out}'; status=$?; ls -A '{out}'; exit $status"
    )
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "-r", "--mount"]
    done = subprocess.run([*unshare, "sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 22, done.stderr
    assert "is full" in done.stderr
    assert done.stdout == ""


def test_no_server(run_cli, tmp_path):
    write_wav(tmp_path / "track.wav")
    done = run_cli(
        "separate", tmp_path / "track.wav", "--url", "127.0.0.1:9", "--out", tmp_path / "out"
    )
    assert_refused(done, 31, "No server answers at 127.0.0.1:9", tmp_path / "out")


def test_wrong_model(server, run_cli, tmp_path):
    write_wav(tmp_path / "track.wav")
    done = run_cli(
        "separate", tmp_path / "track.wav", "--url", server.url, "--model", "nope",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert_refused(done, 33, "no model 'nope'; it serves identity, .*spleeter", tmp_path / "out")


def test_unknown_stem(server, run_cli, tmp_path):
    write_wav(tmp_path / "track.wav")
    done = run_cli(
        "separate", tmp_path / "track.wav", "--url", server.url, "--model", "identity",
        "--stems", "same,drums", "--out", tmp_path / "out",
    )  # fmt: skip
    assert_refused(done, 34, "no stem 'drums'; it offers same, half", tmp_path / "out")


def test_model_of_somebody_else(run_cli, tmp_path):
    repository = tmp_path / "repository"
    write_identity(repository, identity_spec())
    config = repository / "identity" / "config.pbtxt"
    foreign = read_config(repository, "identity")
    foreign.parameters.clear()
    config.write_text(text_format.MessageToString(foreign))
    write_wav(tmp_path / "track.wav")
    with LocalServer(repository) as server:
        done = run_cli(
            "separate", tmp_path / "track.wav", "--url", server.url, "--out", tmp_path / "out"
        )
        assert_refused(done, 35, "carries no stemserve spec", tmp_path / "out")
        listed = run_cli("models", "--url", server.url)
        assert listed.returncode == 0
        assert "Left out 'identity'" in listed.stderr


def test_server_dies_midway(run_cli, repository, tmp_path):
    write_wav(tmp_path / "long.wav", 44100 * 240)
    out = tmp_path / "out"
    with LocalServer(repository, ["spleeter_2stems"]) as server:
        killer = threading.Thread(target=kill_when_started, args=(server.pid, out))
        killer.start()
        done = run_cli("separate", tmp_path / "long.wav", "--url", server.url, "--out", out)
        killer.join()
    assert_refused(done, 32, "went away while the track was being separated", out)


def kill_when_started(pid, out):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        # Some samples are on their way to disk: chunks have come back.
        if any(path.stat().st_size > 100_000 for path in out.glob(".*/*.wav")):
            break
        time.sleep(0.05)
    os.kill(pid, 9)


def test_ctrl_c_leaves_nothing(server, tmp_path):
    write_wav(tmp_path / "long.wav", 44100 * 240)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "stemserve.cli", "separate", str(tmp_path / "long.wav"),
         "--url", server.url, "--model", "spleeter_2stems", "--out", str(out)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(out.glob(".*/*.wav")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(2)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.strip() == "Interrupted."
    assert list(out.iterdir()) == []


def test_wav_of_unknown_length_is_read(server, run_cli, tmp_path):
    """What a program writes into a pipe: sizes of 0xFFFFFFFF."""
    path = tmp_path / "piped.wav"
    write_wav(path)
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", 0xFFFFFFFF)
    at = data.index(b"data")
    data[at + 4 : at + 8] = struct.pack("<I", 0xFFFFFFFF)
    path.write_bytes(data)
    out = tmp_path / "out"
    done = run_cli("separate", path, "--url", server.url, "--model", "identity", "--out", out)
    assert done.returncode == 0, done.stderr
    assert soundfile.info(out / "piped" / "same.wav").frames == 44100


def test_json_is_alone_on_stdout(server, run_cli, tmp_path):
    for name in ("a", "b"):
        write_wav(tmp_path / f"{name}.wav")
    options = ("--url", server.url, "--model", "identity", "--out", tmp_path / "out", "--json")
    one = run_cli("separate", tmp_path / "a.wav", *options)
    two = run_cli("separate", tmp_path / "a.wav", tmp_path / "b.wav", *options)
    assert json.loads(one.stdout)["track"] == "a"
    assert [entry["track"] for entry in json.loads(two.stdout)] == ["a", "b"]
    assert one.stderr == two.stderr == ""


def test_older_stems_survive_a_failure(server, run_cli, tmp_path):
    path, out = tmp_path / "track.wav", tmp_path / "out"
    write_wav(path)
    options = ("--url", server.url, "--model", "identity", "--out", out)
    assert run_cli("separate", path, *options).returncode == 0
    before = {file.name: file.read_bytes() for file in (out / "track").iterdir()}
    with_nan(path)
    assert run_cli("separate", path, *options).returncode == 14
    assert {file.name: file.read_bytes() for file in (out / "track").iterdir()} == before
