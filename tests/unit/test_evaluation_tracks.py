"""Tracks of a data set, which stems are scored, and the scores of one track."""

import math

import numpy as np
import pytest
import soundfile
from support.musdb import RATE, leaky, mix, render_stems, write_signals, write_track

from stemserve.errors import (
    EvaluationDataError,
    NonFiniteAudioError,
    NotAudioError,
    TruncatedAudioError,
)
from stemserve.evaluation.dataset import find_tracks, read_audio
from stemserve.evaluation.metrics import METRICS, global_sdr, si_sdr
from stemserve.evaluation.run import FolderEstimator, plan_tracks, unscored_notes
from stemserve.evaluation.scoring import ScoringTask, bss_groups, plan_stems, score_track

CHEAP = ("global_sdr", "si_sdr")


@pytest.fixture(scope="module")
def stems():
    return render_stems(1.2)


def score(track, estimates, metrics=CHEAP):
    plan = plan_stems(tuple(track.references), tuple(estimates))
    return score_track(ScoringTask(track, plan, estimates, metrics))


def written(folder, signals):
    write_signals(folder, signals)
    return {name: folder / f"{name}.wav" for name in signals}


# --- the layout -----------------------------------------------------------------------------


def test_tracks_with_and_without_subsets(tmp_path, stems):
    for place in ("test/B", "test/A", "train/C", "D"):
        write_track(tmp_path / place, stems)
    (tmp_path / "notes").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "readme.txt").write_text("MUSDB")
    tracks = find_tracks(tmp_path)
    assert [track.key for track in tracks] == ["D", "test/A", "test/B", "train/C"]
    assert [track.subset for track in tracks] == ["", "test", "test", "train"]
    assert [track.key for track in find_tracks(tmp_path, "test")] == ["test/A", "test/B"]
    track = tracks[0]
    assert sorted(track.references) == ["bass", "drums", "other", "vocals"]
    assert (track.sample_rate, track.frames, track.channels) == (RATE, 52920, 2)
    assert track.duration_s == pytest.approx(1.2)


def test_a_track_may_be_called_train(tmp_path, stems):
    write_track(tmp_path / "train", stems)
    assert [track.key for track in find_tracks(tmp_path)] == ["train"]


def test_names_of_all_kinds(tmp_path, stems):
    names = ["Sigur Rós – Ágætis", "夜に駆ける", "[bold]x & co."]
    for name in names:
        write_track(tmp_path / name, stems)
    write_track(tmp_path / "caf\udce9", stems)  # Latin-1 bytes on a UTF-8 system
    tracks = find_tracks(tmp_path)
    assert sorted(track.key for track in tracks) == sorted([*names, "caf\\xe9"])
    for track in tracks:
        assert score(track, track.references).scores["vocals"]["si_sdr"] == math.inf


def test_flac_is_read_as_well(tmp_path, stems):
    write_track(tmp_path / "A", stems)
    samples, rate = soundfile.read(tmp_path / "A/vocals.wav")
    soundfile.write(tmp_path / "A/vocals.flac", samples, rate, subtype="PCM_24")
    (tmp_path / "A/vocals.wav").unlink()
    (track,) = find_tracks(tmp_path)
    assert track.references["vocals"].name == "vocals.flac"


def test_what_is_no_data_set(tmp_path, stems):
    with pytest.raises(EvaluationDataError, match=r"nowhere' is not a folder; expected a data set"):
        find_tracks(tmp_path / "nowhere")
    with pytest.raises(EvaluationDataError, match=r"There is no track in .*mixture.wav"):
        find_tracks(tmp_path)
    write_track(tmp_path / "set/A", stems)
    with pytest.raises(EvaluationDataError, match=r"A' is a track itself; name .*set'"):
        find_tracks(tmp_path / "set/A")
    with pytest.raises(EvaluationDataError, match=r"There is no track in .*set/test'"):
        find_tracks(tmp_path / "set", "test")


