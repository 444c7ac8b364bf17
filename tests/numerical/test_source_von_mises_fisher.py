"""Von Mises-Fisher draws against SciPy and closed forms, spherical k-means against what it minimises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch.nn.functional import normalize

from flowbench.core.seeds import generator
from flowbench.flows import GaussianSource
from flowbench.flows.source import von_mises_fisher
from flowbench.flows.source.von_mises_fisher import (
    VonMisesFisherSource,
    draw_von_mises_fisher,
    log_von_mises_fisher_constant,
    spherical_k_means,
)
from tests.numerical.sources import data


def mean_direction(num_dims: int, num: int = 1) -> torch.Tensor:
    mean = normalize(torch.randn(num_dims, generator=generator(1, "mean"), dtype=torch.float64), dim=0)
    return mean.expand(num, num_dims)


@pytest.mark.parametrize("num_dims", [2, 3, 5, 64])
@pytest.mark.parametrize("concentration", [0.0, 0.3, 4.0, 80.0])
def test_mean_resultant_length_and_radius(num_dims: int, concentration: float):
    num = 20_000 if num_dims < 10 else 6000
    mean = mean_direction(num_dims, num)
    direction, radius = draw_von_mises_fisher(mean, concentration, generator(0, "vmf"))
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(num, dtype=torch.float64))
    cosine = (direction * mean).sum(1)
    order = num_dims / 2
    # I_(d/2) / I_(d/2 - 1), and 0 at 0, where SciPy divides 0 by 0.
    ratio = scipy.special.ive(order, concentration or 1.0) / scipy.special.ive(order - 1, concentration or 1.0)
    expected = ratio if concentration else 0.0
    error = 5 * float(cosine.std()) / math.sqrt(num)
    assert float(cosine.mean()) == pytest.approx(expected, abs=error)
    # Around the mean direction all directions are alike: the rest of the resultant vanishes.
    rest = (direction - cosine[:, None] * mean).mean(0)
    assert float(rest.norm()) < 5 / math.sqrt(num)
    assert scipy.stats.kstest(radius.numpy(), scipy.stats.chi(num_dims).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("num_dims", "concentration"), [(2, 1.5), (2, 40.0), (3, 2.0), (6, 10.0)])
def test_the_distribution_of_the_cosine_is_scipys(num_dims: int, concentration: float):
    mean = mean_direction(num_dims, 4000)
    direction, _ = draw_von_mises_fisher(mean, concentration, generator(2, "vmf"))
    oracle = scipy.stats.vonmises_fisher(mean[0].numpy(), concentration).rvs(4000, random_state=0)
    ours, theirs = (direction * mean).sum(1).numpy(), oracle @ mean[0].numpy()
    assert scipy.stats.ks_2samp(ours, theirs).pvalue > 1e-3


def test_a_concentrated_draw_is_near_its_mean():
    mean = mean_direction(64, 2000)
    direction, _ = draw_von_mises_fisher(mean, 1e6, generator(0, "vmf"))
    assert float(1 - (direction * mean).sum(1).mean()) == pytest.approx(63 / 2e6, rel=0.05)
    axis = torch.zeros(10, 3, dtype=torch.float64)
    axis[:, 0] = 1
    assert float(draw_von_mises_fisher(axis, 1e9, generator(0, "x"))[0][:, 0].min()) > 1 - 1e-7


@pytest.mark.parametrize(("num_dims", "concentration"), [(2, 0.7), (3, 5.0), (10, 30.0), (64, 200.0)])
def test_log_density_is_scipys(num_dims: int, concentration: float):
    mean = mean_direction(num_dims)[0]
    x = normalize(torch.randn(20, num_dims, generator=generator(0, "x"), dtype=torch.float64))
    ours = log_von_mises_fisher_constant(num_dims, concentration) + concentration * (x @ mean)
    oracle = scipy.stats.vonmises_fisher(mean.numpy(), concentration).logpdf(x.numpy())
    np.testing.assert_allclose(ours, oracle, rtol=1e-9)


def test_the_constant_does_not_underflow_in_many_dimensions():
    # At 0 it is minus the log area of the sphere; its slope is minus the mean resultant length, about kappa / d.
    area = math.log(2) + 1536 * math.log(math.pi) - math.lgamma(1536)
    assert log_von_mises_fisher_constant(3072, 0.0) == pytest.approx(-area)
    slope = log_von_mises_fisher_constant(3072, 50.5) - log_von_mises_fisher_constant(3072, 49.5)
    assert slope == pytest.approx(-50 / 3072, rel=1e-3)


def test_without_concentration_it_is_a_gaussian():
    source = VonMisesFisherSource(0.0, centres=2)
    source.fit(data(), generator(0, "fit"))
    x = source.sample(8000, (2,), generator(0, "x"))
    for column in x.T:
        assert scipy.stats.kstest(column.numpy(), scipy.stats.norm.cdf).pvalue > 1e-3
    torch.testing.assert_close(source.log_prob(x[:50]), GaussianSource().log_prob(x[:50]))


@pytest.mark.parametrize("centres", [2, "data"])
def test_training_points_get_noise_from_their_own_direction(centres):
    x1 = data(600)
    source = VonMisesFisherSource(50.0, centres=centres)
    source.fit(x1, generator(0, "fit"))
    x0 = source.sample_for(x1, generator(0, "noise"))
    if centres == "data":
        mean = normalize(x1.double())
    else:
        assert source.mean_directions.shape == (2, 2)
        mean = source.mean_directions[(x1.double() @ source.mean_directions.T).argmax(1)]
    cosine = (normalize(x0.double()) * mean).sum(1)
    assert float(cosine.mean()) == pytest.approx(scipy.special.ive(1, 50) / scipy.special.ive(0, 50), abs=0.004)
    # What the whole batch is distributed like is what is drawn without data.
    free = source.sample(600, (2,), generator(1, "noise"))
    assert scipy.stats.ks_2samp(x0[:, 0].numpy(), free[:, 0].numpy()).pvalue > 1e-3


def test_unpaired_noise_does_not_look_at_the_data():
    x1 = data(50)
    source = VonMisesFisherSource(50.0, centres=2, paired=False)
    source.fit(x1, generator(0, "fit"))
    assert torch.equal(source.sample_for(x1, generator(1, "x")), source.sample(50, (2,), generator(1, "x")))


def test_spherical_k_means_finds_clusters_and_a_local_optimum():
    rng = generator(0, "clusters")
    centre = normalize(torch.randn(4, 8, generator=rng, dtype=torch.float64))
    label = torch.arange(4).repeat_interleave(torch.tensor([10, 40, 50, 100]))
    x = normalize(centre[label] + 0.1 * torch.randn(200, 8, generator=rng, dtype=torch.float64))
    found, cluster = spherical_k_means(x, 4, generator(1, "seeds"))
    assert {tuple(cluster[label == number].unique().tolist()).__len__() for number in range(4)} == {1}
    assert len(cluster.unique()) == 4
    assert torch.equal(cluster, (x @ found.T).argmax(1))
    for number in range(4):
        torch.testing.assert_close(found[number], normalize(x[cluster == number].sum(0), dim=0))
    alone, own = spherical_k_means(x[:3], 3, generator(0, "all"))
    assert sorted(own.tolist()) == [0, 1, 2]
    torch.testing.assert_close(alone[own], x[:3])
    same, _ = spherical_k_means(x[:1].repeat(5, 1), 3, generator(0, "same"))
    torch.testing.assert_close(same, x[:1].repeat(3, 1))


def test_clusters_that_still_change_are_told(monkeypatch):
    x = normalize(torch.randn(400, 8, generator=generator(0, "points"), dtype=torch.float64))
    monkeypatch.setattr(von_mises_fisher, "_MAX_ROUNDS", 1)
    with pytest.warns(UserWarning, match="of 20 centroids still moves vectors after 1 rounds"):
        spherical_k_means(x, 20, generator(0, "seeds"))


def test_mistakes_are_one_line():
    for arguments, match in (
        ({"concentration": -1.0}, "concentration must be a number in"),
        ({"concentration": math.inf}, "concentration must be a number in"),
        ({"concentration": 1.0, "centres": 0}, "centres must be"),
        ({"concentration": 1.0, "centres": "means"}, "centres must be"),
        ({"concentration": 1.0, "dof": -2.0}, "dof must be a number in"),
    ):
        with pytest.raises(ValueError, match=match):
            VonMisesFisherSource(**arguments)
    with pytest.raises(ValueError, match="5 centroids need as many data points, got 4"):
        VonMisesFisherSource(1.0, centres=5).fit(data(4), generator(0, "fit"))
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        VonMisesFisherSource(1.0).fit(torch.randn(9, 1, generator=generator(0, "x")), generator(0, "fit"))
    holed = data(9)
    holed[4] = 0
    with pytest.raises(ValueError, match="1 of 9 data points are zero"):
        VonMisesFisherSource(1.0).fit(holed, generator(0, "fit"))
