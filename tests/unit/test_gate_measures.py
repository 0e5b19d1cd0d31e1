"""The gate's numbers, its limits, its audio, and the records that it leaves."""

import json
import math

import numpy as np
import pytest

from stemserve_export.catalog import load_catalog
from stemserve_export.exporter import model_spec
from stemserve_export.gate.figures import Figures, Verification
from stemserve_export.gate.material import rendered
from stemserve_export.gate.measures import (
    capped_db,
    max_abs_error,
    seam_energy_db,
    seam_positions,
    seam_step,
    snr_db,
    sum_error_db,
)
from stemserve_export.gate.signals import odd_inputs, rendered_song
from stemserve_export.gate.thresholds import (
    SNR_DB,
    Limit,
    snr_limit,
    thresholds_for,
    with_other_runtime,
)

SIGNAL = np.array([[3.0, 4.0]], np.float32)


def test_snr_db():
    assert snr_db(SIGNAL, SIGNAL) == math.inf
    assert snr_db(SIGNAL, SIGNAL * np.float32(0.5)) == pytest.approx(6.0206, abs=1e-3)
    assert snr_db(SIGNAL, -SIGNAL) == pytest.approx(-6.0206, abs=1e-3)
    assert snr_db(SIGNAL * 0, SIGNAL) == -math.inf
    assert not snr_db(SIGNAL, SIGNAL * np.nan) >= 0
    assert snr_db(SIGNAL, np.full_like(SIGNAL, np.inf)) == -math.inf


def test_a_quiet_signal_is_measured_against_a_floor():
    quiet = SIGNAL * np.float32(1e-3)
    noise = np.array([[1e-3, 0.0]], np.float32)
    assert snr_db(quiet, quiet + noise) == pytest.approx(13.98, abs=0.01)
    assert snr_db(quiet, quiet + noise, floor=25e-4) == pytest.approx(33.98, abs=0.01)
    assert snr_db(SIGNAL, SIGNAL / 2, floor=1.0) == snr_db(SIGNAL, SIGNAL / 2)


def test_largest_error():
    assert max_abs_error(SIGNAL, np.array([[3.5, 3.0]], np.float32)) == 1.0
    assert math.isnan(max_abs_error(SIGNAL, SIGNAL * np.nan))


def test_sum_of_stems():
    assert sum_error_db(SIGNAL, [SIGNAL / 2, SIGNAL / 2]) == math.inf
    assert sum_error_db(SIGNAL, [SIGNAL / 2, SIGNAL / 4]) == pytest.approx(12.04, abs=0.01)


@pytest.mark.parametrize(("value", "kept"), [(math.inf, 999), (-math.inf, -999), (math.nan, -999)])
def test_what_json_cannot_hold_is_capped(value, kept):
    assert capped_db(value) == kept


def test_seam_positions():
    assert seam_positions([0, 75, 150], 100, 0, 220) == [75, 100, 150, 175]
    assert seam_positions([-20, 70], 100, 10, 150) == [70, 80]
    assert seam_positions([0], 100, 0, 60) == []


@pytest.fixture
def tone():
    return np.sin(np.arange(8000) * 0.05)[np.newaxis].astype(np.float32)


def test_a_jump_at_a_seam(tone):
    assert seam_step(tone, [4000], 500) < 1.5
    jumping = tone.copy()
    jumping[:, 4000:] += 0.5
    assert seam_step(jumping, [4000], 500) > 8
    assert seam_step(jumping, [3000], 500) < 1.5
    assert seam_step(np.zeros_like(tone), [4000], 500) == 0


def test_a_jump_at_the_second_seam_in_one_channel(tone):
    stereo = np.concatenate([tone, tone])
    stereo[1, 6000:] -= 0.5
    assert seam_step(stereo, [2000, 6000], 500) > 8


def test_a_dip_at_a_seam(tone):
    half = tone / 2
    assert seam_energy_db(tone, [half, half], [4000], 200) == pytest.approx(0, abs=1e-6)
    dipped = half.copy()
    dipped[:, 3900:4100] *= 0.5
    assert seam_energy_db(tone, [half, dipped], [4000], 200) > 60
    # A weak model lacks something everywhere; the dip stands out from that.
    weak = tone * np.float32(0.9)
    weak[:, 3900:4100] = 0
    assert seam_energy_db(tone, [weak], [4000], 100) == pytest.approx(20, abs=0.2)
    assert seam_energy_db(tone, [half * 0.9, half * 0.9], [4000], 200) == pytest.approx(0, abs=0.2)
    assert math.isnan(seam_energy_db(tone, [half * np.nan, half], [4000], 200))


