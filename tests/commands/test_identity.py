"""Every command checks what it finds against its configuration, and says which keys differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from flowbench.bench.plan import make_plan
from flowbench.cli import main
from flowbench.config import Experiment, compose
from flowbench.config.differences import differences, of_weights
from flowbench.config.imports import import_class
from flowbench.core.rows import read_rows
from flowbench.families import FlowModule
from flowbench.training import TrainingConfig, read_checkpoint

from .conftest import POINTS

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SMALL = POINTS.replace("    nll: {class_path: flowbench.tasks.generation.NegativeLogLikelihood}\n", "")
MODEL = "model.init_args"
SOLVER = f"{MODEL}.solver.init_args.num_steps=4"
COUPLING = f"{MODEL}.coupling={{class_path: flowbench.flows.OptimalTransportCoupling}}"


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("flowbench: "), err
    assert err.count("\n") == 1, err
    return err.strip()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A measured run; tests copy it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "points.yaml").write_text(SMALL)
    assert main(["fit", "-c", str(folder / "points.yaml"), f"run.dir={folder / 'x'}", "--test"]) == 0
    return folder / "x"


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of it as runs/x of the working directory, and the words that name it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "runs" / "x")
    (tmp_path / "points.yaml").write_text(SMALL)
    return tmp_path / "runs" / "x", ["-c", "points.yaml", "run.name=x"]


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CHANGES = [
    ("seed=1", "seed 0 -> 1"),
    ("data.batch_size=16", "data.batch_size 32 -> 16"),
    ("data.dataset=moons", "data.dataset eight_gaussians -> moons"),
    (COUPLING, f"{MODEL}.coupling (not set) -> flowbench.flows.OptimalTransportCoupling"),
    (f"{MODEL}.training.optimizer.lr=0.1", f"{MODEL}.training.optimizer.lr 0.01 -> 0.1"),
    ("trainer.gradient_clip_val=1.0", "trainer.gradient_clip_val (not set) -> 1.0"),
]


@pytest.mark.parametrize(("override", "said"), [*CHANGES, ("budget.steps=40", "budget.steps 20 -> 40")])
@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_weights_of_another_training_are_not_measured(run, capsys, command, override, said):
    folder, words = run
    if (command, override) == ("predict", "seed=1"):
        pytest.skip("the seed of predict keys its noise")
    before = files(folder)
    assert main([command, *words, override]) == 2
    text = line(capsys)
    assert f"another configuration ({said})" in text
    # Nor from a folder of its own.
    assert main([command, *words, override, "run.name=y", "--ckpt", str(last(folder))]) == 2
    text = line(capsys)
    assert f"the weights of {last(folder)} were trained with another configuration ({said}): pass -c " in text
    assert files(folder) == before


@pytest.mark.parametrize(("override", "said"), [*CHANGES, (SOLVER, f"{SOLVER.split('=')[0]} 2 -> 4")])
def test_another_training_is_not_mixed_into_a_run(run, capsys, override, said):
    folder, words = run
    before = files(folder)
    for more in ([], ["--resume", "never"]):
        assert main(["fit", *words, override, *more]) == 2
        remedy = "give another run.dir or run.name, or remove the folder"
        assert f"holds a run of another configuration ({said}): {remedy}" in line(capsys)
    assert files(folder) == before


def test_samples_may_be_drawn_with_another_seed_and_sampler(run, tmp_path):
    _, words = run
    outputs = [tmp_path / name for name in "abc"]
    assert main(["predict", *words, "--num-samples", "3", "--output", str(outputs[0])]) == 0
    assert main(["predict", *words, "--num-samples", "3", "--output", str(outputs[1]), "seed=1"]) == 0
    assert main(["predict", *words, "--num-samples", "3", "--output", str(outputs[2]), SOLVER]) == 0
    one, two, three = (json.loads((path / "manifest.json").read_text()) for path in outputs)
    assert (one["seed"], two["seed"]) == (0, 1)
    assert (one["network_evaluations"], three["network_evaluations"]) == (4, 8)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluator.num_samples=40", "n 50 -> 40"),
        ("evaluator.seed=3", "evaluation_seed 0 -> 3"),
        ("evaluator.metrics.w2=null", "w2 was measured then and is not now"),
        (SOLVER, "sampler Midpoint(num_steps=2) -> Midpoint(num_steps=4)"),
    ],
)
def test_the_same_weights_measured_in_another_way_keep_the_earlier_rows(run, capsys, override, said):
    folder, words = run
    before = (folder / "rows.jsonl").read_bytes()
    more = ["evaluator.curve=[]"] if "null" in override else []
    assert main(["test", *words, override, *more]) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"the earlier results in {folder.relative_to(folder.parents[1])} are of something else (" in err
    assert said in err
    (kept,) = (folder / "before").iterdir()
    assert (kept / "rows.jsonl").read_bytes() == before
    assert (kept / "samples.npz").is_file()
    assert (folder / "rows.jsonl").read_bytes() != before
    # Again: the same measurement takes its own place.
    assert main(["test", *words, override, *more]) == 0
    assert capsys.readouterr().err == ""
    assert len(list((folder / "before").iterdir())) == 1
    # And both stand side by side.
    assert main(["compare", str(folder), str(kept)]) == 0


@pytest.mark.parametrize(
    "override",
    ["trainer.accelerator=auto", "data.eval_batch_size=64", "trainer.limit_test_batches=2", "data.num_workers=0"],
)
def test_where_and_in_which_portions_is_measured_may_differ(run, override):
    assert main(["test", *run[1], override]) == 0


def test_the_saved_configuration_measures_its_own_run(run, capsys, tmp_path, monkeypatch):
    """From anywhere, and with another evaluator: as overrides they would name another run."""
    folder, _ = run
    shutil.rmtree(tmp_path / "runs" / "y", ignore_errors=True)
    # As if nobody had named its folder.
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text[: text.index("run:")])
    monkeypatch.chdir(tmp_path.parent)
    assert main(["test", "-c", str(folder / "config.yaml"), "evaluator.num_samples=40"]) == 0
    assert next(row for row in read_rows(folder / "rows.jsonl") if row.metric == "w2").n == 40
    assert main(["validate", "-c", str(folder / "config.yaml")]) == 0
    # A changed training is another run, and goes elsewhere.
    experiment = Experiment.from_files([folder / "config.yaml"], ["seed=1"])
    assert experiment.run_dir.name.startswith("x-")


def test_a_run_of_an_earlier_version_is_measured_and_goes_on(run, capsys):
    """Its configuration has the keys of the training among the model's own."""
    folder, words = run
    text = (folder / "config.yaml").read_text()
    earlier = text.replace("    training:\n      optimizer:\n        lr: 0.01\n", "    optimizer:\n      lr: 0.01\n")
    assert earlier != text
    for name in ("config.yaml", "config.source.yaml"):
        (folder / name).write_text(earlier)
    assert main(["test", *words]) == 0
    assert main(["fit", *words, f"{MODEL}.optimizer.lr=0.1"]) == 2
    assert f"another configuration ({MODEL}.training.optimizer.lr 0.01 -> 0.1)" in line(capsys)
    assert main(["fit", *words, "budget.steps=22"]) == 0
    assert "training goes on from step 20" in capsys.readouterr().err


