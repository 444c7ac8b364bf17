"""Autoregressive flows whose networks compute in another precision than their state, and compiled ones."""

from __future__ import annotations

import pytest
import torch

from flowbench.flows import AutoregressiveGuidance, JacobiInverse, SequentialInverse
from tests.closeness import assert_near, deviation

from .autoregressive_builders import make_flow, normal

LABEL = torch.tensor([0, 1, 2, 3])
METHODS = [SequentialInverse(certify=True), JacobiInverse(0.0), JacobiInverse(0.0, 4)]


@pytest.mark.parametrize("start", ["learned", "zero"])
@pytest.mark.parametrize("method", METHODS)
def test_a_bfloat16_network_keeps_the_state_in_float32(start, method):
    flow, x = make_flow(2, scale="softplus", soft_clip=4.0, start=start), normal(4, 6, 2, dtype=torch.float32)
    reference, reference_logdet = flow(x.double(), LABEL)
    flow.bfloat16()
    z, logdet = flow(x, LABEL)
    found = flow.invert(z, LABEL, method=method)
    assert {t.dtype for t in (z, logdet, found.x, found.residual)} == {torch.float32}
    torch.testing.assert_close(z.double(), reference, rtol=0, atol=5e-2)
    torch.testing.assert_close(logdet.double(), reference_logdet, rtol=0, atol=1e-1)
    torch.testing.assert_close(found.x, x, rtol=0, atol=4e-2)
    assert flow.inverse(z, LABEL, AutoregressiveGuidance(2.0, temperature=0.5), method).isfinite().all()
    (z.square().sum() - logdet.sum()).backward()
    assert {p.grad.dtype for p in flow.parameters() if p.grad is not None} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("dtype", "state"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float64)],
)
def test_iterates_that_differ_by_rounding_are_the_same(dtype, state):
    """Otherwise rounding, the state's or the network's, would take as many evaluations as there are tokens."""
    flow = make_flow(1, scale="softplus", soft_clip=4.0, num_tokens=24, std=0.1).to(dtype)
    z = normal(4, 24, 2, dtype=state)
    found = flow.invert(z, LABEL, method=JacobiInverse(0.0, certify=False))
    assert found.iterations.max() <= 12
    ulps = 2 if dtype == torch.bfloat16 else 100
    assert deviation(found.x, flow.inverse(z, LABEL)) < ulps * torch.finfo(dtype).eps


@pytest.mark.parametrize("method", METHODS)
def test_a_float32_network_takes_a_float64_state(method):
    flow, x = make_flow(2).float(), normal(4, 6, 2)
    reference = make_flow(2)(x, LABEL)[0]
    z, logdet = flow(x, LABEL)
    back = flow.inverse(z, LABEL, method=method)
    assert {t.dtype for t in (z, logdet, back)} == {torch.float64}
    assert_near(z.float(), reference.float())
    assert_near(back.float(), x.float())


@pytest.mark.parametrize("scale", ["exp", pytest.param("softplus", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_compiler_changes_neither_noise_nor_log_determinant(scale):
    torch.compiler.reset()
    flow, x = make_flow(2, scale=scale, soft_clip=4.0, std=0.2), normal(4, 6, 2)
    expected = flow(x, LABEL)
    assert expected[1].abs().min() > 1e-3
    compiled = torch.compile(flow, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, LABEL), expected, rtol=1e-11, atol=1e-11)
