"""Classifier-free guidance of the token Gaussians of an autoregressive flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from flowbench.core.checks import check_number, check_scale
from flowbench.flows.autoregressive.guided_gaussian import GuidanceRule, guided_gaussian

__all__ = ["AutoregressiveGuidance"]


@dataclass(frozen=True)
class AutoregressiveGuidance:
    """How the Gaussian of a token, given the tokens before it, is guided away from that of a second branch.

    The second branch is the same network with the null label, on the same guided tokens. With a temperature other than
    1 it is the network at that attention temperature, which also guides where there is no label (TARFlow).

    Attributes:
        scale: s in [1, 1e12]; the guidance weight is w = s - 1. 1 = no guidance: the other attributes then have no
            effect, but keep their values for a scale that is chosen later, by a sweep of scales or by
            ``sample(guidance=...)``.
        rule: "product", "log-scale" or "linear", see :func:`~flowbench.flows.guided_gaussian`.
        blocks: "all" blocks whose two branches differ (TARFlow), or only the "deep" one, nearest the noise (STARFlow).
        annealed: token t = 0..N-1 of the generation order gets the weight ``w t / (N - 1)``, the first none and the
            last the whole (TARFlow, whose step i makes token i + 1); a single token gets the whole.
        temperature: attention logits of the second branch are divided by it, in [1e-12, 1e12].

    Raises:
        ValueError: for a scale below 1 (for unconditional samples pass no label instead), a value out of range, or an
            unknown rule or choice of blocks.

    Example:
        >>> guidance = AutoregressiveGuidance(scale=3.0)
        >>> guidance.weight, guidance.name
        (2.0, 'guidance[product,3]')
        >>> mean, std = torch.tensor([[[1.0]], [[0.0]]]), torch.ones(2, 1, 1)  # with the label, then without
        >>> guidance.combine(mean, std, start=0, num_tokens=1)  # the mean moves on by weight * (1 - 0)
        (tensor([[[3.]]]), tensor([[[1.]]]))
    """

    scale: float = 1.0
    rule: GuidanceRule = "product"
    blocks: Literal["all", "deep"] = "all"
    annealed: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number("guidance scale", self.scale, at_least=1, hint="1 is none")
        if self.rule not in get_args(GuidanceRule):
            raise ValueError(f"guidance rule must be one of {', '.join(get_args(GuidanceRule))}, got {self.rule!r}")
        if self.blocks not in ("all", "deep"):
            raise ValueError(f"guidance blocks must be 'all' or 'deep', got {self.blocks!r}")
        check_scale("guidance temperature", self.temperature, hint="1 is the network's own")

    @property
    def weight(self) -> float:
        """Guidance weight w = scale - 1; 0 = none."""
        return self.scale - 1

    @property
    def name(self) -> str:
        """Everything about the guidance that samples depend on, e.g. "guidance[product,3]"; "" without guidance."""
        if self.weight == 0:
            return ""
        parts = [self.rule, _exactly(self.scale)]
        parts += ["deep"] * (self.blocks == "deep") + ["annealed"] * self.annealed
        parts += [f"temperature={_exactly(self.temperature)}"] * (self.temperature != 1)
        return f"guidance[{','.join(parts)}]"

    def weights(self, start: int, stop: int, num_tokens: int, like: Tensor) -> float | Tensor:
        """Weight of the tokens start..stop-1 of N, a number or a tensor of shape (stop - start, 1)."""
        if not self.annealed or num_tokens == 1:
            return self.weight
        if stop == start + 1:  # a Python number, so that the token loop makes no tensor
            return self.weight * start / (num_tokens - 1)
        tokens = torch.arange(start, stop, device=like.device, dtype=like.dtype)
        return (self.weight / (num_tokens - 1) * tokens)[:, None]

    def combine(self, mean: Tensor, std: Tensor, start: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Guided mean and standard deviation of tokens start, start + 1, ...

        Args:
            mean: means of the first branch, then those of the second, shape (2 B, L, D).
            std: standard deviations, same shape.
            start: first of the L tokens in generation order.
            num_tokens: N.
        """
        (mean_c, mean_u), (std_c, std_u) = mean.chunk(2), std.chunk(2)
        weight = self.weights(start, start + mean.shape[1], num_tokens, mean)
        return guided_gaussian(mean_c, std_c, mean_u, std_u, weight, self.rule)


def _exactly(number: float) -> str:
    """A number in its short form where no digit is lost, e.g. "3" rather than "3.0"."""
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))
