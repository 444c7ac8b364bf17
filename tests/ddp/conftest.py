from __future__ import annotations

import pytest
from processes import Workplace


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("ddp"))
