"""ModelSpec: the one description of a served separator, and its two codecs.

Everything that two rooms must agree on is stated here once. The exporter derives the ONNX input,
outputs and axes, the TensorRT profile and ``config.pbtxt`` from a :class:`ModelSpec`; the client
reads the spec back from the served ``ModelConfig`` and derives its chunk plan. What Triton's
configuration already says (name, tensor names, shapes, dtypes, batch limit) is read from there;
the rest travels in the configuration's ``parameters`` under the prefix ``stemserve.``.
"""

from __future__ import annotations

import dataclasses
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

_TRITON_DTYPES: Final[dict[str, WireDtype]] = {"TYPE_FP32": "fp32", "TYPE_FP16": "fp16"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where the weights come from.

    Attributes:
        source: URI of the published file (``https:``, ``pypi:`` or ``file:``).
        sha256: hex digest of that file, 64 characters.
        licence: SPDX identifier of the licence of the weights, or its published name.
        training_data: what the weights were trained on, as published.
    """

    source: str
    sha256: str
    licence: str
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
        overlap: default share of a chunk that is shared with its neighbour, in [0, 1). 0 with
            ``edge_samples`` > 0 is the published framing: chunks share just their edges.
        window: weight of a chunk's samples where overlapping chunks are crossfaded.
        normalization: ``track`` if the whole track's mean and standard deviation must be
            measured and removed first, ``none`` otherwise.
        wire_dtype: dtype of the tensors that travel.
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
    overlap: float
    window: Window
    normalization: Normalization
    wire_dtype: WireDtype
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
        if not 0 <= self.overlap < 1:
            problems.append(f"overlap must lie in [0, 1), got {self.overlap}")
        for name, allowed in (
            ("domain", get_args(Domain)),
            ("window", get_args(Window)),
            ("normalization", get_args(Normalization)),
            ("wire_dtype", get_args(WireDtype)),
        ):
            if getattr(self, name) not in allowed:
                problems.append(
                    f"{name} must be one of {', '.join(allowed)}, got '{getattr(self, name)}'"
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
            **{
                f"checkpoint.{entry.name}": getattr(self.checkpoint, entry.name)
                for entry in dataclasses.fields(Checkpoint)
            },
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
        checkpoint_keys = {f"checkpoint.{f.name}": f.name for f in dataclasses.fields(Checkpoint)}
        expected = set(_PLAIN_PARAMETERS) | set(checkpoint_keys)
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
        checkpoint = Checkpoint(**{name: values[key] for key, name in checkpoint_keys.items()})
        return cls(**tensors, **plain, checkpoint=checkpoint, options=options)


# Parameters that stand for a field of the same name, with the type that their text must have.
_PLAIN_PARAMETERS: Final[dict[str, type]] = {
    "version": int,
    "family": str,
    "domain": str,
    "sample_rate": int,
    "edge_samples": int,
    "lead_samples": int,
    "overlap": float,
    "window": str,
    "normalization": str,
}


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
