"""Pairs from the bijection of a trained flow: x0 = teacher(x1)."""

from __future__ import annotations

import copy
import math
import time
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from flowbench.core.devices import preparation_device
from flowbench.data import Batch, DataSpec, FlowDataModule
from flowbench.families.base import FlowModule
from flowbench.families.conditioning.condition import Condition
from flowbench.families.latents.space import LatentSpace, PixelSpace, Space
from flowbench.families.pairing.base import Pairing, PairingContext, Pairs, cost_ratio, true_label
from flowbench.families.pairing.pair_store import PairStore, weights_checksum
from flowbench.flows import Source
from flowbench.training.preparation import Preparation

__all__ = [
    "FrozenTeacher",
    "TeacherPairing",
    "check_dropout",
    "check_noise",
    "check_spaces",
    "check_teacher",
    "required_teacher",
    "source_of",
    "space_of",
]

ENCODING_BATCH = 256

AnyFlow = TypeVar("AnyFlow", bound=FlowModule)


class FrozenTeacher(Generic[AnyFlow]):
    """A trained flow in evaluation mode that is no module of its student.

    Its weights enter neither optimiser nor average nor checkpoint, and copies of the student share it.

    Attributes:
        flow: the teacher itself, wherever it lies.

    Args:
        flow: trained.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import DataSpec
        >>> from flowbench.networks import MLP
        >>> teacher = FrozenTeacher(FlowMatching(DataSpec("points", "1", (2,)), partial(MLP, width=16, depth=1)))
        >>> teacher.on(torch.device("meta")).weights_device, teacher.flow.weights_device
        (device(type='meta'), device(type='cpu'))
        >>> copy.deepcopy(teacher).flow is teacher.flow
        True
    """

    def __init__(self, flow: AnyFlow) -> None:
        self.flow: AnyFlow = flow.requires_grad_(False).eval()
        self._shapes: AnyFlow | None = None
        self._checksum = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher[AnyFlow]:
        """The same: nothing changes the weights."""
        return self

    def on(self, device: torch.device) -> AnyFlow:
        """The flow on a device; on the meta device, where a move would lose the weights, a copy of their shapes."""
        if device.type != "meta" or self.flow.weights_device.type == "meta":
            return self.flow.to(device)
        if self._shapes is None:
            shapes: dict[int, Any] = {
                id(p): nn.Parameter(torch.empty_like(p, device=device), requires_grad=False)
                for p in self.flow.parameters()
            }
            shapes |= {id(buffer): torch.empty_like(buffer, device=device) for buffer in self.flow.buffers()}
            self._shapes = copy.deepcopy(self.flow, shapes)
        return self._shapes

    @property
    def checksum(self) -> str:
        """Names the weights; computed once."""
        self._checksum = self._checksum or weights_checksum(self.flow)
        return self._checksum


