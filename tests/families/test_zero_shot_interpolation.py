"""Great circles between the noise of data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flowbench.families import DatasetSource
from flowbench.families.zero_shot import interpolate, slerp
from tests.contract.builders import POINTS, build

from .gaussian_flow import GaussianFlow, data


def test_slerp_keeps_norms_and_turns_at_constant_speed():
    first, second = data(num=6, seed=1), data(num=6, seed=2)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    path = slerp(first, second, t).flatten(2)
    torch.testing.assert_close(path[:, 0], first.flatten(1))
    torch.testing.assert_close(path[:, -1], second.flatten(1))
    ends = first.flatten(1).norm(dim=1)[:, None], second.flatten(1).norm(dim=1)[:, None]
    torch.testing.assert_close(path.norm(dim=2), (1 - t) * ends[0] + t * ends[1])
    unit = (path / path.norm(dim=2, keepdim=True)).numpy()
    angles = np.arccos((unit[:, 1:] * unit[:, :-1]).sum(2))
    np.testing.assert_allclose(angles, np.broadcast_to(angles[:, :1], angles.shape), atol=1e-9)
    # All in the plane of the two ends.
    assert all(np.linalg.matrix_rank(rows.numpy(), tol=1e-9) == 2 for rows in path)


def test_the_middle_of_a_great_circle_is_typical_noise_and_that_of_a_line_is_not():
    rng = torch.Generator().manual_seed(0)
    first, second = (torch.randn(400, 256, generator=rng) for _ in range(2))
    middle = slerp(first, second, torch.tensor([0.5]))[:, 0]
    assert float(middle.std()) == pytest.approx(1.0, abs=0.02)
    assert float(((first + second) / 2).std()) == pytest.approx(math.sqrt(0.5), abs=0.02)


def test_slerp_of_parallel_and_opposite_points():
    a = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(slerp(a, 2 * a, torch.tensor([0.0, 0.5, 1.0]))[0], torch.cat([a, 1.5 * a, 2 * a]))
    with pytest.raises(ValueError, match="opposite directions"):
        slerp(a, -a, torch.tensor([0.5]))
    assert slerp(0 * a, a, torch.tensor([0.5])).isfinite().all()


def test_interpolation_starts_and_ends_at_the_data():
    module = GaussianFlow()
    first, second = data(num=3, seed=1), data(num=3, seed=2)
    found = interpolate(module, first, second, 5)
    assert found.x.shape == (3, 5, 1, 4, 4)
    torch.testing.assert_close(found.x[:, 0], first, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.x[:, -1], second, rtol=0, atol=1e-10)
    assert found.network_evaluations == pytest.approx(1 + 2 / 5)


@pytest.mark.parametrize(
    ("module", "steps", "expected"),
    [
        (GaussianFlow(), 1, "steps must be a whole number in .*, got 1"),
        (GaussianFlow(conditional=True, label_dropout=0.0), 3, "trained null label"),
    ],
)
def test_interpolations_that_cannot_be_are_refused(module, steps, expected):
    with pytest.raises(ValueError, match=expected):
        interpolate(module, data(), data(), steps)


def test_interpolation_wants_gaussian_noise():
    module = build("cfm", POINTS, source=DatasetSource("moons"))
    with pytest.raises(ValueError, match=r"starts from DatasetSource\('moons'\)"):
        interpolate(module, data(POINTS).float(), data(POINTS).float(), 3)
