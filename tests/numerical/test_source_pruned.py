"""Pruned sampling against its definition, brute force and normal tails."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from flowbench.core.seeds import generator
from flowbench.flows import GaussianSource
from flowbench.flows.source.mixture import GaussianMixtureSource
from flowbench.flows.source.pruned import PrunedSource, largest_cosines, principal_axes
from flowbench.flows.source.radial import NormAlignedSource, RadialSource
from tests.numerical.sources import data

SHAPE = (1, 4, 5)


def flat_data(num: int = 500) -> Tensor:
    """Twenty dimensions with standard deviations from 1 down to nearly 0, and a mean of its own."""
    rng = generator(0, "pruned-data")
    return (0.3 + torch.linspace(1, 0.01, 20) * torch.randn(num, 20, generator=rng)).reshape(-1, *SHAPE)


def fitted(*arguments, points: Tensor | None = None, **options) -> PrunedSource:
    source = PrunedSource(*arguments, **options)
    source.fit(flat_data() if points is None else points, generator(0, "fit"))
    return source


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.flatten(1).double())


def axes_of_data() -> tuple[Tensor, Tensor]:
    """All axes in both directions, (40, 20), and the largest cosine of each with a data point."""
    basis = principal_axes(unit(flat_data()))
    return torch.cat([basis, -basis]), largest_cosines(basis, unit(flat_data()))


def test_axes_are_those_of_the_definition():
    both, gamma = axes_of_data()
    basis, directions = both[:20], unit(flat_data())
    torch.testing.assert_close(basis @ basis.T, torch.eye(20, dtype=torch.float64), atol=1e-10, rtol=0)
    rotated = basis @ directions.T.cov() @ basis.T
    torch.testing.assert_close(rotated, torch.diag(rotated.diagonal()), atol=1e-12, rtol=0)
    brute = torch.stack([max(v @ x for x in directions) for v in both])
    torch.testing.assert_close(gamma, brute)
    assert not torch.equal(gamma[:20], gamma[20:])
    source = fitted(0.45, threshold=0.2)
    torch.testing.assert_close(source.pruned_axes, both[brute <= 0.2], atol=1e-7, rtol=0)


@pytest.mark.parametrize("method", ["rejection", "truncated"])
def test_the_state_is_the_pruned_axes_and_nothing_else(method):
    """A few of very many axes are a few rows; what is loaded draws what was fitted."""
    points = torch.linspace(1, 0.01, 300) * torch.randn(400, 300, generator=generator(0, "wide"))
    source = fitted(0.2, quantile=0.05, points=points, method=method)
    state = source.get_extra_state()
    both_sides = 30 - len(state["values"]["axes"])
    assert 0 <= both_sides <= 15
    assert sum(value.nbytes for value in state["values"].values()) <= 30 * 300 * 4 + 200
    again = PrunedSource(0.2, quantile=0.05, method=method)
    again.set_extra_state(state)
    assert torch.equal(again.pruned_axes, source.pruned_axes)
    assert len(again.pruned_axes) == 30
    drawn = source.sample_indexed(range(20), (300,), 0, "sample")
    assert torch.equal(again.sample_indexed(range(20), (300,), 0, "sample"), drawn)


@pytest.mark.parametrize("axes", ["low", "random", "high"])
@pytest.mark.parametrize("method", ["rejection", "truncated"])
def test_samples_satisfy_every_half_space(axes, method):
    source = fitted(0.4, quantile=0.2, axes=axes, method=method)
    assert len(source.pruned_axes) == 8
    for x in (source.sample(3000, SHAPE, generator(1, "x")), source.sample_indexed(range(200), SHAPE, 0, "sample")):
        # The last place of float32 may be rounded across the border.
        assert float((unit(x) @ source.pruned_axes.T).max()) <= 0.4 + 1e-6
        assert source.log_prob(x.double()).isfinite().double().mean() > 0.99


def test_controls_prune_as_many_axes():
    both, gamma = axes_of_data()

    def chosen(axes: str) -> set[int]:
        cosine = fitted(0.4, quantile=0.2, axes=axes).pruned_axes @ both.T
        assert float(cosine.amax(1).min()) > 1 - 1e-6
        return set(cosine.argmax(1).tolist())

    order = gamma.argsort().tolist()
    assert chosen("low") == set(order[:8])
    assert chosen("high") == set(order[-8:])
    assert len(chosen("random")) == 8
    assert chosen("random") != chosen("low")


def test_both_methods_draw_from_one_distribution():
    """Naive rejection is the definition; the other must agree in every direction and in the norms."""
    naive = fitted(0.35, quantile=0.3).sample(8000, SHAPE, generator(1, "a")).flatten(1)
    exact = fitted(0.35, quantile=0.3, method="truncated").sample(8000, SHAPE, generator(2, "b")).flatten(1)
    axes = axes_of_data()[0][:20].float()
    values = [scipy.stats.ks_2samp((naive @ v).numpy(), (exact @ v).numpy()).pvalue for v in axes]
    assert min(values) > 1e-3 / 20
    assert scipy.stats.kstest(exact.double().norm(dim=1).numpy(), scipy.stats.chi(20).cdf).pvalue > 1e-3


@pytest.mark.parametrize("source", [None, GaussianSource(2.5), RadialSource("chi", dof=9)])
@pytest.mark.parametrize("method", ["rejection", "truncated"])
def test_at_one_the_draws_are_those_of_the_source(source, method):
    pruned, plain = fitted(1.0, quantile=0.3, source=source, method=method), source or GaussianSource()
    assert torch.equal(pruned.sample(50, SHAPE, generator(0, "x")), plain.sample(50, SHAPE, generator(0, "x")))
    keyed = plain.sample_indexed(range(9), SHAPE, 3, "sample")
    assert torch.equal(pruned.sample_indexed(range(9), SHAPE, 3, "sample"), keyed)
    assert torch.equal(pruned.log_prob(keyed), plain.log_prob(keyed))
    assert pruned.acceptance_rate == (1.0, 0.0)


def test_rejection_keeps_the_draws_that_fit():
    source = fitted(0.4, quantile=0.2)
    whole = GaussianSource().sample_indexed(range(300), SHAPE, 0, "sample")
    inside = (unit(whole) @ source.pruned_axes.T).amax(1) <= 0.4
    drawn = source.sample_indexed(range(300), SHAPE, 0, "sample")
    assert torch.equal((drawn == whole).flatten(1).all(1), inside)
    value, error = source.acceptance_rate
    assert float(inside.double().mean()) == pytest.approx(value, abs=5 * math.sqrt(value * (1 - value) / 300) + error)


def test_acceptance_is_the_product_of_normal_tails_for_few_axes():
    """In many dimensions sqrt(d) times a cosine is a standard normal, and a few axes are nearly independent."""
    rng = generator(0, "wide")
    points = 0.2 + torch.linspace(1, 0.01, 600) * torch.randn(700, 600, generator=rng)
    source = fitted(0.075, quantile=3 / 1200, points=points)
    value, error = source.acceptance_rate
    assert len(source.pruned_axes) == 3
    assert error < 0.003
    assert value == pytest.approx(scipy.stats.norm.cdf(0.075 * math.sqrt(600)) ** 3, abs=0.004)


def test_acceptance_against_brute_force_and_where_it_is_tiny():
    source = fitted(0.35, quantile=0.3, method="truncated")
    value, error = source.acceptance_rate
    normal = torch.randn(60_000, 20, generator=generator(0, "brute"), dtype=torch.float64)
    brute = float(((unit(normal) @ source.pruned_axes.T).amax(1) <= 0.35).double().mean())
    assert value == pytest.approx(brute, abs=4 * math.hypot(error, math.sqrt(brute / 60_000)))
    # One axis in one direction: the cosine's own distribution, (1 + s) / 2 ~ Beta.
    cosine = scipy.stats.beta(19 / 2, 19 / 2)
    single = fitted(0.2, quantile=1 / 40, threshold=None)
    assert single.acceptance_rate.value == pytest.approx(cosine.cdf(0.6), abs=5 * single.acceptance_rate.standard_error)
    tiny = fitted(0.3, quantile=0.9, axes="random", method="truncated")
    assert 1e-5 < tiny.acceptance_rate.value < 5e-3
    assert tiny.acceptance_rate.standard_error < 0.1 * tiny.acceptance_rate.value
    assert tiny.sample(100, SHAPE, generator(0, "x")).isfinite().all()


def test_log_density_is_normalised_inside_and_infinite_outside():
    source = fitted(0.4, quantile=0.2, source=GaussianSource(2.0))
    x = GaussianSource(2.0).sample(200, SHAPE, generator(0, "x"))
    inside = (unit(x) @ source.pruned_axes.T).amax(1) <= 0.4
    assert 20 < int(inside.sum()) < 180
    log_prob = source.log_prob(x)
    shift = math.log(source.acceptance_rate.value)
    torch.testing.assert_close(log_prob[inside], GaussianSource(2.0).log_prob(x)[inside] - shift)
    assert bool((log_prob[~inside] == -math.inf).all())


def test_a_norm_aligned_source_keeps_its_scale_when_pruned():
    """The authors' sampler forgets the scale when both are asked for."""
    points = flat_data()
    for method in ("rejection", "truncated"):
        source = fitted(0.4, quantile=0.2, source=NormAlignedSource(), method=method)
        assert not source.source.needs_fit
        norm = source.sample(4000, SHAPE, generator(0, "x")).flatten(1).norm(dim=1).mean()
        assert float(norm) == pytest.approx(float(points.flatten(1).norm(dim=1).mean()), rel=0.02)


