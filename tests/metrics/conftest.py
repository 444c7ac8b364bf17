"""Weights for the tests that need real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowbench.metrics.weights import PretrainedWeights, efficientnet_weights, inception_weights

KEPT = Path(__file__).parents[2] / "data" / "cache"


def weights_or_skip(load, file: str) -> PretrainedWeights:
    """From the repository's cache when they are there, else as a user would get them; a skip says why not."""
    with pytest.MonkeyPatch.context() as patch:
        if (KEPT / "weights" / file).is_file():
            patch.setenv("FLOWBENCH_CACHE", str(KEPT))
        try:
            return load()
        except ValueError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="session")
def inception_state() -> dict[str, torch.Tensor]:
    """FID's Inception, as torch-fidelity names its tensors."""
    return weights_or_skip(inception_weights, "inception-2015-12-05.pth").state


@pytest.fixture(scope="session")
def efficientnet_file() -> str:
    """The registry's file of EfficientNet-lite0."""
    return weights_or_skip(efficientnet_weights, "efficientnet-lite0-57934424.pth").origin
