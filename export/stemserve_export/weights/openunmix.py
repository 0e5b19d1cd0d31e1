"""Open-Unmix checkpoints: the state dict of one target per ``.pth`` file.

Source: github.com/sigsep/open-unmix-pytorch v1.3.0 (MIT), openunmix/model.py for names and shapes,
openunmix/utils.py for what its loader passes over, scripts/train.py for a folder of one's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from stemserve.errors import CheckpointError
from stemserve_export.weights.torch_file import load_plain, state_dict

SAMPLE_RATE: Final = 44100
N_FFT: Final = 4096
HOP: Final = 1024
CHANNELS: Final = 2
N_BINS: Final = N_FFT // 2 + 1

# In published files, and of no meaning to the network: the STFT's window, which early versions
# saved with it, and training's counters.
_PASSED_OVER: Final = ("stft.window", "transform.0.window", "sample_rate")
_COUNTER: Final = ".num_batches_tracked"
_DIRECTIONS: Final = ("", "_reverse")
# What train.py writes of the transform, and what the graph is built for.
_TRANSFORM: Final = {
    "sample_rate": SAMPLE_RATE,
    "nfft": N_FFT,
    "nhop": HOP,
    "nb_channels": CHANNELS,
}


@dataclass(frozen=True, slots=True)
class TargetWeights:
    """The network of one target, checked.

    Attributes:
        tensors: float32 tensors by their published names.
        hidden: width between the layers; 512 for umxhq, 1024 for umxl.
        max_bin: number of lowest bins that the network looks at; it writes all 2049.
        layers: number of bidirectional LSTM layers.
    """

    tensors: Mapping[str, Tensor]
    hidden: int
    max_bin: int
    layers: int


def read_target(path: Path, target: str) -> TargetWeights:
    """Read the network of one target, running no code from the file.

    Raises:
        CheckpointError: the file is not the state dict of an Open-Unmix for 44.1 kHz stereo with
            an FFT of 4096 samples and a bidirectional LSTM.
    """
    what = f"the Open-Unmix checkpoint of '{target}' ({path.name})"
    tensors = state_dict(load_plain(path, what), what)
    rate = tensors.get("sample_rate")
    if rate is not None and rate.numel() == 1 and float(rate) != SAMPLE_RATE:
        raise CheckpointError(
            f"{_capital(what)} is for {float(rate):g} Hz; expected {SAMPLE_RATE} Hz. Choose a "
            "model for music, like umxhq."
        )
    tensors = {
        name: value
        for name, value in tensors.items()
        if name not in _PASSED_OVER and not name.endswith(_COUNTER)
    }
    hidden = _size(tensors, "fc1.weight", 2, 0, what)
    max_bin = _size(tensors, "input_mean", 1, 0, what)
    layers = sum(name.startswith("lstm.weight_ih_l") for name in tensors) // len(_DIRECTIONS)
    _check(tensors, _expected_shapes(hidden, max_bin, max(1, layers)), what)
    if not 1 <= max_bin <= N_BINS:
        raise CheckpointError(
            f"{_capital(what)} looks at {max_bin} bins; an FFT of {N_FFT} samples has {N_BINS}. "
            "Check which file it is."
        )
    for norm in ("bn1", "bn2", "bn3"):
        if bool((tensors[f"{norm}.running_var"] < 0).any()):
            raise CheckpointError(
                f"{_capital(what)} has negative variances in {norm}.running_var; the file is "
                "damaged."
            )
    return TargetWeights(tensors, hidden, max_bin, layers)


def training_folder(folder: Path, targets: Iterable[str]) -> dict[str, Path]:
    """Return the weights of every target in a folder that Open-Unmix's train.py wrote.

    Such a folder holds ``separator.json`` with the transform, and per target ``<target>.pth`` (or
    ``<target>-<digest>.pth``) and ``<target>.json`` with the arguments of its training.

    Raises:
        CheckpointError: a file is missing, or was trained for another transform.
    """
    _check_transform(folder / "separator.json", {})
    files = {}
    for target in targets:
        candidates = [
            path
            for path in sorted(folder.glob("*.pth"))
            if path.stem == target or path.stem.startswith(f"{target}-")
        ]
        if len(candidates) != 1:
            raise CheckpointError(
                f"The folder '{folder}' holds {len(candidates)} checkpoints for '{target}'; "
                f"expected one, {target}.pth."
            )
        _check_transform(folder / f"{target}.json", {"unidirectional": False})
        files[target] = candidates[0]
    return files


def _check_transform(path: Path, also: Mapping[str, object]) -> None:
    try:
        loaded: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"'{path}' cannot be read ({error}); expected what Open-Unmix's train.py writes."
        ) from None
    # A target's file has the arguments of the training one level down.
    settings = loaded.get("args", loaded) if isinstance(loaded, dict) else {}
    for name, wanted in {**_TRANSFORM, **also}.items():
        if isinstance(settings, dict) and name in settings and settings[name] != wanted:
            raise CheckpointError(
                f"'{path}' says {name} = {settings[name]}; only {name} = {wanted} can be exported. "
                "Train a model with the settings of umxhq."
            )


def _expected_shapes(hidden: int, max_bin: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an Open-Unmix with a bidirectional LSTM."""
    cell = hidden // 2
    shapes: dict[str, tuple[int, ...]] = {
        "input_mean": (max_bin,),
        "input_scale": (max_bin,),
        "output_scale": (N_BINS,),
        "output_mean": (N_BINS,),
        "fc1.weight": (hidden, CHANNELS * max_bin),
        "fc2.weight": (hidden, 2 * hidden),
        "fc3.weight": (CHANNELS * N_BINS, hidden),
    }
    for norm, features in (("bn1", hidden), ("bn2", hidden), ("bn3", CHANNELS * N_BINS)):
        for parameter in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{parameter}"] = (features,)
    for layer in range(layers):
        for direction in _DIRECTIONS:
            suffix = f"_l{layer}{direction}"
            shapes[f"lstm.weight_ih{suffix}"] = (4 * cell, hidden)
            shapes[f"lstm.weight_hh{suffix}"] = (4 * cell, cell)
            shapes[f"lstm.bias_ih{suffix}"] = (4 * cell,)
            shapes[f"lstm.bias_hh{suffix}"] = (4 * cell,)
    return shapes


