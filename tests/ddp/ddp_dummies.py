"""Classes that the YAML of these tests names."""

from __future__ import annotations

import os
import signal
import time

import torch

from flowbench.core.no_solution import NoSolutionError
from flowbench.families import FlowMap, TARFlow
from flowbench.training import Loss


class PoisonedTARFlow(TARFlow):
    """Its loss is NaN at step 2 on process 1 alone, while the environment says so."""

    def loss(self, *given):
        loss = super().loss(*given)
        poisoned = "FLOWBENCH_TEST_POISON" in os.environ and self._trainer is not None
        if poisoned and self.trainer.global_step == 2 and self.global_rank == 1:
            return Loss(loss.total * float("nan"))
        return loss


class EndingTARFlow(TARFlow):
    """Ends one process in the way that the environment says: ``rank,step,how`` with a signal, `error` or `mistake`."""

    def on_train_batch_start(self, batch, batch_idx):
        self._end(self.trainer.global_step)

    def on_test_batch_start(self, batch, batch_idx):
        self._end("test")

    def _end(self, step):
        rank, when, how = os.environ.get("FLOWBENCH_TEST_END", "9,9,").split(",")
        if str(step) != when:
            return
        if int(rank) != self.global_rank:
            # Work without a word to the others, as drawing samples is.
            time.sleep(float(os.environ.get("FLOWBENCH_TEST_WORK", "0")))
        elif how == "error":
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        elif how == "mistake":
            raise ValueError("data.path holds something else here")
        else:
            os.kill(os.getpid(), getattr(signal, how))


class GivingUp(TARFlow):
    """Has neither densities nor samples on process 1; its paths are there on all."""

    def flow_log_prob(self, *given):
        self._give_up()
        return super().flow_log_prob(*given)

    def flow_sample(self, *given):
        self._give_up()
        return super().flow_sample(*given)

    def _give_up(self):
        if self.global_rank == 1:
            raise NoSolutionError("no answer here")


class SpyFlowMap(FlowMap):
    """Keeps the trained weights of every process in the folder that the environment names.

    Only gradients are exchanged: had they differed, so would the weights.
    """

    def on_train_end(self):
        super().on_train_end()
        folder = os.environ["FLOWBENCH_TEST_WEIGHTS"]
        torch.save(self.state_dict(), f"{folder}/{self.map_objective!r}-{self.global_rank}.pt")
