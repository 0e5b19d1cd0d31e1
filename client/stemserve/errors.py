"""The one hierarchy of errors.

Every error that reaches a caller is a :class:`StemserveError` whose text is a sentence: what was
wrong, what was expected, what to do next. ``exit_code`` is what the command line exits with; it
differs by cause, so that a script can tell them apart without reading text.

Codes 1 and 2 are left to unforeseen failures and to wrong command-line usage, 130 to Ctrl-C.
"""

from __future__ import annotations

from typing import ClassVar


class StemserveError(Exception):
    """Root of all errors that stemserve raises on purpose."""

    exit_code: ClassVar[int] = 1


# --- audio that comes in (10-19) ------------------------------------------------------------


class AudioInputError(StemserveError):
    """The input cannot be separated."""

    exit_code = 10


class NotAudioError(AudioInputError):
    """The file is not audio in a format that libsndfile decodes."""

    exit_code = 11


class TruncatedAudioError(AudioInputError):
    """The file ends before the audio that its header announces."""

    exit_code = 12


class EmptyAudioError(AudioInputError):
    """The file has no bytes, or a header and no samples."""

    exit_code = 13


class NonFiniteAudioError(AudioInputError):
    """A sample is NaN or infinite."""

    exit_code = 14


class ChannelCountError(AudioInputError):
    """More channels than any layout that we know how to mix down."""

    exit_code = 15


class SampleRateError(AudioInputError):
    """A sample rate outside the range that can be resampled sensibly."""

    exit_code = 16


class InputMissingError(AudioInputError):
    """There is no such file."""

    exit_code = 17


class InputUnreadableError(AudioInputError):
    """The file exists and may not be read."""

    exit_code = 18


# --- files that go out (20-29) --------------------------------------------------------------


class OutputError(StemserveError):
    """The stems cannot be written."""

    exit_code = 20


class OutputNotWritableError(OutputError):
    """The output folder cannot be created or written to."""

    exit_code = 21


class DiskFullError(OutputError):
    """The disk filled up while stems were being written."""

    exit_code = 22


# --- the server that is called (30-39) ------------------------------------------------------


class ServerError(StemserveError):
    """The server answered with an error that has no class of its own."""

    exit_code = 30


class ServerUnreachableError(ServerError):
    """Nothing answers at the address."""

    exit_code = 31


class ServerLostError(ServerError):
    """The server went away in the middle of a track."""

    exit_code = 32


class ModelNotFoundError(ServerError):
    """The server does not serve the model."""

    exit_code = 33


class UnknownStemError(ServerError):
    """The model has no such stem."""

    exit_code = 34


class SpecError(ServerError):
    """The served model's description is missing, damaged, or newer than this client."""

    exit_code = 35


class OverloadedError(ServerError):
    """The server's queue is full, or the request waited in it for too long."""

    exit_code = 36


class DeadlineError(ServerError):
    """The server did not answer in time."""

    exit_code = 37


class InvalidResponseError(ServerError):
    """The server's answer breaks the tensor contract (shape, dtype, non-finite samples)."""

    exit_code = 38


# --- the local server that is started (40-49) -----------------------------------------------


class LocalServerError(StemserveError):
    """The local tritonserver cannot be started."""

    exit_code = 40


class PlatformError(LocalServerError):
    """NVIDIA's wheel has no server for this platform."""

    exit_code = 41


class PortTakenError(LocalServerError):
    """Another process listens on the port."""

    exit_code = 42


class ModelFileMissingError(LocalServerError):
    """The repository has the model's configuration and not its weights, or neither."""

    exit_code = 43


class EnvironmentMismatchError(LocalServerError):
    """A package of the server's environment is missing or of the wrong version."""

    exit_code = 44


class StartupError(LocalServerError):
    """The server did not become ready before its deadline."""

    exit_code = 45


# --- the export (50-59) ---------------------------------------------------------------------


class ExportError(StemserveError):
    """The model cannot be exported."""

    exit_code = 50


class UnknownModelError(ExportError):
    """The catalogue has no such model."""

    exit_code = 51


class DownloadError(ExportError):
    """The checkpoint cannot be fetched."""

    exit_code = 52


class DigestMismatchError(ExportError):
    """What was fetched is not what the catalogue pins."""

    exit_code = 53


class CheckpointError(ExportError):
    """The checkpoint is not in the format that the family reads."""

    exit_code = 54


class LicenceError(ExportError):
    """The licence of the weights was not accepted."""

    exit_code = 55


class GateError(ExportError):
    """An artefact does not do what its checkpoint does, within what its family allows."""

    exit_code = 56


class MissingExtraError(StemserveError):
    """A subcommand needs packages of an extra that is not installed."""

    exit_code = 60


# --- the evaluation (70-79) -----------------------------------------------------------------


class RegressionError(StemserveError):
    """A score is lower than the baseline's by more than the tolerance."""

    exit_code = 70


class EvaluationDataError(StemserveError):
    """References, estimates or a baseline that cannot be compared with each other."""

    exit_code = 71
