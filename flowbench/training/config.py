"""How a module is trained: what every family's constructor passes on to :class:`TrainingModule` as one argument."""

from __future__ import annotations

from dataclasses import dataclass, field

from flowbench.training.ema import check_ema_decay
from flowbench.training.optimizers import AnyOptimizer

__all__ = ["EMAConfig", "TrainingConfig"]


@dataclass(frozen=True)
class EMAConfig:
    """The averaged weights, with which a module is evaluated.

    Attributes:
        decay: of the exponential moving average, in [0, 1); 0 turns averaging off.

    Example:
        >>> EMAConfig(decay=0.99)
        EMAConfig(decay=0.99)
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ValueError: when the decay is out of its range.
        """
        check_ema_decay(self.decay)


@dataclass(frozen=True)
class TrainingConfig:
    """Optimiser, averaged weights and compilation; the argument ``training`` of every module.

    Attributes:
        optimizer: its rates and schedule; None is AdamW.
        ema: the averaged weights.
        compile: compile the networks with ``torch.compile`` before training.

    Example:
        >>> from flowbench.training import AdamW
        >>> training = TrainingConfig(optimizer=AdamW(lr=2e-3), ema=EMAConfig(decay=0.99))
        >>> training.optimizer.lr, training.compile
        (0.002, False)
    """

    optimizer: AnyOptimizer | None = None
    ema: EMAConfig = field(default_factory=EMAConfig)
    compile: bool = False