class TeacherPairing(Pairing):
    """Every training point starts from the noise that a trained flow maps it to.

    The teacher is frozen, with its averaged weights, and no module of the student: its weights enter neither optimiser
    nor average nor checkpoint. It encodes in full precision.

    A teacher that was trained on noisy data (TARFlow's Gaussian augmentation) maps *noisy* data to its source; the
    encodings of clean data have another distribution than the one that the student's samples start from. So the point
    that is encoded gets the noise of the teacher's training, as far as the student's own training points lack it: x0 =
    teacher(x1 + sqrt(teacher_std^2 - student_std^2) e). The student goes to x1, the data themselves; the teacher's
    denoiser and sampler play no part. A dropped label is dropped for the teacher too, where it learned the null label.

    Args:
        teacher: trained; any flow that encodes.
        cache_encodings: encode the training split once and keep it on disk. Only where an encoding is a function of the
            sample: continuous data or ``dequantize: none``, no mirror images, data space, no noise to add.

    Raises:
        ValueError: for a cache that would not give what encoding gives.
    """

    def __init__(self, teacher: FlowModule, cache_encodings: bool = False) -> None:
        self._frozen = FrozenTeacher(teacher)
        self.cache_encodings = cache_encodings
        self._prepared: PairStore | None = None
        self._store: PairStore | None = None

    @property
    def teacher(self) -> FlowModule:
        """The flow that encodes."""
        return self._frozen.flow

    def __repr__(self) -> str:
        return f"TeacherPairing({type(self.teacher).__name__})"

    def check(self, context: PairingContext, data: FlowDataModule) -> None:
        """Refuse a teacher of other points or with less noise, and encodings that differ from visit to visit."""
        check_teacher(context, self.teacher)
        check_noise(context, self.teacher)
        if self.cache_encodings:
            self._check_cacheable(context, data)

    def setup(self, context: PairingContext, data: FlowDataModule | None, training: bool = True) -> None:
        """Check that teacher and student live in the same space; read or make the cache where it is asked for.

        Raises:
            ValueError: when they do not, or the data cannot be cached.
        """
        check_teacher(context, self.teacher)
        check_spaces(context, self.teacher)
        if self.cache_encodings and training:
            if not isinstance(data, FlowDataModule):
                raise ValueError(f"cache_encodings needs a FlowDataModule, got {type(data).__name__}: set it to false")
            self.prepare(context, data)
            self._store = self._prepared

    def prepare(self, context: PairingContext, data: FlowDataModule) -> Preparation:
        """Read the cached encodings, or make them, on a GPU where there is one; nothing without a cache.

        Returns:
            The seconds that they took when they were made. Their operations are none of it: every step is charged the
            teacher's pass that the cache replaces, so before :meth:`setup` pairs are encoded and not looked up.

        Raises:
            ValueError: when teacher and student do not live in the same space, or the data cannot be cached.
        """
        if not self.cache_encodings:
            return Preparation()
        check_teacher(context, self.teacher)
        check_spaces(context, self.teacher)
        self._check_cacheable(context, data)
        store = PairStore("encodings", self._identity(context, data), len(data.split("train")))
        if self._prepared is None or self._prepared.folder != store.folder:
            device = preparation_device(context.device)
            store.complete(lambda index: self._rows(context, data, index, device))
            self._prepared = store
        return Preparation(seconds=self._prepared.seconds)

    def pairs(
        self, context: PairingContext, x1: Tensor, label: Tensor | None, batch: Batch, rng: torch.Generator
    ) -> Pairs:
        """Encode the batch, or look its encodings up."""
        start = time.perf_counter()
        teaching = true_label(label, batch) if self._dropout(context) == 0 else label
        if self._store is not None and batch.position is not None and batch.index is not None:
            x0 = self._look_up(self._store, batch.index, teaching, x1.device)
        else:
            x0 = self._encode(x1, self._missing_std(context), teaching, rng)
        seconds = time.perf_counter() - start

        def diagnostics() -> dict[str, Tensor | float]:
            return {"coupling_ms": 1e3 * seconds, "cost_ratio": cost_ratio(x0, x0.roll(1, 0), x1)}

        return Pairs(x0, x1, label, diagnostics=diagnostics)

    def _missing_std(self, context: PairingContext) -> float:
        """Standard deviation of the noise that the student's training points lack."""
        return math.sqrt(self.teacher.space.noise_std**2 - context.space.noise_std**2)

    def _dropout(self, context: PairingContext) -> float:
        """Share of labels that teacher and student both do without."""
        return min(self.teacher.label_dropout, context.label_dropout) if context.num_classes is not None else 0.0

    @torch.no_grad()
    def _encode(self, x1: Tensor, std: float, label: Tensor | None, rng: torch.Generator | None) -> Tensor:
        teacher = self._frozen.on(x1.device)
        if std and rng is not None:
            x1 = x1 + std * torch.randn(x1.shape, generator=rng, device=rng.device, dtype=x1.dtype).to(x1.device)
        with teacher.full_precision():
            return teacher.flow_encode(x1.float(), Condition(label))

    # ---- cache ------------------------------------------------------------------------------------------

    def _identity(self, context: PairingContext, data: FlowDataModule) -> dict[str, Any]:
        """All that the encodings depend on, in plain types."""
        return {
            "kind": "encodings",
            "data": data.spec.identity,
            "teacher": self._frozen.checksum,
            "method": type(self.teacher).__name__ + self.teacher.describe().encoder,
            "dropout": self._dropout(context) > 0,
        }

    def _rows(
        self, context: PairingContext, data: FlowDataModule, index: Tensor, device: torch.device
    ) -> dict[str, Tensor]:
        """Encodings of some training samples."""
        labels = data.split("train").label if context.num_classes is not None else None
        points = data.model_values("train", index)
        rows = {"noise": self._in_chunks(points, None if labels is None else labels[index], device)}
        if self._dropout(context):
            null = torch.full((len(index),), self.teacher.num_classes or 0)
            rows["null_noise"] = self._in_chunks(points, null, device)
        return rows

    def _check_cacheable(self, context: PairingContext, data: FlowDataModule) -> None:
        reason = self._not_cacheable(context, data)
        if reason:
            raise ValueError(f"cache_encodings keeps one encoding per training sample, but {reason}: set it to false")

    def _in_chunks(self, points: Tensor, labels: Tensor | None, device: torch.device) -> Tensor:
        parts = []
        for start in range(0, len(points), ENCODING_BATCH):
            rows = slice(start, start + ENCODING_BATCH)
            label = None if labels is None else labels[rows].to(device)
            parts.append(self._encode(points[rows].to(device), 0.0, label, None).cpu())
        return torch.cat(parts)

    def _not_cacheable(self, context: PairingContext, data: FlowDataModule) -> str:
        if data.known_spec.levels is not None and data.dequantize != "none":
            return "uniform dequantisation changes the samples at every visit"
        if data.random_flip:
            return "data.random_flip mirrors them"
        if data.label_noise and context.num_classes is not None:
            return "data.label_noise gives them other labels than their own"
        if not isinstance(context.space, PixelSpace) or context.space.noise_std or self._missing_std(context):
            return "noise or a posterior draw changes the points at every visit"
        return ""

    def _look_up(self, store: PairStore, index: Tensor, label: Tensor | None, device: torch.device) -> Tensor:
        rows = store.take(index, device)
        if "null_noise" not in rows or label is None:
            return rows["noise"]
        dropped = label.eq(self.teacher.num_classes or 0).view(-1, *[1] * (rows["noise"].ndim - 1))
        return torch.where(dropped, rows["null_noise"], rows["noise"])


