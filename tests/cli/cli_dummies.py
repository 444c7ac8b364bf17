"""Small classes with the signatures of the real rooms; every construction is written down in ``LOG``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning import Callback, LightningDataModule, LightningModule
from torch import nn

from flowbench.data import DataSpec
from flowbench.evaluation.reference import Reference

LOG: list[str] = []
NetworkFactory = Callable[[tuple[int, ...], int | None], nn.Module]
not_a_class = 3


class Data(LightningDataModule):
    def __init__(
        self,
        dataset: str = "digits",
        path: str | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        dequantize: Literal["uniform", "none"] = "uniform",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        LOG.append("data")
        torch.randn(batch_size)  # what data draws must not reach the model's weights
        self.batch_size, self.seed = batch_size, seed
        self.spec = DataSpec("digits", "1", (1, 8, 8), 10, 17)


class Network(nn.Module):
    def __init__(self, shape: tuple[int, ...], num_classes: int | None, *, width: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.shape, self.num_classes, self.width, self.scale = shape, num_classes, width, scale
        self.weight = nn.Parameter(torch.randn(width))


class Square(nn.Module):
    """Takes no factory arguments: must not be accepted as a network."""

    def __init__(self) -> None:
        super().__init__()


class Weight:
    def __init__(self) -> None:
        LOG.append("weight")


class Gibbs(Weight):
    def __init__(self, kappa: float = 0.5, normalization: Literal["running", "batch"] = "running") -> None:
        super().__init__()
        self.kappa = kappa


class Abstract(Weight, ABC):
    @abstractmethod
    def __call__(self) -> None: ...


@dataclass
class Optimizer:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)


class Family(LightningModule):
    def __init__(
        self,
        spec: DataSpec,
        network: NetworkFactory,
        *,
        weight: Weight | None = None,
        blocks: list[Weight] | None = None,
        optimizer: Optimizer | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        LOG.append("model")
        self.spec, self.pair, self.optimizer, self.dropout = spec, weight, optimizer, dropout
        self.network = network(spec.shape, spec.num_classes)


class Untyped(LightningModule):
    """Its author forgot an annotation."""

    def __init__(self, spec: DataSpec, network, *, dropout: float = 0.0) -> None:
        super().__init__()


class Forwarding(Family):
    """Forwards what it does not know, as the real families do."""

    def __init__(self, spec: DataSpec, network: NetworkFactory, **options: Any) -> None:
        super().__init__(spec, network, **options)


class PathFamily(Family):
    def __init__(self, spec: DataSpec, network: NetworkFactory, *, autoencoder: str | None = None) -> None:
        super().__init__(spec, network)
        self.autoencoder = autoencoder


class Encoder(LightningModule):
    def __init__(self, spec: DataSpec, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)


class ModuleFamily(Family):
    def __init__(self, spec: DataSpec, network: NetworkFactory, *, autoencoder: Encoder | None = None) -> None:
        super().__init__(spec, network)
        self.held = [autoencoder]


class Metric:
    pass


class Distance(Metric):
    def __init__(self, features: str, k: int = 3) -> None:
        self.features = features


class Evaluator(Callback):
    def __init__(
        self,
        metrics: dict[str, Metric] | None = None,
        *,
        references: dict[str, Reference] | None = None,
        num_samples: int = 360,
        sweep: dict[str, list[int]] | None = None,
    ) -> None:
        LOG.append("evaluator")
        self.metrics, self.num_samples = metrics or {}, num_samples
        if num_samples < 2:
            raise ValueError(f"num_samples must be >= 2, got {num_samples}")


class Watch(Callback):
    def __init__(self, every: int = 1) -> None:
        self.every = every
