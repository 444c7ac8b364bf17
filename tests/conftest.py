"""Shared set-up: threads and kernels as asked, one cache for all workers, and no test that leaves traces behind.

Two variables of the environment choose what the numerical tests run on (see ``tests/portable.py``):
``FLOWBENCH_TEST_THREADS``, torch's threads, one by default, and ``FLOWBENCH_TEST_ONEDNN=0``, which turns oneDNN off.
"""

from __future__ import annotations

import os

# Before torch is imported, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = os.environ.get("FLOWBENCH_TEST_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import importlib
import logging
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbench.bench.machine import available_cores

WORKER_BYTES = 3 * 2**29  # what a worker takes at most

# The first run of a process turns these remarks off for good; whichever test that is, the others meet the same.
importlib.import_module("lightning")  # it sets the levels when it is imported, and must be so after flowbench
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.WARNING)
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# Whoever starts the tests in the background (`nohup`, `&`) has them ignore what some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if os.environ.get("FLOWBENCH_TEST_ONEDNN") == "0":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of cards that are not there
        torch.backends.mkldnn.set_flags(_enabled=False)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """``-n auto`` takes the cores that this process may use, not those of the machine, as far as its memory goes."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(available_cores(), memory // WORKER_BYTES))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the session and all its workers; whoever writes there holds a lock."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def _shared_cache(shared_folder: Path) -> Iterator[None]:
    """One cache of feature networks and autoencoders, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWBENCH_CACHE", str(shared_folder / "cache"))
        yield


# Of pytest and of packages that are imported.
VOLATILE = ("PYTEST_", "KMP_", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "PYTORCH_NVML_", "TRITON_")
# What Lightning leaves for the processes that a command starts.
SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")


def global_state() -> dict[str, Any]:
    """What one test could leave to the next; random numbers excepted, which no test takes unseeded."""
    state: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "oneDNN": torch.backends.mkldnn.enabled,
        "working directory": os.getcwd(),
    }
    state |= {
        f"log level of {name!r}": logging.getLogger(name).level for name in ("", "lightning.pytorch", "flowbench")
    }
    return state | {f"${name}": value for name, value in os.environ.items() if not name.startswith(VOLATILE)}


def _drop_seeds() -> None:
    for name in SEEDS:
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _leave_no_trace() -> Iterator[None]:
    """Any order of the tests is a good one: each leaves the process as it found it."""
    _drop_seeds()  # those of what several tests share, which is made before
    before = global_state()
    yield
    _drop_seeds()
    after = global_state()
    changed = {
        name: f"{before.get(name)} -> {after.get(name)}"
        for name in before | after
        if before.get(name) != after.get(name)
    }
    assert not changed, f"the test changed what others meet: {changed}"
