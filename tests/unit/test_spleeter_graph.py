"""The exported Spleeter against plain PyTorch: the rewritten U-Net, the framing, the graph."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from reference.spleeter import separate_track
from support.spleeter_checkpoints import seeded_unet
from torch import Tensor

from stemserve.errors import ExportError
from stemserve_export.families import spleeter
from stemserve_export.families.spleeter import (
    EDGE_SAMPLES,
    HOP,
    N_FFT,
    MaskExtension,
    Output,
    SpleeterSeparator,
)
from stemserve_export.families.spleeter_unet import Activation, ExportUNet, UNet, phase_order
from stemserve_export.onnx_graph import ALLOWED_OPERATORS

N_FRAMES = 64
# fp32 in another order of summation leaves about 125 dB; a misplaced tap or bin less than 60.
LEAST_SNR_DB = 110.0
# Half precision has 11 bits, and the errors of many layers add: 63 dB with these weights, 69 dB
# with the published ones. The margin is for other orders of summation.
LEAST_FP16_SNR_DB = 55.0
EXTENSIONS: list[MaskExtension] = ["zeros", "average"]


class Variant(NamedTuple):
    """A published configuration."""

    stems: int
    activation: Activation
    output: Output


VARIANTS = [
    pytest.param(Variant(2, "leaky_relu", "sigmoid"), id="2stems"),
    pytest.param(Variant(4, "elu", "sigmoid"), id="4stems"),
    pytest.param(Variant(5, "elu", "softmax"), id="5stems"),
]


def seeded_unets(variant: Variant) -> list[UNet]:
    return [seeded_unet(seed, variant.activation) for seed in range(1, variant.stems + 1)]


def small_separator(
    variant: Variant, mask_extension: MaskExtension = "average", **changes
) -> SpleeterSeparator:
    return SpleeterSeparator(
        seeded_unets(variant),
        mask_extension=mask_extension,
        output=variant.output,
        n_frames=N_FRAMES,
        **changes,
    ).eval()


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """These layers are small: threads that wait for each other take longer than one alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    stems = [torch.zeros_like(padded) for _ in separator.kept]
    for index in range(n_chunks):
        place = slice(index * step, index * step + separator.chunk)
        for stem, part in zip(stems, separator(padded[None, :, place]), strict=True):
            stem[:, place] += part[0]
    return [stem[:, N_FFT:n_samples] for stem in stems]


@pytest.mark.parametrize("activation", ["leaky_relu", "elu"])
@pytest.mark.parametrize("seed", [1, 2])
def test_export_unet_is_the_published_one(seed: int, activation: Activation) -> None:
    unet = seeded_unet(seed, activation)
    generator = torch.Generator().manual_seed(seed)
    magnitude = 20 * torch.rand(2, 2, 128, 1024, generator=generator) ** 4
    with torch.inference_mode():
        truth = -unet(magnitude).transpose(2, 3)[:, :, torch.from_numpy(phase_order())]
        measured = ExportUNet(unet)(magnitude.transpose(2, 3))
    assert torch.sigmoid(truth).std() > 0.05, "the test is blind if the factors are all alike"
    assert snr_db(truth, measured) > LEAST_SNR_DB


