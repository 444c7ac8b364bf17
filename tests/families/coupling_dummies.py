"""Couplings that a worker process imports: with little else beside them, so that it is up soon."""

from __future__ import annotations

import os
import signal
import time

import torch

from flowbench.flows import Coupling, OptimalTransportCoupling


class Slow(OptimalTransportCoupling):
    """Keeps the worker busy."""

    def _pair(self, x0, x1, generator, *condition):
        time.sleep(60)
        return super()._pair(x0, x1, generator, *condition)


class Picky(Coupling):
    """Random pairs of most points; refuses, fails or dies at others."""

    def _pair(self, x0, x1, generator, *condition):
        if bool((x1 == 7).all()):
            raise ValueError("sevens are not coupled: give other points")
        if bool((x1 == 8).all()):
            raise KeyError("eight")
        if bool((x1 == 9).all()):
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.randperm(len(x1), generator=generator)
