"""Log-densities of the test split, whoever asks for them."""

from __future__ import annotations

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from flowbench.evaluation.failures import agreed
from flowbench.evaluation.gather import gather_by_index
from flowbench.evaluation.probe import Setup
from flowbench.evaluation.protocols import HasDensity

__all__ = ["log_densities"]


def log_densities(setup: Setup) -> Tensor | None:
    """The log-density of every test sample, batch by batch; a collective.

    Args:
        setup: the module and its data.

    Returns:
        Nats in the order of the samples, shape (N,), on the CPU; None for a module without a density.
    """
    module = setup.module
    if not isinstance(module, HasDensity) or not isinstance(module, L.LightningModule):
        return None
    found, numbers = [], []
    with agreed():
        for batch in setup.likelihood_batches():
            assert batch.index is not None, "the datamodule numbers its samples"
            numbers.append(batch.index.cpu())
            found.append(module.batch_log_prob(move_data_to_device(batch, module.device)).detach().cpu())
        index = torch.cat(numbers)
    return gather_by_index(index, torch.cat(found))
