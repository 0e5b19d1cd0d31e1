"""What a checkpoint's arguments say about the network, checked against what is supported.

Source: demucs 4.1.0 (MIT), the signatures of ``HTDemucs`` and ``HDemucs``. Arguments that only
training reads are accepted with any value; those that change the network beyond what our graph has
are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Final

from stemserve.errors import CheckpointError
from stemserve_export.families.demucs_branches import LayerShape
from stemserve_export.families.demucs_layers import Axis
from stemserve_export.families.demucs_spectrum import CHANNELS, PARTS
from stemserve_export.weights.demucs import DemucsCheckpoint

N_FFT: Final = 4096
KERNEL: Final = 8
STRIDE: Final = 4
# Of the levels after the branches have merged.
MERGED_KERNEL: Final = 4
MERGED_STRIDE: Final = 2
# No argument of a network is larger; keeps absurd ones from being computed with.
MAX_NUMBER: Final = 1 << 20

# Arguments that must have one value (or be left out, where it is the default).
_FIXED: Final[dict[str, dict[str, Any]]] = {
    "both": {
        "audio_channels": 2,
        "channels_time": None,
        "growth": 2,
        "nfft": N_FFT,
        "wiener_iters": 0,
        "end_iters": 0,
        "wiener_residual": False,
        "cac": True,
        "rewrite": True,
        "multi_freqs": [],
        "kernel_size": KERNEL,
        "stride": STRIDE,
        "time_stride": MERGED_STRIDE,
        "context": 1,
        "context_enc": 0,
    },
    "HTDemucs": {
        "t_emb": "sin",
        "t_sin_random_shift": 0,
        "t_norm_in": True,
        "t_norm_in_group": False,
        "t_group_norm": False,
        "t_norm_first": True,
        "t_norm_out": True,
        "t_layer_scale": True,
        "t_gelu": True,
        "t_sparse_self_attn": False,
        "t_sparse_cross_attn": False,
        "use_train_segment": True,
    },
    "HDemucs": {"hybrid": True, "hybrid_old": False},
}
# Arguments with their defaults, which shape the network.
_SHAPING: Final[dict[str, dict[str, Any]]] = {
    "both": {
        "channels": 48,
        "freq_emb": 0.2,
        "emb_scale": 10,
        "norm_starts": 4,
        "norm_groups": 4,
        "dconv_mode": 1,
        "dconv_depth": 2,
        "samplerate": 44100,
    },
    "HTDemucs": {
        "depth": 4,
        "dconv_comp": 8,
        "bottom_channels": 0,
        "t_layers": 5,
        "t_hidden_scale": 4.0,
        "t_heads": 8,
        "t_max_period": 10000.0,
        "t_weight_pos_embed": 1.0,
        "t_cross_first": False,
        "segment": 10,
    },
    "HDemucs": {"depth": 6, "dconv_comp": 4, "dconv_attn": 4, "dconv_lstm": 4, "segment": 40},
}
# Arguments of training, or of variants that are refused above.
_IGNORED: Final = frozenset(
    (
        "multi_freqs_depth",
        "emb_smooth",
        "dconv_init",
        "rescale",
        "t_dropout",
        "t_max_positions",
        "t_weight_decay",
        "t_lr",
        "t_cape_mean_normalize",
        "t_cape_augment",
        "t_cape_glob_loc_scale",
        "t_mask_type",
        "t_mask_random_seed",
        "t_sparse_attn_window",
        "t_global_window",
        "t_sparsity",
        "t_auto_sparsity",
    )
)
# What the published checkpoints have in place of the defaults.
_PUBLISHED: Final[dict[str, dict[str, Any]]] = {
    "HTDemucs": {"dconv_mode": 3, "segment": Fraction(39, 5)},
    "HDemucs": {"dconv_mode": 1, "segment": 44},
}


@dataclass(frozen=True)
class Architecture:
    """Sizes of a network.

    Attributes:
        klass: "HTDemucs" or "HDemucs".
        sources: stems in the order of the network's outputs.
        segment: seconds that it was trained on.
        values: the arguments that shape it, by their published names.
    """

    klass: str
    sources: tuple[str, ...]
    segment: Fraction
    values: Mapping[str, Any]

    @property
    def depth(self) -> int:
        """Levels of the spectrogram branch."""
        return int(self.values["depth"])

    @property
    def n_fft(self) -> int:
        """Samples of a frame."""
        return N_FFT

    @property
    def merging(self) -> int | None:
        """Level at which the branches merge, because one bin is left; None if there is none."""
        level, bins = 0, self.n_fft // 2
        while bins > KERNEL:
            level, bins = level + 1, bins // STRIDE
        return level if level < self.depth else None

    def channels(self, level: int) -> int:
        """Channels at the inner end of a level."""
        return int(self.values["channels"] * 2**level)

    def spectral(self, level: int, steps: int) -> LayerShape:
        """The level's layers in the spectrogram branch, or in the merged one.

        ``steps`` is the number of positions along its axis at the inner end; of frames for the
        level where the branches merge.
        """
        merged = self.merging is not None and level > self.merging
        shape = self._shape(level, "samples" if merged else "bins", steps)
        if merged:
            return replace(shape, kernel=MERGED_KERNEL, stride=MERGED_STRIDE)
        return replace(shape, whole=level == self.merging)

    def waveform(self, level: int, steps: int) -> LayerShape:
        """The level's layers in the waveform branch."""
        return self._shape(level, "samples", steps)

    def _shape(self, level: int, axis: Axis, steps: int) -> LayerShape:
        values = self.values
        outputs = self.channels(level)
        parts = CHANNELS * PARTS if axis == "bins" else CHANNELS
        return LayerShape(
            axis=axis,
            inputs=self.channels(level - 1) if level else parts,
            outputs=outputs,
            kernel=KERNEL,
            stride=STRIDE,
            groups=values["norm_groups"] if level >= values["norm_starts"] else 0,
            hidden=int(outputs / values["dconv_comp"]),
            depth=abs(values["dconv_depth"]),
            dilated=values["dconv_depth"] > 0,
            recurrent=level >= values.get("dconv_lstm", level + 1),
            encoder_dconv=bool(values["dconv_mode"] & 1),
            decoder_dconv=bool(values["dconv_mode"] & 2),
            steps=steps,
        )


