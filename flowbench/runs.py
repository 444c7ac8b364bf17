"""What the commands do: fit, validate, test, predict, reference, prepare."""

from __future__ import annotations

import copy
import fcntl
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from flowbench.torchvision_guard import ensure_importable

ensure_importable()

import lightning as L  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from flowbench.config import Built, Experiment, compose, fingerprint, to_yaml  # noqa: E402
from flowbench.counting import meta_module, training_flops  # noqa: E402
from flowbench.evaluation import Evaluator, Identity, cache_dir  # noqa: E402
from flowbench.evaluation.artifacts import save_samples  # noqa: E402
from flowbench.evaluation.progress import ProgressFile, read_phase  # noqa: E402
from flowbench.families import (  # noqa: E402
    AtomicCheckpointIO,
    Budget,
    BudgetLimit,
    FlowModule,
    TrainingModule,
    check_strategy,
    count_flops,
    load_checkpoint,
)
from flowbench.prediction import run_task  # noqa: E402
from flowbench.prediction_request import Request  # noqa: E402
from flowbench.processes import die_with_parent  # noqa: E402
from flowbench.rows import write_rows  # noqa: E402
from flowbench.seeds import generator  # noqa: E402
from flowbench.storage import write_text  # noqa: E402

__all__ = ["fit", "predict", "prepare", "reference", "test", "validate"]

# Validations (points of the curve), checkpoints and values of the training loss over a training of known length.
VALIDATIONS = 5
CHECKPOINTS = 10
LOSSES = 100
# Where the length is not known, every so many steps or seconds; losses never at longer intervals.
VALIDATION_STEPS = 200
LOSS_STEPS = 50
CHECKPOINT_SECONDS = 30
# Models with more parameters are counted from their shapes, for a batch would take the host's memory and minutes.
COUNTED_ON_DATA = 10**8
# What torchrun and Lightning's launchers tell a process about its group.
LAUNCHER_VARIABLES = ("LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")


@dataclass
class _Run:
    """A built experiment with its trainer."""

    experiment: Experiment
    built: Built
    module: TrainingModule
    budget: Budget | None
    trainer: L.Trainer
    progress: ProgressFile

    @property
    def checkpoint(self) -> Path:
        return self.experiment.run_dir / "checkpoints" / "last.ckpt"


# ---- commands -----------------------------------------------------------------------------------------


def fit(experiment: Experiment, test: bool = False, resume: str = "auto") -> Path:
    """Train until the budget is used up; the same command again goes on from the last checkpoint.

    Args:
        experiment: validated configuration.
        test: evaluate afterwards, in the same process.
        resume: `auto` continues from the run's last checkpoint, `never` starts over.

    Returns:
        The run's folder.

    Raises:
        ValueError: without a budget, when the folder holds another configuration, or another process works in it.
    """
    experiment.require_budget()
    if test:
        _require_evaluator(experiment)
    run_dir = experiment.run_dir
    _refuse_other_configuration(experiment)
    with _exclusive(run_dir):
        run = _build(experiment, training=True)
        if run.trainer.is_global_zero:
            experiment.save(run_dir)
        _train(run, resume)
        if test:
            run.trainer.test(run.module, datamodule=run.built.datamodule, verbose=False)
        run.progress.write(run.trainer, "done")
    return run_dir


def test(experiment: Experiment, ckpt: Path | None = None) -> Path:
    """Measure a trained flow with everything the evaluator names; writes rows.jsonl in the run's folder, returned."""
    _require_evaluator(experiment)
    with _exclusive(experiment.run_dir):
        run = _build(experiment, training=False)
        _load(run, ckpt)
        phase = read_phase(run.progress.path)
        run.trainer.test(run.module, datamodule=run.built.datamodule, verbose=False)
        if phase is not None:
            run.progress.write(run.trainer, phase)
    return experiment.run_dir


def validate(experiment: Experiment, ckpt: Path | None = None) -> dict[str, float]:
    """The training objective on the validation split, with the averaged weights."""
    run = _build(experiment, training=False)
    _load(run, ckpt)
    # A number for the user, not a point at step 0 of the training's curve.
    run.trainer.loggers = []
    (metrics,) = run.trainer.validate(run.module, datamodule=run.built.datamodule, verbose=False)
    return dict(metrics)


