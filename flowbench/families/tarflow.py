"""TARFlow: a transformer autoregressive flow with exact likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from flowbench.core.checks import check_number
from flowbench.data import Batch, DataSpec, FlowDataModule
from flowbench.evaluation.override import SamplerOverride
from flowbench.families.architecture import flow_sizes
from flowbench.families.base import FlowModule, FlowSamples, Trajectory
from flowbench.families.block_count import count_block
from flowbench.families.block_statistics import recorded
from flowbench.families.conditioning.condition import Condition
from flowbench.families.description import Description
from flowbench.families.latents.space import PixelSpace, Space
from flowbench.families.noise.augmentation import Augmentation, UniformDequantization
from flowbench.families.noise.denoising import Denoiser, FlowLayout, FlowScoreDenoiser
from flowbench.families.noise.score_gradient import (
    check_shared_backward,
    frozen,
    kept_for_two_passes,
    not_a_leaf,
    score,
    with_input_gradient,
)
from flowbench.families.token_layout import TokenLayout
from flowbench.flows import (
    AffineBlock,
    AutoregressiveFlow,
    AutoregressiveGuidance,
    InverseMethod,
    Permutation,
    SequentialInverse,
    Source,
    alternating,
    network_grid,
)
from flowbench.networks import CausalTransformer, TokenTransformer
from flowbench.training.config import TrainingConfig
from flowbench.training.count import Count
from flowbench.training.module import Loss

__all__ = ["TARFlow"]

# The network of a block from its number of classes, width, depth and token order.
TransformerMaker = Callable[[int | None, int, int, Permutation], CausalTransformer]


class TARFlow(FlowModule):
    """A stack of affine autoregressive blocks with causal transformers, trained by maximum likelihood.

    Images are cut into patches, a token each; points of R^d are d tokens of one number. Neighbouring blocks visit the
    tokens in opposite order. Encoding is parallel, sampling goes token by token with a key/value cache, or by
    fixed-point iteration.

    The loss is the negative log-likelihood in nats per dimension, the constant of the normal included. Beside it,
    ``bits_per_dim`` is logged where it is one
    (:class:`~flowbench.families.noise.augmentation.UniformDequantization`), and on logging steps the variance after
    each block and the range of its scales.

    References:
        Zhai et al. (2024), Normalizing Flows are Capable Generative Models, arXiv 2412.06329.

    Args:
        spec: the data's shape, classes and value grid.
        architecture: sizes in the notation of the papers, see
            :func:`~flowbench.families.architecture.parse_architecture`: ``2-768-8-8``, or ``18(6)``; None: as below.
        layers: transformer layers of each block, 1 to 1,000, from the data end to the noise end; None is [2, 2, 2, 2].
        width: channels of the transformers, a multiple of `head_dim`, up to 65,536: one number, or one for each block;
            None is 128.
        patch_size: side of a patch, >= 1; must divide the height and width of images; None is 1, the only one for
            points.
        head_dim: channels of one attention head, >= 1.
        mlp_ratio: hidden channels of the MLPs over `width`, in [1 / width, 1000].
        position: rotary (2-D on images) or learned positions.
        extent: side in [1e-12, 1e12] that 2-D rotary positions span whatever the number of tokens (STARFlow); None: one
            unit per token.
        start: `zero` copies the first token of each block (TARFlow), `learned` transforms it too (STARFlow).
        final_norm: normalise before the output layer of each transformer (STARFlow's large models).
        scale: `exp` (TARFlow) or `softplus` (STARFlow) parametrisation of the standard deviation.
        soft_clip: bound of means and raw scales, in [1e-12, 1e12], or None for none.
        last_order: token order of the block nearest the noise, None is `flip`; its neighbours alternate between it and
            its reverse.
        permutations: token order of every block, from the data end to the noise end, in place of `last_order`.
        conditioned: label all blocks (TARFlow), or the `deep` one nearest the noise alone (STARFlow).
        guidance: of the sampler; a number is the scale of the closed form (STARFlow, prop. 2) in the conditional
            blocks, >= 1, and 1 is none.
        inverse: how the flow is inverted to sample; None is token by token.
        augmentation: noise of the training points; None is uniform dequantisation.
        denoiser: takes the noise out of samples; None leaves it in. :meth:`log_prob` remains that of the flow: of data
            with :class:`~flowbench.families.noise.augmentation.GaussianNoise` it is the density of noisy data.
        latent_norm: weight of the mean squares of the states between the blocks, summed over them, in [0, 1e12]
            (STARFlow: 1e-4). Together with a denoiser that learns it costs a second pass backward.
        checkpoint_every: activation checkpointing of every n-th transformer layer in training, 0 to 1,000; 0 is none.
        space: where the flow lives; None means the data space.
        sampling_source: where samples start, in place of the standard normal of the training; None is that.
        conditional: condition on class labels.
        label_dropout: share of training labels replaced by the null label, in [0, 1).
        training: optimiser, averaged weights and compilation; None takes the defaults.

    Example:
        >>> from flowbench.data import DataSpec
        >>> flow = TARFlow(DataSpec("images", "1", (1, 4, 4), levels=17), architecture="2-16-2-1", head_dim=8)
        >>> samples = flow.sample(flow.draw_noise(torch.arange(3), seed=0))
        >>> samples.x.shape, samples.network_evaluations
        (torch.Size([3, 1, 4, 4]), 1.0)
        >>> flow.describe().likelihood
        'exact'
        >>> flow.log_prob(torch.zeros(1, 1, 4, 4))  # the identity before training: ln N(0; 0, I) = -8 ln(2 pi)
        tensor([-14.7030], dtype=torch.float64)
    """

    density = "exact"
    loss_is_likelihood = True
    sampling_arguments = FlowModule.sampling_arguments | {"checkpoint_every", "denoiser", "guidance", "inverse"}

    def __init__(
        self,
        spec: DataSpec,
        *,
        architecture: str | None = None,
        layers: Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        patch_size: int | None = None,
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        position: Literal["rope", "learned"] = "learned",
        extent: float | None = None,
        start: Literal["zero", "learned"] = "zero",
        final_norm: bool = False,
        scale: Literal["exp", "softplus"] = "exp",
        soft_clip: float | None = None,
        last_order: Permutation | None = None,
        permutations: Sequence[Permutation] | None = None,
        conditioned: Literal["all", "deep"] = "all",
        guidance: AutoregressiveGuidance | float = 1.0,
        inverse: InverseMethod | None = None,
        augmentation: Augmentation | None = None,
        denoiser: Denoiser | None = None,
        latent_norm: float = 0.0,
        checkpoint_every: int = 0,
        space: Space | None = None,
        sampling_source: Source | None = None,
        conditional: bool = False,
        label_dropout: float = 0.1,
        training: TrainingConfig | None = None,
    ) -> None:
        noise = augmentation or UniformDequantization()
        super().__init__(
            spec,
            space=space or PixelSpace(spec.shape, noise.noise_std),
            sampling_source=sampling_source,
            conditional=conditional,
            label_dropout=label_dropout,
            training=training,
        )
        self.augmentation = noise
        self.inverse_method: InverseMethod = inverse or SequentialInverse()
        self.latent_norm = latent_norm
        self.conditioned = conditioned
        self.guidance = self._chosen_guidance(guidance)
        depths, widths, self.patch_size = flow_sizes(architecture, layers, width, patch_size)
        self.token_layout = TokenLayout(self.flow_shape, self.patch_size)
        self._check_noise()
        layout = self._layout()
        transformer = _transformer(layout, head_dim, mlp_ratio, position, start, final_norm, extent, checkpoint_every)
        affine = partial(AffineBlock, scale=scale, soft_clip=soft_clip, grid=layout.grid)
        orders = _orders(permutations, len(depths), last_order)
        self.flow = AutoregressiveFlow(map(affine, self._networks(transformer, widths, depths, orders), orders))
        self.denoiser = denoiser
        if denoiser is not None:
            denoiser.attach(layout)

    # ---- construction ---------------------------------------------------------------------------------

    def _check_noise(self) -> None:
        check_number("latent_norm", self.latent_norm, at_least=0, hint="0 is no regulariser")
        if self.space.noise_std != self.augmentation.noise_std:
            raise ValueError(
                f"the space adds noise of {self.space.noise_std:g}, the augmentation says "
                f"{self.augmentation.noise_std:g}: give them the same"
            )

    def _chosen_guidance(self, guidance: AutoregressiveGuidance | float) -> AutoregressiveGuidance:
        """The guidance of the sampler; refuses one that could not act."""
        if not isinstance(guidance, AutoregressiveGuidance):
            guidance = AutoregressiveGuidance(guidance, blocks=self.conditioned)
        if guidance.temperature == 1 or self.num_classes is not None:
            self.check_guidance(guidance.scale)
        return guidance

    def _networks(
        self, transformer: TransformerMaker, widths: Sequence[int], depths: Sequence[int], orders: Sequence[Permutation]
    ) -> list[CausalTransformer]:
        """The networks of the blocks, from the data end; all know labels, or the last one alone."""
        classes = [self.num_classes if self.conditioned == "all" else None] * (len(depths) - 1) + [self.num_classes]
        return [transformer(*given) for given in zip(classes, widths, depths, orders, strict=True)]

    def _layout(self) -> FlowLayout:
        tokens, noise = self.token_layout, self.augmentation
        dim, grid = tokens.token_dim, tokens.grid
        return FlowLayout(self.space, noise.noise_std, tokens.num_tokens, dim, grid, self.num_classes, noise.levels)

    def _tokens(self, x: Tensor) -> Tensor:
        return self.token_layout.tokens(x)

    def _points(self, tokens: Tensor) -> Tensor:
        return self.token_layout.points(tokens)

    # ---- facts ----------------------------------------------------------------------------------------

    def describe(self) -> Description:
        """Names the inverse, guidance and denoiser of samples, and the augmentation that the density depends on.

        On latents the noise belongs to the encoder and the denoiser to the decoder: the bound decodes denoised points.
        """
        latent, guidance = not isinstance(self.space, PixelSpace), self.guidance
        denoiser = "" if self.denoiser is None else self.denoiser.name
        in_bound = self.denoiser.of_the_space if latent and self.denoiser else None
        guidable = self.num_classes is not None or guidance.temperature != 1
        method = self.augmentation.likelihood_method(latent)
        sampler = [self.inverse_method.name, _guidance_name(guidance) if guidable else "", denoiser]
        bound_cost = in_bound.evaluations(self._num_flow_parameters()) if in_bound else 0.0
        return replace(
            super().describe(),
            likelihood_method="+".join(part for part in (method, in_bound.name if in_bound else "") if part),
            likelihood_evaluations=1.0 + bound_cost,
            reports_bits_per_dim=self.augmentation.bits_per_dim or latent,
            sampler="" if sampler == [SequentialInverse().name, "", ""] else "+".join(filter(None, sampler)),
            guidance_scale=guidance.scale if guidable else None,
            has_label_free_guidance=guidance.temperature != 1,
        )

    def count(self) -> Count:
        """Adds the blocks; with a cache all steps of the sampler together cost one pass."""
        level = self._level(torch.empty(1, device=self.weights_device))
        blocks = tuple(count_block(block, level) for block in self.flow.blocks)
        return replace(
            super().count(),
            blocks=blocks,
            evaluation_flops=sum(block.evaluation_flops for block in blocks),
            evaluations=1,
            sampling_flops=sum(block.sampling_flops for block in blocks),
            cache_bytes=max(block.cache_bytes for block in blocks),
        )

    # ---- training -------------------------------------------------------------------------------------

    @property
    def checkpoint_identity(self) -> dict[str, Any]:
        """Adds the noise levels of a flow that is told them."""
        own = {} if self.augmentation.levels is None else {"noise_levels": list(self.augmentation.levels)}
        return {**super().checkpoint_identity, **own}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also take the weights of a flow that was trained beside a denoiser which this one does without."""
        if self.denoiser is None or not self.denoiser.learns:
            stored = [checkpoint.get("state_dict", {}), checkpoint.get("ema", {}).get("shadow", {})]
            for weights in stored:
                for name in [name for name in weights if name.startswith("denoiser.")]:
                    del weights[name]
        super().on_load_checkpoint(checkpoint)

    def check_training(self, data: FlowDataModule, trainer: L.Trainer | None = None) -> None:
        """Also refuse a trainer that a denoiser which learns cannot be trained with."""
        super().check_training(data, trainer)
        self._check_trainer(trainer)

    def _check_trainer(self, trainer: L.Trainer | None) -> None:
        if trainer is not None and isinstance(self.denoiser, FlowScoreDenoiser):
            check_shared_backward(trainer)

    def setup(self, stage: str) -> None:
        """Refuse early what a denoiser that learns cannot be trained with."""
        super().setup(stage)
        if stage == "fit":
            self._check_trainer(self._trainer)

    def compiled_modules(self) -> list[nn.Module]:
        """The layers of all transformers: equal layers share what is compiled."""
        networks = [m for m in self.modules() if isinstance(m, CausalTransformer | TokenTransformer)]
        coder = self.space.trained
        coders = [] if coder is None else [*coder.encoder_modules(), *coder.decoder_modules()]
        return [*(layer for network in networks for layer in network.blocks), *coders]

    def sharded_modules(self) -> list[nn.Module]:
        """All that holds parameters."""
        return [self.flow, *([self.denoiser] if isinstance(self.denoiser, FlowScoreDenoiser) else [])]

    def _level(self, tokens: Tensor, level: float | None = None) -> Tensor | None:
        """The noise level that the flow is told of each point, by default the space's; None if it is told none."""
        if self.augmentation.levels is None:
            return None
        return tokens.new_full((len(tokens),), self.augmentation.noise_std if level is None else level)

    def _log_density(self, tokens: Tensor, label: Tensor | None, level: float | None = None) -> Tensor:
        z, logdet = self.flow(tokens, label, self._level(tokens, level))
        return self.source.log_prob(z) + logdet

    def loss(self, points: Tensor, condition: Condition, batch: Batch, generator: torch.Generator) -> Loss:
        """Negative log-likelihood in nats per dimension, plus regulariser and denoiser's loss where there are.

        A flow that is told the noise level weighs every point by its level.
        """
        points, level = self.augmentation.raised(points, generator)
        tokens, label, denoiser = self._tokens(points), condition.label, self.denoiser
        matched = isinstance(denoiser, FlowScoreDenoiser)
        shared = matched and torch.is_grad_enabled()
        if shared:
            tokens = tokens.detach().requires_grad_(True)
        twice = shared and self.latent_norm > 0
        with recorded(self.flow) as record, kept_for_two_passes(twice):
            z, logdet = self.flow(not_a_leaf(tokens) if shared else tokens, label, level)
        dims = points[0].numel()
        log_prob = self.source.log_prob(z) + logdet
        nll = -log_prob.mean() / dims
        metrics = {"nll": nll.detach(), "logdet": logdet.detach().mean() / dims, **self._bits(nll.detach())}
        if shared:
            parameters = [p for p in self.flow.parameters() if p.requires_grad]
            nll, gradient = with_input_gradient(nll, tokens, parameters, retain_graph=twice)
        total = nll if level is None else -(level * log_prob).mean() / dims
        if self.latent_norm:
            norm = sum((state.square().mean() for state in record.states[:-1]), start=z.new_zeros(()))
            metrics["latent_norm"] = norm
            total = total + self.latent_norm * norm
        if isinstance(denoiser, FlowScoreDenoiser):
            # The loss is a mean, a score is of one point's sum.
            of_point = -gradient * tokens.numel() if shared else self._score(tokens, label)
            metrics["score_matching"] = mismatch = denoiser.matching_loss(tokens, label, of_point)
            total = total + mismatch
        return Loss(total, {name: value.detach() for name, value in metrics.items()}, record.statistics)

    def _score(self, tokens: Tensor, label: Tensor | None) -> Tensor:
        with frozen(self.flow):
            return score(self._log_density, tokens, label)

    def _bits(self, nll: Tensor) -> dict[str, Tensor]:
        """Bits per dimension, where the points are grey levels spread uniformly over their bins and nothing else."""
        data = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        spread = getattr(data, "dequantize", "uniform") == "uniform"
        grey_levels = self.spec.levels is not None and isinstance(self.space, PixelSpace)
        if not (grey_levels and self.augmentation.bits_per_dim and spread):
            return {}
        return {"bits_per_dim": (nll - math.log(self.spec.bin_width)) / math.log(2.0)}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As set in the trainer; a denoiser that learns has its own norm, or it would scale the flow's gradient."""
        together = not isinstance(self.denoiser, FlowScoreDenoiser) or gradient_clip_algorithm == "value"
        if together:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for part in self.sharded_modules():
            self.clip_parameters(part.parameters(), gradient_clip_val, gradient_clip_algorithm)

    # ---- sampling, encoding, likelihood ---------------------------------------------------------------

    def flow_log_prob(self, x: Tensor, condition: Condition, index: Tensor, seed: int) -> Tensor:
        """Exact, by the change of variables."""
        with torch.no_grad():
            return self._log_density(self._tokens(x), condition.label)

    def flow_encode(self, z: Tensor, condition: Condition) -> Tensor:
        """One parallel pass."""
        tokens = self._tokens(z)
        return self._points(self.flow(tokens, condition.label, self._level(tokens))[0])

    def encoding_states(self, z: Tensor, condition: Condition) -> Tensor:
        """Points (B, *flow_shape), then their state after each of K blocks; the last, (K + 1)th one is the noise."""
        tokens = self._tokens(z)
        states = self.flow.states(tokens, condition.label, self._level(tokens))
        return torch.stack([self._points(state) for state in states])

    def _guidance_for(self, scale: float | None, label: Tensor | None) -> AutoregressiveGuidance | None:
        """The guidance of one batch; without labels only a temperature guides."""
        guidance = self.guidance if scale is None else replace(self.guidance, scale=scale)
        return None if label is None and guidance.temperature == 1 else guidance

    def flow_sample(self, noise: Tensor, condition: Condition, override: SamplerOverride) -> FlowSamples:
        """Invert the flow and denoise; see :class:`~flowbench.flows.Inversion` for what counts as an evaluation."""
        denoiser = self.denoiser
        if denoiser is None:
            return self.flow_decode(noise, condition, override.guidance)
        drawn = self._decoded(noise, condition, override.guidance, denoiser.starting_level)
        cost = drawn.network_evaluations + denoiser.evaluations(self._num_flow_parameters())
        with frozen(self.flow):
            tokens = denoiser.denoise_drawn(self._tokens(drawn.x), condition.label, self._log_density)
        return replace(drawn, x=self._points(tokens), network_evaluations=cost)

    def _num_flow_parameters(self) -> int:
        return sum(p.numel() for p in self.flow.parameters())

    def flow_denoise(self, z: Tensor, condition: Condition) -> Tensor:
        """What :meth:`flow_sample` does to the points (B, *flow_shape) that the inverse gives at the space's noise."""
        if self.denoiser is None:
            return z
        with frozen(self.flow):
            return self._points(self.denoiser.denoise(self._tokens(z), condition.label, self._log_density))

    def flow_decode(self, noise: Tensor, condition: Condition, guidance: float | None = 1.0) -> FlowSamples:
        """The inverse without denoising: of :meth:`flow_encode` at scale 1; None is the sampler's own scale."""
        return self._decoded(noise, condition, guidance, None)

    def _decoded(self, noise: Tensor, condition: Condition, guidance: float | None, level: float | None) -> FlowSamples:
        label, tokens = condition.label, self._tokens(noise)
        guided = self._guidance_for(guidance, label)
        found = self.flow.invert(tokens, label, guided, self.inverse_method, self._level(tokens, level))
        return FlowSamples(self._points(found.x), found.network_evaluations, found.iterations, found.residual)

    @torch.no_grad()
    def trajectory(
        self, noise: Tensor, condition: Condition | Tensor | None = None, num_points: int = 33
    ) -> Trajectory:
        """The state after each block, from noise to data; every block takes an equal share of the time."""
        label = self.check_condition(condition, len(noise)).label
        tokens = self._tokens(noise)
        states = self.flow.inverse_states(tokens, label, method=self.inverse_method, level=self._level(tokens))
        points = torch.stack([self._points(state) for state in states])
        times = torch.linspace(0.0, 1.0, len(points), device=noise.device, dtype=torch.float64)
        return Trajectory(points, times)


def _guidance_name(guidance: AutoregressiveGuidance) -> str:
    """The rule and its settings; rows hold the scale apart, which a sweep may have chosen."""
    parts = [guidance.rule] + ["deep"] * (guidance.blocks == "deep") + ["annealed"] * guidance.annealed
    parts += [f"temperature={guidance.temperature:g}"] * (guidance.temperature != 1)
    return f"guidance[{','.join(parts)}]"


def _transformer(
    layout: FlowLayout,
    head_dim: int,
    mlp_ratio: float,
    position: Literal["rope", "learned"],
    start: Literal["zero", "learned"],
    final_norm: bool,
    extent: float | None,
    checkpoint_every: int,
) -> TransformerMaker:
    """What the networks of all blocks have in common."""

    def made(num_classes: int | None, width: int, depth: int, order: Permutation) -> CausalTransformer:
        return CausalTransformer(
            layout.num_tokens,
            layout.token_dim,
            num_classes,
            width=width,
            depth=depth,
            head_dim=head_dim,
            mlp_ratio=mlp_ratio,
            position=position,
            start=start,
            final_norm=final_norm,
            extent=extent,
            checkpoint_every=checkpoint_every,
            grid=network_grid(order, layout.grid) if layout.grid and position == "rope" else None,
            noise_conditioned=layout.levels is not None,
        )

    return made


def _orders(given: Sequence[Permutation] | None, num_blocks: int, last: Permutation | None) -> list[Permutation]:
    if given is None:
        return alternating(num_blocks, last=last or "flip")
    if last is not None:
        raise ValueError(f"permutations name the order of every block, last_order={last} too: leave one of them out")
    if len(given) != num_blocks:
        raise ValueError(f"permutations must name an order for each of {num_blocks} blocks, got {len(given)}")
    return list(given)
