"""Audio that artefacts are measured on: a rendered song whose stems are known, and odd inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]
_Signal = npt.NDArray[np.float64]

_BEAT_S: Final = 0.5
_CHORDS: Final = ((0, 4, 7), (9, 12, 16), (5, 9, 12), (7, 11, 14))  # semitones above the root
_ROOT_HZ: Final = 65.4
_MELODY: Final = (12, 16, 19, 16, 21, 19, 17, 14)
# First three formants of a, i, o and e, Hz (Peterson and Barney, JASA 24(2), 1952).
_FORMANTS: Final = ((730, 1090, 2440), (270, 2290, 3010), (570, 840, 2410), (530, 1840, 2480))
_PANS: Final = {
    "vocals": 0.5, "drums": 0.45, "bass": 0.5, "piano": 0.3, "guitar": 0.7, "strings": 0.6,
}  # fmt: skip
_SQUARE_HZ: Final = 100


@dataclass(frozen=True)
class Song:
    """A song with its sources.

    Attributes:
        name: what it is called in a report.
        sources: by name, [2, n] float32 each.
        mixture: their sum, [2, n] float32.
    """

    name: str
    sources: Mapping[str, Samples]
    mixture: Samples

    def reference(self, stem: str, stems: Sequence[str]) -> Samples | None:
        """Return what a model with these stems should give for one of them, None if unknown.

        ``accompaniment`` is all but the vocals; ``other`` what has no stem of its own, where
        vocals, drums and bass always have one, even if another model serves it.
        """
        if stem in self.sources and stem != "other":
            return self.sources[stem]
        named = {"vocals", "drums", "bass", *stems} - {"other", "accompaniment"}
        if stem == "other":
            left = [source for name, source in self.sources.items() if name not in named]
        elif stem == "accompaniment":
            left = [source for name, source in self.sources.items() if name != "vocals"]
        else:
            return None
        return np.sum(left, axis=0, dtype=np.float32) if left else None


@lru_cache(maxsize=2)
def rendered_song(n_samples: int, sample_rate: int) -> Song:
    """Render a song of drums, bass, piano, guitar, strings and a voice; always the same.

    All sources sound all the time, so that none is measured on silence.

    Args:
        n_samples: length.
        sample_rate: Hz.
    """
    rng = np.random.default_rng(20_230_301)
    mono = {
        "vocals": _voice(n_samples, sample_rate),
        "drums": _drums(n_samples, sample_rate, rng),
        "bass": _plucked(n_samples, sample_rate, _bass_notes(n_samples / sample_rate), 6, 3.0),
        "piano": _plucked(n_samples, sample_rate, _chord_notes(n_samples / sample_rate), 8, 2.5),
        "guitar": _plucked(n_samples, sample_rate, _strummed(n_samples / sample_rate), 12, 1.5),
        "strings": _strings(n_samples, sample_rate),
    }
    levels = {"vocals": 0.09, "drums": 0.07, "bass": 0.08, "piano": 0.05, "guitar": 0.05}
    sources: dict[str, Samples] = {}
    for name, raw in mono.items():
        signal = raw * (levels.get(name, 0.04) / max(1e-12, float(np.sqrt(np.mean(raw**2)))))
        delay = min(len(signal), round(0.0004 * sample_rate * (1 + len(sources))))
        right = np.concatenate([np.zeros(delay), signal[: len(signal) - delay]])
        pan = _PANS[name]
        sides = np.stack([signal * np.sqrt(2 * (1 - pan)), right * np.sqrt(2 * pan)])
        sources[name] = sides.astype(np.float32)
    return Song("rendered song", sources, np.sum(list(sources.values()), axis=0, dtype=np.float32))


def odd_inputs(channels: int, n_samples: int) -> Iterator[tuple[str, Samples]]:
    """Yield names and chunks, [1, channels, n_samples] float32, that break careless arithmetic."""
    shape = (1, channels, n_samples)
    time = np.arange(n_samples)
    period = max(2, 44100 // _SQUARE_HZ)
    square = np.where(time % period < period // 2, 1.0, -1.0)
    impulse = np.zeros(n_samples)
    impulse[n_samples // 2] = 1.0
    noise = np.random.default_rng(1).uniform(-1e-6, 1e-6, shape)
    yield "silence", np.zeros(shape, np.float32)
    yield "DC", np.full(shape, 0.5, np.float32)
    yield "full-scale square", np.broadcast_to(square, shape).astype(np.float32)
    yield "impulse", np.broadcast_to(impulse, shape).astype(np.float32)
    yield "1e-6 noise", noise.astype(np.float32)


# --- instruments ------------------------------------------------------------------------------

_Note = tuple[float, float, float]  # start in s, length in s, frequency in Hz


def _hz(semitones: float) -> float:
    return float(_ROOT_HZ * 2.0 ** (semitones / 12))


def _beats(duration_s: float) -> Iterator[tuple[int, float]]:
    for number in range(int(duration_s / _BEAT_S) + 1):
        yield number, number * _BEAT_S


def _chord(beat: int) -> tuple[int, ...]:
    return _CHORDS[beat // 4 % len(_CHORDS)]


def _bass_notes(duration_s: float) -> list[_Note]:
    return [
        (start, 1.2 * _BEAT_S, _hz(_chord(beat)[0] + (7 if beat % 4 == 3 else 0) - 12))
        for beat, start in _beats(duration_s)
    ]


def _chord_notes(duration_s: float) -> list[_Note]:
    return [
        (start, 3 * _BEAT_S, _hz(step + 12))
        for beat, start in _beats(duration_s)
        if beat % 2 == 0
        for step in _chord(beat)
    ]


def _strummed(duration_s: float) -> list[_Note]:
    return [
        (start + _BEAT_S / 2 * half + 0.012 * string, _BEAT_S, _hz(step + 24))
        for beat, start in _beats(duration_s)
        for half in (0, 1)
        for string, step in enumerate(_chord(beat))
    ]


def _plucked(
    n_samples: int, rate: int, notes: Sequence[_Note], partials: int, decay: float
) -> _Signal:
    """Notes whose partials fade, the higher the faster."""
    signal = np.zeros(n_samples)
    for start_s, length_s, frequency in notes:
        start = round(start_s * rate)
        count = min(round(length_s * rate), n_samples - start)
        if count <= 0:
            continue
        time = np.arange(count) / rate
        attack = np.minimum(1, time / 0.004) * np.minimum(1, (count - np.arange(count)) / 200)
        for k in range(1, partials + 1):
            if k * frequency < 0.45 * rate:
                fade = np.exp(-decay * (0.6 + 0.4 * k) * time)
                phase = 2 * np.pi * k * frequency * time
                signal[start : start + count] += attack * fade * np.sin(phase) / k
    return signal


def _drums(n_samples: int, rate: int, rng: np.random.Generator) -> _Signal:
    signal = np.zeros(n_samples)
    for eighth in range(int(2 * n_samples / rate / _BEAT_S) + 1):
        start = round(eighth * _BEAT_S / 2 * rate)
        count = min(round(0.35 * rate), n_samples - start)
        if count <= 0:
            continue
        time = np.arange(count) / rate
        noise = rng.normal(size=count)
        hit = 0.25 * np.diff(noise, prepend=0) * np.exp(-70 * time)  # hi-hat
        if eighth % 4 == 0:
            hit += (
                1.5
                * np.sin(2 * np.pi * (50 * time + 6 * (1 - np.exp(-25 * time))))
                * np.exp(-12 * time)
            )
        elif eighth % 4 == 2:
            hit += (0.6 * noise + 0.5 * np.sin(2 * np.pi * 190 * time)) * np.exp(-18 * time)
        signal[start : start + count] += hit
    return signal


def _voice(n_samples: int, rate: int) -> _Signal:
    """Harmonics of a gliding pitch with vibrato, shaped by the formants of a vowel per note."""
    time = np.arange(n_samples) / rate
    note = (time / _BEAT_S).astype(int)
    pitches = np.array([_hz(step + 12) for step in _MELODY])[note % len(_MELODY)]
    glide = max(1, round(0.03 * rate))
    padded = np.pad(pitches, (glide, 0), mode="edge")
    sums = np.cumsum(padded)
    pitch = (sums[glide:] - sums[:-glide]) / glide
    pitch = pitch * (1 + 0.012 * np.sin(2 * np.pi * 5.5 * time))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    formants = np.array(_FORMANTS, float)[note % len(_FORMANTS)]
    signal: _Signal = np.zeros(n_samples)
    for k in range(1, 25):
        frequency = k * pitch
        gain = sum(1 / (1 + ((frequency - formants[:, i]) / 120) ** 2) for i in range(3))
        signal += np.where(frequency < 0.45 * rate, gain / k**0.5 * np.sin(k * phase), 0)
    signal *= 0.25 + np.sin(np.pi * (time / _BEAT_S % 1)) ** 2  # syllables
    return signal


def _strings(n_samples: int, rate: int) -> _Signal:
    time = np.arange(n_samples) / rate
    bars = (time / (4 * _BEAT_S)).astype(int) % len(_CHORDS)
    signal = np.zeros(n_samples)
    for voice in range(3):
        pitch = np.array([_hz(chord[voice] + 24) for chord in _CHORDS])[bars]
        phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.002 * np.sin(2 * np.pi * 0.7 * time))) / rate
        for k in range(1, 7):
            signal += np.where(k * pitch < 0.45 * rate, np.sin(k * phase) / k, 0)
    return signal
