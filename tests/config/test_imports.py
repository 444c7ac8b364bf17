"""Class paths of earlier versions."""

from __future__ import annotations

import importlib

import pytest

from flowbench.config.imports import MOVED, import_class


@pytest.mark.parametrize("old", MOVED)
def test_a_class_that_moved_is_found_under_its_old_name(old):
    module, _, name = MOVED[old].rpartition(".")
    assert import_class("model", old) is getattr(importlib.import_module(module), name)
    with pytest.raises((AttributeError, ModuleNotFoundError)):  # or the entry is not needed
        getattr(importlib.import_module(old.rpartition(".")[0]), name)
