"""Edits between classes, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowbench.families.zero_shot import edit
from tests.contract.builders import IMAGES, build

from .gaussian_flow import GaussianFlow, data


def test_an_edit_moves_between_the_closed_forms_of_two_classes():
    module = GaussianFlow(conditional=True)
    x, label = data(), torch.tensor([0, 1, 2, 1, 0])
    found = edit(module, x, label, torch.tensor([2, 0]))
    for i in range(5):
        k = int(label[i])
        noise = np.linalg.solve(module.lower[k].numpy(), x[i].flatten().numpy() - module.mean[k].numpy())
        for j, target in enumerate((2, 0)):
            expected = module.mean[target].numpy() + module.lower[target].numpy() @ noise
            np.testing.assert_allclose(found.x[i, j].flatten().numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(found.x[0, 1], x[0], atol=1e-10)  # its own class gives it back
    assert found.network_evaluations == 1.5


def test_an_edit_is_guided_on_request():
    module = build("tarflow", IMAGES, conditional=True).eval()
    x, label = data(IMAGES).float() * 0.5, torch.arange(5) % 3
    plain, guided = (edit(module, x, label, torch.tensor([1]), guidance=s) for s in (1.0, 3.0))
    assert torch.equal(plain.noise, guided.noise)
    assert float((plain.x - guided.x).abs().max()) > 1e-3
    assert guided.network_evaluations == plain.network_evaluations + 1


@pytest.mark.parametrize(
    ("conditional", "targets", "guidance", "expected"),
    [
        (False, [0], 1.0, "edit needs a flow that knows classes"),
        (True, [], 1.0, "one class at least"),
        (True, [7], 1.0, r"labels must lie in 0\.\.3"),
        (True, [0], 2.0, "null label"),
    ],
)
def test_edits_that_cannot_be_are_refused_in_one_line(conditional, targets, guidance, expected):
    module = GaussianFlow(conditional=conditional, label_dropout=0.0)
    label = torch.zeros(5, dtype=torch.long) if conditional else None
    with pytest.raises(ValueError, match=expected) as caught:
        edit(module, data(), label, torch.tensor(targets, dtype=torch.long), guidance)
    assert "\n" not in str(caught.value)
