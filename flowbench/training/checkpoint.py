"""Reading checkpoints: plain tensors only, and one clear line when a file is not what it should be."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from flowbench.core.places import expand
from flowbench.core.storage import write_atomic
from flowbench.training.module import TrainingModule

__all__ = ["AtomicCheckpointIO", "load_checkpoint", "read_checkpoint"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it, so a crash or a full disk leaves the previous one whole.

    Lightning's own writer collects the file in the system's temporary folder; where that is another file system, the
    final move is a copy, and a process killed in the middle of it leaves half a checkpoint.

    Attributes:
        step: optimiser steps behind the checkpoint that was written last; None before the first.

    Example:
        >>> import tempfile
        >>> io = AtomicCheckpointIO()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     io.save_checkpoint({"global_step": 7, "state_dict": {"w": torch.ones(2)}}, f"{folder}/last.ckpt")
        ...     read_checkpoint(f"{folder}/last.ckpt")["state_dict"]
        {'w': tensor([1., 1.])}
        >>> io.step
        7
    """

    step: int | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write the checkpoint.

        Raises:
            OSError: when the disk is full or the folder cannot be written; the previous file is left as it was.
        """
        content = io.BytesIO()
        torch.save(checkpoint, content)

        def write(file: IO[bytes]) -> None:
            file.write(content.getbuffer())

        write_atomic(path, write)
        self.step = checkpoint.get("global_step")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True``.

    Args:
        path: a file that ``flowbench fit`` wrote.

    Returns:
        The checkpoint's dictionary, tensors on the CPU.

    Raises:
        ValueError: when the file is missing, cut short, or holds anything but tensors and plain types.
    """
    path = expand(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}: give a .ckpt file, e.g. RUN/checkpoints/last.ckpt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on arbitrary bytes the unpickler raises anything: IndexError, UnicodeDecodeError, ...
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f"the checkpoint {path} cannot be read, it is cut short or corrupt: {reason}") from error
    if not isinstance(state, dict) or "state_dict" not in state:
        raise ValueError(f"{path} is not a flowbench checkpoint: it has no state_dict")
    return state


def load_checkpoint(module: TrainingModule, path: str | Path) -> dict[str, Any]:
    """Load live and averaged weights into a module built from the configuration beside the checkpoint.

    Returns:
        The checkpoint's dictionary, for its counters.

    Raises:
        ValueError: when the file is unreadable, or of another family, shape or architecture.
    """
    state = read_checkpoint(path)
    module.on_load_checkpoint(state)
    try:
        module.load_state_dict(state["state_dict"])
    except RuntimeError as error:
        detail = str(error).splitlines()
        reason = (detail[1] if len(detail) > 1 else detail[0]).strip()[:160]
        raise ValueError(f"the checkpoint {path} does not fit the configured model: {reason}") from error
    return state
