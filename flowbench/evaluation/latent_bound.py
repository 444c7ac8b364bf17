"""The two terms that bound how far samples of a latent flow are from the data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.data.split_dataset import indexed_uniform
from flowbench.evaluation.drawing import Drawing
from flowbench.evaluation.failures import agreed
from flowbench.evaluation.gather import gather_by_index, shard
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.prospect import Prospect
from flowbench.evaluation.subject import BoundTerms, Subject
from flowbench.families import FlowMatching, FlowModule, LatentSpace, SpatialCondition
from flowbench.flows import UniformWeight

__all__ = ["LatentBound", "draw_bound_terms", "held_out_loss", "measured_bound"]


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
    needs = ("bound_terms",)

    def __init__(self, num_samples: int | None = None, num_times: int = 8) -> None:
        check_count("num_samples", num_samples, or_none=True)
        check_count("num_times", num_times)
        self._num_samples, self.num_times = num_samples, num_times

    @property
    def num_samples(self) -> int | None:
        """How many images it looks at."""
        return self._num_samples

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`; flows in data space have none."""
        if who.flow is None or not who.is_latent:
            return ()
        return (*self.names, "w2_bound_flow_loss") if regresses_velocities(who.flow) else self.names

    def measure(self, subject: Subject) -> list[Measurement]:
        """`w2_bound_reconstruction` and `w2_bound_flow_loss`; flows in data space have neither."""
        terms = subject.bound_terms
        if terms is None:
            return []
        n, protocol = len(terms.reconstruction), f"{terms.split}/{len(terms.reconstruction)}"
        rows = [
            Measurement(
                "w2_bound_reconstruction",
                float(terms.reconstruction.mean()),
                n,
                f"{protocol}/posterior mean",
                f"squared {subject.spec.unit_name} units",
            )
        ]
        if terms.flow_loss is not None:
            described = f"latent {terms.latent}/{protocol}/{terms.num_times}-times/variance of the target included"
            described += f"/given {terms.given}" if terms.given else ""
            value = float(terms.flow_loss.mean())
            rows.append(Measurement("w2_bound_flow_loss", value, n, described, "squared latent units"))
        return rows


def regresses_velocities(flow: FlowModule) -> TypeGuard[FlowMatching]:
    """Whether a flow was trained by regression on independent, equally weighted pairs that one index can key."""
    if not isinstance(flow, FlowMatching) or not flow.pairing.is_independent:
        return False
    return isinstance(flow.weight, UniformWeight) and not flow.path.needs_generator


@torch.no_grad()
def held_out_loss(
    flow: FlowModule,
    x: Tensor,
    label: Tensor | None,
    index: Tensor,
    seed: int,
    num_times: int = 8,
    spatial: SpatialCondition | None = None,
) -> Tensor | None:
    """Squared error of a velocity network at held-out data, unweighted and keyed by the sample's index.

    Args:
        flow: any; its own draws of latents, source points and times.
        x: data in model space, shape (B, *D).
        label: labels, shape (B,), or None.
        index: sample indices, shape (B,).
        seed: the evaluation seed.
        num_times: times per sample, one in each of as many equal parts of the path.
        spatial: conditions that the flow's conditioner made; None where it has none.

    Returns:
        The mean over times, summed over the flow's dimensions, shape (B,). None for flows that regress no velocity,
        and where pairs are coupled, weighted, or joined by noise: those cannot be keyed by one index, and a loss on
        other pairs is not theirs.
    """
    if not regresses_velocities(flow):
        return None
    flow.check_spatial(spatial, len(x))
    z = flow.space.encode_indexed(x, index, seed)
    uniform = indexed_uniform(index.cpu(), (num_times,), seed, "held-out-time").to(z)
    given = () if spatial is None else (spatial.values,)
    first, last = flow.path.interval
    total = z.new_zeros(len(z))
    with flow.full_precision():
        for part in range(num_times):
            noise = flow.source.sample_indexed(index, flow.flow_shape, seed, "held-out", part, device=z.device)
            t = first + (last - first) * (part + uniform[:, part]) / num_times
            pair = flow.path.sample(noise.to(z), z, t)
            total += (flow.network(pair.xt, t, label, *given) - pair.velocity).square().flatten(1).sum(1)
    return total / num_times


def measured_bound(drawing: Drawing, split: str, metrics: Iterable[Metric]) -> BoundTerms | None:
    """:func:`draw_bound_terms` where a metric asks for it and the flow has an autoencoder; else None."""
    wanted = [metric for metric in metrics if isinstance(metric, LatentBound)]
    if not wanted or not isinstance(drawing.flow.space, LatentSpace):
        return None
    num = max(metric.num_samples or drawing.num_samples for metric in wanted)
    return draw_bound_terms(drawing, split, num, wanted[0].num_times)


def draw_bound_terms(drawing: Drawing, split: str, num: int, num_times: int) -> BoundTerms:
    """Both terms on held-out images, keyed by their index; a collective.

    Args:
        drawing: whose flow, which has an autoencoder.
        split: the images' split; the first ones of it.
        num: how many.
        num_times: times per image.
    """
    flow, data = drawing.flow, drawing.data
    assert isinstance(flow.space, LatentSpace), "only latent flows have an autoencoder"
    source = data.split(split)
    num = min(num, len(source))
    reconstruction, losses = [torch.empty(0, dtype=torch.float64)], [torch.empty(0, dtype=torch.float64)]
    known = True
    with agreed():
        index = shard(num, drawing.rank, drawing.world_size)
        for chunk in drawing.batches(index):
            x = data.model_values(split, chunk).to(flow.device)
            label = None if flow.num_classes is None or source.label is None else source.label[chunk].to(flow.device)
            difference = (x - flow.space.reconstruct(x)).double()
            reconstruction.append(difference.square().flatten(1).sum(1).cpu())
            condition = None
            if flow.conditioner is not None:
                condition = flow.conditioner.held_out_condition(
                    x, data.conditions(split, chunk), chunk, drawing.seed, flow.space
                )
            loss = held_out_loss(flow, x, label, chunk, drawing.seed, num_times, condition)
            known = known and loss is not None
            if loss is not None:
                losses.append(loss.double().cpu())
    return BoundTerms(
        gather_by_index(index, torch.cat(reconstruction)),
        gather_by_index(index, torch.cat(losses)) if known else None,
        num_times,
        split,
        "x".join(str(size) for size in flow.flow_shape),
        _given(flow),
    )


def _given(flow: FlowModule) -> str:
    parts = [] if flow.num_classes is None else ["label"]
    return " and ".join(parts if flow.conditioner is None else [*parts, flow.conditioner.name])
