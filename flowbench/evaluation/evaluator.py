"""The one evaluator, for every family."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from flowbench.core.checks import check_count, check_seed
from flowbench.core.rows import FLOOR_FILE, Row, write_rows
from flowbench.data import FlowDataModule
from flowbench.evaluation.answers import Answers, Drawn, fill, rate_of, sample_set, show, subjects_of
from flowbench.evaluation.auto_features import resolve_features
from flowbench.evaluation.conditions import measured_conditions
from flowbench.evaluation.drawing import (
    Drawing,
    Imposed,
    Paths,
    draw_paths,
    draw_samples,
    labels_of,
    sweep_points,
)
from flowbench.evaluation.earlier import set_aside
from flowbench.evaluation.extractors import get_extractor
from flowbench.evaluation.failures import Failure, Failures, agreed, together
from flowbench.evaluation.flow_metrics import PathStraightness, TrainingPairs
from flowbench.evaluation.gather import gather_by_index
from flowbench.evaluation.latent_bound import measured_bound
from flowbench.evaluation.measurable import check_data, check_measurable
from flowbench.evaluation.measurement import Measurement
from flowbench.evaluation.memorization import Memorization
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.pictures import log_hyperparameters, log_samples
from flowbench.evaluation.prepared import Prepared, feature_counts
from flowbench.evaluation.provenance import cost_of, environment
from flowbench.evaluation.reconstruction import Reconstruction, draw_reconstructions
from flowbench.evaluation.records import Curve, Identity, make_row
from flowbench.evaluation.reference import REFERENCE_NAMES, reference_subjects, score
from flowbench.evaluation.samples import Collector, DrawnSet, Images, RealSet
from flowbench.evaluation.stages import Report, Stages, silent
from flowbench.evaluation.subject import Reconstructions, Subject
from flowbench.evaluation.trainer_parts import data_of, flow_of
from flowbench.families import FlowModule, LatentSpace
from flowbench.metrics import FeatureExtractor
from flowbench.training import Budget

__all__ = ["Evaluator"]

# The parts of a measurement, as its progress names them; a sweep comes before the scores.
LIKELIHOOD, SAMPLES, PATHS, HELD_OUT, SCORES = "likelihood", "samples", "paths", "held-out data", "scores"


class Evaluator(L.Callback):
    """Scores a flow after training, and a little during it.

    All noise is keyed by (seed, sample index): contenders share it, and one process or several draw the same samples.
    Features are gathered in the order of their indices and every statistic is computed once, on process 0.

    Args:
        metrics: what to measure, by any name.
        num_samples: samples to draw for the sample metrics, >= 1.
        batch_size: samples drawn at a time by one process, >= 1; changes results of adaptive solvers alone.
        reference: split that samples are compared with.
        held_out: split that the row `floor` scores as if it were generated.
        seed: the evaluation seed, >= 0.
        weights: `ema` for the averaged weights, `raw` for the live ones; a flow without an average is measured `raw`.
        sweep: `{network_evaluations: [1, 2, ...]}`, budgets from 1 to 1e6, and `{guidance: [1, 2, ...]}`, scales from 1
            to 1e12, to sample with from the same weights, one at a time, for families that can choose.
        curve: names of metrics to measure at every validation during training, with the same weights.
        num_trajectories: paths for the geometry metrics, >= 1.
        trajectory_points: states along each path of a continuous flow, 2 to 1e6.
        num_pictures: samples to keep for pictures, >= 1.
        num_likelihood: test samples whose likelihood is measured, >= 1, counted from the first; None takes all.

    Raises:
        ValueError: for a number out of range, or a curve of a metric that is not there.
    """

    def __init__(
        self,
        metrics: dict[str, Metric] | None = None,
        *,
        num_samples: int = 360,
        batch_size: int = 256,
        reference: Literal["train", "val", "test"] = "train",
        held_out: Literal["train", "val", "test"] = "test",
        seed: int = 0,
        weights: Literal["ema", "raw"] = "ema",
        sweep: dict[str, list[float]] | None = None,
        curve: list[str] | None = None,
        num_trajectories: int = 256,
        trajectory_points: int = 33,
        num_pictures: int = 64,
        num_likelihood: int | None = None,
    ) -> None:
        check_count("evaluator.num_samples", num_samples)
        check_count("evaluator.batch_size", batch_size)
        check_seed("evaluator.seed", seed)
        check_count("evaluator.num_trajectories", num_trajectories)
        check_count("evaluator.trajectory_points", trajectory_points, at_least=2, at_most=10**6)
        check_count("evaluator.num_pictures", num_pictures)
        check_count("evaluator.num_likelihood", num_likelihood, or_none=True, hint="null is all")
        if reference != "train" and any(isinstance(metric, Memorization) for metric in (metrics or {}).values()):
            raise ValueError(f"evaluator.reference is {reference}, but memorization needs train; remove that metric")
        if reference == held_out:
            raise ValueError(f"evaluator.reference and held_out are both {reference}: the floor would be zero")
        self.sweep = sweep_points(sweep)
        self._given: dict[str, Metric] = dict(metrics or {})
        self.metrics = self._given  # `features: auto` is named once the data are known
        self.curve = list(curve or [])
        for name in self.curve:
            if name not in self.metrics:
                raise ValueError(f"evaluator.curve names {name}, which is not in evaluator.metrics")
        self.num_samples, self.batch_size, self.num_pictures = num_samples, batch_size, num_pictures
        self.reference, self.held_out, self.seed = reference, held_out, seed
        self.weights: Literal["ema", "raw"] = weights
        self.num_trajectories, self.trajectory_points = num_trajectories, trajectory_points
        self.num_likelihood = num_likelihood
        self.identity = Identity()
        self.budget: Budget | None = None
        self.report: Report = silent
        self._stages = Stages()
        # A step of the training whose point of the curve the next validation measures, outside of the training.
        self.missing_step: int | None = None
        self.rows: list[Row] = []
        self._stack = ExitStack()
        self._log_prob: list[tuple[Tensor, Tensor]] = []
        self._failures = Failures()
        self._prepared: Prepared | None = None
        self._named_for: FlowDataModule | None = None

    # ---- hooks ----------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Tell the datamodule how many test samples are asked for, and name the extractors that suit it."""
        data = data_of(trainer)
        data.num_test = self.num_likelihood
        # Process 0 decides for all: weights may reach it and not another one.
        names = self._resolved(data) if trainer.is_global_zero else {}
        self._name_features(data, trainer.strategy.broadcast(names))

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Refuse before the training, not after it, what cannot be measured; a sampler is tried at each budget."""
        flow = flow_of(module)
        check_measurable(self, flow, data_of(trainer), trainer.world_size)
        drawing = self._drawing(flow, trainer)
        labels = labels_of(drawing)
        with torch.no_grad(), flow.evaluating(self.weights):
            for imposed in self.imposed(flow):
                drawing.sample(torch.zeros(1, dtype=torch.int64), labels, imposed)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """A point of quality against training, and a picture in TensorBoard."""
        # `flowbench validate` runs this hook too, and must not touch the curve of the training.
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if training and self.curve:
            self._measure_curve(trainer, flow_of(module), trainer.global_step)
        elif self.missing_step is not None:
            self._measure_curve(trainer, flow_of(module), self.missing_step)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Make up for the point that a run killed between its checkpoint and its validation has lost."""
        # Process 0 decides for all: it may have written the file before others read it.
        if trainer.strategy.broadcast(bool(self.curve) and Curve.of(trainer).lacks(trainer, trainer.global_step)):
            self._measure_curve(trainer, flow_of(module), trainer.global_step)

    def _measure_curve(self, trainer: L.Trainer, module: FlowModule, step: int) -> None:
        chosen = {name: self.metrics[name] for name in self.curve}
        failures = Failures()
        with torch.no_grad(), module.evaluating(self.weights), together():
            drawn = failures.ask(lambda: self._draw(module, trainer, chosen))
            if trainer.is_global_zero:
                subject = self._subject(data_of(trainer), drawn)
                self._write_point(trainer, step, list(score(subject, chosen, failures)))
                if isinstance(subject.samples, DrawnSet):
                    shown = subject.samples.shown[: self.num_pictures]
                    log_samples(trainer, shown, module.spec, "val/samples", step)
            failures.raise_bug()
        trainer.strategy.barrier("flowbench.curve")

    def _write_point(self, trainer: L.Trainer, step: int, measured: Sequence[Measurement]) -> None:
        """Training goes on without the numbers that could not be measured."""
        known = [m for m in measured if not m.reason]
        for m in measured:
            if m.reason:
                print(f"no point of {m.metric} at step {step}: {m.reason}", file=sys.stderr, flush=True)
        Curve.of(trainer).append(step, self.budget, known)
        if trainer.logger is not None and known:
            values: Mapping[str, float] = {f"val/{m.metric}": m.value for m in known}
            trainer.logger.log_metrics(dict(values), step=step)

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Put the chosen weights in place until the test ends, however it ends.

        Raises:
            ValueError: when the trainer forbids the gradients that likelihoods need.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError("likelihoods of continuous flows need gradients: set trainer.inference_mode=false")
        self._stack = ExitStack()
        flow = flow_of(module)
        self._stack.enter_context(flow.evaluating(self.weights))
        self._log_prob, self._failures = [], Failures()
        self._stages = Stages(self._stage_names(flow), self.report if trainer.is_global_zero else silent)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the log-densities of the batch."""
        if outputs:
            self._log_prob.append((outputs["index"].cpu(), outputs["log_prob"].cpu()))
        self._stages(LIKELIHOOD, batch_idx + 1, int(sum(trainer.num_test_batches)))

    def on_test_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Draw, measure, write."""
        flow = flow_of(module)
        with torch.no_grad(), together():
            answers = self._ask(trainer, flow)
            if trainer.is_global_zero:
                self._measure(trainer, flow, answers)
            # When everything else is written.
            self._failures.raise_bug()

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Give the live weights back."""
        self._stack.close()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Give the live weights back."""
        self._stack.close()

    # ---- evaluation -----------------------------------------------------------------------------------

    def _ask(self, trainer: L.Trainer, flow: FlowModule) -> Answers:
        """Ask the flow, on all processes, whatever the metrics look at; a question without an answer costs no other."""
        ask = self._failures.ask
        drawing = self._drawing(flow, trainer, stage=HELD_OUT)
        in_sweep = {name: metric for name, metric in self.metrics.items() if metric.in_sweep}
        points = zip(self.imposed(flow), self._sweep_stages(flow), strict=True)
        return Answers(
            ask(lambda: self._likelihoods(flow)),
            ask(lambda: self._draw(flow, trainer, self.metrics, stage=SAMPLES)),
            ask(lambda: self._paths(flow, trainer)),
            ask(lambda: self._reconstructions(flow, trainer)),
            ask(lambda: measured_conditions(drawing, labels_of(drawing), self.metrics.values())),
            ask(lambda: measured_bound(drawing, self.held_out, self.metrics.values())),
            [(p, ask(partial(self._draw, flow, trainer, in_sweep, p, stage))) for p, stage in points],
        )

    def _likelihoods(self, flow: FlowModule) -> Tensor:
        with agreed():
            failure, flow.test_failure = flow.test_failure, None
            if failure is not None:
                raise failure
        index = torch.cat([i for i, _ in self._log_prob])
        return gather_by_index(index, torch.cat([v for _, v in self._log_prob]))

    def _measure(self, trainer: L.Trainer, flow: FlowModule, answers: Answers) -> None:
        """Score the answers, on process 0, and leave the rows."""
        data, failures = data_of(trainer), self._failures
        main, *swept = subjects_of(flow, data, answers, partial(self._subject, data), failures, self.seed)
        fill(main, "training_pairs", failures.compute(lambda: self._training_pairs(flow, trainer)))
        main.cost = cost_of(flow, self.budget, rate_of(answers.samples), trainer.world_size)
        provenance = {**self._provenance(trainer), **asdict(main.cost)}
        weights = self.weights if flow.ema else "raw"
        family = type(flow).__name__
        self.rows = self._rows(self.identity.contender, family, [main, *swept], weights, provenance, SCORES)
        run_dir = Path(trainer.default_root_dir)
        set_aside(run_dir, self.rows)
        if not self.identity.bench:  # which has its own
            write_rows(run_dir / FLOOR_FILE, self.floor_rows(data))
        write_rows(run_dir / "rows.jsonl", self.rows)
        # A trainer that only measures has not counted the steps behind the checkpoint.
        step = self.budget.steps if self.budget else trainer.global_step
        show(trainer, flow, main, answers.paths, self._pictures(main), self.num_pictures, step)
        log_hyperparameters(trainer, self.rows, asdict(self.identity))

    def _pictures(self, subject: Subject) -> dict[str, Tensor]:
        """The metrics' pictures by name; none of a metric that has no numbers."""
        found: dict[str, Tensor] = {}
        for metric in self.metrics.values():
            drawn = {} if subject.reason(metric.needs) else self._failures.compute(partial(metric.pictures, subject))
            found |= {} if isinstance(drawn, Failure) else drawn
        return found

    def _stage_names(self, flow: FlowModule) -> list[str]:
        """The parts of a measurement, in their order; one that this flow does not have is passed over at once."""
        return [LIKELIHOOD, SAMPLES, PATHS, HELD_OUT, *self._sweep_stages(flow), SCORES]

    def _sweep_stages(self, flow: FlowModule) -> list[str]:
        points = self.imposed(flow)
        return [f"sweep {number}/{len(points)}, {point}," for number, point in enumerate(points, start=1)]

    def _drawing(self, flow: FlowModule, trainer: L.Trainer, stage: str = "") -> Drawing:
        return Drawing(
            flow,
            data_of(trainer),
            self.seed,
            self.num_samples,
            self.batch_size,
            self.reference,
            trainer.global_rank,
            trainer.world_size,
            self.held_out,
            self._stages.of(stage),
        )

    def _draw(
        self,
        flow: FlowModule,
        trainer: L.Trainer,
        metrics: Mapping[str, Metric],
        imposed: Imposed | None = None,
        stage: str = "",
    ) -> tuple[DrawnSet, float, float]:
        """Samples as those metrics need them, mean evaluations per sample, samples per second of this process."""
        with agreed():
            extractors = self.extractors(data_of(trainer), flow.device)
        counts = self._counts(metrics)
        return draw_samples(self._drawing(flow, trainer, stage), extractors, counts, self.num_pictures, imposed)

    def imposed(self, flow: FlowModule) -> list[Imposed]:
        """The points of the sweep that this flow can choose."""
        can = {"network_evaluations": flow.can_choose_evaluations, "guidance": flow.guidance_scale is not None}
        return [point for point in self.sweep if can[point.swept]]

    def _paths(self, flow: FlowModule, trainer: L.Trainer) -> Paths | None:
        if not any(isinstance(metric, PathStraightness) for metric in self.metrics.values()):
            return None
        shown = min(self.num_pictures, self.num_trajectories)
        return draw_paths(self._drawing(flow, trainer, PATHS), self.num_trajectories, self.trajectory_points, shown)

    def _reconstructions(self, flow: FlowModule, trainer: L.Trainer) -> Reconstructions | None:
        """What the autoencoder of a latent flow makes of held-out images, where a metric asks for it."""
        wanted = {name: metric for name, metric in self.metrics.items() if isinstance(metric, Reconstruction)}
        if not wanted or not isinstance(flow.space, LatentSpace):
            return None
        extractors, counts = self.extractors(data_of(trainer), flow.device), self._counts(wanted)
        return draw_reconstructions(self._drawing(flow, trainer, HELD_OUT), self.held_out, extractors, counts)

    def _counts(self, metrics: Mapping[str, Metric]) -> dict[str, int]:
        return feature_counts(metrics.values(), self.num_samples)

    def _subject(self, data: FlowDataModule, drawn: Drawn | Failure) -> Subject:
        subject = self._prepare(data).subject(sample_set(data.spec, drawn, self.num_samples))
        if isinstance(drawn, Failure):
            fill(subject, "samples", drawn)
        else:
            subject.network_evaluations = drawn[1]
        return subject

    def _resolved(self, data: FlowDataModule) -> dict[str, str]:
        """What the names of the metrics' extractors stand for."""
        names = sorted({metric.features for metric in self._given.values() if metric.features is not None})
        return {name: resolve_features(name, data.dataset, data.spec) for name in names}

    def _name_features(self, data: FlowDataModule, names: Mapping[str, str]) -> None:
        self.metrics = {name: metric.with_features(names) for name, metric in self._given.items()}
        self._named_for = data

    def _prepare(self, data: FlowDataModule, device: torch.device | str = "cpu") -> Prepared:
        """Load the reference and the feature networks once per datamodule, not once per point of a sweep."""
        if self._named_for is not data:
            check_data(self, data)
            self._name_features(data, self._resolved(data))
        if self._prepared is None or self._prepared.data is not data:
            names = {metric.features for metric in self.metrics.values() if metric.features is not None}
            extractors = {name: get_extractor(name, data, device) for name in sorted(names)}
            reference, held_out = RealSet(data, self.reference), RealSet(data, self.held_out)
            self._prepared = Prepared(data, reference, held_out, extractors)
        return self._prepared

    def extractors(self, data: FlowDataModule, device: torch.device | str = "cpu") -> dict[str, FeatureExtractor]:
        """The feature extractors that the metrics name, with their weights."""
        return self._prepare(data, device).extractors

    def prepare(self, data: FlowDataModule, device: torch.device | str = "cpu") -> None:
        """Put into the cache what all contenders share: feature networks, and the reference split's features."""
        self._prepare(data, device).fill_cache(self.metrics.values())

    def _training_pairs(self, flow: FlowModule, trainer: L.Trainer) -> dict[str, float] | None:
        """What the pairs of training look like, where a metric asks for it."""
        wanted = [metric.num_pairs for metric in self.metrics.values() if isinstance(metric, TrainingPairs)]
        return flow.training_pairs(data_of(trainer), max(wanted), self.seed) if wanted else None

    # ---- records --------------------------------------------------------------------------------------

    def _provenance(self, trainer: L.Trainer) -> dict[str, Any]:
        data = data_of(trainer)
        return {
            **self._data_provenance(data),
            "config_hash": self.identity.config_hash,
            "world_size": trainer.world_size,
            "global_batch": data.batch_size * trainer.accumulate_grad_batches,
            "precision": str(trainer.precision),
        }

    def _data_provenance(self, data: FlowDataModule) -> dict[str, Any]:
        return {
            **environment(),
            "evaluation_seed": self.seed,
            "dataset_version": data.spec.version,
            "extractors": {name: e.checksum[:16] for name, e in self.extractors(data).items()},
        }

    def _rows(
        self,
        contender: str,
        family: str,
        subjects: Sequence[Subject],
        weights: str,
        provenance: Mapping[str, Any],
        stage: str = "",
    ) -> list[Row]:
        begin = self._stages.counter(stage, len(subjects) * len(self.metrics))
        return [
            make_row(
                self.identity, subject, m, contender=contender, family=family, weights=weights, provenance=provenance
            )
            for subject in subjects
            for m in score(subject, self.metrics, self._failures, begin)
        ]

    def raise_bug(self) -> None:
        """Raise the first mistake of the code that the last measurement met, once its rows are written."""
        self._failures.raise_bug()

    def reference_rows(self, data: FlowDataModule) -> Iterator[Row]:
        """Rows of `floor`, `noise`, `gaussian` and `gmm`: they belong to the data, not to a contender or a seed.

        What cannot be computed costs its own rows, which say why; see :meth:`raise_bug`.
        """
        self._failures = Failures()
        provenance = self._data_provenance(data)
        self._stages = Stages(REFERENCE_NAMES, self.report)
        # The stage is drawing, and fitting what it is drawn from.
        for name, subject in self._references(data, self._stages):
            yield from self._rows(name, "reference", [subject], "none", provenance, name)

    def floor_rows(self, data: FlowDataModule) -> list[Row]:
        """Rows of `floor` alone, which a single run can afford beside its own: nothing is drawn or fitted for it."""
        name, subject = next(self._references(data))
        return self._rows(name, "reference", [subject], "none", self._data_provenance(data))

    def _references(
        self, data: FlowDataModule, begin: Callable[[str], None] = lambda name: None
    ) -> Iterator[tuple[str, Subject]]:
        known = self._prepare(data)
        return reference_subjects(
            data,
            known.extractors,
            self._counts(self.metrics),
            self._failures,
            num_samples=self.num_samples,
            reference=known.reference,
            held_out=known.held_out,
            seed=self.seed,
            num_likelihood=self.num_likelihood,
            begin=begin,
        )

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
        known = self._prepare(data)
        collector = Collector(data.spec, known.extractors, self._counts(self.metrics), self.num_pictures)
        for index, pictures in batches:
            collector.add_images(index, pictures)
        subject = known.subject(collector.gathered("generated", images))
        provenance = {**self._data_provenance(data), "config_hash": self.identity.config_hash}
        rows = self._rows(self.identity.contender, "external", [subject], "none", provenance)
        return rows, self._pictures(subject)
