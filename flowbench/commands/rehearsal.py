"""A rehearsal of an experiment: all that it describes is built but for the weights, before anything expensive begins.

Models lie on the meta device, with untrained ones for what they require; no data are read but the user's own, nothing
is fetched, trained or written. What would be refused in the middle of a run, or after its training, is refused here, in
the same words.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from flowbench.commands.lightning_trainer import make_trainer
from flowbench.config import fingerprint
from flowbench.core.checks import named
from flowbench.data.datamodule import check_train_size
from flowbench.evaluation.measurable import check_measurable
from flowbench.training import BudgetLimit, TrainingModule, check_precision, check_strategy

if TYPE_CHECKING:
    from flowbench.config import Experiment
    from flowbench.data import FlowDataModule
    from flowbench.evaluation import Evaluator

__all__ = ["Rehearsal", "rehearse"]

# No model here does more operations in a training step than this for each parameter and number of a sample: a budget
# that pays for as many need not be counted.
MOST_PER_PARAMETER = 100


def rehearse(experiment: Experiment, *, training: bool = True) -> FlowDataModule:
    """Rehearse an experiment that is to run here and now.

    Args:
        experiment: validated configuration.
        training: whether it is to be trained, and not only measured.

    Returns:
        Its data; the user's own are read.

    Raises:
        ValueError: one line, for the first thing that would keep the run from its end.
    """
    return Rehearsal(here=True).run(experiment, training=training)


class Rehearsal:
    """Rehearses experiments, and parts that they have in common once.

    Args:
        here: whether they are to run on this machine, so that its accelerators count and the user's data are read. Else
            what is declared of them is believed.
    """

    def __init__(self, *, here: bool) -> None:
        self.here = here
        self._data: dict[str, FlowDataModule] = {}
        self._trainers: dict[str, L.Trainer] = {}
        self._done: set[str] = set()

    def run(
        self, experiment: Experiment, *, training: bool = True, evaluator: Evaluator | None = None
    ) -> FlowDataModule:
        """Rehearse an experiment and, before it, those that it requires.

        Args:
            experiment: validated configuration.
            training: whether it is to be trained, and not only measured.
            evaluator: of an equal experiment, in place of its own.

        Returns:
            Its data.

        Raises:
            ValueError: one line, for the first thing that would keep the run from its end.
        """
        for name, needed in experiment.requirements.items():
            with named(f"requires.{name}"):
                self._required(needed)
        data = self._data_of(experiment)
        check_train_size(data.train_size, self._split_size(data), data.dataset)
        module = _built_somewhere(lambda: self._untrained(experiment))
        trainer = self._trainer(experiment)
        data.check_trainer(trainer)
        if training:
            module.check_training(data, trainer)
        evaluator = evaluator or experiment.build_evaluator()
        if evaluator is not None:
            check_measurable(evaluator, module, data, trainer.world_size)
        # The last, for it takes out of the module what looks at values.
        if training:
            _try_a_step(module, lambda: self._untrained(experiment))
            self._check_budget(experiment, module, trainer)
        return data

    def _required(self, experiment: Experiment) -> None:
        if experiment.fingerprint not in self._done:
            self.run(experiment)
            self._done.add(experiment.fingerprint)

    def _data_of(self, experiment: Experiment) -> FlowDataModule:
        key = _key(experiment.resolved["data"], experiment.seed)
        if key not in self._data:
            data = experiment.build_data()
            # Both read an entry's declaration: without the first, what is declared would be compared too late.
            _ = data.spec if self.here else data.known_spec
            self._data[key] = data
        return self._data[key]

    def _untrained(self, experiment: Experiment) -> TrainingModule:
        """The model on the device of the context, upon untrained ones of its own data."""
        required = {name: self._untrained(needed) for name, needed in experiment.requirements.items()}
        module = experiment.build_model(self._data_of(experiment).known_spec, **required)
        if not isinstance(module, TrainingModule):
            raise ValueError(f"model.class_path must name a flowbench module, got {type(module).__name__}")
        return module

    def _trainer(self, experiment: Experiment) -> L.Trainer:
        arguments = experiment.resolved.get("trainer") or {}
        key = _key(arguments, experiment.resolved.get("callbacks"), experiment.resolved.get("loggers"))
        if key not in self._trainers:
            with _told():
                values = experiment.build_trainer_parts()
                self._trainers[key] = _trainer(values if self.here else _elsewhere(values))
        return self._trainers[key]

    def _check_budget(self, experiment: Experiment, module: TrainingModule, trainer: L.Trainer) -> None:
        """Refuse a budget that does not pay for one step, as far as that is known without data."""
        if experiment.budget is None:
            return
        limit, data = BudgetLimit.from_mapping(experiment.budget), self._data_of(experiment)
        per_step, flops = data.batch_size * trainer.accumulate_grad_batches, 1
        num_train = data.train_size or self._split_size(data)
        if limit.kind == "train_flops":
            parameters = list(module.parameters())
            most = MOST_PER_PARAMETER * sum(p.numel() for p in parameters) * module.spec.num_dims * per_step
            if limit.amount < most and all(parameter.is_meta for parameter in parameters):
                flops = per_step * module.flops_of_one()
        if limit.kind != "epochs" or num_train:
            limit.max_steps(flops, per_step, num_train or 1)

    def _split_size(self, data: FlowDataModule) -> int | None:
        """Size of the training split; None where it is not known unread."""
        if data.declared is not None and not self.here:
            return None
        sizes = data.entry.num_samples
        return sizes.get("train", 0) + (sizes.get("val", 0) if data.train_on_val else 0) or None


def _trainer(values: Mapping[str, Any]) -> L.Trainer:
    check_strategy(values.get("strategy"))
    check_precision(values.get("precision"))
    ours = {"max_epochs": -1, "max_steps": -1, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = make_trainer(use_distributed_sampler=False, **{**ours, **values, **quiet, "max_steps": -1})
    check_precision(values.get("precision"), trainer.precision)
    return trainer


def _elsewhere(values: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's arguments as another machine would take them: without its accelerators, with as many processes."""
    devices = values.get("devices", 1)
    if isinstance(devices, list | tuple):
        devices = len(devices)
    elif not isinstance(devices, int) or devices < 1:
        devices = 1
    here = {"accelerator": "cpu", "devices": devices}
    precision = {"precision": "bf16-mixed"} if str(values.get("precision")).startswith("16") else {}
    return {**values, **here, **precision}


