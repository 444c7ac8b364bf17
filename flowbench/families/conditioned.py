"""What a flow may be given beside noise: labels, conditions of its conditioner, and guidance by them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from flowbench.core.checks import check_number
from flowbench.data import Batch, DataSpec, FlowDataModule
from flowbench.evaluation.probe import Setup
from flowbench.families.conditioning.base import Conditioner, check_given
from flowbench.families.conditioning.by_index import labels_of_samples
from flowbench.families.conditioning.condition import Condition, SpatialCondition
from flowbench.families.conditioning.labels import check_labels
from flowbench.families.description import Description
from flowbench.families.latents.space import Space
from flowbench.training.config import TrainingConfig
from flowbench.training.module import TrainingModule

__all__ = ["ConditionedModule"]


class ConditionedModule(TrainingModule):
    """Labels and conditions of a flow, checked in one place; the base of :class:`~flowbench.families.FlowModule`.

    Args:
        spec: the data's shape, classes and value grid.
        conditional: condition on class labels.
        label_dropout: share of training labels replaced by the null label, in [0, 1).
        training: see :class:`~flowbench.training.TrainingConfig`.

    Raises:
        ValueError: when labels are asked for and the data has none, or the share is out of range.
    """

    space: Space

    def __init__(
        self, spec: DataSpec, *, conditional: bool, label_dropout: float, training: TrainingConfig | None
    ) -> None:
        super().__init__(spec, training=training)
        if conditional and spec.num_classes is None:
            raise ValueError(f"conditional=true, but {spec.name} has no labels: set conditional=false")
        check_number("label_dropout", label_dropout, at_least=0, below=1)
        self.conditioner: Conditioner | None = None
        self.num_classes = spec.num_classes if conditional else None
        self.label_dropout = label_dropout

    @abstractmethod
    def describe(self) -> Description:
        """Facts for rows and refusals."""

    def check_conditions(self, data: FlowDataModule) -> None:
        """Refuse (ValueError) data that cannot give the conditions of this flow."""
        if self.conditioner is not None:
            self.conditioner.check(data.known_spec)
        check_given(self.conditioner, data.condition)

    def check_sampling(self, network_evaluations: int | None = None, guidance: float | None = None) -> None:
        """Refuse (ValueError) arguments of :meth:`sample` that this flow's sampler cannot do; nothing is drawn."""
        facts = self.describe()
        if network_evaluations is not None and not facts.can_choose_evaluations:
            raise ValueError(f"{type(self).__name__} has a fixed cost per sample: leave network_evaluations out")
        by_condition = self.drops_conditions and self.num_classes is None
        if guidance is not None and guidance != 1.0 and not facts.has_label_free_guidance and not by_condition:
            self.check_guidance(guidance)

    def drop_labels(self, label: Tensor | None, generator: torch.Generator) -> Tensor | None:
        """Replace a share of the labels by the null label, which is the index `num_classes`."""
        if self.num_classes is None or label is None:
            return None
        drop = torch.rand(label.shape, generator=generator, device=label.device) < self.label_dropout
        return label.masked_fill(drop, self.num_classes)

    def training_condition(self, batch: Batch, generator: torch.Generator) -> Condition:
        """What a training batch is conditioned on; of labels and conditions a share is dropped."""
        label = self.drop_labels(batch.label, generator)
        if self.conditioner is None:
            return Condition(label)
        made = self.conditioner.training_condition(batch, self.space, generator)
        return Condition(label, self.conditioner.dropped(made, generator))

    def held_out_condition(self, batch: Batch, seed: int = 0) -> Condition:
        """What held-out data are conditioned on: their own labels, and conditions keyed by their numbers.

        Args:
            batch: numbered, on the module's device.
            seed: the evaluation seed.
        """
        label = None if self.num_classes is None else batch.label
        if self.conditioner is None:
            return Condition(label)
        assert batch.index is not None, "the datamodule numbers its samples"
        made = self.conditioner.held_out_condition(batch.x, batch.condition, batch.index, seed, self.space)
        return Condition(label, made)

    def null_condition(self, num: int) -> Condition:
        """The null label and the null condition of so many samples, as far as the flow has them."""
        device = self.weights_device
        label = None if self.num_classes is None else torch.full((num,), self.num_classes, device=device)
        if self.conditioner is None:
            return Condition(label)
        shape = (num, self.conditioner.channels(self.space), *self.space.shape[1:])
        return Condition(label, SpatialCondition(torch.zeros(shape, device=device)))

    def check_condition(self, condition: Condition | Tensor | None, num: int) -> Condition:
        """A condition as the networks take it; labels alone may be given in its place.

        Raises:
            ValueError: for labels of an unconditional model, of the wrong number or out of range; for a condition on
                the grid of a flow without a conditioner, none where there is one, or of another number.
        """
        given = Condition.of(condition)
        self._check_grid(given.grid, num)
        if given.label is None:
            return given
        if self.num_classes is None:
            raise ValueError("labels were given to an unconditional model: train with conditional=true")
        if given.label.shape != (num,):
            raise ValueError(f"expected {num} labels, got shape {tuple(given.label.shape)}")
        check_labels(given.label, self.num_classes)
        return replace(given, label=given.label.long())

    def _check_grid(self, grid: SpatialCondition | None, num: int) -> None:
        if grid is None:
            if self.conditioner is not None:
                name = self.conditioner.name
                raise ValueError(f"this flow is conditioned ({name}): give one Condition(grid=...) per sample")
        elif self.conditioner is None:
            raise ValueError("spatial conditions were given to a flow without a conditioner: leave them out")
        elif len(grid) != num:
            raise ValueError(f"expected {num} spatial conditions, got {len(grid)}")

    @property
    def drops_conditions(self) -> bool:
        """Whether the null condition was trained, so that guidance can go away from it."""
        return self.conditioner is not None and self.conditioner.dropout > 0

    def check_guidance(self, scale: float) -> None:
        """Refuse a sampler guided by labels that the model never learned, or never learned to do without.

        Raises:
            ValueError: for a scale other than 1 of an unconditional model, or one trained without dropped labels.
        """
        # With labels, guidance is by the labels: both branches keep the condition.
        if scale == 1.0 or (self.drops_conditions and self.num_classes is None):
            return
        if self.num_classes is None:
            raise ValueError(f"guidance of scale {scale:g} needs labels: set conditional=true")
        if self.label_dropout == 0.0:
            raise ValueError(f"guidance of scale {scale:g} needs a trained null label: set label_dropout above 0")

    def labels_of_samples(self, setup: Setup) -> Tensor | None:
        """Labels that the samples 0, 1, ... are given, shape (setup.num_samples,); None without labels."""
        return labels_of_samples(self, setup)