def architecture(
    checkpoint: DemucsCheckpoint, klass: str, stems: Sequence[str], sample_rate: int
) -> Architecture:
    """Read a checkpoint's arguments.

    Args:
        checkpoint: as read; one without arguments is taken for the published network with
            ``stems`` as its sources.
        klass: "HTDemucs" or "HDemucs", which the catalogue expects.
        stems: of the catalogue's row.
        sample_rate: of the catalogue's row, in Hz.

    Raises:
        CheckpointError: it is another network, or a variant that is not supported.
    """
    what = checkpoint.what
    if checkpoint.klass not in (None, klass):
        raise CheckpointError(
            f"'{what}' holds a network of class {checkpoint.klass}; expected {klass}. Choose the "
            "catalogue's model of that family."
        )
    given = dict(
        _of_plain(checkpoint, klass, stems) if checkpoint.kwargs is None else checkpoint.kwargs
    )
    sources = given.pop("sources", None)
    if not isinstance(sources, list) or not all(isinstance(name, str) for name in sources):
        raise CheckpointError(f"'{what}' does not name its sources; expected a list of stems.")
    fixed = {**_FIXED["both"], **_FIXED[klass]}
    shaping = {**_SHAPING["both"], **_SHAPING[klass]}
    for name, value in given.items():
        if name in fixed:
            _check_fixed(what, name, value, fixed[name])
        elif name in shaping:
            _check_number(what, name, value, shaping[name])
        elif name not in _IGNORED:
            raise CheckpointError(
                f"'{what}' has the argument '{name}', which {klass} does not have; it is of "
                "another network."
            )
    values = {name: given.get(name, default) for name, default in shaping.items()}
    found = Architecture(klass, tuple(sources), Fraction(values["segment"]), values)
    _check_sizes(what, found, stems, sample_rate)
    return found


def _of_plain(checkpoint: DemucsCheckpoint, klass: str, stems: Sequence[str]) -> Mapping[str, Any]:
    """Arguments of the published network, with what a state dict itself can tell."""
    arguments = {**_PUBLISHED[klass], "sources": list(stems)}
    upsampler = checkpoint.tensors.get("channel_upsampler.weight")
    if klass == "HTDemucs" and upsampler is not None:
        arguments["bottom_channels"] = len(upsampler)
    return arguments


def _check_fixed(what: str, name: str, value: object, wanted: object) -> None:
    # An empty list and nothing at all mean the same.
    if value != wanted and not (value in ([], None) and wanted in ([], None)):
        raise CheckpointError(
            f"'{what}' is a variant with {name} = {value!r}; only {wanted!r} is supported."
        )


def _check_number(what: str, name: str, value: object, default: object) -> None:
    kinds: tuple[type, ...] = (bool,) if isinstance(default, bool) else (int, float, Fraction)
    if isinstance(default, int) and name not in ("segment", "emb_scale", "dconv_comp"):
        kinds = (bool, int) if isinstance(default, bool) else (int,)
    number = isinstance(value, kinds) and (isinstance(default, bool) or not isinstance(value, bool))
    if not number or not abs(value) < MAX_NUMBER:  # type: ignore[arg-type]
        raise CheckpointError(
            f"'{what}' has {name} = {value!r}; expected a number like {default!r}."
        )


def _check_sizes(what: str, found: Architecture, stems: Sequence[str], sample_rate: int) -> None:
    values = found.values
    missing = [stem for stem in stems if stem not in found.sources]
    problems = {
        f"the stems {', '.join(found.sources)}, not {', '.join(missing)}": missing,
        f"a sample rate of {values['samplerate']} Hz where {sample_rate} Hz is expected": (
            values["samplerate"] != sample_rate
        ),
        "sizes that are not positive": not all(
            values[name] > 0
            for name in ("channels", "norm_groups", "dconv_comp", "depth", "segment", "freq_emb")
        ),
        f"a depth of {values['depth']}": (
            not 1 <= found.depth <= 4 if found.klass == "HTDemucs" else not 6 <= found.depth <= 7
        ),
        "recurrent layers before the branches merge, or without attention": (
            found.klass == "HDemucs"
            and (values["dconv_lstm"] != values["dconv_attn"] or values["dconv_lstm"] < 4)
        ),
        f"{values.get('t_layers')} transformer layers": values.get("t_layers", 1) < 1,
    }
    for problem, present in problems.items():
        if present:
            raise CheckpointError(
                f"'{what}' is a network with {problem}; this is not supported. Check which file "
                "and which model of the catalogue it is."
            )
