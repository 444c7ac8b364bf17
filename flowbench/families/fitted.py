"""What of a flow depends on the training data and is not learned: its source, and the latents that its space keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowbench.core.seeds import generator
from flowbench.data import DataSpec, FlowDataModule
from flowbench.families.conditioned import ConditionedModule
from flowbench.families.latents.space import Space
from flowbench.flows import GaussianSource, Source
from flowbench.training.config import TrainingConfig

__all__ = ["FittedModule"]

# Training points that sources and weights are fitted to, and how many are encoded at a time.
FIT_POINTS = 8192
FIT_CHUNK = 512


class FittedModule(ConditionedModule):
    """Where a flow lives and where it starts; the base of :class:`~flowbench.families.FlowModule`.

    Args:
        spec: the data's shape, classes and value grid.
        space: where the flow lives.
        sampling_source: where samples start, in place of the source of the training; None is that source.
        conditional: see :class:`~flowbench.families.conditioned.ConditionedModule`.
        label_dropout: see there.
        training: see :class:`~flowbench.training.TrainingConfig`.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        space: Space,
        sampling_source: Source | None,
        conditional: bool,
        label_dropout: float,
        training: TrainingConfig | None,
    ) -> None:
        super().__init__(spec, conditional=conditional, label_dropout=label_dropout, training=training)
        self.space: Space = space
        self.source: Source = GaussianSource()
        self.sampling_source = sampling_source

    @property
    def flow_shape(self) -> tuple[int, ...]:
        """Shape of one point where the flow lives."""
        return self.space.shape

    def setup(self, stage: str) -> None:
        """Fit to the data what was not fitted yet, and compile."""
        data = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
        if isinstance(data, FlowDataModule):
            self.fit_to(data, training=stage == "fit")
        super().setup(stage)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also take the weights of a flow whose samples started in another source: what was fitted for it is left."""
        prefix = "sampling_source."
        own = {} if self.sampling_source is None else self.sampling_source.state_dict(prefix=prefix)
        weights = checkpoint.get("state_dict", {})
        for name in [name for name in weights if name.startswith(prefix) and name not in own]:
            del weights[name]
        super().on_load_checkpoint(checkpoint)

    def fit_to(self, data: FlowDataModule, *, training: bool) -> None:
        """Set what depends on the training data and is not learned; what is set already stays.

        Every process finds the same: the first points of the training split, and a generator keyed by the seed.

        Args:
            data: the data.
            training: fit what training needs too, and not only what sampling does.
        """
        if self.sampling_source is not None and self.sampling_source.needs_fit:
            self.sampling_source.fit(self.fit_points(data), generator(self.seed, "fit", "sampling"))

    @torch.no_grad()
    def fit_points(self, data: FlowDataModule, num: int = FIT_POINTS, *, drawn: bool = False) -> Tensor:
        """The first of the points that are trained on, where the flow lives, without noise.

        Args:
            data: the data.
            num: points.
            drawn: as training draws them, with noise keyed by the seed, and not their means.

        Returns:
            Points of shape (N, *flow_shape) on the module's device.
        """
        values = data.model_values("train", data.train_places[:num])
        parts = values.split(FIT_CHUNK)
        if not drawn:
            return torch.cat([self.space.encode_mean(part.to(self.device)) for part in parts])
        rows = torch.arange(len(values)).split(FIT_CHUNK)
        return torch.cat(
            [
                self.space.encode_indexed(part.to(self.device), index, self.seed)
                for part, index in zip(parts, rows, strict=True)
            ]
        )

    def fit_labels(self, data: FlowDataModule, num: int = FIT_POINTS) -> Tensor | None:
        """Labels of :meth:`fit_points` as training batches have them, shape (N,), on the CPU; None without classes."""
        if self.num_classes is None:
            return None
        label = data.train_label
        assert label is not None, "a conditional flow has labelled data"
        return label[data.train_places[:num]]

    def on_fit_start(self) -> None:
        """Let the space keep the training split's latents, where it was asked to."""
        self.space.prepare_training(getattr(self.trainer, "datamodule", None), self.device)

    def draw_noise(self, index: Tensor, seed: int) -> Tensor:
        """Source points keyed by sample index, so that all contenders and any number of processes share them.

        Args:
            index: sample indices, shape (B,).
            seed: the evaluation seed.

        Returns:
            Source points of shape (B, *flow_shape) on the module's device.
        """
        source = self.sampling_source or self.source
        return source.sample_indexed(index, self.flow_shape, seed, "sample", device=self.device)
