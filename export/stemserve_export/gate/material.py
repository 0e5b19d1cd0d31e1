"""The songs that an artefact is measured on, cut as the client cuts them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stemserve.errors import EvaluationDataError
from stemserve.overlap import Chunk, ChunkPlan, OverlapAdd, cut
from stemserve.spec import ModelSpec
from stemserve_export.gate.measures import seam_positions
from stemserve_export.gate.signals import Song, rendered_song

Samples = npt.NDArray[np.float32]

# Two seams and a short last chunk; one seam where a chunk is long and dear.
_CHUNKS = 3
_CHUNKS_IF_LONG = 2
_LONG_CHUNK_S = 20.0


@dataclass(frozen=True)
class Material:
    """A song, normalized and in chunks, for one model.

    Attributes:
        song: the song.
        spec: the model.
    """

    song: Song
    spec: ModelSpec

    @property
    def length(self) -> int:
        """Samples of the song."""
        return self.song.mixture.shape[1]

    @cached_property
    def plan(self) -> ChunkPlan:
        """How the client cuts a track for this model by default."""
        return ChunkPlan.from_spec(self.spec)

    @cached_property
    def level(self) -> tuple[np.float32, np.float32]:
        """Mean and scale that are removed first; (0, 1) without normalization.

        The client's (``stemserve.track``): mean and unbiased standard deviation of the mono mix,
        1e-8 added.
        """
        if self.spec.normalization != "track":
            return np.float32(0), np.float32(1)
        mono = self.song.mixture.mean(axis=0, dtype=np.float64)
        deviation = mono.std(ddof=1) if len(mono) > 1 else 0.0
        return np.float32(mono.mean()), np.float32(deviation + 1e-8)

    @cached_property
    def chunks(self) -> list[Samples]:
        """The chunks, [1, channels, chunk_samples] float32 each."""
        return [chunk.samples[np.newaxis] for chunk in self._cut]

    @cached_property
    def seams(self) -> list[int]:
        """Positions in the song where a chunk's part begins or ends."""
        plan = self.plan
        return seam_positions(plan.starts(self.length), plan.chunk, plan.edge, self.length)

    @cached_property
    def _cut(self) -> list[Chunk]:
        mean, scale = self.level
        return list(cut([(self.song.mixture - mean) / scale], self.plan))

    def joined(self, outputs: Sequence[Sequence[Samples]]) -> list[Samples]:
        """Join stems as the client does.

        Args:
            outputs: per chunk, one [1, channels, chunk_samples] per stem.

        Returns:
            One [channels, length] float32 per stem.
        """
        mean, scale = self.level
        joiner = OverlapAdd(self.plan, len(self.spec.stems), self.spec.channels)
        blocks: list[list[Samples]] = []
        for chunk, stems in zip(self._cut, outputs, strict=True):
            copies = [stem[0].astype(np.float32, copy=True) for stem in stems]
            blocks.append(joiner.add(copies, chunk.track_samples))
        return [np.concatenate(parts, axis=1) * scale + mean for parts in zip(*blocks, strict=True)]


def rendered(spec: ModelSpec) -> Material:
    """Return the rendered song in a length that makes a few chunks, the last of them short."""
    return Material(rendered_song(_song_samples(spec), spec.sample_rate), spec)


def real_songs(spec: ModelSpec, folder: Path) -> Iterator[Material]:
    """Yield an excerpt of every track of a folder in MUSDB's layout, from its middle.

    Raises:
        EvaluationDataError: it is no such folder, or a track has another sample rate.
        AudioInputError: a file is damaged.
    """
    from stemserve.evaluation.dataset import find_tracks, read_audio

    wanted = _song_samples(spec)
    for track in find_tracks(folder):
        if track.sample_rate != spec.sample_rate:
            raise EvaluationDataError(
                f"'{track.mixture}' has a sample rate of {track.sample_rate} Hz; model "
                f"'{spec.name}' is measured on tracks of {spec.sample_rate} Hz. Resample it."
            )
        first = max(0, (track.frames - wanted) // 2)
        part = slice(first, first + wanted)
        sources = {
            name: read_audio(path, spec.channels)[:, part].copy()
            for name, path in track.references.items()
        }
        mixture = read_audio(track.mixture, spec.channels)[:, part].copy()
        yield Material(Song(track.key, sources, mixture), spec)


def _song_samples(spec: ModelSpec) -> int:
    """Length of a track whose last chunk holds about half a stride."""
    plan = ChunkPlan.from_spec(spec)
    long = spec.chunk_samples > _LONG_CHUNK_S * spec.sample_rate
    chunks = _CHUNKS_IF_LONG if long else _CHUNKS
    if plan.centred:
        return (chunks - 1) * plan.stride + plan.stride // 2
    return (chunks - 2) * plan.stride + plan.chunk - plan.edge - plan.lead + plan.stride // 2
