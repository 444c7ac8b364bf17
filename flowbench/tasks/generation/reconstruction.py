"""What a latent family's autoencoder costs by itself: the floor under every number of its samples."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowbench.evaluation.answers import Answers
from flowbench.evaluation.failures import agreed
from flowbench.evaluation.frechet_metrics import FrechetDistance
from flowbench.evaluation.gather import gather_by_index
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.probe import Probe, Setup
from flowbench.evaluation.prospect import Prospect
from flowbench.evaluation.samples import Collector, GeneratedSet
from flowbench.evaluation.sampling import Generated, Samples
from flowbench.families import FlowModule, LatentSpace
from flowbench.metrics import psnr
from flowbench.tasks.generation.held_out import held_out_batches, is_latent

__all__ = ["ReconstructedImages", "Reconstruction", "Reconstructions"]


@dataclass(frozen=True)
class ReconstructedImages:
    """Held-out images that went through an autoencoder.

    Attributes:
        images: what came out.
        psnr: of every image against its original, decibels, shape (N,).
        split: the images' split.
    """

    images: GeneratedSet
    psnr: Tensor
    split: str


@dataclass(frozen=True)
class Reconstructions(Probe[ReconstructedImages]):
    """The first held-out images through the autoencoder of a latent flow, its training noise and its denoiser.

    Attributes:
        samples: features to extract of them.
    """

    samples: Samples = field(default_factory=Samples)
    stage = "reconstructions"

    @property
    def extractors(self) -> frozenset[str]:
        """See :attr:`Probe.extractors`."""
        return self.samples.extractors

    def merge(self, other: Reconstructions) -> Reconstructions:
        """The features of both."""
        return Reconstructions(self.samples.merge(other.samples))

    def ask(self, setup: Setup) -> ReconstructedImages | None:
        """Image by image of the held-out split; a collective."""
        flow, split = setup.module, setup.held_out.name
        if not isinstance(flow, FlowModule) or not isinstance(flow.space, LatentSpace):
            return None
        num = min(setup.num_samples, len(setup.held_out))
        values = [torch.empty(0, dtype=torch.float64)]
        with agreed():
            counts = self.samples.counts(num)
            networks = {name: setup.extractors[name] for name in counts}
            collector = Collector(setup.data.spec, networks, counts, 0)
            for batch in held_out_batches(flow, setup, num):
                assert batch.index is not None, "held-out images are numbered"
                denoise = partial(flow.flow_denoise, condition=flow.held_out_condition(batch, setup.seed))
                x_hat = flow.space.reconstruct(batch.x, index=batch.index, seed=setup.seed, denoise=denoise)
                collector.add(batch.index, x_hat)
                values.append(psnr(batch.x, x_hat.clamp(-1.0, 1.0)).cpu())
        images = collector.gathered("reconstructed")
        return ReconstructedImages(images, gather_by_index(setup.shard(num), torch.cat(values)), split)


class Reconstruction(FrechetDistance):
    """Distance of reconstructed held-out images, as if they were samples: what a perfect flow on these latents has.

    The images are encoded to a draw from the posterior, the flow's training noise and its denoiser included, and
    decoded. Flows in data space have no such rows.

    Args:
        features: name of the extractor.
        num_samples: how many held-out images the distance looks at, counted from the first; None takes as many as the
            evaluator draws, as `reconstruction_psnr` does.
        num_reference: see :class:`~flowbench.evaluation.FrechetDistance`.
    """

    def __init__(self, features: str, num_samples: int | None = None, num_reference: int | None = None) -> None:
        super().__init__(features, num_samples, num_reference, sweep=False)

    def probes(self) -> tuple[Probe[Any], ...]:
        """Reconstructions with their features."""
        return (Reconstructions(Samples.with_features(self.features, self._num_samples)),)

    @property
    def declares(self) -> tuple[MetricInfo, ...]:  # type: ignore[override]
        """`reconstruction_fd[features]` and `reconstruction_psnr`: neither is a quality of the flow."""
        return (
            *(MetricInfo(f"reconstruction_{info.name}") for info in super().declares),
            MetricInfo("reconstruction_psnr"),
        )

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`; flows in data space have none."""
        return self.names if is_latent(who) else ()

    def measure(self, answers: Answers) -> list[Measurement]:
        """`reconstruction_fd[features]` (`reconstruction_fid` for Inception) and `reconstruction_psnr`."""
        found = answers[Reconstructions()]
        if found is None:
            return []
        (distance,) = super().measure(answers.replaced(Samples(), Generated(found.images)))
        n = len(found.psnr)
        noise = Measurement("reconstruction_psnr", float(found.psnr.mean()), n, f"{found.split}/{n}", "dB")
        return [replace(distance, metric=f"reconstruction_{distance.metric}"), noise]
