"""The table of steps to AdamW's final loss, from checkpoints that hold nothing else."""

from __future__ import annotations

import pytest
import torch

from benchmarks.optimizer_steps import lines, read_losses

LOSSES = {
    "cfm_adamw": {0: {20: 0.9, 40: 0.7, 60: 0.5}, 1: {20: 0.9, 40: 0.4, 60: 0.5}},
    "cfm_swan": {0: {20: 0.6, 40: 0.5, 60: 0.4}, 1: {20: 0.6, 40: 0.52, 60: 0.51}},
    "flow_alone": {0: {60: 0.1}},
}


def cells(folder, losses) -> None:
    for contender, seeds in losses.items():
        for seed, found in seeds.items():
            path = folder / "cells" / contender / f"seed-{seed}" / "checkpoints" / "last.ckpt"
            path.parent.mkdir(parents=True)
            torch.save({"state_dict": {}, "validation_losses": found}, path)


@pytest.mark.parametrize("problem", ["", "two_moons/"])
def test_the_first_validation_at_adamws_last_loss_counts(tmp_path, problem):
    cells(tmp_path, {problem + name: seeds for name, seeds in LOSSES.items()})
    _, _, *rows = lines(read_losses(tmp_path))
    assert rows == [
        f"| {problem}cfm_adamw | 0 | 60 | 0.5000 | 0.5000 | 60 | 1.00 |",
        f"| {problem}cfm_adamw | 1 | 60 | 0.5000 | 0.5000 | 40 | 0.67 |",
        f"| {problem}cfm_swan | 0 | 60 | 0.4000 | 0.5000 | 40 | 0.67 |",
        f"| {problem}cfm_swan | 1 | 60 | 0.5100 | 0.5000 | not reached |  |",
    ]


def test_a_folder_without_cells_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="give the folder of a bench"):
        read_losses(tmp_path)
