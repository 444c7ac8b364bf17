"""Shared set-up: one thread, and the import guard before anything imports Lightning."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

from flowbench.torchvision_guard import ensure_importable

ensure_importable()
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _shared_cache(tmp_path_factory):
    """One cache of feature networks and autoencoders for the session, away from the user's."""
    previous = os.environ.get("FLOWBENCH_CACHE")
    os.environ["FLOWBENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if previous is None:
        del os.environ["FLOWBENCH_CACHE"]
    else:
        os.environ["FLOWBENCH_CACHE"] = previous
