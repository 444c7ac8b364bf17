"""What two configurations differ in, in words."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.config import fingerprint
from flowbench.config.differences import Difference, describe, differences, of_budget, of_weights

BASE = {
    "seed": 0,
    "data": {"dataset": "digits", "batch_size": 16, "num_workers": 0},
    "model": {
        "class_path": "flowbench.families.FlowMatching",
        "init_args": {"solver": {"class_path": "flowbench.flows.Midpoint", "init_args": {"num_steps": 2}}},
    },
    "trainer": {"accelerator": "cpu", "devices": 1},
    "budget": {"steps": 20},
    "evaluator": {"num_samples": 50, "metrics": {"w2": {"class_path": "flowbench.evaluation.Wasserstein2"}}},
    "requires": {"teacher": {"seed": 1, "run": {"name": "a"}, "budget": {"steps": 3}}},
    "run": {"name": "one"},
}


def changed(path: str, value):
    """A copy of BASE with one key set."""
    tree = copy.deepcopy(BASE)
    *parents, last = path.split(".")
    node = tree
    for name in parents:
        node = node[name]
    node[last] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("seed", 1, "seed 0 -> 1"),
        ("budget.steps", 40, "budget.steps 20 -> 40"),
        ("budget", {"epochs": 2.0}, "budget.steps 20 -> (not set), budget.epochs (not set) -> 2.0"),
        ("data.batch_size", 16.0, "data.batch_size 16 -> 16.0"),
        ("data.path", None, "data.path (not set) -> null"),
        ("model.init_args.solver.init_args.num_steps", 4, "model.init_args.solver.init_args.num_steps 2 -> 4"),
        (
            "model.init_args.solver",
            {"class_path": "flowbench.flows.Euler", "init_args": {"num_steps": 6}},
            "model.init_args.solver flowbench.flows.Midpoint -> flowbench.flows.Euler",
        ),
        (
            "model.init_args.weight",
            {"class_path": "flowbench.flows.GibbsWeight", "init_args": {"kappa": 0.5}},
            "model.init_args.weight (not set) -> flowbench.flows.GibbsWeight",
        ),
        ("requires.teacher.seed", 2, "requires.teacher.seed 1 -> 2"),
        ("evaluator.metrics", {}, "evaluator.metrics.w2 flowbench.evaluation.Wasserstein2 -> (not set)"),
        ("data.path", "abcdefghi " * 9, f"data.path (not set) -> {'abcdefghi ' * 5}abcdef ..."),
        # What changes no number is no difference.
        ("run.name", "two", ""),
        ("requires.teacher.run", {"name": "b"}, ""),
        ("data.num_workers", 4, ""),
        ("trainer.log_every_n_steps", 3, ""),
        ("loggers", {"csv": {"class_path": "x.Y"}}, ""),
    ],
)
def test_a_difference_names_its_key_and_both_values(path, value, text):
    assert describe(differences(BASE, changed(path, value))) == text
    assert (fingerprint(BASE) == fingerprint(changed(path, value))) == (text == "")


def test_a_file_is_what_it_holds():
    """A moved one is no difference, a replaced one is, under the same name."""

    def with_file(path, content):
        return {**BASE, "data": {"dataset": "npz", "path": path}, "files": {path: content}}

    one = with_file("mine.npz", "abc")
    assert differences(one, with_file("elsewhere/mine.npz", "abc")) == []
    replaced = with_file("mine.npz", "def")
    assert describe(differences(one, replaced)) == "data.path mine.npz (content abc) -> mine.npz (content def)"
    moved = {**with_file("elsewhere/mine.npz", "abc"), "seed": 1}
    assert describe(differences(one, moved)) == "seed 0 -> 1"


def test_many_differences_are_counted():
    other = {**BASE, "seed": 1, "data": {"dataset": "moons", "batch_size": 8, "seed": 3, "path": "a", "image_size": 8}}
    text = describe(differences(BASE, other))
    assert text == (
        "seed 0 -> 1, data.dataset digits -> moons, data.batch_size 16 -> 8, data.seed (not set) -> 3 and 2 more"
    )


LEAVES = st.none() | st.booleans() | st.integers(0, 3) | st.floats(0, 3) | st.sampled_from(["a", "b"])
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xyz"), inner, min_size=1)
)
CONFIGURATIONS = st.dictionaries(st.sampled_from(["seed", "data", "model", "trainer", "run"]), TREES)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(CONFIGURATIONS, CONFIGURATIONS)
def test_there_are_differences_exactly_where_fingerprints_differ(one, other):
    assert bool(differences(one, other)) == (fingerprint(one) != fingerprint(other))


@pytest.mark.parametrize(
    ("key", "budget", "weights"),
    [
        ("budget.steps", True, True),
        ("trainer.max_steps", True, True),
        ("requires.teacher.budget.steps", False, True),
        ("seed", False, True),
        ("data.dataset", False, True),
        ("data.batch_size", False, True),
        ("data.eval_batch_size", False, False),
        ("trainer.accelerator", False, False),
        ("trainer.devices", False, False),
        ("trainer.limit_test_batches", False, False),
        ("trainer.gradient_clip_val", False, True),
        ("trainer.accumulate_grad_batches", False, True),
        ("callbacks.stop", False, True),
        ("evaluator.num_samples", False, False),
        ("evaluator", False, False),
        ("model", False, True),
        ("model.init_args.network", False, True),
        ("model.init_args.solver", False, False),
        ("model.init_args.solver.init_args.num_steps", False, False),
        ("model.init_args.solvers", False, True),
    ],
)
def test_what_weights_depend_on(key, budget, weights):
    difference = Difference(key, 0, 1)
    assert of_budget(difference) is budget
    assert of_weights(difference, {"solver"}) is weights