def predict(
    experiment: Experiment,
    ckpt: Path | None = None,
    *,
    task: str = "sample",
    output: Path | None = None,
    **options: Any,
) -> Path:
    """Put a trained flow to use; writes an npz file, manifest.json and, where the eye can judge, a picture.

    Args:
        experiment: validated configuration.
        ckpt: checkpoint; None takes the run's last.
        task: `sample`, or what a flow does without training for it: `reconstruct`, `edit`, `interpolate`, `inpaint`,
            `classify`.
        output: folder; None takes `samples`, or the task's name, in the run's folder.
        options: the task's own, see :class:`~flowbench.prediction_request.Request`.

    Returns:
        The folder.

    Raises:
        ValueError: for an option that the task does not take, or a task that this flow cannot do.
    """
    request = Request.make(task, **options)
    run = _build(experiment, training=False)
    path = _load(run, ckpt)
    module = run.module
    if not isinstance(module, FlowModule):
        raise ValueError(f"predict draws samples from a flow, but the configuration builds {type(module).__name__}")
    module.to(run.trainer.strategy.root_device)
    folder = output or experiment.run_dir / ("samples" if task == "sample" else task)
    manifest = {"checkpoint": str(path), "config_hash": experiment.fingerprint}
    return run_task(request, module, run.built.datamodule, experiment.seed, folder, manifest)


def reference(experiment: Experiment) -> Path:
    """Score the rows that no contender owns, floor, noise, gaussian and gmm, into the run's folder, returned."""
    with _exclusive(experiment.run_dir):
        # The baselines belong to the data: the model is never built, so no autoencoder is needed.
        data, evaluator = experiment.build_data(), experiment.build_evaluator()
        if evaluator is None:
            raise ValueError("the configuration has no section evaluator, so there is nothing to measure")
        _identify(evaluator, experiment)
        _set_threads()
        evaluator.extractors(data, _features_device(experiment))
        held_out = data.model_values(evaluator.held_out, slice(evaluator.num_samples))
        save_samples(experiment.run_dir, held_out, data.spec, evaluator.num_pictures)
        write_rows(experiment.run_dir / "rows.jsonl", list(evaluator.reference_rows(data)))
    return experiment.run_dir


def prepare(experiment: Experiment) -> dict[str, Path]:
    """Train what the experiment requires and the feature networks of its metrics, once per machine.

    Returns:
        The checkpoint of every required experiment, by name; ``teacher.autoencoder`` is what the teacher requires.
    """
    checkpoints = _checkpoints(experiment)
    evaluator = experiment.build_evaluator()
    if evaluator is not None:
        evaluator.prepare(experiment.build_data(), _features_device(experiment))
    return checkpoints


def _features_device(experiment: Experiment) -> torch.device:
    """Where feature networks run before there is a trainer: where it will train."""
    accelerator = (experiment.resolved.get("trainer") or {}).get("accelerator", "auto")
    if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _require_evaluator(experiment: Experiment) -> None:
    if experiment.resolved.get("evaluator") is None:
        raise ValueError("the configuration has no section evaluator, so there is nothing to measure")


# ---- building -----------------------------------------------------------------------------------------


def _build(experiment: Experiment, *, training: bool) -> _Run:
    _set_threads()
    built = experiment.build(prepare(experiment))
    module = built.model
    if not isinstance(module, TrainingModule):
        raise ValueError(f"model.class_path must name a flowbench module, got {type(module).__name__}")
    module.seed = experiment.seed
    if isinstance(module, FlowModule):
        module.fit_to(built.datamodule, training=training)
    budget = _budget(experiment, built, module)
    module.budget = budget
    if built.evaluator is not None:
        if not isinstance(module, FlowModule):
            raise ValueError(f"the evaluator measures flows, got {type(module).__name__}: remove the section evaluator")
        _identify(built.evaluator, experiment)
        built.evaluator.budget = budget
    progress = ProgressFile(experiment.run_dir / "progress.json", budget)
    trainer = _trainer(experiment, built, budget, progress, training)
    # The datamodule's refusals come before other processes are started, or each would repeat them.
    built.datamodule.trainer = trainer
    built.datamodule.setup("fit" if training else "test")
    return _Run(experiment, built, module, budget, trainer, progress)