@pytest.mark.parametrize("mask_extension", EXTENSIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_add_up_to_the_published_whole_track(
    variant: Variant, mask_extension: MaskExtension
) -> None:
    separator = small_separator(variant, mask_extension)
    # A whole segment and a part of a second that ends within a hop.
    track = music(N_FRAMES * HOP + 10_000)
    doubles = [unet.double() for unet in seeded_unets(variant)]
    truth = separate_track(track.double(), doubles, mask_extension, N_FRAMES, variant.output)
    with torch.inference_mode():
        measured = separate_in_chunks(separator, track)
    assert snr_db(truth[0], truth[1]) < 20, "the test is blind if the stems are alike"
    for stem_truth, stem in zip(truth, measured, strict=True):
        assert snr_db(stem_truth, stem) > LEAST_SNR_DB


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_almost_silent_is_shared_as_published(variant: Variant) -> None:
    """Where the mask's epsilon is as large as the estimates."""
    separator = small_separator(variant)
    track = music(N_FRAMES * HOP - N_FFT) * 1e-7
    doubles = [unet.double() for unet in seeded_unets(variant)]
    truth = separate_track(track.double(), doubles, "average", N_FRAMES, variant.output)
    with torch.inference_mode():
        measured = separate_in_chunks(separator, track)
    for stem_truth, stem in zip(truth, measured, strict=True):
        assert snr_db(stem_truth, stem) > LEAST_SNR_DB


@pytest.mark.parametrize(
    "wrong",
    [Variant(4, "leaky_relu", "sigmoid"), Variant(4, "elu", "softmax")],
    ids=["activation", "output"],
)
def test_a_wrong_option_shows(wrong: Variant) -> None:
    """The shapes are the same and nothing fails: only the stems tell."""
    right = small_separator(Variant(4, "elu", "sigmoid"))
    mixture = music(right.chunk)[None]
    with torch.inference_mode():
        for truth, stem in zip(right(mixture), small_separator(wrong)(mixture), strict=True):
            assert snr_db(truth, stem) < 25


@pytest.mark.parametrize("kept", [[2], [3, 0], [0, 1, 2], [3, 2, 1, 0]])
@pytest.mark.parametrize("mask_extension", EXTENSIONS)
def test_some_stems_are_the_same_as_among_all(
    kept: list[int], mask_extension: MaskExtension
) -> None:
    variant = Variant(4, "elu", "sigmoid")
    separator = small_separator(variant, mask_extension)
    mixture = music(separator.chunk)[None]
    with torch.inference_mode():
        every = separator(mixture)
        some = small_separator(variant, mask_extension, kept=kept)(mixture)
    assert len(some) == len(kept)
    for index, stem in zip(kept, some, strict=True):
        assert snr_db(every[index], stem) > LEAST_SNR_DB


def test_average_stems_sum_to_the_mixture() -> None:
    variant = Variant(5, "elu", "softmax")
    # Not all that there are: then no stem is made of what the others leave.
    separators = [small_separator(variant, kept=kept) for kept in ([0, 1, 2, 3], [4])]
    track = music(N_FRAMES * HOP)
    with torch.inference_mode():
        stems = [stem for part in separators for stem in separate_in_chunks(part, track)]
    assert snr_db(track, torch.stack(stems).sum(dim=0)) > LEAST_SNR_DB


def test_zeros_drops_what_lies_above_the_network(unets: list[UNet]) -> None:
    separator = SpleeterSeparator(unets, mask_extension="zeros", n_frames=N_FRAMES).eval()
    time = torch.arange(separator.chunk, dtype=torch.float64) / 44100
    high = torch.sin(2 * torch.pi * 15000 * time).float().expand(1, 2, -1)
    with torch.inference_mode():
        for stem in separator(high):
            inside = stem[..., EDGE_SAMPLES:-EDGE_SAMPLES]
            assert inside.abs().max() < 1e-4


@pytest.mark.parametrize("mask_extension", EXTENSIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_silence_stays_silence(variant: Variant, mask_extension: MaskExtension) -> None:
    separator = small_separator(variant, mask_extension)
    with torch.inference_mode():
        for stem in separator(torch.zeros(1, 2, separator.chunk)):
            assert torch.equal(stem, torch.zeros_like(stem))


@pytest.mark.parametrize(
    ("variant", "mask_extension"),
    [
        pytest.param(Variant(2, "leaky_relu", "sigmoid"), "zeros", id="2stems-zeros"),
        pytest.param(Variant(4, "elu", "sigmoid"), "average", id="4stems"),
        pytest.param(Variant(5, "elu", "softmax"), "average", id="5stems"),
    ],
)
def test_onnx_graph(variant: Variant, mask_extension: MaskExtension, tmp_path: Path) -> None:
    separator = small_separator(variant, mask_extension)
    session = exported(separator, tmp_path)
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
    assert_survives_extremes(session, separator.chunk)


def test_onnx_graph_in_half_precision(tmp_path: Path) -> None:
    variant = Variant(2, "elu", "softmax")
    session = exported(small_separator(variant, precision="fp16"), tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    kernels = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    weights = {each.name: each.data_type for each in model.graph.initializer}
    assert {weights[kernel] for kernel in kernels} == {onnx.TensorProto.FLOAT16}
    separator = small_separator(variant)
    mixture = music(separator.chunk)[None]
    with torch.inference_mode():
        truth = separator(mixture)
    measured = session.run(None, {"mixture": mixture.numpy()})
    for stem_truth, stem in zip(truth, measured, strict=True):
        assert stem.dtype == np.float32
        assert snr_db(stem_truth, torch.from_numpy(stem)) > LEAST_FP16_SNR_DB
    assert_survives_extremes(session, separator.chunk)


def exported(separator: SpleeterSeparator, folder: Path) -> onnxruntime.InferenceSession:
    """The graph that the exporter makes of it, held to the exporter's rules."""
    path = folder / "model.onnx"
    program = torch.onnx.export(
        separator,
        (torch.zeros(2, 2, separator.chunk),),
        dynamo=True,
        opset_version=18,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=16)},),
        external_data=False,
        input_names=["mixture"],
        verbose=False,
    )
    assert program is not None
    program.save(str(path))
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version <= 10
    assert {node.op_type for node in model.graph.node} <= ALLOWED_OPERATORS
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def assert_survives_extremes(session: onnxruntime.InferenceSession, chunk: int) -> None:
    """Silence is silence, and neither DC nor a full-scale square wave overflows."""
    square = np.where(np.arange(chunk) // 50 % 2, 1, -1)
    for signal in (np.zeros(chunk), np.ones(chunk), square):
        mixture = np.broadcast_to(signal, (1, 2, chunk)).astype(np.float32)
        for stem in session.run(None, {"mixture": mixture}):
            assert np.isfinite(stem).all()
            assert np.abs(stem).max() < 4
            assert signal.any() or not stem.any()


def test_frames_that_the_unet_cannot_halve_are_refused(unets: list[UNet]) -> None:
    with pytest.raises(ExportError, match="must be a multiple of 64 and is 100"):
        SpleeterSeparator(unets, mask_extension="zeros", n_frames=100)


def test_a_single_unet_is_refused(unets: list[UNet]) -> None:
    with pytest.raises(ExportError, match="at least 2; got 1"):
        SpleeterSeparator(unets[:1], mask_extension="zeros")


def test_published_segment_is_the_default(unets: list[UNet]) -> None:
    separator = SpleeterSeparator(unets, mask_extension="average")
    assert separator.chunk == 527_360
    assert spleeter.EDGE_SAMPLES == 3072
