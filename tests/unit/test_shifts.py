"""Averaging over time shifts: as ``demucs.apply.apply_model(shifts=N)``, in bounded memory."""

import random
import tracemalloc

import numpy as np
import pytest
import torch
from support.contextual import Contextual, blocks_of, random_track
from support.torchaudio_stub import ensure_torchaudio

from stemserve.errors import SpecError
from stemserve.overlap import ChunkPlan
from stemserve.shifts import MAX_SHIFT_S, Passes, shift_delays

ensure_torchaudio()
from demucs.apply import apply_model  # noqa: E402

RATE = 100  # of the toy model: shifts of up to 50 samples
CHUNK = 80
# Sums of a few float32 products of values around 1, in different orders.
MAX_ERROR = 5e-6


def identity(samples):
    return [samples.copy(), samples * np.float32(0.5)]


contextual = Contextual(CHUNK, RATE).stems_of


def separate(model, blocks, plan, delays):
    """Send a track through a model; returns [stems, channels, samples] and the passes' chunks."""
    passes = Passes(blocks, plan, delays, 2, 2)
    joined = []
    for samples, track_samples in passes.chunks():
        joined.append(passes.add(model(samples), track_samples))
    stems = zip(*joined, strict=True)
    return np.stack([np.concatenate(parts, axis=1) for parts in stems]), len(joined)


def centred(overlap=0.25):
    return ChunkPlan(CHUNK, int((1 - overlap) * CHUNK), 0, 0, overlap > 0, centred=True)


# --- delays ---------------------------------------------------------------------------------


def test_delays_lie_within_half_a_second():
    delays = shift_delays(2000, 44_100, seed=0)
    assert len(delays) == 2000
    assert min(delays) >= 0
    assert max(delays) <= 22_050 == MAX_SHIFT_S * 44_100
    assert max(delays) - min(delays) > 21_000  # and use all of it
    assert shift_delays(1, 1, seed=0) == (0,)


def test_the_same_seed_gives_the_same_delays():
    delays = shift_delays(5, 44_100, seed=7)
    state = random.getstate()
    assert shift_delays(5, 44_100, seed=7) == delays
    assert shift_delays(3, 44_100, seed=7) == delays[:3]  # more shifts add to those there are
    assert shift_delays(5, 44_100, seed=8) != delays
    assert random.getstate() == state  # of the caller's own generator nothing is used


def test_no_shifts_is_one_pass_without_delay():
    assert shift_delays(0, 44_100, seed=3) == (0,)


@pytest.mark.parametrize("shifts", [-1, -10])
def test_a_negative_number_of_shifts(shifts):
    with pytest.raises(SpecError) as caught:
        shift_delays(shifts, 44_100, seed=0)
    assert str(caught.value) == f"shifts must be 0 or more, got {shifts}."


# --- the average ----------------------------------------------------------------------------


@pytest.mark.parametrize("shifts", [1, 2, 3])
@pytest.mark.parametrize("overlap", [0.25, 0.6])
def test_the_average_is_what_demucs_gives(shifts, overlap):
    model, plan = Contextual(CHUNK, RATE), centred(overlap)
    for length in (1, 49, 50, 51, 60, 79, 80, 81, 120, 199, 333):
        track = random_track(length)
        random.seed(length)
        expected = apply_model(
            model, torch.from_numpy(track)[None], shifts=shifts, overlap=overlap
        )[0].numpy()
        delays = shift_delays(shifts, RATE, seed=length)
        joined, _ = separate(contextual, blocks_of(track, 37), plan, delays)
        assert joined.shape == expected.shape
        assert np.abs(joined - expected).max() <= MAX_ERROR, f"{length} samples"


