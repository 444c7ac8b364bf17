"""The commands fit, validate, test, predict, reference and prepare."""

from __future__ import annotations

import copy
import logging
import os
import sys
import warnings
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from flowbench.commands.counting import meta_module
from flowbench.commands.lightning_trainer import listed, make_trainer
from flowbench.commands.prediction.folder import check_output
from flowbench.commands.prediction.request import Request
from flowbench.commands.prediction.tasks import run_task
from flowbench.commands.prerequisites import required_checkpoints, required_flops
from flowbench.commands.rehearsal import rehearse
from flowbench.commands.run_folder import claim, keeps_details, working_in
from flowbench.commands.run_identity import check_folder, check_weights, own_folder
from flowbench.commands.training_run import Run, last_checkpoint, load_weights, noting_the_end, resume_training, train
from flowbench.config import Built, Experiment
from flowbench.core.launch import local_rank
from flowbench.core.packages import sha256_of
from flowbench.core.rows import write_rows
from flowbench.core.seeds import generator
from flowbench.data import FlowDataModule
from flowbench.evaluation import Evaluator, Identity
from flowbench.evaluation.artifacts import save_samples
from flowbench.evaluation.earlier import set_aside
from flowbench.evaluation.extractors import is_pretrained
from flowbench.evaluation.trainer_parts import measured_module
from flowbench.families import FlowModule
from flowbench.families.released import load_released
from flowbench.training import (
    AtomicCheckpointIO,
    Budget,
    BudgetLimit,
    TrainingModule,
    check_precision,
    check_strategy,
    count_flops,
)
from flowbench.training.interruption import StopOnSignal
from flowbench.training.progress import ProgressFile, read_phase

__all__ = ["evaluate_released", "fit", "predict", "prepare", "reference", "test", "validate"]

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
_ANOTHER_RUN = "give another run.dir or run.name"


# ---- commands -----------------------------------------------------------------------------------------


def fit(experiment: Experiment, test: bool = False, resume: str = "auto") -> Path:
    """Train until the budget is used up; the same command again goes on from the last checkpoint.

    So does one with a larger budget. A trial (``trainer.fast_dev_run``) leaves what it writes in a folder of its own.

    Args:
        experiment: validated configuration.
        test: evaluate afterwards, in the same process.
        resume: `auto` continues from the run's last checkpoint, `never` starts over.

    Returns:
        The run's folder.

    Raises:
        ValueError: without a budget, when the folder holds another configuration or other results, when another process
            works in it, or when more is spent than the budget gives.
        Stopped: a signal ended the run; a checkpoint of the last step is saved, when it came during training.
        ProcessEnded: the run lost one of its processes.
    """
    experiment.require_budget()
    if test:
        _require_evaluator(experiment)
    is_trial = bool((experiment.resolved.get("trainer") or {}).get("fast_dev_run"))
    if is_trial:
        experiment = experiment.at(experiment.run_dir / "fast_dev_run")
    run_dir = experiment.run_dir
    with working_in(run_dir):
        claim(run_dir, "run", _ANOTHER_RUN)
        if not is_trial:
            check_folder(experiment, _ANOTHER_RUN)
        run = _build(experiment, training=True)
        resumed = resume == "auto" and not is_trial and resume_training(run)
        with noting_the_end(run):
            # Before anything is trained: what is written from now on must not be taken for a finished training.
            run.progress.trained = run.budget is not None and run.budget.finished
            run.progress.write(run.trainer, "fit")
            if run.trainer.is_global_zero:
                experiment.save(run_dir)
            train(run, resumed)
            if test:
                run.trainer.test(run.module, datamodule=run.built.datamodule, verbose=False)
            run.progress.write(run.trainer, "done")
    return run_dir


def test(experiment: Experiment, ckpt: Path | None = None) -> Path:
    """Measure a trained flow with everything the evaluator names; writes rows.jsonl in the run's folder, returned.

    Earlier rows that were measured in another way are kept in the folder ``before`` beside it.

    Raises:
        ValueError: when the weights were trained with another configuration, or the folder holds other results.
    """
    _require_evaluator(experiment)
    experiment = own_folder(experiment)
    with working_in(experiment.run_dir):
        claim(experiment.run_dir, "run", _ANOTHER_RUN)
        check_folder(experiment, _ANOTHER_RUN, measuring=True)
        run, _ = _trained(experiment, ckpt)
        before = read_phase(run.progress.path)
        phase = before if before in ("fit", "interrupted", "failed") else "done"
        with noting_the_end(run, phase):
            run.trainer.test(run.module, datamodule=run.built.datamodule, verbose=False)
            run.progress.write(run.trainer, phase)
    return experiment.run_dir


