"""Sequential inversion: what it costs, its chunks, its certificate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowbench.flows import (
    AutoInverse,
    AutoregressiveGuidance,
    JacobiInverse,
    SequentialInverse,
)
from tests.closeness import assert_near

from .autoregressive_builders import make_flow, normal, starflow

STARTS = ["learned", "zero"]


def test_the_cost_weighs_blocks_by_their_parameters():
    flow, z, label = starflow(), normal(2, 6, 2), torch.tensor([0, 1])
    sizes = [sum(p.numel() for p in block.parameters()) for block in flow.blocks]
    plain = flow.invert(z, label)
    assert plain.network_evaluations == pytest.approx(1.0)
    assert plain.sequential_steps == 18
    assert plain.iterations.equal(torch.full((3, 2), 6))
    assert plain.residual is None
    for blocks in ("all", "deep"):  # the shallow blocks have no labels
        guided = flow.invert(z, label, AutoregressiveGuidance(2.0, blocks=blocks))
        assert guided.sequential_steps == 18
        assert guided.network_evaluations == pytest.approx(1 + sizes[2] / sum(sizes))
    guided = flow.invert(z, label, AutoregressiveGuidance(2.0, temperature=0.5))
    assert guided.network_evaluations == pytest.approx(2.0)
    certified = flow.invert(z, label, method=SequentialInverse(certify=True))
    assert certified.network_evaluations == pytest.approx(2.0)
    assert certified.sequential_steps == 21


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("guidance", [None, AutoregressiveGuidance(2.0)])
@pytest.mark.parametrize(
    "method", [SequentialInverse(), JacobiInverse(1e-3), JacobiInverse(1e-3, 4), JacobiInverse(0.0, 1)]
)
def test_the_cost_is_what_runs(start, guidance, method):
    """Tokens that pass a layer of the networks, counted from outside; without certificates."""
    flow, tokens, calls = make_flow(2, start=start, std=0.2), 0, 0

    def count(module, args, out):
        nonlocal tokens, calls
        tokens, calls = tokens + out[..., 0].numel(), calls + 1

    for block in flow.blocks:
        block.network.blocks[0].mlp.register_forward_hook(count)
    method = (
        JacobiInverse(method.tolerance, method.block_size, certify=False) if method.name != "sequential" else method
    )
    inversion = flow.invert(normal(3, 6, 2), torch.tensor([0, 1, 2]), guidance, method)
    slots = 6 if start == "learned" else 5
    assert calls == inversion.sequential_steps
    assert tokens / (3 * 2 * slots) == pytest.approx(inversion.network_evaluations)


@pytest.mark.parametrize("chunk", [1, 2, 4, 7])
def test_chunks_change_nothing_but_the_number_of_steps(chunk):
    flow, z, label = make_flow(2), normal(5, 6, 2), torch.tensor([0, 1, 2, 3, 0])
    guidance = AutoregressiveGuidance(2.0)
    whole = flow.invert(z, label, guidance)
    parts = flow.invert(z, label, guidance, SequentialInverse(chunk))
    torch.testing.assert_close(parts.x, whole.x, rtol=0, atol=1e-12)
    assert parts.network_evaluations == pytest.approx(whole.network_evaluations)
    assert parts.sequential_steps == whole.sequential_steps * -(-5 // chunk)


@pytest.mark.parametrize("method", [SequentialInverse(2), JacobiInverse(), JacobiInverse(0.0, 4), AutoInverse()])
def test_an_empty_batch_is_inverted(method):
    inversion = make_flow(2).invert(normal(0, 6, 2), method=method)
    assert inversion.x.shape == (0, 6, 2)
    assert inversion.network_evaluations == 0


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 0.0, 1e-5), (torch.bfloat16, 1e-3, 0.5)])
def test_the_certificate_is_the_residual_of_the_flow(dtype, least, most):
    """A bfloat16 network's, the same arithmetic step by step and at once, stands well above rounding of the state."""
    flow, z, label = make_flow(3).to(dtype), normal(4, 6, 2).float(), torch.tensor([0, 1, 2, 3])
    inversion = flow.invert(z, label, method=SequentialInverse(certify=True))
    expected = (flow(inversion.x, label)[0] - z).abs().amax((1, 2))
    assert_near(inversion.residual, expected, scale=z.abs().max().item(), ulps=16)
    assert least < inversion.residual.max() < most


