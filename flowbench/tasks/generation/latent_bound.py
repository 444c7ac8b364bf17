"""The two terms that bound how far samples of a latent flow are from the data."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.data import Batch
from flowbench.data.split_dataset import indexed_uniform
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.failures import agreed
from flowbench.evaluation.gather import gather_by_index
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.probe import Probe, Setup
from flowbench.evaluation.prospect import Prospect
from flowbench.families import FlowMatching, FlowModule, LatentSpace
from flowbench.flows import UniformWeight
from flowbench.tasks.generation.held_out import held_out_batches, is_latent

__all__ = ["BoundTerms", "LatentBound", "LatentBoundTerms", "held_out_loss"]


@dataclass(frozen=True)
class BoundTerms:
    """Of held-out images.

    Attributes:
        reconstruction: |x - decode(encode(x))|^2 summed over dimensions, squared model units, shape (N,).
        flow_loss: the mean over times of |u - v|^2 summed over latent dimensions, squared scaled latent units, shape
            (N,); None where the flow's training is no regression on independent, equally weighted pairs.
        split: the images' split.
        latent: shape of the latents, for the protocol.
        given: what the velocity depends on, for the protocol: `label`, the conditioner's name, both, or nothing.
    """

    reconstruction: Tensor
    flow_loss: Tensor | None
    split: str
    latent: str
    given: str = ""


@dataclass(frozen=True)
class LatentBoundTerms(Probe[BoundTerms]):
    """Both terms on the first held-out images, keyed by their index.

    Attributes:
        num_times: times per image.
        num_samples: how many images; None takes as many as the evaluator draws samples.
    """

    num_times: int
    num_samples: int | None = None
    stage = "bound terms"

    def key(self) -> Hashable:
        """Other numbers of times have other answers."""
        return LatentBoundTerms, self.num_times

    def merge(self, other: LatentBoundTerms) -> LatentBoundTerms:
        """The larger number of images."""
        both = (self.num_samples, other.num_samples)
        return replace(self, num_samples=None if None in both else max(filter(None, both)))

    def ask(self, setup: Setup) -> BoundTerms | None:
        """Image by image of the held-out split; a collective."""
        flow, split = setup.module, setup.held_out.name
        if not isinstance(flow, FlowModule) or not isinstance(flow.space, LatentSpace):
            return None
        num = min(self.num_samples or setup.num_samples, len(setup.held_out))
        reconstruction, losses = [torch.empty(0, dtype=torch.float64)], [torch.empty(0, dtype=torch.float64)]
        known = True
        with agreed():
            for batch in held_out_batches(flow, setup, num):
                difference = (batch.x - flow.space.reconstruct(batch.x)).double()
                reconstruction.append(difference.square().flatten(1).sum(1).cpu())
                loss = held_out_loss(flow, batch, setup.seed, self.num_times)
                known = known and loss is not None
                if loss is not None:
                    losses.append(loss.double().cpu())
        index = setup.shard(num)
        return BoundTerms(
            gather_by_index(index, torch.cat(reconstruction)),
            gather_by_index(index, torch.cat(losses)) if known else None,
            split,
            "x".join(str(size) for size in flow.flow_shape),
            _given(flow),
        )


class LatentBound(Metric):
    """The two terms of the bound on W2 between the data and the samples of a latent flow.

    W2(data, samples) <= sqrt(E |x - D(E(x))|^2) + L_D W2(latents, sampled latents), by the triangle inequality and the
    decoder's Lipschitz constant L_D, and W2^2 between the latents is at most a constant exp(1 + 2 L) times the flow's
    excess loss, E int |v* - v|^2 dt (Dao et al., 2023, arXiv 2307.08698; Benton et al., 2024, arXiv 2305.16860). The
    constant makes the bound vacuous; the terms tell which part is the autoencoder's and which the flow's. They are in
    different units, and do not add up.

    The excess loss is not known: the loss against sampled velocities u also has their variance given the point on the
    path, which no network removes. `w2_bound_flow_loss` is the whole of it, hence an upper bound of the term, whose
    differences between flows on one autoencoder with one path and one condition, which the protocol names, are those
    of the term up to Monte-Carlo error.

    Args:
        num_samples: how many held-out images, >= 1, counted from the first; None takes as many as the evaluator draws.
        num_times: times per image, >= 1, one in each of as many equal parts of the path.

    Raises:
        ValueError: for a number below 1.
    """

    declares = (MetricInfo("w2_bound_reconstruction"), MetricInfo("w2_bound_flow_loss", always=False))

    def __init__(self, num_samples: int | None = None, num_times: int = 8) -> None:
        check_count("num_samples", num_samples, or_none=True)
        check_count("num_times", num_times)
        self._num_samples, self.num_times = num_samples, num_times

    def probes(self) -> tuple[Probe[Any], ...]:
        """The two terms."""
        return (LatentBoundTerms(self.num_times, self._num_samples),)

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`; flows in data space have none."""
        if not isinstance(who.module, FlowModule) or not is_latent(who):
            return ()
        return (*self.names, "w2_bound_flow_loss") if regresses_velocities(who.module) else self.names

    def measure(self, answers: Answers) -> list[Measurement]:
        """`w2_bound_reconstruction` and `w2_bound_flow_loss`; flows in data space have neither."""
        terms = answers[LatentBoundTerms(self.num_times)]
        if terms is None:
            return []
        n = min(self._num_samples or answers.num_samples, len(terms.reconstruction))
        protocol, value = f"{terms.split}/{n}", float(terms.reconstruction[:n].mean())
        unit = f"squared {answers.spec.unit_name} units"
        rows = [Measurement("w2_bound_reconstruction", value, n, f"{protocol}/posterior mean", unit)]
        if terms.flow_loss is not None:
            described = f"latent {terms.latent}/{protocol}/{self.num_times}-times/variance of the target included"
            described += f"/given {terms.given}" if terms.given else ""
            value = float(terms.flow_loss[:n].mean())
            rows.append(Measurement("w2_bound_flow_loss", value, n, described, "squared latent units"))
        return rows


