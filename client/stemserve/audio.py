"""Streaming decode and resample: a file becomes blocks of stereo float32 at the model's rate.

Memory does not depend on the length of the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from stemserve.downmix import check_channels, to_stereo
from stemserve.errors import (
    AudioInputError,
    EmptyAudioError,
    InputMissingError,
    InputUnreadableError,
    NonFiniteAudioError,
    NotAudioError,
    SampleRateError,
    TruncatedAudioError,
)

Samples = npt.NDArray[np.float32]

BLOCK_FRAMES: Final = 1 << 16
MIN_SAMPLE_RATE: Final = 8_000
MAX_SAMPLE_RATE: Final = 192_000

# An mp3's announced length counts encoder padding that decoders may or may not drop: up to three
# frames of 1152 samples are no sign of a truncated file.
_MP3_SLACK_FRAMES: Final = 3 * 1152
# libsndfile's own log of the header, e.g. "data : 529200 (should be 317502)". Sizes of 2^31 - 1
# and more are what a program writes that could not know the length (a pipe).
_SHORT_CHUNK: Final = re.compile(
    r"^\s*(?:data|SSND|riff|Riff size) ?: (\d+) \(should be (\d+)\)", re.M
)
_UNKNOWN_SIZE: Final = 0x7FFFF000
_UNKNOWN_FRAMES: Final = 1 << 62  # libsndfile's length of a flac that came from a pipe is 2^63 - 1
_JUNK_AT_END: Final = "Junk after the last page"
_NO_END_OF_STREAM: Final = "Last page lacks an end-of-stream bit"


class _Stream(soundfile.SoundFile):  # type: ignore[misc]
    """Read from beginning to end: soundfile's seeks fail where the length is unknown."""

    def seekable(self) -> bool:
        return False


@dataclass(slots=True)
class InputProperties:
    """What was measured of an input while it was read.

    Attributes:
        path: as given.
        sample_rate: Hz.
        channels: channels of the file, before any mix-down.
        frames: samples per channel, as decoded so far.
        peak: largest absolute sample so far (1.0 is full scale).
    """

    path: str
    sample_rate: int
    channels: int
    frames: int = 0
    peak: float = 0.0

    @property
    def duration_s(self) -> float:
        """Length in seconds of what was decoded."""
        return self.frames / self.sample_rate


