"""The one evaluator, for every family."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from flowbench.data import FlowDataModule
from flowbench.evaluation.artifacts import save_samples, save_trajectories
from flowbench.evaluation.extractors import get_extractor
from flowbench.evaluation.gather import gather_by_index, shard
from flowbench.evaluation.metrics import Metric, PathStraightness
from flowbench.evaluation.pictures import log_hyperparameters, log_samples
from flowbench.evaluation.provenance import environment, peak_memory_mb
from flowbench.evaluation.reference import reference_subjects, score
from flowbench.evaluation.subject import Cost, Measurement, SampleSet, Subject
from flowbench.families import Budget, FlowModule, Samples, Trajectory
from flowbench.metrics import (
    FeatureExtractor,
    PathGeometry,
    block_geometry,
    path_geometry,
    wasserstein2_squared,
)
from flowbench.rows import Row, write_rows
from flowbench.seeds import derive_seed
from flowbench.storage import write_text

__all__ = ["Evaluator", "Identity"]

# Points on either side of the reference W2 between source and data.
TRANSPORT_POINTS = 2048


@dataclass(frozen=True)
class Identity:
    """Who is measured, for the rows.

    Attributes:
        bench: name of the bench, or empty.
        task: name of the task, or empty.
        contender: name of the contender.
        seed: training seed.
        config_hash: fingerprint of the resolved configuration.
    """

    bench: str = ""
    task: str = ""
    contender: str = ""
    seed: int = 0
    config_hash: str = ""


class Evaluator(L.Callback):
    """Scores a flow after training, and a little during it.

    All noise is keyed by (seed, sample index): contenders share it, and one process or several draw the same samples.
    Features are gathered in the order of their indices and every statistic is computed once, on process 0.

    Args:
        metrics: what to measure, by any name.
        num_samples: samples to draw for the sample metrics.
        batch_size: samples drawn at a time by one process; changes results only of adaptive solvers, whose steps
            follow their batch.
        reference: split that samples are compared with.
        held_out: split that the row `floor` scores as if it were generated.
        seed: the evaluation seed.
        weights: `ema` for the averaged weights, `raw` for the live ones; a flow that keeps no average is measured,
            and its rows are marked, `raw`.
        sweep: `{network_evaluations: [1, 2, 4, ...]}`: budgets to sample with from the same weights, for families
            that can choose.
        curve: names of metrics to measure at every validation during training, with the same weights.
        num_trajectories: paths for the geometry metrics.
        trajectory_points: states along each path of a continuous flow.
        num_pictures: samples to keep for pictures.

    Raises:
        ValueError: for counts below 1, or a curve of a metric that is not there.
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
        sweep: dict[str, list[int]] | None = None,
        curve: list[str] | None = None,
        num_trajectories: int = 256,
        trajectory_points: int = 33,
        num_pictures: int = 64,
    ) -> None:
        for name, value in (
            ("num_samples", num_samples),
            ("batch_size", batch_size),
            ("num_pictures", num_pictures),
            ("num_trajectories", num_trajectories),
        ):
            if value < 1:
                raise ValueError(f"evaluator.{name} must be >= 1, got {value}")
        if trajectory_points < 2:
            raise ValueError(f"evaluator.trajectory_points must be >= 2, got {trajectory_points}")
        if reference == held_out:
            raise ValueError(f"evaluator.reference and held_out are both {reference}: the floor would be zero")
        if set(sweep or {}) - {"network_evaluations"}:
            raise ValueError(f"evaluator.sweep goes over network_evaluations alone, got {', '.join(sweep or {})}")
        self.sweep = list((sweep or {}).get("network_evaluations", []))
        for budget in self.sweep:
            if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
                raise ValueError(f"evaluator.sweep.network_evaluations must be whole numbers >= 1, got {budget!r}")
        self.metrics: dict[str, Metric] = dict(metrics or {})
        self.curve = list(curve or [])
        for name in self.curve:
            if name not in self.metrics:
                raise ValueError(f"evaluator.curve names {name}, which is not in evaluator.metrics")
        self.num_samples, self.batch_size, self.num_pictures = num_samples, batch_size, num_pictures
        self.reference, self.held_out = reference, held_out
        self.seed = seed
        self.weights: Literal["ema", "raw"] = weights
        self.num_trajectories, self.trajectory_points = num_trajectories, trajectory_points
        self.identity = Identity()
        self.budget: Budget | None = None
        self.rows: list[Row] = []
        self._stack = ExitStack()
        self._log_prob: list[tuple[Tensor, Tensor]] = []
        # Reference samples and feature networks of the data measured last.
        self._prepared: tuple[FlowDataModule, SampleSet, dict[str, FeatureExtractor]] | None = None

    # ---- hooks ----------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Refuse before the training, not after it, what cannot be measured.

        Raises:
            ValueError: when the module is no flow, or its sampler cannot do a budget of the sweep.
        """
        flow = _flow(module)
        labels = self._labels(flow, trainer)
        condition = labels[:1].to(flow.device) if labels is not None else None
        with torch.no_grad(), flow.evaluating(self.weights):
            for n in self.sweep if flow.sweeps else ():
                flow.sample(flow.draw_noise(torch.zeros(1), self.seed), condition, network_evaluations=n)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """A point of quality against training, and a picture in TensorBoard."""
        # `flowbench validate` runs this hook too, and must not touch the curve of the training.
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if training and self.curve:
            self._measure_curve(trainer, _flow(module))

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Make up for the point that a run killed between its checkpoint and its validation has lost."""
        step, every = trainer.global_step, trainer.val_check_batch
        due = trainer.enable_validation and every and step and step * trainer.accumulate_grad_batches % every == 0
        missing = bool(due and self.curve) and step not in self._curve_steps(trainer)
        # Process 0 decides for all: it may have written the file before another one reads it.
        if trainer.strategy.broadcast(missing):
            self._measure_curve(trainer, _flow(module))

    def _measure_curve(self, trainer: L.Trainer, module: FlowModule) -> None:
        with torch.no_grad(), module.evaluating(self.weights):
            samples, evaluations, _ = self._draw(module, trainer)
            if trainer.is_global_zero:
                subject = self._subject(module, trainer, samples, evaluations)
                chosen = {name: self.metrics[name] for name in self.curve}
                measured = list(score(subject, chosen))
                self._append_curve(trainer, measured)
                log_samples(trainer, samples[: self.num_pictures], module.spec, "val/samples", trainer.global_step)
        trainer.strategy.barrier("flowbench.curve")

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Put the chosen weights in place until the test ends, however it ends.

        Raises:
            ValueError: when the trainer forbids the gradients that likelihoods need.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError("likelihoods of continuous flows need gradients: set trainer.inference_mode=false")
        self._stack = ExitStack()
        self._stack.enter_context(_flow(module).evaluating(self.weights))
        self._log_prob = []

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
        self._log_prob.append((outputs["index"].cpu(), outputs["log_prob"].cpu()))

    def on_test_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Draw, measure, write."""
        flow = _flow(module)
        with torch.no_grad():
            self._evaluate(trainer, flow)
        trainer.strategy.barrier("flowbench.test")

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Give the live weights back."""
        self._stack.close()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Give the live weights back."""
        self._stack.close()

    # ---- evaluation -----------------------------------------------------------------------------------

    def _evaluate(self, trainer: L.Trainer, flow: FlowModule) -> None:
        index = torch.cat([i for i, _ in self._log_prob])
        log_prob = gather_by_index(index, torch.cat([v for _, v in self._log_prob]))
        samples, evaluations, rate = self._draw(flow, trainer)
        geometry, states, times = self._paths(flow, trainer)
        sweep = [self._draw(flow, trainer, n)[:2] for n in self.sweep if flow.sweeps]
        if not trainer.is_global_zero:
            return
        main = self._subject(flow, trainer, samples, evaluations)
        main.log_prob, main.likelihood, main.likelihood_method = log_prob, flow.likelihood, flow.likelihood_method
        main.given_label, main.dequantize = flow.num_classes is not None, _data(trainer).dequantize
        main.geometry, main.space = geometry, _space_name(flow)
        main.transport_cost = self._transport_cost(flow, trainer)
        main.cost = self._cost(flow, rate)
        subjects = [main]
        for swept, n in sweep:
            subject = self._subject(flow, trainer, swept, n)
            subject.swept = True
            subjects.append(subject)
        provenance = {**self._provenance(trainer), **asdict(main.cost)}
        weights = self.weights if flow.ema else "raw"
        self.rows = [
            self._row(self.identity.contender, type(flow).__name__, subject, m, weights, provenance)
            for subject in subjects
            for m in score(subject, self.metrics)
        ]
        run_dir = Path(trainer.default_root_dir)
        save_samples(run_dir, samples, flow.spec, self.num_pictures)
        if len(states):
            shown = states[:, : self.num_pictures].to(flow.device)
            save_trajectories(run_dir, torch.stack([flow.space.decode(state) for state in shown]), times)
        write_rows(run_dir / "rows.jsonl", self.rows)
        # A trainer that only measures has not counted the steps behind the checkpoint.
        step = self.budget.steps if self.budget else trainer.global_step
        log_samples(trainer, samples[: self.num_pictures], flow.spec, "test/samples", step)
        log_hyperparameters(trainer, self.rows, asdict(self.identity))

    def _draw(
        self, flow: FlowModule, trainer: L.Trainer, network_evaluations: int | None = None
    ) -> tuple[Tensor, float, float]:
        """Samples by index, mean evaluations per sample, samples per second of this process."""
        index = shard(self.num_samples, trainer.global_rank, trainer.world_size)
        labels = self._labels(flow, trainer)

        def draw(chunk: Tensor) -> Samples:
            condition = labels[chunk].to(flow.device) if labels is not None else None
            return flow.sample(flow.draw_noise(chunk, self.seed), condition, network_evaluations=network_evaluations)

        draw(index[:2])  # the first call allocates and compiles, which is no part of the rate
        parts, costs, seconds = [], [], 0.0
        for chunk in index.split(self.batch_size):
            drawn = draw(chunk)
            parts.append(drawn.x)
            # An adaptive solver's cost differs from batch to batch.
            costs.append(torch.full((len(chunk),), drawn.network_evaluations, dtype=torch.float64))
            seconds += drawn.seconds
        samples, cost = (gather_by_index(index, torch.cat(each)) for each in (parts, costs))
        return samples, float(cost.mean()), len(index) / seconds

    def _labels(self, flow: FlowModule, trainer: L.Trainer) -> Tensor | None:
        """Labels of a conditional flow's samples: drawn from the reference split by the evaluation seed."""
        if flow.num_classes is None:
            return None
        label = _data(trainer).split(self.reference).label
        assert label is not None, "a conditional flow has labelled data"
        rng = torch.Generator().manual_seed(derive_seed(self.seed, "labels"))
        return label[torch.randint(len(label), (self.num_samples,), generator=rng)]

    def _paths(self, flow: FlowModule, trainer: L.Trainer) -> tuple[PathGeometry | None, Tensor, Tensor]:
        """Geometry of the flow's paths; states (T, B, *D) of the first ones for pictures, and their times."""
        if not any(isinstance(metric, PathStraightness) for metric in self.metrics.values()):
            return None, torch.empty(0), torch.empty(0)
        index = shard(self.num_trajectories, trainer.global_rank, trainer.world_size)
        labels = self._labels(flow, trainer)
        geometries, states = [], []
        times = torch.empty(0)
        for chunk in index.split(self.batch_size):
            condition = labels[chunk % self.num_samples].to(flow.device) if labels is not None else None
            path = flow.trajectory(flow.draw_noise(chunk, self.seed), condition, self.trajectory_points)
            geometries.append(_geometry(path))
            states.append(path.states.transpose(0, 1))
            times = path.times
        local = PathGeometry.concatenate(geometries)
        gathered = {name: gather_by_index(index, value) for name, value in vars(local).items()}
        return PathGeometry(**gathered), gather_by_index(index, torch.cat(states)).transpose(0, 1), times

    def _subject(self, flow: FlowModule, trainer: L.Trainer, samples: Tensor, evaluations: float) -> Subject:
        data = _data(trainer)
        _, real, extractors = self._prepare(data)
        generated = SampleSet(samples, data.spec, "generated")
        return Subject(data.spec, generated, real, network_evaluations=evaluations, extractors=extractors)

    def _prepare(self, data: FlowDataModule) -> tuple[FlowDataModule, SampleSet, dict[str, FeatureExtractor]]:
        """Load the reference and the feature networks once per datamodule, not once per point of a sweep."""
        if self._prepared is None or self._prepared[0] is not data:
            names = {metric.features for metric in self.metrics.values() if metric.features is not None}
            real = SampleSet(data.model_values(self.reference), data.spec, self.reference)
            self._prepared = data, real, {name: get_extractor(name, data) for name in sorted(names)}
        return self._prepared

    def extractors(self, data: FlowDataModule) -> dict[str, FeatureExtractor]:
        """The feature extractors that the metrics name, with their weights."""
        return self._prepare(data)[2]

    def _transport_cost(self, flow: FlowModule, trainer: L.Trainer) -> float | None:
        """Squared W2 between source and data for points; in many dimensions its estimate is mostly bias."""
        if flow.spec.modality != "vector":
            return None
        real = _data(trainer).model_values("train")[:TRANSPORT_POINTS]
        noise = flow.draw_noise(torch.arange(len(real)), derive_seed(self.seed, "transport"))
        return wasserstein2_squared(noise.cpu(), real)

    def _cost(self, flow: FlowModule, rate: float) -> Cost:
        budget = self.budget
        return Cost(
            parameters=sum(p.numel() for p in flow.parameters() if p.requires_grad),
            train_seconds=budget.train_seconds if budget else 0.0,
            train_flops=budget.train_flops if budget else 0.0,
            samples_seen=budget.samples_seen if budget else 0,
            peak_memory_mb=peak_memory_mb(flow.device),
            samples_per_second=rate,
        )

    # ---- records --------------------------------------------------------------------------------------

    def _provenance(self, trainer: L.Trainer) -> dict[str, Any]:
        data = _data(trainer)
        return {
            **environment(),
            "config_hash": self.identity.config_hash,
            "world_size": trainer.world_size,
            "global_batch": data.batch_size * trainer.accumulate_grad_batches,
            "precision": str(trainer.precision),
            "evaluation_seed": self.seed,
            "dataset_version": data.spec.version,
            "extractors": {name: e.checksum[:16] for name, e in self.extractors(data).items()},
        }

    def _row(
        self,
        contender: str,
        family: str,
        subject: Subject,
        m: Measurement,
        weights: str,
        provenance: dict[str, Any],
    ) -> Row:
        return Row(
            bench=self.identity.bench,
            task=self.identity.task,
            contender=contender,
            family=family,
            dataset=subject.spec.name,
            seed=self.identity.seed,
            metric=m.metric,
            value=m.value,
            n=m.n,
            protocol=m.protocol,
            unit=m.unit,
            network_evaluations=subject.network_evaluations,
            weights=weights,
            provenance=provenance,
        )

    def reference_rows(self, data: FlowDataModule) -> Iterator[Row]:
        """Rows of `floor`, `noise`, `gaussian` and `gmm`: they belong to the data, not to a contender or a seed."""
        extractors = self.extractors(data)
        provenance = {
            **environment(),
            "evaluation_seed": self.seed,
            "dataset_version": data.spec.version,
            "extractors": {name: e.checksum[:16] for name, e in extractors.items()},
        }
        subjects = reference_subjects(
            data,
            extractors,
            num_samples=self.num_samples,
            reference=self.reference,
            held_out=self.held_out,
            seed=self.seed,
        )
        for name, subject in subjects:
            for m in score(subject, self.metrics):
                yield self._row(name, "reference", subject, m, "none", provenance)

    def _curve_steps(self, trainer: L.Trainer) -> set[int]:
        path = Path(trainer.default_root_dir) / "curve.jsonl"
        return {json.loads(line)["step"] for line in path.read_text().splitlines()} if path.is_file() else set()

    def _append_curve(self, trainer: L.Trainer, measured: list[Measurement]) -> None:
        """Append to curve.jsonl; a resumed run drops what lies beyond its checkpoint."""
        path = Path(trainer.default_root_dir) / "curve.jsonl"
        budget = self.budget
        point: dict[str, Any] = {"step": trainer.global_step}
        if budget is not None:
            point |= {
                "samples_seen": budget.samples_seen,
                "train_seconds": budget.train_seconds,
                "train_flops": budget.train_flops,
            }
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] < trainer.global_step]
        kept += [json.dumps({**point, "metric": m.metric, "value": m.value}) for m in measured]
        write_text(path, "".join(f"{line}\n" for line in kept))
        if trainer.logger is not None:
            values: Mapping[str, float] = {f"val/{m.metric}": m.value for m in measured}
            trainer.logger.log_metrics(dict(values), step=trainer.global_step)


def _geometry(path: Trajectory) -> PathGeometry:
    """Geometry of the paths; of paths that diverged it is NaN, which costs these rows and no others."""
    finite = bool(path.states.isfinite().all()) and (path.velocities is None or bool(path.velocities.isfinite().all()))
    if not finite:
        lost = torch.full((path.states.shape[1],), torch.nan, dtype=torch.float64)
        return PathGeometry(**{field.name: lost for field in fields(PathGeometry)})
    if path.velocities is None:
        return block_geometry(path.states, path.times)
    return path_geometry(path.states, path.velocities, path.times)


def _flow(module: L.LightningModule) -> FlowModule:
    if not isinstance(module, FlowModule):
        raise ValueError(f"the evaluator measures flows, got {type(module).__name__}: remove the section evaluator")
    return module


def _data(trainer: L.Trainer) -> FlowDataModule:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, FlowDataModule):
        raise ValueError("the evaluator needs a FlowDataModule: pass datamodule=FlowDataModule(...) to the trainer")
    return data


def _space_name(flow: FlowModule) -> str:
    if flow.likelihood != "bound":
        return "data"
    return "latent " + "x".join(str(size) for size in flow.flow_shape)
