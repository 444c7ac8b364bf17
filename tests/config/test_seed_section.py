"""Seeds of one run: which randomness each of them keys, and that others do not."""

from __future__ import annotations

import pytest
import torch

from flowbench.config import ConfigError, Experiment
from flowbench.config.seed_section import read_seeds


def built(*overrides: str):
    return Experiment.from_files(["flowbench:toy/cfm.yaml"], ["budget.steps=2", *overrides])


def weights(experiment: Experiment) -> torch.Tensor:
    return torch.cat([p.flatten() for p in experiment.build().model.parameters()])


def test_the_initialisation_has_its_own_seed():
    plain, other = weights(built()), weights(built("seeds.init=1"))
    assert not torch.equal(plain, other)
    assert torch.equal(other, weights(built("seed=1")))
    assert torch.equal(plain, weights(built("seeds.noise=1")))
    assert torch.equal(plain, weights(built("data.seed=1")))


def test_a_seed_that_is_not_given_is_that_of_the_run():
    assert built("seed=3", "seeds.noise=5").seeds == {"init": 3, "noise": 5}
    assert built("seed=3").seeds == {"init": 3, "noise": 3}
    assert read_seeds({"init": None}, 2) == {"init": 2, "noise": 2}


def test_the_order_is_that_of_the_data_seed_alone():
    first, second, other = (
        built(*words).build_data().train_batch_at(0).index
        for words in (["seeds.init=1", "seeds.noise=2"], [], ["data.seed=1"])
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"order": 1}, "that of the order is data.seed"),
        ({"evaluation": 1}, "that of the evaluation is evaluator.seed"),
        ({"nois": 1}, "did you mean 'noise'"),
        ({"init": -1}, "seeds.init"),
        ({"init": "a"}, "seeds.init"),
        ([1], "seeds must hold 'name: number' lines"),
    ],
)
def test_seeds_that_are_none_are_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        read_seeds(value, 0)
