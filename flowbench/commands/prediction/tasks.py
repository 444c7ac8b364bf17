"""The tasks of ``flowbench predict``: one function each, and the files that they write."""

from __future__ import annotations

import json
import math
import operator
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowbench.commands.prediction import figures
from flowbench.commands.prediction.folder import file_names
from flowbench.commands.prediction.given_conditions import check_conditions, given_images
from flowbench.commands.prediction.input import BATCH, Subjects, find_subjects
from flowbench.commands.prediction.request import Request
from flowbench.core.devices import wait_for
from flowbench.core.seeds import derive_seed
from flowbench.core.storage import write_atomic, write_text
from flowbench.data import DataSpec, FlowDataModule
from flowbench.families import FlowModule, FlowSamples, LatentSpace
from flowbench.families.conditioning.filling import fill_in
from flowbench.families.conditioning.masks import make_mask
from flowbench.families.zero_shot import (
    classify,
    clopper_pearson,
    edit,
    inpaint,
    interpolate,
    reconstruct,
    require_classes,
)

__all__ = ["run_task"]

ROUNDS = 8
# More classes than these do not fit a picture, and cost a pass each: they are named one by one.
MOST_CLASSES = 10
# Default number of (pairs of) images, or points.
_NUM_IMAGES = {"sample": 64, "reconstruct": 12, "edit": 8, "interpolate": 8, "inpaint": 12}
_NUM_POINTS = {"sample": 64, "reconstruct": 500, "edit": 200, "interpolate": 24, "inpaint": 500}


@dataclass
class Outcome:
    """The result of a task.

    Attributes:
        arrays: for the npz file, by name; images as uint8.
        network_evaluations: per sample; None where an adaptive solver decided.
        diverged: samples that came out as NaN or infinity; images of them are black.
        results: measured values with their units, by name: {"value": ..., "unit": ...}.
        draw: writes the picture to a path; None where there is none.
        extra: further entries of the manifest.
    """

    arrays: dict[str, Any]
    network_evaluations: float | None
    diverged: int
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    draw: Callable[[Path], None] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def run_task(
    request: Request,
    module: FlowModule,
    data: FlowDataModule,
    seed: int,
    folder: Path,
    manifest: Mapping[str, Any],
) -> Path:
    """Run the task with the averaged weights, and write npz, picture and manifest.json.

    Args:
        request: the task.
        module: the flow, on its device.
        data: where the flow's data are from.
        seed: keys noise, masks and probes.
        folder: made where it is missing; nothing is written when the task fails.
        manifest: entries of the caller: checkpoint and configuration.

    Returns:
        The folder.
    """
    check_conditions(request, module)
    if request.num_samples is None and request.task != "classify":
        numbers = _NUM_IMAGES if module.spec.modality == "image" else _NUM_POINTS
        request = replace(request, num_samples=numbers[request.task])
    start = time.perf_counter()
    with module.evaluating():
        _check_weights(module, manifest)
        outcome = _TASKS[request.task](request, module, data, seed)
    _check_outcome(outcome)
    wait_for(module.device)
    seconds = time.perf_counter() - start
    arrays, picture = file_names(request.task)
    write_atomic(folder / arrays, lambda file: np.savez_compressed(file, **outcome.arrays))
    if outcome.draw is not None:
        outcome.draw(folder / picture)
    written = {
        "task": request.task,
        **manifest,
        "family": type(module).__name__,
        **request.settings(),
        "num_samples": len(next(iter(outcome.arrays.values()))),
        "seed": seed,
        "network_evaluations": outcome.network_evaluations,
        **({"diverged": outcome.diverged} if outcome.diverged else {}),
        "seconds": seconds,
        **outcome.extra,
        **({"results": outcome.results} if outcome.results else {}),
    }
    write_text(folder / "manifest.json", json.dumps(_plain(written), indent=2) + "\n")
    return folder


# ---- values out ---------------------------------------------------------------------------------------


