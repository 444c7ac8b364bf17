"""BiFlow: a learned inverse of an autoregressive flow that draws in one pass.

Shape suffixes: S compared states, B batch, N tokens, D token dimension.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowbench.core.cache import ensure, identity_key, numbers_checksum, read_tensors, write_tensors
from flowbench.core.checks import check_number
from flowbench.core.places import cached
from flowbench.core.seeds import generator as seeded
from flowbench.data import Batch, DataSpec, FlowDataModule
from flowbench.evaluation.override import SamplerOverride
from flowbench.families.base import FlowModule, FlowSamples, Trajectory
from flowbench.families.conditioning.condition import Condition
from flowbench.families.description import Description
from flowbench.families.fitted import FIT_CHUNK
from flowbench.families.latents.space import LatentSpace, PixelSpace, Space
from flowbench.families.noise.denoising import DecoderDenoiser
from flowbench.families.pairing.base import PairingContext
from flowbench.families.pairing.teacher import (
    FrozenTeacher,
    check_dropout,
    check_teacher,
    required_teacher,
    source_of,
)
from flowbench.families.tarflow import TARFlow
from flowbench.families.token_layout import TokenLayout
from flowbench.networks import ReadOutTransformer
from flowbench.training.config import TrainingConfig
from flowbench.training.count import Count, forward_flops
from flowbench.training.module import Loss
from flowbench.training.preparation import Preparation

__all__ = ["BiFlow"]


class BiFlow(FlowModule):
    """A bidirectional transformer that learns, block by block, the inverse of a trained autoregressive flow.

    The teacher F of B blocks carries a noisy training point y_0 = x + sigma e through its states y_1, ..., y_{B-1} to
    the noise z = y_B. The student G goes back from z: after each of its blocks a learned linear head reads the hidden
    state, and what it reads is compared with the teacher's state there; one block more learns to take the noise out. So

        loss = sum_{i=0}^{B-1} E |phi_i(h_i) - y_i|^2 / E |y_i|^2  +  E |x_hat - x|^2 / E |x|^2,

    with the mean squares E |.|^2 of the training data taken once, before the first step. Drawing is one pass: tokens
    are no longer visited one by one. Of a teacher without Gaussian noise y_0 = x, and there are B blocks.

    Samples have no density: the student is no bijection, and the teacher's likelihood is that of other samples. So
    :meth:`log_prob` is refused and rows have none. :meth:`encode` is the teacher's pass to the noise, of which the
    student's is an approximate inverse. The teacher is frozen and no part of the student's checkpoint.

    A budget in operations counts the teacher's pass in every step, but not the training of the teacher, which is an
    experiment of its own. The mean squares are kept in the cache, and every training is charged what they cost.

    References:
        BiFlow (2025), arXiv 2512.10953, from a reading note: the number of layers and the normalisation are ours, and
        guidance acts on the output of the sampler, not within the training.

    Args:
        spec: the data's shape, classes and value grid.
        teacher: a trained TARFlow or STARFlow of the same data; an experiment file names it under ``requires``.
        alignment: compare the states between the blocks through `heads`, or `none`: the end alone.
        denoise: one block more, whose target is the clean point; None where the teacher's training points are noisy.
            Without it samples keep that noise.
        depth: transformer layers of each block, 1 to 1,000.
        width: channels of the transformer, a multiple of `head_dim`, up to 65,536.
        head_dim: channels of one attention head, >= 1.
        mlp_ratio: hidden channels of the MLPs over `width`, in [1 / width, 1000].
        guidance: scale of the sampler, null + scale (labelled - null) of two passes, in [0, 1e12]; 1 is none.
        conditional: condition on class labels, as the teacher is.
        label_dropout: share of training labels replaced by the null label, for teacher and student alike, in [0, 1).
        training: optimiser, averaged weights and compilation; None takes the defaults.

    Raises:
        ValueError: without a teacher, or with one that is no autoregressive flow, has other data or labels, or no noise
            that could be removed.

    Example:
        >>> from flowbench.data import Batch, DataSpec
        >>> spec = DataSpec("images", "1", (1, 4, 4), levels=17)
        >>> teacher = TARFlow(spec, architecture="2-16-2-1", head_dim=8).eval()
        >>> flow = BiFlow(spec, teacher=teacher, depth=1, width=16, head_dim=8)
        >>> samples = flow.sample(flow.draw_noise(torch.arange(3), seed=0))
        >>> samples.x.shape, samples.network_evaluations
        (torch.Size([3, 1, 4, 4]), 1.0)
        >>> flow.describe().likelihood
        'none'
        >>> sorted(flow.training_loss(Batch(torch.zeros(2, 1, 4, 4)), torch.Generator()).metrics)
        ['end', 'state1']
    """

    density = "none"
    sampling_arguments = FlowModule.sampling_arguments - {"sampling_source"} | {"guidance"}

    def __init__(
        self,
        spec: DataSpec,
        *,
        teacher: FlowModule | None = None,
        alignment: Literal["heads", "none"] = "heads",
        denoise: bool | None = None,
        depth: int = 2,
        width: int = 128,
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        guidance: float = 1.0,
        conditional: bool = False,
        label_dropout: float = 0.1,
        training: TrainingConfig | None = None,
    ) -> None:
        known = _autoregressive(required_teacher(teacher, "BiFlow", spec))
        super().__init__(
            spec,
            space=_clean_space(known),
            conditional=conditional,
            label_dropout=label_dropout,
            training=training,
        )
        self.source = source_of(known)
        self._teacher = FrozenTeacher(known)
        check_teacher(self.pairing_context, known)
        check_dropout(self.pairing_context, known)
        check_number("guidance", guidance, at_least=0, hint="1 is none")
        self.check_guidance(guidance)
        self.guidance = guidance
        if alignment not in ("heads", "none"):
            raise ValueError(f"alignment must be 'heads' or 'none', got {alignment!r}")
        self.denoises = _denoises(known, denoise)
        self.layout = TokenLayout(self.flow_shape, known.patch_size)
        num_blocks = len(known.flow.blocks) + self.denoises
        self.network: nn.Module = ReadOutTransformer(
            self.layout.num_tokens,
            self.layout.token_dim,
            self.num_classes,
            num_blocks=num_blocks,
            depth=depth,
            width=width,
            head_dim=head_dim,
            mlp_ratio=mlp_ratio,
            grid=self.layout.grid,
            reads=alignment == "heads",
        )
        self.aligned = alignment == "heads"
        self.mean_squares: Tensor
        self.register_buffer("mean_squares", torch.ones(num_blocks if self.aligned else 1))
        self._is_fitted = False

    @property
    def teacher(self) -> TARFlow:
        """The flow whose inverse is learned; frozen."""
        return self._teacher.flow

    @property
    def pairing_context(self) -> PairingContext:
        """What must agree with the teacher."""
        return PairingContext(
            self.source, self.space, self.num_classes, self.label_dropout, self.seed, self.weights_device
        )

    # ---- facts ----------------------------------------------------------------------------------------

    def describe(self) -> Description:
        """Names the guidance."""
        labelled = self.num_classes is not None
        return replace(
            super().describe(),
            sampler="guidance[output]" if labelled else "",
            guidance_scale=self.guidance if labelled else None,
        )

    def count(self) -> Count:
        """Adds the one pass of the sampler."""
        device = self.weights_device
        tokens = torch.empty(1, self.layout.num_tokens, self.layout.token_dim, device=device)
        one_pass = forward_flops(lambda: self.network(tokens, self.null_condition(1).label))
        return replace(super().count(), evaluation_flops=one_pass, evaluations=1, sampling_flops=one_pass)

    @property
    def checkpoint_identity(self) -> dict[str, Any]:
        """Adds the teacher's weights: another teacher has another inverse."""
        return {**super().checkpoint_identity, "teacher": self._teacher.checksum}

    # ---- training -------------------------------------------------------------------------------------

    def fit_to(self, data: FlowDataModule, *, training: bool) -> None:
        """Take the mean squares of the compared states over the first training points."""
        super().fit_to(data, training=training)
        if not training or self._is_fitted:
            return
        identity = self._states_identity(data)
        path = cached("states", f"biflow-{identity_key(identity, 16)}.pt")
        ensure(path, lambda: write_tensors(path, identity, self._measured_states(data)))
        found = read_tensors(path, identity, "the mean squares of the teacher's states")
        self.mean_squares.copy_(found["mean_squares"])
        self.preparation = Preparation(float(found["flops"]), float(found["seconds"]))
        self._is_fitted = True

    def _states_identity(self, data: FlowDataModule) -> dict[str, Any]:
        """All that the mean squares depend on, in plain types."""
        return {
            **data.spec.identity,
            "num_samples": len(data.split("train")),
            "chosen": numbers_checksum(data.train_indices),
            "dequantize": data.dequantize,
            "labels": numbers_checksum(self.fit_labels(data)),
            "seeds": [self.seed, data.seed],
            "space": self.space.checksum,
            "teacher": f"{type(self.teacher).__name__} {self._teacher.checksum}",
            "noise_std": self.teacher.space.noise_std,
            "states": self._names,
            "denoises": self.denoises,
        }

    def _measured_states(self, data: FlowDataModule) -> dict[str, Tensor]:
        """Mean squares of the compared states (S,) over the first training points, and what they cost."""
        began = time.perf_counter()
        points, rng = self.fit_points(data, drawn=True), seeded(self.seed, "fit", "states")
        label = self.fit_labels(data)
        condition = Condition(None if label is None else label.to(points.device))
        total = torch.zeros(len(self.mean_squares), dtype=torch.float64, device=points.device)
        for rows in torch.arange(len(points)).split(FIT_CHUNK):
            states = self._states(points[rows], condition.rows(rows), rng)[1]
            total += states.double().square().flatten(2).mean(2).sum(1)
        mean_squares, seconds = (total / len(points)).cpu(), time.perf_counter() - began

        def one() -> None:
            self._states(self.fit_points(data, 1, drawn=True), condition.rows(slice(1)), seeded(self.seed, "flops"))

        return {
            "mean_squares": mean_squares,
            "flops": torch.tensor(float(forward_flops(one) * len(points)), dtype=torch.float64),
            "seconds": torch.tensor(seconds, dtype=torch.float64),
        }

    def compiled_modules(self) -> list[nn.Module]:
        """The layers of the transformer: equal layers share what is compiled."""
        return list(self.network.blocks)  # type: ignore[arg-type]

    def sharded_modules(self) -> list[nn.Module]:
        """The transformer holds all parameters."""
        return [self.network]

    def loss(self, points: Tensor, condition: Condition, batch: Batch, generator: torch.Generator) -> Loss:
        """Errors of all compared states, each over the mean square of its state, summed."""
        noise, states = self._states(points, condition, generator)
        found_SBND = self.network(self.layout.tokens(noise), condition.label)
        target_SBND = torch.stack([self.layout.tokens(state) for state in states])
        errors = (found_SBND - target_SBND).square().flatten(1).mean(1) / self.mean_squares
        return Loss(errors.sum(), dict(zip(self._names, errors.detach().unbind(), strict=True)))

    @property
    def _names(self) -> list[str]:
        """Of the compared states: ``state<i>`` is y_i, ``end`` the last."""
        numbers = range(len(self.teacher.flow.blocks) - 1, -1 if self.denoises else 0, -1)
        return [f"state{i}" for i in numbers if self.aligned] + ["end"]

    @torch.no_grad()
    def _states(self, points: Tensor, condition: Condition, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """The noise that the teacher carries noisy points to, and what the student's blocks are compared with.

        Args:
            points: clean, shape (B, *flow_shape).
            condition: of teacher and student.
            rng: source of the noise on the points.

        Returns:
            Noise (B, *flow_shape), and states (S, B, *flow_shape) from the noise to the data: y_{B-1}, ..., y_0 and the
            clean points of a student that denoises; without alignment the last one alone.
        """
        noisy, std = points, self.teacher.space.noise_std
        if std:
            drawn = torch.randn(points.shape, generator=rng, device=rng.device, dtype=points.dtype)
            noisy = points + std * drawn.to(points.device)
        with self.full_precision():
            teacher = self._teacher.on(points.device)
            *states, noise = teacher.encoding_states(noisy.float(), condition).to(points.dtype).unbind()
        states = [*states[::-1], points] if self.denoises else states[::-1]
        return noise, torch.stack(states if self.aligned else states[-1:])

    # ---- sampling and encoding ------------------------------------------------------------------------

    def flow_sample(self, noise: Tensor, condition: Condition, override: SamplerOverride) -> FlowSamples:
        """One pass; two where they are guided."""
        tokens, label = self.layout.tokens(noise), condition.label
        scale = self.guidance if override.guidance is None else override.guidance
        labelled = self.network(tokens, label)[-1]
        if label is None or scale == 1.0:
            return FlowSamples(self.layout.points(labelled), 1.0)
        null = self.network(tokens, self.null_condition(len(noise)).label)[-1]
        return FlowSamples(self.layout.points(null + scale * (labelled - null)), 2.0)

    def flow_encode(self, z: Tensor, condition: Condition) -> Tensor:
        """The teacher's pass; the student undoes it as well as it has learned."""
        return self._teacher.on(z.device).flow_encode(z.float(), condition).to(z.dtype)

    def flow_log_prob(self, x: Tensor, condition: Condition, index: Tensor, seed: int) -> Tensor:
        """Never called: the family has no density."""
        raise NotImplementedError("samples of BiFlow have no density")

    @torch.no_grad()
    def trajectory(
        self, noise: Tensor, condition: Condition | Tensor | None = None, num_points: int = 33
    ) -> Trajectory:
        """What the heads read after each block, from noise to data; without alignment the two ends alone."""
        label = self.check_condition(condition, len(noise)).label
        read = self.network(self.layout.tokens(noise), label)
        points = torch.stack([noise, *(self.layout.points(state) for state in read)])
        times = torch.linspace(0.0, 1.0, len(points), device=noise.device, dtype=torch.float64)
        return Trajectory(points, times)


def _autoregressive(teacher: FlowModule) -> TARFlow:
    if not isinstance(teacher, TARFlow):
        raise ValueError(
            "BiFlow learns the states between the blocks of an autoregressive flow, and a "
            f"{type(teacher).__name__} has none: name a TARFlow or STARFlow under requires.teacher"
        )
    return teacher


def _clean_space(teacher: TARFlow) -> Space:
    """Where the student lives: where the teacher does, without the noise, which the student adds itself."""
    if isinstance(teacher.space, LatentSpace):
        return LatentSpace(teacher.space.autoencoder, cache_latents=teacher.space.cache_latents)
    return PixelSpace(teacher.space.shape)


def _denoises(teacher: TARFlow, asked: bool | None) -> bool:
    """Whether the student has the block that removes noise.

    Raises:
        ValueError: when there is no noise, or the decoder removes it.
    """
    by_decoder = isinstance(teacher.denoiser, DecoderDenoiser)
    if asked and not teacher.space.noise_std:
        raise ValueError("denoise=true, but the teacher was trained on points without Gaussian noise: leave it out")
    if asked and by_decoder:
        raise ValueError("denoise=true, but the teacher's decoder expects noisy latents: leave it out")
    return bool(teacher.space.noise_std) and not by_decoder if asked is None else asked
