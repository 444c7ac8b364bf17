"""What a latent family's autoencoder costs by itself: the floor under every number of its samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from flowbench.evaluation.drawing import Drawing
from flowbench.evaluation.failures import agreed
from flowbench.evaluation.frechet_metrics import FrechetDistance
from flowbench.evaluation.gather import gather_by_index, shard
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.prospect import Prospect
from flowbench.evaluation.samples import Collector
from flowbench.evaluation.subject import Reconstructions, Subject
from flowbench.families import LatentSpace
from flowbench.metrics import FeatureExtractor, psnr

__all__ = ["Reconstruction", "draw_reconstructions"]


class Reconstruction(FrechetDistance):
    """Distance of reconstructed held-out images, as if they were samples: what a perfect flow on these latents has.

    The images are encoded to a draw from the posterior, the flow's training noise and its denoiser included, and
    decoded. Flows in data space have no such rows.

    Args:
        features: name of the extractor.
        num_samples: how many held-out images, counted from the first; None takes as many as the evaluator draws.
        num_reference: see :class:`~flowbench.evaluation.FrechetDistance`.
    """

    needs = ("reconstructions",)

    def __init__(self, features: str, num_samples: int | None = None, num_reference: int | None = None) -> None:
        super().__init__(features, num_samples, num_reference, sweep=False)

    @property
    def declares(self) -> tuple[MetricInfo, ...]:  # type: ignore[override]
        """`reconstruction_fd[features]` and `reconstruction_psnr`: neither is a quality of the flow."""
        return (
            *(MetricInfo(f"reconstruction_{info.name}") for info in super().declares),
            MetricInfo("reconstruction_psnr"),
        )

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`; flows in data space have none."""
        return self.names if who.is_latent else ()

    def measure(self, subject: Subject) -> list[Measurement]:
        """`reconstruction_fd[features]` (`reconstruction_fid` for Inception) and `reconstruction_psnr`."""
        found = subject.reconstructions
        if found is None:
            return []
        (distance,) = super().measure(replace(subject, samples=found.images))
        held_out = subject.held_out.name if subject.held_out is not None else "held-out"
        noise = Measurement(
            "reconstruction_psnr", float(found.psnr.mean()), len(found.psnr), f"{held_out}/{len(found.psnr)}", "dB"
        )
        return [replace(distance, metric=f"reconstruction_{distance.metric}"), noise]


def draw_reconstructions(
    drawing: Drawing, split: str, extractors: Mapping[str, FeatureExtractor], counts: Mapping[str, int]
) -> Reconstructions:
    """Send held-out images through the autoencoder of a latent flow; a collective.

    Args:
        drawing: whose autoencoder, training noise and denoiser.
        split: the images' split; the first ones of it.
        extractors: feature extractors by name.
        counts: images that each extractor is asked for.
    """
    flow, data = drawing.flow, drawing.data
    assert isinstance(flow.space, LatentSpace), "only latent flows have an autoencoder"
    source = data.split(split)
    num = min(drawing.num_samples, len(source))
    collector = Collector(data.spec, extractors, {name: min(n, num) for name, n in counts.items()}, 0)
    values = [torch.empty(0, dtype=torch.float64)]
    with agreed():
        index = shard(num, drawing.rank, drawing.world_size)
        for chunk in drawing.batches(index):
            x = data.model_values(split, chunk).to(flow.device)
            label = None if flow.num_classes is None or source.label is None else source.label[chunk].to(flow.device)
            x_hat = flow.space.reconstruct(
                x, index=chunk, seed=drawing.seed, denoise=partial(flow.flow_denoise, label=label)
            )
            collector.add(chunk, x_hat)
            values.append(psnr(x, x_hat.clamp(-1.0, 1.0)).cpu())
    return Reconstructions(collector.gathered("reconstructed"), gather_by_index(index, torch.cat(values)))