def _check_weights(module: FlowModule, manifest: Mapping[str, Any]) -> None:
    """A diverged flow makes nothing.

    Raises:
        ValueError: names the first of its weights that are no numbers.
    """
    for name, weight in module.named_parameters():
        if not torch.isfinite(weight).all():
            raise ValueError(
                f"the training behind {manifest.get('checkpoint', 'these weights')} diverged: {name} holds NaN or "
                f"infinity; train again with a lower {module.learning_rate_key} or with trainer.gradient_clip_val"
            )


def _check_outcome(outcome: Outcome) -> None:
    """Report values that are not finite; where all are, write nothing and raise."""
    number = len(next(iter(outcome.arrays.values())))
    if outcome.diverged == number:
        raise ValueError(
            f"all {number} results are NaN or infinity: the flow diverges under this sampler; look at guidance, solver "
            "and the number of network evaluations"
        )
    if outcome.diverged:
        print(f"{outcome.diverged} of {number} results are NaN or infinity", file=sys.stderr, flush=True)


def _diverged(x: Tensor, *others: Tensor) -> int:
    """Samples of which anything is NaN or infinite: values of one sample are along the later axes."""
    finite = torch.stack([torch.isfinite(values).flatten(1).all(1).cpu() for values in (x, *others)])
    return int((~finite.all(0)).sum())


def _values(x: Tensor, spec: DataSpec) -> np.ndarray:
    """Images as uint8, black where they are no numbers; points as the file of the data holds them; any leading axes."""
    return spec.to_saved(x).cpu().numpy()


def _drawn(x: Tensor) -> np.ndarray:
    """Points for a picture, in model units: noise and data share a scale there."""
    return x.float().cpu().numpy()


def _labels(subjects: Subjects) -> dict[str, np.ndarray]:
    return {} if subjects.shown_label is None else {"label": subjects.shown_label.numpy()}


def _result(value: float, unit: str) -> dict[str, Any]:
    return {"value": value, "unit": unit}


