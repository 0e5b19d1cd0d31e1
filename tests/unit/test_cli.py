import json
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import stemserve

COMMANDS = ["export", "models", "separate", "serve"]


@pytest.fixture
def closed_port():
    """A port that nothing listens on: bound and never listening, so nobody else takes it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def assert_one_sentence(done, code):
    """An exit code, one line on stderr, nothing on stdout, no traceback."""
    assert done.code == code
    assert done.out == ""
    lines = done.err.splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("Error: ")
    return lines[0].removeprefix("Error: ")


# --- help and usage -------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_commands(cli, flag):
    done = cli(flag)
    assert done.code == 0
    assert done.err == ""
    assert "Music stem separation served by NVIDIA Triton." in done.out
    for command in COMMANDS:
        assert f"\n  {command} " in done.out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "export",
            ["NAME...", "--repository", "--checkpoint", "--list", "--option", "[fp32|fp16]",
             "--precision", "--wire", "--name", "--accept-licence"],
        ),
        ("models", ["--url", "--json"]),
        (
            "separate",
            ["FILE...", "--url", "--model", "--stems", "--out", "[wav|flac|mp3]", "--sample-rate",
             "--normalize", "--overlap", "--shifts", "--shift-seed", "--json"],
        ),
        ("serve", ["--repository", "--model", "--host", "--grpc-port", "--http-port",
                   "--metrics-port"]),
    ],
)  # fmt: skip
def test_help_of_a_command(cli, command, words):
    done = cli(command, "--help")
    assert done.code == 0
    assert done.err == ""
    for word in words:
        assert word in done.out


def test_version(cli):
    assert cli("--version").out == f"stemserve, version {stemserve.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--colour"], "No such option"),
        (["sing"], "No such command 'sing'"),
        (["separate"], "Missing argument 'FILE...'"),
        (["separate", "a.wav", "--fast"], "No such option"),
        (["separate", "a.wav", "--format", "aac"], "'aac' is not one of 'wav', 'flac', 'mp3'"),
        (["separate", "a.wav", "--sample-rate", "96000"], "'96000' is not one of"),
        (["separate", "a.wav", "--overlap", "much"], "'much' is not a valid float"),
        (["serve", "--grpc-port", "65536"], "65536 is not in the range 0<=x<=65535"),
        (["export"], "Name a model, or list them with --list."),
        (["separate", "a.wav", "--shifts", "-1"], "-1 is not in the range x>=0"),
        (["separate", "a.wav", "--shift-seed", "x"], "'x' is not a valid integer"),
        (
            ["export", "a", "b", "--checkpoint", "file:///w"],
            "--checkpoint and --name go with one model.",
        ),
        (["export", "a", "b", "--name", "c"], "--checkpoint and --name go with one model."),
        (["export", "umxl", "--precision", "int8"], "'int8' is not one of 'fp32', 'fp16'"),
        (["export", "umxl", "--wire", "bf16"], "'bf16' is not one of 'fp32', 'fp16'"),
    ],
)
def test_wrong_usage(cli, arguments, complaint):
    done = cli(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert complaint in done.err
    assert "Traceback" not in done.err


def test_no_command_shows_the_help(cli):
    done = cli()
    assert done.code == 2
    assert "Commands:" in done.err


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_missing_file(cli, tmp_path, as_json):
    path = tmp_path / "missing.wav"
    assert assert_one_sentence(cli("separate", path, *as_json), 17) == (
        f"There is no file '{path}'; check the path."
    )


@pytest.mark.parametrize(
    ("name", "data", "code", "words"),
    [
        ("zero.wav", b"", 13, "is empty (0 bytes)"),
        ("notes.wav", b"not a song\n" * 100, 11, "is not audio that can be decoded"),
    ],
)
def test_a_bad_file_is_refused_before_a_server_is_started(cli, tmp_path, name, data, code, words):
    path = tmp_path / name
    path.write_bytes(data)
    assert words in assert_one_sentence(cli("separate", path, "--json"), code)


def test_a_folder(cli, tmp_path):
    text = assert_one_sentence(cli("separate", tmp_path), 18)
    assert text.startswith(f"'{tmp_path}' is a folder;")


@pytest.mark.parametrize(
    ("samples", "rate", "code"), [((10, 200), 44_100, 15), ((10, 2), 4_000, 16)]
)
def test_audio_that_cannot_be_separated(cli, write_audio, samples, rate, code):
    path = write_audio("odd.wav", np.zeros(samples), rate)
    assert f"'{path}'" in assert_one_sentence(cli("separate", path), code)


def test_two_tracks_of_one_name(cli, tmp_path, write_audio):
    first = write_audio("song.wav", np.zeros((10, 2)))
    second = write_audio("song.flac", np.zeros((10, 2)))
    done = cli("separate", first, second, "--out", tmp_path / "out")
    assert assert_one_sentence(done, 20) == (
        f"'{first}', '{second}' would all be written to the folder 'song'; separate them one at "
        "a time with a different --out."
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["...wav", "..wav"])
def test_a_name_that_is_no_name_of_a_folder(cli, tmp_path, write_audio, closed_port, name):
    """'...wav' less its extension is '..': its stems would go beside --out instead of into it."""
    path = tmp_path / name
    write_audio("plain.wav", np.zeros((10, 2))).rename(path)
    done = cli("separate", path, "--out", tmp_path / "out", "--url", f"127.0.0.1:{closed_port}")
    assert f"'{path}'" in assert_one_sentence(done, 20)


@pytest.mark.parametrize("command", ["separate", "models"])
@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_nobody_answers(cli, write_audio, closed_port, command, as_json):
    files = [write_audio("song.wav", np.zeros((10, 2)))] if command == "separate" else []
    url = f"127.0.0.1:{closed_port}"
    text = assert_one_sentence(cli(command, *files, "--url", url, *as_json), 31)
    assert text.startswith(f"No server answers at {url} (")
    assert text.endswith("); start one with `stemserve serve`, or check --url.")


def test_the_address_may_come_from_the_environment(cli, monkeypatch):
    monkeypatch.setenv("STEMSERVE_URL", "http://localhost:8000")
    text = assert_one_sentence(cli("models"), 31)
    assert text.startswith("'http://localhost:8000' is an HTTP address;")


def test_no_repository_to_serve(cli, tmp_path):
    text = assert_one_sentence(cli("serve", "--repository", tmp_path / "none"), 43)
    assert text.startswith(f"There is no model repository '{tmp_path / 'none'}'; ")


def test_a_model_to_export_that_is_not_known(cli):
    text = assert_one_sentence(cli("export", "spleeter_9stems"), 51)
    assert text.startswith("The catalogue has no model 'spleeter_9stems'; it has ")
    assert text.endswith(" (see `stemserve export --list`).")


def test_an_option_to_export_that_is_not_known(cli, tmp_path):
    arguments = ["export", "spleeter_2stems", "--repository", tmp_path, "--option", "colour=red"]
    assert assert_one_sentence(cli(*arguments), 50) == (
        "Model 'spleeter_2stems' has no option 'colour'; it has mask_extension, activation, output."
    )
    done = cli("export", "spleeter_2stems", "--option", "colour")
    assert done.code == 2
    assert "--option takes NAME=VALUE, got 'colour'." in done.err


def test_exporting_without_the_extra(cli, monkeypatch):
    monkeypatch.setattr("stemserve_export.cli.find_spec", lambda name: None)
    assert assert_one_sentence(cli("export", "spleeter_2stems"), 60) == (
        "Exporting needs the package torch, which is not installed; install the extra with `pip "
        "install 'stemserve[export]'`."
    )


def test_a_licence_that_was_not_accepted(cli, tmp_path):
    text = assert_one_sentence(cli("export", "htdemucs", "--repository", tmp_path), 55)
    assert text.startswith("The weights of 'htdemucs' are licensed for research only and not for ")
    assert text.endswith(" If you agree to that, export with --accept-licence.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../mine", "", ".hidden"])
def test_a_name_that_would_leave_the_repository(cli, tmp_path, name):
    done = cli("export", "htdemucs", "--repository", tmp_path / "models", "--name", name)
    assert assert_one_sentence(done, 50) == (
        f"'{name}' is no name for a model; use letters, digits, '_', '-' and '.', with a letter "
        "or digit first."
    )


def test_what_the_command_line_asks_the_exporter_for(cli, monkeypatch, tmp_path):
    asked = []

    def export_model(entry, repository, *, accept_licence, report):
        asked.append((entry, repository, accept_licence))
        folder = tmp_path / entry.name / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(bytes(1_230_000))
        return SimpleNamespace(folder=folder, built=len(asked) == 1, record={"nodes": 7})

    monkeypatch.setattr("stemserve_export.exporter.export_model", export_model)
    done = cli(
        "export", "umxl", "--repository", tmp_path, "--precision", "fp16", "--wire", "fp16",
        "--option", "wiener_iterations=0", "--accept-licence",
        "--checkpoint", "vocals=file:///v.pth", "--checkpoint", "bass=file:///b.pth",
    )  # fmt: skip
    path = tmp_path / "umxl_fp16" / "1" / "model.onnx"
    assert (done.code, done.out, done.err) == (0, f"Built {path} (1.2 MB, 7 nodes)\n", "")
    [(entry, repository, accepted)] = asked
    assert (entry.name, entry.precision, entry.wire_dtype) == ("umxl_fp16", "fp16", "fp16")
    assert entry.options == {"wiener_iterations": "0"}
    assert entry.files["vocals"].source == "file:///v.pth"
    assert entry.files["bass"].source == "file:///b.pth"
    assert entry.files["drums"].sha256_prefix == "69e0ebd4"
    assert (repository, accepted) == (tmp_path, True)
    done = cli("export", "umxhq", "--repository", tmp_path, "--name", "mine")
    assert done.out.startswith(f"Up to date: {tmp_path / 'mine'}")
    assert (asked[1][0].precision, asked[1][2]) == ("fp32", False)


def test_an_ensemble_is_told_with_its_specialists(cli, monkeypatch, tmp_path):
    def export_model(entry, repository, **_options):
        parts = [part.name for part in entry.parts()]
        return SimpleNamespace(
            folder=repository / entry.name / "1", built=True, record={"specialists": parts}
        )

    monkeypatch.setattr("stemserve_export.exporter.export_model", export_model)
    done = cli("export", "htdemucs_ft", "--repository", tmp_path, "--accept-licence")
    assert done.out == (
        f"Built {tmp_path}/htdemucs_ft (htdemucs_ft_drums, htdemucs_ft_bass, htdemucs_ft_other, "
        "htdemucs_ft_vocals)\n"
    )


def test_the_command_as_a_process(tmp_path):
    """As a user runs it: no traceback, nothing but the sentence."""
    path = tmp_path / "caf\udce9 missing.wav"
    done = subprocess.run(
        [sys.executable, "-m", "stemserve.cli", "separate", path, "--json"],
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 17
    assert done.stdout == b""
    assert done.stderr.startswith(b"Error: There is no file '")
    assert done.stderr.count(b"\n") == 1


# --- several files, with the server's part done here ----------------------------------------


class FakeSeparator:
    """Stands in for a connection; fails for files whose name says so."""

    def __init__(self, url, model, shared_memory):
        self.url = url
        assert not shared_memory

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        pass

    def separate(self, path, out_dir, **_options):
        from stemserve.errors import OverloadedError, TruncatedAudioError

        if "cut" in path.name:
            raise TruncatedAudioError(f"'{path}' is truncated.")
        if "busy" in path.name:
            raise OverloadedError("The server is overloaded.")
        return SimpleNamespace(metadata={"track": path.stem})


def test_several_files_are_reported_one_by_one(cli, monkeypatch):
    monkeypatch.setattr("stemserve.separator.Separator", FakeSeparator)
    files = ["a.wav", "cut.wav", "b.wav", "busy.wav"]
    done = cli("separate", *files, "--url", "h:1", "--json")
    assert done.code == 12  # the first failure's
    assert json.loads(done.out) == [{"track": "a"}, {"track": "b"}]
    assert done.err.splitlines() == [
        "Error: 'cut.wav' is truncated.",
        "Error: The server is overloaded.",
        "2 of 4 files failed.",
    ]


def test_one_file_gives_one_object(cli, monkeypatch, write_audio):
    monkeypatch.setattr("stemserve.separator.Separator", FakeSeparator)
    path = write_audio("song.wav", np.zeros((10, 2)))
    done = cli("separate", path, "--url", "h:1", "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out) == {"track": "song"}


def test_ctrl_c(cli, monkeypatch, write_audio):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("stemserve.separator.Separator", FakeSeparator)
    monkeypatch.setattr(FakeSeparator, "separate", interrupt)
    done = cli("separate", write_audio("song.wav", np.zeros((10, 2))), "--url", "h:1", "--json")
    assert (done.code, done.out, done.err.strip()) == (130, "", "Interrupted.")