def test_incomplete_tracks(tmp_path, stems):
    write_track(tmp_path / "a/X", stems)
    (tmp_path / "a/X/mixture.wav").unlink()
    with pytest.raises(EvaluationDataError, match=r"has stems \(bass, drums.*no mixture.wav"):
        find_tracks(tmp_path / "a")
    write_signals(tmp_path / "b/X", {"mixture": mix(stems)})
    with pytest.raises(EvaluationDataError, match="has a mixture and no reference stem"):
        find_tracks(tmp_path / "b")


def test_files_that_do_not_fit_together(tmp_path, stems):
    write_track(tmp_path / "A", stems)
    write_signals(tmp_path / "A", {"bass": stems["bass"]}, rate=48000)
    with pytest.raises(
        EvaluationDataError, match=r"bass.wav' has a sample rate of 48000 Hz.*44100"
    ):
        find_tracks(tmp_path)
    write_signals(tmp_path / "A", {"bass": stems["bass"][:-1]})
    with pytest.raises(EvaluationDataError, match=r"bass.wav' is 52919 samples long.* 52920"):
        find_tracks(tmp_path)
    (tmp_path / "A/bass.wav").write_bytes(b"not a song" * 99)
    with pytest.raises(NotAudioError):
        find_tracks(tmp_path)


def test_a_truncated_reference(tmp_path, stems):
    write_track(tmp_path / "A", stems)
    path = tmp_path / "A/bass.wav"
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(TruncatedAudioError, match="bass"):
        find_tracks(tmp_path)


# --- estimates in a folder ------------------------------------------------------------------


def test_estimates_are_found_with_and_without_the_subset(tmp_path, stems):
    write_track(tmp_path / "set/test/A", stems)
    write_track(tmp_path / "set/test/B", stems)
    write_signals(tmp_path / "out/test/A", {"vocals": stems["vocals"]})
    write_signals(tmp_path / "out/B", {"drums": stems["drums"], "mixture": mix(stems)})
    tracks = find_tracks(tmp_path / "set")
    estimator = FolderEstimator(tmp_path / "out", tracks)
    assert [estimator.stems(track) for track in tracks] == [("vocals",), ("drums",)]


def test_estimates_that_do_not_fit(tmp_path, stems):
    write_track(tmp_path / "set/A", stems)
    tracks = find_tracks(tmp_path / "set")
    with pytest.raises(EvaluationDataError, match=r"no estimate of 'A'; expected '.*/A/<stem>.wav"):
        FolderEstimator(tmp_path / "out", tracks)
    write_signals(tmp_path / "out/A", {"vocals": stems["vocals"][1:]})
    with pytest.raises(EvaluationDataError, match=r"vocals.wav' is 52919 samples.*Cut or pad"):
        FolderEstimator(tmp_path / "out", tracks)
    write_signals(tmp_path / "out/A", {"vocals": stems["vocals"]}, rate=22050)
    with pytest.raises(EvaluationDataError, match="22050 Hz"):
        FolderEstimator(tmp_path / "out", tracks)


# --- which stems ----------------------------------------------------------------------------

FOUR = ("bass", "drums", "other", "vocals")


def test_four_stems():
    plan = plan_stems(FOUR, ("vocals", "drums", "bass", "other"))
    assert list(plan.references) == ["vocals", "drums", "bass", "other"]
    assert plan.unreferenced == plan.unestimated == ()
    assert bss_groups(list(plan.references), plan) == [["vocals", "drums", "bass", "other"]]


def test_an_accompaniment_is_everything_but_the_vocals():
    plan = plan_stems(FOUR, ("vocals", "accompaniment"))
    assert plan.references == {
        "vocals": ("vocals",),
        "accompaniment": ("bass", "drums", "other"),
    }
    assert plan.unestimated == ()
    assert bss_groups(list(plan.references), plan) == [["vocals", "accompaniment"]]


def test_an_accompaniment_that_is_a_file():
    plan = plan_stems(("accompaniment", "vocals"), ("vocals", "accompaniment"))
    assert plan.references["accompaniment"] == ("accompaniment",)
    assert bss_groups(list(plan.references), plan) == [["vocals", "accompaniment"]]


