"""Samples collected by one, two or three processes with ragged shares are one set."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flowbench.data import DataSpec
from flowbench.evaluation.gather import shard
from flowbench.evaluation.samples import Collector
from flowbench.metrics import FeatureStatistics, IdentityFeatures, kernel_distance, precision_recall
from tests.ranks import run_ranks

SPEC = DataSpec("pictures", "1", (1, 4, 4), levels=256)
NUM, ASKED = 41, 38  # of neither is the rest the same for two and three processes


def images() -> torch.Tensor:
    return torch.rand(NUM, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def collect(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    collector = Collector(SPEC, {"identity": IdentityFeatures(16)}, {"identity": ASKED}, 2)
    for index in shard(NUM, rank, world_size).split(4):
        collector.add(index, images()[index])
    found = collector.gathered("generated")
    features = found.features(IdentityFeatures(16), ASKED)
    return {"count": torch.tensor(len(found)), "features": features, "shown": found.shown}


def worker(rank: int, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    found = collect(rank, world_size)
    local = FeatureStatistics(16)
    local.update(IdentityFeatures(16)(SPEC.to_uint8(images()[shard(ASKED, rank, world_size)])))
    found["outer"] = local.all_reduce().outer
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_processes_collects_the_same_set(tmp_path, world_size):
    run_ranks(worker, world_size, free_port(), str(tmp_path), number=world_size)
    alone = collect(0, 1)
    statistics = FeatureStatistics.from_features(alone["features"])
    real = IdentityFeatures(16)(SPEC.to_uint8(-images()))
    for rank in range(world_size):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["count"] == NUM
        assert torch.equal(found["features"], alone["features"])
        assert torch.equal(found["shown"], alone["shown"])
        # The sums of the parts, reduced once.
        torch.testing.assert_close(found["outer"], statistics.outer, rtol=1e-12, atol=0)
        assert kernel_distance(found["features"], real) == kernel_distance(alone["features"], real)
        assert precision_recall(real, found["features"]) == precision_recall(real, alone["features"])
