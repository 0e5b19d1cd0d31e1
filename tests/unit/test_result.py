import math

import pytest

from stemserve.audio import InputProperties
from stemserve.result import LatencyLog, as_dicts, input_warnings, output_warnings
from stemserve.stem_files import StemProperties
from stemserve.triton import ServerTimes


@pytest.fixture
def input_of():
    """Properties of an ordinary input; keywords replace them."""

    def make(**changes):
        fields = {"sample_rate": 44_100, "channels": 2, "frames": 44_100, "peak": 0.5}
        return InputProperties("song.wav", **{**fields, **changes})

    return make


def stem(peak=0.5, rms_db=-20.0, clipped=0):
    return StemProperties("stem.wav", peak, rms_db, clipped)


# --- latency --------------------------------------------------------------------------------


def test_percentiles_of_the_round_trip():
    log = LatencyLog([n / 1000 for n in range(101)])
    assert log.summary_ms() == {
        "round_trip": {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "mean": 50, "max": 100}
    }


def test_percentiles_do_not_depend_on_the_order():
    assert LatencyLog([0.3, 0.1, 0.2]).summary_ms()["round_trip"]["p50"] == 200


def test_the_split_is_of_means_and_adds_up():
    log = LatencyLog([0.1, 0.3], ServerTimes(4, queue_ns=80_000_000, compute_ns=400_000_000))
    summary = log.summary_ms()
    assert summary["queue"] == {"mean": 20}
    assert summary["compute"] == {"mean": 100}
    assert summary["network"] == {"mean": 80}
    assert summary["server_requests"] == 4


def test_the_network_takes_no_negative_time():
    """Other callers' requests may have taken longer than ours."""
    log = LatencyLog([0.01], ServerTimes(2, 0, 400_000_000))
    assert log.summary_ms()["network"] == {"mean": 0}


@pytest.mark.parametrize("server", [None, ServerTimes(0, 0, 0)])
def test_a_server_that_does_not_tell_gives_no_split(server):
    assert set(LatencyLog([0.1], server).summary_ms()) == {"round_trip"}


# --- warnings of the input ------------------------------------------------------------------


def codes(warnings):
    return [warning.code for warning in warnings]


def test_an_ordinary_input_raises_no_warning(input_of, make_spec):
    assert input_warnings(input_of(), make_spec()) == []


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (48_000, "The input has 48000 Hz and was resampled to the model's 44100 Hz."),
        (22_050, "The input has 22050 Hz and was resampled to the model's 44100 Hz."),
        (
            8_000,
            "The input has 8000 Hz and was resampled to the model's 44100 Hz; there is nothing "
            "above 4000 Hz in it.",
        ),
    ],
)
def test_resampled(input_of, make_spec, rate, message):
    [warning] = input_warnings(input_of(sample_rate=rate, frames=rate), make_spec())
    assert (warning.code, warning.message, warning.value) == ("resampled", message, rate)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (1, "The input has 1 channel(s) and was copied to both channels."),
        (6, "The input has 6 channel(s) and was mixed down to stereo."),
    ],
)
def test_channels_converted(input_of, make_spec, channels, message):
    [warning] = input_warnings(input_of(channels=channels), make_spec())
    assert (warning.code, warning.message) == ("channels_converted", message)


def test_short_file(input_of, make_spec):
    assert input_warnings(input_of(frames=44_100), make_spec()) == []
    [warning] = input_warnings(input_of(frames=44_099), make_spec())
    assert warning.code == "short_file"
    assert warning.message == (
        "The input is 1.000 s long; models need about a second of context to separate well."
    )
    [warning] = input_warnings(input_of(frames=1), make_spec())
    assert warning.value == pytest.approx(1 / 44_100)


def test_silent_input(input_of, make_spec):
    assert input_warnings(input_of(peak=1.01e-4), make_spec()) == []
    for peak in (0.99e-4, 0.0):
        [warning] = input_warnings(input_of(peak=peak), make_spec())
        assert (warning.code, warning.value) == ("silent_input", peak)
        assert warning.message == ("The input is silent (peak below -80 dBFS); so are its stems.")


def test_one_input_may_raise_several(input_of, make_spec):
    bad = input_of(sample_rate=8000, channels=1, frames=10, peak=0.0)
    found = codes(input_warnings(bad, make_spec()))
    assert found == ["resampled", "channels_converted", "short_file", "silent_input"]


# --- warnings of the stems ------------------------------------------------------------------


def test_ordinary_stems_raise_no_warning():
    assert output_warnings({"vocals": stem(peak=1.0)}, -20.0, silent=False) == []


@pytest.mark.parametrize(
    ("clipped", "what"),
    [
        (0, "float files keep them; players and integer formats may clip. Use --normalize."),
        (7, "7 samples were cut off at full scale; use --normalize or --format wav."),
    ],
)
def test_clipping_risk(clipped, what):
    stems = {"vocals": stem(peak=0.2), "accompaniment": stem(peak=1.25, clipped=clipped)}
    [warning] = output_warnings(stems, -20.0, silent=False)
    assert warning.code == "clipping_risk"
    assert warning.message == f"Stems peak at 1.250 of full scale: {what}"
    assert warning.value == 1.25


def test_low_confidence():
    stems = {"vocals": stem(rms_db=-60.1), "accompaniment": stem(rms_db=-59.9)}
    [warning] = output_warnings(stems, -20.0, silent=False)
    assert warning.code == "low_confidence"
    assert warning.message == (
        "Almost nothing was found for 'vocals' (more than 40 dB below the mixture); the track "
        "may have none."
    )
    assert warning.value == pytest.approx(-40.1)


def test_a_stem_of_digital_silence_has_a_finite_value():
    """JSON has no infinity."""
    [warning] = output_warnings({"vocals": stem(rms_db=-math.inf)}, -20.0, silent=False)
    assert (warning.code, warning.value) == ("low_confidence", -200.0)


def test_a_silent_input_is_no_matter_of_confidence():
    assert output_warnings({"vocals": stem(rms_db=-math.inf)}, -math.inf, silent=True) == []


def test_warnings_as_metadata_holds_them(input_of, make_spec):
    [entry] = as_dicts(input_warnings(input_of(frames=100), make_spec()))
    assert entry == {
        "code": "short_file",
        "message": "The input is 0.002 s long; models need about a second of context to separate "
        "well.",
        "value": 0.0023,
    }
