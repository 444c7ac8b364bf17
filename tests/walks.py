"""Which files of the package run on two walks: a training batch from the loader to its loss, and noise to a row.

``python -m tests.walks`` prints them; docs/architecture.md describes them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from flowbench.data import FlowDataModule
from flowbench.evaluation import Evaluator, FrechetDistance
from flowbench.families import FlowMatching
from flowbench.networks import DiT

PACKAGE = Path(__file__).parents[1] / "flowbench"


@contextmanager
def recorded(files: set[str]) -> Iterator[None]:
    """Add the package's files whose functions are called."""

    def look(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            files.add(str(path.relative_to(PACKAGE)))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)


def small() -> tuple[FlowMatching, FlowDataModule]:
    torch.manual_seed(0)
    data = FlowDataModule("digits", batch_size=16)
    return FlowMatching(data.spec, partial(DiT, width=16, depth=1, num_heads=2, patch_size=2)), data


def loader_to_loss() -> set[str]:
    """The next batch of the training loader, and the loss of flow matching on it."""
    flow, data = small()
    loader, files = iter(data.train_dataloader()), set[str]()
    next(loader)  # reads the data
    with recorded(files):
        flow.training_loss(next(loader), torch.Generator().manual_seed(0))
    return files


def noise_to_row() -> set[str]:
    """From asking for samples to the row of a Frechet distance, the reference and its moments being at hand."""
    flow, data = small()
    evaluator, files = Evaluator({"fd": FrechetDistance("identity")}, num_samples=40), set[str]()
    evaluator.prepare(data)

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            with recorded(files):
                return method(*given, **options)

        return call

    evaluator._ask, evaluator._rows = watched(evaluator._ask), watched(evaluator._rows)  # type: ignore[method-assign]
    import lightning as L  # after the package, which guards what it imports

    with tempfile.TemporaryDirectory() as folder:
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        trainer = L.Trainer(
            accelerator="cpu", inference_mode=False, default_root_dir=folder, callbacks=[evaluator], **quiet
        )
        trainer.test(flow, data, verbose=False)
    return files


def main() -> None:
    for walk in (loader_to_loss, noise_to_row):
        files = sorted(walk())
        print(f"{walk.__name__}: {len(files)} files", *files, sep="\n  ")


if __name__ == "__main__":
    main()
