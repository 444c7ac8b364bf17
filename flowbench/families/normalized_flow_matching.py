"""Normalized Flow Matching: a normalizing flow's bijection as the coupling of flow matching."""

from __future__ import annotations

from typing import Any

from flowbench.data import DataSpec
from flowbench.families.base import FlowModule, NetworkFactory
from flowbench.families.flow_matching import FlowMatching
from flowbench.families.latents.space import Space
from flowbench.families.pairing.teacher import TeacherPairing, check_teacher, required_teacher, source_of, space_of
from flowbench.flows import Source

__all__ = ["NormalizedFlowMatching"]


class NormalizedFlowMatching(FlowMatching):
    """Flow matching whose every data point starts from the noise that a trained flow maps it to.

    The pairs of a bijection do not cross by chance, so the field has less to average over than under independent pairs.
    :class:`~flowbench.families.pairing.teacher.TeacherPairing` describes how a teacher's training noise is treated.

    A budget in operations counts the teacher's pass in every step, where a cache replaces it too, so that it buys the
    same training with and without; ``flowbench count`` shows the student alone.

    References:
        Berthelot et al. (2026), The Coupling Within: Flow Matching via Distilled Normalizing Flows, arXiv 2603.09014.

    Args:
        spec: the data's shape, classes and value grid.
        network: builds the velocity network.
        teacher: trained, of the same data; an experiment file names it under ``requires``.
        cache_encodings: keep the training split's encodings on disk instead of running the teacher in every step, where
            an encoding is a function of the sample.
        space: where the student lives; None is beside the teacher: its autoencoder's latents, or the data space.
        source: None is the teacher's.
        options: the other axes of :class:`FlowMatching`; `pairing` is what this family chooses.

    Raises:
        ValueError: without a teacher, or with one of another shape, source or number of classes.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import Batch, DataSpec
        >>> from flowbench.networks import MLP
        >>> spec = DataSpec("points", "1", (2,))
        >>> teacher = TARFlow(spec, layers=[1, 1], width=16, head_dim=8).eval()
        >>> flow = NormalizedFlowMatching(spec, partial(MLP, width=16, depth=1), teacher=teacher)
        >>> batch = Batch(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
        >>> flow.training_loss(batch, torch.Generator().manual_seed(0)).total.item()  # this teacher moves nothing yet
        0.0
    """

    def __init__(
        self,
        spec: DataSpec,
        network: NetworkFactory,
        *,
        teacher: FlowModule | None = None,
        cache_encodings: bool = False,
        space: Space | None = None,
        source: Source | None = None,
        **options: Any,
    ) -> None:
        teacher = required_teacher(teacher, "NormalizedFlowMatching", spec)
        super().__init__(
            spec,
            network,
            pairing=TeacherPairing(teacher, cache_encodings),
            space=space or space_of(teacher),
            source=source or source_of(teacher),
            **options,
        )
        check_teacher(self.pairing_context, teacher)
