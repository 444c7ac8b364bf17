"""Optimisers as frozen settings that build one ``torch.optim.Optimizer``, and their learning-rate schedule."""

from flowbench.training.optimizers.adamw import AdamW
from flowbench.training.optimizers.matrix import MatrixSettings
from flowbench.training.optimizers.settings import OptimizerSettings, learning_rate_factor
from flowbench.training.optimizers.sgd import SGD
from flowbench.training.optimizers.sinkgd import SinkGD
from flowbench.training.optimizers.swan import SWAN

__all__ = [
    "SGD",
    "SWAN",
    "AdamW",
    "AnyOptimizer",
    "MatrixSettings",
    "OptimizerSettings",
    "SinkGD",
    "learning_rate_factor",
]

AnyOptimizer = AdamW | OptimizerSettings
"""An argument of this type may be written without ``class_path``, and then holds the fields of AdamW."""
