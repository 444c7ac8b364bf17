"""What holds for every source: draws follow their density and their keys, and what was fitted travels."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import scipy.stats
import torch

from flowbench.core.seeds import generator
from flowbench.flows.source.base import FittedSource
from tests.marks import slow
from tests.numerical.sources import BUILDERS, data, fitted

NAMES = list(BUILDERS)
FITTED = [name for name in NAMES if BUILDERS[name]().needs_fit]


@pytest.mark.parametrize("name", NAMES)
def test_draws_follow_the_density(name: str):
    """Cells of the plane: counts against the integral of exp(log_prob), which must also add up to one."""
    points = data(60)
    if name == "radial_data":  # of radii far apart, a density without narrow rings
        points = torch.stack([torch.linspace(1, 4, 10), torch.zeros(10)], dim=1)
    source = fitted(name, points)
    half, cells, fine = 9.0, 36, 12
    step = 2 * half / (cells * fine)
    axis = torch.arange(cells * fine, dtype=torch.float64) * step - half + step / 2
    density = source.log_prob(torch.cartesian_prod(axis, axis)).exp().reshape(cells, fine, cells, fine)
    probability = (density.sum((1, 3)) * step**2).numpy()
    assert probability.sum() == pytest.approx(1.0, abs=0.008)
    num = 30_000
    x = source.sample(num, (2,), generator(1, "draws")).double().numpy()
    edges = np.linspace(-half, half, cells + 1)
    count = np.histogram2d(x[:, 0], x[:, 1], bins=[edges, edges])[0]
    expected = num * probability
    full = expected >= 20
    observed = np.append(count[full], num - count[full].sum())
    wanted = np.append(expected[full], num - expected[full].sum())
    # Cells that a jump of the density cuts through are integrated to about 2 %.
    statistic = ((observed - wanted) ** 2 / (wanted + (0.03 * wanted) ** 2)).sum()
    assert scipy.stats.chi2.sf(statistic, len(wanted) - 1) > 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2,), (1, 2, 3)])
def test_draws_are_functions_of_their_keys(name: str, shape: tuple[int, ...]):
    points = data(shape=shape)
    source = fitted(name, points)
    state = torch.random.get_rng_state()
    x = source.sample(9, shape, generator(3, "a"))
    assert x.shape == (9, *shape)
    assert x.dtype == torch.float32
    assert torch.equal(x, source.sample(9, shape, generator(3, "a")))
    assert not torch.equal(x, source.sample(9, shape, generator(3, "b")))
    near = source.sample_for(points[:5], generator(3, "c"))
    assert near.shape == (5, *shape)
    assert torch.equal(near, source.sample_for(points[:5], generator(3, "c")))
    whole = source.sample_indexed(range(12), shape, 5, "noise")
    assert whole.shape == (12, *shape)
    part = source.sample_indexed(torch.tensor([7, 2, 11]), shape, 5, "noise")
    assert torch.equal(part, whole[[7, 2, 11]])
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 12
    assert source.sample_indexed([], shape, 5, "noise").shape == (0, *shape)
    log_prob = source.log_prob(whole)
    assert log_prob.dtype == torch.float64
    assert log_prob.shape == (12,)
    assert log_prob.isfinite().all()
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", [name if number % 3 == 0 else slow(name) for number, name in enumerate(FITTED)])
def test_indexed_draws_follow_the_same_distribution(name: str):
    source = fitted(name)
    keyed, drawn = source.sample_indexed(range(1500), (2,), 0, "noise"), source.sample(1500, (2,), generator(4, "x"))
    for column in range(2):
        assert scipy.stats.ks_2samp(keyed[:, column].numpy(), drawn[:, column].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("name", FITTED)
def test_the_fit_travels_in_a_checkpoint(name: str):
    source = fitted(name)
    file = io.BytesIO()
    torch.save({"state_dict": torch.nn.ModuleDict({"source": source}).state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)["state_dict"]
    other = BUILDERS[name]()
    assert other.needs_fit
    torch.nn.ModuleDict({"source": other}).load_state_dict(state)
    assert not other.needs_fit
    assert torch.equal(other.sample(6, (2,), generator(0, "x")), source.sample(6, (2,), generator(0, "x")))
    x = data()[:5]
    assert torch.equal(other.log_prob(x), source.log_prob(x))


def test_only_fitted_sources_add_to_a_state_dict():
    for name in NAMES:
        source = fitted(name)
        assert not list(source.parameters())
        assert not list(source.buffers())
        assert bool(source.state_dict()) == isinstance(source, FittedSource), name


@pytest.mark.parametrize("name", FITTED)
def test_an_old_checkpoint_leaves_a_source_to_be_fitted(name: str):
    source = BUILDERS[name]()
    torch.nn.ModuleDict({"source": source}).load_state_dict({})
    assert source.needs_fit


def test_the_fit_of_other_options_is_not_taken():
    state = fitted("pruned").state_dict()
    other = BUILDERS["pruned_truncated"]()
    other.load_state_dict(state)
    assert other.needs_fit


@pytest.mark.parametrize("name", FITTED)
def test_mistakes_are_one_line(name: str):
    rng = generator(0, "fit")
    unfitted = BUILDERS[name]()
    calls = (
        lambda: unfitted.sample(2, (2,), rng),
        lambda: unfitted.sample_indexed([0], (2,), 0, "noise"),
        lambda: unfitted.sample_for(data()[:2], rng),
        lambda: unfitted.log_prob(data()[:2]),
    )
    for call in calls:
        with pytest.raises(ValueError, match="is not fitted: call fit") as error:
            call()
        assert "\n" not in str(error.value)
    broken = data()
    broken[3, 0] = math.nan
    for points, match in ((broken, "1 of 400 data points hold NaN"), (data()[:1], "at least 2 data points")):
        with pytest.raises(ValueError, match=match):
            BUILDERS[name]().fit(points, rng)
    with pytest.raises(ValueError, match="zero"):
        BUILDERS[name]().fit(torch.zeros(5, 2), rng)
    with pytest.raises(ValueError, match=r"fitted to points of shape \(2,\), the flow wants \(3,\)"):
        fitted(name).sample(2, (3,), rng)


def test_what_a_source_says_of_itself():
    isotropic = {"gaussian", "norm_aligned", "radial_chi", "radial_data"}
    for name in NAMES:
        source = BUILDERS[name]()
        assert source.is_isotropic == (name in isotropic)
        assert not source.is_standard_normal
