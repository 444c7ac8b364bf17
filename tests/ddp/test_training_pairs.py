"""What a flow says of its training pairs: the same on both processes, and as one process has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import Workplace, matching
from training_pairs_spy import NUM, SEED

pytestmark = pytest.mark.slow

OF_WEIGHT = {"ess", "tilt_source", "tilt_target", "tilt_share", "weighted_norm_ratio"}


def experiment(workplace: Workplace) -> Path:
    """A weight whose temperature is fitted to the data, on pairs of optimal transport."""
    model = matching(
        "WeightedCFM",
        weight={
            "class_path": "flowbench.flows.GibbsWeight",
            "init_args": {"epsilon": {"class_path": "flowbench.flows.EffectiveSampleEpsilon"}},
        },
        coupling={"class_path": "flowbench.flows.OptimalTransportCoupling"},
    )
    model["class_path"] = "training_pairs_spy.SpyWeightedCFM"
    pairs = {"class_path": "flowbench.tasks.generation.TrainingPairs", "init_args": {"num_pairs": NUM}}
    evaluator = {"num_samples": 8, "num_trajectories": 2, "seed": SEED, "curve": [], "metrics": {"pairs": pairs}}
    return workplace.write("pairs", model, evaluator=evaluator, trainer={"max_steps": 2, "val_check_interval": 2})


@pytest.fixture(scope="module")
def said(workplace: Workplace) -> dict[str, dict[str, float]]:
    """The numbers by number of processes and rank."""
    folder = workplace.folder / "said"
    folder.mkdir()
    path, spy = experiment(workplace), {"FLOWBENCH_TEST_TRAINING_PAIRS": str(folder)}
    outcome = workplace.two("fit", "-c", path, "--test", f"run.dir={workplace.folder / 'pairs-2'}", **spy)
    assert outcome.status == 0, outcome.stderr
    with pytest.MonkeyPatch.context() as patch:
        for name, value in spy.items():
            patch.setenv(name, value)
        workplace.one("fit", "-c", path, "--test", f"run.dir={workplace.folder / 'pairs-1'}")
    return {file.stem: json.loads(file.read_text()) for file in folder.iterdir()}


def test_both_processes_say_what_one_says(said):
    assert said.keys() == {"2-0", "2-1", "1-0"}
    assert said["1-0"].keys() == {"cost_ratio", *OF_WEIGHT}
    assert said["2-0"] == said["2-1"] == said["1-0"]
    assert 0 < said["1-0"]["cost_ratio"] < 0.99
    assert 0 < said["1-0"]["ess"] < 1


def test_the_rows_are_those_numbers_once(workplace, said):
    for run in ("pairs-2", "pairs-1"):
        rows = workplace.rows(run)
        assert {row["metric"]: row["value"] for row in rows} == pytest.approx(said["1-0"], rel=1e-12)
        assert len(rows) == len(said["1-0"])
        assert {row["protocol"] for row in rows} == {f"training-pairs/{NUM}"}