def evaluate_released(experiment: Experiment, weights: Path, layout: str) -> Path:
    """Measure weights that other code trained with everything the evaluator names.

    What their training cost is unknown and has no rows; averaged weights are those of the file.

    Args:
        experiment: the model with the sizes that the weights have, data, and how to measure.
        weights: the released file.
        layout: one of :data:`flowbench.families.released.LAYOUTS`.

    Returns:
        The folder with the rows, the experiment's.

    Raises:
        ValueError: when the file and the model do not fit, or the folder holds other results.
    """
    _require_evaluator(experiment)
    folder = experiment.run_dir
    remedy = "give another --output or --name"
    if (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} holds a trained run, whose rows this would replace: {remedy}")
    with working_in(folder):
        claim(folder, "run", remedy)
        run = _build(experiment, training=False)
        if not isinstance(run.module, FlowModule):
            raise ValueError(f"released weights are those of flows, but the configuration builds {run.module!r}")
        load_released(run.module, weights, layout)
        evaluator = run.built.evaluator
        assert evaluator is not None, "required above"
        # The same file measured in the same way is the same measurement; nothing was trained or averaged here.
        content = f"{experiment.fingerprint}-{sha256_of(weights)[:16]}"
        evaluator.identity = replace(evaluator.identity, config_hash=content)
        evaluator.budget, evaluator.weights = None, "raw"
        with noting_the_end(run, "done"):
            run.trainer.test(run.module, datamodule=run.built.datamodule, verbose=False)
            run.progress.write(run.trainer, "done")
    return folder


