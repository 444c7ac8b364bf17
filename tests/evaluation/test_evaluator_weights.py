"""Which weights the evaluator measures, and that the live ones come back."""

from __future__ import annotations

import math

import pytest
import torch

from flowbench.training import EMAConfig, TrainingConfig

from .evaluator_runs import digits, evaluator, flow, measured, quick, rows_of, trainer


def live(family) -> dict:
    return {name: value.clone() for name, value in family.state_dict().items()}


def moved(family):
    """Averaged weights that differ from the live ones."""
    average = family.ema
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.01)
    assert any(not torch.equal(average.state_dict()["shadow"][n], p) for n, p in family.named_parameters())
    return family


@pytest.mark.parametrize("stage", ["never", "test_step", "sample"])
def test_live_weights_come_back_whatever_happens(tmp_path, monkeypatch, stage):
    family = moved(quick(flow("cfm", digits())))
    before = live(family)

    def broken(*given, **options):
        raise RuntimeError("broken on purpose")

    if stage != "never":
        monkeypatch.setattr(family, stage, broken)
    run = trainer(tmp_path, evaluator())
    if stage == "never":
        run.test(family, digits(), verbose=False)
    else:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            run.test(family, digits(), verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in live(family).items())


def test_the_named_weights_are_measured(tmp_path):
    found = {}
    for weights in ("ema", "raw"):
        family = moved(flow("tarflow", digits()))
        run = trainer(tmp_path / weights, evaluator(weights=weights))
        run.test(family, digits(), verbose=False)
        rows = rows_of(tmp_path / weights)
        found[weights] = rows["nll", None].value
        assert {row.weights for row in rows.values()} == {weights}
    plain = flow("tarflow", digits())
    log_prob = plain.log_prob(digits().model_values("test")).double()
    expected = float(-log_prob.mean() / 64 / math.log(2) - math.log2(2 / 17))
    assert found["ema"] == pytest.approx(expected, rel=1e-6)
    assert abs(found["raw"] - expected) > 1e-3


def test_rows_name_the_weights_that_were_there(tmp_path):
    """Without an average the live weights are measured, whatever was asked for."""
    for decay, weights in ((0.9, "ema"), (0.0, "raw")):
        found = measured(tmp_path, "tarflow", digits(), evaluator(), training=TrainingConfig(ema=EMAConfig(decay)))
        assert {row.weights for row in found.values()} == {weights}
