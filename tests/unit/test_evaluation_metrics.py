"""Scores against what can be worked out by hand, and against museval."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.musdb import RATE, STEMS, leaky, mix, render_stems

from stemserve.evaluation.metrics import bss_eval, global_sdr, is_silent, si_sdr

HALF_DB = 20 * math.log10(2)  # the error of half the signal is half the signal


@pytest.fixture(scope="module")
def stereo(noise):
    return noise(RATE).T


@pytest.fixture(scope="module")
def two_sources(noise):
    """References and estimates [2, 2, frames] of 2.5 s, with 10 % of the other source."""
    references = np.stack([noise(RATE * 5 // 2, seed=seed).T for seed in (1, 2)])
    return references, references + np.float32(0.1) * references[::-1]


def museval_metrics():
    """museval's own module, found in another way than ours."""
    package = Path(importlib.util.find_spec("museval").origin).parent
    spec = importlib.util.spec_from_file_location("metrics_of_museval", package / "metrics.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- whole-track scores ---------------------------------------------------------------------


def test_half_of_the_reference(stereo):
    assert global_sdr(stereo, stereo / 2) == pytest.approx(HALF_DB, abs=1e-6)
    assert si_sdr(stereo, stereo / 2) == math.inf


@pytest.mark.parametrize("wanted_db", [-10.0, 0.0, 12.5, 40.0])
def test_noise_at_a_known_level(stereo, noise, wanted_db):
    error = noise(RATE, seed=5).T.astype(np.float64)
    error -= stereo * (np.vdot(stereo, error) / np.vdot(stereo, stereo))  # orthogonal
    error *= np.sqrt(np.vdot(stereo, stereo) / np.vdot(error, error)) * 10 ** (-wanted_db / 20)
    estimate = (stereo + error).astype(np.float32)
    # float32 samples are exact to about 150 dB.
    assert global_sdr(stereo, estimate) == pytest.approx(wanted_db, abs=1e-3)
    assert si_sdr(stereo, estimate) == pytest.approx(wanted_db, abs=1e-3)
    assert si_sdr(stereo, -3 * estimate) == pytest.approx(wanted_db, abs=1e-3)


def test_one_scale_for_both_channels():
    """An estimate with unequal sides is no scaled copy: e = (s, s/2) against (s, s)."""
    side = np.array([1.0, -1.0, 1.0, 1.0], np.float32)
    reference, estimate = np.stack([side, side]), np.stack([side, side / 2])
    # a = 3/4; target 2 * 9/16, rest 2 * 1/16 (in units of |side|^2).
    assert si_sdr(reference, estimate) == pytest.approx(10 * math.log10(9), abs=1e-9)
    assert global_sdr(reference, estimate) == pytest.approx(10 * math.log10(8), abs=1e-6)


def test_the_challenges_delta():
    """1e-7 is added to both energies: a perfect estimate has a finite score."""
    reference = np.full((1, 100), 0.1, np.float32)
    assert global_sdr(reference, reference) == pytest.approx(10 * math.log10(1e7 + 1), abs=1e-6)


def test_sums_over_many_blocks(noise):
    """Longer than one block, with a block that differs."""
    reference = noise((1 << 20) * 2 + 77, channels=1).T
    estimate = reference.copy()
    estimate[0, -77:] = 0
    error = np.sum(reference[0, -77:].astype(np.float64) ** 2)
    signal = np.sum(reference.astype(np.float64) ** 2)
    assert global_sdr(reference, estimate) == pytest.approx(10 * math.log10(signal / error), 1e-6)
    scale = (signal - error) / signal
    wanted = 10 * math.log10(scale**2 * signal / ((signal - error) - scale**2 * signal))
    assert si_sdr(reference, estimate) == pytest.approx(wanted, rel=1e-6)


def test_silence(stereo):
    silence = np.zeros_like(stereo)
    assert math.isnan(global_sdr(silence, stereo))
    assert math.isnan(si_sdr(silence, stereo))
    assert math.isnan(si_sdr(stereo, silence))
    assert global_sdr(stereo, silence) == pytest.approx(0, abs=1e-6)
    assert is_silent(silence)
    assert not is_silent(stereo)


def test_an_orthogonal_estimate():
    reference = np.array([[1, 0]], np.float32)
    assert si_sdr(reference, reference[:, ::-1]) == -math.inf


@pytest.mark.parametrize("score", [global_sdr, si_sdr])
def test_shapes_must_agree(stereo, score):
    with pytest.raises(ValueError, match="differ"):
        score(stereo, stereo[:1])


# --- BSS Eval -------------------------------------------------------------------------------


def test_bss_eval_of_leaking_sources(two_sources):
    """10 % of an equally loud, unrelated source: 20 dB of interference, and no artifacts."""
    sdr, sir, sar = bss_eval(*two_sources, RATE)
    np.testing.assert_allclose(sdr, 20, atol=0.3)
    np.testing.assert_allclose(sir, 20, atol=0.3)
    assert (sar > 60).all()


def test_bss_eval_of_half_the_reference(two_sources):
    sdr, sir, _sar = bss_eval(two_sources[0], two_sources[0] / 2, RATE)
    np.testing.assert_allclose(sdr, HALF_DB, atol=1e-3)
    assert (sir > 100).all()


def test_bss_eval_of_noise(two_sources, noise):
    """Noise that no source explains is an artifact."""
    references = two_sources[0]
    extra = np.stack([noise(references.shape[2], seed=seed).T for seed in (7, 8)])
    sdr, sir, sar = bss_eval(references, references + np.float32(0.1) * extra, RATE)
    np.testing.assert_allclose(sdr, 20, atol=0.3)
    np.testing.assert_allclose(sar, 20, atol=0.3)
    assert (sir > 30).all()


def test_sources_with_equal_sides(two_sources):
    """Mono in stereo files is common in MUSDB and leaves museval's equations without a unique
    solution; the scores are those of mono."""
    mono = [array[:, :1] for array in two_sources]
    both = [np.repeat(array, 2, axis=1) for array in mono]
    np.testing.assert_allclose(bss_eval(*both, RATE)[:2], bss_eval(*mono, RATE)[:2], atol=1e-3)


def test_agreement_with_museval():
    """The same numbers as museval's own call in double precision, medians over its frames."""
    stems = render_stems(3.2, seed=1)
    chosen = {"vocals": stems["vocals"], "rest": mix(stems) - stems["vocals"]}
    estimates = leaky(chosen)
    references = np.stack(list(chosen.values()))
    sdr, _isr, sir, sar, _order = museval_metrics().bss_eval(
        references.astype(np.float64),
        np.stack(list(estimates.values())).astype(np.float64),
        window=RATE,
        hop=RATE,
        compute_permutation=False,
        framewise_filters=False,
        bsseval_sources_version=False,
    )
    assert sdr.shape == (2, 3)  # frames whose mean is not their median
    ours = bss_eval(
        references.transpose(0, 2, 1), np.stack([e.T for e in estimates.values()]), RATE
    )
    np.testing.assert_allclose(ours, np.median([sdr, sir, sar], axis=2), atol=1e-6)


def test_frames_with_a_silent_source_do_not_count(two_sources):
    """The second of two frames is silent in one reference: the scores are the first's."""
    references, estimates = (array[:, :, : 2 * RATE].copy() for array in two_sources)
    references[0, :, RATE:] = 0
    estimates[1, :, RATE:] *= 3  # ruins what is not counted
    medians = bss_eval(references, estimates, RATE)
    assert np.isfinite(medians).all()
    estimates[0, :, :RATE] = 0  # now the first is silent, too, if only in an estimate
    assert np.isnan(bss_eval(references, estimates, RATE)).all()


def test_museval_is_read_without_ffmpeg():
    """`import museval` wants programs that the metrics don't need."""
    code = (
        "import sys, numpy as np\n"
        "from stemserve.evaluation.metrics import bss_eval\n"
        "x = np.random.default_rng(0).normal(size=(2, 1, 9000)).astype(np.float32)\n"
        "bss_eval(x, x[::-1] + x, 8000)\n"
        "print({'musdb', 'stempeg', 'pandas', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PATH": ""}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "set()\n", done.stderr


def test_rendered_stems_sound_all_the_time():
    """The data set of these tests is one on which every second counts."""
    for samples in render_stems(3.0).values():
        assert samples.shape == (3 * RATE, 2)
        for second in np.split(samples, 3):
            assert np.abs(second).max() > 0.01
    assert tuple(render_stems(0.1)) == STEMS