# ---- what a student takes from its teacher --------------------------------------------------------------


def required_teacher(teacher: FlowModule | None, family: str, spec: DataSpec) -> FlowModule:
    """The teacher of a family that cannot do without.

    Raises:
        ValueError: when there is none, or it is no flow of such data.
    """
    if teacher is None:
        raise ValueError(
            f"{family} learns from a trained flow and got none: "
            "add `requires: {teacher: <experiment file>}` to the experiment file"
        )
    if not isinstance(teacher, FlowModule):
        raise ValueError(f"{family} learns from a flow, but requires.teacher names a {type(teacher).__name__}")
    if teacher.conditioner is not None:
        raise ValueError(
            f"the teacher is conditioned ({teacher.conditioner.name}), and generated points have no data to make a "
            f"condition from: {family} needs one without a conditioner"
        )
    if tuple(teacher.spec.shape) != tuple(spec.shape):
        theirs, ours = tuple(teacher.spec.shape), tuple(spec.shape)
        raise ValueError(f"the teacher has data of shape {theirs}, the student of {ours}: they must agree")
    if (teacher.spec.name, teacher.spec.version) != (spec.name, spec.version):
        raise ValueError(
            f"the teacher was trained on {teacher.spec.name} (version {teacher.spec.version}), the student's data are "
            f"{spec.name} (version {spec.version}): set requires.teacher.data.dataset={spec.name} too"
        )
    return teacher


def space_of(teacher: FlowModule) -> Space:
    """Where a student lives: beside a latent teacher with its noise, or with the clean data."""
    if isinstance(teacher.space, LatentSpace):
        return LatentSpace(teacher.space.autoencoder, teacher.space.noise_std, teacher.space.cache_latents)
    return PixelSpace(teacher.space.shape)


def source_of(teacher: FlowModule) -> Source:
    """The teacher's own source, of which the student gets a copy."""
    return copy.deepcopy(teacher.source).train()


def check_teacher(context: PairingContext, teacher: FlowModule) -> None:
    """Refuse a teacher of other points, labels or another source than the student's.

    Raises:
        ValueError: names both sides.
    """
    sides: dict[str, tuple[Any, Any]] = {
        "a flow of points of shape": (tuple(teacher.flow_shape), tuple(context.space.shape)),
        "the source": (repr(teacher.source), repr(context.source)),
        # Given its label, a point of an unconditional teacher would not start from the source, but samples do.
        "labels of as many classes as": (teacher.num_classes, context.num_classes),
    }
    for what, (theirs, ours) in sides.items():
        if theirs != ours:
            raise ValueError(f"the teacher has {what} {theirs}, the student {ours}: they must agree")


def check_dropout(context: PairingContext, teacher: FlowModule) -> None:
    """Refuse a student that drops labels where the teacher never did: what it says without one was never learned.

    Raises:
        ValueError: names the student's share.
    """
    if context.num_classes is not None and context.label_dropout > 0 and teacher.label_dropout == 0:
        raise ValueError(
            "the teacher was trained without dropped labels and has nothing to teach under the null label, but the "
            f"student drops {context.label_dropout:g} of them: set label_dropout=0"
        )


def check_spaces(context: PairingContext, teacher: FlowModule) -> None:
    """Refuse a teacher in another latent space, or one that learned less noise than the student.

    Raises:
        ValueError: names both sides.
    """
    if teacher.space.checksum != context.space.checksum:
        raise ValueError(
            f"the teacher lives in the latent space of autoencoder {teacher.space.checksum}, the student in that of "
            f"{context.space.checksum}: give both the same"
        )
    check_noise(context, teacher)


def check_noise(context: PairingContext, teacher: FlowModule) -> None:
    """Refuse a teacher that learned less noise than the student's points have.

    Raises:
        ValueError: names both sides.
    """
    if teacher.space.noise_std < context.space.noise_std:
        raise ValueError(
            f"the student's points have noise of {context.space.noise_std:g}, but the teacher learned only "
            f"{teacher.space.noise_std:g}: give the student at most as much"
        )
