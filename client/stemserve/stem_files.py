"""Streaming encode of a track's stems, all or nothing.

Stems are written into a hidden folder beside the destination and renamed into place once the last
sample is there. Whatever ends the run earlier leaves the destination as it was.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from stemserve.errors import DiskFullError, OutputError, OutputNotWritableError

Samples = npt.NDArray[np.float32]
Format = Literal["wav", "flac", "mp3"]

METADATA_NAME: Final = "metadata.json"
NORMALIZED_PEAK_DB: Final = -1.0
_DISK_FULL_BYTES: Final = 1 << 20
_WAV_LIMIT_BYTES: Final = 4_000_000_000  # sizes in a wav header are 32 bits; rf64's are 64
_MP3_SAMPLE_RATES: Final = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


@dataclass(frozen=True, slots=True)
class _Encoding:
    container: str
    subtype: str
    full_scale: bool  # whether samples beyond +-1 are cut off
    options: dict[str, Any]


_ENCODINGS: Final[dict[Format, _Encoding]] = {
    # Float, so that nothing clips and the stems still sum to the mixture.
    "wav": _Encoding("WAV", "FLOAT", False, {}),
    "flac": _Encoding("FLAC", "PCM_24", True, {}),
    # 0.0 is libsndfile's best quality: 320 kbit/s at a constant rate.
    "mp3": _Encoding(
        "MP3", "MPEG_LAYER_III", True, {"compression_level": 0.0, "bitrate_mode": "CONSTANT"}
    ),
}


@dataclass(slots=True)
class StemProperties:
    """What was measured of a stem while it was written.

    Attributes:
        file: name of the file in the track's folder.
        peak: largest absolute sample before encoding, after any gain (1.0 is full scale).
        rms_db: level over the whole track, dB relative to full scale; -inf for digital silence.
        clipped_samples: samples beyond full scale that an integer format cut off.
    """

    file: str
    peak: float
    rms_db: float
    clipped_samples: int


class _Encoder(soundfile.SoundFile):  # type: ignore[misc]
    """A file that is written from beginning to end."""

    def flush(self) -> None:
        """Leave it to the system when the disk is written to: soundfile's close() would wait."""


class _StemFile:
    """One stem on its way to disk: resampled, measured, cut to length, encoded."""

    def __init__(
        self,
        path: Path,
        encoding: _Encoding,
        channels: int,
        from_rate: int,
        to_rate: int,
        announced_frames: int,
    ) -> None:
        self.path = path
        self.peak = 0.0
        self.energy = 0.0
        self.frames = 0
        self.clipped = 0
        self._full_scale = encoding.full_scale
        self._channels = channels
        self._resampler = (
            None
            if from_rate == to_rate
            else soxr.ResampleStream(from_rate, to_rate, channels, dtype="float32", quality="HQ")
        )
        size = announced_frames * channels * 4
        container = encoding.container
        if container == "WAV" and size > _WAV_LIMIT_BYTES:
            container = "RF64"
        name = os.fsencode(path)  # soundfile refuses names that are not UTF-8
        self._file = _Encoder(
            name, "w", to_rate, channels, encoding.subtype, format=container, **encoding.options
        )

    def write(self, block: Samples) -> None:
        frames = np.stack(tuple(block), axis=1)  # several times faster than a copy of block.T
        self._put(frames if self._resampler is None else self._resampler.resample_chunk(frames))

    def finish(self, frames: int) -> None:
        """Flush, cut or pad to ``frames`` samples per channel, and close."""
        if self._resampler is not None:
            empty = np.zeros((0, self._channels), np.float32)
            rest = self._resampler.resample_chunk(empty, last=True)
            self._put(rest[: max(0, frames - self.frames)])
        if self.frames < frames:  # resampling there and back may lose a sample to rounding
            self._put(np.zeros((frames - self.frames, self._channels), np.float32))
        self._file.close()

    def close(self) -> None:
        self._file.close()

    def _put(self, frames: Samples) -> None:
        if not len(frames):
            return
        peak = float(max(frames.max(), -frames.min()))
        self.peak = max(self.peak, peak)
        self.energy += float(np.vdot(frames, frames))
        self.frames += len(frames)
        if self._full_scale and peak > 1:
            self.clipped += int(np.count_nonzero(np.abs(frames) > 1))
            frames = np.clip(frames, -1, 1)
        self._file.write(frames)

    @property
    def rms_db(self) -> float:
        if self.energy == 0:
            return -math.inf
        return 10 * math.log10(self.energy / (self.frames * self._channels))


