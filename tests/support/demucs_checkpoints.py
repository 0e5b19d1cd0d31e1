"""Seeded Demucs checkpoints in the published formats, made with the demucs package.

The weights are random but not degenerate: layer scales of 0.3 to 0.7 instead of the 1e-3 that
training starts from, normalisations with gains and shifts of their own, biases that are not zero.
Every layer takes part in what comes out, and the outputs have about the level of the input.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from support.torchaudio_stub import ensure_torchaudio

FOUR = ("drums", "bass", "other", "vocals")
SIX = (*FOUR, "guitar", "piano")

# What the published checkpoints have where it is not the default, and what their pickles spell out
# besides.
HTDEMUCS: dict[str, Any] = {
    "sources": list(FOUR),
    "audio_channels": 2,
    "samplerate": 44100,
    "segment": Fraction(39, 5),
    "channels": 48,
    "channels_time": None,
    "cac": True,
    "wiener_iters": 0,
    "multi_freqs": [],
    "multi_freqs_depth": 3,
    "bottom_channels": 512,
    "dconv_mode": 3,
    "dconv_comp": 8,
    "dconv_init": 0.001,
    "t_layers": 5,
    "t_heads": 8,
    "t_hidden_scale": 4.0,
    "t_dropout": 0.02,
    "t_cape_glob_loc_scale": [5000.0, 1.0, 1.4],
    "t_sparse_attn_window": 400,
    "rescale": 0.1,
}
HTDEMUCS_6S: dict[str, Any] = {**HTDEMUCS, "sources": list(SIX), "bottom_channels": 0}
HDEMUCS_MMI: dict[str, Any] = {
    "sources": list(FOUR),
    "audio_channels": 2,
    "samplerate": 44100,
    "segment": 44,
    "channels": 48,
    "cac": True,
    "hybrid": True,
    "hybrid_old": False,
    "dconv_mode": 1,
    "multi_freqs": [],
    "rescale": 0.1,
}
# The same networks with fewer channels, layers and heads, for a segment of half a second.
SMALL_HTDEMUCS: dict[str, Any] = {
    **HTDEMUCS,
    "channels": 8,
    "bottom_channels": 32,
    "t_layers": 3,
    "t_heads": 4,
    "segment": Fraction(1, 2),
}
SMALL_HTDEMUCS_6S: dict[str, Any] = {
    **SMALL_HTDEMUCS,
    "sources": list(SIX),
    "bottom_channels": 0,
}
SMALL_HDEMUCS: dict[str, Any] = {**HDEMUCS_MMI, "channels": 8}

# Brings the outputs to about the level of the input.
OUTPUT_GAIN = {"HTDemucs": 2.0, "HDemucs": 6.0}


def network(klass: str, arguments: dict[str, Any], seed: int = 0) -> nn.Module:
    """The demucs package's own network with seeded weights that half precision holds exactly."""
    ensure_torchaudio()
    from demucs.hdemucs import HDemucs
    from demucs.htdemucs import HTDemucs

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module: nn.Module = {"HTDemucs": HTDemucs, "HDemucs": HDemucs}[klass](**arguments)
    normalized = {
        f"{name}.{parameter}"
        for name, member in module.named_modules()
        if isinstance(member, nn.GroupNorm | nn.LayerNorm)
        for parameter in ("weight", "bias")
    }
    outermost = [
        f"{branch}.{len(module.get_submodule(branch)) - 1}.conv_tr.weight"  # type: ignore[arg-type]
        for branch in ("decoder", "tdecoder")
    ]
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(".scale"):
                tensor.copy_(0.5 + 0.2 * noise.clamp(-1, 1))
            elif name in normalized:
                tensor.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
            elif name.endswith("bias"):
                tensor.copy_(0.1 * noise)
            elif name in outermost:
                tensor.mul_(OUTPUT_GAIN[klass])
            tensor.copy_(tensor.half())
    return module.eval()


def snr_db(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Ratio of the expected signal's power to that of the difference, in dB."""
    error = (found.double() - expected.double()).pow(2).sum()
    return float(10 * torch.log10(expected.double().pow(2).sum() / error))


def package(module: nn.Module) -> dict[str, Any]:
    """What demucs stores of a network, tensors in half precision."""
    arguments = module._init_args_kwargs  # type: ignore[union-attr]
    return {
        "klass": type(module),
        "args": arguments[0],
        "kwargs": arguments[1],
        "state": {name: value.half() for name, value in module.state_dict().items()},
        "training_args": {"dset": {"samplerate": 44100}, "optim": {"lr": 3e-4}},
    }


def write_th(module: nn.Module, path: Path) -> Path:
    """A ``.th`` package, as ``demucs.states.save_with_checksum`` writes it."""
    torch.save(package(module), path)
    return path


def write_safetensors(module: nn.Module, path: Path) -> Path:
    """A safetensors file with the arguments in its metadata, as the Hugging Face hub has them."""
    from safetensors.torch import save_file

    content = package(module)
    klass = content["klass"]
    metadata = {
        "klass": f"{klass.__module__}.{klass.__qualname__}",
        "args": json.dumps(content["args"], default=_encode),
        "kwargs": json.dumps(content["kwargs"], default=_encode),
    }
    state = {name: value.contiguous() for name, value in content["state"].items()}
    save_file(state, path, metadata)
    return path


def _encode(value: object) -> dict[str, object]:
    assert isinstance(value, Fraction)
    return {
        "_type": "fraction",
        "numerator": value.numerator,
        "denominator": value.denominator,
    }
