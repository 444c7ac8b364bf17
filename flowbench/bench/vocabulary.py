"""What a reader is told about each metric: its table, its place there, and which value is better."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from flowbench.bench.statistics import Goal

__all__ = ["GROUPS", "Group", "MetricInfo", "heading", "info", "order_metrics", "quality_metric"]

Group = Literal["quality", "transport", "cost"]
GROUPS: tuple[Group, ...] = ("quality", "transport", "cost")


@dataclass(frozen=True)
class MetricInfo:
    """Table and direction of a metric."""

    group: Group
    goal: Goal


_INFO: dict[str, MetricInfo] = {
    "fid": MetricInfo("quality", "lower"),
    "fid_low": MetricInfo("quality", "none"),
    "fid_high": MetricInfo("quality", "none"),
    "fid_infinity": MetricInfo("quality", "lower"),
    "fid_infinity_low": MetricInfo("quality", "none"),
    "fid_infinity_high": MetricInfo("quality", "none"),
    "fd": MetricInfo("quality", "lower"),
    "fd_low": MetricInfo("quality", "none"),
    "fd_high": MetricInfo("quality", "none"),
    "fd_infinity": MetricInfo("quality", "lower"),
    "fd_infinity_low": MetricInfo("quality", "none"),
    "fd_infinity_high": MetricInfo("quality", "none"),
    "kid": MetricInfo("quality", "lower"),
    "w2": MetricInfo("quality", "lower"),
    "sliced_w2": MetricInfo("quality", "lower"),
    "mmd": MetricInfo("quality", "lower"),
    "nll": MetricInfo("quality", "lower"),
    "precision": MetricInfo("quality", "higher"),
    "recall": MetricInfo("quality", "higher"),
    "density": MetricInfo("quality", "higher"),
    "coverage": MetricInfo("quality", "higher"),
    "reconstruction_fid": MetricInfo("quality", "none"),
    "reconstruction_fd": MetricInfo("quality", "none"),
    "reconstruction_psnr": MetricInfo("quality", "none"),
    "inpainting_psnr": MetricInfo("quality", "higher"),
    "known_psnr": MetricInfo("quality", "higher"),
    "semantic_agreement": MetricInfo("quality", "higher"),
    "reconstruction_inpainting_psnr": MetricInfo("quality", "none"),
    "reconstruction_known_psnr": MetricInfo("quality", "none"),
    "reconstruction_semantic_agreement": MetricInfo("quality", "none"),
    "w2_bound_reconstruction": MetricInfo("quality", "none"),
    "w2_bound_flow_loss": MetricInfo("quality", "none"),
    "inception_score": MetricInfo("quality", "higher"),
    "class_accuracy": MetricInfo("quality", "higher"),
    "mean_norm_ratio": MetricInfo("quality", "none"),
    "weighted_norm_ratio": MetricInfo("quality", "none"),
    "average_minimum_distance": MetricInfo("quality", "lower"),
    "failure_rate": MetricInfo("quality", "lower"),
    "mode_discrepancy": MetricInfo("quality", "lower"),
    "mode_matched_w2": MetricInfo("quality", "lower"),
    "authenticity": MetricInfo("quality", "none"),
    "data_copying": MetricInfo("quality", "none"),
    "neighbour_distance_ratio": MetricInfo("quality", "none"),
    "straightness": MetricInfo("transport", "lower"),
    "path_energy": MetricInfo("transport", "lower"),
    "displacement": MetricInfo("transport", "none"),
    "npe": MetricInfo("transport", "zero"),
    "npe_curvature": MetricInfo("transport", "lower"),
    "npe_coupling": MetricInfo("transport", "zero"),
    "curvature": MetricInfo("transport", "lower"),
    "one_step_error": MetricInfo("transport", "lower"),
    "path_length_ratio": MetricInfo("transport", "lower"),
    "ess": MetricInfo("transport", "higher"),
    "tilt_source": MetricInfo("transport", "lower"),
    "tilt_target": MetricInfo("transport", "lower"),
    # A cheaper plan may be a better coupling or a tilt of the marginals: the share of the tilt says which.
    "tilt_share": MetricInfo("transport", "none"),
    "cost_ratio": MetricInfo("transport", "none"),
    "network_evaluations": MetricInfo("cost", "lower"),
    "samples_per_second": MetricInfo("cost", "higher"),
    "train_seconds": MetricInfo("cost", "lower"),
    "step_milliseconds": MetricInfo("cost", "lower"),
    "flop_utilisation": MetricInfo("cost", "higher"),
    "train_flops": MetricInfo("cost", "none"),
    "samples_seen": MetricInfo("cost", "none"),
    "peak_memory": MetricInfo("cost", "lower"),
    "parameters": MetricInfo("cost", "none"),
}
_ORDER = list(_INFO)
_ARROWS = {"lower": " ↓", "higher": " ↑", "zero": " → 0", "none": ""}
_QUALITY_FIRST = ("fd", "fid", "w2", "sliced_w2", "mmd", "kid", "failure_rate", "nll")


def info(metric: str) -> MetricInfo:
    """Table and direction of ``metric``; a metric unknown here is shown under quality without a direction."""
    return _INFO.get(_base(metric), MetricInfo("quality", "none"))


def order_metrics(metrics: Iterable[str], group: Group) -> list[str]:
    """The metrics of one table in the order of this page, unknown ones last."""
    mine = [metric for metric in metrics if info(metric).group == group]
    return sorted(mine, key=lambda metric: _ORDER.index(_base(metric)) if _base(metric) in _ORDER else len(_ORDER))


def heading(metric: str, unit: str) -> str:
    """Column heading: name, unit, and an arrow towards the better value."""
    return f"{metric}{f' ({unit})' if unit else ''}{_ARROWS[info(metric).goal]}"


def quality_metric(metrics: Iterable[str]) -> str | None:
    """The metric that pictures show: fd for images, w2 for low dimension; None when nothing suits."""
    metrics = list(metrics)
    for base in _QUALITY_FIRST:
        for metric in metrics:
            if _base(metric) == base:
                return metric
    return None


def _base(metric: str) -> str:
    return metric.split("[", 1)[0]
