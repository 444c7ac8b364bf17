"""The output folder of ``flowbench predict``: never over other files, another run's samples, or its own input."""

from __future__ import annotations

from pathlib import Path

from flowbench.commands.prediction.request import Request
from flowbench.commands.run_folder import claim, read_manifest

__all__ = ["check_output", "file_names"]

_REMEDY = "give another --output"


def file_names(task: str) -> tuple[str, str]:
    """Names of the arrays and of the picture that a task leaves beside ``manifest.json``."""
    return ("samples.npz", "grid.png") if task == "sample" else (f"{task}.npz", f"{task}.png")


def check_output(request: Request, folder: Path, checkpoint: Path) -> None:
    """The same task with the same checkpoint may write over what it wrote before, and nothing else may.

    Raises:
        ValueError: names what lies in the folder.
    """
    claim(folder, "predict", _REMEDY)
    targets = [folder / name for name in (*file_names(request.task), "manifest.json")]
    given = [request.images] if request.images is not None else []
    given += [Path(request.mask)] if request.mask.lower().endswith(".png") else []
    for path in given:
        if path.resolve() in [target.resolve() for target in targets]:
            raise ValueError(f"{path} would be written over while it is read: {_REMEDY}")
    found = [target.name for target in targets if target.exists()]
    if not found:
        return
    before = read_manifest(folder)
    if before is None:
        raise ValueError(f"{folder} holds {', '.join(found)}, which predict did not write: {_REMEDY}")
    if before["task"] != request.task or Path(str(before["checkpoint"])).resolve() != checkpoint.resolve():
        raise ValueError(f"{folder} holds what --task {before['task']} made with {before['checkpoint']}: {_REMEDY}")
