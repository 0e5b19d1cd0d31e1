"""Weights of Demucs models in their published formats: ``.th`` packages and safetensors.

Source: github.com/adefossez/demucs 4.1.0 (MIT), demucs/states.py and demucs/hf.py.

* ``.th``: ``torch.save`` of ``{klass, args, kwargs, state, training_args}``, tensors in half
  precision. ``klass`` is a pickled reference to the class; reading it the usual way imports and
  runs code. Here the class and ``fractions.Fraction`` (the segment's length) become inert
  stand-ins, and any other name is refused.
* safetensors: the tensors, and ``klass``, ``args`` and ``kwargs`` as JSON in the metadata.
* A plain state dict, which has no arguments: they are taken to be the published ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from stemserve.errors import CheckpointError
from stemserve_export.weights.torch_file import load_plain, state_dict

CLASSES: Final = {
    "HTDemucs": "demucs.htdemucs.HTDemucs",
    "HDemucs": "demucs.hdemucs.HDemucs",
}
# Far above what a segment's length needs, far below what costs time or memory.
_MAX_FRACTION_DIGITS: Final = 12


@dataclass(frozen=True)
class DemucsCheckpoint:
    """What a checkpoint holds.

    Attributes:
        what: its name, for errors.
        klass: name of the network's class, None for a plain state dict.
        kwargs: arguments that the network was made with, None for a plain state dict.
        tensors: state dict, float32.
    """

    what: str
    klass: str | None
    kwargs: Mapping[str, Any] | None
    tensors: Mapping[str, Tensor]


def read_checkpoint(path: Path) -> DemucsCheckpoint:
    """Read a checkpoint of any of the formats, running no code from it.

    Raises:
        CheckpointError: it is damaged, is no Demucs model, or asks for code to be run.
    """
    what = path.name
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(
            f"'{path}' cannot be read ({error.strerror}); expected a Demucs checkpoint."
        ) from None
    # safetensors: length of the JSON header, then the header.
    return _read_safetensors(path, what) if head[8:] == b"{" else _read_package(path, what)


def _read_package(path: Path, what: str) -> DemucsCheckpoint:
    allowed: list[Any] = [(_PickledFraction, "fractions.Fraction")]
    stand_ins = {name: type(name, (_PickledClass,), {}) for name in CLASSES}
    allowed += [(stand_ins[name], full_name) for name, full_name in CLASSES.items()]
    loaded = load_plain(path, what, allowed)
    if not isinstance(loaded, dict) or "state" not in loaded:
        return DemucsCheckpoint(what, None, None, state_dict(loaded, what))
    klass = loaded.get("klass")
    if klass not in stand_ins.values():
        raise CheckpointError(
            f"'{what}' is a package of {klass!r}; expected one of HTDemucs or HDemucs."
        )
    assert isinstance(klass, type)
    kwargs = _arguments(loaded.get("args"), loaded.get("kwargs"), what)
    return DemucsCheckpoint(what, klass.__name__, kwargs, _state(loaded["state"], what))


def _read_safetensors(path: Path, what: str) -> DemucsCheckpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"'{what}' is no readable safetensors file ({error}); fetch it again."
        ) from None
    if "structure" in metadata:
        raise _quantized(what)
    if "klass" not in metadata:
        return DemucsCheckpoint(what, None, None, _state(tensors, what))
    names = {full_name: name for name, full_name in CLASSES.items()}
    if metadata["klass"] not in names:
        raise CheckpointError(
            f"'{what}' is a model of {metadata['klass']!r}; expected one of HTDemucs or HDemucs."
        )
    try:
        args = json.loads(metadata.get("args", "[]"))
        kwargs = json.loads(metadata.get("kwargs", "{}"))
    except ValueError:
        raise CheckpointError(
            f"'{what}' has arguments that are no JSON in its metadata; fetch it again."
        ) from None
    checked = _arguments(args, kwargs, what)
    return DemucsCheckpoint(what, names[metadata["klass"]], checked, _state(tensors, what))


def _state(state: object, what: str) -> dict[str, Tensor]:
    if isinstance(state, Mapping) and "__quantized" in state:
        raise _quantized(what)
    return state_dict(state, what)


def _quantized(what: str) -> CheckpointError:
    return CheckpointError(
        f"'{what}' holds quantized weights (diffq), which need code of their own to be unpacked; "
        "use the model of the same name without '_q'."
    )


def _arguments(args: object, kwargs: object, what: str) -> dict[str, Any]:
    """Arguments as plain values; positional ones only as far as ``sources``."""
    args = () if args is None else args
    if not isinstance(args, list | tuple) or len(args) > 1 or not isinstance(kwargs, dict):
        raise CheckpointError(
            f"'{what}' has arguments of a form that no published model has; expected them by name."
        )
    named = {**({"sources": args[0]} if args else {}), **kwargs}
    return {str(name): _plain(value, what) for name, value in named.items()}


def _plain(value: object, what: str) -> Any:
    if isinstance(value, _PickledFraction):
        return _fraction(value.args, what)
    if isinstance(value, dict) and value.get("_type") == "fraction":
        return _fraction((value.get("numerator"), value.get("denominator")), what)
    if isinstance(value, list | tuple):
        return [_plain(item, what) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"'{what}' has a {type(value).__name__} among its arguments; expected numbers and names."
    )


def _fraction(args: tuple[object, ...], what: str) -> Fraction:
    """A fraction from its pickled arguments: one string, or two integers."""
    text = "/".join(str(part) for part in args)
    if len(text) <= _MAX_FRACTION_DIGITS and text.replace("/", "", 1).isdecimal():
        try:
            return Fraction(text)
        except (ValueError, ZeroDivisionError):
            pass
    raise CheckpointError(
        f"'{what}' has the fraction {text[:40]!r} among its arguments; expected one like 39/5."
    )


class _PickledFraction:
    """Stand-in for ``fractions.Fraction``: keeps the arguments, computes nothing."""

    def __init__(self, *args: object) -> None:
        self.args = args


class _PickledClass:
    """Stand-in for a network's class."""


class Weights:
    """Tensors of a state dict, taken one by one with the shape that the network needs.

    ``prefix`` is put before every name; ``at`` goes deeper.
    """

    def __init__(self, tensors: Mapping[str, Tensor], what: str) -> None:
        self._tensors = tensors
        self._what = what
        self._prefix = ""
        self._taken: set[str] = set()

    def at(self, name: str) -> Weights:
        """The tensors below ``name``."""
        below = Weights(self._tensors, self._what)
        below._prefix = f"{self._prefix}{name}."
        below._taken = self._taken
        return below

    def take(self, name: str, shape: Iterable[int]) -> Tensor:
        """Return a tensor; raises CheckpointError if it is missing or has another shape."""
        full, wanted = self._prefix + name, tuple(shape)
        if full not in self._tensors:
            raise CheckpointError(
                f"'{self._what}' has no tensor '{full}'; the network that its arguments describe "
                "has one. The file is incomplete, or of another model."
            )
        tensor = self._tensors[full]
        if tuple(tensor.shape) != wanted:
            raise CheckpointError(
                f"'{self._what}' has the shape {tuple(tensor.shape)} for '{full}'; the network "
                f"that its arguments describe has {wanted}. The file is of another model."
            )
        self._taken.add(full)
        return tensor

    def check_all_taken(self) -> None:
        """Raise CheckpointError if a tensor was not taken: the network is another one."""
        left = sorted(set(self._tensors) - self._taken)
        if left:
            raise CheckpointError(
                f"'{self._what}' has {len(left)} tensors that the network does not use, "
                f"'{left[0]}' among them; the file is of another model."
            )