class TrackWriter:
    """Writes the stems of one track and its metadata into a folder, atomically.

    A context manager: leaving it without :meth:`commit` removes everything that was written.

    Args:
        folder: destination, ``DIR/<track>``; created on commit.
        stems: names, in the order of the blocks.
        channels: channels of a stem.
        model_rate: sample rate of the blocks, Hz.
        sample_rate: sample rate of the files, Hz.
        file_format: ``wav`` (32-bit float), ``flac`` (24 bit) or ``mp3`` (320 kbit/s).
        announced_frames: expected length of a stem at ``sample_rate`` (a hint).
        normalize: apply one gain to all stems such that the loudest peaks at -1 dBFS.

    Raises:
        OutputNotWritableError, DiskFullError, OutputError.
    """

    def __init__(
        self,
        folder: Path,
        stems: Sequence[str],
        *,
        channels: int,
        model_rate: int,
        sample_rate: int,
        file_format: Format,
        announced_frames: int,
        normalize: bool,
    ) -> None:
        if file_format == "mp3" and sample_rate not in _MP3_SAMPLE_RATES:
            raise OutputError(
                f"mp3 cannot hold {sample_rate} Hz; choose --sample-rate 44100 or 48000, or "
                "another --format."
            )
        self.gain = 1.0
        self.sample_rate = sample_rate
        self._folder = folder
        self._format: Format = file_format
        self._normalize = normalize
        self._partial = _partial_folder(folder)
        self._stems = tuple(stems)
        self._files: list[_StemFile] = []
        # The gain of a normalized track is known at its end only: keep it as float until then.
        self._encoding = _ENCODINGS["wav" if normalize else file_format]
        try:
            with self._reported():
                for stem in stems:
                    self._files.append(
                        _StemFile(
                            self._partial / f"{stem}.{'gain.wav' if normalize else file_format}",
                            self._encoding,
                            channels,
                            model_rate,
                            sample_rate,
                            announced_frames,
                        )
                    )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TrackWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; remove what was written unless :meth:`commit` has moved it."""
        for file in self._files:
            with contextlib.suppress(Exception):
                file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def write(self, blocks: Sequence[Samples]) -> None:
        """Append one block [channels, n] float32 per stem."""
        with self._reported():
            for file, block in zip(self._files, blocks, strict=True):
                file.write(block)

    def finish(self, frames: int) -> dict[str, StemProperties]:
        """Close the stems at exactly ``frames`` samples each; return what was measured."""
        with self._reported():
            for file in self._files:
                file.finish(frames)
            if self._normalize:
                self._apply_gain()
            for file in self._files:
                written = soundfile.info(os.fsencode(file.path)).frames
                # An mp3's length is known to its own frame of 1152 samples only.
                if written != file.frames and self._format != "mp3":
                    raise OSError(errno.EIO, f"{written} of {file.frames} samples were kept")
        return {
            stem: StemProperties(file.path.name, file.peak, file.rms_db, file.clipped)
            for stem, file in zip(self._stems, self._files, strict=True)
        }

    def commit(self, metadata: Mapping[str, Any]) -> dict[str, Path]:
        """Write the metadata, move everything into place and return the stems' paths."""
        with self._reported():
            text = json.dumps(metadata, indent=2, ensure_ascii=False) + "\n"
            # A name that is not UTF-8 becomes JSON's own escape for what it was decoded to.
            (self._partial / METADATA_NAME).write_bytes(text.encode("utf-8", "backslashreplace"))
            try:
                self._partial.rename(self._folder)  # replaces an empty folder, or none
            except OSError:
                self._folder.mkdir(exist_ok=True)
                names = [*(file.path.name for file in self._files), METADATA_NAME]
                for name in names:  # before the first is replaced
                    if (self._folder / name).is_dir():
                        raise IsADirectoryError(errno.EISDIR, f"'{name}' is a folder") from None
                for name in names:
                    (self._partial / name).replace(self._folder / name)
        return {
            stem: self._folder / file.path.name
            for stem, file in zip(self._stems, self._files, strict=True)
        }

    def _apply_gain(self) -> None:
        peak = max(file.peak for file in self._files)
        self.gain = 10 ** (NORMALIZED_PEAK_DB / 20) / peak if peak > 0 else 1.0
        finals = []
        for stem, raw in zip(self._stems, self._files, strict=True):
            with soundfile.SoundFile(os.fsencode(raw.path)) as source:
                final = _StemFile(
                    self._partial / f"{stem}.{self._format}",
                    _ENCODINGS[self._format],
                    source.channels,
                    self.sample_rate,
                    self.sample_rate,
                    raw.frames,
                )
                finals.append(final)
                for frames in source.blocks(1 << 16, dtype="float32", always_2d=True):
                    final.write((frames * np.float32(self.gain)).T)
                final.finish(raw.frames)
            raw.path.unlink()
        self._files = finals

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn what the file system or libsndfile raises into a sentence."""
        try:
            yield
        # soundfile asserts that all frames were written.
        except (OSError, AssertionError, soundfile.SoundFileError) as error:
            free = shutil.disk_usage(self._partial.parent).free
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or (
                free < _DISK_FULL_BYTES
            ):
                raise DiskFullError(
                    f"The disk of '{self._folder.parent}' is full ({free / 1e6:.1f} MB left); "
                    "nothing was kept of this track. Free some space or choose another --out."
                ) from None
            raise OutputError(
                f"The stems cannot be written to '{self._folder}' ({error}); nothing was kept "
                "of this track."
            ) from None


def _partial_folder(folder: Path) -> Path:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise OutputNotWritableError(
                f"'{folder}' exists and is no folder that may be written to; remove it or "
                "choose another --out."
            )
        path = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:12]}.partial"
        path.mkdir()
        return path
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"The disk of '{folder.parent}' is full; free some space or choose another --out."
            ) from None
        raise OutputNotWritableError(
            f"The output folder '{folder.parent}' cannot be written to ({error.strerror}); "
            "choose another with --out."
        ) from None
