"""Metrics of the flow itself: its likelihood, its paths, its cost."""

from __future__ import annotations

from flowbench import metrics as pure
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.subject import Measurement, Subject
from flowbench.flows import bits_per_dim

__all__ = ["CostReport", "NegativeLogLikelihood", "PathStraightness"]


class NegativeLogLikelihood(Metric):
    """Mean negative log-likelihood of the test split, with its kind in the protocol."""

    def measure(self, subject: Subject) -> list[Measurement]:
        """`nll`: bits/dim of uniformly dequantised data (an upper bound on the discrete one), else nats.

        The density of noisy data is in nats/dim: it is no code length, and the unit keeps it from being compared.
        """
        if subject.log_prob is None:
            return []
        log_prob, n = subject.log_prob.double(), len(subject.log_prob)
        protocol = self._protocol(subject, n)
        if subject.spec.levels is None:
            return [Measurement("nll", float(-log_prob.mean()), n, protocol, "nats")]
        if not subject.in_bits:
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
        return "/".join([*parts, subject.likelihood_method] if subject.likelihood_method else parts)


class PathStraightness(Metric):
    """Straightness, path energy and its split, normalised path energy and path length ratio."""

    def measure(self, subject: Subject) -> list[Measurement]:
        """Means over paths; squared data units summed over dimensions, except the pure ratios."""
        if subject.geometry is None:
            return []
        summary, n = subject.geometry.mean(), len(subject.geometry.straightness)
        protocol, unit = f"{subject.space}/{n}-paths", f"squared {subject.space.split(' ')[0]} units"
        rows = [
            Measurement(name, summary[name], n, protocol, unit)
            for name in ("straightness", "path_energy", "displacement")
        ]
        rows.append(Measurement("path_length_ratio", summary["path_length_ratio"], n, protocol))
        if subject.transport_cost is not None:
            value = pure.normalized_path_energy(summary["path_energy"], subject.transport_cost)
            rows.append(Measurement("npe", value, n, f"{protocol}/w2-squared={subject.transport_cost:.4f}"))
        return rows


class CostReport(Metric):
    """What training and sampling cost on this machine."""

    def measure(self, subject: Subject) -> list[Measurement]:
        """Parameters, operations, seconds, memory, evaluations per sample and samples per second."""
        cost, n = subject.cost, len(subject.samples)
        if cost is None:
            return []
        rows = [
            ("parameters", float(cost.parameters), ""),
            ("train_flops", cost.train_flops, "FLOP"),
            ("train_seconds", cost.train_seconds, "s"),
            ("samples_seen", float(cost.samples_seen), ""),
            ("peak_memory", cost.peak_memory_mb, "MiB"),
            ("samples_per_second", cost.samples_per_second, "1/s"),
        ]
        if subject.network_evaluations is not None:
            rows.append(("network_evaluations", subject.network_evaluations, "per sample"))
        return [Measurement(name, value, n, "cost", unit) for name, value, unit in rows]
