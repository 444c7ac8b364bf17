"""Inpainting against the exact conditionals of Gaussian flows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from flowbench.core.seeds import indexed_normal
from flowbench.families import Condition, FlowSamples, PixelSpace, TARFlow
from flowbench.families.conditioning.masks import make_mask
from flowbench.families.zero_shot import inpaint
from tests.contract.builders import IMAGES, build, perturb

from .gaussian_flow import IMAGE, GaussianFlow, data


def conditional_of(module: GaussianFlow, k: int, known: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the unknown values given the known ones, by the Schur complement."""
    lower, mean = module.lower[k].numpy(), module.mean[k].numpy()
    covariance = lower @ lower.T
    gain = covariance[np.ix_(~known, known)] @ np.linalg.inv(covariance[np.ix_(known, known)])
    rest = covariance[np.ix_(~known, ~known)] - gain @ covariance[np.ix_(known, ~known)]
    return mean[~known] + gain @ (x[known] - mean[known]), rest


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_suffix_is_inpainted_from_the_exact_conditional(rounds):
    """Unknown values are the conditional mean plus the Cholesky factor of the Schur complement times the noise."""
    module = GaussianFlow(conditional=True)
    x, label, mask = data(), torch.tensor([0, 1, 2, 1, 0]), make_mask("bottom", (1, 4, 4))
    found = inpaint(module, x, mask, label, rounds=rounds, seed=4)
    fresh = module.source.sample_indexed(torch.arange(5), (1, 4, 4), 4, "inpaint", rounds - 1).double()
    known = ~mask.flatten().numpy()
    for i in range(5):
        mean, covariance = conditional_of(module, int(label[i]), known, x[i].flatten().numpy())
        expected = mean + np.linalg.cholesky(covariance) @ fresh[i].flatten().numpy()[~known]
        np.testing.assert_allclose(found.x[i].flatten().numpy()[~known], expected, atol=1e-9)
    assert torch.equal(found.x[:, :, :2], x[:, :, :2])
    assert float(found.drift.max()) < 1e-12
    assert found.network_evaluations == 1 + 2 * rounds


def test_a_suffix_of_one_autoregressive_block_is_sampled_token_by_token():
    """Against the block's Gaussians evaluated one token at a time by full passes."""
    torch.manual_seed(0)
    module = TARFlow(IMAGES, layers=[2], width=16, head_dim=8, patch_size=2, start="learned", last_order="identity")
    perturb(module, 1, 0.1)
    module = module.double().eval()
    x, mask = data(IMAGES, 3) * 0.5, make_mask("bottom", IMAGES.shape)
    found = inpaint(module, x, mask, rounds=2, seed=9)
    noise = module.source.sample_indexed(torch.arange(3), IMAGES.shape, 9, "inpaint", 1).double()

    def patches(values):
        rows = [values[:, :, a : a + 2, b : b + 2].flatten(1) for a in (0, 2) for b in (0, 2)]
        return torch.stack(rows, 1)

    expected = x.masked_fill(mask, 0.0)
    for row, column in ((2, 0), (2, 2)):
        # The flow is affine in a token given those before it: two probes tell its mean and scale.
        def at(value, row=row, column=column):
            probe = expected.clone()
            probe[:, :, row : row + 2, column : column + 2] = value
            return module.flow_encode(probe, Condition())[:, :, row : row + 2, column : column + 2]

        zero, one = at(0.0), at(1.0)
        expected[:, :, row : row + 2, column : column + 2] = (
            noise[:, :, row : row + 2, column : column + 2] - zero
        ) / (one - zero)
    torch.testing.assert_close(found.x, expected, rtol=0, atol=1e-9)
    assert float((patches(found.x)[:, 2:] - patches(noise)[:, 2:]).abs().max()) > 1e-2
    assert float(found.drift.max()) < 1e-12


def test_a_prefix_is_an_approximation_and_says_so():
    """Against the order of the block the known values move; the true conditional has another mean."""
    module = GaussianFlow()
    x, mask = data(num=1).expand(4000, -1, -1, -1), make_mask("top", (1, 4, 4))
    found = inpaint(module, x, mask, rounds=4, seed=1)
    assert float(found.drift.min()) > 1e-3
    assert torch.equal(found.x[:, :, 2:], x[:, :, 2:])
    known = ~mask.flatten().numpy()
    mean, _ = conditional_of(module, 0, known, x[0].flatten().numpy())
    gap = np.abs(found.x.flatten(1).mean(0).numpy()[~known] - mean)
    assert gap.max() > 0.1
    # The same values are a suffix of a flow in the other order.
    assert float(inpaint(GaussianFlow(order=-1), x[:5], mask, seed=1).drift.max()) < 1e-12


