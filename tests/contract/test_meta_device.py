"""Every family on the meta device, which holds no numbers.

A value that the host reads raises, as does a tensor that was left on another device. What passes here neither waits for
a GPU nor mixes devices on one.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flowbench.flows import JacobiInverse
from tests.marks import slow

from .builders import CASES, IDS, LIKE_A_SIBLING, batch_of, build

META = torch.device("meta")

# What a family does on the host, and why. Everything else runs on meta.
SOLVES_ON_THE_HOST = "an assignment is solved on the CPU; StreamPairing solves it ahead"
ASKS_FOR_CONVERGENCE = "fixed-point iteration stops when the host sees that it has converged"
READ_ONCE_A_CALL = {
    "conditioned.check_labels": "a given label out of range would end the whole process on a GPU",
    "latents.space._check_spread": "the bound of an encoder without a variance is no number",
}
EXCEPTIONS = {
    "ot_cfm": {"loss": SOLVES_ON_THE_HOST},
    "cfm_bridge": {"loss": "entropic transport iterates until the host sees that its marginals are right"},
    "tarflow_jacobi": {"sample": ASKS_FOR_CONVERGENCE, "trajectory": ASKS_FOR_CONVERGENCE},
}


def on_meta(name, spec, conditional: bool):
    module = build(name, spec, conditional=conditional).to(META)
    for solver in (getattr(module, "solver", None), getattr(module, "likelihood_solver", None)):
        if solver is not None:
            solver.num_steps = 1  # all are alike, and meta operators are slow
    batch = batch_of(spec, 8)
    label = batch.label.to(META) if conditional else None
    # Indices key generators of the host and stay there, as the datamodule leaves them.
    return module, dataclasses.replace(batch, x=batch.x.to(META), label=label)


def steps(module, batch, conditional: bool):
    """What a run asks of a flow, by name."""
    noise = torch.empty(8, *module.flow_shape, device=META)
    label = batch.label
    guided = {"guidance": 2.0} if conditional else {}
    yield "loss", lambda: module.train().training_loss(batch, torch.Generator()).total.backward()
    yield "sample", lambda: module.eval().sample(noise, label, **guided)
    if module.describe().can_choose_evaluations:
        yield "sample", lambda: module.eval().sample(noise, label, network_evaluations=4)
    if module.density != "none":
        yield "log_prob", lambda: module.eval().log_prob(batch.x, label, index=batch.index)
    yield "trajectory", lambda: module.eval().trajectory(noise, label, num_points=3)
    yield "encode", lambda: module.eval().encode(batch.x, label)


# Variants whose operations others have, with other numbers.
ALIKE = {"tarflow_tweedie", "cfm_cosine"}
# Points, where images have the same variant.
ON_IMAGES = {f"{name}-points" for name, spec in CASES if spec.name == "images"}
FIRST = [
    pytest.param(name, spec, id=case, marks=[pytest.mark.slow] * (name in ALIKE or case in LIKE_A_SIBLING | ON_IMAGES))
    for (name, spec), case in zip(CASES, IDS, strict=True)
]


@pytest.mark.parametrize("conditional", [slow(False), True])
@pytest.mark.parametrize(("name", "spec"), FIRST)
def test_nothing_is_read_and_nothing_is_left_on_another_device(name, spec, conditional, monkeypatch):
    for check in READ_ONCE_A_CALL:
        monkeypatch.setattr(f"flowbench.families.{check}", lambda *_: None)
    module, batch = on_meta(name, spec, conditional)
    excused = EXCEPTIONS.get(name, {})
    for step, run in steps(module, batch, conditional):
        if step in excused:
            with pytest.raises((RuntimeError, NotImplementedError)):
                run()
        else:
            run()


def test_the_test_sees_a_value_that_is_read_and_a_tensor_left_behind():
    module, batch = on_meta("cfm", CASES[0][1], False)
    inner = module.network.forward
    module.network.forward = lambda x, t, label: inner(x, t, label) * x.mean().item()
    with pytest.raises(RuntimeError):
        module.training_loss(batch, torch.Generator())
    module.network.forward = lambda x, t, label: inner(x, t, label) + torch.ones(x.shape)
    with pytest.raises(RuntimeError):
        module.training_loss(batch, torch.Generator())


def test_the_exceptions_are_about_families_that_are_there():
    assert set(EXCEPTIONS) <= {name for name, _ in CASES}
    assert isinstance(build("tarflow_jacobi", CASES[0][1]).inverse_method, JacobiInverse)
