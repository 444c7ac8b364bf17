"""Two processes of the real command line keep one flow map: what is differentiated inside a step is synchronised."""

from __future__ import annotations

import copy

import pytest
import torch
from processes import NETWORK, matching

OBJECTIVES = {
    "MeanFlow(tangent=self, derivative=jvp)": {
        "class_path": "flowbench.flows.MeanFlow",
        "init_args": {"tangent": "self"},
    },
    "Lagrangian(derivative=jvp)": {"class_path": "flowbench.flows.Lagrangian", "init_args": {"derivative": "jvp"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_both_processes_have_the_same_weights_after_forward_derivatives(workplace, name):
    network = copy.deepcopy(NETWORK)
    network["init_args"]["second_time"] = True
    model = {
        **matching("FlowMap", network=network, map_objective=OBJECTIVES[name]),
        "class_path": "ddp_dummies.SpyFlowMap",
    }
    run = "flow-map-" + name.partition("(")[0]
    path = workplace.write(run, model, evaluator=None, trainer={"val_check_interval": 6})
    outcome = workplace.two(
        "fit", "-c", path, f"run.dir={workplace.folder / run}", FLOWBENCH_TEST_WEIGHTS=str(workplace.folder)
    )
    assert outcome.status == 0, outcome.stderr
    first, second = (torch.load(workplace.folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
