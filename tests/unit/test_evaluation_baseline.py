"""Results as JSON, and the comparison with an earlier one."""

import json
import math
from pathlib import Path

import pytest

from stemserve.errors import EvaluationDataError, OutputNotWritableError, RegressionError
from stemserve.evaluation.baseline import check_regressions, compare
from stemserve.evaluation.results import Evaluation, load_evaluation, save_json

PATH = Path("baseline.json")
NAN, INF = math.nan, math.inf


def evaluation(scores, metrics=("sdr",), **changes):
    """Scores: by track, stem and metric, or by track and stem a number for `sdr`."""
    full = {
        track: {
            stem: value if isinstance(value, dict) else {"sdr": value}
            for stem, value in stems.items()
        }
        for track, stems in scores.items()
    }
    fields = {
        "source": {"model": "m", "version": 1},
        "settings": {"window_s": 1.0, "museval": "0.4.1"},
        "metrics": metrics,
        "stems": tuple({stem: None for stems in scores.values() for stem in stems}),
        "scores": full,
        "durations_s": dict.fromkeys(scores, 10.0),
    }
    return Evaluation(**{**fields, **changes})


def one(value):
    return evaluation({"A": {"vocals": value}})


def change(now, before, tolerance=0.1):
    (found,) = compare(one(now), one(before), {"sdr": tolerance}, PATH)
    return found


# --- medians and JSON -----------------------------------------------------------------------


def test_medians_leave_out_what_was_not_measured():
    found = evaluation(
        {k: {"vocals": v} for k, v in zip("ABCD", (1.0, NAN, 5.0, 2.0), strict=True)}
    )
    assert found.median("vocals", "sdr") == 2.0
    assert found.mean("vocals", "sdr") == pytest.approx(8 / 3)
    assert len(found.values("vocals", "sdr")) == 3
    assert math.isnan(one(NAN).median("vocals", "sdr"))
    assert math.isnan(one(NAN).mean("vocals", "sdr"))


def test_a_stem_that_some_tracks_lack():
    found = evaluation({"A": {"vocals": 1.0, "piano": 7.0}, "B": {"vocals": 2.0}})
    assert found.values("piano", "sdr") == [7.0]


def test_json_and_back(tmp_path):
    before = evaluation(
        {"test/Ä": {"vocals": {"sdr": 1.25, "si_sdr": INF}, "bass": {"sdr": NAN, "si_sdr": -INF}}},
        metrics=("sdr", "si_sdr"),
        notes=("a note",),
    )
    path = tmp_path / "new folder" / "baseline.json"
    save_json(path, before.to_json())
    data = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert data["summary"]["vocals"]["sdr"] == {"median": 1.25, "mean": 1.25, "tracks": 1}
    assert data["summary"]["bass"]["sdr"] == {"median": None, "mean": None, "tracks": 0}
    assert data["tracks"]["test/Ä"]["scores"]["vocals"]["si_sdr"] == "inf"
    assert load_evaluation(path).to_json() == before.to_json()
    assert [entry.name for entry in path.parent.iterdir()] == ["baseline.json"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "it is no JSON"),
        ("[]", 'expected the field "format" to be 1'),
        ('{"format": 2}', 'expected the field "format" to be 1'),
        ('{"format": 1}', "KeyError: 'source'"),
        ("\xff", "it is no JSON"),
    ],
)
def test_a_file_that_is_no_baseline(tmp_path, text, why):
    path = tmp_path / "b.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(EvaluationDataError) as error:
        load_evaluation(path)
    assert f"is not a baseline that this version of stemserve reads ({why})" in str(error.value)


