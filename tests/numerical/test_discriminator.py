"""PatchDiscriminator: what a logit sees, sizes, and the hinge losses against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowbench.core.seeds import generator
from flowbench.networks import PatchDiscriminator
from flowbench.networks.discriminator import hinge_discriminator_loss, hinge_generator_loss


@pytest.mark.parametrize(("num_layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_the_published_patch(num_layers, patch):
    """Isola et al. (2017) name the discriminators by their receptive fields; group norms aside, which see all."""
    model = PatchDiscriminator((3, 128, 128), width=2, num_layers=num_layers).double()
    model.layers = torch.nn.Sequential(*[m for m in model.layers if not isinstance(m, torch.nn.GroupNorm)])
    x = torch.zeros(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    logits = model(x)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    rows = x.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == patch


@pytest.mark.parametrize(("side", "num_layers"), [(6, 1), (8, 1), (12, 2), (28, 3)])
def test_the_smallest_pictures_give_a_logit(side, num_layers):
    model = PatchDiscriminator((1, side, side), width=4, num_layers=num_layers)
    logits = model(torch.zeros(2, 1, side, side))
    assert logits.shape[:2] == (2, 1)
    assert min(logits.shape[2:]) >= 1


def test_a_picture_does_not_depend_on_its_batch():
    model = PatchDiscriminator((1, 16, 16), width=4, num_layers=1).double()
    x = torch.randn(4, 1, 16, 16, generator=generator(0, "x"), dtype=torch.float64)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-10, atol=1e-10)


def test_hinge_losses_follow_their_definition():
    rng = np.random.default_rng(0)
    real, generated = 2 * rng.standard_normal((5, 1, 3, 3)), 2 * rng.standard_normal((5, 1, 3, 3))
    wanted = 0.5 * (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + generated).mean())
    found = hinge_discriminator_loss(torch.from_numpy(real), torch.from_numpy(generated))
    np.testing.assert_allclose(float(found), wanted, rtol=1e-12)
    np.testing.assert_allclose(float(hinge_generator_loss(torch.from_numpy(generated))), -generated.mean(), rtol=1e-12)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 8, 8), {"num_layers": 2}, "sides of at least 12, got"),
        ((2,), {"num_layers": 1}, r"got \(2,\)"),
        ((1, 8, 8), {"width": 0}, r"width must be .*, got 0"),
    ],
)
def test_user_errors_are_named(shape, options, message):
    with pytest.raises(ValueError, match=message):
        PatchDiscriminator(shape, **options)