# --- limits -----------------------------------------------------------------------------------


def test_every_family_of_the_catalogue_has_limits_with_a_reason():
    families = {entry.family for entry in load_catalog().values()}
    assert set(SNR_DB) == families
    for by_precision in SNR_DB.values():
        assert set(by_precision) == {"fp32", "fp16"}
        assert by_precision["fp16"].value <= by_precision["fp32"].value
        # A wrong constant, axis or padding leaves less.
        assert all(limit.value >= 40 and limit.reason for limit in by_precision.values())


@pytest.mark.parametrize("name", load_catalog())
def test_every_model_of_the_catalogue_has_all_limits(name):
    limits = thresholds_for(model_spec(load_catalog()[name]))
    for field in (*limits.__dataclass_fields__,):
        limit = getattr(limits, field)
        assert limit is not None or field == "sum_db"
        assert limit is None or (limit.value > 0 and limit.reason)
    assert (limits.sum_db is not None) == name.startswith("spleeter")


def test_a_batch_is_held_to_more_than_a_family_with_much_rounding(make_spec):
    assert thresholds_for(make_spec(family="htdemucs")).batch_db.value == 100
    assert thresholds_for(make_spec(family="htdemucs", precision="fp16")).batch_db.value == 50


def test_a_family_without_a_row_is_held_to_a_strict_one(make_spec):
    assert snr_limit(make_spec(family="new")).value == 90


def test_half_precision_on_the_wire_is_held_to_what_it_can(make_spec):
    assert snr_limit(make_spec(family="spleeter", wire_dtype="fp16")).value == 55
    assert snr_limit(make_spec(family="spleeter")).value == 110


def test_a_gpu_is_held_to_less_and_never_to_more(make_spec):
    for family in SNR_DB:
        for precision in ("fp32", "fp16"):
            own = thresholds_for(make_spec(family=family, precision=precision))
            gpu = with_other_runtime(own)
            assert 40 <= gpu.snr_db.value <= own.snr_db.value
            assert gpu.batch_db.value <= own.batch_db.value
            assert gpu.peak_error.value >= own.peak_error.value
            assert gpu.silence_peak == own.silence_peak
    spleeter = make_spec(family="spleeter")
    assert with_other_runtime(thresholds_for(spleeter)).sum_db.value == 40


# --- audio ------------------------------------------------------------------------------------


def test_the_song_is_always_the_same_and_its_sources_sum_to_it():
    song = rendered_song(40_000, 44_100)
    rendered_song.cache_clear()
    again = rendered_song(40_000, 44_100)
    assert song.mixture.tobytes() == again.mixture.tobytes()
    assert song.mixture.shape == (2, 40_000)
    assert np.allclose(sum(song.sources.values()), song.mixture, atol=1e-6)
    assert np.abs(song.mixture).max() < 2
    assert all(np.abs(source[:, :4000]).max() > 0.01 for source in song.sources.values())


@pytest.mark.parametrize(
    "stems",
    [
        ("vocals", "accompaniment"),
        ("drums", "bass", "other", "vocals"),
        ("drums", "bass", "other", "vocals", "guitar", "piano"),
        ("vocals", "piano", "drums", "bass", "other"),
    ],
)
def test_the_references_of_a_models_stems_sum_to_the_mixture(stems):
    song = rendered_song(20_000, 44_100)
    references = [song.reference(stem, stems) for stem in stems]
    assert np.allclose(sum(references), song.mixture, atol=1e-6)


