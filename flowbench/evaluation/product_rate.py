"""How fast this machine multiplies matrices: what a training could reach at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

from flowbench.core import onednn
from flowbench.core.autocast import autocast_off
from flowbench.core.devices import wait_for

__all__ = ["measure_product_rate", "product_rate"]

# Sides of the square factors: large enough for the full rate, small enough to take a few milliseconds.
_CPU_SIDE, _ACCELERATOR_SIDE = 512, 4096
_REPEATS = 9


def product_rate(device: torch.device) -> float:
    """Operations a second of a large float32 product on a device, with the threads of this process.

    Measured once for each process and number of threads.

    Returns:
        FLOP/s, two operations for a multiply-add.
    """
    return _product_rate(device, torch.get_num_threads())


@cache
def _product_rate(device: torch.device, threads: int) -> float:
    return measure_product_rate(device)


def measure_product_rate(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """The rate of the fastest of a few products, by whichever library is the faster one.

    Args:
        device: where is multiplied.
        clock: seconds, monotonic; tests pass their own.

    Returns:
        FLOP/s.
    """
    side = _CPU_SIDE if device.type == "cpu" else _ACCELERATOR_SIDE
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=rng).to(device) for _ in range(2))
    ways: list[Callable[[], object]] = [lambda: a @ b.T]
    if device.type == "cpu" and onednn.is_usable():
        ways.append(lambda: onednn.linear(a, b))
    with torch.no_grad(), autocast_off(device):
        return 2 * side**3 / min(_seconds(way, device, clock) for way in ways)


def _seconds(way: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """The fastest call after a first one."""
    found = []
    for _ in range(_REPEATS + 1):
        began = clock()
        way()
        wait_for(device)
        found.append(clock() - began)
    return min(found[1:])