def test_a_checkpoint_without_its_configuration_is_told_apart_by_its_content(run, tmp_path):
    folder, words = run
    alone = tmp_path / "alone" / "weights.ckpt"
    alone.parent.mkdir()
    shutil.copy(last(folder), alone)
    assert main(["validate", *words, "seed=1", "--ckpt", str(alone)]) == 0


def test_weights_of_an_unfinished_training_are_said_to_be_so(run, capsys, monkeypatch):
    _, words = run

    class Killed(BaseException):
        pass

    def die(module, *given):
        if module.trainer.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(FlowModule, "on_train_batch_start", die, raising=False)
        main(["fit", *words, "run.name=y"])
    capsys.readouterr()
    assert main(["validate", *words, "run.name=y"]) == 0
    assert "checkpoints/last.ckpt have 20% of their training" in line_of(capsys, "the weights of ")


def line_of(capsys, start: str) -> str:
    return next(text for text in capsys.readouterr().err.splitlines() if text.startswith(start))


# ---- budgets -------------------------------------------------------------------------------------------

CONSTANT = f"{MODEL}.training.optimizer={{lr: 1.0e-2, schedule: constant, warmup_fraction: 0.0}}"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("budget.steps=10", "budget.steps=20"),
        pytest.param("budget.steps=10", "budget.samples_seen=640", marks=pytest.mark.slow),  # another kind, 32 a step
        pytest.param("trainer.max_steps=10", "budget.steps=20", marks=pytest.mark.slow),
    ],
)
def test_a_raised_budget_goes_on_and_trains_what_the_longer_training_would(
    tmp_path, capsys, monkeypatch, before, after
):
    """Under a constant learning rate, which no budget changes; weights bit for bit."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "points.yaml").write_text(SMALL)
    words = ["-c", "points.yaml", CONSTANT]
    assert main(["fit", *words, "run.name=whole", "budget.steps=20"]) == 0
    assert main(["fit", *words, "run.name=raised", before, "--test"]) == 0
    capsys.readouterr()
    assert main(["fit", *words, "run.name=raised", after, "--test"]) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"budget.steps 10 -> {after.replace('=', ' ')}: training goes on from step 10; ")
    assert "its learning rate is now that of 50% of the budget" in said
    one, two = (read_checkpoint(last(tmp_path / "runs" / name)) for name in ("whole", "raised"))
    for name, value in one["ema"]["shadow"].items():
        assert torch.equal(value, two["ema"]["shadow"][name]), name
    folder = tmp_path / "runs" / "raised"
    assert json.loads((folder / "progress.json").read_text())["trained"]
    # The rows of the shorter training are kept, and the configuration is the longer one's.
    (kept,) = (folder / "before").iterdir()
    steps = [{row.provenance["steps"] for row in read_rows(place / "rows.jsonl")} for place in (kept, folder)]
    assert steps == [{10}, {20}]
    assert main(["test", *words, "run.name=raised", after]) == 0


def test_a_raised_budget_has_its_own_learning_rates_from_the_first_step_on(tmp_path, monkeypatch):
    """Not the rate of zero that the checkpoint holds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "points.yaml").write_text(SMALL)
    rates = {}

    def note(module, *given):
        rates.setdefault(module.trainer.global_step, module.trainer.optimizers[0].param_groups[0]["lr"])

    monkeypatch.setattr(FlowModule, "on_train_batch_start", note, raising=False)
    words = ["fit", "-c", "points.yaml", "run.name=x"]
    assert main([*words, "budget.steps=10"]) == 0
    first = dict(rates)
    assert main([*words, "budget.steps=40"]) == 0
    raised = dict(rates)
    rates.clear()
    assert main([*words[:-1], "run.name=y", "budget.steps=40"]) == 0
    for step in range(10, 40):
        assert raised[step] == pytest.approx(rates[step], rel=1e-12)
    assert first[9] < 0.05 * rates[9]  # the end of a cosine, and a quarter of a longer one