def _plain(value: Any) -> Any:
    """JSON has no infinity: what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cost(parts: Sequence[Any]) -> float | None:
    """Network evaluations per sample over batches of unequal size, each of which may have had its own."""
    costs = [part.network_evaluations for part in parts]
    sizes = [len(part.x) for part in parts]
    return None if None in costs else sum(map(operator.mul, costs, sizes)) / sum(sizes)


def _space_unit(module: FlowModule) -> str:
    return "scaled latent units" if isinstance(module.space, LatentSpace) else "model units"


# ---- tasks --------------------------------------------------------------------------------------------


def _sample(request: Request, module: FlowModule, data: FlowDataModule, seed: int) -> Outcome:
    assert request.num_samples is not None, "set by run_task"
    parts, labels = [], []
    for chunk in torch.arange(request.num_samples).split(BATCH):
        condition = given_images(module, data, chunk, seed)
        labels += [] if condition.label is None else [condition.label.cpu()]
        noise, evaluations = module.draw_noise(chunk, seed), request.network_evaluations
        parts.append(module.sample(noise, condition, network_evaluations=evaluations, guidance=request.guidance))
    x = torch.cat([part.x for part in parts])
    arrays = {"x": _values(x, module.spec)}
    if labels:
        arrays["label"] = torch.cat(labels).numpy()
    draw = partial(figures.draw_grid, arrays["x"]) if module.spec.modality == "image" else None
    facts = module.describe()
    guidance = facts.guidance_scale if request.guidance is None else request.guidance
    extra = {"guidance": guidance, "sampler": facts.sampler}
    return Outcome(arrays, _cost(parts), _diverged(x), _inversion_results(parts), draw, extra)


def _inversion_results(parts: Sequence[FlowSamples]) -> dict[str, dict[str, Any]]:
    """The certificate, and what each block took, of an inverse that has them."""
    residuals = [part.residual for part in parts if part.residual is not None]
    if not residuals:
        return {}
    found = {
        "largest_residual": _result(float(torch.cat(residuals).max()), "max |f(x) - z| before denoising, noise units")
    }
    iterations = torch.cat([part.iterations for part in parts if part.iterations is not None], 1).double().mean(1)
    for block, mean in enumerate(iterations.tolist()):
        found[f"iterations_block_{block}"] = _result(mean, "network calls per sample, mean; blocks from data to noise")
    return found


def _reconstruct(request: Request, module: FlowModule, data: FlowDataModule, seed: int) -> Outcome:
    subjects = find_subjects(request, module, data, seed)
    parts = [reconstruct(module, batch.x, batch.label) for batch in subjects.batches()]
    x, noise = torch.cat([part.x for part in parts]), torch.cat([part.noise for part in parts])
    flow_error, data_error = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("flow_error", "data_error")
    )
    spec = module.spec
    arrays = {"x": _values(x, spec), "original": _values(subjects.x, spec), **_labels(subjects)}
    results = {
        "largest_flow_error": _result(float(flow_error.max()), _space_unit(module)),
        "largest_data_error": _result(float(data_error.max()), "model units"),
    }
    if spec.modality == "image":
        same = (arrays["x"] == arrays["original"]).mean()
        results["equal_pixels"] = _result(float(same), "share of 8-bit values")
    psnr = [part.autoencoder_psnr for part in parts if part.autoencoder_psnr is not None]
    if psnr:
        results["autoencoder_psnr"] = _result(float(torch.cat(psnr).mean()), "dB, mean over images, range 2")
    arrays |= {"flow_error": flow_error.cpu().numpy(), "data_error": data_error.cpu().numpy()}
    difference = (x - subjects.x).abs().cpu().numpy()
    draw: Callable[[Path], None] | None = None
    if spec.modality == "image":
        titles = _titles(subjects)
        draw = partial(figures.draw_reconstructions, arrays["original"], arrays["x"], difference, titles)
    elif spec.shape == (2,):
        # A flow of points lives in the data space: its noise can be drawn beside them.
        clouds = {"data": _drawn(subjects.x), "noise": _drawn(noise), "reconstructed": _drawn(x)}
        draw = partial(figures.plot_clouds, clouds)
    return Outcome(arrays, _cost(parts), _diverged(x, noise), results, draw)


def _edit(request: Request, module: FlowModule, data: FlowDataModule, seed: int) -> Outcome:
    targets = _targets(request, require_classes(module, "edit"))
    guidance = 1.0 if request.guidance is None else request.guidance
    subjects = find_subjects(request, module, data, seed)
    if subjects.label is None:
        raise ValueError(f"edit starts from the class of every image, but {request.images} has no array label")
    parts = [edit(module, batch.x, batch.label, targets, guidance) for batch in subjects.batches()]
    spec = module.spec
    x = torch.cat([part.x for part in parts])
    arrays = {
        "x": _values(x, spec),
        "original": _values(subjects.x, spec),
        **_labels(subjects),
        "classes": targets.numpy(),
    }
    draw: Callable[[Path], None] | None = None
    names = [f"as {k}" for k in targets.tolist()]
    if spec.modality == "image":
        cells = np.concatenate([arrays["original"][:, None], arrays["x"]], axis=1)
        rows = [f"a {label}" for label in arrays["label"].tolist()]
        draw = partial(figures.draw_table, cells, rows, ["data", *names])
    elif spec.shape == (2,):
        clouds = {"data": _drawn(subjects.x), **{name: _drawn(x[:, i]) for i, name in enumerate(names)}}
        draw = partial(figures.plot_clouds, clouds)
    extra = {"guidance": guidance, "classes": targets.tolist()}
    return Outcome(arrays, _cost(parts), _diverged(x), draw=draw, extra=extra)


def _targets(request: Request, num_classes: int) -> Tensor:
    if request.classes is None:
        if num_classes > MOST_CLASSES:
            raise ValueError(f"{num_classes} classes are too many to decode them all: name some, e.g. --classes 0,1,2")
        return torch.arange(num_classes)
    for name in request.classes:
        if not 0 <= name < num_classes:
            raise ValueError(f"--classes must lie in 0..{num_classes - 1}, got {name}")
    if not request.classes:
        raise ValueError("--classes names no class: give numbers, e.g. --classes 0,1,2")
    return torch.tensor(request.classes)


def _interpolate(request: Request, module: FlowModule, data: FlowDataModule, seed: int) -> Outcome:
    subjects = find_subjects(request, module, data, seed)
    first, second = subjects.x[0::2], subjects.x[1::2]
    rows = torch.arange(len(first)).split(max(1, BATCH // request.steps))
    parts = [interpolate(module, first[part], second[part], request.steps) for part in rows]
    spec = module.spec
    x, noise = (torch.cat([getattr(part, name) for part in parts]) for name in ("x", "noise"))
    arrays = {
        "x": _values(x, spec),
        "first": _values(first, spec),
        "second": _values(second, spec),
        "noise_norm": noise.flatten(2).norm(dim=2).cpu().numpy(),
    }
    if subjects.shown_label is not None:
        arrays["label"] = subjects.shown_label.view(-1, 2).numpy()
    fractions = np.linspace(0.0, 1.0, request.steps)
    draw: Callable[[Path], None] | None = None
    if spec.modality == "image":
        cells = np.concatenate([arrays["first"][:, None], arrays["x"], arrays["second"][:, None]], axis=1)
        pairs = arrays["label"].tolist() if "label" in arrays else []
        titles = [f"{a} to {b}" for a, b in pairs] or [f"pair {i}" for i in range(len(cells))]
        draw = partial(figures.draw_table, cells, titles, ["data", *(f"{t:.2f}" for t in fractions), "data"])
    elif spec.shape == (2,):
        draw = partial(figures.plot_paths, {"in noise": _drawn(noise), "in data": _drawn(x)})
    results = {"typical_noise_norm": _result(math.sqrt(noise[0, 0].numel()), "square root of the dimensions")}
    for name, value in (("smallest", arrays["noise_norm"].min()), ("largest", arrays["noise_norm"].max())):
        results[f"{name}_noise_norm"] = _result(float(value), "units of the noise")
    return Outcome(arrays, _cost(parts), _diverged(x, noise), results, draw)


def _inpaint(request: Request, module: FlowModule, data: FlowDataModule, seed: int) -> Outcome:
    mask = make_mask(request.mask, module.spec.shape, seed)
    subjects = find_subjects(request, module, data, seed)
    if module.num_classes is not None and subjects.label is None and not module.label_dropout:
        raise ValueError(f"this flow knows no null label, and {request.images} has no array label: add the classes")
    conditioner, rounds = module.conditioner, request.rounds or ROUNDS
    fill = partial(inpaint, rounds=rounds) if conditioner is None else fill_in
    draws = []
    for number in range(request.draws):
        key = derive_seed(seed, "draw", number)
        draws.append([fill(module, b.x, mask, b.label, seed=key, index=b.index) for b in subjects.batches()])
    spec = module.spec
    x = torch.stack([torch.cat([part.x for part in parts]) for parts in draws], 1)
    drift = torch.stack([torch.cat([part.drift for part in parts]) for parts in draws], 1)
    arrays = {
        "x": _values(x, spec),
        "original": _values(subjects.x, spec),
        **_labels(subjects),
        "mask": mask.numpy(),
        "drift": drift.cpu().numpy(),
    }
    draw: Callable[[Path], None] | None = None
    if spec.modality == "image":
        draw = partial(figures.draw_inpaintings, arrays["original"], arrays["mask"], arrays["x"], _titles(subjects))
    elif spec.shape == (2,):
        clouds = {"data": _drawn(subjects.x)}
        clouds |= {f"draw {i + 1}": _drawn(x[:, i]) for i in range(request.draws)}
        draw = partial(figures.plot_clouds, clouds)
    unit = _space_unit(module) if conditioner is None else "model units"
    results = {
        "known_value_drift": _result(float(drift.double().square().mean().sqrt()), f"{unit}, RMS"),
        "unknown_share": _result(float(mask.double().mean()), "share of the pixels or coordinates"),
    }
    if module.describe().likelihood == "exact":
        gap = _log_density(module, subjects, x, seed) - _log_density(module, subjects, subjects.x[:, None], seed)
        # One completion off the data's support would outweigh all others in a mean.
        median = float(gap.median()) / spec.num_dims
        results["log_density_gap"] = _result(median, "nats per dimension, completed minus data, median")
    extra: dict[str, Any] = {"method": f"a draw under the flow's own condition, {module.describe().sampler}"}
    if conditioner is None:
        method = "approximate inpainting by repeated encoding, not a draw from the exact conditional"
        extra = {"method": method, "rounds": rounds}
    return Outcome(arrays, _cost([part for parts in draws for part in parts]), _diverged(x), results, draw, extra)


def _log_density(module: FlowModule, subjects: Subjects, x: Tensor, seed: int) -> Tensor:
    """Log-densities of versions (B, V, *D) of the data in nats, shape (B, V)."""
    columns = [
        [
            module.log_prob(version[batch.index.to(version.device)], batch.label, index=batch.index, seed=seed)
            for batch in subjects.batches()
        ]
        for version in x.unbind(1)
    ]
    return torch.stack([torch.cat(parts).double() for parts in columns], 1)


def _classify(request: Request, module: FlowModule, data: FlowDataModule, seed: int) -> Outcome:
    classes = require_classes(module, "classify")
    subjects = find_subjects(request, module, data, seed)
    log_prior = _log_prior(request.prior, data, classes)
    parts = [classify(module, batch.x, log_prior, index=batch.index, seed=seed) for batch in subjects.batches()]
    log_posterior = torch.cat([part.log_posterior for part in parts]).cpu()
    log_prob = torch.cat([part.log_prob for part in parts]).cpu()
    predicted = log_posterior.argmax(1)
    arrays = {
        "log_posterior": log_posterior.numpy(),
        "log_prob": log_prob.numpy() - module.spec.log_volume,
        "predicted": predicted.numpy(),
        **_labels(subjects),
    }
    facts = module.describe()
    extra = {"likelihood": facts.likelihood, "likelihood_method": facts.likelihood_method}
    cost = parts[0].network_evaluations  # the same for all: no sampler takes part
    outcome = Outcome(arrays, cost, _diverged(log_prob), extra=extra)
    if subjects.shown_label is not None:
        outcome.results = _accuracy(log_posterior, predicted, subjects.shown_label)
        counts = np.zeros((classes, classes), dtype=int)
        np.add.at(counts, (arrays["label"], arrays["predicted"]), 1)
        outcome.draw = partial(figures.plot_confusion, counts, outcome.results)
    return outcome


def _log_prior(prior: str, data: FlowDataModule, classes: int) -> Tensor:
    """Log-probabilities of the classes, shape (K,)."""
    if prior == "uniform":
        return torch.full((classes,), -math.log(classes), dtype=torch.float64)
    label = data.split("train").label
    assert label is not None, "a conditional flow has labelled data"
    return (torch.bincount(label.long(), minlength=classes).double() / len(label)).log()


def _accuracy(log_posterior: Tensor, predicted: Tensor, label: Tensor) -> dict[str, dict[str, Any]]:
    number, correct = len(label), int((predicted == label).sum())
    low, high = clopper_pearson(correct, number)
    own = log_posterior.gather(1, label[:, None]).mean()
    return {
        "accuracy": _result(correct / number, "share"),
        "accuracy_low": _result(low, "share, 95% Clopper-Pearson"),
        "accuracy_high": _result(high, "share, 95% Clopper-Pearson"),
        "mean_log_posterior": _result(float(own), "nats, of the true class"),
        "number": _result(number, "samples"),
    }


def _titles(subjects: Subjects) -> list[str] | None:
    return None if subjects.shown_label is None else [str(k) for k in subjects.shown_label.tolist()]


_TASKS: dict[str, Callable[[Request, FlowModule, FlowDataModule, int], Outcome]] = {
    "sample": _sample,
    "reconstruct": _reconstruct,
    "edit": _edit,
    "interpolate": _interpolate,
    "inpaint": _inpaint,
    "classify": _classify,
}
