"""What deezer/spleeter does with a whole track, in ordinary eager PyTorch.

Written after spleeter/model/__init__.py (EstimatorSpecBuilder) and model/functions/unet.py (unet,
softmax_unet) of github.com/deezer/spleeter v2.3:
the parity reference of the exported graph, and the peer that its speed is compared with. It shares
the plain U-Net with the export and nothing else. Spectrograms are ``[2, frames, bins]``, the order
in which torch.stft lays them out in memory, so that no step here copies for a transposition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stemserve_export.families.spleeter import MaskExtension, Output
from stemserve_export.families.spleeter_unet import UNet

FRAME_LENGTH = 4096
FRAME_STEP = 1024
SEGMENT_FRAMES = 512
NETWORK_BINS = 1024
EPSILON = 1e-10
WINDOW_COMPENSATION_FACTOR = 2.0 / 3.0


@torch.inference_mode()
def separate_track(
    track: Tensor,
    unets: Sequence[UNet],
    mask_extension: MaskExtension,
    segment_frames: int = SEGMENT_FRAMES,
    output: Output = "sigmoid",
) -> list[Tensor]:
    """Separate a whole track: ``[2, samples]`` -> ``[2, samples]`` per network.

    The dtype of the track and of the networks decides the precision of the arithmetic. The
    published segment is 512 frames; small tests take fewer.
    """
    spectrogram = stft(track)
    n_frames = spectrogram.shape[1]
    magnitude = segments(spectrogram[:, :, :NETWORK_BINS].abs(), segment_frames)
    masks: list[list[Tensor]] = [[] for _ in unets]
    # One segment after the other: a batch of all of them is a third slower and takes gigabytes.
    for segment in torch.split(magnitude, 1):
        logits = [unet(segment) for unet in unets]
        if output == "sigmoid":
            factors = [torch.sigmoid(logit) for logit in logits]
        else:
            factors = list(torch.softmax(torch.stack(logits), dim=0))
        powers = [(factor * segment) ** 2 for factor in factors]
        total = torch.stack(powers).sum(dim=0) + EPSILON
        for mask, power in zip(masks, powers, strict=True):
            mask.append(((power + EPSILON / len(unets)) / total)[0])
    stems = []
    for segment_masks in masks:
        track_mask = extend(torch.cat(segment_masks, dim=1)[:, :n_frames], mask_extension)
        stems.append(inverse_stft(spectrogram * track_mask, track.shape[-1]))
    return stems


def stft(track: Tensor) -> Tensor:
    """``[2, samples]`` -> complex ``[2, frames, 2049]``.

    As tf.signal.stft(pad_end=True) after FRAME_LENGTH zeros in front: every sample starts a frame
    if its place is a multiple of the step, and the end is padded with zeros to whole frames.
    """
    n_samples = FRAME_LENGTH + track.shape[-1]
    n_frames = -(-n_samples // FRAME_STEP)
    padded_length = (n_frames - 1) * FRAME_STEP + FRAME_LENGTH
    padded = F.pad(track, (FRAME_LENGTH, padded_length - n_samples))
    window = torch.hann_window(FRAME_LENGTH, dtype=track.dtype)
    spectrogram = torch.stft(
        padded, FRAME_LENGTH, FRAME_STEP, window=window, center=False, return_complex=True
    )
    return spectrogram.transpose(1, 2)


def segments(magnitude: Tensor, segment_frames: int) -> Tensor:
    """``[2, frames, bins]`` -> ``[segments, 2, segment_frames, bins]``, zeros after the end."""
    missing = -magnitude.shape[1] % segment_frames
    padded = F.pad(magnitude, (0, 0, 0, missing))
    return torch.stack(torch.split(padded, segment_frames, dim=1))


def extend(mask: Tensor, mask_extension: MaskExtension) -> Tensor:
    """``[2, frames, 1024]`` -> ``[2, frames, 2049]``: the mask of the bins above the network's."""
    missing = FRAME_LENGTH // 2 + 1 - mask.shape[2]
    if mask_extension == "zeros":
        return F.pad(mask, (0, missing))
    return torch.cat([mask, mask.mean(dim=2, keepdim=True).expand(-1, -1, missing)], dim=2)


def inverse_stft(spectrogram: Tensor, n_samples: int) -> Tensor:
    """Complex ``[2, frames, 2049]`` -> ``[2, n_samples]``.

    As tf.signal.inverse_stft with the analysis window, times WINDOW_COMPENSATION_FACTOR: frames
    are windowed again and added, without division by the summed squared window.
    """
    frames: Tensor = torch.fft.irfft(spectrogram, n=FRAME_LENGTH)
    frames = frames * torch.hann_window(FRAME_LENGTH, dtype=frames.dtype)
    n_frames = frames.shape[1]
    covered = FRAME_LENGTH // FRAME_STEP
    hops: Tensor = frames.new_zeros(2, n_frames + covered - 1, FRAME_STEP)
    for delay in range(covered):
        part = frames[:, :, delay * FRAME_STEP : (delay + 1) * FRAME_STEP]
        hops[:, delay : delay + n_frames] += part
    waveform: Tensor = hops.reshape(2, -1) * WINDOW_COMPENSATION_FACTOR
    return waveform[:, FRAME_LENGTH : FRAME_LENGTH + n_samples]
