"""Thin client of stemserve: separate music into stems through an NVIDIA Triton server.

>>> from stemserve import Separator
>>> with Separator("localhost:8001", model="spleeter_2stems") as separator:   # doctest: +SKIP
...     result = separator.separate("song.mp3", "separated")

Importing this package imports neither torch nor onnx.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from stemserve.errors import StemserveError

if TYPE_CHECKING:
    from stemserve.async_separator import AsyncSeparator
    from stemserve.result import Result
    from stemserve.separator import Separator
    from stemserve.spec import ModelSpec

try:
    __version__ = version("stemserve")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["AsyncSeparator", "ModelSpec", "Result", "Separator", "StemserveError", "__version__"]

_HOMES = {
    "AsyncSeparator": "stemserve.async_separator",
    "ModelSpec": "stemserve.spec",
    "Result": "stemserve.result",
    "Separator": "stemserve.separator",
}


def __getattr__(name: str) -> Any:
    # Lazily, so that `stemserve --help` does not pay for grpc and soundfile.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'stemserve' has no attribute {name!r}")
