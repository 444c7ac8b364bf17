"""The directions of SinkGD, SWAN and SGD as mathematics: by hand, by SVD, and by POT's Sinkhorn."""

from __future__ import annotations

import itertools

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.training import SGD, SWAN, SinkGD
from flowbench.training.optimizers.sinkgd import normalize_rows_and_columns
from flowbench.training.optimizers.swan import standardize_rows, whiten

RULES = [SinkGD(), SinkGD(iterations=1), SWAN(), SGD()]
SHAPES = [(16, 48), (48, 16), (24, 24)]
# Worked out from the equations of arXiv 2502.06742 and 2412.13148 apart from this code.
GRADIENT = [[3.0, -1.0, 2.0], [0.5, 4.0, -2.0]]
SINKHORN = {
    1: [[1.400827, -0.407202, 1.087420], [0.194126, 1.354321, -0.904167]],
    5: [[1.393978, -0.334783, 0.987061], [0.238382, 1.374016, -1.012774]],
}
STANDARD = [[0.980581, -1.372813, 0.392232], [-0.135457, 1.286842, -1.151385]]
WHITE = [[0.765769, -0.628238, -0.137531], [0.283310, 0.521520, -0.804830]]

sizes = st.integers(2, 12)
seeds = st.integers(0, 10**6)
quick = settings(max_examples=30, deadline=None)


def gaussian(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns))).to(dtype)