def validate(experiment: Experiment, ckpt: Path | None = None) -> dict[str, float]:
    """The training objective on the validation split, with the averaged weights."""
    experiment = own_folder(experiment)
    with keeps_details(experiment.run_dir):
        run, _ = _trained(experiment, ckpt)
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
        options: the task's own, see :class:`~flowbench.commands.prediction.request.Request`.

    Returns:
        The folder.

    Raises:
        ValueError: for an option that the task does not take, or a task that this flow cannot do.
    """
    request = Request.make(task, **options)
    experiment = own_folder(experiment)
    folder = output or experiment.run_dir / ("samples" if task == "sample" else task)
    with keeps_details(experiment.run_dir):
        check_output(request, folder, ckpt or last_checkpoint(experiment.run_dir))
        # The seed keys the noise of the samples here, and not the training.
        run, path = _trained(experiment, ckpt, but=("seed",))
        module = run.module
        if not isinstance(module, FlowModule):
            raise ValueError(f"predict draws samples from a flow, but the configuration builds {type(module).__name__}")
        module.to(run.trainer.strategy.root_device)
        manifest = {"checkpoint": str(path), "config_hash": experiment.fingerprint}
        return run_task(request, module, run.built.datamodule, experiment.seed, folder, manifest)


def reference(experiment: Experiment) -> Path:
    """Score the rows of the references, which no contender owns.

    Returns:
        Their folder: ``run.dir`` where it is given, else ``reference`` in the run's folder, which stays the run's.
    """
    given = (experiment.resolved.get("run") or {}).get("dir")
    folder = experiment.run_dir if given else experiment.run_dir / "reference"
    with working_in(folder):
        claim(folder, "reference", "give another run.dir")
        # The baselines belong to the data: no model is needed, and no autoencoder.
        data, evaluator = rehearse(experiment), experiment.build_evaluator()
        if evaluator is None:
            raise ValueError("the configuration has no section evaluator, so there is nothing to measure")
        _identify(evaluator, experiment)
        _set_threads()
        evaluator.report = partial(ProgressFile(folder / "progress.json", None).stage, phase="reference")
        evaluator.extractors(data, _features_device(experiment))
        held_out = data.model_values(evaluator.held_out, slice(evaluator.num_samples))
        rows = list(evaluator.reference_rows(data))
        set_aside(folder, rows)
        save_samples(folder, held_out, data.spec, evaluator.num_pictures)
        write_rows(folder / "rows.jsonl", rows)
        evaluator.raise_bug()
    return folder


def prepare(experiment: Experiment) -> dict[str, Path]:
    """Train what the experiment requires and the feature networks of its metrics, once per machine.

    Returns:
        The checkpoint of every required experiment, by name; ``teacher.autoencoder`` is what the teacher requires.
    """
    return _prepared(experiment, rehearse(experiment))


def _prepared(experiment: Experiment, data: FlowDataModule) -> dict[str, Path]:
    """See :func:`prepare`; what may have to be fetched comes before what must be trained for long.

    What is trained here for the metrics, a small classifier, comes last: preparations that run side by side share it,
    and the long one is not to wait until another has trained it.
    """
    evaluator, device = experiment.build_evaluator(), _features_device(experiment)
    metrics = evaluator.metrics.values() if evaluator is not None else ()
    fetched = any(is_pretrained(name, data) for metric in metrics for name in metric.extractors)
    if evaluator is not None and fetched:
        evaluator.prepare(data, device)
    found = required_checkpoints(experiment)
    if evaluator is not None and not fetched:
        evaluator.prepare(data, device)
    return found


def _features_device(experiment: Experiment) -> torch.device:
    """Device for feature extraction when no trainer exists yet: the training device."""
    accelerator = (experiment.resolved.get("trainer") or {}).get("accelerator", "auto")
    if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def _require_evaluator(experiment: Experiment) -> None:
    if experiment.resolved.get("evaluator") is None:
        raise ValueError("the configuration has no section evaluator, so there is nothing to measure")


# ---- building -----------------------------------------------------------------------------------------


def _build(experiment: Experiment, *, training: bool) -> Run:
    _set_threads()
    data = rehearse(experiment, training=training)
    checkpoints = _prepared(experiment, data)
    built = experiment.build(checkpoints, data)
    module = built.model
    if not isinstance(module, TrainingModule):
        raise ValueError(f"model.class_path must name a flowbench module, got {type(module).__name__}")
    module.seed = experiment.seeds["noise"]
    module.required_flops = required_flops(checkpoints)
    if isinstance(module, FlowModule):
        module.fit_to(built.datamodule, training=training)
    budget = _budget(experiment, built, module)
    module.budget = budget
    if built.evaluator is not None:
        measured_module(module)
        _identify(built.evaluator, experiment)
        built.evaluator.budget = budget
    progress = ProgressFile(experiment.run_dir / "progress.json", budget)
    if built.evaluator is not None:
        built.evaluator.report = progress.stage
    trainer = _trainer(experiment, built, budget, progress, training)
    # The datamodule's refusals come before other processes are started, or each would repeat them.
    built.datamodule.trainer = trainer
    built.datamodule.setup("fit" if training else "test")
    return Run(experiment, built, module, budget, trainer, progress)


def _trained(experiment: Experiment, ckpt: Path | None, but: tuple[str, ...] = ()) -> tuple[Run, Path]:
    """A run with its trained weights, and their file.

    Args:
        experiment: how they are measured.
        ckpt: the file; None takes the run's last.
        but: keys that may differ from the training's.
    """
    path = ckpt or last_checkpoint(experiment.run_dir)
    check_weights(experiment, path, but)
    run = _build(experiment, training=False)
    load_weights(run, path)
    budget = run.budget
    if budget is not None and not budget.finished and run.trainer.is_global_zero:
        print(f"the weights of {path} have {budget.progress:.0%} of their training", file=sys.stderr, flush=True)
    return run, path


def _identify(evaluator: Evaluator, experiment: Experiment) -> None:
    run = experiment.resolved.get("run") or {}
    order = experiment.resolved["data"].get("seed")
    order = experiment.seed if order is None else order
    evaluator.identity = Identity(
        bench=run.get("bench") or "",
        problem=run.get("problem") or "",
        contender=run.get("contender") or run.get("name") or experiment.run_dir.name,
        seed=experiment.seed,
        config_hash=experiment.fingerprint,
        seeds={} if experiment.resolved.get("seeds") is None else {**experiment.seeds, "order": order},
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
        flops_per_step = per_step * meta_module(experiment, data.spec).flops_of_one()
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
    spent = module.preparation
    return Budget(
        limit, flops_per_step=flops_per_step, samples_per_step=per_step, num_train=data.num_train, preparation=spent
    )


def _trainer(
    experiment: Experiment, built: Built, budget: Budget | None, progress: ProgressFile, training: bool
) -> L.Trainer:
    check_strategy(built.trainer_arguments.get("strategy"))
    check_precision(built.trainer_arguments.get("precision"))
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
    stop = StopOnSignal(last_checkpoint(experiment.run_dir))
    callbacks += [part for part in (budget, built.evaluator, progress, stop) if part is not None]
    if training and not arguments.get("fast_dev_run"):
        callbacks.append(_checkpoint_callback(experiment.run_dir, known))
    else:
        arguments["enable_checkpointing"] = False
    arguments["plugins"] = [*listed(arguments.get("plugins")), AtomicCheckpointIO()]
    loggers = list(built.loggers.values())
    _quieten()
    trainer = make_trainer(**arguments, callbacks=callbacks, logger=loggers or False)
    check_precision(arguments.get("precision"), trainer.precision)
    return trainer


def _quieten() -> None:
    """Leave out Lightning's advertisements and the deprecations of its own code; warnings still show."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # Later ones are refused, or change nothing.
    warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported on CPU")
    warnings.filterwarnings("ignore", message=".*is supported for historical reasons")
    # Under another budget the same callback saves at other steps, and its name shows no more than that.
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    # A run's folder is its own: that it holds a checkpoint is how a run goes on.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")


def _checkpoint_callback(run_dir: Path, max_steps: int | None) -> ModelCheckpoint:
    when: dict[str, Any] = (
        {"every_n_train_steps": max(1, max_steps // CHECKPOINTS)}
        if max_steps
        else {"train_time_interval": timedelta(seconds=CHECKPOINT_SECONDS)}
    )
    return ModelCheckpoint(run_dir / "checkpoints", filename="last", save_top_k=1, enable_version_counter=False, **when)


# ---- threads ------------------------------------------------------------------------------------------


def _set_threads() -> None:
    """The bench shares the cores out between concurrent cells."""
    threads = os.environ.get("FLOWBENCH_THREADS")
    if threads is not None:
        torch.set_num_threads(int(threads))
