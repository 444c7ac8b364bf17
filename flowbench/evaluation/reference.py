"""The rows that no contender owns: held-out data, noise, and two classical densities."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from flowbench.core.checks import check_counts, check_seed
from flowbench.core.contract import returned
from flowbench.core.remarks import say_once
from flowbench.core.seeds import derive_seed, generator, indexed_normal
from flowbench.data import FlowDataModule
from flowbench.evaluation.failures import Failure, Failures
from flowbench.evaluation.measurement import Measurement, unmeasured
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.samples import CHUNK, Collector, RealSet, SampleSet, UndrawnSet
from flowbench.evaluation.subject import Subject
from flowbench.metrics import FeatureExtractor

__all__ = ["REFERENCE_NAMES", "fit_mixture", "reference_subjects", "score"]

REFERENCE_NAMES = ("floor", "noise", "gaussian", "gmm")
"""The reference rows, in the order in which they are made."""

# Size and floor of the covariances are chosen on the validation split; full covariances throughout.
MIXTURE_SIZES = (1, 5, 10, 20, 40)
# Added to the diagonal of every covariance, as scikit-learn does, in squared model units.
COVARIANCE_FLOORS = (1e-4, 1e-3, 1e-2)
# More points than this change a mixture of forty components little and cost much.
MIXTURE_POINTS = 10_000
# Multiplications of one step of expectation maximisation: above the first, the floor is chosen with one component
# instead of with each size; above the second, a size is left out. Images of 28x28 try five components, of 32x32x3 one.
MIXTURE_GRID_WORK, MIXTURE_WORK = 1e9, 4e10
# Above it, 64x64 pixels in colour, a covariance takes gigabytes several times over, and its root many minutes.
MOST_DIMENSIONS = 12_288


def score(
    subject: Subject,
    metrics: Mapping[str, Metric],
    failures: Failures,
    begin: Callable[[str], None] = lambda name: None,
) -> Iterator[Measurement]:
    """All measurements of a subject; in a sweep, those of the metrics that are swept.

    One that cannot be made says why, and costs no other.

    Args:
        subject: who is measured.
        metrics: by name.
        failures: keeps the mistakes of the code among the failures.
        begin: is told the name of each metric before it is computed.
    """
    for name, metric in metrics.items():
        begin(name)
        if metric.in_sweep or not subject.swept:
            yield from _measured(name, metric, subject, failures)


def _measured(name: str, metric: Metric, subject: Subject, failures: Failures) -> list[Measurement]:
    names, reason = metric.names or (name,), subject.reason(metric.needs)
    found = failures.compute(lambda: _checked(metric, metric.measure(subject))) if not reason else Failure(reason)
    measured = unmeasured(names, found.reason) if isinstance(found, Failure) else found
    infos = [metric.info(m.metric) for m in measured]
    return [replace(m, goal=info.goal, group=info.group) for m, info in zip(measured, infos, strict=True)]


def _checked(metric: Metric, found: list[Measurement]) -> list[Measurement]:
    return [returned(item, Measurement, metric, "measure") for item in returned(found, list, metric, "measure")]


def reference_subjects(
    data: FlowDataModule,
    extractors: dict[str, FeatureExtractor],
    counts: Mapping[str, int],
    failures: Failures,
    *,
    num_samples: int,
    reference: RealSet,
    held_out: RealSet,
    seed: int,
    num_shown: int = 64,
    num_likelihood: int | None = None,
    begin: Callable[[str], None] = lambda name: None,
) -> Iterator[tuple[str, Subject]]:
    """The reference rows' subjects: `floor`, `noise`, `gaussian`, `gmm`.

    The last two are left out, and a line says so, for data of more dimensions than their covariance has room for.

    Args:
        data: the data.
        extractors: feature extractors by name.
        counts: samples that each extractor is asked for.
        failures: keeps the mistakes of the code, where a subject cannot be made.
        num_samples: as many as the contenders draw.
        reference: what samples are compared with.
        held_out: real data scored as if generated.
        seed: the evaluation seed.
        num_shown: samples to keep for pictures.
        num_likelihood: test samples whose likelihood is measured; None takes all.
        begin: is told each name before its subject is made.

    Yields:
        Contender name and subject.
    """
    make = _Subjects(
        data, extractors, counts, num_samples, reference, held_out, seed, num_shown, num_likelihood
    )  # fmt: skip
    makers: dict[str, Callable[[], Subject]] = {
        "floor": make.floor,
        "noise": make.noise,
        "gaussian": lambda: make.mixture("gaussian", (1,)),
        "gmm": lambda: make.mixture("gmm", MIXTURE_SIZES),
    }
    for name, maker in makers.items():
        if name == "gaussian" and data.spec.num_dims > MOST_DIMENSIONS:
            size = f"{data.spec.num_dims:,} dimensions takes {8 * data.spec.num_dims**2 / 2**30:,.0f} GiB"
            left_out = f"gaussian, gmm: left out, because a covariance of {size}"
            say_once(f"{left_out}; smaller images have these rows (data.image_size)")
            return
        begin(name)
        found = failures.compute(maker)
        yield name, make.undrawn(found.reason) if isinstance(found, Failure) else found


@dataclass(frozen=True)
class _Subjects:
    """Makes the subjects of the reference rows; see :func:`reference_subjects`."""

    data: FlowDataModule
    extractors: dict[str, FeatureExtractor]
    counts: Mapping[str, int]
    num_samples: int
    reference: RealSet
    held_out: RealSet
    seed: int
    num_shown: int
    num_likelihood: int | None
    _fitted: dict[tuple[int, ...], GaussianMixture] = field(default_factory=dict)

    def floor(self) -> Subject:
        return self._subject(RealSet(self.data, self.held_out.name, self.num_samples))

    def noise(self) -> Subject:
        return self._subject(
            self._drawn(lambda index: indexed_normal(index, self.data.spec.shape, self.seed, "sample"))
        )

    def mixture(self, name: str, sizes: Sequence[int]) -> Subject:
        """Large images can afford a single component: their mixture is the Gaussian, which is fitted once."""
        train, val = (self._points(split, MIXTURE_POINTS) for split in ("train", "val"))
        affordable = _affordable(sizes, train)
        if affordable not in self._fitted:
            self._fitted[affordable] = fit_mixture(train, val, affordable, self.seed)
        model = self._fitted[affordable]
        sampler = _Sampler(model, self.num_samples, generator(self.seed, name))
        samples = self._drawn(lambda index: sampler.draw(index).reshape(-1, *self.data.spec.shape).float())
        test = self._points("test", self.num_likelihood)
        return self._subject(samples, torch.from_numpy(model.score_samples(test)))

    def undrawn(self, reason: str) -> Subject:
        """Of a row that cannot be made."""
        found = self._subject(UndrawnSet(self.data.spec, "generated", self.num_samples))
        found.missing |= {"samples": reason, "log_prob": reason}
        return found

    def _subject(self, samples: SampleSet, log_prob: Tensor | None = None) -> Subject:
        return Subject(
            self.data.spec, samples, self.reference, log_prob=log_prob, dequantize=self.data.dequantize,
            extractors=self.extractors, held_out=self.held_out,
        )  # fmt: skip

    def _drawn(self, draw: Callable[[Tensor], Tensor]) -> SampleSet:
        collector = Collector(self.data.spec, self.extractors, self.counts, self.num_shown)
        for index in torch.arange(self.num_samples).split(CHUNK):
            collector.add(index, draw(index))
        return collector.gathered("generated")

    def _points(self, split: str, most: int | None) -> np.ndarray:
        return self.data.model_values(split, slice(most)).flatten(1).double().numpy()


def fit_mixture(train: np.ndarray, val: np.ndarray, sizes: Sequence[int], seed: int) -> GaussianMixture:
    """The full-covariance mixture with the best validation likelihood.

    Args:
        train: points, shape (N, D); the first 10,000 are used.
        val: validation points, shape (M, D).
        sizes: numbers of components to try, >= 1; those with fewer than ten points a component, or whose fit would take
            minutes in this dimension, are left out.
        seed: keys the initial assignment.

    Returns:
        A fitted scikit-learn mixture. A warning says where it has not converged.
    """
    check_counts("sizes", sizes)
    check_seed("seed", seed)
    train = train[:MIXTURE_POINTS]
    state = derive_seed(seed, "mixture") % 2**31
    work = train.size * train.shape[1]

    def fit(size: int, floor: float) -> GaussianMixture:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of those that are not chosen nobody need know
            return GaussianMixture(size, covariance_type="full", reg_covar=floor, random_state=state).fit(train)

    def best(models: Iterable[GaussianMixture]) -> GaussianMixture:
        return max(models, key=lambda model: model.score(val))

    sizes = _affordable(sizes, train)
    if sizes == (1,):  # the grid of floors, once
        chosen = best(fit(1, floor) for floor in COVARIANCE_FLOORS)
    else:
        floors: Sequence[float] = COVARIANCE_FLOORS
        if max(sizes) * work > MIXTURE_GRID_WORK:
            floors = [best(fit(1, floor) for floor in COVARIANCE_FLOORS).reg_covar]
        chosen = best(fit(size, floor) for size in sizes for floor in floors)
    if not chosen.converged_:
        warnings.warn(
            f"the reference mixture of {chosen.n_components} Gaussians has not converged after {chosen.n_iter_} steps:"
            " its rows are those of its last step, and a better mixture may exist",
            stacklevel=2,
        )
    return chosen


def _affordable(sizes: Sequence[int], train: np.ndarray) -> tuple[int, ...]:
    """Sizes with ten points a component and few enough multiplications; a single component always."""
    most, work = len(train) // 10, train.size * train.shape[1]
    return tuple(size for size in sizes if size == 1 or (size <= most and size * work <= MIXTURE_WORK))


class _Sampler:
    """Samples of a mixture by a torch generator, in order: scikit-learn's own sampler groups them by component."""

    def __init__(self, model: GaussianMixture, num: int, rng: torch.Generator) -> None:
        self.means = torch.from_numpy(model.means_)
        self.factors = torch.linalg.cholesky(torch.from_numpy(model.covariances_))
        self.component = torch.multinomial(torch.from_numpy(model.weights_), num, replacement=True, generator=rng)
        self.rng = rng

    def draw(self, index: Tensor) -> Tensor:
        """The next samples, at indices that follow the last ones', shape (B, D)."""
        component = self.component[index]
        noise = torch.randn(len(index), self.means.shape[1], generator=self.rng, dtype=self.means.dtype)
        points = self.means[component]
        # A factor at a time: one for every sample would not fit into memory for images.
        for number in component.unique().tolist():
            mine = component == number
            points[mine] += noise[mine] @ self.factors[number].T
        return points