class AudioReader:
    """Decodes one file (wav, flac, ogg, mp3, aiff: what libsndfile reads), once, in blocks.

    A context manager. Raises on entry:
        InputMissingError, InputUnreadableError, EmptyAudioError, NotAudioError,
        TruncatedAudioError, ChannelCountError, SampleRateError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._file = self._open()
        try:
            self._check_header()
        except BaseException:
            self._file.close()
            raise
        self.properties = InputProperties(
            str(self._path), self._file.samplerate, self._file.channels
        )

    def __enter__(self) -> AudioReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def announced_frames(self) -> int:
        """Samples per channel by the header, 0 if unknown (for progress; may be off for mp3)."""
        return int(self._file.frames) if self._file.frames < _UNKNOWN_FRAMES else 0

    def blocks(self, sample_rate: int) -> Iterator[Samples]:
        """Yield the file as blocks [2, n] float32 at ``sample_rate`` Hz.

        Raises:
            NonFiniteAudioError: a sample is NaN or infinite.
            TruncatedAudioError: the data ends before the announced length.
        """
        decoded = self._decode()
        if sample_rate == self.properties.sample_rate:
            return decoded
        return resample(decoded, self.properties.sample_rate, sample_rate)

    def _open(self) -> soundfile.SoundFile:
        path = self._path
        try:
            with path.open("rb") as file:
                if not file.read(1):
                    raise EmptyAudioError(f"'{path}' is empty (0 bytes); expected an audio file.")
        except FileNotFoundError:
            raise InputMissingError(f"There is no file '{path}'; check the path.") from None
        except IsADirectoryError:
            raise InputUnreadableError(
                f"'{path}' is a folder; name the audio files in it, e.g. '{path}/*.wav'."
            ) from None
        except OSError as error:
            raise InputUnreadableError(
                f"'{path}' cannot be read ({error.strerror}); check its permissions."
            ) from None
        try:
            return _Stream(os.fsencode(path))  # soundfile refuses names that are not UTF-8
        except (soundfile.LibsndfileError, TypeError):
            # libsndfile recognises files by content; RAW is chosen by name only (TypeError).
            raise NotAudioError(
                f"'{path}' is not audio that can be decoded, or it is damaged; expected wav, "
                "flac, ogg, mp3 or aiff. Convert it first, e.g. `ffmpeg -i IN OUT.wav`."
            ) from None

    def _check_header(self) -> None:
        file, path = self._file, self._path
        if not MIN_SAMPLE_RATE <= file.samplerate <= MAX_SAMPLE_RATE:
            raise SampleRateError(
                f"'{path}' has a sample rate of {file.samplerate} Hz; expected {MIN_SAMPLE_RATE} "
                f"to {MAX_SAMPLE_RATE} Hz. Convert it first, e.g. `ffmpeg -i IN -ar 44100 OUT`."
            )
        try:
            check_channels(file.channels)
        except AudioInputError as error:
            raise type(error)(f"'{path}': {error}") from None
        log = file.extra_info
        for announced, present in _SHORT_CHUNK.findall(log):
            if int(present) < int(announced) < _UNKNOWN_SIZE:
                raise TruncatedAudioError(
                    f"'{path}' is truncated: its header announces {announced} bytes of audio and "
                    f"{present} are there. Get the whole file, or cut it cleanly first."
                )
        if _NO_END_OF_STREAM in log or (_JUNK_AT_END in log and _ends_within_ogg_page(path)):
            raise TruncatedAudioError(
                f"'{path}' is truncated: its last Ogg page does not end the stream. Get the "
                "whole file, or cut it cleanly first."
            )
        if file.frames == 0:
            raise EmptyAudioError(f"'{path}' has a header and no samples; expected audio.")

    def _decode(self) -> Iterator[Samples]:
        properties = self.properties
        while True:
            try:
                frames = self._file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise TruncatedAudioError(self._cut_off(_reason(error))) from None
            if not len(frames):
                break
            peak = float(max(frames.max(), -frames.min()))  # NaN, too, if there is one
            if not np.isfinite(peak):
                bad = int(np.argmin(np.isfinite(frames).all(axis=1))) + properties.frames
                raise NonFiniteAudioError(
                    f"'{self._path}' has a NaN or infinite sample at "
                    f"{bad / properties.sample_rate:.3f} s; expected finite numbers. Render "
                    "the file again, or repair that place."
                )
            properties.peak = max(properties.peak, peak)
            properties.frames += len(frames)
            yield to_stereo(frames)
        slack = _MP3_SLACK_FRAMES if self._file.format == "MP3" else 0
        if properties.frames + slack < self.announced_frames:
            raise TruncatedAudioError(self._cut_off("the data ends there"))
        if properties.frames == 0:
            raise EmptyAudioError(f"'{self._path}' holds no samples; expected audio.")

    def _cut_off(self, reason: str) -> str:
        rate = self.properties.sample_rate
        return (
            f"'{self._path}' is truncated or damaged: {self.announced_frames / rate:.2f} s are "
            f"announced and {self.properties.frames / rate:.2f} s could be decoded ({reason}). "
            "Get the whole file, or cut it cleanly first."
        )


def resample(blocks: Iterable[Samples], from_rate: int, to_rate: int) -> Iterator[Samples]:
    """Resample consecutive blocks [channels, n] float32 with soxr's HQ recipe.

    The output is aligned with the input (soxr removes its own delay); its total length is the
    input's times ``to_rate / from_rate``, rounded.
    """
    stream: soxr.ResampleStream | None = None
    for block in blocks:
        if stream is None:
            stream = soxr.ResampleStream(
                from_rate, to_rate, block.shape[0], dtype="float32", quality="HQ"
            )
        # A fresh array: soxr refuses the odd strides that numpy gives to axes of length 1.
        out = stream.resample_chunk(np.array(block.T, order="C"))
        if len(out):
            yield np.ascontiguousarray(out.T)
    if stream is not None:
        empty = np.zeros((0, block.shape[0]), np.float32)
        out = stream.resample_chunk(empty, last=True)
        if len(out):
            yield np.ascontiguousarray(out.T)


def _ends_within_ogg_page(path: Path) -> bool:
    """Tell whether the last page of an Ogg file is cut off."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65_307))  # the largest page
        tail = file.read()
    at = tail.rfind(b"OggS")
    if at < 0:
        return False
    page = tail[at:]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return True
    return len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


def _reason(error: soundfile.LibsndfileError) -> str:
    return str(error.error_string).rstrip(".") or f"libsndfile error {error.code}"