def _key(*parts: Any) -> str:
    # One level down nothing is left out of a fingerprint.
    return fingerprint({"part": list(parts)})


# ---- models -------------------------------------------------------------------------------------------


def _built_somewhere(build: Callable[[], TrainingModule]) -> TrainingModule:
    """A model on the meta device, or on the CPU where its constructor wants to see numbers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is a no-op")  # weights of an untrained model are copied
        try:
            with torch.device("meta"):
                return build()
        except (NotImplementedError, RuntimeError):
            return build()


def _try_a_step(module: TrainingModule, build: Callable[[], TrainingModule]) -> None:
    """Compute the loss of one sample of the right shape.

    Raises:
        ValueError: what the model refuses, or what keeps it from computing on samples of this shape.
    """
    try:
        module.loss_of_one()
    except ValueError:
        raise
    except Exception:
        # It may have looked at a number, which the meta device does not have.
        _try_for_real(build())


def _try_for_real(module: TrainingModule) -> None:
    try:
        module.loss_of_one()
    except ValueError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{type(module).__name__} cannot be trained on data of shape {module.spec.shape}: "
            f"{type(error).__name__}: {reason}"
        ) from error


# ---- words --------------------------------------------------------------------------------------------


@contextmanager
def _told() -> Iterator[None]:
    """Lightning's refusals as ours, and none of its remarks."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (MisconfigurationException, ModuleNotFoundError) as error:
        raise ValueError(f"trainer: {' '.join(str(error).split())}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
