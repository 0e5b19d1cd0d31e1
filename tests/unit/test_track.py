"""A whole track through TrackJob, with the server's part done here."""

import io
import json

import numpy as np
import pytest
import soundfile
from rich.console import Console
from tritonclient.grpc import service_pb2

from stemserve.errors import (
    EmptyAudioError,
    NonFiniteAudioError,
    OutputError,
    SpecError,
    UnknownStemError,
)
from stemserve.report import print_result
from stemserve.track import TrackJob, TrackOptions
from stemserve.triton import ServedModel

ROUND_TRIP_S = 0.02


@pytest.fixture
def separate(tmp_path, make_spec):
    """Separate a file with a model that gives the mixture and half of it."""

    def run(path, spec=None, **options):
        served = ServedModel(spec or make_spec(chunk_samples=5000), "cpu", 1)
        with TrackJob(path, tmp_path / "out" / path.stem, served, TrackOptions(**options)) as job:
            while (following := job.next_request()) is not None:
                request, track_samples = following
                job.accept(answer(request), track_samples, ROUND_TRIP_S)
            return job.finish()

    return run


def answer(request):
    response = service_pb2.ModelInferResponse(model_version="3")
    mixture = np.frombuffer(request.raw_input_contents[0], np.float32)
    for output in request.outputs:
        response.outputs.add(name=output.name).shape.extend(request.inputs[0].shape)
        gain = np.float32(1 if output.name == "vocals" else 0.5)
        response.raw_output_contents.append((mixture * gain).tobytes())
    return response


def test_stems_of_an_identity_model_are_the_input(separate, write_audio, noise):
    samples = noise(12_345)
    path = write_audio("song.wav", samples, subtype="FLOAT")
    result = separate(path)
    # Crossfading is exact to float32's rounding.
    np.testing.assert_allclose(soundfile.read(result.stems["vocals"])[0], samples, atol=1e-6)
    half = soundfile.read(result.stems["accompaniment"])[0]
    np.testing.assert_allclose(half, samples / 2, atol=1e-6)
    assert json.loads((result.folder / "metadata.json").read_text()) == result.metadata


def test_metadata(separate, write_audio, noise):
    samples = noise(48_000)
    path = write_audio("song.wav", samples, 48_000, subtype="FLOAT")
    metadata = separate(path, file_format="flac").metadata
    assert metadata["track"] == "song"
    assert metadata["model_name"] == "tiny"
    assert metadata["model_version"] == "3"
    assert metadata["checkpoint"] == {
        "files": [{"source": "file:///w.ckpt", "sha256": "0" * 64}],
        "licence": "MIT",
        "commercial_use": "allowed",
    }
    assert metadata["precision"] == "fp32"
    assert metadata["device"] == "cpu"
    assert metadata["runtime_seconds"] > 0
    assert metadata["input"] == {
        "path": str(path),
        "duration_seconds": 1.0,
        "frames": 48_000,
        "sample_rate": 48_000,
        "channels": 2,
        "peak": pytest.approx(float(np.abs(samples).max()), abs=1e-6),
    }
    assert metadata["output"] == {
        "format": "flac", "sample_rate": 48_000, "channels": 2, "frames": 48_000, "gain_db": 0.0,
    }  # fmt: skip
    # 44100 samples at the model's rate; 5000 less 3750 per chunk: 1 + ceil(39100 / 3750).
    chunks = metadata["chunks"]
    assert (chunks["count"], chunks["samples"], chunks["stride"]) == (12, 5000, 3750)
    assert (chunks["joined_by"], chunks["shifts"]) == ("crossfade", 0)
    assert metadata["latency_ms"]["round_trip"]["max"] == 1e3 * ROUND_TRIP_S
    assert metadata["client_peak_rss_mb"] > 10
    assert [warning["code"] for warning in metadata["warnings"]] == ["resampled"]


@pytest.mark.parametrize("frames", [2, 80, 239, 240, 241, 720, 44_100])
@pytest.mark.parametrize("rate", [44_100, 48_000, 96_000])
def test_stems_have_the_length_of_the_input(separate, write_audio, noise, frames, rate):
    result = separate(write_audio("song.wav", noise(frames), rate, subtype="FLOAT"))
    for path in result.stems.values():
        info = soundfile.info(path)
        assert (info.frames, info.samplerate) == (frames, rate)


@pytest.mark.parametrize("frames", [2, 80, 239, 240, 241, 720, 44_100])
@pytest.mark.parametrize(("rate", "wanted"), [(48_000, 44_100), (44_100, 48_000), (8_000, 44_100)])
def test_stems_at_another_rate_have_the_length_that_metadata_tells(
    separate, write_audio, noise, frames, rate, wanted
):
    path = write_audio("song.wav", noise(frames), rate, subtype="FLOAT")
    result = separate(path, sample_rate=wanted)
    told = result.metadata["output"]["frames"]
    assert abs(told - frames * wanted / rate) <= 0.5
    for stem in result.stems.values():
        assert soundfile.info(stem).frames == told


def test_one_sample_is_separated(separate, write_audio):
    result = separate(write_audio("song.wav", np.full((1, 2), 0.25)))
    assert soundfile.info(result.stems["vocals"]).frames == 1


