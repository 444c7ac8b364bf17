"""What every trained module shares: optimiser, schedule, averaging, the NaN guard and the checkpoint's identity."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from flowbench.core.contract import returned
from flowbench.core.distributed import gather_objects
from flowbench.core.seeds import generator
from flowbench.data import Batch, DataSpec, FlowDataModule
from flowbench.training.budget_meter import Budget
from flowbench.training.config import TrainingConfig
from flowbench.training.count import Count, count_flops
from flowbench.training.ema import ExponentialMovingAverage
from flowbench.training.loss_guard import LossGuard, NonFiniteLoss
from flowbench.training.optimizers import AdamW, OptimizerSettings, learning_rate_factor
from flowbench.training.parallel import gathered, shard, shards_weights
from flowbench.training.preparation import Preparation

__all__ = ["Loss", "NonFiniteLossError", "TrainingModule", "WeightsName"]

WeightsName = Literal["ema", "raw"]


class NonFiniteLossError(FloatingPointError):
    """The training loss became NaN or infinite; the message names the step, the samples and the checkpoint.

    Example:
        >>> issubclass(NonFiniteLossError, FloatingPointError)
        True
    """


@dataclass
class Loss:
    """A scalar to minimise and named metrics to log.

    Attributes:
        total: scalar with a gradient.
        metrics: detached scalars, logged as ``train/<name>``.
        diagnostics: computes more of them, or None; called only on logging steps, because it is expensive.

    Example:
        >>> error = torch.tensor([0.25, 0.75], requires_grad=True)
        >>> loss = Loss(total=error.mean(), metrics={"largest": error.detach().max()})
        >>> loss.total.item(), loss.metrics
        (0.5, {'largest': tensor(0.7500)})
    """

    total: Tensor
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
    diagnostics: Callable[[], Mapping[str, Tensor | float]] | None = None


class TrainingModule(L.LightningModule, ABC):
    """Base of everything that is trained; a subclass gives :meth:`training_loss`.

    Randomness of a step is keyed by (seed, step, rank), so a resumed run draws what the uninterrupted run would have.

    Attributes:
        preparation: what was spent on the training before its first step; nothing for most modules.
        required_flops: operations of the trainings of what it was built with, which no budget of its own pays; None
            where there is nothing of the kind, or where they are unknown.
        validation_losses: loss of every validation during training, by the number of steps before it; kept in
            checkpoints. A run that was killed between a checkpoint and the validation after it lacks that one.

    Args:
        spec: the data's shape, classes and value grid.
        training: optimiser, averaged weights and compilation; None takes the defaults.

    Example:
        >>> from flowbench.data import Batch, DataSpec
        >>> class Mean(TrainingModule):
        ...     def __init__(self, spec):
        ...         super().__init__(spec)
        ...         self.mean = torch.nn.Parameter(torch.zeros(spec.shape))
        ...     def training_loss(self, batch, generator):
        ...         return Loss((batch.x - self.mean).square().mean())
        >>> module = Mean(DataSpec("points", "1", (2,)))
        >>> module.training_loss(Batch(torch.ones(3, 2)), torch.Generator()).total.item()
        1.0
    """

    sampling_arguments: ClassVar[frozenset[str]] = frozenset({"training.compile"})
    """Arguments that trained weights do not depend on: a run may be measured, or sampled, with others."""

    def __init__(self, spec: DataSpec, *, training: TrainingConfig | None = None) -> None:
        super().__init__()
        training = training or TrainingConfig()
        self.spec = spec
        self.optimizer_config: OptimizerSettings = training.optimizer or AdamW()
        self.ema_decay = training.ema.decay
        self.compile_networks = training.compile
        self.seed = 0
        self.budget: Budget | None = None
        self.preparation = Preparation()
        self.required_flops: float | None = None
        self.validation_losses: dict[int, float] = {}
        self._ema: ExponentialMovingAverage | None = None
        self._unlogged: Mapping[str, Tensor | float] = {}
        self._guard = LossGuard()

    @abstractmethod
    def training_loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """The loss of one batch; every random number comes from `generator`."""

    # ---- costs ----------------------------------------------------------------------------------------

    def loss_of_one(self) -> Tensor:
        """The training loss of one sample of zeros: what a step costs, and whether it can be computed at all."""
        batch = Batch(torch.zeros(1, *self.spec.shape, device=self.weights_device))
        return returned(self.training_loss(batch, torch.Generator()), Loss, self, "training_loss").total

    def flops_of_one(self) -> int:
        """Operations of a training step per sample, forward and backward."""
        return count_flops(self.loss_of_one)

    @property
    def weights_device(self) -> torch.device:
        """Where the parameters lie: Lightning's ``device`` does not notice that a module was built on another."""
        return next((parameter.device for parameter in self.parameters()), self.device)

    def count(self) -> Count:
        """What the module costs, from shapes alone; built on the meta device it takes neither memory nor time.

        Raises:
            ValueError: by a module that trains no network of its own.
        """
        return Count(
            family=type(self).__name__,
            data=self.spec.shape,
            space=self.spec.shape,
            parameters=sum(p.numel() for p in self.parameters() if p.requires_grad),
            moments=self.optimizer_config.num_moments(self),
            training_flops=self.flops_of_one(),
            averaged=self.ema_decay > 0,
        )

    # ---- weights --------------------------------------------------------------------------------------

    @property
    def ema(self) -> ExponentialMovingAverage | None:
        """The averaged weights; made on first use, when all parameters exist."""
        if self._ema is None and self.ema_decay > 0:
            self._ema = ExponentialMovingAverage(self, self.ema_decay)
        return self._ema

    @contextlib.contextmanager
    def evaluating(self, weights: WeightsName = "ema") -> Iterator[None]:
        """Evaluation mode with the named weights; mode and weights are restored on the way out."""
        was_training = self.training
        self.eval()
        try:
            averaged = self.ema.applied() if weights == "ema" and self.ema else contextlib.nullcontext()
            with averaged, gathered(self):  # sharded weights are exchanged first, then gathered
                yield
        finally:
            self.train(was_training)

    # ---- Lightning hooks ------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Compile the networks in place: the names in checkpoints do not change."""
        if self.compile_networks:
            for module in self.compiled_modules():
                module.compile()

    def check_training(self, data: FlowDataModule, trainer: L.Trainer | None = None) -> None:
        """Refuse what this module cannot be trained with, before anything is read, made or trained; see subclasses.

        It may lie on the meta device.

        Args:
            data: the data; only what is known of them unread is looked at.
            trainer: its strategy and precision are looked at; None where there is none yet.

        Raises:
            ValueError: one line with what to change.
        """
        self.optimizer_config.check(self, sharded=trainer is not None and shards_weights(trainer.strategy))

    def configure_model(self) -> None:
        """Shard the networks where the strategy made a mesh of processes; see :func:`~flowbench.families.shard`."""
        if self.device_mesh is not None:
            shard(self.sharded_modules(), self.device_mesh["data_parallel"], self.parameters())

    def compiled_modules(self) -> list[nn.Module]:
        """What `compile` compiles: modules that are called, for it reaches no other method than ``forward``."""
        return list(self.children())

    def sharded_modules(self) -> list[nn.Module]:
        """What is shared out among processes: modules that are called, which hold all parameters between them."""
        return self.compiled_modules()

    def step_generator(self, batch_idx: int) -> torch.Generator:
        """The generator of one training micro-batch, keyed by step, micro-batch and rank."""
        micro = batch_idx % max(1, self.trainer.accumulate_grad_batches)
        return generator(self.seed, "noise", self.trainer.global_step, micro, self.global_rank, device=self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One loss, guarded: a non-finite value on any process stops the run before it reaches the weights.

        Devices that run behind the host are read on logging steps only; see
        :class:`~flowbench.training.loss_guard.LossGuard`.

        Raises:
            NonFiniteLossError: names the step, the samples and the last checkpoint; on all processes alike.
        """
        loss = returned(self.training_loss(batch, self.step_generator(batch_idx)), Loss, self, "training_loss")
        # Reduced first: a process that stopped alone would leave the others waiting for its gradients.
        value = self.trainer.strategy.reduce(loss.total.detach(), reduce_op="mean")
        optimizer = next(iter(self.trainer.optimizers), None)
        is_logging_step = self._is_logging_step()
        if self._guard.watch(value, self.trainer.global_step, batch.index, optimizer) or is_logging_step:
            self._stop_if_diverged()
        self._unlogged = {}  # of a step that broke off
        if is_logging_step:
            total = loss.total.detach()
            self.log("train/loss", total, prog_bar=True, logger=False, batch_size=len(batch))
            self._unlogged = {"loss": total, **loss.metrics, **(loss.diagnostics() if loss.diagnostics else {})}
        return loss.total

    def _is_logging_step(self) -> bool:
        """Whether loggers are given this step's values."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    def _stop_if_diverged(self) -> None:
        found = self._guard.first()
        if found is not None:
            raise NonFiniteLossError(self._divergence_message(found))

    def on_train_start(self) -> None:
        """Forget the losses of an earlier training."""
        self._guard.reset(self.trainer.optimizers)

    def on_validation_start(self) -> None:
        """Measure nothing whose training has diverged."""
        self._stop_if_diverged()

    def on_train_end(self) -> None:
        """Read the losses since the last logging step."""
        self._stop_if_diverged()

    def _divergence_message(self, found: NonFiniteLoss) -> str:
        index = _global_index(found.index)
        samples = ", ".join(map(str, index[:8])) + ", ..." if index else "unknown"
        saved = getattr(self.trainer.checkpoint_callback, "best_model_path", "") or "none yet"
        return (
            f"the loss became {found.value} at step {found.step} (samples {samples}); "
            f"last good checkpoint: {saved}; lower {self.learning_rate_key} or set trainer.gradient_clip_val"
        )

    @property
    def learning_rate_key(self) -> str:
        """Where a configuration holds the peak learning rate, for messages; only AdamW is written without its class."""
        arguments = "" if type(self.optimizer_config) is AdamW else "init_args."
        return f"model.init_args.training.optimizer.{arguments}lr"

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then average: a checkpoint written at the end of the batch holds both or neither."""
        super().optimizer_step(*args, **kwargs)
        if self.ema:
            self.ema.update()
        if self._unlogged:
            self._write(self._unlogged)
            self._unlogged = {}

    def _write(self, metrics: Mapping[str, Tensor | float]) -> None:
        """One row of the step's values for every logger, and the same values for callbacks.

        Lightning's own ``log`` spends 0.2 ms on each value, as much as a small network's layers, and keeps it through
        every later step. Of accumulated gradients the last micro-batch is written, as there.
        """
        values = {f"train/{name}": float(value) for name, value in metrics.items()}
        tensors = dict(zip(values, torch.tensor(list(values.values())).unbind(), strict=True))
        for seen in (self.trainer.callback_metrics, self.trainer.logged_metrics):
            seen.update(tensors)
        for logger in self.trainer.loggers:
            logger.log_metrics({**values, "epoch": self.current_epoch}, self.trainer.global_step)
            logger.save()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip all gradients together as the trainer says, by their norm unless it says ``value``."""
        self.clip_parameters(_trained(optimizer), gradient_clip_val, gradient_clip_algorithm)

    def clip_parameters(self, parameters: Iterable[nn.Parameter], limit: float | None, algorithm: str | None) -> None:
        """Clip the gradients of some parameters, in place, under every precision.

        (Lightning's own clipping refuses fused optimisers under every mixed precision. Only a scaled loss forbids them,
        whose gradients they unscale after the clipping; :meth:`configure_optimizers` makes none there.)

        Args:
            parameters: what is clipped together.
            limit: largest norm of all gradients, or largest size of each number; None or 0 clips nothing.
            algorithm: ``norm`` or ``value``; None is ``norm``.
        """
        if not limit:
            return
        if algorithm == GradClipAlgorithmType.VALUE:
            nn.utils.clip_grad_value_(parameters, limit)
        else:
            nn.utils.clip_grad_norm_(parameters, limit)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The training objective on held-out data, with the averaged weights.

        Its noise is keyed by (seed, batch, rank) and so the same at every validation of a run; runs with other batches
        or another number of processes draw other noise.
        """
        rng = generator(self.seed, "validation", batch_idx, self.global_rank, device=self.device)
        with self.evaluating():
            loss = self.training_loss(batch, rng)
        size = len(batch)
        self.log("val/loss", loss.total, prog_bar=True, sync_dist=True, batch_size=size)
        # Losses under different weights or couplings do not compare; their unweighted metrics show why.
        metrics = {f"val/{name}": value for name, value in loss.metrics.items()}
        self.log_dict(metrics, sync_dist=True, batch_size=size)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Nothing: an evaluator asks what it measures by itself, and Lightning tests no module without this method."""

    def on_validation_end(self) -> None:
        """Keep the loss of a validation that is part of a training."""
        loss = self.trainer.callback_metrics.get("val/loss")
        if loss is not None and self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.validation_losses[self.trainer.global_step] = float(loss)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser; the schedule follows the budget's progress, be it steps, samples or seconds."""
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer = self.optimizer_config.build(self, fused=not scaled)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda _: learning_rate_factor(self.optimizer_config, self._next_progress())
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _next_progress(self) -> float:
        """Share of the training budget used up in the middle of the step to come: no step has a rate of zero."""
        step = self.trainer.global_step
        if self.budget is not None:
            return self.budget.progress_within(step)
        total = self.trainer.max_steps
        return (step + 0.5) / total if total > 0 else 0.5

    # ---- checkpoints ----------------------------------------------------------------------------------

    @property
    def checkpoint_identity(self) -> dict[str, Any]:
        """What a checkpoint and the module that loads it must agree on, in plain types."""
        return {"family": type(self).__name__, "shape": list(self.spec.shape)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store who wrote the file beside the averaged weights; plain types only, so `weights_only` can load it.

        Raises:
            NonFiniteLossError: nothing is kept of a training that has diverged.
        """
        self._stop_if_diverged()
        checkpoint["flowbench"] = self.checkpoint_identity
        checkpoint["validation_losses"] = dict(self.validation_losses)
        if self.ema:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another family or of other data before any tensor is touched.

        Raises:
            ValueError: names what the file holds and what is expected; also when one of the two has averaged
                weights and the other does not, because an average that is not loaded stays at the initialisation.
        """
        found = checkpoint.get("flowbench")
        if found is None:
            raise ValueError("this file is not a flowbench checkpoint: it does not say which family wrote it")
        for key, value in self.checkpoint_identity.items():
            if found.get(key) != value:
                raise ValueError(
                    f"the checkpoint's {key} is {found.get(key)}, but the configuration builds {value}: "
                    "pass the configuration saved beside the checkpoint"
                )
        if (self.ema_decay > 0) != ("ema" in checkpoint):
            holds = "averaged weights" if "ema" in checkpoint else "no averaged weights"
            raise ValueError(
                f"the checkpoint holds {holds}, but the configuration has training.ema.decay={self.ema_decay:g}: "
                "pass the configuration saved beside the checkpoint"
            )
        if self.ema:
            self.ema.load_state_dict(checkpoint["ema"])
        self.validation_losses = dict(checkpoint.get("validation_losses", {}))  # none in files of earlier versions


def _trained(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _global_index(own: Tensor | None) -> list[int]:
    """Sample indices of a batch over all processes from this process's own; a collective call."""
    index: list[int] = [] if own is None else own.tolist()
    return [i for part in gather_objects(index) for i in part]
