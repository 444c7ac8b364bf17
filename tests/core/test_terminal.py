from __future__ import annotations

import shlex

import pytest

from flowbench.core.terminal import command_lines, duration, terminal_width, wrapped


@pytest.mark.parametrize(("columns", "width"), [("120", 120), ("20", 40), ("no", 80)])
def test_the_width_is_the_terminals(columns, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert terminal_width() == width


def test_text_is_wrapped_between_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    path = "/a/path/" + "x" * 60
    text = wrapped(f"some words that\n are followed by {path} and more", "name  ", "      ")
    lines = text.splitlines()
    assert lines[0].startswith("name  some words")
    assert all(line.startswith("      ") for line in lines[1:])
    assert path in text
    assert all(len(line) <= 40 or line.strip() == path for line in lines)
    assert wrapped("", "name  ") == "name"


def test_a_command_is_broken_as_a_shell_reads_it(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    command = "flowbench fit -c experiments/digits/wcfm.yaml trainer.max_steps=500 seed=1 --test"
    text = command_lines(command)
    assert "\\\n" in text
    assert shlex.split(text.replace("\\\n", " ")) == command.split()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (59.9, "59.9 s"),
        (60.0, "1 min"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h"),
        (3661.0, "1 h 1 min"),
        (90000.0, "25 h"),
    ],
)
def test_durations_are_in_the_two_largest_units(seconds, text):
    assert duration(seconds) == text
