"""TF32 on a CPU: the rounding itself, which operands it reaches, and which modules."""

import math

import pytest
import torch
from torch import nn

from stemserve_export.spectral import InverseStft, Stft, StftPlan
from stemserve_export.tf32 import emulated_tf32, round_to_tf32

# One unit in the last place of a mantissa of 10 bits, at 1.
ULP = 2.0**-10


def snr_db(truth, measured):
    error = (truth.double() - measured.double()).square().sum()
    return 10 * math.log10(truth.double().square().sum() / error)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, 1.0),
        (1 + ULP, 1 + ULP),
        (1 + 0.49 * ULP, 1.0),
        (1 + 0.5 * ULP, 1 + ULP),  # halves away from zero
        (-1 - 0.5 * ULP, -1 - ULP),
        (2 - 0.1 * ULP, 2.0),  # the carry reaches the exponent
        (0.0, 0.0),
        (1e-30, 1e-30),
        (3e38, 3e38),
    ],
)
def test_rounds_to_ten_bits(value, expected):
    rounded = float(round_to_tf32(torch.tensor([value]))[0])
    assert rounded == pytest.approx(expected, rel=2.0**-11)
    if expected in (1.0, 1 + ULP, -1 - ULP, 2.0, 0.0):
        assert rounded == expected


def test_truncation_drops_bits():
    values = torch.tensor([1 + 0.99 * ULP, -1 - 0.99 * ULP])
    assert round_to_tf32(values, "truncated").tolist() == [1.0, -1.0]


def test_what_is_not_finite_stays():
    values = torch.tensor([math.nan, math.inf, -math.inf])
    rounded = round_to_tf32(values)
    assert math.isnan(rounded[0])
    assert rounded[1:].tolist() == [math.inf, -math.inf]


def test_rounding_leaves_what_uniform_errors_leave():
    values = noise(100_000)
    # Errors of a uniform last place: at least 66 dB, at most 72 dB depending on the mantissa.
    assert 66 < snr_db(values, round_to_tf32(values)) < 74


class Attention(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(64, 64),
        nn.Conv1d(8, 8, 5),
        nn.Conv2d(4, 4, 3),
        nn.ConvTranspose2d(4, 4, 3),
        nn.LSTM(64, 16, batch_first=True),
        Attention(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_every_kind_of_product_is_rounded(module, inference):
    module = module.eval()
    shape = {"Conv1d": (2, 8, 64), "Conv2d": (2, 4, 32, 32), "ConvTranspose2d": (2, 4, 32, 32)}
    x = noise(*shape.get(type(module).__name__, (2, 16, 64)))

    def run():
        answer = module(x)
        return answer[0] if isinstance(answer, tuple) else answer

    with torch.inference_mode(inference):
        exact = run()
        with emulated_tf32():
            rounded = run()
        again = run()
    assert torch.equal(exact, again)  # nothing of it is left behind
    assert 50 < snr_db(exact.detach(), rounded.detach()) < 90


def test_the_products_are_those_of_rounded_operands():
    a, b = noise(32, 48), noise(48, 16, seed=1)
    with emulated_tf32():
        product = a @ b
    assert torch.equal(product, round_to_tf32(a) @ round_to_tf32(b))


def test_biases_and_addends_are_not_rounded():
    bias = torch.full((3,), 1 + 0.4 * ULP)
    linear = nn.Linear(2, 3)
    conv = nn.Conv1d(2, 3, 1)
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.copy_(bias)
        linear.weight.zero_()
        linear.bias.copy_(bias)
        addend = noise(4, 3)
        with emulated_tf32():
            assert torch.equal(linear(noise(5, 2)), bias.expand(5, 3))
            assert torch.equal(conv(noise(1, 2, 4)), bias[None, :, None].expand(1, 3, 4))
            assert torch.equal(torch.addmm(addend, torch.zeros(4, 2), torch.zeros(2, 3)), addend)


def test_half_precision_and_sums_are_left_alone():
    x = noise(8, 8)
    with emulated_tf32():
        assert torch.equal(x + x, 2 * x)
        assert torch.equal(x.half() @ x.half(), torch.matmul(x.half(), x.half()))
        assert (x.double() @ x.double()).dtype == torch.float64


class Separator(nn.Module):
    """STFT, a layer, inverse STFT."""

    def __init__(self):
        super().__init__()
        plan = StftPlan(n_fft=256, hop=64, n_bins=129, n_frames=16)
        self.stft, self.inverse = Stft(plan), InverseStft(plan)
        self.core = nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return self.inverse(self.core(self.stft(x)))


def test_modules_can_be_chosen_and_left_out():
    separator = Separator().eval()
    x = noise(2, separator.stft.plan.n_samples)
    transforms = (Stft, InverseStft)
    with torch.inference_mode():
        exact = separator(x)
        results = {}
        for name, choice in {
            "all": {},
            "core": {"leave_out": transforms},
            "transforms": {"only": transforms},
            "nothing": {"only": transforms, "leave_out": transforms},
        }.items():
            with emulated_tf32(**choice):
                results[name] = separator(x)
        spectrum = separator.stft(x)
        with emulated_tf32():
            by_hand = separator.core(spectrum)
        by_hand = separator.inverse(by_hand)
    assert torch.equal(results["nothing"], exact)
    assert torch.equal(results["core"], by_hand)
    assert not torch.equal(results["transforms"], exact)
    assert snr_db(exact, results["all"]) < snr_db(exact, results["core"])
    assert snr_db(exact, results["all"]) < snr_db(exact, results["transforms"])


def test_a_forward_that_raises_leaves_nothing_behind():
    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError("no")

    a = noise(8, 8)
    with emulated_tf32(leave_out=(Fails,)):
        with pytest.raises(ValueError, match="no"):
            Fails()(a)
        assert not torch.equal(a @ a, torch.matmul(a.double(), a.double()).float())
        assert torch.equal(a @ a, round_to_tf32(a) @ round_to_tf32(a))
    assert snr_db(torch.matmul(a.double(), a.double()), a @ a) > 110