def test_the_reference_of_a_specialists_stem():
    song = rendered_song(20_000, 44_100)
    four = ("drums", "bass", "other", "vocals")
    assert np.array_equal(song.reference("other", ("other",)), song.reference("other", four))
    assert song.reference("kazoo", ("kazoo",)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"overlap": 0.25},
        {"overlap": 0.25, "tail": "centred"},
        {"overlap": 0.0, "edge_samples": 256, "lead_samples": 512},
        {"overlap": 0.25, "edge_samples": 128, "lead_samples": 128, "normalization": "track"},
    ],
)
def test_a_song_has_seams_and_a_short_last_chunk(make_spec, changes):
    spec = make_spec(chunk_samples=4096, sample_rate=8000, **changes)
    material = rendered(spec)
    assert len(material.chunks) == 3
    assert len(material.seams) >= 2
    # What does not change the chunks gives the song back.
    if not spec.edge_samples:
        joined = material.joined([[chunk] for chunk in material.chunks])
        assert snr_db(material.song.mixture, joined[0]) > 110


def test_a_long_chunk_makes_one_seam(make_spec):
    material = rendered(make_spec(chunk_samples=44_000, sample_rate=2000, overlap=0.25))
    assert len(material.chunks) == 2


def test_odd_inputs():
    inputs = dict(odd_inputs(2, 1000))
    assert list(inputs) == ["silence", "DC", "full-scale square", "impulse", "1e-6 noise"]
    assert all(chunk.shape == (1, 2, 1000) for chunk in inputs.values())
    assert all(chunk.dtype == np.float32 for chunk in inputs.values())
    assert not inputs["silence"].any()
    assert np.count_nonzero(inputs["impulse"]) == 2
    assert set(np.unique(inputs["full-scale square"])) == {-1, 1}


# --- records ----------------------------------------------------------------------------------

LEAST = Limit(60, "because")


def report(*values, steps=("onnx",), sha256="a" * 64):
    figures = Figures()
    for step in steps:
        for value in values:
            figures.at_least(step, "SNR", "vocals", value, LEAST, "dB")
    return Verification(
        "toy", 1, sha256, {}, {"torch": "2"}, "2026-01-01T00:00:00+00:00", 1.23, figures.found
    )


def test_a_figure_that_misses_its_limit_fails_the_report():
    assert report(60.0, 61.0).passed
    failed = report(61.0, 59.9)
    assert not failed.passed
    assert failed.failures == ["onnx SNR vocals: 59.9 dB; expected at least 60 dB"]
    assert not report(math.nan).passed
    assert not report(-math.inf).passed
    assert not report().passed  # nothing was held to anything


def test_a_value_that_must_not_be_above():
    figures = Figures()
    for value in (0.5, 1.0, 1.1, math.nan, math.inf):
        figures.at_most("served", "step", "", value, Limit(1.0, "because"), "")
    assert [figure.passed for figure in figures.found] == [True, True, False, False, False]
    assert figures.found[3].sentence() == "served step: not finite; expected at most 1"


def test_what_is_only_reported_fails_nothing():
    figures = Figures()
    figures.at_least("torch", "SDR", "vocals", -3.0, None, "dB")
    figures.holds("onnx", "deterministic", "", True, "seen")
    assert [figure.passed for figure in figures.found] == [None, True]


def test_a_report_is_plain_json(tmp_path):
    path = report(math.inf, -math.inf, math.nan).write(tmp_path)
    record = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert [figure["value"] for figure in record["figures"]] == [999, -999, -999]
    assert record["figures"][0]["reason"] == "because"
    assert [file.name for file in tmp_path.iterdir()] == ["verification.json"]


def test_a_quick_run_does_not_replace_a_full_report_unless_it_fails(tmp_path):
    def kept():
        return json.loads((tmp_path / "verification.json").read_text())

    report(70.0, steps=("onnx", "served")).write(tmp_path)
    report(71.0).write(tmp_path)
    assert kept()["steps"] == ["onnx", "served"]
    report(50.0).write(tmp_path)
    assert not kept()["passed"]
    report(70.0, steps=("onnx", "served")).write(tmp_path)
    report(71.0, sha256="b" * 64).write(tmp_path)  # of another graph
    assert kept()["steps"] == ["onnx"]


def test_a_song_is_normalized_as_the_client_does_it(make_spec):
    """Source: demucs/separate.py: mean and unbiased deviation of the mono mix."""
    spec = make_spec(chunk_samples=4096, sample_rate=8000, normalization="track", overlap=0.0)
    material = rendered(spec)
    mono = material.song.mixture.mean(axis=0)
    first = (material.song.mixture[:, :4096] - mono.mean()) / (mono.std(ddof=1) + 1e-8)
    assert np.allclose(material.chunks[0][0], first, atol=1e-5)