def test_an_accompaniment_beside_its_parts():
    plan = plan_stems(FOUR, ("vocals", "drums", "bass", "other", "accompaniment"))
    assert bss_groups(list(plan.references), plan) == [
        ["vocals", "drums", "bass", "other"],
        ["vocals", "accompaniment"],
    ]


def test_stems_of_one_side_only_are_told(tmp_path, stems):
    write_track(tmp_path / "set/A", stems)
    write_track(tmp_path / "set/B", {**stems, "piano": stems["bass"]})
    for name in "AB":
        write_signals(
            tmp_path / "out" / name,
            {"vocals": stems["vocals"], "guitar": stems["bass"], "piano": stems["bass"]},
        )
    tracks = find_tracks(tmp_path / "set")
    plans = plan_tracks(tracks, FolderEstimator(tmp_path / "out", tracks))
    assert list(plans["A"].references) == ["vocals"]
    assert list(plans["B"].references) == ["piano", "vocals"]
    assert unscored_notes(plans) == [
        "'guitar' has no reference and is not scored there.",
        "'piano' has no reference in 1 of 2 tracks and is not scored there.",
        "'bass' has a reference and no estimate and is not scored there.",
        "'drums' has a reference and no estimate and is not scored there.",
        "'other' has a reference and no estimate and is not scored there.",
    ]


def test_no_stem_in_common(tmp_path, stems):
    write_track(tmp_path / "set/A", {"vocals": stems["vocals"]})
    write_signals(tmp_path / "out/A", {"accompaniment": stems["bass"]})
    tracks = find_tracks(tmp_path / "set")
    with pytest.raises(EvaluationDataError, match="no stem in common"):
        plan_tracks(tracks, FolderEstimator(tmp_path / "out", tracks))


# --- the scores of a track ------------------------------------------------------------------


def test_all_scores_of_two_stems(tmp_path, stems):
    """Vocals and accompaniment: the accompaniment's reference is the sum of the others."""
    write_track(tmp_path / "set/A", stems)
    accompaniment = stems["drums"] + stems["bass"] + stems["other"]
    estimates = {"vocals": stems["vocals"] / 2, "accompaniment": accompaniment / 2}
    (track,) = find_tracks(tmp_path / "set")
    result = score(track, written(tmp_path / "out", estimates), METRICS)
    assert list(result.scores) == ["vocals", "accompaniment"]
    for scores in result.scores.values():
        assert list(scores) == list(METRICS)
        assert scores["sdr"] == pytest.approx(6.0206, abs=1e-3)
        assert scores["global_sdr"] == pytest.approx(6.0206, abs=1e-3)
        assert scores["sir"] > 80
        assert scores["si_sdr"] > 120
    assert result.notes == ()
    assert result.duration_s == pytest.approx(1.2)


def test_one_stem_is_scored_against_the_rest_of_the_mixture(tmp_path, stems):
    write_track(tmp_path / "set/A", stems)
    (track,) = find_tracks(tmp_path / "set")
    estimates = leaky({"vocals": stems["vocals"], "accompaniment": mix(stems) - stems["vocals"]})
    files = written(tmp_path / "out", estimates)
    alone = score(track, {"vocals": files["vocals"]}, METRICS).scores["vocals"]
    write_signals(tmp_path / "out", {"accompaniment": mix(stems) - estimates["vocals"]})
    both = score(track, files, METRICS).scores["vocals"]
    for metric in METRICS:
        assert alone[metric] == pytest.approx(both[metric], abs=1e-3)


def test_nothing_in_the_mixture_beside_the_stem(tmp_path, stems):
    write_track(tmp_path / "set/A", {"vocals": stems["vocals"]})
    (track,) = find_tracks(tmp_path / "set")
    result = score(track, written(tmp_path / "out", {"vocals": stems["vocals"] / 2}), METRICS)
    assert math.isnan(result.scores["vocals"]["sdr"])
    assert result.scores["vocals"]["global_sdr"] == pytest.approx(6.0206, abs=1e-3)
    assert "there is nothing in the mixture beside 'vocals'" in result.notes[0]


