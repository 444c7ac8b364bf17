"""Weights for the tests that need real ones."""

from __future__ import annotations

import pytest
import torch

from flowbench.metrics.weights import PretrainedWeights, efficientnet_weights, inception_weights


def weights_or_skip(load) -> PretrainedWeights:
    """From the user's cache, which gets them as a user would; a skip says why not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLOWBENCH_CACHE", raising=False)  # the session's, which is thrown away
        try:
            return load()
        except ValueError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="session")
def inception_state() -> dict[str, torch.Tensor]:
    """FID's Inception, as torch-fidelity names its tensors."""
    return weights_or_skip(inception_weights).state


@pytest.fixture(scope="session")
def efficientnet_file() -> str:
    """The registry's file of EfficientNet-lite0."""
    return weights_or_skip(efficientnet_weights).origin
