"""What only a GPU shows; without one every test here is skipped and says so.

``FLOWBENCH_TEST_DEVICE=cpu`` runs the tests on the CPU, as far as they ask nothing of CUDA: their code is then tried,
their subject is not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
DEVICE = torch.device(os.environ.get("FLOWBENCH_TEST_DEVICE", "cuda"))
# Left by Lightning for processes that it may start, by strategies and by `deterministic`.
LIGHTNING = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "WORLD_SIZE",
    "NODE_RANK",
    "LOCAL_RANK",
    "CUDA_DEVICE_ORDER",
    "CUBLAS_WORKSPACE_CONFIG",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if DEVICE.type == "cuda" and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> torch.device:
    """Where the subject lies."""
    return DEVICE


@pytest.fixture
def accelerator() -> str:
    """Lightning's word for it."""
    return "gpu" if DEVICE.type == "cuda" else "cpu"


@pytest.fixture
def cuda() -> None:
    """Asked for by tests of what CUDA alone has."""
    if DEVICE.type != "cuda":
        pytest.skip("asks CUDA for what other devices lack")


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    """Take back what a run of Lightning changes for the whole process."""
    before = {name: os.environ.get(name) for name in LIGHTNING}
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.use_deterministic_algorithms(deterministic)
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Products and convolutions in true float32, so that both devices compute the same."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
