"""PSNR against torchmetrics and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.image import peak_signal_noise_ratio

from flowbench.metrics import psnr


@pytest.mark.parametrize("data_range", [1.0, 2.0, 255.0])
def test_against_torchmetrics(data_range):
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(5, 3, 6, 6, generator=rng, dtype=torch.float64)
    x_hat = x + 0.1 * torch.randn(x.shape, generator=rng, dtype=torch.float64)
    wanted = peak_signal_noise_ratio(x_hat, x, data_range=data_range, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(x, x_hat, data_range), wanted, rtol=1e-6, atol=0)  # its constants are float32


def test_of_some_values_alone_against_torchmetrics():
    rng = torch.Generator().manual_seed(1)
    x = torch.rand(4, 3, 6, 6, generator=rng, dtype=torch.float64)
    x_hat = x + 0.1 * torch.randn(x.shape, generator=rng, dtype=torch.float64)
    where = torch.rand(4, 1, 6, 6, generator=rng) < 0.4
    x_hat[~where.expand_as(x)] = torch.inf
    wanted = [
        peak_signal_noise_ratio(b[:, kept[0]], a[:, kept[0]], data_range=2.0)
        for a, b, kept in zip(x, x_hat, where, strict=True)
    ]
    torch.testing.assert_close(psnr(x, x_hat, where=where), torch.stack(wanted), rtol=1e-6, atol=0)
    assert psnr(x, x_hat, where=torch.zeros_like(where)).isnan().all()
    assert torch.equal(psnr(x, x, where=where), torch.full((4,), torch.inf, dtype=torch.float64))


@given(st.floats(1e-3, 1.0))
def test_of_a_constant_error(error):
    found = psnr(torch.zeros(2, 3), torch.full((2, 3), error, dtype=torch.float32))
    np.testing.assert_allclose(found.numpy(), 20 * np.log10(2 / float(np.float32(error))), rtol=1e-9)


def test_equal_pictures_have_no_noise():
    assert psnr(torch.ones(2, 3), torch.ones(2, 3)).isinf().all()


def test_the_mean_over_images_is_at_least_the_ratio_of_the_mean_error():
    x, x_hat = torch.zeros(2, 4), torch.tensor([[0.1] * 4, [0.5] * 4])
    assert psnr(x, x_hat).mean() > psnr(x.reshape(1, -1), x_hat.reshape(1, -1))[0]


def test_user_errors_are_named():
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2, 4\)"):
        psnr(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"data_range must be a number in .*, got 0"):
        psnr(torch.zeros(2, 3), torch.zeros(2, 3), 0.0)
