"""A small data set in MUSDB's layout, rendered: four instruments that sound all the time."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

RATE = 44100
STEMS = ("vocals", "drums", "bass", "other")

Signals = dict[str, npt.NDArray[np.float32]]


def render_stems(seconds: float = 3.0, seed: int = 0, rate: int = RATE) -> Signals:
    """Vocals, drums, bass and other, each [frames, 2] float32, peak about 0.2."""
    rng = np.random.default_rng(seed)
    frames = round(seconds * rate)
    time = np.arange(frames) / rate
    root = 55 * 2 ** (rng.integers(0, 12) / 12)
    beat = (time * 2) % 1

    def tone(frequency: npt.ArrayLike, partials: int) -> npt.NDArray[np.float64]:
        phase = 2 * np.pi * np.cumsum(np.broadcast_to(frequency, frames)) / rate
        return sum(np.sin(k * phase) / k for k in range(1, partials + 1))

    vibrato = 1 + 0.01 * np.sin(2 * np.pi * 5.5 * time)
    note = 2.0 ** (rng.integers(0, 12, int(seconds * 3) + 1)[(time * 3).astype(int)] / 12)
    signals = {
        "vocals": tone(8 * root * note * vibrato, 6) * (0.3 + np.sin(np.pi * (time * 3 % 1)) ** 2),
        "drums": rng.normal(size=frames) * np.exp(-12 * beat),
        "bass": tone(root, 4) * (1 - 0.5 * beat),
        "other": sum(tone(4 * root * 2 ** (step / 12), 3) for step in (0, 4, 7)),
    }
    pans = {"vocals": 0.55, "drums": 0.4, "bass": 0.5, "other": 0.7}
    stems = {}
    for stem, mono in signals.items():
        # A little room differs between the sides: equal ones would leave BSS Eval's filters open.
        sides = [mono * (1 - pans[stem]), np.roll(mono, 7) * pans[stem]]
        sides = np.stack(sides, axis=1) + rng.normal(0, 1e-4, (frames, 2))
        stems[stem] = (0.2 * sides / np.abs(sides).max()).astype(np.float32)
    return stems


def mix(stems: Mapping[str, npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """The sum of all stems."""
    return np.sum(list(stems.values()), axis=0, dtype=np.float32)


def write_signals(folder: Path, signals: Mapping[str, npt.NDArray[np.float32]], rate: int = RATE):
    """Write <name>.wav (32-bit float) for each signal."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, samples in signals.items():
        path = os.fsencode(folder / f"{name}.wav")  # soundfile refuses names that are not UTF-8
        soundfile.write(path, samples, rate, subtype="FLOAT", format="WAV")


def write_track(folder: Path, stems: Signals, rate: int = RATE) -> Signals:
    """Write a track with its mixture; returns the stems."""
    write_signals(folder, {"mixture": mix(stems), **stems}, rate)
    return stems


def leaky(stems: Signals, leak: float = 0.1, noise: float = 0.003, seed: int = 9) -> Signals:
    """Estimates with some of everything else in them, and noise."""
    rng = np.random.default_rng(seed)
    mixture = mix(stems)
    return {
        stem: (
            samples + leak * (mixture - samples) + rng.normal(0, noise, samples.shape)
        ).astype(np.float32)
        for stem, samples in stems.items()
    }  # fmt: skip


def write_dataset(
    folder: Path,
    names: tuple[str, ...],
    estimates: Path | None = None,
    estimate: Callable[[Signals], Signals] = leaky,
    seconds: float = 3.0,
) -> None:
    """Write a track per name, seeded by its place, and its estimates."""
    for seed, name in enumerate(names):
        stems = write_track(folder / name, render_stems(seconds, seed))
        if estimates is not None:
            write_signals(estimates / name, estimate(stems))
