from __future__ import annotations

import numpy as np
import pytest
import torch

from flowbench.core.seeds import generator
from flowbench.metrics import (
    FeatureStatistics,
    GaussianStatistics,
    frechet_distance,
    load_moments,
    load_statistics,
    save_statistics,
)


def features(num=30, dim=4):
    return torch.randn(num, dim, generator=generator(11, "file"), dtype=torch.float64)


def moments(x):
    return {"mu": x.mean(0).numpy(), "sigma": np.cov(x.numpy(), rowvar=False)}


def test_statistics_survive_a_file(tmp_path):
    statistics = FeatureStatistics.from_features(features())
    metadata = {"dataset": "digits", "version": 1, "extractor": {"name": "digits-cnn", "checksum": "ab"}}
    path = tmp_path / "deep" / "stats.npz"
    save_statistics(path, statistics, metadata)
    loaded, stored = load_statistics(path, expected={"dataset": "digits"})
    assert stored == metadata
    assert loaded.count == 30
    assert torch.equal(loaded.sum, statistics.sum)
    assert torch.equal(loaded.outer, statistics.outer)
    assert [p.name for p in path.parent.iterdir()] == ["stats.npz"]
    with pytest.raises(ValueError, match="version=1, expected 2"):
        load_statistics(path, expected={"version": 2})
    with pytest.raises(ValueError, match="resize=None, expected 'bilinear-299'"):
        load_statistics(path, expected={"resize": "bilinear-299"})
    assert load_moments(path, expected={"version": 1}).count == 30
    with pytest.raises(ValueError, match="version=1, expected 2"):
        load_moments(path, 4, {"version": 2})
    torch.testing.assert_close(load_moments(path, 4).covariance, statistics.covariance)


def test_damaged_files_are_refused_and_a_failed_write_leaves_the_old(tmp_path):
    path = tmp_path / "stats.npz"
    with pytest.raises(ValueError, match="no feature statistics"):
        load_statistics(path)
    with pytest.raises(ValueError, match="no feature statistics"):
        load_moments(path)
    save_statistics(path, FeatureStatistics.from_features(features()), {})
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        save_statistics(path, FeatureStatistics(4), {"bad": object()})
    assert path.read_bytes() == whole
    for damaged in (whole[: len(whole) // 2], b"", b"not a zip"):
        path.write_bytes(damaged)
        for load in (load_statistics, load_moments):
            with pytest.raises(ValueError, match="cannot read") as error:
                load(path)
            assert "\n" not in str(error.value)
    broken = FeatureStatistics.from_features(features())
    broken.sum[0] = torch.nan
    save_statistics(path, broken, {})
    for load in (load_statistics, load_moments):
        with pytest.raises(ValueError, match="NaN"):
            load(path)


def test_pickled_content_is_never_loaded(tmp_path):
    path = tmp_path / "stats.npz"
    np.savez(path, count=np.int64(1), sum=np.array([object()]), outer=np.zeros((1, 1)), metadata=np.str_("{}"))
    with pytest.raises(ValueError, match="cannot read"):
        load_statistics(path)
    np.savez(path, mu=np.array([object()]), sigma=np.zeros((1, 1)))
    with pytest.raises(ValueError, match="cannot read"):
        load_moments(path)

    torch.save({"mu": _Evil(), "sigma": 0}, path)
    with pytest.raises(ValueError, match="cannot read") as error:
        load_moments(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "touched").exists()


class _Evil:
    def __reduce__(self):
        return eval, ("__import__('pathlib').Path('touched').touch()",)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_reads_what_clean_fid_pytorch_fid_and_edm_write(tmp_path, dtype):
    x = features()
    path = tmp_path / "cifar10-32x32.npz"
    np.savez(path, **{name: values.astype(dtype) for name, values in moments(x).items()})
    found = load_moments(path, dimension=4)
    assert found.count is None
    assert found.mean.dtype == torch.float64
    assert frechet_distance(found, FeatureStatistics.from_features(x)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="have 4 dimensions, expected 2048"):
        load_moments(path, dimension=2048)


def test_reads_torch_fidelitys_cache(tmp_path):
    from torch_fidelity import metric_fid, utils

    x = features()
    for name, content in (
        ("statistics", metric_fid.fid_features_to_statistics(x)),
        ("float32", metric_fid.fid_features_to_statistics(x.float())),
        ("features", x.float()),
    ):
        utils.cache_lookup_one_recompute_on_miss(
            name, lambda content=content: content, cache=True, cache_root=str(tmp_path), verbose=False
        )
        found = load_moments(tmp_path / f"{name}.pt")
        assert found.count == (30 if name == "features" else None)
        torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.covariance, torch.cov(x.T), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": np.zeros((3, 3))}, r"got \(4,\) and \(3, 3\)"),
        ({"mu": np.zeros((4, 1))}, r"got \(4, 1\)"),
        ({"mu": np.zeros(4, dtype=int)}, "mu has type int64"),
        ({"mu": np.array([0, 1, np.nan, 2.0])}, "NaN or infinity"),
        ({"sigma": np.triu(np.ones((4, 4)))}, "not symmetric"),
        ({"sigma": -np.eye(4)}, "variance of -1"),
    ],
)
def test_foreign_files_with_impossible_moments_cost_one_line(tmp_path, change, message):
    path = tmp_path / "stats.npz"
    np.savez(path, **(moments(features()) | change))
    with pytest.raises(ValueError, match=message) as error:
        load_moments(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_other_contents_say_what_they_are(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"holds \['arr_0'\], expected mu and sigma"):
        load_moments(tmp_path / "a.npz")
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds a list"):
        load_moments(tmp_path / "a.pt")


def test_moments_are_as_good_as_sums():
    x, y = features(), features(20) * 1.5 + 1
    sums = [FeatureStatistics.from_features(z) for z in (x, y)]
    known = [GaussianStatistics(s.mean, s.covariance, s.count) for s in sums]
    unknown = [GaussianStatistics(s.mean, s.covariance) for s in sums]
    for a, b in (known, unknown, (known[0], sums[1])):
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(*sums), rel=1e-12)
