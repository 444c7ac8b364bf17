"""What a flow answered to the questions of a measurement, or why it has no answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from flowbench.data import DataSpec, FlowDataModule
from flowbench.evaluation.artifacts import save_pictures, save_samples, save_trajectories
from flowbench.evaluation.drawing import Imposed, Paths, space_name
from flowbench.evaluation.failures import Failure, Failures
from flowbench.evaluation.pictures import log_pictures, log_samples
from flowbench.evaluation.samples import DrawnSet, SampleSet, UndrawnSet
from flowbench.evaluation.subject import BoundTerms, ConditionScore, Part, Reconstructions, Subject
from flowbench.evaluation.transport_cost import transport_cost
from flowbench.families import FlowModule

__all__ = ["Answers", "Drawn", "fill", "rate_of", "sample_set", "show", "subjects_of"]

Drawn = tuple[DrawnSet, float, float]
"""Samples, mean network evaluations per sample, samples per second of this process."""


@dataclass(frozen=True)
class Answers:
    """The answers of all processes; see the fields of :class:`~flowbench.evaluation.Subject`.

    Attributes:
        log_prob: log-densities of the test split, shape (N,).
        samples: by the flow's own sampler.
        paths: None where no metric looks at them.
        reconstructions: None where there is no autoencoder, or no metric looks at them.
        conditions: None where no metric looks at them.
        bound: None where there is no autoencoder, or no metric looks at it.
        sweep: samples at each point.
    """

    log_prob: Tensor | Failure
    samples: Drawn | Failure
    paths: Paths | Failure | None
    reconstructions: Reconstructions | Failure | None
    conditions: dict[str, ConditionScore] | Failure | None
    bound: BoundTerms | Failure | None
    sweep: list[tuple[Imposed, Drawn | Failure]]


def fill(subject: Subject, part: Part, answer: Any) -> None:
    """Give a subject one of its parts, or the reason why it is missing."""
    if isinstance(answer, Failure):
        subject.missing[part] = answer.reason
    else:
        setattr(subject, part, answer)


def rate_of(drawn: Drawn | Failure) -> float | None:
    """Samples per second; None where none were drawn."""
    return None if isinstance(drawn, Failure) else drawn[2]


def sample_set(spec: DataSpec, drawn: Drawn | Failure, count: int) -> SampleSet:
    """The samples of an answer; where there are none, `count` that nobody has."""
    return UndrawnSet(spec, "generated", count) if isinstance(drawn, Failure) else drawn[0]


def subjects_of(
    flow: FlowModule,
    data: FlowDataModule,
    answers: Answers,
    make: Callable[[Drawn | Failure], Subject],
    failures: Failures,
    seed: int,
) -> list[Subject]:
    """What the metrics look at, on process 0.

    Args:
        flow: who answered.
        data: its data.
        answers: of all processes.
        make: a subject of samples that nothing else is known of.
        failures: keeps the mistakes of the code among the failures.
        seed: the evaluation seed.

    Returns:
        The flow's own samples, then those of every point of the sweep.
    """
    main, paths = make(answers.samples), answers.paths
    fill(main, "log_prob", answers.log_prob)
    main.likelihood, main.likelihood_method = flow.likelihood, flow.likelihood_method
    main.reports_bits_per_dim, main.given_label = flow.reports_bits_per_dim, flow.num_classes is not None
    main.dequantize = data.dequantize
    fill(main, "geometry", paths.geometry if isinstance(paths, Paths) else paths)
    main.space = space_name(flow)
    transport = failures.compute(lambda: transport_cost(flow, data, seed))
    if isinstance(transport, Failure):
        fill(main, "transport_cost", transport)
    else:
        main.transport_cost, main.transport_origin = transport
    fill(main, "reconstructions", answers.reconstructions)
    fill(main, "condition_scores", answers.conditions)
    fill(main, "bound_terms", answers.bound)
    main.guidance, main.sampler = flow.guidance_scale, flow.sampler_name
    return [main, *(_swept(flow, make(drawn), point, drawn) for point, drawn in answers.sweep)]


def _swept(flow: FlowModule, subject: Subject, point: Imposed, drawn: Drawn | Failure) -> Subject:
    """The samples at one point of a sweep."""
    if isinstance(drawn, Failure):
        subject.network_evaluations = point.network_evaluations
    subject.swept, subject.at, subject.sampler = point.swept, point.at, flow.sampler_name
    subject.guidance = flow.guidance_scale if point.guidance is None else point.guidance
    return subject


def show(
    trainer: L.Trainer,
    flow: FlowModule,
    main: Subject,
    paths: Paths | Failure | None,
    pictures: Mapping[str, Tensor],
    num_pictures: int,
    step: int,
) -> None:
    """Leave samples, paths and pictures in the run's folder and in TensorBoard, as far as there are some.

    Args:
        trainer: whose folder and logger.
        flow: whose samples.
        main: its samples.
        paths: its paths.
        pictures: the metrics' by name.
        num_pictures: samples to keep.
        step: of the training, for TensorBoard.
    """
    run_dir = Path(trainer.default_root_dir)
    if isinstance(main.samples, DrawnSet):
        save_samples(run_dir, main.samples.shown, flow.spec, num_pictures)
        log_samples(trainer, main.samples.shown[:num_pictures], flow.spec, "test/samples", step)
    if isinstance(paths, Paths):
        states = torch.stack([flow.space.decode(state) for state in paths.shown.to(flow.device)])
        save_trajectories(run_dir, states, paths.times)
    save_pictures(run_dir, pictures)
    log_pictures(trainer, pictures, "test", step)
