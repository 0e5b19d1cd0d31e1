"""An identity model must come out of cutting and joining as it went in.

-120 dB is the bound throughout: float32 leaves about -140 dB per weighted sum, and any sample that
is lost, doubled or shifted shows above -60 dB.
"""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemserve.errors import SpecError
from stemserve.overlap import Chunk, ChunkPlan, OverlapAdd, cut

MAX_ERROR_DB = -120.0


def blocks_of(track, sizes):
    """Cut [channels, n] into consecutive blocks of the sizes, repeated as long as needed."""
    position = 0
    for size in itertools.cycle(sizes):
        if position >= track.shape[1]:
            return
        yield track[:, position : position + size]
        position += size


def partial_edges(plan):
    """Ends of a chunk as an inverse STFT leaves them: they add up with the neighbour's."""
    envelope = np.ones(plan.chunk, np.float32)
    if plan.edge:
        rise = (np.arange(plan.edge, dtype=np.float32) + 0.5) / plan.edge
        envelope[: plan.edge] = rise
        envelope[plan.chunk - plan.edge :] = rise[::-1]
    return envelope


def spoiled_edges(samples, plan):
    """A chunk whose edges hold partial sums that a crossfade must not let through."""
    spoiled = samples.copy()
    if plan.edge:
        spoiled[:, : plan.edge] = 7.0
        spoiled[:, plan.chunk - plan.edge :] = -7.0
    return spoiled


def identity(track, plan, sizes=(1000,)):
    """Send a track through an identity model; returns the joined track and the chunks' number."""
    joiner = OverlapAdd(plan, 1, track.shape[0])
    joined, n_chunks = [], 0
    for samples, track_samples in cut(blocks_of(track, sizes), plan):
        output = spoiled_edges(samples, plan) if plan.crossfade else samples * partial_edges(plan)
        joined += joiner.add([output], track_samples)
        n_chunks += 1
    return np.concatenate(joined, axis=1), n_chunks


def error_db(track, joined):
    assert joined.shape == track.shape
    assert joined.dtype == np.float32
    noise = np.sum(np.square(np.subtract(joined, track, dtype=np.float64)))
    return 10 * np.log10(max(noise, 1e-300) / np.sum(np.square(track, dtype=np.float64)))


def noise(length, channels=2):
    samples = np.random.default_rng(length).uniform(0.1, 1.0, (channels, length))
    return samples.astype(np.float32)


def telling_lengths(plan):
    """1 sample to 3 chunks, with every boundary and its neighbours."""
    boundaries = {
        plan.edge, plan.lead, plan.stride, plan.chunk - plan.edge, plan.chunk,
        plan.chunk - plan.lead, plan.chunk - plan.edge - plan.lead,
        2 * plan.stride, plan.stride + plan.chunk - plan.edge - plan.lead,
        2 * plan.stride + plan.chunk - plan.edge - plan.lead, 2 * plan.chunk, 3 * plan.chunk,
    }  # fmt: skip
    near = {boundary + step for boundary in boundaries for step in (-1, 0, 1)}
    return sorted(length for length in near | {1, 2, 3} if 1 <= length <= 3 * plan.chunk)


PLANS = [
    (chunk, overlap, edge, lead)
    for chunk in (16, 64, 101)
    for overlap in (0.0, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9)
    for edge in (0, 1, 5)
    for lead in (edge, edge + 3, chunk + 5)
    if overlap == 0 or chunk - int((1 - overlap) * chunk) > 2 * edge
]


@pytest.mark.parametrize(("chunk", "overlap", "edge", "lead"), PLANS)
def test_an_identity_model_reproduces_its_input(make_spec, chunk, overlap, edge, lead):
    spec = make_spec(chunk_samples=chunk, overlap=overlap, edge_samples=edge, lead_samples=lead)
    plan = ChunkPlan.from_spec(spec)
    for length in telling_lengths(plan):
        track = noise(length)
        joined, n_chunks = identity(track, plan)
        assert error_db(track, joined) <= MAX_ERROR_DB, f"{length} samples"
        assert n_chunks == len(plan.starts(length)), f"{length} samples"


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.7])
@pytest.mark.parametrize("sizes", [(1,), (7,), (64,), (65,), (1, 200, 3), (100_000,)])
def test_block_sizes_do_not_matter(make_spec, overlap, sizes):
    spec = make_spec(edge_samples=4, lead_samples=6, overlap=overlap)
    plan = ChunkPlan.from_spec(spec)
    track = noise(190)
    joined, n_chunks = identity(track, plan, sizes)
    whole, n_whole = identity(track, plan, (190,))
    np.testing.assert_array_equal(joined, whole)
    assert n_chunks == n_whole
    assert error_db(track, joined) <= MAX_ERROR_DB


