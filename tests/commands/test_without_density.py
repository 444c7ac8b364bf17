"""A family whose samples have no density, and a network of one's own, under the commands that all families share."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn

from flowbench.commands import runs
from flowbench.config import Experiment
from flowbench.core.rows import read_rows
from flowbench.data import FlowDataModule
from flowbench.families import FlowMatching
from flowbench.families.block_count import count_block
from flowbench.flows import AffineBlock
from flowbench.networks import DiT
from flowbench.tasks.anomaly.probes import Scores

from .conftest import POINTS


class WithoutDensity(FlowMatching):
    """Flow matching that says to have no density, as a sampler with a memory does."""

    @property
    def density(self):
        return "none"


def test_a_family_without_a_density_is_tested_and_has_no_row_of_it(tmp_path):
    file = tmp_path / "points.yaml"
    file.write_text(POINTS)
    experiment = Experiment.from_files(
        [file], [f"run.dir={tmp_path / 'run'}", "budget.steps=2", f"model.class_path={__name__}.WithoutDensity"]
    )
    runs.fit(experiment, test=True)
    rows = read_rows(tmp_path / "run" / "rows.jsonl")
    assert {row.status for row in rows} == {"ok"}
    assert "w2" in {row.metric for row in rows}
    assert not any("nll" in row.metric for row in rows)


def test_scores_of_anomalies_are_refused_before_anything_is_trained():
    data = FlowDataModule("one_class_digits_0")
    module = WithoutDensity(data.spec, partial(DiT, width=16, depth=1, num_heads=2))
    with pytest.raises(ValueError, match="samples of WithoutDensity have no density"):
        Scores().check(module, data)


@dataclasses.dataclass
class Sums:
    """State of a pass."""

    sums: torch.Tensor


class OwnNetwork(nn.Module):
    """What the protocol asks of a causal network, and nothing more: no level, no layers by name."""

    num_tokens, token_dim, num_classes, num_slots = 4, 1, None, 4

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(1, 2, bias=False)

    def forward(self, x_BND, label=None, *, temperature=1.0):
        return self.read(x_BND.cumsum(1) - x_BND)

    def allocate_cache(self, batch_size):
        return Sums(torch.zeros(batch_size, 4, 1))

    def extend(self, previous_BLD, start, cache, label=None, *, temperature=1.0):
        before = cache.sums[:, start - 1 : start] if start else torch.zeros_like(previous_BLD[:, :1])
        cache.sums[:, start : start + previous_BLD.shape[1]] = before + previous_BLD.cumsum(1)
        return self.read(cache.sums[:, start : start + previous_BLD.shape[1]])

    def step(self, previous_BD, position, cache, label=None, *, temperature=1.0):
        return self.extend(previous_BD[:, None], position, cache, label)[:, 0]


def test_a_network_of_ones_own_is_counted():
    found = count_block(AffineBlock(OwnNetwork()))
    assert found.parameters == 2
    assert found.evaluation_flops == 2 * 2 * 4  # a multiply-add for each of two numbers of four tokens
    assert found.sampling_flops == 2 * 2 * 4
    assert found.cache_bytes == 4 * 4
    assert not found.labelled
