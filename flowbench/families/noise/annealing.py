"""Taking noise out of samples step by step, along the scores of a flow that is told the noise level.

Shape suffixes: B batch, N tokens, D token dimension.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.families.noise.denoising import Denoiser, FlowLayout, Tweedie
from flowbench.families.noise.score_gradient import LevelDensity, LogDensity, score

__all__ = ["NoiseAnnealing"]


class NoiseAnnealing(Denoiser):
    """Draw at the highest noise level, then go down to none by Euler steps of the probability-flow ODE.

    With the noise level n for time, dy/dn = (y - x)/n with x = y + n^2 grad log p_n(y), the posterior mean of the clean
    point. The levels fall in equal steps from the highest to the lowest, one step less than `num_steps`; the last step
    goes from the lowest to 0 and lands on x itself. One step alone is :class:`Tweedie`'s at the highest level. Every
    step costs a pass forward and one backward to the input: two evaluations.

    Needs :class:`~flowbench.families.noise.augmentation.ConditionedNoise`. Points that have the noise of the space, and
    not that of samples, are denoised by one step from the lowest level.

    Args:
        num_steps: steps, >= 1, hence scores.
        batch_size: points that go through at a time, >= 1, because the gradient keeps every activation.

    References:
        iTARFlow (Apple, 2026), arXiv 2604.20041: steps of 0.01, the lowest level, and 10 of them while training.

    Example:
        >>> from flowbench.families.noise.denoising import FlowLayout
        >>> annealing = NoiseAnnealing(num_steps=256)
        >>> layout = FlowLayout(PixelSpace((2,)), 0.01, 2, 1, grid=None, num_classes=None, levels=(0.01, 1.0))
        >>> annealing.attach(layout)
        >>> def normal(x, label, level):  # data N(0, 1) plus noise
        ...     return -x.flatten(1).square().sum(1) / (2 * (1 + level**2))
        >>> drawn = torch.tensor([[[2.0], [4.0]]])
        >>> found = annealing.denoise_drawn(drawn, None, normal)
        >>> (found - drawn / 2**0.5).abs().max() < 0.01  # the ODE carries x to x / sqrt(2)
        tensor(True)
        >>> annealing.name, annealing.evaluations(flow_parameters=10**6)
        ('annealing(256)', 512.0)
    """

    def __init__(self, num_steps: int = 10, batch_size: int = 64) -> None:
        super().__init__()
        check_count("NoiseAnnealing num_steps", num_steps)
        self.num_steps = num_steps
        self._last = Tweedie(batch_size=batch_size)

    @property
    def name(self) -> str:
        """``annealing``, with the number of steps."""
        return f"annealing({self.num_steps})"

    def attach(self, layout: FlowLayout) -> None:
        """Take the levels of the flow; see :meth:`Denoiser.attach`.

        Raises:
            ValueError: for a flow that is not told the noise level.
        """
        if layout.levels is None:
            raise ValueError(
                "NoiseAnnealing needs a flow that is told the noise level: set augmentation to ConditionedNoise, "
                "or choose Tweedie"
            )
        super().attach(layout)
        self._last.attach(layout)
        self.low, self.high = layout.levels

    @property
    def starting_level(self) -> float:
        """The highest level."""
        return self.high

    @property
    def of_the_space(self) -> Denoiser:
        """One step from the lowest level."""
        return self._last

    def denoise(self, x_BND: Tensor, label: Tensor | None, log_density: LogDensity) -> Tensor:
        """One step from the lowest level; see :meth:`Denoiser.denoise`."""
        return self._last.denoise(x_BND, label, log_density)

    def denoise_drawn(self, x_BND: Tensor, label: Tensor | None, log_density: LevelDensity) -> Tensor:
        """All steps, from the highest level; see :meth:`Denoiser.denoise_drawn`."""
        if not len(x_BND):
            return x_BND
        size = self._last.batch_size
        labels = [None] * len(x_BND) if label is None else label.split(size)
        parts = zip(x_BND.split(size), labels, strict=False)
        return torch.cat([self._annealed(x, given, log_density) for x, given in parts])

    def _annealed(self, y: Tensor, label: Tensor | None, log_density: LevelDensity) -> Tensor:
        levels = torch.linspace(self.high, self.low, self.num_steps, dtype=torch.float64).tolist()
        for level, following in zip(levels, [*levels[1:], 0.0], strict=True):
            # (y - x) / n of the posterior mean x is -n times the score.
            slope = -level * score(partial(_at, log_density, level), y, label)
            y = y - (level - following) * slope
        return y

    def evaluations(self, flow_parameters: int) -> float:
        """Forward, and backward to the input, for every step."""
        return 2.0 * self.num_steps


def _at(log_density: LevelDensity, level: float, x: Tensor, label: Tensor | None) -> Tensor:
    return log_density(x, label, level)