def test_a_budget_below_what_is_spent_is_refused(run, capsys):
    folder, words = run
    before = files(folder)
    assert main(["fit", *words, "budget.steps=10"]) == 2
    text = line(capsys)
    assert "has trained 20 steps, more than the budget now gives (budget.steps 20 -> budget.steps 10)" in text
    assert files(folder) == before
    assert main(["fit", *words]) == 0


# ---- what only says how weights are sampled -------------------------------------------------------------


def families() -> list[type]:
    import flowbench.families as room

    found = [getattr(room, name) for name in room.__all__]
    return [c for c in found if isinstance(c, type) and issubclass(c, FlowModule)]


@pytest.mark.parametrize("family", families(), ids=lambda c: c.__name__)
def test_arguments_of_sampling_are_arguments_of_the_family(family):
    from flowbench.config.classes import accepted_names

    assert family.sampling_arguments
    own = {name for name in family.sampling_arguments if not name.startswith("training.")}
    assert own <= set(accepted_names(family))
    assert {f"training.{name}" for name in accepted_names(TrainingConfig)} > family.sampling_arguments - own


def benches() -> list[Path]:
    return [path for path in sorted(EXPERIMENTS.glob("*.yaml")) if "trained:" in path.read_text()]


@pytest.mark.parametrize("path", benches(), ids=lambda path: path.stem)
def test_shipped_benches_measure_weights_again_in_another_way_only(path):
    plan = make_plan(path)
    configurations = {}
    for cell in plan.cells:
        if cell.seed == plan.bench.seeds[0]:
            configurations[cell.directory] = plan.experiments[cell.problem, cell.contender]
    again = [cell for cell in plan.cells if cell.trained in configurations]
    assert again
    for cell in again:
        own, source = plan.experiments[cell.problem, cell.contender], configurations[cell.trained]
        sampling = import_class("model", own["model"]["class_path"]).sampling_arguments
        assert not [str(d) for d in differences(source, own) if of_weights(d, sampling)]


def test_the_configuration_that_is_saved_composes_to_itself(run):
    folder, words = run
    saved = compose([folder / "config.yaml"]).resolved
    assert not differences(saved, Experiment.from_files([words[1]], words[2:]).resolved)
