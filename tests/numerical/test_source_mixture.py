"""The mixture source against SciPy's densities."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from sklearn.mixture import GaussianMixture

from flowbench.core.seeds import generator
from flowbench.flows.source.mixture import GaussianMixtureSource
from tests.numerical.sources import data


def test_it_is_the_mixture_that_it_fitted():
    x = data(1500, (1, 2, 2))
    source = GaussianMixtureSource(3)
    source.fit(x, generator(0, "fit"))
    weight, mean, factor = (source._values[name].double() for name in ("weight", "mean", "factor"))
    parts = [
        np.log(w) + scipy.stats.multivariate_normal(m, f @ f.T).logpdf(x[:60].flatten(1).double().numpy())
        for w, m, f in zip(weight.numpy(), mean.numpy(), factor.numpy(), strict=True)
    ]
    np.testing.assert_allclose(source.log_prob(x[:60]), scipy.special.logsumexp(parts, axis=0), rtol=1e-9)
    drawn = source.sample(20_000, (1, 2, 2), generator(0, "x")).flatten(1).double()
    flat = x.flatten(1).double()
    # Expectation maximisation matches the first two moments of the data.
    torch.testing.assert_close(drawn.mean(0), flat.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), flat.T.cov(), atol=0.07, rtol=0)
    assert torch.equal(*(_refit(x).sample(5, (1, 2, 2), generator(0, "x")) for _ in range(2)))


def _refit(x: torch.Tensor) -> GaussianMixtureSource:
    source = GaussianMixtureSource(3)
    source.fit(x, generator(0, "fit"))
    return source


def test_a_mixture_that_has_not_converged_says_so(monkeypatch):
    fit = GaussianMixture.fit

    def stopped(self, points):
        self.max_iter = 1
        return fit(self, points)

    monkeypatch.setattr(GaussianMixture, "fit", stopped)
    with pytest.warns(UserWarning, match="of 3 components has not converged after 1 steps") as told:
        _refit(data(300, (1, 2, 2)))
    assert len(told) == 1


def test_mistakes_are_one_line():
    with pytest.raises(ValueError, match="num_components must be a whole number in"):
        GaussianMixtureSource(0)
    with pytest.raises(ValueError, match="covariance_floor must be a number in"):
        GaussianMixtureSource(2, covariance_floor=0.0)
    with pytest.raises(ValueError, match="6 components need as many data points, got 5"):
        GaussianMixtureSource(6).fit(data(5), generator(0, "fit"))
