"""The teacher that a student holds but does not own: what counting operations on the meta device leaves of it."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from flowbench.data import Batch
from flowbench.families import BiFlow, FlowMap, FlowModule, NormalizedFlowMatching
from flowbench.families.pairing.pair_store import weights_checksum
from flowbench.families.pairing.teacher import FrozenTeacher
from flowbench.networks import MLP

from ..contract.builders import POINTS, batch_of, build, perturb

NETWORK = partial(MLP, width=16, depth=1)
MAKERS = {
    "biflow": ("tarflow", lambda teacher: BiFlow(POINTS, teacher=teacher, depth=1, width=16, head_dim=8)),
    "nfm": ("tarflow", lambda teacher: NormalizedFlowMatching(POINTS, NETWORK, teacher=teacher)),
    "flow_map": (
        "cfm",
        lambda teacher: FlowMap(
            POINTS, partial(NETWORK, second_time=True), teacher=teacher, initialise_from_teacher=False
        ),
    ),
}


def trained(family: str) -> FlowModule:
    teacher = build(family, POINTS).eval()
    perturb(teacher)
    return teacher


@pytest.mark.parametrize("family", list(MAKERS))
def test_a_trained_teacher_keeps_its_weights_when_its_student_is_counted_from_shapes(family: str) -> None:
    name, make = MAKERS[family]
    teacher = trained(name)
    torch.manual_seed(0)
    flow = make(teacher)
    perturb(flow)
    batch = batch_of(POINTS, 8)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    loss = flow.training_loss(batch, torch.Generator().manual_seed(0)).total
    shapes = copy.deepcopy(flow).to("meta")
    found = shapes.training_loss(Batch(batch.x.to("meta")), torch.Generator()).total
    assert found.is_meta
    for key, value in teacher.state_dict().items():
        assert value.device.type == "cpu", key
        assert torch.equal(value, before[key]), key
    assert torch.equal(flow.training_loss(batch, torch.Generator().manual_seed(0)).total, loss)


def test_copies_share_the_teacher_and_its_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = trained("tarflow")
    teacher = FrozenTeacher(flow)
    assert teacher.checksum == weights_checksum(flow)
    monkeypatch.setattr("flowbench.families.pairing.teacher.weights_checksum", lambda _: pytest.fail("read twice"))
    assert copy.deepcopy({"a": teacher})["a"].checksum == teacher.checksum


def test_a_teacher_of_shapes_alone_stays_what_it_is() -> None:
    flow = trained("tarflow").to("meta")
    assert FrozenTeacher(flow).on(torch.device("meta")) is flow
