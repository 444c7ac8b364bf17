"""Which references an experiment has: the four of generation, or those that it names."""

from __future__ import annotations

import pytest

from flowbench.config import ConfigError, Experiment, fingerprint
from flowbench.config.references import DEFAULT_REFERENCES, default_references, reference_names
from flowbench.evaluation import Reference

FILE = "experiments/digits/cfm.yaml"
NEAREST = "flowbench.tasks.anomaly.references.NearestNeighbours"


def built(*overrides: str) -> Experiment:
    return Experiment.from_files([FILE], ["run.name=x", *overrides])


def test_without_a_word_they_are_those_of_generation():
    experiment = built()
    assert "references" not in experiment.resolved["evaluator"], "results of earlier versions keep their fingerprint"
    assert list(experiment.build_evaluator().references) == list(DEFAULT_REFERENCES)
    assert reference_names(experiment.resolved) == tuple(DEFAULT_REFERENCES)
    assert all(isinstance(reference, Reference) for reference in default_references().values())


def test_those_that_are_named_stand_alone():
    experiment = built(f"evaluator.references.near.class_path={NEAREST}", "evaluator.references.near.init_args.k=3")
    found = experiment.build_evaluator().references
    assert (list(found), found["near"].k) == (["near"], 3)
    assert reference_names(experiment.resolved) == ("near",)
    assert fingerprint(experiment.resolved) != fingerprint(built().resolved)


def test_null_is_as_if_they_were_not_named():
    experiment = built("evaluator.references=null")
    assert list(experiment.build_evaluator().references) == list(DEFAULT_REFERENCES)


@pytest.mark.parametrize("override", ["evaluator.references={}", "evaluator.references={gmm: null}"])
def test_none_at_all_is_refused_in_one_line(override):
    with pytest.raises(ConfigError, match=r"^evaluator\.references names nobody: name one or more; without this key"):
        built(override)


def test_an_extractor_that_the_data_do_not_have_is_refused_before_the_training():
    experiment = built(
        f"evaluator.references.near.class_path={NEAREST}", "evaluator.references.near.init_args.features=pixls"
    )
    from flowbench.evaluation.measurable import check_data

    with pytest.raises(ValueError, match=r"^evaluator\.references\.near: no feature extractor 'pixls'"):
        check_data(experiment.build_evaluator(), experiment.build_data())