def test_pruning_an_axis_in_the_plane():
    """Half of the plane's directed axes: the share of angles that is left is known."""
    source = fitted(math.cos(math.pi / 6), quantile=0.25, points=data())
    value, error = source.acceptance_rate
    assert value == pytest.approx(1 - 1 / 6, abs=4 * error)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_cosine": 0.0, "quantile": 0.3}, r"max_cosine must be a number in .*, got 0.0"),
        ({"max_cosine": 1.2, "quantile": 0.3}, "max_cosine must be a number in"),
        ({"max_cosine": 0.3}, "quantile or threshold"),
        ({"max_cosine": 0.3, "quantile": 0.3, "threshold": 0.1}, "quantile or threshold"),
        ({"max_cosine": 0.3, "quantile": 1.0}, "quantile must be a number in"),
        ({"max_cosine": 0.3, "threshold": 0.3}, "threshold must be a number in"),
        ({"max_cosine": 0.3, "quantile": 0.3, "axes": "middle"}, "axes must be"),
        ({"max_cosine": 0.3, "quantile": 0.3, "method": "fast"}, "method must be"),
        ({"max_cosine": 0.3, "quantile": 0.3, "max_rounds": 0}, "max_rounds must be"),
        ({"max_cosine": 0.3, "quantile": 0.3, "source": GaussianMixtureSource(2)}, "only an isotropic source"),
    ],
)
def test_impossible_options_are_one_line(options, match):
    with pytest.raises(ValueError, match=match) as error:
        PrunedSource(**options)
    assert "\n" not in str(error.value).split("got", maxsplit=1)[0]