def test_what_is_masked_does_not_matter():
    module = build("cfm", IMAGES, conditional=True).eval()
    mask = make_mask("random-0.5", IMAGES.shape, seed=3)
    x = data(IMAGES).float()
    other = torch.where(mask, torch.full_like(x, 7.0), x)
    label = torch.arange(5) % 3
    first, second = (inpaint(module, values, mask, label, rounds=2) for values in (x, other))
    assert torch.equal(first.x, second.x)
    assert first.network_evaluations == 40 + 2 * 80


def test_inpainting_is_keyed_by_index_and_seed():
    module, mask, x = GaussianFlow(), make_mask("left", (1, 4, 4)), data()
    whole = inpaint(module, x, mask, seed=2).x
    part = inpaint(module, x[3:], mask, seed=2, index=torch.tensor([3, 4])).x
    torch.testing.assert_close(part, whole[3:], rtol=0, atol=1e-12)
    assert float((inpaint(module, x, mask, seed=3).x - whole).abs().max()) > 0.1


def test_a_round_that_is_not_finite_is_forgotten(monkeypatch):
    module, mask, x = GaussianFlow(), make_mask("left", (1, 4, 4)), data()
    whole, calls = module.flow_decode, []

    def broken(noise, condition):
        drawn = whole(noise, condition)
        calls.append(drawn)
        return replace(drawn, x=torch.full_like(drawn.x, torch.nan)) if len(calls) == 2 else drawn

    monkeypatch.setattr(module, "flow_decode", broken)
    found = inpaint(module, x, mask, rounds=4, seed=2)
    assert found.x.isfinite().all()
    assert found.drift.isfinite().all()


def test_a_latent_is_unknown_as_soon_as_one_pixel_of_its_cell_is():
    module = build("starflow", IMAGES).eval()
    x, mask = data(IMAGES).float(), torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 3] = True
    found = inpaint(module, x, mask, rounds=2, seed=1)
    assert torch.equal(found.x[:, :, 1:], x[:, :, 1:])
    assert float((found.x[:, 0, 0, 3] - x[:, 0, 0, 3]).abs().min()) > 0
    from flowbench.families.zero_shot import _flow_mask

    latent = _flow_mask(module, mask)
    assert latent.shape == module.flow_shape
    assert latent[0].tolist() == [[False, True], [False, False]]


def test_a_flow_of_noisy_points_is_told_noisy_values_and_denoised_once(monkeypatch):
    module = GaussianFlow(space=PixelSpace(IMAGE.shape, noise_std=0.3))
    x, mask = data(), make_mask("bottom", (1, 4, 4))
    seen = []

    def denoise(z, condition):
        seen.append(z)
        return z + 5

    monkeypatch.setattr(module, "flow_denoise", denoise)
    found = inpaint(module, x, mask, rounds=3, seed=2)
    noise = indexed_normal(torch.arange(5), (1, 4, 4), 2, "inpaint-noise").double()
    fresh = module.source.sample_indexed(torch.arange(5), (1, 4, 4), 2, "inpaint", 2).double()
    known = ~mask.flatten().numpy()
    for i in range(5):
        noisy = (x[i] + 0.3 * noise[i]).flatten().numpy()
        mean, covariance = conditional_of(module, 0, known, noisy)
        expected = mean + np.linalg.cholesky(covariance) @ fresh[i].flatten().numpy()[~known] + 5
        np.testing.assert_allclose(found.x[i].flatten().numpy()[~known], expected, atol=1e-9)
    assert torch.equal(found.x[:, :, :2], x[:, :, :2])
    assert len(seen) == 1


def test_a_round_that_runs_away_is_not_kept(monkeypatch):
    """The start and one of three rounds overflow; another moves the known values: the remaining one is kept."""
    module, x, mask = GaussianFlow(), data(), make_mask("bottom", (1, 4, 4))
    plain, seen = module.flow_decode, []

    def decode(noise, condition):
        seen.append(noise)
        drawn = plain(noise, condition)
        spoilt = {0: torch.inf, 2: torch.nan, 3: 1.0}.get(len(seen) - 1, 0.0)
        return replace(drawn, x=drawn.x + spoilt)

    monkeypatch.setattr(module, "flow_decode", decode)
    found = inpaint(module, x, mask, rounds=3)
    torch.testing.assert_close(found.x, torch.where(mask, plain(seen[1], Condition()).x, x), rtol=0, atol=1e-10)
    assert float(found.drift.max()) < 1e-12
    monkeypatch.setattr(
        module, "flow_decode", lambda noise, condition: FlowSamples(torch.full_like(noise, torch.nan), 1.0)
    )
    assert inpaint(module, x, mask, rounds=2).drift.isinf().all()


def test_rounds_below_one_are_refused():
    with pytest.raises(ValueError, match=r"rounds must be a whole number in .*, got 0"):
        inpaint(GaussianFlow(), data(), make_mask("left", (1, 4, 4)), rounds=0)