def _identify(evaluator: Evaluator, experiment: Experiment) -> None:
    run = experiment.resolved.get("run") or {}
    evaluator.identity = Identity(
        bench=run.get("bench") or "",
        task=run.get("task") or "",
        contender=run.get("contender") or run.get("name") or experiment.run_dir.name,
        seed=experiment.seed,
        config_hash=experiment.fingerprint,
    )


def _budget(experiment: Experiment, built: Built, module: TrainingModule) -> Budget | None:
    """The budget in steps; one batch is run through a copy of the model to count its operations."""
    mapping = built.budget
    if mapping is None:
        max_steps = built.trainer_arguments.get("max_steps", -1)
        if max_steps in (None, -1):
            return None
        mapping = {"steps": max_steps}
    data = built.datamodule
    data.setup("fit")
    per_step = data.batch_size * built.trainer_arguments.get("accumulate_grad_batches", 1)
    if sum(p.numel() for p in module.parameters()) > COUNTED_ON_DATA:
        flops_per_step = per_step * training_flops(meta_module(experiment, data.spec))
    else:
        batch = data.train_batch_at(0)
        # A copy: counting must leave neither gradients nor running statistics behind.
        probe = copy.deepcopy(module)
        if isinstance(probe, FlowModule):
            # Before weights are loaded that hold it, what training fits is missing, and no loss is without it.
            probe.fit_to(data, training=True)
        rng = generator(experiment.seed, "flops")
        flops = count_flops(lambda: probe.training_loss(batch, rng).total)
        flops_per_step = round(flops * per_step / len(batch))
    limit = BudgetLimit.from_mapping(mapping)
    max_steps = limit.max_steps(flops_per_step, per_step, len(data.split("train")))
    return Budget(limit, flops_per_step=flops_per_step, samples_per_step=per_step, max_steps=max_steps)


