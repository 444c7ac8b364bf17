"""From probes to rows, with a trained module or with whoever answers in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from flowbench.core.checks import check_count, check_seed
from flowbench.core.contract import returned
from flowbench.core.remarks import say_once
from flowbench.core.rows import Row
from flowbench.data import FlowDataModule
from flowbench.evaluation.answers import Answers, ask_all
from flowbench.evaluation.auto_features import resolve_features
from flowbench.evaluation.comparison import Comparison
from flowbench.evaluation.failures import Failure, Failures
from flowbench.evaluation.measurable import check_data
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.networks import FeatureNetworks
from flowbench.evaluation.probe import Probe, Setup, merged
from flowbench.evaluation.provenance import environment
from flowbench.evaluation.records import Identity, make_row
from flowbench.evaluation.reference import Reference
from flowbench.evaluation.samples import Images, RealSet
from flowbench.evaluation.sampling import Generated, Samples
from flowbench.evaluation.score import score
from flowbench.evaluation.stages import Report, Stages, silent
from flowbench.metrics import FeatureExtractor

__all__ = ["Measurer", "SplitName"]

SplitName = Literal["train", "val", "test"]


class Measurer:
    """Asks the probes of some metrics and makes rows of the answers; see :class:`~flowbench.evaluation.Evaluator`."""

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        references: Mapping[str, Reference],
        *,
        num_samples: int,
        batch_size: int,
        reference: SplitName,
        held_out: SplitName,
        seed: int,
        num_trajectories: int,
        trajectory_points: int,
        num_pictures: int,
        num_likelihood: int | None,
    ) -> None:
        check_count("evaluator.num_samples", num_samples)
        check_count("evaluator.batch_size", batch_size)
        check_seed("evaluator.seed", seed)
        check_count("evaluator.num_trajectories", num_trajectories)
        check_count("evaluator.trajectory_points", trajectory_points, at_least=2, at_most=10**6)
        check_count("evaluator.num_pictures", num_pictures)
        check_count("evaluator.num_likelihood", num_likelihood, or_none=True, hint="null is all")
        for metric in metrics.values():
            metric.check_reference(reference)
        if reference == held_out:
            raise ValueError(f"evaluator.reference and held_out are both {reference}: the floor would be zero")
        self._given: dict[str, Metric] = dict(metrics)
        self.metrics = self._given  # `features: auto` is named once the data are known
        self.references: dict[str, Reference] = dict(references)
        self.num_samples, self.batch_size, self.num_pictures = num_samples, batch_size, num_pictures
        self.reference, self.held_out, self.seed = reference, held_out, seed
        self.num_trajectories, self.trajectory_points = num_trajectories, trajectory_points
        self.num_likelihood = num_likelihood
        self.identity = Identity()
        self.report: Report = silent
        self._stages = Stages()
        self._failures = Failures()
        self._comparison: Comparison | None = None
        self._named_for: FlowDataModule | None = None

    # ---- what it compares with ------------------------------------------------------------------------

    def _resolved(self, data: FlowDataModule) -> dict[str, str]:
        """What the names of the metrics' extractors stand for."""
        names = sorted({name for metric in self._given.values() for name in metric.extractors})
        return {name: resolve_features(name, data.dataset, data.spec) for name in names}

    def _name_features(self, data: FlowDataModule, names: Mapping[str, str]) -> None:
        self.metrics = {name: metric.with_features(names) for name, metric in self._given.items()}
        self._named_for = data

    def _compared(self, data: FlowDataModule, device: torch.device | str = "cpu") -> Comparison:
        """Real data and feature networks: loaded once per datamodule, not once per point of a sweep."""
        if self._named_for is not data:
            check_data(self, data)
            self._name_features(data, self._resolved(data))
        if self._comparison is None or self._comparison.data is not data:
            probes = [probe for metric in self.metrics.values() for probe in metric.probes()]
            networks = FeatureNetworks({name for probe in probes for name in probe.extractors}, data, device)
            self._comparison = Comparison(
                data, RealSet(data, self.reference), RealSet(data, self.held_out), networks
            )  # fmt: skip
        return self._comparison

    def extractors(self, data: FlowDataModule, device: torch.device | str = "cpu") -> dict[str, FeatureExtractor]:
        """The feature extractors that the metrics name, with their weights."""
        return dict(self._compared(data, device).extractors)

    def prepare(self, data: FlowDataModule, device: torch.device | str = "cpu") -> None:
        """Put into the cache what all contenders share: feature networks, and the reference split's features."""
        self._compared(data, device).fill_cache(self.metrics)
        for reference in self._present(data).values():
            reference.prepare(data, device)

    # ---- questions ------------------------------------------------------------------------------------

    def _probes(self, metrics: Iterable[Metric]) -> list[Probe[Any]]:
        """What these metrics ask, each question once; samples always, for their pictures and their cost."""
        return merged([Samples(), *(probe for metric in metrics for probe in metric.probes())])

    def _settings(self, data: FlowDataModule, device: torch.device | str = "cpu") -> Setup:
        """With what the probes of reference rows are asked."""
        compared = self._compared(data, device)
        return Setup(
            module=None,
            data=data,
            reference=compared.reference,
            held_out=compared.held_out,
            extractors=compared.extractors,
            seed=self.seed,
            num_samples=self.num_samples,
            batch_size=self.batch_size,
            num_pictures=self.num_pictures,
            num_paths=self.num_trajectories,
            path_points=self.trajectory_points,
            num_likelihood=self.num_likelihood,
        )

    def _ask(self, setup: Setup, probes: Iterable[Probe[Any]], failures: Failures) -> Answers:
        """Ask the module, on all processes; each probe reports as a part of the measurement, a sweep's as one."""

        def ask(probe: Probe[Any]) -> Any:
            if setup.override.axis:
                return probe.ask(setup) if probe.follows_sampler else None
            return probe.ask(replace(setup, report=self._stages.of(probe.stage)))

        return Answers.of(setup, ask_all(probes, failures, ask))

    # ---- rows -----------------------------------------------------------------------------------------

    def _data_provenance(self, data: FlowDataModule) -> dict[str, Any]:
        return {
            **environment(),
            "evaluation_seed": self.seed,
            "dataset_version": data.spec.version,
            "extractors": {name: e.checksum[:16] for name, e in self._compared(data).extractors.available().items()},
        }

    def _rows(
        self,
        contender: str,
        family: str,
        found: Sequence[Answers],
        weights: str,
        provenance: Mapping[str, Any],
        stage: str = "",
    ) -> list[Row]:
        begin = self._stages.counter(stage, len(found) * len(self.metrics))
        return [
            make_row(
                self.identity, answers, m, contender=contender, family=family, weights=weights, provenance=provenance
            )
            for answers in found
            for m in score(answers, self.metrics, self._failures, begin)
        ]

    def _pictures(self, answers: Answers) -> dict[str, Tensor]:
        """The metrics' pictures by name; none of a metric that has no numbers."""
        found: dict[str, Tensor] = {}
        for metric in self.metrics.values():
            drawn = self._failures.compute(partial(metric.pictures, answers))
            found |= {} if isinstance(drawn, Failure) else drawn
        return found

    def raise_bug(self) -> None:
        """Raise the first mistake of the code that the last measurement met, once its rows are written."""
        self._failures.raise_bug()

    # ---- who is no module -----------------------------------------------------------------------------

    def reference_rows(self, data: FlowDataModule) -> Iterator[Row]:
        """Rows of the references: they belong to the data, not to a contender or a seed.

        What cannot be computed costs its own rows, which say why; see :meth:`raise_bug`.
        """
        self._failures = Failures()
        present = self._present(data)
        self._stages = Stages(list(present), self.report)
        provenance, setup = self._data_provenance(data), self._settings(data)
        for name, reference in present.items():
            # The stage is drawing, and fitting what it is drawn from.
            self._stages(name)
            yield from self._reference_rows(name, reference, setup, provenance)

    def floor_rows(self, data: FlowDataModule) -> list[Row]:
        """Rows of the references that a single run can afford beside its own: nothing is drawn or fitted for them."""
        provenance, setup = self._data_provenance(data), self._settings(data)
        free = {name: reference for name, reference in self._present(data).items() if reference.is_free}
        return [row for name, found in free.items() for row in self._reference_rows(name, found, setup, provenance)]

    def _reference_rows(
        self, name: str, reference: Reference, setup: Setup, provenance: Mapping[str, Any]
    ) -> list[Row]:
        found = self._answered(setup, lambda probe: reference.answer(probe, setup))
        return self._rows(name, "reference", [found], "none", provenance, name)

    def _answered(self, setup: Setup, answer: Callable[[Probe[Any]], Any]) -> Answers:
        """The answers of somebody other than a module, on one process."""

        def checked(probe: Probe[Any]) -> Any:
            found = answer(probe)
            is_samples = isinstance(probe, Samples) and found is not None
            return returned(found, Generated, probe, "answer") if is_samples else found

        probes = self._probes(self.metrics.values())
        return Answers.of(setup, {probe.key(): self._failures.compute(partial(checked, probe)) for probe in probes})

    def _present(self, data: FlowDataModule) -> dict[str, Reference]:
        """The references that these data have; a line names the others and the reason."""
        reasons = {name: reference.left_out(data.spec) for name, reference in self.references.items()}
        for reason in dict.fromkeys(filter(None, reasons.values())):
            names = ", ".join(name for name, found in reasons.items() if found == reason)
            say_once(f"{names}: left out, because {reason}")
        return {name: reference for name, reference in self.references.items() if not reasons[name]}

    def external_rows(
        self, data: FlowDataModule, batches: Iterable[tuple[Tensor, Tensor]], images: Images
    ) -> tuple[list[Row], dict[str, Tensor]]:
        """Rows of images that somebody else's model made.

        Args:
            data: the data that they are compared with.
            batches: indices (B,) and pictures uint8 (B, C, H, W), in the order of the indices.
            images: gives the pictures at some indices.

        Returns:
            The rows, and the metrics' pictures by name. What cannot be computed costs its own rows, which say why; see
            :meth:`raise_bug`.
        """
        self._failures = Failures()
        setup = self._settings(data)
        (probe,) = (probe for probe in self._probes(self.metrics.values()) if isinstance(probe, Samples))
        # Pictures that cannot be read are the user's mistake, and cost everything.
        collector = probe.collector(setup)
        for index, pictures in batches:
            collector.add_images(index, pictures)
        drawn = Generated(collector.gathered("generated", images))
        found = self._answered(setup, lambda asked: drawn if isinstance(asked, Samples) else None)
        provenance = {**self._data_provenance(data), "config_hash": self.identity.config_hash}
        return self._rows(self.identity.contender, "external", [found], "none", provenance), self._pictures(found)
