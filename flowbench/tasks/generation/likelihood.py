"""The likelihood of the test split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import Tensor

from flowbench.data import FlowDataModule
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.densities import log_densities
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.probe import Probe, Setup
from flowbench.evaluation.prospect import Prospect
from flowbench.families import FlowModule
from flowbench.flows import bits_per_dim

__all__ = ["Densities", "LogDensities", "NegativeLogLikelihood"]


@dataclass(frozen=True)
class Densities:
    """Log-densities of the test split.

    Attributes:
        log_prob: in nats, shape (N,).
        kind: `exact`, `ode` or `bound`.
        method: solver and divergence; empty where they are closed form.
        reports_bits_per_dim: whether they may be given in bits per dimension: not those of a flow of noisy data.
        given_label: whether they are those of the points given their labels.
        dequantize: how grey levels were placed: `uniform`, or `none` for the centres of the bins.
    """

    log_prob: Tensor
    kind: str = "exact"
    method: str = ""
    reports_bits_per_dim: bool = True
    given_label: bool = False
    dequantize: str = "uniform"


@dataclass(frozen=True)
class LogDensities(Probe[Densities]):
    """The log-density of every test sample."""

    stage = "likelihood"

    def check(self, module: L.LightningModule, data: FlowDataModule) -> None:
        """Refuse a density that does not exist in the module's space."""
        if isinstance(module, FlowModule):
            module.check_density()

    def ask(self, setup: Setup) -> Densities | None:
        """Batch by batch of the test split; a collective."""
        flow = setup.module
        if not isinstance(flow, FlowModule):
            return None
        log_prob = log_densities(setup)
        assert log_prob is not None, "every flow has a density"
        facts = flow.describe()
        return Densities(
            log_prob,
            facts.likelihood,
            facts.likelihood_method,
            facts.reports_bits_per_dim,
            flow.num_classes is not None,
            setup.data.dequantize,
        )


class NegativeLogLikelihood(Metric):
    """Mean negative log-likelihood of the test split, with its kind in the protocol.

    Example:
        >>> from flowbench.evaluation import Evaluator
        >>> Evaluator({"nll": NegativeLogLikelihood()}, num_likelihood=1000).metrics["nll"].names
        ('nll',)
    """

    declares = (MetricInfo("nll", "down"),)

    def probes(self) -> tuple[Probe[Any], ...]:
        """The log-densities."""
        return (LogDensities(),)

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`; held-out data and noise have none."""
        has_density = isinstance(who.module, FlowModule) or (who.reference is not None and who.reference.has_density)
        return self.names if has_density else ()

    def measure(self, answers: Answers) -> list[Measurement]:
        """`nll`: bits/dim of uniformly dequantised data (an upper bound on the discrete one), else nats.

        The density of continuous data is that in the units of their file, see :attr:`flowbench.data.DataSpec.units`.
        The density of noisy data is in nats/dim: it is no code length, and the unit keeps it from being compared.
        """
        found, spec = answers[LogDensities()], answers.spec
        if found is None:
            return []
        log_prob, n = found.log_prob.double(), len(found.log_prob)
        protocol = self._protocol(found, spec.levels, spec.units is not None)
        if spec.levels is None:
            return [Measurement("nll", float(-log_prob.mean()) + spec.log_volume, n, protocol, "nats")]
        if not found.reports_bits_per_dim:
            return [Measurement("nll", float(-log_prob.mean()) / spec.num_dims, n, protocol, "nats/dim")]
        value = bits_per_dim(log_prob.mean(), spec.num_dims, spec.bin_width)
        return [Measurement("nll", float(value), n, protocol, "bits/dim")]

    @staticmethod
    def _protocol(found: Densities, levels: int | None, has_units: bool) -> str:
        """Kind, split, N, and whatever else moves the value: labels, the place in the bins, the solver."""
        parts = [found.kind, "test", str(len(found.log_prob))]
        if found.given_label:
            parts.append("given-label")
        if levels is not None:
            place = "uniform-dequantisation" if found.dequantize == "uniform" else "bin-centres"
            parts.append(f"{place}-{levels}-levels")
        if has_units:
            parts.append("data-units")
        return "/".join([*parts, found.method] if found.method else parts)
