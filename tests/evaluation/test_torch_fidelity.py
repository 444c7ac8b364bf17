"""The same two sets of images through flowbench and through torch-fidelity, from files to numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowbench.cli import main
from flowbench.core.rows import read_rows
from flowbench.data import FlowDataModule
from flowbench.metrics.weights import inception_network, inception_weights

NUM = 60


class Images(Dataset[Tensor]):
    """As torch-fidelity takes them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


@pytest.mark.slow
def test_fid_kid_precision_and_recall_are_torch_fidelitys(tmp_path, monkeypatch):
    try:
        weights = inception_weights()
    except ValueError as error:
        pytest.skip(f"no Inception weights to be had: {error}")
    from torch_fidelity import calculate_metrics

    # torch-fidelity's own loader reads a whole state dict, the classifier included.
    torch.save(inception_network(weights.state).state_dict(), tmp_path / "weights.pth")
    data = FlowDataModule("fashion_mnist_mini")
    real = data.uint8_images("train", torch.arange(NUM))
    rng = torch.Generator().manual_seed(0)
    shifted = data.uint8_images("test", torch.arange(NUM)).int() + torch.randint(0, 25, (NUM, 1, 28, 28), generator=rng)
    generated = shifted.clamp(0, 255).to(torch.uint8)
    theirs = calculate_metrics(
        input1=Images(generated), input2=Images(real), fid=True, kid=True, prc=True, cuda=False, verbose=False,
        feature_extractor_weights_path=str(tmp_path / "weights.pth"), kid_subsets=1, kid_subset_size=NUM,
        prc_neighborhood=3, batch_size=20, feature_extractor="inception-v3-compat", cache=False, save_cpu_ram=True,
    )  # fmt: skip
    np.savez(tmp_path / "generated.npz", generated.numpy())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FLOWBENCH_INCEPTION", str(tmp_path / "weights.pth"))
    words = ["--samples", "generated.npz", "--data", "fashion_mnist_mini", "--num-reference", str(NUM)]
    assert main(["evaluate", *words]) == 0
    ours = {row.metric: row.value for row in read_rows("runs/generated/rows.jsonl")}
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["kid[inception]"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert ours["precision[inception]"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours["recall[inception]"] == pytest.approx(theirs["recall"], abs=1e-6)