def test_a_track_of_which_resampling_leaves_nothing(separate, tmp_path, write_audio):
    path = write_audio("song.wav", np.full((1, 2), 0.25), 96_000)
    with pytest.raises(EmptyAudioError) as caught:
        separate(path)
    assert str(caught.value) == (
        f"'{path}' is too short: less than one sample is left at the model's 44100 Hz."
    )
    assert list((tmp_path / "out").rglob("*")) == []


def test_only_the_stems_asked_for_are_written(separate, write_audio, noise):
    result = separate(write_audio("song.wav", noise(6000)), stems=["accompaniment"])
    assert set(result.stems) == set(result.metadata["stems"]) == {"accompaniment"}
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "accompaniment.wav", "metadata.json",
    ]  # fmt: skip


def test_a_normalized_track_is_put_back_to_its_level(separate, make_spec, write_audio, noise):
    samples = noise(12_345) * np.float32(0.1) + np.float32(0.2)
    path = write_audio("song.wav", samples, subtype="FLOAT")
    result = separate(path, make_spec(chunk_samples=5000, normalization="track"))
    # Divided by the deviation and multiplied by it again, in float32.
    np.testing.assert_allclose(soundfile.read(result.stems["vocals"])[0], samples, atol=1e-6)


def test_silence_is_separated_with_a_warning(separate, write_audio):
    metadata = separate(write_audio("song.wav", np.zeros((44_100, 2)))).metadata
    assert [warning["code"] for warning in metadata["warnings"]] == ["silent_input"]
    assert metadata["stems"]["vocals"]["rms_db"] is None


def test_a_bad_sample_midway_leaves_nothing(separate, tmp_path, write_audio, noise):
    samples = noise(200_000)
    samples[150_000] = np.nan
    path = write_audio("song.wav", samples, subtype="FLOAT")
    with pytest.raises(NonFiniteAudioError):
        separate(path)
    assert list((tmp_path / "out").rglob("*")) == []


def test_an_unknown_stem_is_refused_before_anything_is_made(separate, tmp_path, write_audio, noise):
    with pytest.raises(UnknownStemError):
        separate(write_audio("song.wav", noise(100)), stems=["piano"])
    assert not (tmp_path / "out").exists()


def test_a_track_without_extension_is_not_replaced_by_its_folder(tmp_path, make_spec, noise):
    path = tmp_path / "song"
    soundfile.write(path, noise(100), 44_100, format="WAV")
    served = ServedModel(make_spec(), "cpu", 1)
    with pytest.raises(OutputError) as caught:
        TrackJob(path, tmp_path / "song", served, TrackOptions())
    assert str(caught.value) == (f"The stems of '{path}' would replace it; choose another --out.")


def test_a_name_that_is_not_utf8_is_separated(separate, tmp_path, write_audio, noise):
    path = tmp_path / "caf\udce9.wav"
    write_audio("plain.wav", noise(100)).rename(path)
    assert len(separate(path).stems) == 2


@pytest.mark.parametrize("spec_changes", [{}, {"tail": "centred", "normalization": "track"}])
def test_shifts_are_averaged_and_taken_back(separate, make_spec, write_audio, noise, spec_changes):
    samples = noise(30_000)
    path = write_audio("song.wav", samples, subtype="FLOAT")
    spec = make_spec(chunk_samples=5000, **spec_changes)
    result = separate(path, spec, shifts=2, shift_seed=1)
    # Crossfading, averaging and normalizing are exact to float32's rounding.
    np.testing.assert_allclose(soundfile.read(result.stems["vocals"])[0], samples, atol=1e-6)
    chunks = result.metadata["chunks"]
    assert chunks["shifts"] == 2
    assert chunks["count"] > 2 * separate(path, spec).metadata["chunks"]["count"]


def test_a_track_of_which_nothing_is_left_is_not_separated_shifted_either(separate, write_audio):
    path = write_audio("song.wav", np.full((1, 2), 0.25), 96_000)
    with pytest.raises(EmptyAudioError, match="is too short"):
        separate(path, shifts=2)


def test_a_negative_number_of_shifts(separate, tmp_path, write_audio, noise):
    with pytest.raises(SpecError, match=r"shifts must be 0 or more, got -1\."):
        separate(write_audio("song.wav", noise(100)), shifts=-1)
    assert list((tmp_path / "out").rglob("*")) == []


def test_a_short_track_of_a_model_with_centred_chunks(separate, make_spec, write_audio, noise):
    samples = noise(777)
    path = write_audio("song.wav", samples, subtype="FLOAT")
    result = separate(path, make_spec(chunk_samples=5000, tail="centred"))
    np.testing.assert_allclose(soundfile.read(result.stems["vocals"])[0], samples, atol=1e-6)
    assert result.metadata["chunks"]["count"] == 1


def test_the_table_tells_the_chunks_length_at_the_models_rate(separate, write_audio, noise):
    result = separate(write_audio("song.wav", noise(8000), 8000))
    shown = io.StringIO()
    print_result(Console(file=shown, width=200), result, None)
    assert f" of {5000 / 44_100:.1f} s)" in shown.getvalue()
