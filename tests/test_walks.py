"""The page about the architecture counts the files of its two walks as they are."""

from __future__ import annotations

import re
from pathlib import Path

from .walks import loader_to_loss, noise_to_row

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"


def test_the_counts_of_the_page_are_those_of_today():
    found = [int(number) for number in re.findall(r"\*\*(\d+)\*\*", PAGE.read_text(encoding="utf-8"))]
    # What another test has made happen once, such as a remark, does not happen again in this process.
    for stated, measured in zip(found, (len(loader_to_loss()), len(noise_to_row())), strict=True):
        assert stated - 4 <= measured <= stated


def test_the_files_of_the_first_walk_are_named_in_the_page():
    text = PAGE.read_text(encoding="utf-8")
    walk = text[text.index("## A batch") : text.index("## A sample")]
    for file in loader_to_loss():
        assert Path(file).stem in walk, file
