"""What is computed of every test sample, log-densities above all, whoever asks for them."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from flowbench.data import Batch
from flowbench.evaluation.failures import agreed
from flowbench.evaluation.gather import gather_by_index
from flowbench.evaluation.probe import Setup
from flowbench.evaluation.protocols import HasDensity

__all__ = ["log_densities", "of_test_samples"]


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
    return of_test_samples(setup, module.batch_log_prob)


def of_test_samples(setup: Setup, compute: Callable[[Batch], Tensor]) -> Tensor:
    """What is computed of every test sample, batch by batch; a collective.

    Args:
        setup: the module and its data.
        compute: from a numbered batch on the module's device to values, shape (B, *D).

    Returns:
        In the order of the samples, shape (N, *D), on the CPU.
    """
    assert setup.module is not None, "the samples go to the module's device"
    # Of fewer samples than processes, some have none.
    numbers, found = [torch.empty(0, dtype=torch.int64)], [torch.empty(0)]
    with agreed():
        for batch in setup.likelihood_batches():
            assert batch.index is not None, "the datamodule numbers its samples"
            numbers.append(batch.index.cpu())
            found.append(compute(move_data_to_device(batch, setup.module.device)).detach().cpu())
    return gather_by_index(torch.cat(numbers), torch.cat(found))
