from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowbench import metrics
from flowbench.core.seeds import generator
from flowbench.metrics import (
    FeatureStatistics,
    IdentityFeatures,
    density_coverage,
    frechet_distance,
    kernel_distance,
    mmd_rbf,
    precision_recall,
    sliced_wasserstein2,
    wasserstein2,
)
from tests.ranks import run_ranks

NUM, DIM = 37, 3  # odd, so that two processes hold ragged shares


def samples(side: str) -> Tensor:
    x = torch.randn(NUM, DIM, generator=generator(9, side))
    return x if side == "real" else 0.7 * x + 0.4


def build() -> dict[str, metrics.FrechetDistance | metrics.SampleMetric]:
    extractor = IdentityFeatures(DIM)
    return {
        "fd": metrics.FrechetDistance(extractor),
        "kid": metrics.KernelDistance(extractor),
        "pr": metrics.PrecisionRecallMetric(extractor),
        "dc": metrics.DensityCoverageMetric(extractor),
        "w2": metrics.Wasserstein2(extractor),
        "sw2": metrics.SlicedWasserstein2(extractor, num_projections=30),
        "mmd": metrics.MaximumMeanDiscrepancy(extractor),
    }


def expected() -> dict[str, float]:
    real, fake = samples("real"), samples("generated")
    pair = FeatureStatistics.from_features(real), FeatureStatistics.from_features(fake)
    pr, dc = precision_recall(real, fake), density_coverage(real, fake)
    return {
        "fd": frechet_distance(*pair),
        "kid": kernel_distance(fake, real).mean,
        "precision": pr.precision,
        "recall": pr.recall,
        "density": dc.density,
        "coverage": dc.coverage,
        "w2": wasserstein2(fake, real),
        "sw2": sliced_wasserstein2(fake, real, 30, generator(0, "sliced-wasserstein")),
        "mmd": mmd_rbf(fake, real),
    }


def flat(values: dict[str, Tensor | dict[str, Tensor]]) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, value in values.items():
        out |= {k: float(v) for k, v in value.items()} if isinstance(value, dict) else {name: float(value)}
    return out


def feed(metric: metrics.FrechetDistance | metrics.SampleMetric, sizes: list[int], start: int = 0) -> None:
    for side in ("real", "generated"):
        position = start
        for size in sizes:
            metric.update(samples(side)[position : position + size], real=side == "real")
            position += size


@pytest.mark.parametrize("sizes", [[NUM], [10, 0, 20, 7], [1] * NUM])
def test_equal_to_the_functions_for_any_batches(sizes):
    modules = build()
    for metric in modules.values():
        feed(metric, sizes)
    assert flat({k: m.compute() for k, m in modules.items()}) == pytest.approx(expected(), rel=1e-9)


def test_reset_copies_and_pickles():
    for name, metric in build().items():
        feed(metric, [NUM])
        value = flat({name: metric.compute()})
        assert flat({name: pickle.loads(pickle.dumps(metric)).compute()}) == value
        assert flat({name: copy.deepcopy(metric).compute()}) == value
        metric.reset()
        feed(metric, [20, 17])
        assert flat({name: metric.compute()}) == pytest.approx(value, rel=1e-9)


class NetworkExtractor(nn.Module):
    """An extractor that is a module, the tempting case."""

    name, dimension, checksum = "net", 5, "0"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).detach()


@pytest.mark.parametrize("kind", [metrics.FrechetDistance, metrics.KernelDistance])
def test_the_extractor_stays_out_of_the_module(kind):
    metric = kind(NetworkExtractor())
    metric.persistent(True)
    feed(metric, [NUM])
    assert torch.isfinite(metric.compute())
    assert list(metric.parameters()) == []
    assert [name for name, _ in metric.named_modules()] == [""]
    assert not any("layer" in key for key in metric.state_dict())
    holder = nn.Module()
    holder.metric = metric
    assert list(holder.parameters()) == []


def test_sums_stay_in_float64():
    metric = metrics.FrechetDistance(IdentityFeatures(DIM))
    metric.half()
    feed(metric, [NUM])
    assert metric.real_outer.dtype == torch.float64
    assert metric.compute().dtype == torch.float64


def test_users_mistakes_cost_one_line():
    for name, metric in build().items():
        with pytest.raises(ValueError, match="samples") as error, pytest.warns(UserWarning, match="before"):
            metric.compute()
        assert "\n" not in str(error.value), name
    metric = metrics.FrechetDistance(IdentityFeatures(DIM))
    with pytest.raises(ValueError, match="NaN"):
        metric.update(torch.full((2, DIM), torch.nan), real=True)
    with pytest.raises(ValueError, match="coordinates"):
        metric.update(torch.zeros(2, DIM + 1), real=True)


def _worker(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        start, size = (0, 20) if rank == 0 else (20, 17)
        modules = build()
        for metric in modules.values():
            feed(metric, [size], start)
        values = flat({name: metric.compute() for name, metric in modules.items()})
        alone = metrics.Wasserstein2(IdentityFeatures(DIM))
        if rank == 0:  # the other process saw nothing
            feed(alone, [NUM])
        values["w2 alone"] = float(alone.compute())
        local = FeatureStatistics.from_features(samples("real")[start : start + size])
        twice = [local.all_reduce(), local.all_reduce()][1]
        torch.save(
            {"values": values, "count": twice.count, "sum": twice.sum, "outer": twice.outer},
            f"{results}{rank}",
        )
    finally:
        dist.destroy_process_group()


def test_two_processes_with_ragged_shares_equal_one(tmp_path):
    run_ranks(_worker, str(tmp_path / "store"), str(tmp_path / "rank"))
    whole = FeatureStatistics.from_features(samples("real"))
    for rank in range(2):
        result = torch.load(tmp_path / f"rank{rank}")
        assert result["values"].pop("w2 alone") == pytest.approx(expected()["w2"], rel=1e-9)
        assert result["values"] == pytest.approx(expected(), rel=1e-9)
        assert result["count"] == NUM
        torch.testing.assert_close(result["sum"], whole.sum, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result["outer"], whole.outer, rtol=1e-12, atol=1e-12)
