"""What is known of a contender, or of a reference row, at one setting of its sampler."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

from flowbench.core.contract import ContractError
from flowbench.data import DataSpec
from flowbench.evaluation.failures import Failure, Failures
from flowbench.evaluation.override import SamplerOverride
from flowbench.evaluation.probe import Probe, Setup
from flowbench.evaluation.protocols import CanSample
from flowbench.evaluation.samples import SampleSet
from flowbench.metrics import FeatureExtractor

__all__ = ["Answers", "UnansweredError", "ask_all"]

A = TypeVar("A")
Value = TypeVar("Value")


class UnansweredError(ValueError):
    """The answer that a metric needs could not be computed; the message is the reason."""


class Answers:
    """The answers to the probes of all metrics, by probe.

    ``answers[probe]`` is the answer, and None where the module has none. A metric that looks up an answer that could
    not be computed gets an :class:`UnansweredError`, which costs its own rows and no others.

    Args:
        spec: the data's shape and value grid.
        reference: real data that samples are compared with.
        held_out: real data that no model has seen.
        extractors: feature extractors by name.
        found: answers by the keys of their probes; a :class:`~flowbench.evaluation.failures.Failure` where an answer
            could not be computed.
        num_samples: samples that were to be drawn.
        override: what a sweep imposed on the sampler.
        guidance: scale of the samples' guidance, 1 = none; None where nothing can be guided.
        sampler: what the samples depend on beside the weights.
    """

    def __init__(
        self,
        spec: DataSpec,
        reference: SampleSet,
        held_out: SampleSet,
        extractors: Mapping[str, FeatureExtractor],
        found: Mapping[Hashable, Any],
        *,
        num_samples: int,
        override: SamplerOverride | None = None,
        guidance: float | None = None,
        sampler: str = "",
    ) -> None:
        self.spec, self.reference, self.held_out, self.extractors = spec, reference, held_out, extractors
        self._found = dict(found)
        self.num_samples = num_samples
        self.override = override or SamplerOverride()
        self.guidance, self.sampler = guidance, sampler
        self._computed: dict[Hashable, Any] = {}

    @classmethod
    def of(cls, setup: Setup, found: Mapping[Hashable, Any]) -> Answers:
        """The answers to probes that were asked with a setup."""
        module, override = setup.module, setup.override
        guidance, sampler = None, ""
        if isinstance(module, CanSample):
            facts = module.describe()
            guidance = facts.guidance_scale if override.guidance is None else override.guidance
            sampler = facts.sampler
        return cls(
            setup.data.spec,
            setup.reference,
            setup.held_out,
            setup.extractors,
            found,
            num_samples=setup.num_samples,
            override=override,
            guidance=guidance,
            sampler=sampler,
        )

    def __getitem__(self, probe: Probe[A]) -> A | None:
        """The answer to a probe.

        Raises:
            UnansweredError: when it could not be computed.
            ContractError: when nobody asked it: a metric names all its probes in :meth:`Metric.probes`.
        """
        key = probe.key()
        if key not in self._found:
            raise ContractError(f"{probe} was not asked: return it from the metric's method probes")
        answer = self._found[key]
        if isinstance(answer, Failure):
            raise UnansweredError(answer.reason)
        return cast("A | None", answer)

    def get(self, probe: Probe[A]) -> A | None:
        """The answer to a probe; None also where it could not be computed or nobody asked it."""
        answer = self._found.get(probe.key())
        return None if isinstance(answer, Failure) else cast("A | None", answer)

    def failure(self, probe: Probe[Any]) -> str:
        """Why a probe could not be answered; empty where it could."""
        answer = self._found.get(probe.key())
        return answer.reason if isinstance(answer, Failure) else ""

    def replaced(self, probe: Probe[A], answer: A) -> Answers:
        """The same with another answer to one probe."""
        found = {**self._found, probe.key(): answer}
        return Answers(
            self.spec,
            self.reference,
            self.held_out,
            self.extractors,
            found,
            num_samples=self.num_samples,
            override=self.override,
            guidance=self.guidance,
            sampler=self.sampler,
        )

    def once(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """What several methods of a metric use, computed when it is first needed."""
        if key not in self._computed:
            self._computed[key] = compute()
        return cast("Value", self._computed[key])


def ask_all(
    probes: Iterable[Probe[Any]], failures: Failures, answer: Callable[[Probe[Any]], Any]
) -> dict[Hashable, Any]:
    """Ask, on all processes; a probe without an answer costs no other one.

    Args:
        probes: of different keys.
        failures: keeps the mistakes of the code among the failures.
        answer: called with each probe.

    Returns:
        Answers and failures by the probes' keys.
    """
    return {probe.key(): failures.ask(partial(answer, probe)) for probe in probes}
