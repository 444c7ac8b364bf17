"""Parameters whose tests are slow ones: what a sibling covers is left to `make test-slow`."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """The values of one case, which only a run of the slow tests takes."""
    return pytest.param(*values, marks=pytest.mark.slow)
