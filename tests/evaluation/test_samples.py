"""Streaming collection and cached references."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from flowbench.data import DataSpec, FlowDataModule
from flowbench.evaluation import samples as samples_module
from flowbench.evaluation.samples import Collector, RealSet, read_features, write_features
from flowbench.metrics import IdentityFeatures

SPEC = DataSpec("pictures", "1", (1, 4, 4), levels=256)


class Counting:
    """Sums of rows and columns, which counts what passes through it."""

    name, dimension, checksum, protocol = "sums", 8, "abc", "sums/as-is"

    def __init__(self, checksum: str = "abc") -> None:
        self.checksum = checksum
        self.seen: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        flat = images.float()[:, 0, :4, :4]
        return torch.cat([flat.sum(1), flat.sum(2)], dim=1)


def pictures(num: int, seed: int = 0) -> Tensor:
    return torch.rand(num, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def collect(x: Tensor, batch: int, counts: dict, num_shown: int = 3, order=None):
    counting = Counting()
    collector = Collector(SPEC, {"sums": counting}, counts, num_shown)
    for index in (torch.arange(len(x)) if order is None else order).split(batch):
        collector.add(index, x[index])
    return collector.gathered("generated"), counting


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_batches_and_their_order_change_nothing(batch):
    x = pictures(23)
    whole, _ = collect(x, 23, {"sums": 23})
    order = torch.randperm(23, generator=torch.Generator().manual_seed(batch))
    parts, _ = collect(x, batch, {"sums": 23}, order=order)
    assert torch.equal(whole.features(Counting()), parts.features(Counting()))
    assert torch.equal(parts.shown, x[:3])
    assert (len(parts), parts.is_finite) == (23, True)


def test_only_the_samples_asked_for_pass_through_the_network():
    found, counting = collect(pictures(23), 5, {"sums": 8})
    assert sum(counting.seen) == 8
    assert found.features(Counting(), 8).shape == (8, 8)
    with pytest.raises(AssertionError, match="9 features of sums were not collected"):
        found.features(Counting(), 9)


def test_what_is_held_does_not_grow_with_the_size_of_an_image():
    found, _ = collect(pictures(500), 50, {"sums": 500}, num_shown=4)
    held = sum(v.numel() for v in [*found._features.values(), found.shown])
    assert held == 500 * 8 + 4 * 16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_sample_is_remembered(bad):
    x = pictures(6)
    x[4, 0, 0, 0] = bad
    assert not collect(x, 2, {"sums": 6})[0].is_finite


def test_statistics_are_those_of_the_features():
    found, _ = collect(pictures(40), 9, {"sums": 40})
    statistics = found.statistics(Counting(), 30)
    features = found.features(Counting(), 30).double().numpy()
    np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features, rowvar=False), rtol=1e-9)
    assert found.statistics(Counting(), 30) is statistics


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def test_reference_features_are_computed_once_for_all_processes(cache):
    data, first = FlowDataModule("digits"), Counting()
    expected = RealSet(data, "train").features(first, 50)
    assert sum(first.seen) == 50
    again = Counting()
    assert torch.equal(RealSet(FlowDataModule("digits"), "train").features(again, 50), expected)
    assert again.seen == []
    # Features are those of the pictures, in the order of the split.
    images = data.uint8_images("train", torch.arange(50))
    assert torch.equal(expected, Counting()(images))


@pytest.mark.parametrize("change", ["count", "split", "weights", "dataset"])
def test_what_the_features_depend_on_is_in_the_key(cache, change):
    RealSet(FlowDataModule("digits"), "train").features(Counting(), 50)
    counting = Counting("other" if change == "weights" else "abc")
    data = FlowDataModule("digits")
    if change == "dataset":
        data.entry.spec  # noqa: B018
        object.__setattr__(
            data, "entry", type(data.entry)(**{**vars(data.entry), "spec": DataSpec("digits", "2", (1, 8, 8), 10, 17)})
        )
    # More samples than are there; fewer are the beginning of them.
    RealSet(data, "val" if change == "split" else "train").features(counting, 51 if change == "count" else 50)
    assert sum(counting.seen) in (50, 51)
    assert len(list(cache.glob("*.npz"))) == 2


def test_more_than_the_split_holds_is_the_split(cache):
    assert RealSet(FlowDataModule("digits"), "val").features(Counting(), 10_000).shape == (360, 8)


def test_fewer_samples_are_the_beginning_of_more(cache):
    expected = RealSet(FlowDataModule("digits"), "train").features(Counting(), 50)
    counting = Counting()
    assert torch.equal(RealSet(FlowDataModule("digits"), "train").features(counting, 20), expected[:20])
    assert counting.seen == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_cache_is_read(cache):
    expected = RealSet(FlowDataModule("digits"), "train").features(Counting(), 50)
    for lock in cache.glob("*.lock"):
        lock.unlink()
    cache.chmod(0o555)
    try:
        assert torch.equal(RealSet(FlowDataModule("digits"), "train").features(Counting(), 50), expected)
    finally:
        cache.chmod(0o755)


def test_finding_takes_no_lock(cache, monkeypatch):
    """So that a read-only cache serves; root, who runs some test machines, may write there all the same."""
    RealSet(FlowDataModule("digits"), "train").features(Counting(), 50)
    monkeypatch.setattr(samples_module, "locked", None)
    assert RealSet(FlowDataModule("digits"), "train").features(Counting(), 50).shape == (50, 8)


def test_statistics_are_kept_beside_the_features(cache):
    RealSet(FlowDataModule("digits"), "train").statistics(Counting(), 50)
    files = sorted(cache.glob("*.npz"))
    assert len(files) == 2
    kept = RealSet(FlowDataModule("digits"), "train")
    for file in files:
        if "features" in file.name:
            file.unlink()
    counting = Counting()
    assert kept.statistics(counting, 50).count == 50
    assert counting.seen == []


def test_statistics_are_the_same_bits_every_time(cache):
    first, second = (RealSet(FlowDataModule("digits"), "train").statistics(IdentityFeatures(64)) for _ in range(2))
    assert first.count == second.count == 1077
    assert torch.equal(first.sum, second.sum)
    assert torch.equal(first.outer, second.outer)


def test_raw_pixels_are_not_cached(cache):
    RealSet(FlowDataModule("digits"), "train").features(IdentityFeatures(64), 50)
    assert not cache.exists()


def test_metadata_that_disagree_and_damaged_files_are_errors(tmp_path):
    path = tmp_path / "f.npz"
    write_features(path, torch.zeros(3, 2), {"dataset": "digits", "count": 3})
    assert read_features(path, {"dataset": "digits"}).shape == (3, 2)
    with pytest.raises(ValueError, match=r"have count=3, expected 4; delete the file"):
        read_features(path, {"count": 4})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot read the features in .*f.npz \(\w+\); delete the file"):
        read_features(path, {})
