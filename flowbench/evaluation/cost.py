"""What training and sampling cost on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flowbench.evaluation.answers import Answers
from flowbench.evaluation.failures import agreed
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.probe import Probe, Setup
from flowbench.evaluation.product_rate import product_rate
from flowbench.evaluation.prospect import Prospect
from flowbench.evaluation.provenance import peak_memory_mb
from flowbench.evaluation.sampling import Samples
from flowbench.training import Budget, Preparation, TrainingModule

__all__ = ["Cost", "CostReport", "TrainingCost", "cost_of"]


@dataclass(frozen=True)
class Cost:
    """What a contender cost.

    Attributes:
        parameters: trainable parameters of the contender.
        train_seconds: wall time inside training steps, and before them; None where the training was not metered.
        train_flops: floating-point operations of training, or None.
        samples_seen: training samples, repeats included, or None.
        peak_memory_mb: highest memory of the process (resident on a CPU, allocated on a GPU), MiB.
        steps: optimiser steps of the training; 0 where they were not counted.
        product_rate: operations a second of large float32 products on this machine, over all processes; None where
            nothing was trained.
        optimizer_state_bytes: what the optimiser keeps between steps, over all processes, in float32.
        preparation: what was spent before the first step; a part of seconds and operations.
        required_flops: operations of the trainings of what it requires, no part of its own; None where unknown.
        validation: steps before the last validation of the training, and its loss; None where there was none.
    """

    parameters: int
    train_seconds: float | None
    train_flops: float | None
    samples_seen: int | None
    peak_memory_mb: float
    steps: int = 0
    product_rate: float | None = None
    optimizer_state_bytes: int | None = None
    validation: tuple[int, float] | None = None
    preparation: Preparation = field(default_factory=Preparation)
    required_flops: float | None = None

    @property
    def step_seconds(self) -> float | None:
        """Wall time inside training steps alone; None where the training was not metered."""
        return None if self.train_seconds is None else self.train_seconds - self.preparation.seconds

    @property
    def flop_utilisation(self) -> float | None:
        """Share of the product rate that training reached; None where one of them is unknown."""
        if not self.product_rate or not self.train_seconds or not self.train_flops:
            return None
        return self.train_flops / (self.train_seconds * self.product_rate)


def cost_of(module: TrainingModule, budget: Budget | None, world_size: int = 1) -> Cost:
    """What a module cost so far.

    Args:
        module: the module.
        budget: what its training spent; None where it was not metered.
        world_size: number of processes.
    """
    return Cost(
        parameters=sum(p.numel() for p in module.parameters() if p.requires_grad),
        train_seconds=budget.train_seconds if budget else None,
        train_flops=budget.train_flops if budget else None,
        samples_seen=budget.samples_seen if budget else None,
        peak_memory_mb=peak_memory_mb(module.device),
        steps=budget.steps if budget else 0,
        product_rate=world_size * product_rate(module.device) if budget and budget.steps else None,
        optimizer_state_bytes=4 * module.optimizer_config.num_moments(module),
        validation=max(module.validation_losses.items(), default=None),
        preparation=budget.preparation if budget else Preparation(),
        required_flops=module.required_flops,
    )


@dataclass(frozen=True)
class TrainingCost(Probe[Cost]):
    """What the module cost; the evaluator asks it last, so that the peak of the memory is that of the measurement."""

    def ask(self, setup: Setup) -> Cost | None:
        """The cost, on process 0."""
        with agreed():
            if setup.rank or not isinstance(setup.module, TrainingModule):
                return None
            return cost_of(setup.module, setup.budget, setup.world_size)


class CostReport(Metric):
    """What training and sampling cost on this machine."""

    declares = (
        MetricInfo("parameters", "none", "cost"),
        MetricInfo("train_flops", "none", "cost", always=False),
        # Of teachers and autoencoders: beside its own training, not a part of it.
        MetricInfo("required_flops", "none", "cost", always=False),
        MetricInfo("train_seconds", "down", "cost", always=False),
        MetricInfo("samples_seen", "none", "cost", always=False),
        MetricInfo("peak_memory", "down", "cost"),
        MetricInfo("optimizer_state_bytes", "down", "cost"),
        MetricInfo("validation_loss", "none", "cost", always=False),
        MetricInfo("samples_per_second", "up", "cost"),
        MetricInfo("step_milliseconds", "down", "cost", always=False),
        MetricInfo("flop_utilisation", "up", "cost", always=False),
        MetricInfo("network_evaluations", "down", "cost"),
        # Of what is made before the first step: a part of the two above.
        MetricInfo("preparation_flops", "none", "cost", always=False),
        MetricInfo("preparation_seconds", "none", "cost", always=False),
    )

    def probes(self) -> tuple[Probe[Any], ...]:
        """The cost, and the samples for their rate."""
        return Samples(), TrainingCost()

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`; reference rows cost nothing."""
        return () if who.module is None else tuple(info.name for info in self.declares)

    def measure(self, answers: Answers) -> list[Measurement]:
        """Parameters, operations, seconds (in all and a step), utilisation, memory, evaluations, samples per second.

        And what the optimiser keeps, what was spent before the first step and on what it requires, and the loss of the
        last validation, whose protocol names its step.
        """
        cost, drawn = answers[TrainingCost()], answers.get(Samples())
        if cost is None:
            return []
        known = [
            ("parameters", float(cost.parameters), ""),
            ("train_flops", cost.train_flops, "FLOP"),
            ("required_flops", cost.required_flops, "FLOP"),
            ("train_seconds", cost.train_seconds, "s"),
            ("samples_seen", cost.samples_seen, ""),
            ("peak_memory", cost.peak_memory_mb, "MiB"),
        ]
        rows = [(name, float(value), unit) for name, value, unit in known if value is not None]
        if drawn is not None and drawn.per_second is not None:
            rows.append(("samples_per_second", drawn.per_second, "1/s"))
        if cost.steps and cost.step_seconds is not None:
            rows.append(("step_milliseconds", 1000 * cost.step_seconds / cost.steps, "ms"))
        if cost.flop_utilisation is not None:
            rows.append(("flop_utilisation", cost.flop_utilisation, "of product rate"))
        if drawn is not None and drawn.network_evaluations is not None:
            rows.append(("network_evaluations", drawn.network_evaluations, "per sample"))
        if cost.optimizer_state_bytes is not None:
            rows.append(("optimizer_state_bytes", float(cost.optimizer_state_bytes), "bytes"))
        spent = cost.preparation
        if spent != Preparation():
            rows += [("preparation_flops", spent.flops, "FLOP"), ("preparation_seconds", spent.seconds, "s")]
        found = [Measurement(name, value, answers.num_samples, "cost", unit) for name, value, unit in rows]
        if cost.validation is not None:
            step, loss = cost.validation
            found.append(Measurement("validation_loss", loss, None, f"val/step-{step}"))
        return found