def test_what_cannot_be_drawn_is_refused_when_it_is_fitted():
    with pytest.raises(ValueError, match=r"keep one draw in inf.*raise max_cosine or max_rounds, or lower quantile"):
        fitted(0.2, quantile=0.99, axes="high", method="truncated")
    with pytest.raises(ValueError, match=r"too few for max_rounds=3: set method=truncated"):
        fitted(0.35, quantile=0.5, axes="random", max_rounds=3)
    with pytest.raises(ValueError, match=r"no axis has gamma <= threshold=-0\.9; the smallest is"):
        fitted(0.35, threshold=-0.9)
    with pytest.raises(ValueError, match=r"not below max_cosine=0\.1: directions of data would be left out"):
        fitted(0.1, quantile=0.5)
    holed = flat_data()
    holed[7] = 0
    with pytest.raises(ValueError, match="1 of 500 data points are zero"):
        fitted(0.4, quantile=0.2, points=holed)


def test_a_source_that_finds_nothing_says_what_it_keeps():
    source = fitted(0.4, quantile=0.2)
    source.max_rounds = 1
    with pytest.raises(ValueError, match=r"found no direction for \d+ of 100 samples in 1 rounds \(it keeps 0\.\d+"):
        source.sample(100, SHAPE, generator(0, "x"))