def test_silent_references_and_estimates(tmp_path, stems):
    silence = np.zeros_like(stems["bass"])
    write_track(tmp_path / "set/A", {**stems, "bass": silence})
    (track,) = find_tracks(tmp_path / "set")
    halves = {stem: samples / 2 for stem, samples in stems.items()}
    files = written(tmp_path / "out", {**halves, "drums": silence})
    result = score(track, files, METRICS)
    assert all(math.isnan(value) for value in result.scores["bass"].values())
    assert result.scores["drums"]["global_sdr"] == pytest.approx(0, abs=1e-6)
    assert math.isnan(result.scores["drums"]["sdr"])
    assert math.isnan(result.scores["drums"]["si_sdr"])
    for stem in ("vocals", "other"):
        assert result.scores[stem]["sdr"] == pytest.approx(6.0206, abs=1e-3)
    assert sorted(result.notes) == [
        "A: silent estimate of 'drums'; scores that say nothing then are left out.",
        "A: silent reference of 'bass'; scores that say nothing then are left out.",
    ]


def test_no_frame_in_which_all_sound(tmp_path, noise):
    first, second = noise(2 * RATE, seed=1), noise(2 * RATE, seed=2)
    first[RATE:] = 0
    second[:RATE] = 0
    signals = {"vocals": first, "other": second}
    write_track(tmp_path / "set/A", signals)
    (track,) = find_tracks(tmp_path / "set")
    result = score(track, track.references, METRICS)
    assert math.isnan(result.scores["vocals"]["sar"])
    assert result.notes == (
        "A: no second has sound in every stem of other, vocals; their SDR, SIR and SAR are "
        "left out.",
    )


def test_mono_references_are_scored_in_mono(tmp_path, stems):
    mono = {stem: samples[:, 0] for stem, samples in stems.items()}
    write_signals(tmp_path / "set/A", {"mixture": sum(mono.values()), **mono})
    (track,) = find_tracks(tmp_path / "set")
    assert track.channels == 1
    # What a model gives back for mono is stereo; a difference between its sides cancels.
    side = 0.01 * mono["bass"]
    estimates = {
        stem: np.stack([0.9 * samples + side, 0.9 * samples - side], axis=1)
        for stem, samples in mono.items()
    }
    files = written(tmp_path / "out", estimates)
    for stem, scores in score(track, files).scores.items():
        expected = global_sdr(mono[stem][None], np.float32(0.9) * mono[stem][None])
        assert scores["global_sdr"] == pytest.approx(expected, abs=1e-3)
    two = {stem: files[stem] for stem in ("vocals", "other")}
    assert score(track, two, METRICS).scores["vocals"]["sdr"] == pytest.approx(20, abs=1e-2)


def test_a_mono_reference_among_stereo_ones(tmp_path, stems):
    write_signals(
        tmp_path / "set/A", {"mixture": mix(stems), **stems, "vocals": stems["bass"][:, 0]}
    )
    (track,) = find_tracks(tmp_path / "set")
    assert track.channels == 2
    vocals = read_audio(track.references["vocals"], 2)
    np.testing.assert_array_equal(vocals, np.stack([stems["bass"][:, 0]] * 2))
    files = written(tmp_path / "out", {"vocals": stems["bass"]})
    wanted = si_sdr(vocals, stems["bass"].T)
    assert score(track, files).scores["vocals"]["si_sdr"] == pytest.approx(wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path, stems, bad):
    write_track(tmp_path / "set/A", stems)
    (track,) = find_tracks(tmp_path / "set")
    vocals = stems["vocals"].copy()
    vocals[30_000, 1] = bad
    files = written(tmp_path / "out", {"vocals": vocals})
    with pytest.raises(NonFiniteAudioError, match=r"out/vocals.wav' has a NaN or infinite sample"):
        score(track, files)
