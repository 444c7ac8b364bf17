"""Metrics of the flow itself: its likelihood, its paths, its training pairs, its cost."""

from __future__ import annotations

from flowbench import metrics as pure
from flowbench.core.checks import check_count
from flowbench.evaluation.measurement import Measurement, MetricInfo, unmeasured
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.prospect import Prospect
from flowbench.evaluation.subject import Subject
from flowbench.flows import bits_per_dim

__all__ = ["CostReport", "NegativeLogLikelihood", "PathStraightness", "TrainingPairs"]


class NegativeLogLikelihood(Metric):
    """Mean negative log-likelihood of the test split, with its kind in the protocol."""

    declares = (MetricInfo("nll", "down"),)
    needs = ("log_prob",)

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`; held-out data and noise have none."""
        return self.names if who.has_density else ()

    def measure(self, subject: Subject) -> list[Measurement]:
        """`nll`: bits/dim of uniformly dequantised data (an upper bound on the discrete one), else nats.

        The density of continuous data is that in the units of their file, see :attr:`flowbench.data.DataSpec.units`.
        The density of noisy data is in nats/dim: it is no code length, and the unit keeps it from being compared.
        """
        if subject.log_prob is None:
            return []
        log_prob, n = subject.log_prob.double(), len(subject.log_prob)
        protocol = self._protocol(subject, n)
        if subject.spec.levels is None:
            return [Measurement("nll", float(-log_prob.mean()) + subject.spec.log_volume, n, protocol, "nats")]
        if not subject.reports_bits_per_dim:
            return [Measurement("nll", float(-log_prob.mean()) / subject.spec.num_dims, n, protocol, "nats/dim")]
        value = bits_per_dim(log_prob.mean(), subject.spec.num_dims, subject.spec.bin_width)
        return [Measurement("nll", float(value), n, protocol, "bits/dim")]

    def _protocol(self, subject: Subject, n: int) -> str:
        """Kind, split, N, and whatever else moves the value: labels, the place in the bins, the solver."""
        parts = [subject.likelihood, "test", str(n)]
        if subject.given_label:
            parts.append("given-label")
        if subject.spec.levels is not None:
            place = "uniform-dequantisation" if subject.dequantize == "uniform" else "bin-centres"
            parts.append(f"{place}-{subject.spec.levels}-levels")
        if subject.spec.units is not None:
            parts.append("data-units")
        return "/".join([*parts, subject.likelihood_method] if subject.likelihood_method else parts)


class PathStraightness(Metric):
    """Straightness, curvature, path energy and its split, normalised path energy and path length ratio."""

    declares = (
        MetricInfo("straightness", "down", "transport"),
        MetricInfo("path_energy", "down", "transport"),
        MetricInfo("displacement", "none", "transport"),
        MetricInfo("path_length_ratio", "down", "transport"),
        MetricInfo("curvature", "down", "transport", always=False),
        MetricInfo("one_step_error", "down", "transport", always=False),
        MetricInfo("npe", "zero", "transport", always=False),
        MetricInfo("npe_curvature", "down", "transport", always=False),
        MetricInfo("npe_coupling", "zero", "transport", always=False),
    )
    needs = ("geometry",)

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`; :meth:`measure` tells what does not apply."""
        if who.flow is None:
            return ()
        fields = ("curvature", "one_step_error") if who.flow.is_continuous else ()
        transport = ("npe", "npe_curvature", "npe_coupling") if who.spec.modality == "vector" else ()
        return (*self.names, *fields, *transport)

    def measure(self, subject: Subject) -> list[Measurement]:
        """Means over paths; squared data units summed over dimensions, except the pure ratios.

        What does not apply has no row: `curvature` and `one_step_error` of block flows, `npe` and its two parts
        without a reference W2 between source and data.
        """
        if subject.geometry is None:
            return []
        summary, n = subject.geometry.mean(), len(subject.geometry.straightness)
        protocol, unit = f"{subject.space}/{n}-paths", f"squared {subject.space.split(' ')[0]} units"
        rows = [
            Measurement(name, summary[name], n, protocol, unit)
            for name in ("straightness", "path_energy", "displacement", "curvature", "one_step_error")
            if name in summary
        ]
        rows.append(Measurement("path_length_ratio", summary["path_length_ratio"], n, protocol))
        if reason := subject.reason(["transport_cost"]):
            rows += unmeasured(("npe", "npe_curvature", "npe_coupling"), reason)
        if subject.transport_cost is not None:
            protocol += f"/{subject.transport_origin}-w2-squared={subject.transport_cost:.4f}"
            parts = pure.PathEnergySplit.of(summary["straightness"], summary["displacement"], subject.transport_cost)
            values = {"npe": parts.total, "npe_curvature": parts.curvature, "npe_coupling": parts.coupling}
            rows += [Measurement(name, value, n, protocol) for name, value in values.items()]
        return rows


class TrainingPairs(Metric):
    """What the pairs that the flow was trained on look like: their weights, their tilts, their cost.

    The numbers come from the family (`Subject.training_pairs`): of a weighted flow `ess`, the effective share of the
    batch, and `tilt_source` and `tilt_target`, the squared coefficients of variation of its marginal tilts; of a
    coupled one `cost_ratio`, its transport cost over that of independent pairs; and others of the same kind. They
    describe the training objective: samples are not looked at.

    Args:
        num_pairs: pairs to draw, >= 2, as in training, at a fixed seed.

    Raises:
        ValueError: for fewer than two pairs.
    """

    declares = (
        MetricInfo("ess", "up", "transport", always=False),
        MetricInfo("tilt_source", "down", "transport", always=False),
        MetricInfo("tilt_target", "down", "transport", always=False),
        # A cheaper plan may be a better coupling or a tilt of the marginals: the share of the tilt tells which.
        MetricInfo("tilt_share", "none", "transport", always=False),
        MetricInfo("weighted_norm_ratio", always=False),
        MetricInfo("cost_ratio", "none", "transport", always=False),
    )
    needs = ("training_pairs",)

    def __init__(self, num_pairs: int = 4096) -> None:
        check_count("num_pairs", num_pairs, at_least=2)
        self.num_pairs = num_pairs

    def expected(self, who: Prospect) -> tuple[str, ...] | None:
        """See :meth:`Metric.expected`: what the family reports of its pairs."""
        return () if who.flow is None else who.flow.training_pair_names

    def measure(self, subject: Subject) -> list[Measurement]:
        """One row for each number of the family's; none where it has nothing to say of its pairs."""
        protocol = f"training-pairs/{self.num_pairs}"
        known = subject.training_pairs or {}
        return [Measurement(name, value, self.num_pairs, protocol) for name, value in known.items()]


