"""The matrix-product STFT against torch.stft in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from stemserve.errors import ExportError
from stemserve_export.spectral import (
    InverseStft,
    PackedMask,
    Stft,
    StftPlan,
    overlap_add,
    window_envelope,
)

# Single precision through two products of 64 to 128 terms leaves 130 to 140 dB; a wrong
# coefficient leaves less than 60.
LEAST_SNR_DB = 120.0

PLANS = [
    pytest.param(StftPlan(4096, 1024, 1024, 12), id="spleeter"),
    pytest.param(StftPlan(4096, 1024, 2049, 9), id="open-unmix"),
    pytest.param(StftPlan(4096, 1024, 2048, 9), id="htdemucs"),
    pytest.param(StftPlan(4096, 1024, 1487, 5), id="bins-not-a-multiple"),
    pytest.param(StftPlan(240, 60, 121, 5), id="not-a-power-of-two"),
    pytest.param(StftPlan(64, 32, 33, 3), id="hop-of-half"),
    pytest.param(StftPlan(64, 64, 33, 3), id="no-overlap"),
    pytest.param(StftPlan(512, 128, 7, 1), id="one-frame"),
]


def snr_db(truth: Tensor, measured: Tensor) -> float:
    error = (truth - measured.to(truth.dtype)).square().sum()
    return float(10 * torch.log10(truth.square().sum() / error))


def signal_of(plan: StftPlan, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(plan.n_fft + plan.n_bins)
    return torch.randn(batch, plan.n_samples, dtype=torch.float64, generator=generator)


def spectrogram_of(plan: StftPlan, signal: Tensor) -> Tensor:
    """Complex ``[N, n_bins, n_frames]`` in float64."""
    window = torch.hann_window(plan.n_fft, dtype=torch.float64)
    full = torch.stft(
        signal, plan.n_fft, plan.hop, window=window, center=False, return_complex=True
    )
    return full[:, : plan.n_bins]


def windowed_overlap_add(plan: StftPlan, spectrogram: Tensor) -> Tensor:
    """What InverseStft promises, in float64: bins that are left out count as zero."""
    window = torch.hann_window(plan.n_fft, dtype=torch.float64)
    frames = torch.fft.irfft(spectrogram, n=plan.n_fft, dim=1) * window[:, None]
    total = torch.zeros(len(spectrogram), plan.n_samples, dtype=torch.float64)
    for index in range(plan.n_frames):
        start = index * plan.hop
        total[:, start : start + plan.n_fft] += frames[:, :, index]
    return total


@pytest.mark.parametrize("plan", PLANS)
def test_forward_matches_torch_stft(plan: StftPlan) -> None:
    signal = signal_of(plan)
    stft = Stft(plan)
    packed = stft(signal.float())
    assert packed.shape == (2, plan.packed_rows, plan.n_frames)
    truth = spectrogram_of(plan, signal)
    parts = torch.cat([stft.real(packed), stft.imag(packed)])
    assert snr_db(torch.cat([truth.real, truth.imag]), parts) > LEAST_SNR_DB


@pytest.mark.parametrize("plan", PLANS)
def test_inverse_of_packed_and_of_natural_order(plan: StftPlan) -> None:
    signal = signal_of(plan)
    truth = windowed_overlap_add(plan, spectrogram_of(plan, signal))
    stft, inverse = Stft(plan), InverseStft(plan)
    packed = stft(signal.float())
    assert snr_db(truth, inverse(packed)) > LEAST_SNR_DB
    repacked = inverse.pack(stft.real(packed), stft.imag(packed))
    assert snr_db(truth, inverse(repacked)) > LEAST_SNR_DB


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shuffled", [False, True])
def test_mask_in_any_order_of_bins(plan: StftPlan, shuffled: bool) -> None:
    signal = signal_of(plan)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, plan.n_bins, plan.n_frames, dtype=torch.float64, generator=generator)
    truth = windowed_overlap_add(plan, spectrogram_of(plan, signal) * mask)
    order = np.random.default_rng(1).permutation(plan.n_bins) if shuffled else None
    rows = mask if order is None else mask[:, torch.from_numpy(order)]
    masked = PackedMask(plan, order)(Stft(plan)(signal.float()), rows.float())
    assert snr_db(truth, InverseStft(plan)(masked)) > LEAST_SNR_DB


def test_round_trip_divided_by_the_envelope_is_torch_istft() -> None:
    plan = StftPlan(4096, 1024, 2049, 16)
    signal = signal_of(plan)
    window = torch.hann_window(plan.n_fft, dtype=torch.float64)
    inner = slice(plan.n_fft, plan.n_samples - plan.n_fft)
    # torch.istft with centred frames covers the samples from n_fft / 2 on.
    truth = torch.istft(
        spectrogram_of(plan, signal), plan.n_fft, plan.hop, window=window, center=True
    )
    trimmed = slice(inner.start - plan.n_fft // 2, inner.stop - plan.n_fft // 2)
    rebuilt = InverseStft(plan)(Stft(plan)(signal.float())) / torch.from_numpy(
        np.maximum(window_envelope(plan), 1e-3)
    )
    assert snr_db(truth[:, trimmed], rebuilt[:, inner]) > LEAST_SNR_DB
    assert snr_db(signal[:, inner], rebuilt[:, inner]) > LEAST_SNR_DB


def test_gain_scales_the_inverse() -> None:
    plan = StftPlan(64, 16, 33, 4)
    packed = Stft(plan)(signal_of(plan).float())
    torch.testing.assert_close(InverseStft(plan, gain=0.5)(packed), 0.5 * InverseStft(plan)(packed))


def test_every_signal_of_a_batch_is_transformed_alone() -> None:
    plan = StftPlan(512, 128, 100, 6)
    signal = signal_of(plan, batch=3).float()
    torch.testing.assert_close(Stft(plan)(signal)[1:2], Stft(plan)(signal[1:2]))
    packed = Stft(plan)(signal)
    torch.testing.assert_close(InverseStft(plan)(packed)[2:], InverseStft(plan)(packed[2:]))


def test_packed_rows_of_the_low_bins_hold_nothing_else() -> None:
    plan = StftPlan(4096, 1024, 1024, 512)
    assert (plan.outer, plan.inner, plan.columns, plan.packed_rows) == (64, 64, 16, 2048)
    assert sorted(plan.slot_bins().reshape(-1)) == list(range(1024))


def test_envelope_is_constant_where_all_frames_overlap() -> None:
    plan = StftPlan(4096, 1024, 1, 8)
    edge = plan.n_fft - plan.hop
    np.testing.assert_allclose(window_envelope(plan)[edge:-edge], 1.5, rtol=1e-12)


def test_overlap_add_delays_each_part_by_its_place() -> None:
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]), torch.tensor([100.0, 200.0])]
    assert overlap_add(parts).tolist() == [1.0, 12.0, 120.0, 200.0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((4096, 1000, 10, 4), "The hop must divide the FFT size; got hop 1000 and n_fft 4096"),
        ((4096, 1024, 2050, 4), "n_bins must be 1 to 2049 and is 2050"),
        ((4096, 1024, 0, 4), "n_bins must be 1 to 2049 and is 0"),
        ((4096, 1024, 10, 0), "n_frames must be at least 1 and is 0"),
        ((15, 5, 3, 1), "n_fft must be even; it is 15"),
    ],
)
def test_impossible_plans_say_what_is_wrong(
    arguments: tuple[int, int, int, int], text: str
) -> None:
    with pytest.raises(ExportError, match=text):
        StftPlan(*arguments)