def tensor(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """U V^T over the singular values that are not zero, by NumPy's SVD."""
    u, s, vt = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    keep = s > 1e-9 * s[0]
    return torch.from_numpy(u[:, keep] @ vt[keep])


# ---- SinkGD -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", SINKHORN)
def test_sinkgd_by_hand(iterations):
    found = SinkGD(iterations=iterations).direction(tensor(GRADIENT)[None])[0]
    torch.testing.assert_close(found, tensor(SINKHORN[iterations]), atol=1e-6, rtol=0)


@given(rows=sizes, columns=sizes, seed=seeds, iterations=st.integers(1, 6))
@quick
def test_columns_are_exact_and_entries_are_of_size_one_after_any_iteration(rows, columns, seed, iterations):
    found = normalize_rows_and_columns(gaussian(rows, columns, seed), iterations)
    assert found.square().sum(0).sqrt().sub(rows**0.5).abs().max() < 1e-9
    assert float(found.square().mean()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_converge_and_what_is_normalised_is_left_alone(shape):
    rows, columns = shape
    found = normalize_rows_and_columns(gaussian(rows, columns), 20)
    assert found.square().sum(1).sqrt().sub(columns**0.5).abs().max() < 1e-3
    fixed = normalize_rows_and_columns(gaussian(rows, columns), 500)
    torch.testing.assert_close(normalize_rows_and_columns(fixed, 1), fixed, atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_squares_follow_sinkhorns_iterations(shape):
    """POT's plan between uniform laws at the cost -log of the squares, regularisation 1."""
    rows, columns = shape
    gradient = gaussian(rows, columns)
    cost = -gradient.square().log().numpy()
    plan = ot.sinkhorn(np.full(rows, 1 / rows), np.full(columns, 1 / columns), cost, 1.0, stopThr=1e-13)
    found = normalize_rows_and_columns(gradient, 300).square().numpy() / (rows * columns)
    np.testing.assert_allclose(found, plan, atol=1e-9)


@given(rows=sizes, columns=sizes, seed=seeds, log_scale=st.floats(-6, 6))
@quick
def test_the_scale_signs_and_zeros_of_a_gradient(rows, columns, seed, log_scale):
    gradient = gaussian(rows, columns, seed)
    gradient[0, 0] = gradient[-1] = 0.0
    for rule in (SinkGD(), SWAN()):
        found = rule.direction(gradient[None])[0]
        scaled = rule.direction(10**log_scale * gradient[None])[0]
        torch.testing.assert_close(scaled, found, atol=1e-6, rtol=1e-6)
    assert torch.equal(SinkGD().direction(gradient[None])[0].sign(), gradient.sign())


@given(seed=seeds)
@settings(max_examples=5, deadline=None)  # each takes 4,000 iterations
def test_permutations_and_positive_scales_of_rows_and_columns(seed):
    rng = np.random.default_rng(seed)
    gradient, rows, columns = gaussian(6, 9, seed), rng.permutation(6), rng.permutation(9)
    permuted = normalize_rows_and_columns(gradient[rows][:, columns], 5)
    torch.testing.assert_close(permuted, normalize_rows_and_columns(gradient, 5)[rows][:, columns])
    left, right = (torch.from_numpy(rng.uniform(0.2, 5, size)) for size in (6, 9))
    limit = normalize_rows_and_columns(gradient, 2000)
    torch.testing.assert_close(
        normalize_rows_and_columns(left[:, None] * gradient * right, 2000), limit, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
def test_of_a_single_row_or_column_only_signs_remain(shape):
    gradient = gaussian(*shape)
    torch.testing.assert_close(normalize_rows_and_columns(gradient, 1), gradient.sign(), atol=1e-12, rtol=0)


# ---- SWAN -------------------------------------------------------------------------------------------------


def test_swan_by_hand():
    standard = standardize_rows(tensor(GRADIENT))
    torch.testing.assert_close(standard, tensor(STANDARD), atol=1e-6, rtol=0)
    torch.testing.assert_close(whiten(standard, 30), tensor(WHITE), atol=1e-6, rtol=0)
    found = SWAN(iterations=30).direction(tensor(GRADIENT)[None])[0]
    torch.testing.assert_close(found, tensor(WHITE) * 6**0.5 / 2**0.5, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_swan_whitens_as_a_singular_value_decomposition_does(shape, dtype):
    rows, columns = shape
    gradient = gaussian(*shape, dtype=dtype)
    array = gradient.double().numpy()
    standard = (array - array.mean(1, keepdims=True)) / array.std(1, keepdims=True)
    white = polar(torch.from_numpy(standard))
    expected = white * (rows * columns) ** 0.5 / white.norm()
    # The rows of a standardised matrix sum to zero, so there is a direction of nothing, and float32 has rounding in it,
    # which grows by a half in each iteration: no more of them than the other directions need.
    iterations, allowed = (20, 2e-3) if dtype == torch.float32 else (30, 1e-6)
    found = SWAN(iterations=iterations).direction(gradient[None])[0].double()
    torch.testing.assert_close(found, expected, atol=allowed, rtol=0)
    assert float(found.square().mean()) == pytest.approx(1.0, abs=1e-3)


def test_whitened_rows_are_orthonormal_and_orthogonal_matrices_are_left_alone():
    white = whiten(gaussian(10, 40), 20)
    torch.testing.assert_close(white @ white.T, torch.eye(10, dtype=torch.float64), atol=1e-6, rtol=0)
    tall = whiten(gaussian(40, 10), 20)
    torch.testing.assert_close(tall.T @ tall, torch.eye(10, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(whiten(white, 20), white, atol=1e-6, rtol=0)


def test_newton_and_schulz_converge_quadratically_near_the_end():
    gradient = gaussian(12, 36)
    expected = polar(gradient)
    errors = [float((whiten(gradient, k) - expected).norm(p=2)) for k in range(1, 16)]
    late = [(a, b) for a, b in itertools.pairwise(errors) if 1e-7 < a < 0.1]
    assert len(late) >= 2
    assert max(errors[-3:]) < 1e-12
    # x -> 1.5 x - 0.5 x^3 has the error 1.5 e^2 - 0.5 e^3 at x = 1 - e.
    assert all(after <= 12 * before**2 for before, after in late)


def test_fifteen_iterations_reach_a_four_hundredth_of_the_largest_value():
    values = torch.tensor([1.0, 0.1, 1 / 400], dtype=torch.float64)
    found = torch.linalg.svdvals(whiten(torch.diag(values), 15))
    assert found.min() > 0.8
    assert found.max() <= 1 + 1e-12


# ---- all --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_dead_rows_columns_and_matrices_stay_dead(rule):
    gradient = torch.stack([gaussian(6, 8, dtype=torch.float32), torch.zeros(6, 8)])
    gradient[0, 2] = 0.0
    found = rule.direction(gradient)
    assert torch.isfinite(found).all()
    assert not found[1].any()
    assert found[0, 2].abs().max() < 1e-5
    gradient[0, :, 3] = 0.0
    if isinstance(rule, SinkGD):
        assert not rule.direction(gradient)[0, :, 3].any()


def test_a_constant_row_has_nothing_left_after_its_mean():
    gradient = gaussian(3, 7, dtype=torch.float32)
    gradient[1] = 0.1
    found = standardize_rows(gradient)
    assert not found[1].any()
    assert found[0].square().mean() == pytest.approx(1.0, abs=1e-5)
    assert not standardize_rows(gradient[:, :1]).any()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_each_matrix_of_a_batch_is_alone(rule):
    batch = torch.stack([gaussian(5, 7, seed) for seed in range(3)])
    found = rule.direction(batch)
    for one, expected in zip(found, batch, strict=True):
        torch.testing.assert_close(one, rule.direction(expected[None])[0])


@pytest.mark.parametrize("scale", [1e-15, 1e15])
@pytest.mark.parametrize("rule", [SinkGD(), SWAN()], ids=repr)
def test_tiny_and_huge_gradients_of_float32(rule, scale):
    gradient = gaussian(6, 9, dtype=torch.float32)
    found = rule.direction(scale * gradient[None])
    torch.testing.assert_close(found, rule.direction(gradient[None]), atol=1e-4, rtol=1e-4)
