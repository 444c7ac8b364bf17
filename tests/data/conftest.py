"""Full data sets for the tests that want them, and a user who may not write everywhere."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flowbench.core.places import data_root
from flowbench.data import get


@pytest.fixture(scope="session")
def full_set() -> Callable[[str], Path]:
    """The folder that holds a data set, fetched as a user would; the test is skipped where it cannot be had."""

    def have(name: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("FLOWBENCH_CACHE", raising=False)  # the session's, which is thrown away
            root = data_root(name)
        entry = get(name)
        try:
            if entry.fetch is not None and not entry.is_present(root):
                entry.fetch(root, print)
        except ValueError as error:
            if "sha256" in str(error):  # what was had is wrong: that is a failure
                raise
            pytest.skip(f"{name} cannot be had: {error}")
        return root

    return have


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder of root's, while this process has no right to write there (root may write anywhere)."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)
