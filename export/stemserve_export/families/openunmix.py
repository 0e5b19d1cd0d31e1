"""Open-Unmix (umxhq, umxl): the separator that is exported.

Source: github.com/sigsep/open-unmix-pytorch v1.3.0 (MIT), openunmix/model.py, ``Separator``;
Stöter et al., "Open-Unmix - A Reference Implementation for Music Source Separation", JOSS 4(41),
2019. One network per target gives factors for the magnitudes of the mixture's spectrogram, a Wiener
step makes the stems' spectrograms from them.

**Option** ``wiener_iterations``: "1", as published, looks at all targets together, so that a graph
of any stem holds the networks of all four. "0" multiplies the mixture's spectrogram by the factors;
then a graph holds only the networks of its own stems, and one stem costs one network.

**Framing.** A chunk is 300 frames of 1024 samples, 6.9 s. The published Wiener step works on
excerpts of 300 frames: a chunk is one, and equals what the published code makes of these samples.
The networks were trained on excerpts of 6 s. Within a chunk the frames are centred and the ends
reflected, as the published code does at the ends of a track; overlapping chunks are crossfaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stemserve.errors import CheckpointError, ExportError
from stemserve_export.families import Framing
from stemserve_export.families.openunmix_network import Encoder, MaskNetwork
from stemserve_export.families.openunmix_wiener import MAX_FRAMES, WienerStep
from stemserve_export.spectral import InverseStft, Stft, StftPlan, window_envelope
from stemserve_export.weights.openunmix import (
    CHANNELS,
    HOP,
    N_BINS,
    N_FFT,
    TargetWeights,
    read_target,
)

if TYPE_CHECKING:
    from stemserve.spec import Precision
    from stemserve_export.catalog import CatalogEntry

CHUNK_FRAMES: Final = 300
WIENER_ITERATIONS: Final = ("0", "1")
_MARGIN: Final = N_FFT // 2


class OpenUnmixSeparator(nn.Module):
    """Mixture to stems, one chunk at a time: the graph that is exported.

    ``forward``: mixture ``[B, 2, chunk]`` float32 -> one ``[B, 2, chunk]`` per stem; ``chunk`` is
    ``(n_frames - 1) * 1024`` samples. Equal to ``openunmix.model.Separator`` on the same samples.

    Args:
        targets: the networks by target. With the Wiener step all of them take part.
        stems: the targets that are outputs, in order.
        wiener: whether to make the Wiener step.
        precision: of the networks; everything around them is float32.
        n_frames: frames of a chunk; at most 300 with the Wiener step.
    """

    def __init__(
        self,
        targets: Mapping[str, TargetWeights],
        stems: Sequence[str],
        *,
        wiener: bool,
        precision: Precision = "fp32",
        n_frames: int = CHUNK_FRAMES,
    ) -> None:
        super().__init__()
        # An excerpt must be longer than the reflection at its ends.
        if not 4 <= n_frames <= (MAX_FRAMES if wiener else n_frames):
            raise ExportError(
                f"A chunk of Open-Unmix has 4 to {MAX_FRAMES} frames; got {n_frames}."
            )
        self.plan = StftPlan(N_FFT, HOP, N_BINS, n_frames)
        self.chunk = (n_frames - 1) * HOP
        self.core_dtype = torch.float16 if precision == "fp16" else torch.float32
        used = list(targets) if wiener else list(stems)
        self.wanted = [used.index(stem) for stem in stems]
        self.stft = Stft(self.plan)
        self.inverse = InverseStft(self.plan)
        networks = [targets[name] for name in used]
        self.max_bin = networks[0].max_bin
        self.encoder = Encoder(networks).to(self.core_dtype)
        bins = self.plan.slot_bins().reshape(-1)
        self.networks = nn.ModuleList(
            MaskNetwork(network, bins, channels_apart=wiener).to(self.core_dtype)
            for network in networks
        )
        self.wiener = WienerStep(self.plan) if wiener else None
        envelope = torch.from_numpy(window_envelope(self.plan)[_MARGIN:-_MARGIN])
        self.compensation: Tensor
        self.register_buffer("compensation", (1 / envelope).float(), persistent=False)

    def forward(self, mixture: Tensor) -> tuple[Tensor, ...]:
        """``[B, 2, chunk]`` -> stems x ``[B, 2, chunk]``."""
        padded = F.pad(mixture, (_MARGIN, _MARGIN), mode="reflect")
        packed = self.stft(padded.reshape(-1, self.plan.n_samples))
        encoded = self.encoder(self.magnitude(packed).to(self.core_dtype))
        factors = [
            [channels.float() for channels in network(frames)]
            for network, frames in zip(self.networks, encoded, strict=True)
        ]
        if self.wiener is None:
            spectrograms = [self.scaled(packed, factor) for (factor,) in factors]
        else:
            spectrograms = self.wiener(packed, factors, self.wanted)
        return tuple(self.signal(spectrogram) for spectrogram in spectrograms)

    def magnitude(self, packed: Tensor) -> Tensor:
        """``[B x 2, packed_rows, T]`` -> magnitudes of the lowest bins ``[B, 2 max_bin, T]``."""
        real = torch.index_select(packed, 1, self.stft.real_rows[: self.max_bin])
        imag = torch.index_select(packed, 1, self.stft.imag_rows[: self.max_bin])
        magnitude = torch.sqrt(real * real + imag * imag)
        return magnitude.reshape(-1, CHANNELS * self.max_bin, self.plan.n_frames)

    def scaled(self, packed: Tensor, factor: Tensor) -> Tensor:
        """``[B x 2, packed_rows, T]``, ``[B, packed_rows, T]`` -> as the first.

        A factor per channel and bin scales real and imaginary part.
        """
        slots, width = self.plan.outer // 2, 2 * self.plan.columns * self.plan.n_frames
        parts = packed.reshape(-1, slots, 2, width) * factor.reshape(-1, slots, 1, width)
        return parts.reshape(-1, self.plan.packed_rows, self.plan.n_frames)

    def signal(self, packed: Tensor) -> Tensor:
        """``[B x 2, packed_rows, T]`` -> ``[B, 2, chunk]``.

        At the ends fewer frames cover a sample: the sum of their squared windows is no constant.
        """
        signal: Tensor = self.inverse(packed)[:, _MARGIN:-_MARGIN] * self.compensation
        return signal.reshape(-1, CHANNELS, self.chunk)


def framing(options: Mapping[str, str]) -> Framing:
    """Return the framing of the graph that is built with these options.

    Raises:
        ExportError: ``wiener_iterations`` is neither "0" nor "1".
    """
    _wiener(options)
    return Framing((CHUNK_FRAMES - 1) * HOP, tail="centred")


def build(
    entry: CatalogEntry, files: Mapping[str, Path], precision: Precision = "fp32"
) -> OpenUnmixSeparator:
    """Build the separator from published weights, a ``.pth`` file per target.

    Args:
        entry: the catalogue's row. ``entry.stems`` are the outputs; ``entry.options`` has
            ``wiener_iterations``.
        files: local copies by target. With the Wiener step all of them take part, and there must
            be at least two; without it only those of ``entry.stems`` are read.
        precision: of the networks. With "fp16" the LSTM's state is float16, too, where an engine
            has such an operator (TensorRT has; ONNX Runtime's CPU computes it in float32).

    Raises:
        CheckpointError: a file is missing, is not what the network needs, or does not fit the
            others.
        ExportError: the option has an unknown value.
    """
    wiener = _wiener(entry.options)
    missing = [stem for stem in entry.stems if stem not in files]
    if missing:
        raise CheckpointError(
            f"There is no checkpoint for '{missing[0]}' of '{entry.name}', only for "
            f"{', '.join(files) or 'nothing'}; Open-Unmix has one file per stem."
        )
    if wiener and len(files) < 2:
        raise CheckpointError(
            f"The Wiener step of '{entry.name}' needs the networks of all targets, not only of "
            f"{', '.join(files)}; give all files, or export with wiener_iterations=0."
        )
    names = list(files) if wiener else list(entry.stems)
    targets = {name: read_target(files[name], name) for name in names}
    first, *others = targets.values()
    for name, target in zip(names[1:], others, strict=True):
        if (target.hidden, target.max_bin) != (first.hidden, first.max_bin):
            raise CheckpointError(
                f"The checkpoints of '{entry.name}' do not belong together: '{names[0]}' is "
                f"{first.hidden} wide and looks at {first.max_bin} bins, '{name}' is "
                f"{target.hidden} wide and looks at {target.max_bin}. Take all from one model."
            )
    return OpenUnmixSeparator(targets, entry.stems, wiener=wiener, precision=precision).eval()


def _wiener(options: Mapping[str, str]) -> bool:
    value = options.get("wiener_iterations", "1")
    if value not in WIENER_ITERATIONS:
        raise ExportError(
            f'wiener_iterations must be "0" or "1" and is "{value}". One iteration is what '
            "Open-Unmix publishes; it says itself that more of them add artefacts."
        )
    return value == "1"
