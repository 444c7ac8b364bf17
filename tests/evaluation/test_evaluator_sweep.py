"""Sweeps over network evaluations and guidance."""

from __future__ import annotations

import pytest

from flowbench.core.rows import read_rows
from flowbench.flows import ClassifierFreeGuidance, RungeKutta4

from .evaluator_runs import digits, evaluator, flow, measured, trainer


def test_a_sweep_over_guidance(tmp_path):
    measure = evaluator(sweep={"guidance": [1, 3]})
    measured(tmp_path, "cfm", digits(), measure, conditional=True)
    rows = [row for row in read_rows(tmp_path / "rows.jsonl") if row.metric == "fd[identity]"]
    main, plain, guided = rows
    assert (main.guidance, main.sampler, main.protocol) == (1.0, main.sampler, "identity/train-1077/20")
    assert main.sampler.startswith("Midpoint")
    assert [(row.protocol, row.axis, row.at) for row in (plain, guided)] == [
        ("identity/train-1077/20", "guidance", 1.0),
        ("identity/train-1077/20", "guidance", 3.0),
    ]
    assert (main.axis, main.at) == ("", None)
    assert [(row.guidance, row.network_evaluations) for row in (plain, guided)] == [(1.0, 4.0), (3.0, 8.0)]
    assert plain.value == main.value != guided.value


def test_what_cannot_be_guided_is_not_swept(tmp_path):
    measured(tmp_path, "cfm", digits(), evaluator(sweep={"guidance": [1, 3]}))
    rows = read_rows(tmp_path / "rows.jsonl")
    assert not [row for row in rows if row.axis]
    assert {row.guidance for row in rows} == {None}
    for wrong in ([0.5], [True]):
        with pytest.raises(ValueError, match=r"sweep\.guidance\[0\] must be a number in \[1, .*, got"):
            evaluator(sweep={"guidance": wrong})


def test_a_sweep_that_the_solver_cannot_do_is_refused_before_training(tmp_path):
    family = flow("cfm", digits(), solver=RungeKutta4(num_steps=2))
    with pytest.raises(ValueError, match="3"):
        trainer(tmp_path, evaluator(sweep={"network_evaluations": [4, 3]})).fit(family, digits())
    assert family.trainer.global_step == 0
    guided = flow("cfm", digits(), conditional=True, guidance=ClassifierFreeGuidance(2.0))
    with pytest.raises(ValueError, match="cannot spend exactly 1 network evaluations"):
        trainer(tmp_path, evaluator(sweep={"network_evaluations": [1]})).fit(guided, digits())
    trainer(tmp_path, evaluator(sweep={"network_evaluations": [1]}), max_steps=1).fit(
        flow("tarflow", digits()), digits()
    )