class CostReport(Metric):
    """What training and sampling cost on this machine."""

    declares = (
        MetricInfo("parameters", "none", "cost"),
        MetricInfo("train_flops", "none", "cost"),
        MetricInfo("train_seconds", "down", "cost"),
        MetricInfo("samples_seen", "none", "cost"),
        MetricInfo("peak_memory", "down", "cost"),
        MetricInfo("samples_per_second", "up", "cost"),
        MetricInfo("step_milliseconds", "down", "cost", always=False),
        MetricInfo("flop_utilisation", "up", "cost", always=False),
        MetricInfo("network_evaluations", "down", "cost"),
    )
    needs = ()

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`; what nobody trains costs nothing."""
        return () if who.flow is None else tuple(info.name for info in self.declares)

    def measure(self, subject: Subject) -> list[Measurement]:
        """Parameters, operations, seconds (in all and a step), utilisation, memory, evaluations, samples per second."""
        cost, n = subject.cost, len(subject.samples)
        if cost is None:
            return []
        rows = [
            ("parameters", float(cost.parameters), ""),
            ("train_flops", cost.train_flops, "FLOP"),
            ("train_seconds", cost.train_seconds, "s"),
            ("samples_seen", float(cost.samples_seen), ""),
            ("peak_memory", cost.peak_memory_mb, "MiB"),
        ]
        if cost.samples_per_second is not None:
            rows.append(("samples_per_second", cost.samples_per_second, "1/s"))
        if cost.steps:
            rows.append(("step_milliseconds", 1000 * cost.train_seconds / cost.steps, "ms"))
        if cost.flop_utilisation is not None:
            rows.append(("flop_utilisation", cost.flop_utilisation, "of product rate"))
        if subject.network_evaluations is not None:
            rows.append(("network_evaluations", subject.network_evaluations, "per sample"))
        return [Measurement(name, value, n, "cost", unit) for name, value, unit in rows]