def test_empty_blocks_are_no_end(make_spec):
    plan = ChunkPlan.from_spec(make_spec(overlap=0.0))
    track = noise(100)
    empty = track[:, :0]
    chunks = list(cut([empty, track[:, :70], empty, track[:, 70:], empty], plan))
    assert [chunk.track_samples for chunk in chunks] == [None, 100]
    np.testing.assert_array_equal(chunks[0].samples, track[:, :64])


@st.composite
def plans_and_tracks(draw):
    chunk = draw(st.integers(2, 300))
    edge = draw(st.integers(0, (chunk - 1) // 2))
    lead = draw(st.integers(edge, 2 * chunk))
    strides = [stride for stride in range(1, chunk) if chunk - stride > 2 * edge]
    crossfade = draw(st.booleans()) and bool(strides)
    stride = draw(st.sampled_from(strides)) if crossfade else chunk - edge
    plan = ChunkPlan(chunk, stride, lead, edge, crossfade)
    length = draw(st.integers(1, 3 * chunk))
    sizes = draw(st.lists(st.integers(1, 2 * chunk), min_size=1, max_size=4))
    return plan, length, sizes


@settings(max_examples=150, deadline=None)
@given(plans_and_tracks())
def test_any_plan_reproduces_any_track(case):
    plan, length, sizes = case
    track = noise(length, channels=1)
    joined, n_chunks = identity(track, plan, sizes)
    assert error_db(track, joined) <= MAX_ERROR_DB
    assert n_chunks == len(plan.starts(length))


def test_stems_are_joined_side_by_side(make_spec):
    plan = ChunkPlan.from_spec(make_spec(overlap=0.5))
    track = noise(150)
    joiner = OverlapAdd(plan, 2, 2)
    joined = [
        joiner.add([samples, -2 * samples], track_samples)
        for samples, track_samples in cut([track], plan)
    ]
    first, second = (np.concatenate(blocks, axis=1) for blocks in zip(*joined, strict=True))
    assert error_db(track, first) <= MAX_ERROR_DB
    np.testing.assert_array_equal(second, -2 * first)


def test_the_outputs_that_come_in_are_not_written_to(make_spec):
    """They are views of a gRPC message."""
    for overlap in (0.0, 0.5):
        plan = ChunkPlan.from_spec(make_spec(overlap=overlap, edge_samples=3, lead_samples=3))
        joiner = OverlapAdd(plan, 1, 2)
        output = noise(plan.chunk)
        output.flags.writeable = False
        joiner.add([output], None)
        joiner.add([output], plan.chunk + 1)


# --- chunks ---------------------------------------------------------------------------------


def test_an_empty_track_has_no_chunk(make_spec):
    plan = ChunkPlan.from_spec(make_spec(lead_samples=5))
    assert list(cut([], plan)) == []
    assert list(cut([np.zeros((2, 0), np.float32)], plan)) == []


def test_chunks_are_filled_with_zeros_outside_the_track(make_spec):
    plan = ChunkPlan.from_spec(make_spec(lead_samples=10, overlap=0.0))
    track = noise(30)
    [chunk] = cut([track], plan)
    assert isinstance(chunk, Chunk)
    assert chunk.track_samples == 30
    assert chunk.samples.shape == (2, 64)
    assert chunk.samples.dtype == np.float32
    assert chunk.samples.flags.c_contiguous
    np.testing.assert_array_equal(chunk.samples[:, 10:40], track)
    assert not chunk.samples[:, :10].any()
    assert not chunk.samples[:, 40:].any()


def test_only_the_last_chunk_tells_the_length(make_spec):
    plan = ChunkPlan.from_spec(make_spec(overlap=0.0))
    told = [chunk.track_samples for chunk in cut(blocks_of(noise(129), (50,)), plan)]
    assert told == [None, None, 129]


@pytest.mark.parametrize(
    ("length", "starts"), [(1, [0]), (64, [0]), (65, [0, 48]), (112, [0, 48]), (113, [0, 48, 96])]
)
def test_starts(make_spec, length, starts):
    assert ChunkPlan.from_spec(make_spec(overlap=0.25)).starts(length) == starts


def test_published_framing_shares_the_edges_alone(make_spec):
    spec = make_spec(overlap=0.0, edge_samples=6, lead_samples=10)
    plan = ChunkPlan.from_spec(spec)
    assert plan == ChunkPlan(chunk=64, stride=58, lead=10, edge=6, crossfade=False)
    np.testing.assert_array_equal(plan.weights, np.ones(64, np.float32))
    assert plan.starts(1) == [-10]
    assert plan.starts(48) == [-10]
    assert plan.starts(49) == [-10, 48]


def test_an_overlap_of_the_caller_replaces_the_models_own(make_spec):
    spec = make_spec(overlap=0.25)
    assert ChunkPlan.from_spec(spec).stride == 48
    assert ChunkPlan.from_spec(spec, 0.5).stride == 32
    assert not ChunkPlan.from_spec(spec, 0).crossfade


# --- weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("segment", [2, 3, 8, 9, 64, 101])
def test_the_weights_are_demucs_triangle(segment):
    """demucs.apply: cat(arange(1, n // 2 + 1), arange(n - n // 2, 0, -1)) over its maximum."""
    weight = [*range(1, segment // 2 + 1), *range(segment - segment // 2, 0, -1)]
    expected = np.array(weight) / max(weight)
    plan = ChunkPlan(segment, 1, 0, 0, crossfade=True)
    assert plan.weights.dtype == np.float32
    # One rounding to float32.
    np.testing.assert_allclose(plan.weights, expected, rtol=1e-7)


def test_the_weights_are_zero_on_partial_edges():
    plan = ChunkPlan(20, 4, 3, 3, crossfade=True)
    inner = ChunkPlan(14, 4, 0, 0, crossfade=True)
    np.testing.assert_array_equal(plan.weights, [0, 0, 0, *inner.weights, 0, 0, 0])


# --- memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.75])
def test_memory_does_not_grow_with_the_track(make_spec, overlap):
    spec = make_spec(chunk_samples=4096, edge_samples=64, lead_samples=64, overlap=overlap)
    plan = ChunkPlan.from_spec(spec)

    def peak_bytes(n_blocks):
        blocks = (np.full((2, 1000), 0.5, np.float32) for _ in range(n_blocks))
        joiner = OverlapAdd(plan, 1, 2)
        tracemalloc.start()
        for samples, track_samples in cut(blocks, plan):
            joiner.add([samples], track_samples)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(20)
    short, long = peak_bytes(300), peak_bytes(3000)
    chunk_bytes = 2 * 4096 * 4
    # The peak varies with how blocks and chunks happen to meet; the longer track has 24 MB.
    assert long <= short + 2 * chunk_bytes
    assert long <= 12 * chunk_bytes  # the chunk, its copies while it is cut and joined


def test_cutting_reads_no_further_than_the_next_chunk_needs(make_spec):
    plan = ChunkPlan.from_spec(make_spec(overlap=0.25))
    read = 0

    def blocks():
        nonlocal read
        for _ in range(1000):
            read += 10
            yield np.zeros((2, 10), np.float32)

    for index, _ in enumerate(itertools.islice(cut(blocks(), plan), 50)):
        assert read <= index * plan.stride + plan.chunk + 10  # one block of look-ahead


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [-0.01, 1.0, 1.5, float("nan"), float("inf")])
def test_an_overlap_out_of_range(make_spec, overlap):
    with pytest.raises(SpecError) as caught:
        ChunkPlan.from_spec(make_spec(), overlap)
    assert str(caught.value) == f"overlap must be at least 0 and below 1, got {overlap}."


def test_an_overlap_that_does_not_reach_past_the_edges(make_spec):
    spec = make_spec(edge_samples=8, lead_samples=8)
    with pytest.raises(SpecError) as caught:
        ChunkPlan.from_spec(spec, 0.25)
    assert str(caught.value) == (
        "overlap 0.25 is too small for model 'tiny': its chunks of 64 samples need 0, or more "
        "than 0.2500 and at most 0.984375."
    )
    assert ChunkPlan.from_spec(spec, 0.27).crossfade


def test_an_overlap_that_leaves_no_stride(make_spec):
    with pytest.raises(SpecError, match=r"overlap 0\.99 is too large for model 'tiny'"):
        ChunkPlan.from_spec(make_spec(), 0.99)
    assert ChunkPlan.from_spec(make_spec(), 0.984375).stride == 1
