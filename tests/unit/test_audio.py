import struct

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from stemserve.audio import AudioReader, resample
from stemserve.downmix import to_stereo
from stemserve.errors import (
    AudioInputError,
    ChannelCountError,
    EmptyAudioError,
    InputMissingError,
    InputUnreadableError,
    NonFiniteAudioError,
    NotAudioError,
    SampleRateError,
    TruncatedAudioError,
)

# Name, libsndfile's subtype, and how far a decoded sample may be off: half a step of the format,
# and for the lossy ones what their quantisation of this noise leaves.
LOSSLESS = [
    ("pcm16.wav", "PCM_16", 2**-15),
    ("pcm24.wav", "PCM_24", 2**-23),
    ("float.wav", "FLOAT", 0.0),
    ("pcm16.flac", "PCM_16", 2**-15),
    ("pcm24.flac", "PCM_24", 2**-23),
    ("pcm16.aiff", "PCM_16", 2**-15),
]
LOSSY = [("vorbis.ogg", "VORBIS"), ("layer3.mp3", "MPEG_LAYER_III")]


def read_all(path, rate=44100):
    with AudioReader(path) as reader:
        blocks = list(reader.blocks(rate))
        return np.concatenate(blocks, axis=1), reader.properties


def refusal(path, kind, rate=44100):
    """The text of the error that reading a file to its end raises."""
    with pytest.raises(AudioInputError) as caught:
        read_all(path, rate)
    assert type(caught.value) is kind
    return str(caught.value)


# --- decoding -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "subtype", "step"), LOSSLESS)
def test_lossless_formats_are_decoded_to_the_sample(write_audio, noise, name, subtype, step):
    samples = noise(70_001)
    decoded, properties = read_all(write_audio(name, samples, subtype=subtype))
    assert decoded.dtype == np.float32
    assert decoded.shape == (2, 70_001)
    np.testing.assert_allclose(decoded, samples.T, rtol=0, atol=step)
    assert properties.frames == 70_001
    assert properties.sample_rate == 44100
    assert properties.channels == 2
    assert properties.duration_s == pytest.approx(70_001 / 44100, abs=1e-12)
    assert properties.peak == pytest.approx(float(np.abs(samples).max()), abs=step)


@pytest.mark.parametrize(("name", "subtype"), LOSSY)
def test_lossy_formats_are_decoded_in_place_and_length(write_audio, name, subtype):
    time_s = np.arange(88_200) / 44100
    tone = (0.5 * np.sin(2 * np.pi * (300 + 200 * time_s) * time_s)).astype(np.float32)
    samples = np.stack([tone, -tone / 2], axis=1)
    decoded, properties = read_all(write_audio(name, samples, subtype=subtype))
    assert decoded.shape == (2, 88_200)
    # A sweep that is off by one sample differs by 4 % of its level; lossy coding leaves 1 %.
    inner = slice(4000, -4000)
    error = decoded[:, inner] - samples.T[:, inner]
    assert np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(samples**2))
    assert properties.frames == 88_200
    assert properties.peak == pytest.approx(0.5, abs=0.05)


def test_a_track_comes_in_blocks_of_bounded_size(write_audio, noise):
    with AudioReader(write_audio("long.wav", noise(200_000))) as reader:
        sizes = [block.shape[1] for block in reader.blocks(44100)]
        assert reader.announced_frames == 200_000
    assert sum(sizes) == 200_000
    assert max(sizes) <= 1 << 16


def test_samples_beyond_full_scale_are_kept(write_audio):
    samples = np.full((100, 2), 1.5, np.float32)
    decoded, properties = read_all(write_audio("hot.wav", samples, subtype="FLOAT"))
    np.testing.assert_array_equal(decoded, samples.T)
    assert properties.peak == 1.5


def test_one_sample_is_a_track(write_audio):
    decoded, properties = read_all(write_audio("one.wav", np.full((1, 2), 0.25)))
    assert decoded.shape == (2, 1)
    assert properties.frames == 1


