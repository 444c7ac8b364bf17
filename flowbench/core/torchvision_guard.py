"""Let ``import torchvision`` succeed where a CUDA wheel lies beside a CPU build of torch.

An index may serve torchvision as a CUDA wheel only. Its C++ library then fails to load, the operator schemas it would
have declared are missing, and the import dies with "operator torchvision::nms does not exist". Lightning, torchmetrics
and torch-fidelity import torchvision whenever it is installed, so they all die with it. Declaring the two schemas that
the Python side registers fake kernels for is enough: the package imports, and a call of a compiled operator (which
flowbench never makes) still fails with torch's own clear error.

Importing this module is the guard: it acts when torchvision is imported, from any module. ``import flowbench``
imports it, and costs nothing where torchvision is never imported.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

# torch forgets the schemas when the object that declared them dies.
_library: Any = None


class _Finder(importlib.abc.MetaPathFinder):
    """Finds torchvision as the other finders do, and replaces its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if finder is self or find is None or (spec := find(fullname, path, target)) is None:
                continue
            if spec.loader is not None:
                spec.loader = _Loader(spec.loader)
            return spec
        return None


class _Loader(importlib.abc.Loader):
    """Loads torchvision; meets the one fault that is described above by declaring what is missing."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self._loader.exec_module(module)
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]  # half-imported
            _declare_missing_operators()
            self._loader.exec_module(module)


def _declare_missing_operators() -> None:
    global _library
    import torch

    _library = torch.library.Library("torchvision", "FRAGMENT")
    _library.define(f"nms{_SCHEMA}")
    _library.define(f"qnms{_SCHEMA}")


if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder())
