"""The rows that no contender owns: held-out data, noise, and two classical densities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from flowbench.data import FlowDataModule
from flowbench.evaluation.metrics import Metric
from flowbench.evaluation.subject import Measurement, SampleSet, Subject
from flowbench.metrics import FeatureExtractor
from flowbench.seeds import derive_seed, generator, indexed_normal

__all__ = ["fit_mixture", "reference_subjects", "score"]

# Size and floor of the covariances are chosen on the validation split; full covariances throughout.
MIXTURE_SIZES = (1, 5, 10, 20, 40)
# Added to the diagonal of every covariance, as scikit-learn does, in squared model units.
COVARIANCE_FLOORS = (1e-4, 1e-3, 1e-2)
# More points than this change a mixture of forty components little and cost much.
MIXTURE_POINTS = 10_000


def score(subject: Subject, metrics: Mapping[str, Metric]) -> Iterator[Measurement]:
    """All measurements of a subject; in a sweep, those of the metrics that are swept."""
    for metric in metrics.values():
        if metric.in_sweep or not subject.swept:
            yield from metric.measure(subject)


def reference_subjects(
    data: FlowDataModule,
    extractors: dict[str, FeatureExtractor],
    *,
    num_samples: int,
    reference: str,
    held_out: str,
    seed: int,
) -> Iterator[tuple[str, Subject]]:
    """The reference rows' subjects: `floor`, `noise`, `gaussian`, `gmm`.

    Args:
        data: the data.
        extractors: feature extractors by name.
        num_samples: as many as the contenders draw.
        reference: the split that samples are compared with.
        held_out: the split scored as if generated.
        seed: the evaluation seed.

    Yields:
        Contender name and subject.
    """
    real = SampleSet(data.model_values(reference), data.spec, reference)

    def subject(x: Tensor, log_prob: Tensor | None = None) -> Subject:
        samples = SampleSet(x, data.spec, "generated")
        return Subject(data.spec, samples, real, log_prob=log_prob, dequantize=data.dequantize, extractors=extractors)

    yield "floor", subject(data.model_values(held_out)[:num_samples])
    yield "noise", subject(indexed_normal(range(num_samples), data.spec.shape, seed, "sample"))
    train, test = _flat(data.model_values("train")), _flat(data.model_values("test"))
    for name, sizes in (("gaussian", (1,)), ("gmm", MIXTURE_SIZES)):
        model = fit_mixture(train, _flat(data.model_values("val")), sizes, seed)
        drawn = _draw(model, num_samples, generator(seed, name)).reshape(-1, *data.spec.shape)
        yield name, subject(drawn.float(), torch.from_numpy(model.score_samples(test)))


def _flat(x: Tensor) -> np.ndarray:
    return x.flatten(1).double().numpy()


def fit_mixture(train: np.ndarray, val: np.ndarray, sizes: Sequence[int], seed: int) -> GaussianMixture:
    """The full-covariance mixture with the best validation likelihood.

    Args:
        train: points, shape (N, D); the first 10,000 are used.
        val: validation points, shape (M, D).
        sizes: numbers of components to try; those with fewer than ten points a component are left out.
        seed: keys the initial assignment.

    Returns:
        A fitted scikit-learn mixture.
    """
    train = train[:MIXTURE_POINTS]
    state = derive_seed(seed, "mixture") % 2**31
    candidates = [
        GaussianMixture(size, covariance_type="full", reg_covar=floor, random_state=state).fit(train)
        for size in sizes
        if size == 1 or size <= len(train) // 10
        for floor in COVARIANCE_FLOORS
    ]
    return max(candidates, key=lambda model: model.score(val))


def _draw(model: GaussianMixture, num: int, rng: torch.Generator) -> Tensor:
    """Samples by a torch generator: scikit-learn's own sampler groups them by component."""
    weights, means = torch.from_numpy(model.weights_), torch.from_numpy(model.means_)
    factors = torch.linalg.cholesky(torch.from_numpy(model.covariances_))
    component = torch.multinomial(weights, num, replacement=True, generator=rng)
    noise = torch.randn(num, means.shape[1], generator=rng, dtype=means.dtype)
    return means[component] + torch.einsum("nij,nj->ni", factors[component], noise)
