"""Which of the trainer's precisions a module of flowbench can be trained and measured in."""

from __future__ import annotations

__all__ = ["PRECISIONS", "check_precision"]

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""Weights are float32 in each of them: the others change them, and averages, samples and likelihoods with them."""

_SHORT = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def check_precision(asked: object, runs: object = None) -> None:
    """Refuse a precision that does not leave weights in float32, and one that Lightning replaced by another.

    Args:
        asked: ``trainer.precision`` as it was given; None is Lightning's default.
        runs: what the trainer made of it; None where there is no trainer yet.

    Raises:
        ValueError: names what to take instead.
    """
    wanted = _SHORT.get(str(asked), str(asked))
    found = str(runs or wanted)
    if not {wanted, found} <= set(PRECISIONS):
        name = wanted if wanted not in PRECISIONS else found
        raise ValueError(
            f"trainer.precision={name} does not keep the weights in float32, which averages, samples and likelihoods "
            f"need: take {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}"
        )
    if wanted == "16-mixed" != found:
        raise ValueError(f"trainer.precision={asked} does not run on this accelerator: take {found} or 32-true")
