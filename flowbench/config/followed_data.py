"""The data of what an experiment requires: those of the experiment itself.

An autoencoder or a teacher that was trained on other data makes every number of the flow that builds on it meaningless.
A required experiment file is therefore trained on the data of the experiment that requires it, whatever data set the
file names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowbench.config.text import plain

__all__ = ["with_data_of"]

# How samples are served, which each experiment chooses for itself.
_SERVING = ("batch_size", "eval_batch_size", "num_workers", "seed")
# What makes two data sets the same one.
_IDENTITY = ("dataset", "path", "image_size", "shape", "num_classes", "levels", "value_range", "standardize")
_DEFAULT = {"dataset": "digits"}


def with_data_of(own: Any, data: Any) -> Any:
    """The section ``data`` of a required experiment file.

    Args:
        own: the section in the file, or None.
        data: the section of the experiment that requires it.

    Returns:
        ``own`` where both name the same data set, so that its flips or its noise of labels stay as the file has them,
        but on as many training samples; else ``data`` with the batch sizes, workers and seed of ``own``.
    """
    own, data = ({} if section is None else section for section in (own, data))
    if not isinstance(own, Mapping) or not isinstance(data, Mapping):
        return own
    if _identity(own) == _identity(data):
        return {**own, **_size(data)}
    kept = {key: value for key, value in own.items() if key in _SERVING}
    return {**{key: value for key, value in data.items() if key not in _SERVING}, **kept}


def _size(data: Mapping[str, Any]) -> dict[str, Any]:
    """How many training samples there are, where not all: an encoder that saw the others would bring them in."""
    size = data.get("train_size")
    return {} if size is None else {"train_size": size}


def _identity(data: Mapping[str, Any]) -> dict[str, Any]:
    named = {key: plain(value) for key, value in data.items() if key in _IDENTITY and value is not None}
    return {**_DEFAULT, **named}
