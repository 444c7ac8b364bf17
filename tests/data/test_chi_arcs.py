"""The arcs of the 2-D source simulation against their recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import scipy.stats
import torch

from flowbench.data import FlowDataModule, get
from flowbench.data.chi_arcs import CHI_ARCS, SCALE, draw_chi_arcs

ANGLES = torch.tensor([4.4956, 5.9167, 1.1018], dtype=torch.float64)


def test_points_follow_the_recipe():
    x, label = draw_chi_arcs(20_000, torch.Generator().manual_seed(0))
    assert x.dtype == torch.float32
    assert label.bincount().tolist() == [1000, 6000, 13_000]
    radius = SCALE * x.double().norm(dim=1)
    assert scipy.stats.kstest(radius.numpy(), scipy.stats.chi(625).cdf).pvalue > 1e-3
    turned = torch.atan2(x[:, 1], x[:, 0]).double() - ANGLES[label]
    degrees = torch.rad2deg(torch.remainder(turned + torch.pi, 2 * torch.pi) - torch.pi)
    for number in range(3):
        mine = degrees[label == number]
        # Uniform on +-10 degrees plus a normal of 1 degree.
        grid = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
        oracle = torch.special.ndtr(mine.sort().values[:, None] - grid[::100]).mean(1)
        assert scipy.stats.kstest(oracle.numpy(), "uniform").pvalue > 1e-4
        assert float(mine.mean()) == pytest.approx(0.0, abs=0.15)


def test_train_and_test_are_the_same_fixed_points(tmp_path: Path):
    splits = CHI_ARCS.load(tmp_path)
    assert torch.equal(splits["train"].values, splits["test"].values)
    assert splits["train"].label.bincount().tolist() == [51, 307, 666]
    assert not torch.equal(splits["val"].values, splits["train"].values)
    assert torch.equal(splits["val"].values, CHI_ARCS.load(tmp_path)["val"].values)
    assert get("chi_arcs") is CHI_ARCS
    assert FlowDataModule("chi_arcs").model_values("test").shape == (1024, 2)


def test_the_constants_of_version_1_have_not_moved(tmp_path: Path):
    """Another value is another data set: raise the version with it."""
    x = CHI_ARCS.load(tmp_path)["train"].values.double()
    assert float(x.norm(dim=1).mean()) == pytest.approx(0.8329, abs=0.002)
    assert CHI_ARCS.version == "1"
