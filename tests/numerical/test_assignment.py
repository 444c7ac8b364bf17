"""Exact assignment against brute force, SciPy and POT; sizes and inputs that make solvers stumble."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from flowbench.core.seeds import generator
from flowbench.data import get_density
from flowbench.flows.coupling.assignment import assign
from flowbench.flows.coupling.base import squared_distances

# One problem of all points, and two to five doublings, whole and with a remainder.
SIZES = [30, 33, 100, 256, 500]


def clouds(num: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and data: eight Gaussians in two dimensions, else points near a subspace of at most 32."""
    rng = generator(seed, "clouds")
    x0 = torch.randn(num, dim, generator=rng)
    if dim == 2:
        return x0, get_density("eight_gaussians").sample_labelled(num, rng)[0]
    latent = min(dim, 32)
    mixing = torch.randn(latent, dim, generator=rng) / latent**0.5
    return x0, 0.5 * torch.randn(num, latent, generator=rng) @ mixing


def mean_cost(cost: torch.Tensor, index: torch.Tensor) -> float:
    assert sorted(index.tolist()) == list(range(len(cost)))
    return cost[index, torch.arange(len(cost))].mean().item()


def scipy_cost(cost: torch.Tensor) -> float:
    return cost.numpy()[linear_sum_assignment(cost.numpy())].mean()


@given(seed=st.integers(0, 999), num=st.integers(1, 7), integers=st.booleans())
@settings(max_examples=40, deadline=None)
def test_small_problems_match_brute_force(seed: int, num: int, integers: bool):
    cost = torch.randn(num, num, generator=generator(seed), dtype=torch.float64)
    cost = (3 * cost).round() if integers else cost
    best = min(cost[list(p), range(num)].mean().item() for p in permutations(range(num)))
    assert mean_cost(cost, assign(cost)) == pytest.approx(best, rel=1e-12, abs=1e-12)


@given(num=st.integers(1, 150), dim=st.integers(1, 4), seed=st.integers(0, 999), shift=st.sampled_from([0.0, 30.0]))
@settings(max_examples=60, deadline=None)
def test_any_size_costs_what_scipy_says(num: int, dim: int, seed: int, shift: float):
    x0, x1 = clouds(num, dim, seed)
    cost = squared_distances(x0, x1 + shift)
    assert mean_cost(cost, assign(cost)) == pytest.approx(scipy_cost(cost), rel=1e-12)


@pytest.mark.parametrize("num", SIZES)
@pytest.mark.parametrize("dim", [1, 2, 3, 64])
def test_larger_problems_cost_what_scipy_says(num: int, dim: int):
    cost = squared_distances(*clouds(num, dim))
    assert mean_cost(cost, assign(cost)) == pytest.approx(scipy_cost(cost), rel=1e-12)


@pytest.mark.parametrize("num", SIZES)
def test_the_order_of_the_points_changes_no_cost(num: int):
    """Halves that are nothing alike: both sorted, the same way and against each other."""
    x0, x1 = (points[points[:, 0].argsort()] for points in clouds(num, 2))
    for other in (x1, x1.flip(0)):
        cost = squared_distances(x0, other)
        assert mean_cost(cost, assign(cost)) == pytest.approx(scipy_cost(cost), rel=1e-12)


@pytest.mark.parametrize("num", [33, 100, 256, 500])
def test_costs_of_no_geometry(num: int):
    rng = generator(num)
    ties = torch.randint(0, 5, (num, num), generator=rng).double()
    heavy = torch.randn(num, num, generator=rng, dtype=torch.float64).exp() ** 3
    shifted = 1e6 * torch.randn(num, 1, generator=rng, dtype=torch.float64) + heavy
    blocks = 1e9 * (torch.arange(num)[:, None] % 3 != torch.arange(num) % 3) + heavy
    for cost in (ties, heavy, shifted, -heavy, blocks):
        assert mean_cost(cost, assign(cost)) == pytest.approx(scipy_cost(cost), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("num", [1, 2, 30, 100, 250, 500])
def test_equal_points_and_repeated_points(num: int):
    assert mean_cost(torch.zeros(num, num, dtype=torch.float64), assign(torch.zeros(num, num).double())) == 0
    repeated = torch.arange(num).remainder(3).double()[:, None].expand(-1, 2)
    shuffled = repeated[torch.randperm(num, generator=generator(0))]
    cost = squared_distances(repeated, shuffled)
    assert mean_cost(cost, assign(cost)) == 0


@pytest.mark.parametrize("num", SIZES)
def test_the_answer_is_a_function_of_the_costs(num: int):
    for cost in (squared_distances(*clouds(num, 2)), torch.randint(0, 3, (num, num), generator=generator(1)).double()):
        first, kept = assign(cost), cost.clone()
        assert torch.equal(first, assign(cost.clone()))
        assert torch.equal(first, assign(cost.T.contiguous().T))
        assert torch.equal(cost, kept)


def test_bad_costs_are_refused():
    for cost in (torch.zeros(2, 3), torch.zeros(2), torch.full((2, 2), float("nan"))):
        with pytest.raises(ValueError, match="finite square matrix"):
            assign(cost.double())


@pytest.mark.slow
def test_no_folder_to_write_to_costs_only_time(tmp_path: Path):
    """Numba finds nowhere to keep its machine code."""
    source = tmp_path / "loops.py"
    source.write_text(
        "from flowbench.core.machine_code import numba_njit\n"
        "@numba_njit\ndef twice(x: float) -> float:\n    return 2 * x\n"
    )
    program = f"""
import runpy
import numba.core.caching as caching
assert caching.CacheImpl._locator_classes
caching.CacheImpl._locator_classes = []
print(runpy.run_path({str(source)!r})["twice"](21))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout == "42\n"
    assert not list(tmp_path.rglob("*.nbi"))


@pytest.mark.slow
@pytest.mark.parametrize("num", [128, 256, 512, 1024, 2048])
@pytest.mark.parametrize("dim", [2, 64, 784, 3072])
def test_large_problems_cost_what_pot_says(num: int, dim: int):
    """Distances included: ours may multiply in float32, the reference is float64 throughout."""
    x0, x1 = clouds(num, dim)
    reference = torch.cdist(x0.double(), x1.double()).square()
    best = ot.emd2([], [], reference.numpy(), numItermax=10**8)
    assert mean_cost(reference, assign(squared_distances(x0, x1))) == pytest.approx(best, rel=1e-9)
