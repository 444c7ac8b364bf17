"""TARFlow: a transformer autoregressive flow with exact likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from flowbench.data import DataSpec
from flowbench.families.base import FlowModule, Trajectory
from flowbench.families.optimization import OptimizerConfig
from flowbench.families.space import Space
from flowbench.families.training import Loss
from flowbench.flows import (
    AffineBlock,
    AutoregressiveFlow,
    AutoregressiveGuidance,
    Permutation,
    alternating,
    patchify,
    unpatchify,
)
from flowbench.networks import CausalTransformer

__all__ = ["TARFlow"]

DENOISING_BATCH = 64


class TARFlow(FlowModule):
    """A stack of affine autoregressive blocks with causal transformers, trained by maximum likelihood.

    Images are cut into patches, a token each; points of R^d are d tokens of one number. Neighbouring blocks visit the
    tokens in opposite order. Encoding is parallel, sampling goes token by token with a key/value cache.

    References:
        Zhai et al. (2024), Normalizing Flows are Capable Generative Models, arXiv 2412.06329.

    Args:
        spec: the data's shape, classes and value grid.
        layers: transformer layers of each block, from the data end to the noise end.
        width: channels of the transformers, a multiple of `head_dim`.
        head_dim: channels of one attention head.
        mlp_ratio: hidden channels of the MLPs over `width`.
        patch_size: side of a patch; must divide the height and width of images; 1 for points.
        position: rotary (2-D on images) or learned positions.
        start: `zero` copies the first token of each block (TARFlow), `learned` transforms it too (STARFlow).
        scale: `exp` (TARFlow) or `softplus` (STARFlow) parametrisation of the standard deviation.
        soft_clip: bound of means and raw scales, or None for none.
        last_order: token order of the block nearest the noise; its neighbours alternate.
        conditioned: label all blocks (TARFlow), or the `deep` one nearest the noise alone (STARFlow).
        guidance: scale of classifier-free guidance of the sampler, >= 1; 1 is none.
        noise_std: standard deviation of the Gaussian noise added to training points, >= 0. Above 0 the flow is the
            density of noisy data: samples are denoised by one step along its score (sec. 2.3 and 2.4 of the paper), and
            :meth:`log_prob` remains that of the flow, so it is not the density of what :meth:`sample` returns. The step
            counts as one evaluation, though it is a pass forward and backward.
        space: where the flow lives; None means the data space.
        conditional: condition on class labels.
        label_dropout: share of training labels replaced by the null label, in [0, 1).
        optimizer: AdamW and its schedule.
        ema_decay: decay of the averaged weights, in [0, 1).
        compile: compile the transformers.
    """

    density = "exact"

    def __init__(
        self,
        spec: DataSpec,
        *,
        layers: Sequence[int] = (2, 2, 2, 2),
        width: int = 128,
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        patch_size: int = 1,
        position: Literal["rope", "learned"] = "learned",
        start: Literal["zero", "learned"] = "zero",
        scale: Literal["exp", "softplus"] = "exp",
        soft_clip: float | None = None,
        last_order: Permutation = "flip",
        conditioned: Literal["all", "deep"] = "all",
        guidance: float = 1.0,
        noise_std: float = 0.0,
        space: Space | None = None,
        conditional: bool = False,
        label_dropout: float = 0.1,
        optimizer: OptimizerConfig | None = None,
        ema_decay: float = 0.999,
        compile: bool = False,
    ) -> None:
        super().__init__(
            spec,
            space=space,
            conditional=conditional,
            label_dropout=label_dropout,
            optimizer=optimizer,
            ema_decay=ema_decay,
            compile=compile,
        )
        if not layers:
            raise ValueError("layers must name at least one block, got none: e.g. [2, 2, 2, 2]")
        if noise_std < 0:
            raise ValueError(f"noise_std must be >= 0, got {noise_std}: 0 adds none")
        self.noise_std = noise_std
        self.patch_size = patch_size
        self.conditioned = conditioned
        self.guidance = AutoregressiveGuidance(guidance, conditioned)
        self.check_guidance(guidance)
        num_tokens, token_dim, grid = self._token_layout(position)

        def block(depth: int, order: Permutation, is_last: bool) -> AffineBlock:
            labelled = conditioned == "all" or is_last
            network = CausalTransformer(
                num_tokens,
                token_dim,
                self.num_classes if labelled else None,
                width=width,
                depth=depth,
                head_dim=head_dim,
                mlp_ratio=mlp_ratio,
                position=position,
                grid=grid,
                start=start,
            )
            return AffineBlock(network, order, scale, soft_clip)

        orders = alternating(len(layers), last=last_order)
        self.flow = AutoregressiveFlow(
            block(depth, order, i == len(layers) - 1)
            for i, (depth, order) in enumerate(zip(layers, orders, strict=True))
        )

    def _token_layout(self, position: str) -> tuple[int, int, tuple[int, int] | None]:
        """Number of tokens, their dimension, and their grid when rotary positions want one."""
        if len(self.flow_shape) == 1:
            if self.patch_size != 1:
                raise ValueError(f"points have no patches: set patch_size=1, got {self.patch_size}")
            return self.flow_shape[0], 1, None
        tokens = patchify(torch.zeros(1, *self.flow_shape), self.patch_size)
        rows, columns = (size // self.patch_size for size in self.flow_shape[1:])
        return tokens.shape[1], tokens.shape[2], (rows, columns) if position == "rope" else None

    def _tokens(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-1) if x.ndim == 2 else patchify(x, self.patch_size)

    def _points(self, tokens: Tensor) -> Tensor:
        if len(self.flow_shape) == 1:
            return tokens.squeeze(-1)
        channels, height, width = self.flow_shape
        return unpatchify(tokens, self.patch_size, (channels, height, width))

    @property
    def likelihood_method(self) -> str:
        """Says so where the density is that of noisy data; see `noise_std`."""
        return f"density-of-noisy-data({self.noise_std:g})" if self.noise_std else ""

    def _log_density(self, x: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        z, logdet = self.flow(self._tokens(x), label)
        return self.source.log_prob(z) + logdet, z, logdet

    def flow_loss(self, x: Tensor, label: Tensor | None, rng: torch.Generator) -> Loss:
        """Negative log-likelihood in nats per dimension, the constant of the normal included."""
        if self.noise_std:
            x = x + self.noise_std * torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
        log_density, z, logdet = self._log_density(x, label)
        dims = x[0].numel()
        parts = {"logdet": logdet.detach().mean() / dims, "noise_std": z.detach().std()}
        return Loss(-log_density.mean() / dims, parts)

    def flow_log_prob(self, x: Tensor, label: Tensor | None, index: Tensor, seed: int) -> Tensor:
        """Exact, by the change of variables."""
        with torch.no_grad():
            return self._log_density(x, label)[0]

    def _guidance(self, scale: float | None) -> AutoregressiveGuidance:
        return self.guidance if scale is None else AutoregressiveGuidance(scale, self.conditioned)

    def flow_sample(
        self, noise: Tensor, label: Tensor | None, network_evaluations: int | None, guidance: float | None
    ) -> tuple[Tensor, float]:
        """Invert the flow token by token; one evaluation per sample, two where guided."""
        chosen = self._guidance(guidance) if label is not None else AutoregressiveGuidance()
        tokens = self.flow.inverse(self._tokens(noise), label, chosen)
        points, cost = self._points(tokens), self.flow.inverse_stats(chosen).network_evaluations
        if not self.noise_std:
            return points, cost
        return self._denoised(points, label), cost + 1.0

    def _denoised(self, x: Tensor, label: Tensor | None) -> Tensor:
        """The posterior mean of the clean point under Gaussian noise (Tweedie): x + noise_std^2 grad log p(x)."""
        # The gradient keeps every activation: a few points at a time.
        chunks = torch.arange(len(x), device=x.device).split(DENOISING_BATCH)
        scores = [self._score(x[chunk], None if label is None else label[chunk]) for chunk in chunks]
        return x + self.noise_std**2 * torch.cat([x.new_empty(0, *x.shape[1:]), *scores])

    def _score(self, x: Tensor, label: Tensor | None) -> Tensor:
        with torch.enable_grad():
            noisy = x.detach().requires_grad_(True)
            log_density = self._log_density(noisy, label)[0]
            (score,) = torch.autograd.grad(log_density.sum(), noisy)
        return score

    @torch.no_grad()
    def trajectory(self, noise: Tensor, condition: Tensor | None = None, num_points: int = 33) -> Trajectory:
        """The state after each block, from noise to data; every block takes an equal share of the time."""
        label = self.check_condition(condition, len(noise))
        states = self.flow.inverse_states(self._tokens(noise), label)
        points = torch.stack([self._points(state) for state in states])
        times = torch.linspace(0.0, 1.0, len(points), device=noise.device, dtype=torch.float64)
        return Trajectory(points, times)
