"""Taking the augmentation noise out of what a flow drew.

Shape suffixes: B batch, N tokens, D token dimension.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from flowbench.core.checks import check_count, check_scale
from flowbench.families.latents.space import LatentSpace, Space
from flowbench.families.noise.score_gradient import LevelDensity, LogDensity, score
from flowbench.networks import TokenTransformer
from flowbench.networks.tokens import check_sizes

__all__ = ["DecoderDenoiser", "Denoiser", "FlowLayout", "FlowScoreDenoiser", "Tweedie"]


@dataclass(frozen=True)
class FlowLayout:
    """The facts of a flow that its denoiser needs.

    Attributes:
        space: where the flow lives.
        noise_std: standard deviation of the augmentation noise, in the units of that space.
        num_tokens: tokens N of a point.
        token_dim: numbers D of a token.
        grid: rows and columns of the tokens of an image; None for points of R^d.
        num_classes: number of classes of a conditional flow, or None.
        levels: lowest and highest noise level of a flow that is told the level; else None.
    """

    space: Space
    noise_std: float
    num_tokens: int
    token_dim: int
    grid: tuple[int, int] | None
    num_classes: int | None
    levels: tuple[float, float] | None = None


class Denoiser(nn.Module, ABC):
    """Estimates the clean point under a noisy one; an object belongs to one flow.

    Attributes:
        name: names the algorithm in the rows of results.
        learns: whether it has parameters that are trained beside the flow's.

    Example:
        >>> class Halve(Denoiser):  # right for data of the same variance as the noise, with mean 0
        ...     name = "halve"
        ...     def denoise(self, x_BND, label, log_density):
        ...         return x_BND / 2
        ...     def evaluations(self, flow_parameters):
        ...         return 0.0
        >>> Halve().denoise(torch.ones(1, 2, 1), None, None).flatten()
        tensor([0.5000, 0.5000])
    """

    learns: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name in result rows."""

    def attach(self, layout: FlowLayout) -> None:
        """Fit the denoiser to a flow, once.

        Raises:
            ValueError: when there is no noise to remove, or the denoiser serves another flow.
        """
        if not layout.noise_std:
            raise ValueError(
                f"denoiser {type(self).__name__} has no noise to remove: set augmentation to GaussianNoise, or none"
            )
        if hasattr(self, "noise_std"):
            raise ValueError(f"this {type(self).__name__} belongs to another flow already: make one for each")
        self.noise_std = layout.noise_std

    @property
    def starting_level(self) -> float:
        """Noise level at which the flow draws what :meth:`denoise_drawn` receives: that of the space."""
        return self.noise_std

    @property
    def of_the_space(self) -> Denoiser:
        """Takes out the noise that the space adds, and no more: what the bound on latents' likelihoods decodes."""
        return self

    def denoise_drawn(self, x_BND: Tensor, label: Tensor | None, log_density: LevelDensity) -> Tensor:
        """:meth:`denoise` of points that the flow drew at :attr:`starting_level`.

        Args:
            x_BND: as in :meth:`denoise`.
            label: as in :meth:`denoise`.
            log_density: of the flow, at a noise level.
        """
        return self.denoise(x_BND, label, lambda x, given: log_density(x, given, self.noise_std))

    @abstractmethod
    def denoise(self, x_BND: Tensor, label: Tensor | None, log_density: LogDensity) -> Tensor:
        """Estimate clean points.

        Args:
            x_BND: noisy points as tokens, shape (B, N, D).
            label: the labels under which they were drawn, shape (B,), or None. A guided sample is denoised under its
                label alone: guidance has no density of which there were a score.
            log_density: of the flow.

        Returns:
            Clean tokens of the same shape, without a graph.
        """

    @abstractmethod
    def evaluations(self, flow_parameters: int) -> float:
        """Cost per sample in forward passes through a flow of so many parameters."""


class Tweedie(Denoiser):
    """One step along the score: the posterior mean of the clean point, x + noise_std^2 grad log p(x).

    It costs a pass forward and one backward to the input alone, whose matrix products are as many again: two
    evaluations.

    Args:
        strength: multiplies the step, in [1e-12, 1e12]; 1 is the theory, and the optimum where the flow fits.
        batch_size: points that go through at a time, >= 1, because the gradient keeps every activation.

    References:
        Zhai et al. (2024), arXiv 2412.06329, sec. 2.4; Efron (2011), Tweedie's Formula and Selection Bias.

    Example:
        >>> from flowbench.families.noise.denoising import FlowLayout
        >>> denoiser = Tweedie()
        >>> denoiser.attach(FlowLayout(PixelSpace((2,)), 1.0, num_tokens=2, token_dim=1, grid=None, num_classes=None))
        >>> log_density = lambda x, label: -x.flatten(1).square().sum(1) / 4  # N(0, 2): data N(0, 1) plus noise N(0, 1)
        >>> denoiser.denoise(torch.tensor([[[2.0], [4.0]]]), None, log_density).flatten()  # the posterior mean x / 2
        tensor([1., 2.])
    """

    def __init__(self, strength: float = 1.0, batch_size: int = 64) -> None:
        super().__init__()
        check_scale("Tweedie strength", strength, hint="1 is the theory")
        check_count("Tweedie batch_size", batch_size)
        self.strength = strength
        self.batch_size = batch_size

    @property
    def name(self) -> str:
        """``tweedie``, with the strength where it is not 1."""
        return "tweedie" if self.strength == 1.0 else f"tweedie({self.strength:g})"

    def denoise(self, x_BND: Tensor, label: Tensor | None, log_density: LogDensity) -> Tensor:
        """See :meth:`Denoiser.denoise`."""
        labels = [None] * len(x_BND) if label is None else label.split(self.batch_size)
        parts = [score(log_density, x, given) for x, given in zip(x_BND.split(self.batch_size), labels, strict=False)]
        return x_BND + self.strength * self.noise_std**2 * torch.cat(parts) if len(x_BND) else x_BND

    def evaluations(self, flow_parameters: int) -> float:
        """Forward, and backward to the input."""
        return 2.0