def test_auto_chooses_by_the_batch_and_the_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    method = AutoInverse(1e-2, crossover=3, block_size=4)
    assert method.chosen(3, 2, cpu) is method.jacobi
    assert method.chosen(4, 2, cpu).name == "sequential"
    assert AutoInverse(crossover=0).chosen(1, 2, cpu).name == "sequential"
    assert AutoInverse().chosen(1, 3, cpu).name == "jacobi(1e-03,block=[None,None,48])"
    assert AutoInverse().chosen(4, 3, cpu).name == "jacobi(1e-03,block=[None,None,1])"
    assert AutoInverse().chosen(5, 3, cpu).name == "sequential"
    assert AutoInverse().chosen(1, 3, cuda).name == "jacobi(1e-03)"
    for device in (cpu, cuda):
        assert AutoInverse().chosen(10**6, 3, device).name == "sequential"
    flow, z = make_flow(2), normal(4, 6, 2)
    for batch in (3, 4):
        assert flow.invert(z[:batch], method=method).residual.max() <= 1e-2
        uncertified = AutoInverse(1e-2, crossover=3, certify=False)
        assert flow.invert(z[:batch], method=uncertified).residual is None
    assert flow.invert(z[:4], method=AutoInverse()).iterations.tolist()[-1] == [6] * 4
    assert method.name == "auto(jacobi(1e-02,block=4),crossover=3)"


def test_auto_passes_its_options_on():
    for device in (torch.device("cpu"), torch.device("cuda")):
        chosen = AutoInverse(1e-2, max_iterations=5, certify=False).chosen(1, 2, device)
        assert (chosen.tolerance, chosen.max_iterations, chosen.certify) == (1e-2, 5, False)
        for batch in (1, 10**6):
            with pytest.raises(ValueError, match="one entry for each of 3 blocks, got 2"):
                AutoInverse(block_size=[1, 2]).chosen(batch, 3, device)


def test_names():
    assert SequentialInverse(chunk=4).name == "sequential"
    assert JacobiInverse().name == "jacobi(1e-03)"
    assert JacobiInverse(2.5e-4, [None, 1, 8], 5).name == "jacobi(0.00025,block=[None,1,8],iterations=5)"
    assert JacobiInverse(0.0).name == "jacobi(0e+00)"
    assert JacobiInverse(1e-3, certify=False).name == "jacobi(1e-03,uncertified)"
    assert JacobiInverse(0.00123456789).name == "jacobi(0.00123456789)"
    assert JacobiInverse(1.0000001e-3).name != JacobiInverse(1e-3).name
    assert JacobiInverse(block_size=(None, 1)).name == JacobiInverse(block_size=[None, 1]).name
    assert AutoInverse(1.0000001e-3, certify=False).name == "auto(jacobi(0.0010000001,uncertified))"


def test_windows_may_come_in_any_sequence():
    flow, z = make_flow(2), normal(3, 6, 2)
    method = JacobiInverse(0.0, (3, None))
    assert flow.inverse(z, method=method).equal(flow.inverse(z, method=JacobiInverse(0.0, [3, None])))
    assert flow.inverse(z, method=JacobiInverse(0.0, np.int64(3))).equal(flow.inverse(z, method=JacobiInverse(0.0, 3)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SequentialInverse(0), "chunk must be a whole number in .*, got 0"),
        (lambda: JacobiInverse(-1.0), "tolerance must be a number in"),
        (lambda: JacobiInverse(float("nan")), "tolerance must be a number in"),
        (
            lambda: JacobiInverse(block_size=0),
            "block_size must be a whole number in .*, got 0",
        ),
        (lambda: JacobiInverse(block_size=2.0), "block_size must be .*, got 2.0"),
        (lambda: JacobiInverse(block_size="12"), "block_size must be .*, got '12'"),
        (lambda: JacobiInverse(block_size=[2, 0]), "block_size"),
        (lambda: JacobiInverse(block_size=[]), "block_size"),
        (lambda: JacobiInverse(max_iterations=0), "max_iterations must be a whole number in"),
        (lambda: JacobiInverse(max_iterations=2.5), "max_iterations must be .*, got 2.5"),
        (lambda: AutoInverse(crossover=-1), "crossover must be a whole number in .*, got -1: a batch size"),
        (
            lambda: make_flow(2).inverse(normal(1, 6, 2), method=JacobiInverse(block_size=[1])),
            "one entry for each of 2 blocks, got 1",
        ),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
