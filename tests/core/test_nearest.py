"""The hint at the end of a message about an unknown name."""

import pytest

from flowbench.core.nearest import nearest, suggestion

KINDS = ("train_flops", "train_seconds", "steps", "samples_seen", "epochs")


@pytest.mark.parametrize(
    ("name", "near"), [("step", "steps"), ("epoch", "epochs"), ("train_flop", "train_flops"), ("x", None), ("", None)]
)
def test_the_nearest_name_differs_by_a_few_letters(name, near):
    assert nearest(name, KINDS) == near
    assert nearest(name, iter(reversed(KINDS))) == near


def test_a_suggestion_is_one_name_or_the_names_there_are():
    assert suggestion("step", KINDS) == "; did you mean 'steps'?"
    assert suggestion("x", KINDS) == "; known: epochs, samples_seen, steps, train_flops, train_seconds"
    assert suggestion("x", map(str, range(10, 30))).endswith("20, 21, ...")
    assert suggestion("x", ()) == "; it takes none"


@pytest.mark.parametrize(("otherwise", "end"), [("see --help", "; see --help"), ("", "")])
def test_other_words_stand_only_where_no_name_is_near(otherwise, end):
    assert suggestion("x", KINDS, otherwise) == end
    assert suggestion("x", (), otherwise) == end
    assert suggestion("step", KINDS, otherwise) == "; did you mean 'steps'?"
