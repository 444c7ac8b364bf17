"""The tasks of ``flowbench predict``, and the options that each of them takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowbench.core.checks import check_count, check_counts, check_number
from flowbench.core.contents import content_of

__all__ = ["OPTIONS", "PRIORS", "TASKS", "Request"]

PRIORS = ("uniform", "train")
_COMMON = ("num_samples", "split", "images")
OPTIONS: dict[str, tuple[str, ...]] = {
    "sample": ("num_samples", "guidance", "network_evaluations"),
    "reconstruct": _COMMON,
    "edit": (*_COMMON, "classes", "guidance"),
    "interpolate": (*_COMMON, "steps"),
    "inpaint": (*_COMMON, "mask", "rounds", "draws"),
    "classify": (*_COMMON, "prior"),
}
"""The options that each task takes."""
TASKS = tuple(OPTIONS)


@dataclass(frozen=True)
class Request:
    """A task with its options; :meth:`make` refuses options that do not belong to the task.

    Attributes:
        task: one of ``TASKS``.
        num_samples: samples, images, points or pairs (interpolate), >= 1; None is the task's own number, all of the
            split for `classify`.
        guidance: in [0, 1e12]; sample: scale of guidance, None keeps the configuration's. edit: scale of the decoding,
            None is 1.
        network_evaluations: evaluations per sample, 1 to 1e6; None keeps the configuration's sampler.
        split: where the data are from, ``train``, ``val`` or ``test``; the first ones are taken.
        images: npz file with `x` (and `label`) in place of the split, laid out as the samples.npz of this command.
        mask: see :func:`~flowbench.families.conditioning.masks.make_mask`.
        rounds: rounds of inpainting by a flow that was not trained for it, >= 1; None is 8.
        draws: inpaintings of each image, >= 1.
        steps: states of each interpolation, the ends included, >= 2.
        classes: classes to decode; None is all of them, where they are few.
        prior: over the classes, one of ``PRIORS``: `uniform`, or the frequencies in the training split.
    """

    task: str = "sample"
    num_samples: int | None = None
    guidance: float | None = None
    network_evaluations: int | None = None
    split: str = "test"
    images: Path | None = None
    mask: str = "center"
    rounds: int | None = None
    draws: int = 3
    steps: int = 8
    classes: tuple[int, ...] | None = None
    prior: str = "uniform"

    def __post_init__(self) -> None:
        check_count("--num-samples", self.num_samples, or_none=True)
        check_number("--guidance", self.guidance, at_least=0, or_none=True, hint="1 is none")
        check_count("--network-evaluations", self.network_evaluations, at_most=10**6, or_none=True)
        check_count("--rounds", self.rounds, or_none=True)
        check_count("--draws", self.draws)
        check_count("--steps", self.steps, at_least=2, hint="the ends included")
        if self.classes is not None:
            check_counts("--classes", self.classes, at_least=0, at_most=10**6)

    @classmethod
    def make(cls, task: str = "sample", **options: Any) -> Request:
        """A request from the options that were given; None counts as not given.

        Raises:
            ValueError: for an unknown task, or an option that the task does not take or whose value is out of range.
        """
        if task not in OPTIONS:
            raise ValueError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
        given = {name: value for name, value in options.items() if value is not None}
        for name in given:
            if name not in OPTIONS[task]:
                takes = ", ".join(_flag(option) for option in OPTIONS[task])
                raise ValueError(f"{_flag(name)} does not apply to --task {task}, which takes {takes}")
        if given.get("prior", PRIORS[0]) not in PRIORS:
            raise ValueError(f"--prior must be one of {', '.join(PRIORS)}, got {given['prior']!r}")
        if "images" in given and "split" in given:
            raise ValueError("--images takes the place of the split: leave out --split or --images")
        return cls(task, **given)

    def settings(self) -> dict[str, Any]:
        """The task's options as plain values, and what the files among them hold, for the manifest."""
        values = {name: getattr(self, name) for name in OPTIONS[self.task]}
        if values.get("images") is not None:
            del values["split"]
        named = [str(values[name]) for name in ("images", "mask") if values.get(name) is not None]
        files = {name: content_of(Path(name)) for name in named if Path(name).suffix and Path(name).is_file()}
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        return {**plain, "files": files} if files else plain


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
