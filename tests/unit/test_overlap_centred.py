"""Centred chunks must give what ``demucs.apply.apply_model(shifts=0)`` gives, sample by sample."""

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.contextual import Contextual, blocks_of, random_track
from support.torchaudio_stub import ensure_torchaudio

from stemserve.overlap import ChunkPlan, OverlapAdd, cut

ensure_torchaudio()
from demucs.apply import apply_model  # noqa: E402

CHUNK = 100
# Two float32 sums of a few products of values around 1, in different orders.
MAX_ERROR = 5e-6


def ours(model, blocks, plan):
    """Cut, run the model, join; returns [stems, channels, samples] and the number of chunks."""
    joiner = OverlapAdd(plan, 2, 2)
    joined, n_chunks = [], 0
    for samples, track_samples in cut(blocks, plan):
        joined.append(joiner.add(model.stems_of(samples), track_samples))
        n_chunks += 1
    stems = zip(*joined, strict=True)
    return np.stack([np.concatenate(blocks, axis=1) for blocks in stems]), n_chunks


def published(model, track, overlap):
    mixture = torch.from_numpy(track)[None]
    return apply_model(model, mixture, shifts=0, overlap=overlap)[0].numpy()


def telling_lengths(plan):
    """1 sample to 4 chunks: every boundary with its neighbours, and some between."""
    boundaries = {plan.chunk // 2, plan.chunk - plan.stride, plan.stride // 2}
    boundaries |= {n * plan.chunk for n in range(1, 5)}
    boundaries |= {n * plan.stride for n in range(1, 4 * plan.chunk // plan.stride)}
    boundaries |= {n * plan.stride + plan.chunk for n in range(3)}
    near = {boundary + step for boundary in boundaries for step in (-1, 0, 1)}
    return sorted(near & set(range(1, 4 * plan.chunk + 2)) | {1, 2, 3, *range(7, 400, 31)})


def centred(overlap, chunk=CHUNK):
    return ChunkPlan(chunk, int((1 - overlap) * chunk), 0, 0, overlap > 0, centred=True)


@pytest.mark.parametrize("overlap", [0.1, 0.25, 0.33, 0.5, 0.6, 0.75, 0.8])
def test_a_track_of_any_length_is_what_demucs_gives(overlap):
    plan, model = centred(overlap), Contextual(CHUNK)
    for length in telling_lengths(plan):
        track = random_track(length)
        expected = published(model, track, overlap)
        joined, n_chunks = ours(model, blocks_of(track, 64), plan)
        assert joined.shape == expected.shape == (2, 2, length)
        assert np.abs(joined - expected).max() <= MAX_ERROR, f"{length} samples"
        assert n_chunks == len(plan.starts(length)), f"{length} samples"


@pytest.mark.parametrize("chunk", [2, 7, 64, 101])
def test_chunks_of_odd_and_tiny_lengths(chunk):
    model = Contextual(chunk)
    plan = centred(0.25, chunk)
    for length in range(1, 3 * chunk + 2):
        track = random_track(length)
        joined, _ = ours(model, [track], plan)
        error = np.abs(joined - published(model, track, 0.25)).max()
        assert error <= MAX_ERROR, f"{length} samples"


@pytest.mark.parametrize("size", [1, 13, 99, 100, 101, 1000])
@pytest.mark.parametrize("length", [30, 176, 230, 385])
def test_block_sizes_do_not_matter(size, length):
    track, model = random_track(length), Contextual(CHUNK)
    for overlap in (0.0, 0.25, 0.7):
        plan = centred(overlap)
        joined, n_chunks = ours(model, blocks_of(track, size), plan)
        whole, n_whole = ours(model, [track], plan)
        np.testing.assert_array_equal(joined, whole)
        assert n_chunks == n_whole


def test_padding_the_tail_instead_would_be_told_apart():
    """What the comparison above is worth: the other framing differs by far more than rounding."""
    track, model = random_track(185), Contextual(CHUNK)
    padded = ChunkPlan(CHUNK, 75, 0, 0, True)
    joined, _ = ours(model, [track], padded)
    expected = published(model, track, 0.25)
    assert np.abs(joined - expected)[..., :75].max() <= MAX_ERROR
    assert np.abs(joined - expected)[..., 150:].max() > 0.05


# --- an identity model ----------------------------------------------------------------------


def identity(track, plan, size):
    joiner = OverlapAdd(plan, 1, track.shape[0])
    joined = [
        joiner.add([samples], track_samples)[0]
        for samples, track_samples in cut(blocks_of(track, size), plan)
    ]
    return np.concatenate(joined, axis=1)


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 200), st.floats(0, 0.95), st.integers(1, 700), st.integers(1, 300))
def test_any_centred_plan_reproduces_any_track(chunk, overlap, length, size):
    stride = max(1, int((1 - overlap) * chunk))
    plan = ChunkPlan(chunk, stride, 0, 0, stride < chunk, centred=True)
    track = random_track(length)
    # A weighted sum of equal samples over the sum of the weights: a few roundings.
    np.testing.assert_allclose(identity(track, plan, size), track, rtol=0, atol=1e-6)


def test_chunks_side_by_side_are_not_touched():
    track = random_track(333)
    np.testing.assert_array_equal(identity(track, centred(0.0), 50), track)


# --- chunks ---------------------------------------------------------------------------------


def test_the_plan_of_a_spec(make_spec):
    spec = make_spec(tail="centred", overlap=0.25)
    assert ChunkPlan.from_spec(spec) == ChunkPlan(64, 48, 0, 0, True, centred=True)
    assert ChunkPlan.from_spec(spec, 0) == ChunkPlan(64, 64, 0, 0, False, centred=True)


@pytest.mark.parametrize(
    ("length", "starts"),
    [(1, [0]), (48, [0]), (49, [0, 48]), (64, [0, 48]), (96, [0, 48]), (97, [0, 48, 96])],
)
def test_a_chunk_starts_at_every_stride_inside_the_track(make_spec, length, starts):
    """demucs/apply.py: ``for offset in range(0, length, stride)``; the last may add nothing new."""
    plan = ChunkPlan.from_spec(make_spec(tail="centred"))
    assert plan.starts(length) == starts == list(range(0, length, 48))


def test_what_is_left_of_the_track_lies_in_the_chunks_middle(make_spec):
    plan = ChunkPlan.from_spec(make_spec(tail="centred", overlap=0.0))
    track = random_track(64 + 21)
    first, last = cut([track], plan)
    assert (first.track_samples, last.track_samples) == (None, 85)
    # 43 of 64 samples are missing; half of them, rounded down, come before: the track's own.
    np.testing.assert_array_equal(last.samples[:, :42], track[:, 43:])
    assert not last.samples[:, 42:].any()


def test_a_track_shorter_than_a_chunk_has_zeros_on_both_sides(make_spec):
    plan = ChunkPlan.from_spec(make_spec(tail="centred"))
    track = random_track(11)
    [chunk] = cut([track], plan)
    np.testing.assert_array_equal(chunk.samples[:, 26:37], track)
    assert not chunk.samples[:, :26].any()
    assert not chunk.samples[:, 37:].any()
    assert chunk.samples.flags.c_contiguous


def test_every_chunk_that_reaches_beyond_the_track_tells_its_length(make_spec):
    plan = ChunkPlan.from_spec(make_spec(tail="centred", overlap=0.75))
    told = [chunk.track_samples for chunk in cut(blocks_of(random_track(100), 9), plan)]
    assert plan.starts(100) == [0, 16, 32, 48, 64, 80, 96]
    assert told == [None, None, None, 100, 100, 100, 100]


@pytest.mark.parametrize("overlap", [0.0, 0.25])
def test_an_empty_track_has_no_chunk(make_spec, overlap):
    plan = ChunkPlan.from_spec(make_spec(tail="centred", overlap=overlap))
    assert list(cut([], plan)) == []
    assert list(cut([np.zeros((2, 0), np.float32)], plan)) == []


# --- memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.75])
@pytest.mark.parametrize("size", [1000, 10_000])
def test_memory_does_not_grow_with_the_track(make_spec, overlap, size):
    plan = ChunkPlan.from_spec(make_spec(chunk_samples=4096, overlap=overlap, tail="centred"))

    def peak_bytes(length):
        blocks = (np.full((2, size), 0.5, np.float32) for _ in range(length // size))
        joiner = OverlapAdd(plan, 1, 2)
        tracemalloc.start()
        for samples, track_samples in cut(blocks, plan):
            joiner.add([samples], track_samples)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(20_000)
    short, long = peak_bytes(100_000), peak_bytes(1_000_000)
    chunk_bytes, block_bytes = 2 * 4096 * 4, 2 * size * 4
    # The peak varies with how blocks and chunks happen to meet; the longer track has 8 MB.
    assert long <= short + chunk_bytes + block_bytes
    # The chunk, half a chunk of the past, copies while it is cut and joined; blocks are kept whole.
    assert long <= 12 * chunk_bytes + 3 * block_bytes


def test_cutting_reads_no_further_than_the_next_chunk_needs(make_spec):
    plan = ChunkPlan.from_spec(make_spec(overlap=0.25, tail="centred"))
    read = 0

    def blocks():
        nonlocal read
        for _ in range(1000):
            read += 10
            yield np.zeros((2, 10), np.float32)

    for index, _ in enumerate(itertools.islice(cut(blocks(), plan), 50)):
        assert read <= index * plan.stride + plan.chunk + 10  # one block of look-ahead