def test_a_recording_of_unknown_size_from_a_pipe_is_accepted(write_audio, noise):
    samples = noise(30_000)
    path = write_audio("pipe.wav", samples, subtype="FLOAT")
    for unknown in (0xFFFFFFFF, 0x7FFFF000):  # what ffmpeg and sox write
        data = bytearray(path.read_bytes())
        at = data.index(b"data") + 4
        data[4:8] = struct.pack("<I", unknown)
        data[at : at + 4] = struct.pack("<I", unknown)
        path.write_bytes(data)
        decoded, properties = read_all(path)
        np.testing.assert_array_equal(decoded, samples.T)
        assert properties.frames == 30_000


def test_a_flac_of_unknown_length_from_a_pipe_is_accepted(write_audio, noise):
    samples = noise(100_000)
    path = write_audio("pipe.flac", samples, subtype="PCM_24")
    data = bytearray(path.read_bytes())
    # STREAMINFO begins at byte 8; the 36 bits from its byte 13 on are the length, 0 if unknown.
    data[8 + 13] &= 0xF0
    data[8 + 14 : 8 + 18] = bytes(4)
    path.write_bytes(data)
    decoded, properties = read_all(path)
    np.testing.assert_allclose(decoded, samples.T, rtol=0, atol=2**-23)
    assert properties.frames == 100_000
    with AudioReader(path) as reader:
        assert reader.announced_frames == 0  # which the chunk plan and the progress are told


def test_a_riff_size_that_is_off_is_no_truncation(write_audio, noise):
    """Some programs write the file's size where the size less 8 belongs."""
    path = write_audio("sloppy.wav", noise(1000), subtype="PCM_16")
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", len(data))
    path.write_bytes(data)
    assert read_all(path)[0].shape == (2, 1000)


def test_a_name_that_is_not_utf8_is_read(tmp_path, write_audio, noise):
    """Names of old archives are Latin-1; Linux allows any bytes."""
    path = write_audio("plain.wav", noise(100))
    odd = tmp_path / "caf\udce9.wav"
    path.rename(odd)
    assert read_all(odd)[0].shape == (2, 100)


# --- resampling -----------------------------------------------------------------------------


def at_once(samples, from_rate, to_rate):
    # A fresh array: soxr refuses the strides that numpy gives to axes of length 1.
    return soxr.resample(np.array(samples, order="C"), from_rate, to_rate, quality="HQ").T


@pytest.mark.parametrize("rate", [48_000, 8_000, 96_000, 192_000])
def test_resampling_in_blocks_is_resampling_at_once(write_audio, noise, rate):
    samples = noise(150_000)
    decoded, properties = read_all(write_audio("r.wav", samples, rate, subtype="FLOAT"))
    np.testing.assert_array_equal(decoded, at_once(samples, rate, 44_100))
    assert properties.frames == 150_000
    assert properties.sample_rate == rate


@pytest.mark.parametrize("rate", [48_000, 8_000, 96_000])
@pytest.mark.parametrize("frames", range(1, 11))
def test_resampling_the_shortest_tracks(noise, rate, frames):
    samples = noise(frames)
    blocks = list(resample([samples.T], rate, 44_100))
    joined = np.concatenate([np.zeros((2, 0), np.float32), *blocks], axis=1)
    np.testing.assert_array_equal(joined, at_once(samples, rate, 44_100))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=6))
def test_resampling_does_not_depend_on_block_sizes(sizes):
    samples = np.random.default_rng(0).uniform(-1, 1, (sum(sizes), 2)).astype(np.float32)
    blocks = np.split(samples.T, np.cumsum(sizes)[:-1], axis=1)
    joined = np.concatenate(list(resample(blocks, 48_000, 44_100)), axis=1)
    np.testing.assert_array_equal(joined, at_once(samples, 48_000, 44_100))


def test_resampling_nothing_gives_nothing():
    assert list(resample([], 48_000, 44_100)) == []


# --- mix-down -------------------------------------------------------------------------------

