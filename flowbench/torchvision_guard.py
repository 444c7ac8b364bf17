"""Make ``import torchvision`` succeed where a CUDA wheel lies beside a CPU build of torch.

An index may serve torchvision as a CUDA wheel only. Its C++ library then fails to load, the operator
schemas it would have declared are missing, and the import dies with "operator torchvision::nms does not
exist". Lightning, torchmetrics and torch-fidelity import torchvision whenever it is installed, so they all
die with it. Declaring the two schemas that the Python side registers fake kernels for is enough: the package
imports, and a call of a compiled operator (which flowbench never makes) still fails with torch's own clear
error.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

__all__ = ["ensure_importable"]

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

# torch forgets the schemas when the object that declared them dies.
_library: torch.library.Library | None = None


def ensure_importable() -> None:
    """Import torchvision once, mending the one fault described above; otherwise change nothing.

    Call it before the first import of lightning, torchmetrics or torch_fidelity. Any other fault of
    torchvision is left for whoever imports it to meet.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" in str(error):
            _declare_missing_operators()
            importlib.import_module("torchvision")
    except (ImportError, OSError):
        return


def _declare_missing_operators() -> None:
    """Declare the operator schemas and forget the half-imported package."""
    global _library
    for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define(f"nms{_SCHEMA}")
    library.define(f"qnms{_SCHEMA}")
    _library = library
