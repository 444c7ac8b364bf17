"""What the pairs of training look like."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from flowbench.core.checks import check_count
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.failures import agreed
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.probe import Probe, Setup
from flowbench.evaluation.prospect import Prospect
from flowbench.families import FlowModule

__all__ = ["Pairs", "TrainingPairs"]


@dataclass(frozen=True)
class Pairs(Probe[dict[str, float]]):
    """Numbers of the pairs that a flow is trained on, by metric name.

    Attributes:
        num_pairs: pairs to draw.
    """

    num_pairs: int

    def key(self) -> Hashable:
        """Other numbers of pairs have other answers."""
        return self

    def ask(self, setup: Setup) -> dict[str, float] | None:
        """What the family reports, on process 0."""
        with agreed():
            if setup.rank or not isinstance(setup.module, FlowModule):
                return None
            return setup.module.training_pairs(setup.data, self.num_pairs, setup.seed)


class TrainingPairs(Metric):
    """What the pairs that the flow was trained on look like: their weights, their tilts, their cost.

    The numbers come from the family: of a weighted flow `ess`, the effective share of the batch, and `tilt_source` and
    `tilt_target`, the squared coefficients of variation of its marginal tilts; of a coupled one `cost_ratio`, its
    transport cost over that of independent pairs; of one that looks data points up `chi2`, the squared coefficient of
    variation of how often each is drawn. They describe the training objective:
    samples are not looked at.

    Args:
        num_pairs: pairs to draw, >= 2, as in training, at a fixed seed.

    Raises:
        ValueError: for fewer than two pairs.

    Example:
        >>> [probe.num_pairs for probe in TrainingPairs(num_pairs=512).probes()]
        [512]
    """

    declares = (
        MetricInfo("ess", "up", "transport", always=False),
        MetricInfo("tilt_source", "down", "transport", always=False),
        MetricInfo("tilt_target", "down", "transport", always=False),
        # A cheaper plan may be a better coupling or a tilt of the marginals: the share of the tilt tells which.
        MetricInfo("tilt_share", "none", "transport", always=False),
        MetricInfo("weighted_norm_ratio", always=False),
        MetricInfo("cost_ratio", "none", "transport", always=False),
        MetricInfo("chi2", "down", "transport", always=False),
    )

    def __init__(self, num_pairs: int = 4096) -> None:
        check_count("num_pairs", num_pairs, at_least=2)
        self.num_pairs = num_pairs

    def probes(self) -> tuple[Probe[Any], ...]:
        """The pairs."""
        return (Pairs(self.num_pairs),)

    def expected(self, who: Prospect) -> tuple[str, ...] | None:
        """See :meth:`Metric.expected`: what the family reports of its pairs."""
        return who.module.training_pair_names if isinstance(who.module, FlowModule) else ()

    def measure(self, answers: Answers) -> list[Measurement]:
        """One row for each number that the family reports; none where it reports none."""
        protocol = f"training-pairs/{self.num_pairs}"
        found = answers[Pairs(self.num_pairs)] or {}
        return [Measurement(name, value, self.num_pairs, protocol) for name, value in found.items()]