def _check(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(
                f"{_capital(what)} has no tensor '{name}'; a bidirectional Open-Unmix has one. "
                "Check which file it is."
            )
        found = tuple(tensors[name].shape)
        if found != shape:
            raise CheckpointError(
                f"{_capital(what)} has '{name}' of shape {found}; expected {shape}. Check that it "
                f"is an Open-Unmix for stereo with an FFT of {N_FFT} samples and a bidirectional "
                "LSTM."
            )
        if not tensors[name].is_floating_point():
            raise CheckpointError(
                f"{_capital(what)} has '{name}' as {tensors[name].dtype}; expected real numbers. "
                "Check which file it is."
            )
    unknown = sorted(set(tensors) - set(shapes))
    if unknown:
        raise CheckpointError(
            f"{_capital(what)} has '{unknown[0]}', which no Open-Unmix has; check which file it is."
        )


def _size(tensors: Mapping[str, Tensor], name: str, dims: int, axis: int, what: str) -> int:
    """Size of an axis, from which the other shapes follow."""
    if name not in tensors:
        raise CheckpointError(
            f"{_capital(what)} has no tensor '{name}'; an Open-Unmix has one. Check which file it "
            "is."
        )
    if tensors[name].ndim != dims or not tensors[name].numel():
        raise CheckpointError(
            f"{_capital(what)} has '{name}' of shape {tuple(tensors[name].shape)}; expected "
            f"{dims} axes that are not empty. Check which file it is."
        )
    return int(tensors[name].shape[axis])


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