class FlowScoreDenoiser(Denoiser):
    """A network that learns the flow's own score while the flow is trained (flow-score matching).

    Its target, noise_std * grad(-log p) at the noisy training point, is read from the backward pass that the flow's
    likelihood needs anyway, and is detached: neither gradient reaches the other model. The clean point is
    x - noise_std * network(x), which at the optimum is Tweedie's formula for the flow.

    It costs its share of the flow's parameters. It cannot be trained where parameters are sharded (FSDP).

    Args:
        width: channels of its transformer, a multiple of `head_dim`, up to 65,536.
        depth: layers, 1 to 1,000.
        head_dim: channels of one head, even, and on images a multiple of 4.
        mlp_ratio: hidden channels of the MLPs over `width`, in [1 / width, 1000].

    References:
        Gu et al. (2025), STARFlow-V, arXiv 2511.20462, flow-score matching.

    Example:
        >>> from flowbench.families.noise.denoising import FlowLayout
        >>> denoiser = FlowScoreDenoiser(width=8, depth=1, head_dim=4)
        >>> denoiser.attach(FlowLayout(PixelSpace((2,)), 1.0, num_tokens=2, token_dim=1, grid=None, num_classes=None))
        >>> x, score = torch.tensor([[[2.0], [4.0]]]), torch.tensor([[[-1.0], [-2.0]]])
        >>> torch.equal(denoiser.denoise(x, None, None), x)  # leaves its input alone before training
        True
        >>> denoiser.matching_loss(x, None, score).item()  # the mean of 1^2 and 2^2
        2.5
    """

    learns = True

    def __init__(
        self,
        width: int = 128,
        depth: int = 2,
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        check_sizes(1, 1, None, width, depth, head_dim, mlp_ratio)
        self.width, self.depth, self.head_dim, self.mlp_ratio = width, depth, head_dim, mlp_ratio

    @property
    def name(self) -> str:
        """``flow-score-matching``."""
        return "flow-score-matching"

    def attach(self, layout: FlowLayout) -> None:
        """Build the network for the flow's tokens; see :meth:`Denoiser.attach`.

        Raises:
            ValueError: for a flow of many noise levels, of which its network would learn one.
        """
        if layout.levels is not None:
            raise ValueError(
                "FlowScoreDenoiser learns the score of one noise level, but augmentation ConditionedNoise has many: "
                "choose NoiseAnnealing, or Tweedie"
            )
        super().attach(layout)
        self.network = TokenTransformer(
            layout.num_tokens,
            layout.token_dim,
            layout.num_classes,
            width=self.width,
            depth=self.depth,
            head_dim=self.head_dim,
            mlp_ratio=self.mlp_ratio,
            grid=layout.grid,
        )

    def matching_loss(self, x_BND: Tensor, label: Tensor | None, score_BND: Tensor) -> Tensor:
        """Squared error of the network against noise_std * grad(-log p), a mean over dimensions and batch.

        Args:
            x_BND: noisy training points as tokens, shape (B, N, D).
            label: their labels with the dropped ones null, or None.
            score_BND: gradient of the flow's log-density at each point, same shape.

        Returns:
            A scalar with a gradient for this network alone.
        """
        target = -self.noise_std * score_BND.detach()
        return (self.network(x_BND.detach(), label).to(target.dtype) - target).square().mean()

    @torch.no_grad()
    def denoise(self, x_BND: Tensor, label: Tensor | None, log_density: LogDensity) -> Tensor:
        """See :meth:`Denoiser.denoise`; the density is not used."""
        return x_BND - self.noise_std * self.network(x_BND, label).to(x_BND.dtype)

    def evaluations(self, flow_parameters: int) -> float:
        """Parameters over the flow's."""
        return sum(p.numel() for p in self.network.parameters()) / flow_parameters


class DecoderDenoiser(Denoiser):
    """Leaves the noise to the autoencoder, whose decoder was fine-tuned on noisy latents; costs nothing.

    References:
        Gu et al. (2025), arXiv 2506.06276, sec. 3 and eq. 7.

    Example:
        >>> denoiser = DecoderDenoiser()
        >>> denoiser.name, denoiser.evaluations(flow_parameters=10**6)
        ('decoder', 0.0)
    """

    @property
    def name(self) -> str:
        """``decoder``."""
        return "decoder"

    def attach(self, layout: FlowLayout) -> None:
        """Check the decoder.

        Raises:
            ValueError: without a latent space, or for a decoder that was trained at another noise level.
        """
        super().attach(layout)
        if not isinstance(layout.space, LatentSpace):
            raise ValueError("DecoderDenoiser needs an autoencoder, this flow lives in data space: choose Tweedie")
        trained = layout.space.autoencoder.decoder_noise_std
        if not math.isclose(trained, layout.noise_std, rel_tol=1e-6):
            raise ValueError(
                f"DecoderDenoiser needs a decoder trained on latents with noise {layout.noise_std:g}, this one knows "
                f"{trained:g}: fine-tune it there, or choose Tweedie"
            )

    def denoise(self, x_BND: Tensor, label: Tensor | None, log_density: LogDensity) -> Tensor:
        """Nothing to do here."""
        return x_BND

    def evaluations(self, flow_parameters: int) -> float:
        """None beside the decoder, which every latent sample needs."""
        return 0.0
