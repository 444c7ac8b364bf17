"""`features: auto`: the extractor that suits a data set, so that nobody has to edit metrics for data of their own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from flowbench.core.remarks import say_once
from flowbench.data import USER_FORMATS, DataSpec
from flowbench.data.catalogue import declared_spec
from flowbench.metrics.weights import efficientnet_weights

__all__ = ["AUTO", "known_features", "planned_features", "resolve_features"]

AUTO = "auto"
PHOTOGRAPHS = "efficientnet-lite0"
# Smaller images are enlarged so much that a network trained on photographs sees little in them.
LEAST_PIXELS = 32
# The classifier halves images at least once, and tells two classes apart or more.
LEAST_CLASSIFIED = 4


def resolve_features(name: str, dataset: str, spec: DataSpec) -> str:
    """The extractor that a metric's `features` stands for.

    Every name but `auto` stands for itself. `auto` is `<dataset>-cnn` for labelled images, `efficientnet-lite0` for
    other ones of 32 pixels or more where its weights can be had, and `identity` (pixels or coordinates) otherwise; one
    line on the first process says which, and why.

    Args:
        name: as in `features: name`.
        dataset: name in the catalogue or of a user's format.
        spec: shape and classes of the data.

    Returns:
        A name for :func:`flowbench.evaluation.get_extractor`.
    """
    if name != AUTO:
        return name
    found, reason = _without_weights(dataset, spec) or _with_weights()
    say_once(f"features: auto takes {found} for {dataset}: {reason}")
    return found


def known_features(name: str, dataset: str, spec: DataSpec) -> str | None:
    """What :func:`resolve_features` will give; None where that depends on weights, which nobody is asked for here."""
    if name != AUTO:
        return name
    found = _without_weights(dataset, spec)
    return found[0] if found else None


def planned_features(name: str, data: Mapping[str, Any]) -> str | None:
    """What :func:`resolve_features` will give, as far as it is known before data are read or weights asked for.

    Args:
        name: as in `features: name`.
        data: the section `data` of an experiment.

    Returns:
        None where it depends on the user's own data, or on weights.

    Raises:
        ValueError: an unknown dataset, or a declaration that says too little.
    """
    if name != AUTO:
        return name
    dataset, shape = str(data.get("dataset", "digits")), data.get("shape")
    if dataset in USER_FORMATS and shape is None:
        return None
    return known_features(name, dataset, declared_spec(dataset, shape and tuple(shape), data.get("num_classes")))


def _without_weights(dataset: str, spec: DataSpec) -> tuple[str, str] | None:
    """Name and reason, None where they depend on whether EfficientNet's weights can be had."""
    if spec.modality == "vector":
        return "identity", "points are compared by their coordinates"
    channels, *sides = spec.shape
    if (spec.num_classes or 0) > 1 and min(sides) >= LEAST_CLASSIFIED:
        return f"{dataset}-cnn", f"a classifier of its {spec.num_classes} classes"
    size = "x".join(map(str, sides))
    if channels not in (1, 3):
        return "identity", f"no classes to train a classifier on, and no other network takes {channels} channels"
    if min(sides) < LEAST_PIXELS:
        return "identity", f"no classes to train a classifier on, and {size} pixels are too few for {PHOTOGRAPHS}"
    return None


def _with_weights() -> tuple[str, str]:
    fault = _weights_fault()
    if fault is None:
        return PHOTOGRAPHS, "no classes to train a classifier on, and images large enough for a network of photographs"
    return "identity", f"no classes to train a classifier on, and {PHOTOGRAPHS} cannot be had ({fault})"


@cache
def _weights_fault() -> str | None:
    """Why EfficientNet's weights cannot be had; asked once a process, because a network that is down answers slowly."""
    try:
        efficientnet_weights()
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    return None
