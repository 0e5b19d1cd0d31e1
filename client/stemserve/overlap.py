"""Chunk plan, cutting and streaming overlap-add: no I/O, no server, no threads.

Two ways of joining chunks, both exact for a model that changes nothing:

* **Published framing** (``overlap`` = 0, ``edge_samples`` > 0). The graph's output at the ends of
  a chunk holds partial sums of the inverse STFT; neighbouring chunks share exactly those samples,
  and adding them gives what one pass over the whole track gives. Nothing is computed twice.
* **Crossfade** (``overlap`` > 0). Chunks share a larger part and are averaged there with a
  triangular weight (0 on the partial edges), divided by the sum of the weights, as
  ``demucs.apply.apply_model`` does.

Positions are samples of the track; a chunk may start before 0 or end after the track, where it
is filled with zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from stemserve.errors import SpecError

if TYPE_CHECKING:
    from stemserve.spec import ModelSpec

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ChunkPlan:
    """Where chunks start and how their outputs are joined.

    Attributes:
        chunk: samples of a chunk.
        stride: samples from the start of one chunk to the start of the next.
        lead: samples before the track at which the first chunk starts.
        edge: samples at each end of a chunk's output that are partial sums.
        crossfade: whether overlapping outputs are averaged (True) or added (False).
    """

    chunk: int
    stride: int
    lead: int
    edge: int
    crossfade: bool

    @classmethod
    def from_spec(cls, spec: ModelSpec, overlap: float | None = None) -> ChunkPlan:
        """Plan the chunks of a model.

        Args:
            spec: the served model.
            overlap: share of a chunk in common with its neighbour, in [0, 1); the spec's own
                default when None.

        Raises:
            SpecError: the overlap is out of range, or too small to crossfade outside the edges.
        """
        share = spec.overlap if overlap is None else overlap
        if not 0 <= share < 1:
            raise SpecError(f"overlap must be at least 0 and below 1, got {share}.")
        chunk, edge = spec.chunk_samples, spec.edge_samples
        if share == 0:
            return cls(chunk, chunk - edge, spec.lead_samples, edge, crossfade=False)
        stride = int((1 - share) * chunk)  # demucs.apply: stride = int((1 - overlap) * segment)
        if stride < 1 or chunk - stride <= 2 * edge:
            raise SpecError(
                f"overlap {share} is too {'large' if stride < 1 else 'small'} for model "
                f"'{spec.name}': its chunks of {chunk} samples need 0, or more than "
                f"{2 * edge / chunk:.4f} and at most {1 - 1 / chunk:.6f}."
            )
        return cls(chunk, stride, spec.lead_samples, edge, crossfade=True)

    def starts(self, length: int) -> list[int]:
        """Return the start of every chunk of a track of ``length`` samples."""
        starts = [-self.lead]
        while not self.completes(starts[-1], length):
            starts.append(starts[-1] + self.stride)
        return starts

    def completes(self, start: int, length: int) -> bool:
        """Tell whether the chunk at ``start`` completes a track of ``length`` samples."""
        return start + self.chunk - self.edge >= length

    @cached_property
    def weights(self) -> Samples:
        """Weight of each output sample of a chunk, [chunk] float32.

        Crossfading: the triangle of ``demucs.apply`` (1 .. n/2, n/2 .. 1 over its maximum) on the
        complete samples, 0 on the edges. Otherwise 1 throughout.
        """
        if not self.crossfade:
            return np.ones(self.chunk, np.float32)
        inner = self.chunk - 2 * self.edge
        rise = np.arange(1, inner // 2 + 1, dtype=np.float32)
        fall = np.arange(inner - inner // 2, 0, -1, dtype=np.float32)
        triangle = np.concatenate([rise, fall]) / max(1, inner - inner // 2)
        return np.pad(triangle, self.edge).astype(np.float32)


class Chunk(NamedTuple):
    """One chunk of a track.

    Attributes:
        samples: [channels, plan.chunk] float32, fresh and contiguous; zeros outside the track.
        track_samples: length of the track if this is its last chunk, None before.
    """

    samples: Samples
    track_samples: int | None


def cut(blocks: Iterable[Samples], plan: ChunkPlan) -> Iterator[Chunk]:
    """Cut a track into chunks.

    Args:
        blocks: the track in consecutive blocks [channels, any length] float32.
        plan: the chunk plan.

    Yields:
        The chunks in order; none for a track without samples. Holds one chunk and one block.
    """
    source = iter(blocks)
    held: list[Samples] = []  # consecutive, from position `start` on, as far as read
    held_samples = length = 0
    start = -plan.lead
    ended = False
    while True:
        # One sample more than the chunk tells whether the track goes on.
        while not ended and held_samples <= plan.chunk:
            block = next(source, None)
            if block is None:
                ended = True
                continue
            if not held:
                held.append(np.zeros((block.shape[0], plan.lead), np.float32))
                held_samples += plan.lead
            held.append(block)
            held_samples += block.shape[1]
            length += block.shape[1]
        if length == 0:
            return
        last = ended and plan.completes(start, length)
        samples, held = _split(held, plan)
        held_samples = max(0, held_samples - plan.stride)
        # Handed over: a generator that waits at `yield` must not keep a chunk alive.
        handed = [Chunk(samples, length if last else None)]
        del samples
        yield handed.pop()
        if last:
            return
        start += plan.stride


def _split(held: list[Samples], plan: ChunkPlan) -> tuple[Samples, list[Samples]]:
    """Return the first chunk of what is held, padded with zeros, and what follows its stride."""
    samples = np.empty((held[0].shape[0], plan.chunk), np.float32)
    rest: list[Samples] = []
    start = 0
    for piece in held:
        stop = start + piece.shape[1]
        samples[:, start : min(stop, plan.chunk)] = piece[:, : max(0, plan.chunk - start)]
        if stop > plan.stride:
            rest.append(piece[:, max(0, plan.stride - start) :])
        start = stop
    samples[:, min(start, plan.chunk) :] = 0
    return samples, rest


class OverlapAdd:
    """Joins the output chunks of several stems, in order, as they arrive.

    Holds at most one chunk per stem, whatever the length of the track.

    Args:
        plan: the chunk plan that the input was cut by.
        n_stems: number of stems joined side by side.
        channels: channels of a chunk.
    """

    def __init__(self, plan: ChunkPlan, n_stems: int, channels: int) -> None:
        self._plan = plan
        shared = plan.chunk - plan.stride
        self._tails = [np.zeros((channels, shared), np.float32) for _ in range(n_stems)]
        self._tail_weight = np.zeros(shared, np.float32)
        self._position = -plan.lead

    def add(self, outputs: Sequence[Samples], track_samples: int | None = None) -> list[Samples]:
        """Add the next chunk of every stem and return what it completes.

        Args:
            outputs: one array [channels, plan.chunk] float32 per stem. Used as scratch if it
                may be written to, copied otherwise.
            track_samples: for the last chunk, the length of the track; None before.

        Returns:
            One block [channels, n] float32 per stem, consecutive to the block before; n may be 0.
            Views of the outputs, or of their copies.
        """
        plan = self._plan
        shared = plan.chunk - plan.stride
        stop = plan.stride
        if track_samples is not None:
            stop = min(plan.chunk, track_samples - self._position)
        if plan.crossfade:
            total = plan.weights.copy()
            total[:shared] += self._tail_weight
            self._tail_weight = total[plan.stride :]
            # 0 only on partial edges that lie outside the track.
            scale = 1 / np.maximum(total[:stop], np.finfo(np.float32).tiny)
        first = max(0, -self._position)
        blocks = []
        for index, output in enumerate(outputs):
            joined = output if output.flags.writeable else output.copy()
            if plan.crossfade:
                joined *= plan.weights
            joined[:, :shared] += self._tails[index]
            self._tails[index] = joined[:, plan.stride :].copy()
            block = joined[:, first:stop]
            if plan.crossfade:
                block *= scale[first:stop]
            blocks.append(block)
        self._position += plan.stride
        return blocks
