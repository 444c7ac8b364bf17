"""ARFlow: flow matching on sequences of images, with a network that looks at the noisier ones before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.data import Batch, DataSpec, FlowDataModule
from flowbench.families.answers import Trajectory
from flowbench.families.base import DensityKind, NetworkFactory
from flowbench.families.conditioning.condition import Condition
from flowbench.families.description import Description
from flowbench.families.flow_matching import FlowMatching
from flowbench.families.network_evaluations import CountedNetwork, fixed_cost
from flowbench.families.recurrent_field import RecurrentField, RecurrentNetwork
from flowbench.flows import ClassifierFreeGuidance, Field, Guidance, TimeDistribution
from flowbench.networks import HybridDiT

__all__ = ["ARFlow", "AscendingTimes"]

State = Literal["keep", "drop"]

_REFUSAL = (
    "samples that see their earlier steps have no {}, they solve no differential equation: set state: drop for that of "
    "the field without them, or take out what needs it"
)


class AscendingTimes(TimeDistribution):
    """Times that rise along each sequence: the noisier images come first. Of all images they are those of `times`.

    Args:
        times: distribution of the times of one image.
        group_size: images of a sequence, >= 1.

    Example:
        >>> from flowbench.flows import UniformTimes
        >>> t = AscendingTimes(UniformTimes(), group_size=3).sample(6, torch.Generator().manual_seed(0)).view(2, 3)
        >>> bool((t.diff(dim=1) >= 0).all())
        True
    """

    def __init__(self, times: TimeDistribution, group_size: int) -> None:
        check_count("group_size", group_size)
        self.times = times
        self.group_size = group_size

    def sample(self, num: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
        """Draw ``num`` times, a multiple of the group size, and sort those of each sequence."""
        drawn = self.times.sample(num, generator, device)
        return drawn.view(-1, self.group_size).sort(1).values.flatten()

    def density(self, t: Tensor) -> Tensor:
        """That of one image, drawn from all of a sequence."""
        return self.times.density(t)

    @property
    def trains_field(self) -> bool:
        """As of one image."""
        return self.times.trains_field


class ARFlow(FlowMatching):
    """Autoregressive flow: flow matching whose velocity depends on noisier images of the same class before it.

    Training takes batches of sequences (``data.group_size``): images of one class with noise of their own at rising
    times, one label for all, dropped or kept together. At sampling the steps of a solve take the place of the sequence:
    each is given the noisier states of *its own* path, which training never saw (their noise is not independent), and
    more of them than a sequence had; `window` limits them to as many. So the sampler is no longer the solution of a
    differential equation: where the state is kept there is no inverse, no density by change of variables, and no limit
    of many steps; `encode` and `log_prob` are refused. With ``state: drop`` every step is an image without
    predecessors, whose field is one as any other, with all that follows.

    Operations of one sample are those of an image alone: what attention across images costs depends on the data's
    ``group_size``, which a model does not know, and is counted where operations are counted on a batch of the data.

    References:
        Hui et al. (2025), ARFlow: Autoregressive Flow with Hybrid Linear Attention, arXiv 2501.16085, section 3.

    Args:
        spec: the data's shape, classes and value grid: images.
        network: builds a :class:`~flowbench.networks.HybridDiT`.
        state: "keep" lets a sample's steps see those before, which needs a network that attends across images; "drop"
            does not. A choice of the sampler: the training is the same.
        window: steps that are seen, the last ones, >= 1; None is all. Only where the state is kept.
        options: the other axes of :class:`FlowMatching`, but `pairing` and `conditioner`, which know no sequences.

    Raises:
        ValueError: when two choices exclude each other.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import Batch, DataSpec
        >>> from flowbench.networks import HybridDiT
        >>> spec = DataSpec("images", "1", (1, 4, 4), num_classes=3)
        >>> flow = ARFlow(spec, partial(HybridDiT, width=16, depth=1, num_heads=2), conditional=True)
        >>> batch = Batch(torch.zeros(6, 1, 4, 4), label=torch.tensor([2, 2, 2, 0, 0, 0]), group_size=3)
        >>> flow.training_loss(batch, torch.Generator().manual_seed(0)).total.shape
        torch.Size([])
        >>> flow.sample(flow.draw_noise(torch.arange(2), seed=0), torch.tensor([2, 0])).network_evaluations
        40.0
    """

    network: HybridDiT
    sampling_arguments = FlowMatching.sampling_arguments | {"state", "window"}

    def __init__(
        self,
        spec: DataSpec,
        network: NetworkFactory,
        *,
        state: State = "keep",
        window: int | None = None,
        **options: Any,
    ) -> None:
        if state not in get_args(State):
            raise ValueError(f"state must be keep or drop, got {state!r}")
        check_count("window", window, or_none=True, hint="null sees all steps")
        if window is not None and state == "drop":
            raise ValueError(f"window={window} belongs to state: keep, got state: drop: set window to null")
        for name in ("pairing", "conditioner"):
            if options.get(name) is not None:
                raise ValueError(f"{name} does not keep images in sequences, got {options[name]!r}: leave it out")
        self.state, self.window = state, window  # before the base class asks what density there is
        super().__init__(spec, network, **options)

    @property
    def density(self) -> DensityKind:
        """``none`` where the state is kept: samples then solve no differential equation."""
        return "none" if self.state == "keep" else super().density

    def check_axes(self) -> None:
        """Also refuse a state that the network or the sampler cannot have."""
        super().check_axes()
        across = getattr(self.network, "across", None)
        if across is None:
            raise ValueError(f"ARFlow needs a network of sequences, got {type(self.network).__name__}: take HybridDiT")
        if self.state == "drop":
            return
        if across == "none":
            raise ValueError("state: keep needs a network that attends across images: set state: drop, or its across")
        if self.sampling_path is not None:
            raise ValueError(f"state: keep samples along the path of the training, got {self.sampling_path!r}")
        if fixed_cost(self.solver) is None:
            raise ValueError(f"state: keep needs steps of a fixed number, got {self.solver!r}: take Euler, say")

    def check_training(self, data: FlowDataModule, trainer: L.Trainer | None = None) -> None:
        """Also refuse to train attention across images without sequences."""
        super().check_training(data, trainer)
        if self.network.across != "none" and data.group_size == 1:
            raise ValueError(
                f"attention across images ({self.network.across}) needs sequences, and data.group_size is 1: set it to "
                "2 or more, or the network's across: none"
            )

    def describe(self) -> Description:
        """Also names the state, on which samples depend: their paths have the velocities of the steps."""
        facts = super().describe()
        if self.state == "drop":
            return facts
        kept = "state" if self.window is None else f"state[window={self.window}]"
        return replace(facts, has_velocities=self.times.trains_field, sampler=f"{facts.sampler}+{kept}")

    # ---- training -------------------------------------------------------------------------------------

    def training_condition(self, batch: Batch, generator: torch.Generator) -> Condition:
        """The label of each sequence, dropped for all of its images or for none."""
        label = None if batch.label is None else batch.label[:: batch.group_size]
        kept = self.drop_labels(label, generator)
        return Condition(None if kept is None else kept.repeat_interleave(batch.group_size))

    def training_network(self, batch: Batch) -> Callable[..., Tensor]:
        """The network on the sequences of the batch."""
        return partial(self.network, group_size=batch.group_size)

    def training_times(self, batch: Batch) -> TimeDistribution:
        """Times that rise along each sequence."""
        return AscendingTimes(self.times, batch.group_size)

    # ---- sampling -------------------------------------------------------------------------------------

    def _sampling_field(self, guide: Guidance, condition: Condition) -> tuple[Field, CountedNetwork]:
        """Where the state is kept, each step sees those before."""
        return super()._sampling_field(guide, condition) if self.state == "drop" else self._recurrent(guide, condition)

    def recurrent_field(self, condition: Condition, guide: Guidance, keeps_path: bool = False) -> RecurrentField:
        """A field of one generation, its memory empty.

        Args:
            condition: of the samples.
            guide: guidance; each of its branches has a memory.
            keeps_path: keep the starts of the steps.
        """
        return self._recurrent(guide, condition, keeps_path)[0]

    def _recurrent(
        self, guide: Guidance, condition: Condition, keeps_path: bool = False
    ) -> tuple[RecurrentField, CountedNetwork]:
        network = RecurrentNetwork(self.network, self.window)
        counted = CountedNetwork(network)
        return RecurrentField(self._field(guide, condition, counted), network, keeps_path), counted

    @torch.no_grad()
    def trajectory(
        self, noise: Tensor, condition: Condition | Tensor | None = None, num_points: int = 33
    ) -> Trajectory:
        """Where the state is kept, the steps of the sampler itself without guidance: with others it ends elsewhere.

        Else states at ``num_points`` equal times, as of any continuous flow.
        """
        if self.state == "drop":
            return super().trajectory(noise, condition, num_points)
        guide = ClassifierFreeGuidance()
        solver, times = self._sampler(guide, False, None, None)
        field = self.recurrent_field(self.check_condition(condition, len(noise)), guide, keeps_path=True)
        last = solver.solve(field, noise, times).states[-1]
        starts, states, velocities = zip(*field.path, strict=True)
        end = field(times[-1].to(last), last)
        at = torch.tensor([*starts, float(times[-1])], dtype=torch.float64)
        return Trajectory(torch.stack([*states, last]), at, torch.stack([*velocities, end]))

    # ---- what only a field without memory has ---------------------------------------------------------

    def flow_encode(self, z: Tensor, condition: Condition) -> Tensor:
        """See :meth:`FlowMatching.flow_encode`; refused where the state is kept, whose steps have no inverse."""
        if self.state == "keep":
            raise ValueError(_REFUSAL.format("inverse"))
        return super().flow_encode(z, condition)

    def _check_has_density(self) -> None:
        if self.state == "keep":
            raise ValueError(_REFUSAL.format("density"))
        super()._check_has_density()
