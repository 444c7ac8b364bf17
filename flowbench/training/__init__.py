"""What is trained, flow or not: module, optimiser, averaged weights, budget, checkpoints, parallel strategies."""

from flowbench.core.budget import BudgetLimit
from flowbench.training.budget_meter import Budget
from flowbench.training.checkpoint import AtomicCheckpointIO, load_checkpoint, read_checkpoint
from flowbench.training.config import EMAConfig, TrainingConfig
from flowbench.training.count import Count, count_flops
from flowbench.training.module import Loss, NonFiniteLossError, TrainingModule
from flowbench.training.optimizers import SGD, SWAN, AdamW, MatrixSettings, OptimizerSettings, SinkGD
from flowbench.training.parallel import FullyShardedStrategy, check_strategy
from flowbench.training.preparation import Preparation
from flowbench.training.trainer_precision import PRECISIONS, check_precision

__all__ = [
    "PRECISIONS",
    "SGD",
    "SWAN",
    "AdamW",
    "AtomicCheckpointIO",
    "Budget",
    "BudgetLimit",
    "Count",
    "EMAConfig",
    "FullyShardedStrategy",
    "Loss",
    "MatrixSettings",
    "NonFiniteLossError",
    "OptimizerSettings",
    "Preparation",
    "SinkGD",
    "TrainingConfig",
    "TrainingModule",
    "check_precision",
    "check_strategy",
    "count_flops",
    "load_checkpoint",
    "read_checkpoint",
]

OptimizerConfig = AdamW
"""The name of earlier versions."""
