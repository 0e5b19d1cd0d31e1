"""Tracks with reference stems in MUSDB's layout, and their audio.

    DIR/[train|test/]<track>/mixture.wav
    DIR/[train|test/]<track>/<stem>.wav

Files may also be flac.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from stemserve.audio import AudioReader
from stemserve.errors import EvaluationDataError

Samples = npt.NDArray[np.float32]

MIXTURE: Final = "mixture"
SUBSETS: Final = ("train", "test")
_SUFFIXES: Final = (".wav", ".flac")


@dataclass(frozen=True, slots=True)
class Track:
    """One track of a data set.

    Attributes:
        key: ``<track>`` or ``<subset>/<track>``, printable.
        subset: ``train``, ``test`` or ``""``.
        folder: where the track's files are.
        mixture: file of the mixture.
        references: file of each reference stem, by the stem's name.
        sample_rate: of all files, Hz.
        frames: samples per channel of all files.
        channels: 1 if every reference is mono, else 2.
    """

    key: str
    subset: str
    folder: Path
    mixture: Path
    references: Mapping[str, Path]
    sample_rate: int
    frames: int
    channels: int

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.frames / self.sample_rate


def find_tracks(folder: Path, subset: str | None = None) -> list[Track]:
    """Return the tracks of a data set, sorted by key; only headers are read.

    Args:
        folder: ``DIR`` of the layout above.
        subset: ``train`` or ``test`` to take these tracks only.

    Raises:
        EvaluationDataError: there is no track, or a track's files don't fit together.
        AudioInputError: a file is damaged or not audio.
    """
    if not folder.is_dir():
        raise EvaluationDataError(
            f"'{folder}' is not a folder; expected a data set, with its tracks as "
            f"'{folder}/<track>/mixture.wav' and one file per stem beside each."
        )
    if audio_file(folder, MIXTURE) is not None:
        raise EvaluationDataError(
            f"'{folder}' is a track itself; name the folder that holds it, '{folder.parent}'."
        )
    found = []
    for child in _folders(folder):
        if child.name in SUBSETS and audio_file(child, MIXTURE) is None:
            if subset in (None, child.name):
                found += [_track(inner, child.name) for inner in _folders(child)]
        elif subset is None:
            found.append(_track(child, ""))
    tracks = [track for track in found if track is not None]
    if not tracks:
        within = folder if subset is None else folder / subset
        raise EvaluationDataError(
            f"There is no track in '{within}'; expected '{within}/<track>/mixture.wav' with one "
            "file per stem beside it."
        )
    return sorted(tracks, key=lambda track: track.key)


def audio_file(folder: Path, name: str) -> Path | None:
    """Return the wav or flac file of that name, None if there is none."""
    for suffix in _SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return path
    return None


def audio_files(folder: Path) -> dict[str, Path]:
    """Return all wav and flac files of a folder but the mixture, by name, sorted."""
    names = {
        path.stem
        for path in folder.iterdir()
        if path.suffix in _SUFFIXES and path.is_file() and not path.name.startswith(".")
    }
    files = {name: audio_file(folder, name) for name in sorted(names - {MIXTURE})}
    return {name: path for name, path in files.items() if path is not None}


def check_estimates(track: Track, estimates: Mapping[str, Path]) -> None:
    """Check that estimates have the sample rate and the length of their track.

    Raises:
        EvaluationDataError: they have not.
        AudioInputError: a file is damaged or not audio.
    """
    for path in estimates.values():
        with AudioReader(path) as reader:
            _check_fit(path, reader, track.mixture, track.sample_rate, track.frames)


def read_audio(path: Path, channels: int) -> Samples:
    """Read a file as [channels, n] float32.

    Args:
        path: the file.
        channels: 1 averages stereo, 2 copies mono.

    Raises:
        NonFiniteAudioError: a sample is NaN or infinite.
        TruncatedAudioError: the data ends early.
    """
    with AudioReader(path) as reader:
        samples = np.empty((channels, reader.announced_frames), np.float32)
        at = 0
        for block in reader.blocks(reader.properties.sample_rate):
            part = samples[:, at : at + block.shape[1]]
            part[...] = block if channels == 2 else (block[:1] + block[1:]) / 2
            at += block.shape[1]
    return samples


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _track(folder: Path, subset: str) -> Track | None:
    """Read the headers of a track; None for a folder without audio."""
    references = audio_files(folder)
    mixture = audio_file(folder, MIXTURE)
    if mixture is None:
        if not references:
            return None
        raise EvaluationDataError(
            f"'{folder}' has stems ({', '.join(references)}) and no mixture.wav; add it, or move "
            "the folder out of the data set."
        )
    if not references:
        raise EvaluationDataError(
            f"'{folder}' has a mixture and no reference stem; add one file per stem, e.g. "
            f"'{folder}/vocals.wav'."
        )
    with AudioReader(mixture) as reader:
        rate, frames = reader.properties.sample_rate, reader.announced_frames
    if not frames:
        raise EvaluationDataError(
            f"'{mixture}' does not say how long it is (it was written to a pipe); write it again "
            "as a plain file."
        )
    channels = 1
    for path in references.values():
        with AudioReader(path) as reader:
            _check_fit(path, reader, mixture, rate, frames)
            channels = max(channels, min(2, reader.properties.channels))
    key = f"{subset}/{folder.name}" if subset else folder.name
    # A name that is not UTF-8 can be opened and not printed.
    key = os.fsencode(key).decode("utf-8", "backslashreplace")
    return Track(key, subset, folder, mixture, references, rate, frames, channels)


def _check_fit(path: Path, reader: AudioReader, mixture: Path, rate: int, frames: int) -> None:
    if reader.properties.sample_rate != rate:
        raise EvaluationDataError(
            f"'{path}' has a sample rate of {reader.properties.sample_rate} Hz and '{mixture}' "
            f"one of {rate} Hz; expected the same for all files of a track. Resample one of them."
        )
    if reader.announced_frames != frames:
        raise EvaluationDataError(
            f"'{path}' is {reader.announced_frames} samples long and '{mixture}' {frames}; "
            "expected the same length for all files of a track, sample by sample. Cut or pad one "
            "of them where they were made: a shift would ruin every score."
        )