def _trainer(
    experiment: Experiment, built: Built, budget: Budget | None, progress: ProgressFile, training: bool
) -> L.Trainer:
    check_strategy(built.trainer_arguments.get("strategy"))
    known = budget.max_steps if budget else None
    batches = built.trainer_arguments.get("accumulate_grad_batches", 1)
    arguments: dict[str, Any] = {
        "max_epochs": -1,
        "val_check_interval": max(1, known // VALIDATIONS if known else VALIDATION_STEPS) * batches,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": min(LOSS_STEPS, max(1, known // LOSSES)) if known else LOSS_STEPS,
        "enable_model_summary": False,
        "enable_progress_bar": sys.stderr.isatty(),
        # Likelihoods of continuous flows need gradients, and evaluation must see every sample once.
        "inference_mode": False,
        "use_distributed_sampler": False,
        **built.trainer_arguments,
        "max_steps": known or -1,
        "default_root_dir": str(experiment.run_dir),
    }
    callbacks: list[L.Callback] = list(built.callbacks.values())
    callbacks += [part for part in (budget, built.evaluator, progress) if part is not None]
    if training and not arguments.get("fast_dev_run"):
        callbacks.append(_checkpoint_callback(experiment.run_dir, known))
    else:
        arguments["enable_checkpointing"] = False
    arguments["plugins"] = [*_listed(arguments.get("plugins")), AtomicCheckpointIO()]
    loggers = list(built.loggers.values())
    _quieten()
    return L.Trainer(**arguments, callbacks=callbacks, logger=loggers or False)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _quieten() -> None:
    """Leave out Lightning's advertisements and the deprecations of its own code; warnings still show."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # A run's folder is its own: that it holds a checkpoint is how a run goes on.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")


def _checkpoint_callback(run_dir: Path, max_steps: int | None) -> ModelCheckpoint:
    when: dict[str, Any] = (
        {"every_n_train_steps": max(1, max_steps // CHECKPOINTS)}
        if max_steps
        else {"train_time_interval": timedelta(seconds=CHECKPOINT_SECONDS)}
    )
    return ModelCheckpoint(run_dir / "checkpoints", filename="last", save_top_k=1, enable_version_counter=False, **when)


def _train(run: _Run, resume: str) -> None:
    """Fit from scratch or from the last checkpoint; nothing to do when the budget is used up already."""
    path = run.checkpoint
    resumed = resume == "auto" and path.is_file()
    if resumed:
        _load(run, path)
    if run.budget is None or not run.budget.exhausted:
        run.trainer.fit(
            run.module,
            datamodule=run.built.datamodule,
            ckpt_path=str(path) if resumed else None,
            weights_only=True,
        )
        if run.trainer.state.status == "interrupted":
            raise KeyboardInterrupt
        if not getattr(run.trainer, "fast_dev_run", False):
            run.trainer.save_checkpoint(path, weights_only=False)


def _load(run: _Run, path: Path | None) -> Path:
    """Load weights and what training had spent."""
    path = path or run.checkpoint
    state = load_checkpoint(run.module, path)
    if run.budget is not None:
        spent = state.get("callbacks", {}).get(run.budget.state_key)
        if spent is not None:
            run.budget.load_state_dict(spent)
    return path


# ---- folders and processes ----------------------------------------------------------------------------


def _set_threads() -> None:
    """The bench shares the cores out between concurrent cells."""
    threads = os.environ.get("FLOWBENCH_THREADS")
    if threads is not None:
        torch.set_num_threads(int(threads))


@contextmanager
def _exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the run's folder; its lock is the sign of life that a bench looks for.

    Raises:
        ValueError: when another process works there.
    """
    if any(int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK", "NODE_RANK")):
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "lock").open("w", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process works in {run_dir}: wait for it, or give another run.dir") from None
        yield


def _refuse_other_configuration(experiment: Experiment) -> None:
    """A folder holds one configuration, else resuming would mix two."""
    saved = experiment.run_dir / "config.yaml"
    if not saved.is_file():
        return
    found = fingerprint(compose([saved]).resolved)
    if found != experiment.fingerprint:
        raise ValueError(
            f"{experiment.run_dir} holds a run of another configuration ({found}, this one is "
            f"{experiment.fingerprint}): give another run.dir, or remove the folder"
        )


def _checkpoints(experiment: Experiment) -> dict[str, Path]:
    """Checkpoints of what an experiment requires, to any depth: trained models are built with what they required."""
    found: dict[str, Path] = {}
    for name, needed in experiment.requirements.items():
        found[name] = _required(name, needed)
        found |= {f"{name}.{inner}": path for inner, path in _checkpoints(needed).items()}
    return found


def _required(name: str, experiment: Experiment) -> Path:
    """Train a required experiment in its own process, once; the folder is named by its configuration.

    Raises:
        ValueError: when its training fails; names the log.
    """
    folder = (cache_dir() / f"{name}-{experiment.fingerprint}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    with FileLock(f"{folder}.lock"):
        if read_phase(folder / "progress.json") == "done" and checkpoint.is_file():
            return checkpoint
        print(f"training the required {name} once, in {folder}", file=sys.stderr, flush=True)
        config = folder / "required.yaml"
        write_text(config, to_yaml(experiment.resolved))
        command = [sys.executable, "-m", "flowbench.cli", "fit", "-c", str(config), f"run.dir={folder}"]
        # A launcher's rank is not the child's: it would wait for processes that do not exist.
        own = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        log = folder / "log.txt"
        with log.open("ab") as handle:
            # Without the hook it would outlive a killed bench, and hold its folder against the next one.
            code = subprocess.run(
                command,
                stdout=handle,
                stderr=subprocess.STDOUT,
                env=own,
                preexec_fn=die_with_parent(),
                check=False,
            ).returncode
        if code != 0:
            raise ValueError(f"training the required {name} failed with exit status {code}: see {log}")
    return checkpoint