_3DB = 0.5**0.5
# Channel order of WAVE_FORMAT_EXTENSIBLE; coefficients of ITU-R BS.775-3.
MIX_DOWN = {
    1: ([1], [1]),
    2: ([1, 0], [0, 1]),
    3: ([1, 0, _3DB], [0, 1, _3DB]),
    4: ([1, 0, _3DB, 0], [0, 1, 0, _3DB]),
    5: ([1, 0, _3DB, _3DB, 0], [0, 1, _3DB, 0, _3DB]),
    6: ([1, 0, _3DB, 0, _3DB, 0], [0, 1, _3DB, 0, 0, _3DB]),
    7: ([1, 0, _3DB, 0, 0.5, _3DB, 0], [0, 1, _3DB, 0, 0.5, 0, _3DB]),
    8: ([1, 0, _3DB, 0, _3DB, 0, _3DB, 0], [0, 1, _3DB, 0, 0, _3DB, 0, _3DB]),
}


@pytest.mark.parametrize("channels", MIX_DOWN)
def test_mix_down(write_audio, noise, channels):
    samples = noise(500, channels)
    decoded, properties = read_all(write_audio("c.wav", samples, subtype="FLOAT"))
    expected = np.array(MIX_DOWN[channels]) @ samples.T.astype(np.float64)
    # A sum of at most eight float32 products.
    np.testing.assert_allclose(decoded, expected, rtol=0, atol=1e-6)
    assert decoded.flags.c_contiguous
    assert properties.channels == channels
    assert properties.peak == float(np.abs(samples).max())


@pytest.mark.parametrize("channels", [0, 9, 200])
def test_mix_down_of_no_known_layout(channels):
    with pytest.raises(ChannelCountError, match=f"has {channels} channels; expected 1"):
        to_stereo(np.zeros((4, channels), np.float32))


# --- bad input ------------------------------------------------------------------------------


def test_a_missing_file(tmp_path):
    path = tmp_path / "missing.wav"
    assert refusal(path, InputMissingError) == f"There is no file '{path}'; check the path."


def test_a_folder(tmp_path):
    assert refusal(tmp_path, InputUnreadableError) == (
        f"'{tmp_path}' is a folder; name the audio files in it, e.g. '{tmp_path}/*.wav'."
    )


def test_a_file_that_cannot_be_opened(tmp_path):
    """A link to itself: root cannot open it either."""
    path = tmp_path / "loop.wav"
    path.symlink_to(path)
    assert refusal(path, InputUnreadableError) == (
        f"'{path}' cannot be read (Too many levels of symbolic links); check its permissions."
    )


