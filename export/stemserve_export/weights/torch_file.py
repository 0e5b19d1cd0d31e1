"""Files that ``torch.save`` wrote, read by torch's restricted unpickler."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stemserve.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Arrays = Mapping[str, npt.NDArray[np.float32]]


def load_plain(source: bytes | Path, what: str, allowed: Sequence[Any] = ()) -> Any:
    """Load what ``torch.save`` wrote, running no code from it.

    Tensors, containers, strings and numbers are read; any other class that the pickle names is
    refused before it is looked up.

    Args:
        source: the file, or its content.
        what: its name, for errors.
        allowed: harmless classes to accept besides, as ``torch.serialization.safe_globals`` takes
            them: a class, or (stand-in, the name that the pickle has).

    Raises:
        CheckpointError: it cannot be read, is damaged, or asks for anything else.
    """
    import torch

    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(
                io.BytesIO(source) if isinstance(source, bytes) else source,
                weights_only=True,
                map_location="cpu",
            )
    except Exception as error:  # torch raises whatever the damage leads to
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else f"{_cause(error)}"
        raise CheckpointError(
            f"'{what}' cannot be read as plain weights ({reason}); expected a file that torch.save "
            "wrote, of names and arrays only. Nothing in it was run."
        ) from None


def _cause(error: Exception) -> str:
    return str(error.strerror) if isinstance(error, OSError) and error.strerror else "it is damaged"


def read_arrays(data: bytes, what: str) -> Arrays:
    """Read a torch-saved mapping of names to float32 numpy arrays, running no code from it.

    Args:
        data: the file's content.
        what: its name, for errors.

    Raises:
        CheckpointError: it is damaged, holds anything else, or asks for code to be run.
    """
    allowed: list[Any] = [
        # How numpy pickles an array; the name is the one that numpy 1 wrote.
        (np.ndarray.__reduce__(np.zeros(1))[0], "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        np.dtypes.Float32DType,
    ]
    loaded = load_plain(data, what, allowed)
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str)
        and isinstance(value, np.ndarray)
        and value.dtype == np.float32
        and np.isfinite(value).all()
        for name, value in loaded.items()
    ):
        raise CheckpointError(
            f"'{what}' holds something else than finite float32 arrays by name; expected the "
            "published weights."
        )
    return loaded


def state_dict(loaded: object, what: str) -> dict[str, Tensor]:
    """Check that a loaded object is a state dict, and return it with floats as float32.

    Args:
        loaded: what :func:`load_plain` gave, or a part of it.
        what: its name, for errors.

    Raises:
        CheckpointError: it is no mapping of names to finite, dense tensors.
    """
    import torch

    if not isinstance(loaded, Mapping) or not loaded:
        raise CheckpointError(
            f"'{what}' holds no state dict (a {type(loaded).__name__}); expected names and tensors."
        )
    tensors: dict[str, Tensor] = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"'{what}' holds {type(value).__name__} under {name!r}; expected tensors by name."
            )
        if not _is_plain(value):
            raise CheckpointError(
                f"'{what}' holds no plain array of numbers under {name!r} ({value.layout}, "
                f"{value.dtype}); expected the dense tensors of a state dict."
            )
        tensor = value.detach()
        if tensor.is_floating_point():
            tensor = tensor.float()
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"'{what}' has NaN or infinity in '{name}'; its training failed, or the file "
                    "is damaged."
                )
        tensors[name] = tensor
    return tensors


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor is a dense real array whose elements are all in the file."""
    import torch

    if value.layout != torch.strided or value.device.type != "cpu":
        return False
    if value.is_quantized or value.is_complex():
        return False
    # A few bytes can claim any shape by strides of 0.
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()
