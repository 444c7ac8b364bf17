"""The curve along training, and what TensorBoard shows of it."""

from __future__ import annotations

import json

import lightning as L
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowbench.evaluation import FrechetDistance
from flowbench.tasks.generation import NegativeLogLikelihood
from flowbench.training import Budget, BudgetLimit

from .evaluator_runs import digits, evaluator, flow, rows_of, trainer


def curve(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]


def fit(tmp_path, steps: int, ckpt=None, **options) -> L.Trainer:
    measure = evaluator({"fd": FrechetDistance("identity"), "nll": NegativeLogLikelihood()}, curve=["fd"])
    limit = BudgetLimit("steps", 6)
    budget = Budget(limit, flops_per_step=100, samples_per_step=16, num_train=100)
    measure.budget = budget
    run = trainer(tmp_path, measure, max_steps=steps, callbacks=[budget, measure], limit_val_batches=1, **options)
    run.fit(flow("tarflow", digits()), digits(), ckpt_path=ckpt, weights_only=True)
    return run


@pytest.mark.slow
def test_the_curve_grows_with_training_and_is_not_doubled_by_resuming(tmp_path):
    fit(tmp_path, 4).save_checkpoint(tmp_path / "four.ckpt")
    first = curve(tmp_path)
    assert [(p["step"], p["samples_seen"], p["train_flops"], p["metric"]) for p in first] == [
        (2, 32, 200.0, "fd[identity]"),
        (4, 64, 400.0, "fd[identity]"),
    ]
    fit(tmp_path, 6, tmp_path / "four.ckpt")
    assert [p["step"] for p in curve(tmp_path)] == [2, 4, 6]
    # Again from an older checkpoint, as after a kill: later points are measured anew, earlier ones kept.
    fit(tmp_path, 6, tmp_path / "four.ckpt")
    assert [p["step"] for p in curve(tmp_path)] == [2, 4, 6]
    assert curve(tmp_path)[:2] == first
    # A point that was lost between checkpoint and validation is made up for.
    lines = (tmp_path / "curve.jsonl").read_text().splitlines()
    (tmp_path / "curve.jsonl").write_text(lines[0] + "\n")
    fit(tmp_path, 6, tmp_path / "four.ckpt")
    assert [(p["step"], p["value"]) for p in curve(tmp_path)][:2] == [(p["step"], p["value"]) for p in first]


def test_validation_by_hand_leaves_the_curve_alone(tmp_path):
    fit(tmp_path, 4)
    before = (tmp_path / "curve.jsonl").read_bytes()
    measure = evaluator({"fd": FrechetDistance("identity")}, curve=["fd"])
    trainer(tmp_path, measure).validate(flow("tarflow", digits()), digits(), verbose=False)
    assert (tmp_path / "curve.jsonl").read_bytes() == before


def test_tensorboard_shows_samples_curve_and_hyperparameters(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="tensorboard", default_hp_metric=False)
    run = fit(tmp_path, 4, logger=logger)
    run.test(run.lightning_module, digits(), verbose=False)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {"val/samples", "test/samples"}
    assert [e.step for e in events.Scalars("val/fd[identity]")] == [2, 4]
    assert events.Scalars("val/fd[identity]")[0].value == pytest.approx(curve(tmp_path)[0]["value"], rel=1e-5)
    picture = events.Images("test/samples")[0]
    # Four pictures of 8 pixels, four times as large, framed, in rows of eight.
    assert (picture.height, picture.width) == (34, 8 * 34)
    assert events.Scalars("test/nll")[0].value == pytest.approx(rows_of(tmp_path)["nll", None].value, rel=1e-5)
    assert "_hparams_/session_start_info" in events.summary_metadata
