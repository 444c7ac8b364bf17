from __future__ import annotations

import importlib

import pytest

from flowbench.cli import main
from flowbench.commands.listing import listing


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Where every item has one line; narrow ones are tested with the commands."""
    monkeypatch.setenv("COLUMNS", "400")


def test_classes_are_listed_by_the_name_that_class_path_takes():
    for kind, expected in (
        ("families", {"flowbench.families.WeightedCFM", "flowbench.families.STARFlow"}),
        ("networks", {"flowbench.networks.DiT", "flowbench.networks.MLP"}),
        ("metrics", {"flowbench.evaluation.FrechetDistance"}),
    ):
        title, *lines = listing(kind).splitlines()
        assert title == kind
        names = {line.split()[0] for line in lines}
        assert expected <= names
        for name in names:
            module, _, attribute = name.rpartition(".")
            assert isinstance(getattr(importlib.import_module(module), attribute), type)
        assert all(len(line.split()) > 3 for line in lines)  # every one says what it is
    assert "FlowModule" not in listing("families")


def test_datasets_and_their_licence(capsys):
    assert main(["list", "datasets"]) == 0
    listed = capsys.readouterr().out
    assert "  digits" in listed
    assert "CC BY 4.0" in listed
    assert "image_folder" in listed


def test_experiments_say_what_they_are(write):
    write("experiments/base/trainer.yaml", "trainer: {}\n")
    write("experiments/toy/cfm.yaml", "# Flow matching on moons.\nseed: 0\n")
    write("experiments/duel.yaml", "# a bench\nquestion: Which one?\n")
    title, *lines = listing("experiments").splitlines()
    assert title == "experiments"
    assert [" ".join(line.split()) for line in lines if "flowbench:" not in line] == [
        "experiments/duel.yaml Which one?",
        "experiments/toy/cfm.yaml Flow matching on moons.",
    ]


def test_everything_at_once_and_an_unknown_list():
    text = listing()
    assert [text.index(f"{k}\n") for k in ("families", "datasets", "metrics", "networks", "experiments")]
    with pytest.raises(ValueError, match="there is no list of 'x'"):
        listing("x")
