"""Rows of the negative log-likelihood: units, bins and protocols."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowbench.data import DataSpec
from flowbench.evaluation import Answers
from flowbench.tasks.generation import NegativeLogLikelihood
from flowbench.tasks.generation.likelihood import Densities, LogDensities

from ...evaluation.known import DIGITS, POINTS, known


def with_densities(spec: DataSpec, log_prob: Tensor, **facts) -> Answers:
    return known(spec, given={LogDensities(): Densities(log_prob, **facts)})


def test_a_uniform_density_over_the_grey_levels_costs_their_logarithm():
    """log2(17) bits per pixel, whatever the number of pixels: the density of model space is 2^-64."""
    uniform = torch.full((5,), -64 * math.log(2.0), dtype=torch.float64)
    (found,) = NegativeLogLikelihood().measure(with_densities(DIGITS, uniform))
    assert found.value == pytest.approx(math.log2(17), rel=1e-12)
    assert (found.unit, found.n) == ("bits/dim", 5)
    assert found.protocol == "exact/test/5/uniform-dequantisation-17-levels"


def test_the_density_of_noisy_data_is_no_code_length():
    log_prob = torch.full((5,), -64 * 0.5)
    (found,) = NegativeLogLikelihood().measure(with_densities(DIGITS, log_prob, reports_bits_per_dim=False))
    assert (found.value, found.unit) == (0.5, "nats/dim")


def test_points_are_counted_in_nats():
    (found,) = NegativeLogLikelihood().measure(with_densities(POINTS, torch.tensor([-1.0, -3.0]), kind="ode"))
    assert (found.value, found.unit, found.protocol) == (2.0, "nats", "ode/test/2")


def test_the_protocol_of_a_likelihood_names_what_moves_it():
    log_prob = torch.zeros(3)
    facts = {"kind": "ode", "given_label": True, "dequantize": "none", "method": "Euler(num_steps=2)"}
    (found,) = NegativeLogLikelihood().measure(with_densities(DIGITS, log_prob, **facts))
    assert found.protocol == "ode/test/3/given-label/bin-centres-17-levels/Euler(num_steps=2)"
    (found,) = NegativeLogLikelihood().measure(with_densities(POINTS, log_prob, dequantize="none"))
    assert found.protocol == "exact/test/3", "points have no bins"


def test_a_long_sum_of_float32_densities_is_done_in_double():
    values = torch.full((100_000,), 1e7, dtype=torch.float32) + torch.arange(100_000) % 2
    (found,) = NegativeLogLikelihood().measure(with_densities(POINTS, values))
    assert found.value == -10_000_000.5