def test_a_file_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "private.wav"
    path.write_bytes(b"RIFF")

    def refuse(*_arguments, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    assert refusal(path, InputUnreadableError) == (
        f"'{path}' cannot be read (Permission denied); check its permissions."
    )


def test_a_file_of_no_bytes(tmp_path):
    path = tmp_path / "zero.wav"
    path.touch()
    assert refusal(path, EmptyAudioError) == (
        f"'{path}' is empty (0 bytes); expected an audio file."
    )


@pytest.mark.parametrize("name", ["header.wav", "header.aiff", "header.w64"])
def test_a_header_without_samples(write_audio, name):
    path = write_audio(name, np.zeros((0, 2)))
    assert refusal(path, EmptyAudioError).startswith(f"'{path}' ")
    assert "samples; expected audio." in refusal(path, EmptyAudioError)


@pytest.mark.parametrize("name", ["notes.txt", "notes.wav", "r.wav", "r.mp3", "r.flac", "r.ogg"])
def test_no_audio_whatever_its_name(tmp_path, name):
    path = tmp_path / name
    text = name.startswith("notes")
    path.write_bytes(b"not a song\n" * 500 if text else np.random.default_rng(0).bytes(5000))
    assert refusal(path, NotAudioError) == (
        f"'{path}' is not audio that can be decoded, or it is damaged; expected wav, flac, ogg, "
        "mp3 or aiff. Convert it first, e.g. `ffmpeg -i IN OUT.wav`."
    )


def test_raw_samples_have_no_header_to_read(tmp_path):
    path = tmp_path / "samples.raw"
    path.write_bytes(b"\0\1" * 500)
    assert "expected wav, flac" in refusal(path, NotAudioError)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_a_non_finite_sample_is_refused_with_its_place(write_audio, noise, value, rate):
    samples = noise(100_000)
    samples[88_200, 1] = value
    path = write_audio("nan.wav", samples, subtype="FLOAT")
    assert refusal(path, NonFiniteAudioError, rate) == (
        f"'{path}' has a NaN or infinite sample at 2.000 s; expected finite numbers. Render the "
        "file again, or repair that place."
    )


@pytest.mark.parametrize("channels", [9, 200])
def test_too_many_channels(write_audio, channels):
    path = write_audio("many.wav", np.zeros((10, channels)))
    assert refusal(path, ChannelCountError) == (
        f"'{path}': the file has {channels} channels; expected 1 (mono) to 8 (7.1). Mix it down "
        "to stereo first."
    )


@pytest.mark.parametrize("rate", [4_000, 7_999, 192_001, 384_000])
def test_a_rate_that_cannot_be_resampled_sensibly(write_audio, rate):
    path = write_audio("rate.wav", np.zeros((10, 2)), rate)
    assert refusal(path, SampleRateError) == (
        f"'{path}' has a sample rate of {rate} Hz; expected 8000 to 192000 Hz. Convert it first, "
        "e.g. `ffmpeg -i IN -ar 44100 OUT`."
    )


CONTAINERS = [
    ("t.wav", "WAV", "PCM_16"),
    ("f.wav", "WAV", "FLOAT"),
    ("x.wav", "WAVEX", "PCM_24"),
    ("t.aiff", "AIFF", "PCM_16"),
    ("t.w64", "W64", "PCM_16"),
    ("t.rf64", "RF64", "PCM_16"),
    ("t.flac", "FLAC", "PCM_16"),
    ("t.ogg", "OGG", "VORBIS"),
    ("t.mp3", "MP3", "MPEG_LAYER_III"),
]


@pytest.mark.parametrize(("name", "container", "subtype"), CONTAINERS)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_file(write_audio, noise, name, container, subtype, share):
    path = write_audio(name, noise(200_000), subtype=subtype, format=container)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    text = refusal(path, TruncatedAudioError)
    assert text.startswith(f"'{path}' is truncated")
    assert text.endswith("Get the whole file, or cut it cleanly first.")


@pytest.mark.parametrize(
    ("name", "container", "subtype"), [entry for entry in CONTAINERS if entry[1] != "MP3"]
)
def test_a_file_that_lacks_its_last_bytes(write_audio, noise, name, container, subtype):
    """An mp3 is excepted: how many samples of its last frames count is up to the decoder."""
    path = write_audio(name, noise(100_000), subtype=subtype, format=container)
    path.write_bytes(path.read_bytes()[:-4])
    assert "is truncated" in refusal(path, TruncatedAudioError)


def test_an_ogg_that_lacks_its_last_pages(write_audio, noise):
    """Each page is whole, and none says that it is the last."""
    path = write_audio("t.ogg", noise(100_000), subtype="VORBIS")
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"OggS")])
    assert refusal(path, TruncatedAudioError) == (
        f"'{path}' is truncated: its last Ogg page does not end the stream. Get the whole file, "
        "or cut it cleanly first."
    )


def test_the_sentence_tells_how_much_of_a_truncated_file_is_there(write_audio, noise):
    path = write_audio("cut.wav", noise(10_000), subtype="PCM_16")
    path.write_bytes(path.read_bytes()[: 44 + 20_000])
    assert refusal(path, TruncatedAudioError) == (
        f"'{path}' is truncated: its header announces 40000 bytes of audio and 20000 are there. "
        "Get the whole file, or cut it cleanly first."
    )
