import errno
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import soundfile

from stemserve import stem_files
from stemserve.errors import DiskFullError, OutputError, OutputNotWritableError
from stemserve.stem_files import TrackWriter

STEMS = ("vocals", "accompaniment")
MINUS_1_DBFS = 10 ** (-1 / 20)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out" / "song"


@pytest.fixture
def write_track(folder):
    """Write blocks of two stems, each [n, 2], and commit; returns paths and properties."""

    def write(stems, *, frames=None, block=1000, metadata=None, **options):
        with writer(folder, **options) as track:
            length = len(stems[0])
            for start in range(0, length, block):
                track.write([stem[start : start + block].T for stem in stems])
            properties = track.finish(length if frames is None else frames)
            paths = track.commit({"track": "song"} if metadata is None else metadata)
        return paths, properties

    return write


def writer(folder, **options):
    settings = {
        "channels": 2,
        "model_rate": 44_100,
        "sample_rate": 44_100,
        "file_format": "wav",
        "announced_frames": 1000,
        "normalize": False,
    }
    return TrackWriter(folder, STEMS, **{**settings, **options})


def below(folder):
    """Every path under a folder, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def content(folder):
    return {path: (folder / path).read_bytes() for path in below(folder)}


# --- what is written ------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 999, 1000, 70_001])
@pytest.mark.parametrize(
    ("file_format", "step"),
    # Half a step of 24 bits, rounded by libsndfile; float holds what came.
    [("wav", 0.0), ("flac", 2**-23)],
)
def test_lossless_stems_come_back_to_the_sample(write_track, noise, file_format, step, frames):
    stems = [noise(frames, seed=1), noise(frames, seed=2)]
    paths, properties = write_track(stems, file_format=file_format)
    for name, stem in zip(STEMS, stems, strict=True):
        read, rate = soundfile.read(paths[name], dtype="float32", always_2d=True)
        assert rate == 44_100
        assert read.shape == stem.shape
        np.testing.assert_allclose(read, stem, rtol=0, atol=step)
        assert properties[name].file == f"{name}.{file_format}"
        assert properties[name].peak == float(np.abs(stem).max())
        level = 10 * np.log10(np.mean(np.square(stem, dtype=np.float64)))
        assert properties[name].rms_db == pytest.approx(level, abs=1e-3)
        assert properties[name].clipped_samples == 0


def test_an_mp3_stem_keeps_length_and_level(write_track):
    tone = 0.5 * np.sin(2 * np.pi * 440 / 44_100 * np.arange(66_150))
    stem = np.stack([tone, tone], axis=1).astype(np.float32)
    paths, _ = write_track([stem, stem / 2], file_format="mp3")
    assert soundfile.info(paths["vocals"]).format == "MP3"
    read = soundfile.read(paths["vocals"])[0]
    # libsndfile writes the length into the LAME header; other decoders keep whole frames.
    assert abs(len(read) - 66_150) <= 2 * 1152
    assert np.std(read[4000:-4000]) == pytest.approx(np.std(tone), rel=0.01)


def test_wav_is_float_and_flac_has_24_bits(write_track, noise):
    assert soundfile.info(write_track([noise(9)] * 2)[0]["vocals"]).subtype == "FLOAT"
    paths, _ = write_track([noise(9)] * 2, file_format="flac")
    assert soundfile.info(paths["vocals"]).subtype == "PCM_24"


@pytest.mark.parametrize("file_format", ["wav", "flac"])
@pytest.mark.parametrize(
    ("frames", "rate", "expected"),
    [
        (44_100, 48_000, 48_000),
        (1, 48_000, 1),
        (1, 8_000, 1),
        (3, 96_000, 7),
        (10_007, 22_050, 5003),
    ],
)
def test_resampled_stems_have_exactly_the_length_asked_for(
    write_track, noise, file_format, frames, rate, expected
):
    stems = [noise(frames), noise(frames)]
    paths, _ = write_track(stems, frames=expected, sample_rate=rate, file_format=file_format)
    for path in paths.values():
        info = soundfile.info(path)
        assert (info.frames, info.samplerate) == (expected, rate)


@pytest.mark.parametrize(
    ("rate", "off"), [(44_100, 0), (44_100, 1), (48_000, -1), (48_000, 0), (48_000, 1)]
)
def test_a_length_that_rounding_left_off_by_one_is_put_right(write_track, noise, rate, off):
    """Resampling to the model's rate and rounding the output's length may differ by a sample."""
    expected = round(4410 * rate / 44_100) + off
    paths, _ = write_track([noise(4410)] * 2, frames=expected, sample_rate=rate)
    assert [soundfile.info(path).frames for path in paths.values()] == [expected] * 2


def test_resampling_keeps_a_tone_in_place(write_track):
    time_s = np.arange(44_100) / 44_100
    tone = np.sin(2 * np.pi * 440 * time_s)
    stem = np.stack([tone, tone], axis=1).astype(np.float32)
    paths, _ = write_track([stem] * 2, frames=48_000, sample_rate=48_000)
    read = soundfile.read(paths["vocals"])[0][:, 0]
    expected = np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)
    # Half a sample of delay would leave 3 % of full scale; the ends ring.
    np.testing.assert_allclose(read[2000:-2000], expected[2000:-2000], rtol=0, atol=1e-4)


def test_metadata_lies_beside_the_stems(write_track, folder):
    paths, _ = write_track([np.zeros((9, 2), np.float32)] * 2, metadata={"track": "Œuvre №1"})
    assert below(folder.parent) == [
        "song", "song/accompaniment.wav", "song/metadata.json", "song/vocals.wav",
    ]  # fmt: skip
    assert paths == {name: folder / f"{name}.wav" for name in STEMS}
    text = (folder / "metadata.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"track": "Œuvre №1"}
    assert text.endswith("}\n")


def test_metadata_of_an_input_whose_name_is_not_utf8(write_track, folder):
    write_track([np.zeros((9, 2), np.float32)] * 2, metadata={"path": "caf\udce9.wav"})
    text = (folder / "metadata.json").read_text(encoding="utf-8")
    assert json.loads(text)["path"].startswith("caf")


def test_digital_silence_has_no_level(write_track):
    _, properties = write_track([np.zeros((9, 2), np.float32)] * 2)
    assert properties["vocals"].rms_db == -np.inf
    assert properties["vocals"].peak == 0


def test_permissions_follow_the_umask(write_track, folder, noise):
    before = os.umask(0o027)
    try:
        write_track([noise(9)] * 2)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o750
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o640, path.name


# --- level ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("file_format", "step"), [("wav", 1e-7), ("flac", 2**-23)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_normalizing_applies_one_gain_to_all_stems(write_track, noise, file_format, step, scale):
    loud, quiet = noise(5000, seed=1) * np.float32(scale), noise(5000, seed=2) * np.float32(0.001)
    paths, properties = write_track([quiet, loud], file_format=file_format, normalize=True)
    gain = MINUS_1_DBFS / np.abs(loud).max()
    read = {name: soundfile.read(path, dtype="float32")[0] for name, path in paths.items()}
    np.testing.assert_allclose(read["accompaniment"], loud * gain, rtol=1e-6, atol=step)
    np.testing.assert_allclose(read["vocals"], quiet * gain, rtol=1e-6, atol=step)
    assert np.abs(read["accompaniment"]).max() == pytest.approx(MINUS_1_DBFS, abs=1e-6)
    assert properties["accompaniment"].peak == pytest.approx(MINUS_1_DBFS, abs=1e-6)
    assert properties["accompaniment"].clipped_samples == 0
    assert (
        soundfile.info(paths["vocals"]).subtype == {"wav": "FLOAT", "flac": "PCM_24"}[file_format]
    )


def test_the_gain_is_told(folder):
    with writer(folder, normalize=True) as track:
        assert track.gain == 1
        track.write([np.full((2, 4), 0.25, np.float32), np.zeros((2, 4), np.float32)])
        track.finish(4)
        assert track.gain == pytest.approx(MINUS_1_DBFS / 0.25, rel=1e-6)


def test_normalizing_silence_leaves_silence(write_track, folder):
    paths, _ = write_track([np.zeros((9, 2), np.float32)] * 2, normalize=True)
    assert not soundfile.read(paths["vocals"])[0].any()
    assert below(folder) == ["accompaniment.wav", "metadata.json", "vocals.wav"]


def test_normalizing_resampled_stems_keeps_the_length(write_track, noise):
    paths, _ = write_track(
        [noise(4410)] * 2, frames=4800, sample_rate=48_000, normalize=True, file_format="flac"
    )
    assert soundfile.info(paths["vocals"]).frames == 4800


def test_clipping_is_counted_where_samples_are_cut_off(write_track):
    stem = np.array([[1.5, -2.0], [0.5, 1.0], [-1.0, -1.1]], np.float32)
    paths, properties = write_track([stem, stem / 4], file_format="flac")
    assert properties["vocals"].clipped_samples == 3
    assert properties["vocals"].peak == 2.0
    assert properties["accompaniment"].clipped_samples == 0
    read = soundfile.read(paths["vocals"])[0]
    np.testing.assert_allclose(read, np.clip(stem, -1, 1), rtol=0, atol=2**-22)


def test_float_files_keep_what_is_beyond_full_scale(write_track):
    stem = np.array([[1.5, -2.0]], np.float32)
    paths, properties = write_track([stem, stem])
    assert properties["vocals"].clipped_samples == 0
    assert properties["vocals"].peak == 2.0
    np.testing.assert_array_equal(soundfile.read(paths["vocals"])[0], stem)


# --- all or nothing -------------------------------------------------------------------------


def test_nothing_is_left_without_a_commit(folder, noise):
    with writer(folder) as track:
        track.write([noise(100).T] * 2)
        track.finish(100)
        assert not folder.exists()
    assert below(folder.parent) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("normalize", [False, True])
def test_nothing_is_left_after_an_exception(folder, noise, error, normalize):
    with pytest.raises(error), writer(folder, normalize=normalize) as track:
        track.write([noise(100).T] * 2)
        raise error
    assert below(folder.parent) == []


def test_older_stems_stay_until_the_commit(write_track, folder, noise):
    write_track([noise(50, seed=1)] * 2)
    older = content(folder)
    with writer(folder) as track:
        track.write([noise(60, seed=2).T] * 2)
        track.finish(60)
        assert content(folder) == older
    assert content(folder) == older
    write_track([noise(60, seed=2)] * 2, metadata={"track": "newer"})
    assert soundfile.info(folder / "vocals.wav").frames == 60
    assert json.loads((folder / "metadata.json").read_text()) == {"track": "newer"}
    assert below(folder.parent) == ["song", *(f"song/{name}" for name in sorted(older))]


def test_older_stems_stay_if_the_new_run_fails(write_track, folder, noise):
    write_track([noise(50, seed=1)] * 2)
    older = content(folder)
    with pytest.raises(RuntimeError), writer(folder) as track:
        track.write([noise(60, seed=2).T] * 2)
        raise RuntimeError
    assert content(folder) == older
    assert below(folder.parent) == ["song", *(f"song/{name}" for name in sorted(older))]


def test_other_files_of_the_folder_are_left_alone(write_track, folder, noise):
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    write_track([noise(50)] * 2)
    assert (folder / "notes.txt").read_text() == "mine"
    assert below(folder) == ["accompaniment.wav", "metadata.json", "notes.txt", "vocals.wav"]


def test_a_commit_that_cannot_replace_one_stem_replaces_none(write_track, folder, noise):
    write_track([noise(50, seed=1)] * 2)
    (folder / "accompaniment.wav").unlink()
    (folder / "accompaniment.wav").mkdir()
    (folder / "accompaniment.wav" / "mine").touch()
    older = (folder / "vocals.wav").read_bytes()
    with pytest.raises(OutputError, match="nothing was kept"):
        write_track([noise(60, seed=2)] * 2)
    assert (folder / "vocals.wav").read_bytes() == older


def test_nothing_is_left_if_a_stem_cannot_be_opened(folder, monkeypatch):
    opened = []
    original = stem_files._Encoder

    def second_fails(*arguments, **options):
        if opened:
            raise OSError(errno.EMFILE, "Too many open files")
        opened.append(original(*arguments, **options))
        return opened[0]

    monkeypatch.setattr(stem_files, "_Encoder", second_fails)
    with pytest.raises(OutputError, match="Too many open files"):
        writer(folder)
    assert below(folder.parent) == []


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(folder, noise, monkeypatch, code):
    def full(*_arguments):
        raise OSError(code, os.strerror(code))

    with pytest.raises(DiskFullError) as caught, writer(folder) as track:
        track.write([noise(100).T] * 2)
        monkeypatch.setattr(soundfile.SoundFile, "write", full)
        track.write([noise(100).T] * 2)
    text = str(caught.value)
    assert text.startswith(f"The disk of '{folder.parent}' is full (")
    assert text.endswith(
        " MB left); nothing was kept of this track. Free some space or choose another --out."
    )
    assert below(folder.parent) == []


@pytest.mark.parametrize("error", [AssertionError(), soundfile.LibsndfileError(2)])
def test_a_full_disk_that_libsndfile_does_not_name(folder, noise, monkeypatch, error):
    def fail(*_arguments):
        raise error

    usage = type("usage", (), {"free": 1000})
    with pytest.raises(DiskFullError), writer(folder) as track:
        monkeypatch.setattr(soundfile.SoundFile, "write", fail)
        monkeypatch.setattr(stem_files.shutil, "disk_usage", lambda _path: usage)
        track.write([noise(100).T] * 2)
    assert below(folder.parent) == []


def test_a_disk_that_is_full_when_the_folder_is_made(folder, monkeypatch):
    make = Path.mkdir

    def full(path, *args, **options):
        if path.name.endswith(".partial"):
            raise OSError(errno.ENOSPC, "No space left on device")
        make(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(DiskFullError, match=rf"The disk of '{folder.parent}' is full; free some"):
        writer(folder)


@pytest.mark.parametrize("file_format", ["wav", "flac"])
def test_a_write_that_the_system_refuses(folder, noise, file_format):
    """A limit on the size of files stands in for whatever a disk may do."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OutputError) as caught, writer(folder, file_format=file_format) as track:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            for _ in range(20):
                track.write([noise(10_000).T] * 2)
            track.finish(200_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert type(caught.value) is OutputError
    text = str(caught.value)
    assert text.startswith(f"The stems cannot be written to '{folder}' (")
    assert text.endswith("; nothing was kept of this track.")
    assert below(folder.parent) == []


def test_a_destination_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    with pytest.raises(OutputNotWritableError) as caught:
        writer(out / "song")
    assert str(caught.value) == (
        f"The output folder '{out}' cannot be written to (Not a directory); choose another with "
        "--out."
    )


def test_a_destination_that_is_a_file(folder):
    folder.parent.mkdir()
    folder.write_text("mine")
    with pytest.raises(OutputNotWritableError) as caught:
        writer(folder)
    assert str(caught.value) == (
        f"'{folder}' exists and is no folder that may be written to; remove it or choose another "
        "--out."
    )
    assert folder.read_text() == "mine"
    assert below(folder.parent) == ["song"]


@pytest.mark.parametrize("rate", [96_000, 88_200, 192_000])
def test_an_mp3_of_a_rate_that_mp3_does_not_have(folder, rate):
    with pytest.raises(OutputError) as caught:
        writer(folder, file_format="mp3", sample_rate=rate)
    assert str(caught.value) == (
        f"mp3 cannot hold {rate} Hz; choose --sample-rate 44100 or 48000, or another --format."
    )
    assert not folder.parent.exists()


def test_stems_beyond_4_gb_go_into_rf64(folder, noise):
    with writer(folder, announced_frames=600_000_000) as track:
        track.write([noise(10).T] * 2)
        track.finish(10)
        paths = track.commit({})
    assert soundfile.info(paths["vocals"]).format == "RF64"
    assert soundfile.info(paths["vocals"]).frames == 10
