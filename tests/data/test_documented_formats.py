"""docs/data.md: every example writes its file, and what is printed of it is what the page says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml

from flowbench.core.folders import IMAGE_SUFFIXES
from flowbench.core.remarks import say_once
from flowbench.data import USER_FORMATS, FlowDataModule

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```\n```yaml\n(.*?)```\n```text\n(.*?)```", PAGE, re.DOTALL)


def test_every_block_of_code_is_a_part_of_an_example():
    assert len(EXAMPLES) == len(re.findall(r"```python", PAGE)) == len(re.findall(r"```text", PAGE)) >= 4


@pytest.mark.parametrize(
    ("program", "configuration", "line"), EXAMPLES, ids=[e[1].split("path: ")[1] for e in EXAMPLES]
)
def test_an_example_is_understood_as_the_page_says(tmp_path, monkeypatch, capsys, program, configuration, line):
    monkeypatch.chdir(tmp_path)
    say_once.cache_clear()
    (tmp_path / "example.py").write_text(program)
    runpy.run_path("example.py")
    options = yaml.safe_load(configuration)["data"]
    without = {key: value for key, value in options.items() if key in ("dataset", "path")}
    if without != options:
        (answer,) = options.keys() - without.keys()
        with pytest.raises(ValueError, match=f"data.{answer}="):
            _ = FlowDataModule(**without).spec
    _ = FlowDataModule(**options).spec
    assert capsys.readouterr().err == line


def test_every_format_suffix_and_option_is_named():
    table = PAGE.split("## Your own data")[1]
    assert all(f"| `{name}` |" in table for name in USER_FORMATS)
    assert all(suffix in table for suffix in IMAGE_SUFFIXES)
    assert all(f"data.{option}=" in table for option in ("levels", "value_range", "standardize"))