def test_no_baseline(tmp_path):
    with pytest.raises(EvaluationDataError, match=r"There is no baseline .* with --save-baseline"):
        load_evaluation(tmp_path / "b.json")
    with pytest.raises(EvaluationDataError, match="cannot be read"):
        load_evaluation(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputNotWritableError, match="cannot be written"):
        save_json(tmp_path / "file" / "b.json", {})
    (tmp_path / "b.json").mkdir()
    with pytest.raises(OutputNotWritableError):
        save_json(tmp_path / "b.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "file"]


# --- comparison -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "before", "tolerance", "regressed"),
    [
        (5.0, 5.0, 0.0, False),
        (4.99, 5.0, 0.0, True),
        (4.9, 5.0, 0.1, False),  # exactly the tolerance
        (4.899, 5.0, 0.1, True),
        (6.0, 5.0, 0.0, False),
        (-3.2, -3.0, 0.1, True),
        (INF, INF, 0.0, False),
        (290.0, INF, 0.0, False),  # both are beyond what float32 samples can tell
        (250.0, 300.0, 0.0, False),
        (119.0, INF, 0.1, True),
        (INF, 5.0, 0.0, False),
        (-INF, 5.0, 0.1, True),
        (NAN, 5.0, 0.1, True),  # cannot be measured any more
        (5.0, NAN, 0.1, False),
        (NAN, NAN, 0.1, False),
    ],
)
def test_what_is_a_regression(now, before, tolerance, regressed):
    assert change(now, before, tolerance).regressed is regressed


def test_the_tolerance_is_the_default_where_none_is_given():
    (found,) = compare(one(4.95), one(5.0), {}, PATH)
    assert not found.regressed
    (found,) = compare(one(4.85), one(5.0), {}, PATH)
    assert found.regressed


def test_the_sentence_names_everything_that_fell():
    before = evaluation({"A": {"vocals": 5.0, "bass": 3.0}, "B": {"vocals": 6.0, "bass": 3.5}})
    now = evaluation({"A": {"vocals": 4.0, "bass": NAN}, "B": {"vocals": 6.0, "bass": 9.0}})
    changes = compare(now, before, {"sdr": 0.25}, PATH)
    with pytest.raises(RegressionError) as error:
        check_regressions(changes, PATH)
    assert str(error.value) == (
        "Worse than the baseline 'baseline.json' by more than the tolerance, in dB: 'vocals' "
        "(SDR 5.50 to 5.00); 'bass' (SDR measured on 2 tracks then and 1 now). Find out why or, if "
        "it is meant to be so, save a new baseline."
    )
    assert error.value.exit_code == 70
    check_regressions(compare(before, before, {"sdr": 0.0}, PATH), PATH)


def test_a_stem_that_is_gone_and_one_that_is_new():
    before = evaluation({"A": {"vocals": 5.0, "bass": 3.0}})
    now = evaluation({"A": {"vocals": 5.0, "drums": 1.0}})
    changes = {found.stem: found for found in compare(now, before, {}, PATH)}
    assert set(changes) == {"vocals", "bass"}
    assert changes["bass"].regressed
    assert not changes["vocals"].regressed


def test_only_common_metrics_are_compared():
    before = evaluation({"A": {"v": {"sdr": 5.0, "sir": 9.0}}}, metrics=("sdr", "sir"))
    now = evaluation({"A": {"v": {"sdr": 5.0, "si_sdr": 1.0}}}, metrics=("sdr", "si_sdr"))
    assert [found.metric for found in compare(now, before, {}, PATH)] == ["sdr"]


def test_other_tracks():
    before = evaluation({name: {"v": 1.0} for name in ("A", "B")})
    now = evaluation({name: {"v": 1.0} for name in "ACDEFGHI"})
    with pytest.raises(EvaluationDataError) as error:
        compare(now, before, {}, PATH)
    assert "'B' of the baseline missing now" in str(error.value)
    assert "'C', 'D', 'E', 'F', 'G' and 2 more missing in the baseline" in str(error.value)


def test_a_new_track_is_no_regression_and_no_comparison():
    now = evaluation({name: {"vocals": 5.0} for name in "AB"})
    with pytest.raises(EvaluationDataError, match=r"other tracks \('B' missing in the baseline\)"):
        compare(now, one(5.0), {}, PATH)


def test_other_audio_under_the_same_name():
    longer = evaluation({"A": {"vocals": 5.0}}, durations_s={"A": 10.5})
    with pytest.raises(EvaluationDataError, match="'A' had another length"):
        compare(longer, one(5.0), {}, PATH)


def test_another_museval():
    other = evaluation({"A": {"vocals": 5.0}}, settings={"window_s": 1.0, "museval": "9"})
    with pytest.raises(EvaluationDataError, match=r"with museval 0.4.1 and this is 9"):
        compare(other, one(5.0), {}, PATH)
