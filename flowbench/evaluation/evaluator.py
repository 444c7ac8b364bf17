"""The one evaluator, for every family and task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from flowbench.core.rows import FLOOR_FILE, Row, write_rows
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.artifacts import save_pictures
from flowbench.evaluation.cost import TrainingCost
from flowbench.evaluation.curve import Curve, write_point
from flowbench.evaluation.earlier import set_aside
from flowbench.evaluation.failures import Failures, together
from flowbench.evaluation.measurable import check_measurable
from flowbench.evaluation.measurer import Measurer, SplitName
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.override import SamplerOverride, sweep_points
from flowbench.evaluation.pictures import log_hyperparameters, log_pictures
from flowbench.evaluation.probe import Probe, Setup
from flowbench.evaluation.protocols import CanSample
from flowbench.evaluation.reference import Reference
from flowbench.evaluation.sampling import Samples, log_generated
from flowbench.evaluation.score import score
from flowbench.evaluation.stages import Stages, silent
from flowbench.evaluation.trainer_parts import data_of, measured_module
from flowbench.evaluation.tuning import best_rows, choose, choosing, is_declared
from flowbench.training import Budget, TrainingModule

__all__ = ["Evaluator"]

# The last part of a measurement, as its progress names it; the others are those of the probes.
SCORES = "scores"


class Evaluator(Measurer, L.Callback):
    """Measures a module after training, and a little during it.

    All noise is keyed by (seed, sample index): contenders share it, and one process or several draw the same samples.
    Features are gathered in the order of their indices and every statistic is computed once, on process 0.

    Args:
        metrics: what to measure, by any name.
        references: who stands in the table beside the contenders, by the names of their rows; in experiment files
            without this key `floor`, `noise`, `gaussian` and `gmm`.
        num_samples: samples to draw for the sample metrics, >= 1.
        batch_size: samples drawn at a time by one process, >= 1; changes results of adaptive solvers alone.
        reference: split that samples are compared with.
        held_out: split that the row `floor` scores as if it were generated.
        seed: the evaluation seed, >= 0.
        weights: `ema` for the averaged weights, `raw` for the live ones; a flow without an average is measured `raw`.
        sweep: `{network_evaluations: [1, 2, ...]}`, budgets from 1 to 1e6, and `{guidance: [1, 2, ...]}`, scales from 1
            to 1e12, to sample with from the same weights, one at a time, for families that can choose.
        best_by: name of a number, e.g. `fd[digits-cnn]`, by which the best point of every axis of the sweep is chosen
            on the validation split; the rows of that point are then told once more, on the axes `best_guidance` and
            `best_network_evaluations`. None chooses none.
        curve: names of metrics to measure at every validation during training, with the same weights.
        num_trajectories: paths for the geometry metrics, >= 1.
        trajectory_points: states along each path of a continuous flow, 2 to 1e6.
        num_pictures: samples to keep for pictures, >= 1.
        num_likelihood: test samples whose likelihood is measured, >= 1, counted from the first; None takes all.

    Raises:
        ValueError: for a number out of range, or a curve of, or a choice by, a metric that is not there.
    """

    def __init__(
        self,
        metrics: dict[str, Metric] | None = None,
        *,
        references: dict[str, Reference] | None = None,
        num_samples: int = 360,
        batch_size: int = 256,
        reference: SplitName = "train",
        held_out: SplitName = "test",
        seed: int = 0,
        weights: Literal["ema", "raw"] = "ema",
        sweep: dict[str, list[float]] | None = None,
        best_by: str | None = None,
        curve: list[str] | None = None,
        num_trajectories: int = 256,
        trajectory_points: int = 33,
        num_pictures: int = 64,
        num_likelihood: int | None = None,
    ) -> None:
        super().__init__(
            metrics or {},
            references or {},
            num_samples=num_samples,
            batch_size=batch_size,
            reference=reference,
            held_out=held_out,
            seed=seed,
            num_trajectories=num_trajectories,
            trajectory_points=trajectory_points,
            num_pictures=num_pictures,
            num_likelihood=num_likelihood,
        )
        self.sweep = sweep_points(sweep)
        self.best_by = best_by
        if best_by is not None and not is_declared(best_by, self.metrics):
            raise ValueError(f"evaluator.best_by names {best_by}, but no metric in a sweep is called that")
        if best_by is not None and held_out == "val":
            raise ValueError("evaluator.best_by chooses on the validation split, which is held_out: take test there")
        self.curve = list(curve or [])
        for name in self.curve:
            if name not in self.metrics:
                raise ValueError(f"evaluator.curve names {name}, which is not in evaluator.metrics")
        self.weights: Literal["ema", "raw"] = weights
        self.budget: Budget | None = None
        # A step of the training whose point of the curve the next validation measures, outside of the training.
        self.missing_step: int | None = None
        self.rows: list[Row] = []
        self._stack = ExitStack()
        self._limit_test: int | float | None = None

    # ---- hooks ----------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Name the extractors that suit the data, and leave the test batches to the probes."""
        data = data_of(trainer)
        # Process 0 decides for all: weights may reach it and not another one.
        names = self._resolved(data) if trainer.is_global_zero else {}
        self._name_features(data, trainer.strategy.broadcast(names))
        if stage == "test" and trainer.limit_test_batches:
            self._limit_test = trainer.limit_test_batches
            if type(module).test_step is TrainingModule.test_step:
                # Probes read the test split themselves; the trainer's own pass over it computes nothing.
                trainer.limit_test_batches = 1

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Give the trainer its limit back."""
        self._give_back(trainer)

    def _give_back(self, trainer: L.Trainer) -> None:
        """Undo what a test changed: the trainer's limit, and the weights in place."""
        if self._limit_test is not None:
            trainer.limit_test_batches, self._limit_test = self._limit_test, None
        self._stack.close()

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Refuse before the training, not after it, what cannot be measured; a sampler is tried at each budget."""
        measured = measured_module(module)
        check_measurable(self, module, data_of(trainer), trainer.world_size)
        if self.best_by is not None:
            choosing(self.best_by, self.metrics)
        if isinstance(measured, CanSample):
            with torch.no_grad(), measured.evaluating(self.weights):
                setup = self._setup(trainer, measured)
                for point in self.overrides(measured):
                    measured.sample_at(torch.zeros(1, dtype=torch.int64), replace(setup, override=point))

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """A point of quality against training, and a picture in TensorBoard."""
        # `flowbench validate` runs this hook too, and must not touch the curve of the training.
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if training and self.curve:
            self._measure_curve(trainer, module, trainer.global_step)
        elif self.missing_step is not None:
            self._measure_curve(trainer, module, self.missing_step)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Make up for the point that a run killed between its checkpoint and its validation has lost."""
        # Process 0 decides for all: it may have written the file before others read it.
        if trainer.strategy.broadcast(bool(self.curve) and Curve.of(trainer).lacks(trainer, trainer.global_step)):
            self._measure_curve(trainer, module, trainer.global_step)

    def _measure_curve(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        chosen, measured = {name: self.metrics[name] for name in self.curve}, measured_module(module)
        failures, setup = Failures(), self._setup(trainer, measured)
        with torch.no_grad(), measured.evaluating(self.weights), together():
            answers = self._ask(setup, self._probes(chosen.values()), failures)
            if trainer.is_global_zero:
                write_point(trainer, step, self.budget, list(score(answers, chosen, failures)))
                if (drawn := answers.get(Samples())) is not None:
                    log_generated(drawn, setup, trainer, "val/samples", step)
            failures.raise_bug()
        trainer.strategy.barrier("flowbench.curve")

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Put the chosen weights in place until the test ends, however it ends.

        Raises:
            ValueError: when the trainer forbids the gradients that likelihoods need.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError("likelihoods of continuous flows need gradients: set trainer.inference_mode=false")
        self._stack, self._failures = ExitStack(), Failures()
        self._stack.enter_context(measured_module(module).evaluating(self.weights))

    def on_test_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Ask on all processes, measure and write on the first one."""
        measured = measured_module(module)
        with torch.no_grad(), together():
            # The cost last, when the memory has had its peak.
            probes = [probe for probe in self._probes(self.metrics.values()) if probe != TrainingCost()]
            probes.append(TrainingCost())
            points = self._begin_stages(trainer, measured, probes)
            setup = self._setup(trainer, measured)
            found = [self._ask(setup, probes, self._failures)]
            in_sweep = self._probes(metric for metric in self.metrics.values() if metric.in_sweep)
            for stage, override in points.items():
                at = replace(setup, override=override, report=self._stages.of(stage))
                found.append(self._ask(at, in_sweep, self._failures))
            choices = self._choices(setup, points.values())
            if trainer.is_global_zero:
                self._measure(trainer, setup, probes, found, choices)
            # When everything else is written.
            self._failures.raise_bug()

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Give the live weights back."""
        self._stack.close()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Give the live weights back; after an exception nothing is torn down."""
        self._give_back(trainer)

    # ---- evaluation -----------------------------------------------------------------------------------

    def overrides(self, module: L.LightningModule) -> list[SamplerOverride]:
        """The points of the sweep that a module can choose."""
        if not isinstance(module, CanSample):
            return []
        facts = module.describe()
        can = {"network_evaluations": facts.can_choose_evaluations, "guidance": facts.guidance_scale is not None}
        return [point for point in self.sweep if can[point.axis]]

    def _choices(self, setup: Setup, points: Iterable[SamplerOverride]) -> dict[str, float]:
        """The best point of every axis of the sweep; nothing where no number is named to choose by."""
        if self.best_by is None or not (points := list(points)):
            return {}

        def ask(at: Setup, metrics: Mapping[str, Metric]) -> Answers:
            return self._ask(at, self._probes(metrics.values()), self._failures)

        return choose(self.best_by, self.metrics, setup, points, ask, self._failures)

    def _begin_stages(
        self, trainer: L.Trainer, module: TrainingModule, probes: Sequence[Probe[Any]]
    ) -> dict[str, SamplerOverride]:
        """The points of the sweep by their names in the progress, which has all parts of the measurement in order."""
        sweep = self.overrides(module)
        points = {f"sweep {number}/{len(sweep)}, {point},": point for number, point in enumerate(sweep, start=1)}
        parts = [*dict.fromkeys(filter(None, (probe.stage for probe in probes))), *points, SCORES]
        self._stages = Stages(parts, self.report if trainer.is_global_zero else silent)
        return points

    def _setup(self, trainer: L.Trainer, module: TrainingModule) -> Setup:
        """With what the probes of a module are asked."""
        return replace(
            self._settings(data_of(trainer), module.device),
            module=module,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            test_batches=self._test_batches(trainer),
            budget=self.budget,
        )

    def _test_batches(self, trainer: L.Trainer) -> int | None:
        """Batches of the test split that the trainer was to look at; None is all."""
        limit = self._limit_test
        if limit is None or isinstance(limit, int):
            return limit
        if limit == 1.0:
            return None
        total = len(data_of(trainer).evaluation_loader("test", self.num_likelihood))
        if not (found := int(total * limit)):
            raise ValueError(f"trainer.limit_test_batches={limit} leaves none of {total} test batches: raise it")
        return found

    def _measure(
        self,
        trainer: L.Trainer,
        setup: Setup,
        probes: Sequence[Probe[Any]],
        found: Sequence[Answers],
        choices: Mapping[str, float],
    ) -> None:
        """Score the answers, on process 0, and leave the rows."""
        main, module = found[0], measured_module(trainer.lightning_module)
        data, run_dir = setup.data, Path(trainer.default_root_dir)
        weights = self.weights if module.ema else "raw"
        provenance = {**self._provenance(trainer), **_costs(main)}
        self.rows = self._rows(self.identity.contender, type(module).__name__, found, weights, provenance, SCORES)
        self.rows += best_rows(self.best_by or "", self.rows[:], choices)
        set_aside(run_dir, self.rows)
        if not self.identity.bench and (floor := self.floor_rows(data)):  # a bench has its own
            write_rows(run_dir / FLOOR_FILE, floor)
        write_rows(run_dir / "rows.jsonl", self.rows)
        # A trainer that only measures has not counted the steps behind the checkpoint.
        step = self.budget.steps if self.budget else trainer.global_step
        for probe in probes:
            if (answer := main.get(probe)) is not None:
                probe.show(answer, setup, trainer, step)
        pictures = self._pictures(main)
        save_pictures(run_dir, pictures)
        log_pictures(trainer, pictures, "test", step)
        log_hyperparameters(trainer, self.rows, asdict(self.identity))

    def _provenance(self, trainer: L.Trainer) -> dict[str, Any]:
        data = data_of(trainer)
        return {
            **self._data_provenance(data),
            "config_hash": self.identity.config_hash,
            "world_size": trainer.world_size,
            "global_batch": data.batch_size * trainer.accumulate_grad_batches,
            "precision": str(trainer.precision),
        }


def _costs(answers: Answers) -> dict[str, Any]:
    """What training and sampling cost, for the provenance of every row."""
    cost, drawn = answers.get(TrainingCost()), answers.get(Samples())
    return {**(asdict(cost) if cost else {}), "samples_per_second": drawn.per_second if drawn else None}
