"""Several passes over one track, each delayed by a little, averaged: no I/O, no server.

A separator is not invariant to time shifts; averaging over random ones raises its quality (the
"shift trick" of Défossez et al., "Music Source Separation in the Waveform Domain", 2019, section
4.4) and costs one pass more for each. The passes run side by side through the same chunks, so
memory is bounded as for one.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import tee
from typing import Final

import numpy as np
import numpy.typing as npt

from stemserve.errors import SpecError
from stemserve.overlap import Chunk, ChunkPlan, OverlapAdd, cut

Samples = npt.NDArray[np.float32]

# demucs/apply.py: max_shift = int(0.5 * model.samplerate)
MAX_SHIFT_S: Final = 0.5


def shift_delays(shifts: int, sample_rate: int, seed: int) -> tuple[int, ...]:
    """Return the delay of each pass in samples; ``(0,)`` for no shifts.

    The same as ``demucs.apply.apply_model(shifts=…)`` draws after ``random.seed(seed)``, unless the
    model draws from that generator itself, as HTDemucs does from the second shift on. Raises
    SpecError for a negative number.
    """
    if shifts < 0:
        raise SpecError(f"shifts must be 0 or more, got {shifts}.")
    if not shifts:
        return (0,)
    longest = int(MAX_SHIFT_S * sample_rate)
    generator = random.Random(seed)
    return tuple(longest - generator.randint(0, longest) for _ in range(shifts))


class Passes:
    """Cuts a track once per delay and joins the answers to one average.

    Args:
        blocks: the track in consecutive blocks [channels, any length] float32.
        plan: the chunk plan.
        delays: zeros in front of the track, one number of samples per pass.
        n_stems: number of stems joined side by side.
        channels: channels of a chunk.
    """

    def __init__(
        self,
        blocks: Iterable[Samples],
        plan: ChunkPlan,
        delays: Sequence[int],
        n_stems: int,
        channels: int,
    ) -> None:
        self._plan = plan
        self._delays = tuple(delays)
        self._joiners = [OverlapAdd(plan, n_stems, channels) for _ in delays]
        self._sent: deque[int] = deque()  # passes whose answers are awaited, in order
        self._to_drop = list(delays)  # samples of each pass that lie before the track
        self._average = _Average(n_stems, channels, len(self._delays))
        self._cuts = [
            cut(_delayed(source, delay), plan)
            for delay, source in zip(self._delays, tee(blocks, len(self._delays)), strict=True)
        ]

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks of all passes, in the order in which :meth:`add` wants the answers."""
        running = deque(enumerate(self._cuts))
        while running:
            number, source = running.popleft()
            chunk = next(source, None)
            if chunk is None:
                continue
            self._sent.append(number)
            running.append((number, source))
            handed = [chunk]
            del chunk
            yield handed.pop()

    def expected_chunks(self, length: int) -> int:
        """Return the number of chunks of a track of ``length`` samples."""
        return sum(len(self._plan.starts(length + delay)) for delay in self._delays)

    def add(self, outputs: Sequence[Samples], track_samples: int | None) -> list[Samples]:
        """Join the next answer; as :meth:`stemserve.overlap.OverlapAdd.add`."""
        number = self._sent.popleft()
        blocks = self._joiners[number].add(outputs, track_samples)
        if len(self._delays) == 1 and not self._delays[0]:
            return blocks
        dropped = min(self._to_drop[number], blocks[0].shape[1])
        self._to_drop[number] -= dropped
        return self._average.add(number, [block[:, dropped:] for block in blocks])


def _delayed(blocks: Iterable[Samples], delay: int) -> Iterator[Samples]:
    """Put zeros in front of a track; a track without samples stays empty."""
    waiting = delay > 0
    for block in blocks:
        if waiting and block.shape[1]:
            waiting = False
            yield np.zeros((block.shape[0], delay), np.float32)
        yield block


class _Average:
    """Mean of several streams of the same samples, as far as all of them have come."""

    def __init__(self, n_stems: int, channels: int, n_passes: int) -> None:
        self._sums = [np.zeros((channels, 0), np.float32) for _ in range(n_stems)]
        self._reached = [0] * n_passes  # samples from the start of the sums
        self._n_passes = n_passes

    def add(self, number: int, blocks: Sequence[Samples]) -> list[Samples]:
        start = self._reached[number]
        stop = start + blocks[0].shape[1]
        self._reached[number] = stop
        done = min(self._reached)
        means = []
        for index, block in enumerate(blocks):
            total = self._sums[index]
            if stop > total.shape[1]:
                total = np.pad(total, ((0, 0), (0, stop - total.shape[1])))
            total[:, start:stop] += block
            means.append(total[:, :done] / np.float32(self._n_passes))
            self._sums[index] = total[:, done:].copy()
        self._reached = [reached - done for reached in self._reached]
        return means
