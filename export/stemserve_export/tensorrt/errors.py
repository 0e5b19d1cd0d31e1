"""What can go wrong around TensorRT; exit codes go on where the export's end."""

from __future__ import annotations

from stemserve.errors import ExportError


class TensorRTError(ExportError):
    """TensorRT does not take a graph, or fails to build it."""

    exit_code = 57


class EngineMismatchError(ExportError):
    """An engine is missing, damaged, or not for this graph, TensorRT or GPU."""

    exit_code = 58


class GpuError(ExportError):
    """The machine has no GPU that can be used."""

    exit_code = 59
