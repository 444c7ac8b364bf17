"""Two processes share one potential: one fits it, both look their own noise up."""

from __future__ import annotations

import pytest
import torch
from processes import Workplace, matching

from flowbench.data import FlowDataModule


@pytest.mark.slow
def test_two_processes_look_up_their_own_noise_by_one_potential(workplace: Workplace):
    folder = workplace.folder / "semidiscrete-2"
    folder.mkdir()
    init = {"steps": 40, "batch": 256, "chi2": None}
    pairing = {"class_path": "semidiscrete_spy.SpyPairing", "init_args": init}
    trainer = {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 1}
    data = {"dataset": "digits", "batch_size": 32, "dequantize": "none"}
    path = workplace.write(
        "semidiscrete", matching("FlowMatching", pairing=pairing), evaluator=None, trainer=trainer, data=data
    )
    places = {"FLOWBENCH_TEST_PAIRS": str(folder), "FLOWBENCH_CACHE": str(workplace.folder / "own-cache")}
    outcome = workplace.two("fit", "-c", path, f"run.dir={folder}", **places)
    assert outcome.status == 0, outcome.stderr
    assert len(list((workplace.folder / "own-cache" / "potentials").glob("*.pt"))) == 1
    points = FlowDataModule("digits", dequantize="none").model_values("train").flatten(1)
    noise = []
    for step in (0, 1):
        for rank in (0, 1):
            x0, x1, g = torch.load(folder / f"pairs-{step}-{rank}.pt", weights_only=True)
            assert len(x0) == 16, "a process's share of the batch"
            index = (x0.flatten(1).double() @ (points - points.mean(0)).double().T + g).argmax(1)
            assert torch.equal(x1.flatten(1), points[index])
            noise.append(x0.flatten(1))
    assert len(torch.cat(noise).unique(dim=0)) == 64, "no two steps or processes share their noise"