def test_another_seed_gives_another_result():
    """What the comparison above is worth: other delays show far above rounding."""
    track = random_track(333)
    results = [
        separate(contextual, [track], centred(), shift_delays(2, RATE, seed))[0]
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    assert np.abs(results[0] - results[2]).max() > 0.01


@pytest.mark.parametrize(
    ("edge", "lead", "overlap", "tail"),
    [
        (0, 0, 0.0, "padded"),
        (0, 0, 0.25, "padded"),
        (5, 9, 0.5, "padded"),
        (0, 90, 0.0, "padded"),  # more than a chunk of zeros in front
        (0, 0, 0.0, "centred"),
        (0, 0, 0.25, "centred"),
    ],
)
def test_an_identity_model_reproduces_its_input(make_spec, edge, lead, overlap, tail):
    spec = make_spec(
        chunk_samples=CHUNK, edge_samples=edge, lead_samples=lead, overlap=overlap, tail=tail
    )
    plan = ChunkPlan.from_spec(spec)
    for length in (1, 2, 30, 79, 80, 81, 160, 161, 333):
        for delays in ((0,), (17,), (0, 50), (50, 0, 23), (33, 33)):
            track = random_track(length)
            joined, _ = separate(identity, blocks_of(track, 41), plan, delays)
            # Crossfading and the mean of up to three equal samples: a few roundings.
            np.testing.assert_allclose(joined[0], track, rtol=0, atol=1e-6)
            np.testing.assert_allclose(joined[1], track / 2, rtol=0, atol=1e-6)


def test_partial_sums_of_the_published_framing_meet_in_every_pass(make_spec):
    """Chunks that share just their edges are added within a pass, not between passes."""
    spec = make_spec(chunk_samples=64, edge_samples=8, lead_samples=8, overlap=0.0)
    rise = (np.arange(8, dtype=np.float32) + 0.5) / 8
    envelope = np.concatenate([rise, np.ones(48, np.float32), rise[::-1]])
    track = random_track(250)
    joined, _ = separate(
        lambda samples: identity(samples * envelope), [track], ChunkPlan.from_spec(spec), (0, 13)
    )
    np.testing.assert_allclose(joined[0], track, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_block_sizes_do_not_matter(size):
    track = random_track(222)
    whole, _ = separate(contextual, [track], centred(), (50, 3, 20))
    joined, _ = separate(contextual, blocks_of(track, size), centred(), (50, 3, 20))
    np.testing.assert_array_equal(joined, whole)


# --- chunks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [centred(), ChunkPlan(CHUNK, 60, 0, 0, True)])
@pytest.mark.parametrize("delays", [(0,), (50,), (0, 50, 1, 25)])
def test_expected_chunks(plan, delays):
    for length in (1, 10, 60, 61, 80, 81, 199, 200, 201):
        passes = Passes([random_track(length)], plan, delays, 2, 2)
        expected = passes.expected_chunks(length)
        assert expected == separate(identity, [random_track(length)], plan, delays)[1]


@pytest.mark.parametrize("delays", [(0,), (17,), (0, 17)])
def test_an_empty_track_has_no_chunk(delays):
    """The zeros in front of it are none to be separated."""
    for blocks in ([], [np.zeros((2, 0), np.float32)] * 3):
        assert list(Passes(blocks, centred(), delays, 2, 2).chunks()) == []


def test_answers_may_come_some_chunks_late():
    """Several requests are in flight at once: chunks are drawn before answers are in."""
    track = random_track(333)
    expected, n_chunks = separate(contextual, [track], centred(), (50, 3))
    passes = Passes([track], centred(), (50, 3), 2, 2)
    waiting, joined = [], []
    for samples, track_samples in passes.chunks():
        waiting.append((contextual(samples), track_samples))
        if len(waiting) == 4:
            joined.append(passes.add(*waiting.pop(0)))
    joined += [passes.add(*answer) for answer in waiting]
    assert len(joined) == n_chunks
    stems = zip(*joined, strict=True)
    late = np.stack([np.concatenate(parts, axis=1) for parts in stems])
    np.testing.assert_array_equal(late, expected)


# --- memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["padded", "centred"])
def test_memory_does_not_grow_with_the_track(make_spec, tail):
    plan = ChunkPlan.from_spec(make_spec(chunk_samples=4096, tail=tail))
    delays = (2048, 0, 1000)

    def peak_bytes(n_blocks):
        blocks = (np.full((2, 1000), 0.5, np.float32) for _ in range(n_blocks))
        passes = Passes(blocks, plan, delays, 1, 2)
        tracemalloc.start()
        for samples, track_samples in passes.chunks():
            passes.add([samples], track_samples)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(20)
    short, long = peak_bytes(100), peak_bytes(1000)
    chunk_bytes = 2 * 4096 * 4
    # The longer track has 8 MB. Besides a chunk per pass: what the passes are apart.
    assert long <= short + 2 * chunk_bytes
    assert long <= len(delays) * 12 * chunk_bytes


def test_the_track_is_read_once_and_no_further_than_needed():
    read = []

    def blocks():
        for number in range(100):
            read.append(number)
            yield np.zeros((2, 10), np.float32)

    passes = Passes(blocks(), centred(), (50, 0), 2, 2)
    for index, _ in enumerate(passes.chunks()):
        # Two passes: every second chunk is the next stride of the same pass.
        assert 10 * len(read) <= index // 2 * 60 + CHUNK + 20
    assert read == list(range(100))
