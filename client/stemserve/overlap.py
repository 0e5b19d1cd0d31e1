"""Chunk plan, cutting and streaming overlap-add: no I/O, no server, no threads.

Two ways of joining chunks, both exact for a model that changes nothing:

* **Published framing** (``overlap`` = 0, ``edge_samples`` > 0). The graph's output at the ends of
  a chunk holds partial sums of the inverse STFT; neighbouring chunks share exactly those samples,
  and adding them gives what one pass over the whole track gives. Nothing is computed twice.
* **Crossfade** (``overlap`` > 0). Chunks share a larger part and are averaged there with a
  triangular weight (0 on the partial edges), divided by the sum of the weights, as
  ``demucs.apply.apply_model`` does.

Positions are samples of the track; a chunk may start before 0 or end after the track, where it
is filled with zeros. A chunk that reaches beyond the track's end is either filled up with zeros
(``padded``) or moved back so that what is left of the track lies in its middle, with the track's
own samples before it (``centred``); its output is cropped accordingly.
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
        centred: whether a chunk that reaches beyond the track is moved back (True) or padded.
    """

    chunk: int
    stride: int
    lead: int
    edge: int
    crossfade: bool
    centred: bool = False

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
        centred = spec.tail == "centred"
        if share == 0:
            return cls(chunk, chunk - edge, spec.lead_samples, edge, False, centred)
        stride = int((1 - share) * chunk)  # demucs.apply: stride = int((1 - overlap) * segment)
        if stride < 1 or chunk - stride <= 2 * edge:
            raise SpecError(
                f"overlap {share} is too {'large' if stride < 1 else 'small'} for model "
                f"'{spec.name}': its chunks of {chunk} samples need 0, or more than "
                f"{2 * edge / chunk:.4f} and at most {1 - 1 / chunk:.6f}."
            )
        return cls(chunk, stride, spec.lead_samples, edge, True, centred)

    def starts(self, length: int) -> list[int]:
        """Return the start of every chunk of a track of ``length`` samples."""
        starts = [-self.lead]
        while not self.is_last(starts[-1], length):
            starts.append(starts[-1] + self.stride)
        return starts

    def is_last(self, start: int, length: int) -> bool:
        """Tell whether the chunk at ``start`` is the last of a track of ``length`` samples.

        Padded: the first that completes the track. Centred: the last that starts inside it, as
        ``demucs.apply`` has it: ``for offset in range(0, length, stride)``.
        """
        if self.centred:
            return start + self.stride >= length
        return start + self.chunk - self.edge >= length

    def moved_back(self, start: int, length: int) -> int:
        """Return by how many samples the chunk at ``start`` is moved back into the track.

        Source: demucs/apply.py, ``TensorChunk.padded`` and ``center_trim``: half of what is
        missing, rounded down.
        """
        return max(0, self.chunk - (length - start)) // 2 if self.centred else 0

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
        track_samples: length of the track if it ends in this chunk, None before.
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
    held = _Held(reach=plan.chunk // 2 if plan.centred else 0)
    start = -plan.lead
    ended = False
    while True:
        # One sample more than the chunk tells whether the track goes on.
        while not ended and (held.stop == 0 or held.stop <= start + plan.chunk):
            block = next(source, None)
            if block is None:
                ended = True
            else:
                held.append(block)
        if held.stop == 0:
            return
        last = ended and plan.is_last(start, held.stop)
        ends = last or (plan.centred and ended and start + plan.chunk > held.stop)
        begin = start - (plan.moved_back(start, held.stop) if ends else 0)
        # Handed over: a generator that waits at `yield` must not keep a chunk alive.
        handed = [Chunk(held.read(begin, plan.chunk), held.stop if ends else None)]
        start += plan.stride
        held.forget(start)
        yield handed.pop()
        if last:
            return


class _Held:
    """The part of a track that chunks to come still need.

    Args:
        reach: samples before a chunk's start that it may need.
    """

    def __init__(self, reach: int) -> None:
        self._reach = reach
        self._pieces: list[Samples] = []  # consecutive
        self._first = 0  # position of the first piece
        self.stop = 0  # position behind the last

    def append(self, block: Samples) -> None:
        self._pieces.append(block)
        self.stop += block.shape[1]

    def read(self, begin: int, count: int) -> Samples:
        """Return ``count`` samples from position ``begin``, zeros outside the track."""
        samples = np.empty((self._pieces[0].shape[0], count), np.float32)
        filled = max(0, -begin)
        samples[:, : min(filled, count)] = 0
        start = self._first - begin
        for piece in self._pieces:
            stop = start + piece.shape[1]
            if stop > filled and start < count:
                samples[:, max(start, filled) : min(stop, count)] = piece[
                    :, max(0, filled - start) : count - start
                ]
            start = stop
        samples[:, max(0, min(start, count)) :] = 0
        return samples

    def forget(self, start: int) -> None:
        """Drop what no chunk that starts at ``start`` or later needs."""
        needed = start - self._reach
        while len(self._pieces) > 1 and self._first + self._pieces[0].shape[1] <= needed:
            self._first += self._pieces.pop(0).shape[1]


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
            track_samples: the length of the track if it ends in this chunk; None before.

        Returns:
            One block [channels, n] float32 per stem, consecutive to the block before; n may be 0.
            Views of the outputs, or of their copies.
        """
        plan = self._plan
        position = self._position
        kept, moved, stop = plan.chunk, 0, plan.stride
        if track_samples is not None:
            kept = min(plan.chunk, track_samples - position)
            moved = plan.moved_back(position, track_samples)
            if plan.is_last(position, track_samples):
                stop = kept
        first = max(0, -position)
        shared = min(self._tail_weight.size, kept)
        if plan.crossfade:
            total = plan.weights[:kept].copy()
            total[:shared] += self._tail_weight[:shared]
            # 0 only on partial edges that lie outside the track.
            scale = 1 / np.maximum(total[:stop], np.finfo(np.float32).tiny)
            self._tail_weight = total[plan.stride :]
        blocks = []
        for index, output in enumerate(outputs):
            joined = output if output.flags.writeable else output.copy()
            joined = joined[:, moved : moved + kept]
            if plan.crossfade:
                joined *= plan.weights[:kept]
            joined[:, :shared] += self._tails[index][:, :shared]
            self._tails[index] = joined[:, plan.stride :].copy()
            block = joined[:, first:stop]
            if plan.crossfade:
                block *= scale[first:stop]
            blocks.append(block)
        self._position += plan.stride
        return blocks