def regresses_velocities(flow: FlowModule) -> TypeGuard[FlowMatching]:
    """Whether a flow was trained by regression on independent, equally weighted pairs that one index can key."""
    if not isinstance(flow, FlowMatching) or not flow.pairing.is_independent:
        return False
    return isinstance(flow.weight, UniformWeight) and not flow.path.needs_generator


@torch.no_grad()
def held_out_loss(flow: FlowModule, batch: Batch, seed: int, num_times: int = 8) -> Tensor | None:
    """Squared error of a velocity network at held-out data, unweighted and keyed by the sample's index.

    Args:
        flow: any; its own draws of latents, source points and times.
        batch: numbered data in model space, with its labels and conditions.
        seed: the evaluation seed.
        num_times: times per sample, one in each of as many equal parts of the path.

    Returns:
        The mean over times, summed over the flow's dimensions, shape (B,). None for flows that regress no velocity,
        and where pairs are coupled, weighted, or joined by noise: those cannot be keyed by one index, and a loss on
        other pairs is not theirs.
    """
    if not regresses_velocities(flow):
        return None
    index, condition = batch.index, flow.held_out_condition(batch, seed)
    assert index is not None, "the images are numbered"
    z = flow.space.encode_indexed(batch.x, index, seed)
    uniform = indexed_uniform(index.cpu(), (num_times,), seed, "held-out-time").to(z)
    first, last = flow.path.interval
    velocity = flow.objective.field(flow.network)
    total = z.new_zeros(len(z))
    with flow.full_precision():
        for part in range(num_times):
            noise = flow.source.sample_indexed(index, flow.flow_shape, seed, "held-out", part, device=z.device)
            t = first + (last - first) * (part + uniform[:, part]) / num_times
            pair = flow.path.sample(noise.to(z), z, t)
            total += (velocity(pair.xt, t, *condition.arguments) - pair.velocity).square().flatten(1).sum(1)
    return total / num_times


def _given(flow: FlowModule) -> str:
    parts = [] if flow.num_classes is None else ["label"]
    return " and ".join(parts if flow.conditioner is None else [*parts, flow.conditioner.name])
