"""Names stay text: what looks like a number is the number where one is wanted, and its text where a name is."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from flowbench.bench.plan import make_plan
from flowbench.cli import COMMANDS, main
from flowbench.cli.parser import make_parser
from flowbench.cli.parser import path as cli_path
from flowbench.config import ConfigError, Experiment, compose
from flowbench.config.fitting import fit_experiment
from flowbench.data import catalogue
from flowbench.evaluation import FrechetDistance
from flowbench.families.conditioning.masks import make_mask
from flowbench.families.latents.pretrained import TAEF2
from flowbench.metrics import load_moments, load_statistics
from flowbench.metrics.classifier import load_classifier
from flowbench.metrics.weights import efficientnet_weights, inception_weights
from flowbench.training import read_checkpoint

ROOT = Path(__file__).parents[2]
FILE = ROOT / "experiments" / "toy" / "cfm.yaml"
NAMES = [
    "12e4567", "0x10", "1_000", "yes", "No", "on", "off", "true", "FALSE", "2024-01-01", "007", "1e3", "1:30", ".5",
    "1.50", ".inf", "nan", "-1", "1", "0",
]  # fmt: skip


def experiment(*overrides: str) -> Experiment:
    return Experiment.from_files([FILE], overrides)


def fitted(*overrides: str, file: Path = FILE) -> dict:
    """What an experiment is made of, without the time that a validation of all of it takes."""
    return fit_experiment(compose([file], overrides).resolved)


@pytest.mark.parametrize("name", ["12e4567", "007", "yes", "2024-01-01"])
def test_a_run_has_the_name_that_was_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = experiment(f"run.name={name}")
    assert found.run_dir == Path("runs") / name
    # And the saved configuration is the same run.
    found.save(found.run_dir)
    again = Experiment.from_files([found.run_dir / "config.yaml"])
    assert (again.run_dir, again.fingerprint) == (found.run_dir, found.fingerprint)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_the_text_that_was_written(name, tmp_path):
    (tmp_path / "named.yaml").write_text(f"base: {FILE}\nrun: {{name: {name}, dir: {name}, contender: {name}}}\n")
    wanted = {"name": name, "dir": name, "contender": name}
    assert fitted(file=tmp_path / "named.yaml")["run"] == wanted
    assert fitted(*(f"run.{key}={name}" for key in wanted))["run"] == wanted


def test_no_name_is_no_name():
    for text in ("null", "~"):
        assert experiment(f"run.name={text}").run_dir.name.startswith("cfm-")


@pytest.mark.parametrize("name", [name for name in NAMES if name.strip("-.").isalnum() and name[0] not in "-."])
def test_contenders_problems_and_benches_have_the_names_that_were_written(name, tmp_path):
    path = tmp_path / "bench.yaml"
    solver = "{_replace_: true, class_path: flowbench.flows.Euler, init_args: {num_steps: 2}}"
    path.write_text(
        f"name: {name}\ncontenders:\n  {name}: {FILE}\n"
        f"  again: {{trained: {name}, overrides: {{model.init_args.solver: {solver}}}}}\n"
        f"problems: {{{name}: {{only: [{name}, again], reason: {name}}}}}\nbudget: {{steps: 1e1}}\nseeds: [0, 007]\n"
        f"run_dir: {tmp_path}/{name}\nclaims: ['{name}/{name}.w2 < 1']\n"
    )
    plan = make_plan(path)
    bench = plan.bench
    assert (bench.name, bench.contenders[0].name, bench.contenders[1].trained) == (name, name, name)
    assert (bench.problems[0].name, bench.problems[0].only, bench.problems[0].reason) == (name, (name, "again"), name)
    assert (bench.run_dir, bench.budget, bench.seeds) == (tmp_path / name, {"steps": 10}, (0, 7))
    assert all(type(number) in (int, float) for number in (*bench.seeds, *bench.budget.values()))
    assert plan.cells[0].label == f"{name}/{name} seed 0"
    # The cell's file is read back as it was planned.
    (tmp_path / "cell.yaml").write_text(plan.cells[0].config_text())
    cell = compose([tmp_path / "cell.yaml"]).resolved
    assert (cell["run"]["contender"], cell["run"]["problem"]) == (name, name)
    assert cell == {**plan.experiments[name, name], "run": cell["run"]}


@pytest.mark.parametrize("name", NAMES)
def test_text_arguments_get_the_text_that_was_written(name):
    logger = f"loggers.csv={{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{prefix: {name}}}}}"
    kernel = f"{{class_path: flowbench.evaluation.KernelDistance, init_args: {{features: {name}}}}}"
    metric = f"evaluator.metrics={{{name}: {kernel}}}"
    found = fitted(logger, metric, "data.dataset=npz", f"data.path={name}", f"evaluator.curve=[{name}]")
    assert found["loggers"]["csv"]["init_args"] == {"prefix": name}
    assert found["evaluator"]["metrics"][name]["init_args"] == {"features": name}
    assert found["data"]["path"] == name
    assert found["evaluator"]["curve"] == [name]


def test_what_is_built_gets_the_text():
    logger = "loggers.csv={class_path: lightning.pytorch.loggers.CSVLogger, init_args: {prefix: 1e3}}"
    found = experiment(logger, "data.dataset=npz", "data.path=007")
    assert found._parts.loggers["csv"].build()._prefix == "1e3"
    with pytest.raises(ValueError, match="path: '007' does not exist"):
        found.build_data()


def test_a_logger_keeps_a_number_where_it_takes_one_and_text_where_it_takes_text(tmp_path):
    found = experiment(
        "loggers.tensorboard.init_args.name=1e3",
        "loggers.tensorboard.init_args.version=7",
        f"run.dir={tmp_path}",
    ).build()
    logger = found.loggers["tensorboard"]
    assert isinstance(logger, TensorBoardLogger)
    assert logger.log_dir == f"{tmp_path}/1e3/version_7"


def test_numbers_and_truth_values_stay_what_they_are():
    """Every form, where a class takes a number or a truth value; plain in the end, so that a checkpoint can hold it."""
    found = experiment(
        "data.batch_size=0x10",
        "model.init_args.network.init_args.width=1_6",
        "model.init_args.training.optimizer.lr=1e-3",
        "trainer.enable_progress_bar=off",
        "trainer.max_steps=010",
        "seed=007",
        "model.init_args.conditional=No",
        "evaluator.num_samples=+360",
    )
    resolved = found.resolved
    assert resolved["data"]["batch_size"] == 16
    assert resolved["model"]["init_args"]["network"]["init_args"]["width"] == 16
    assert resolved["model"]["init_args"]["training"]["optimizer"]["lr"] == 0.001
    assert resolved["trainer"] == {**resolved["trainer"], "enable_progress_bar": False, "max_steps": 8}
    assert resolved["seed"] == found.seed == 7
    assert resolved["model"]["init_args"]["conditional"] is False

    def leaves(value):
        if isinstance(value, dict):
            return [leaf for item in value.values() for leaf in leaves(item)]
        return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]

    assert {type(leaf) for leaf in leaves(resolved)} <= {int, float, bool, str, type(None)}
    same = experiment("data.batch_size=16", "trainer.max_steps=8", "seed=7", "evaluator.num_samples=360")
    assert found.fingerprint != same.fingerprint
    assert experiment("seed=007").fingerprint == experiment("seed=7").fingerprint


def test_interpolations_carry_the_text():
    found = experiment("run.name=${data.path}", "data.dataset=npz", "data.path=1e3")
    assert found.run_dir == Path("runs/1e3")
    assert experiment("run.name=w-${seed}", "seed=007").run_dir == Path("runs/w-7")


def test_a_configuration_is_printed_as_it_was_written(capsys):
    words = [
        "run.name=1e3",
        "seed=007",
        "trainer.enable_progress_bar=off",
        "model.init_args.training.optimizer.lr=1e-3",
    ]
    assert main(["fit", "-c", str(FILE), *words, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert all(line in printed for line in ("  name: 1e3\n", "seed: 007\n", "enable_progress_bar: off\n", "lr: 1e-3\n"))


# ---- paths -------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder; the working directory is another one."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_home_is_found_in_every_path_of_an_experiment(home, monkeypatch):
    assert experiment("run.dir=~/x").run_dir == home / "x"
    (home / "mine.yaml").write_text(f"base: {FILE}\nseed: 4\n")
    assert Experiment.from_files(["~/mine.yaml"]).seed == 4
    Path("leaf.yaml").write_text("base: ~/mine.yaml\n")
    assert Experiment.from_files(["leaf.yaml"]).seed == 4
    (home / "ae.yaml").write_text("seed: 5\n")
    assert compose([FILE], ["requires.autoencoder=~/ae.yaml"]).resolved["requires"]["autoencoder"]["seed"] == 5
    (home / "needs.yaml").write_text(f"base: {FILE}\nrequires: {{autoencoder: ~/ae.yaml}}\n")
    assert compose(["~/needs.yaml"]).resolved["requires"]["autoencoder"]["seed"] == 5
    Path("bench.yaml").write_text("contenders: {cfm: ~/mine.yaml}\nbudget: {steps: 1}\nrun_dir: ~/benches\n")
    assert make_plan("bench.yaml").directory == home / "benches"
    monkeypatch.setenv("FLOWBENCH_RUNS", "~/all")
    assert make_plan("bench.yaml", ["run_dir=null"]).directory == home / "all" / "bench"
    logger = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: ~/logs, name: x}}"
    built = experiment(f"loggers.csv={logger}").build().loggers["csv"]
    assert isinstance(built, CSVLogger)
    assert built.root_dir == str(home / "logs" / "x")
    assert list(Path.cwd().glob("~*")) == []


@pytest.mark.parametrize(
    "door",
    [
        lambda path: catalogue.get("npz", path),
        lambda path: FrechetDistance(features="identity", statistics=path).statistics,
        load_moments,
        load_statistics,
        load_classifier,
        read_checkpoint,
        inception_weights,
        efficientnet_weights,
        lambda path: make_mask(f"{path}.png", (8, 8), 0),
        lambda path: TAEF2((3, 32, 32), weights=path),
    ],
)
def test_home_is_found_at_every_door_of_the_library(home, door):
    try:
        said = str(door("~/there"))
    except ValueError as error:
        said = str(error)
    assert str(home / "there") in said
    assert "~" not in said


def test_home_is_found_in_every_option_of_every_command(home):
    """No option takes a bare Path: the parser's own type finds the home folder."""
    found = 0
    for name, command in COMMANDS.items():
        for action in make_parser(name, command)._actions:
            assert action.type is not Path
            if action.type is cli_path:
                found += 1
                assert action.type("~/x") == home / "x"
    assert found >= 8


def test_nobody_elses_home_is_one_line(capsys):
    for words in (
        ["fit", "-c", "~nobody-here/x.yaml"],
        ["fit", "-c", str(FILE), "run.dir=~nobody-here/x", "--dry-run"],
        ["bench", "-c", "~nobody-here/x.yaml"],
        ["report", "~nobody-here/x"],
    ):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "no home folder" in err


def test_a_run_is_named_inside_of_runs():
    with pytest.raises(ConfigError, match=r"names a folder inside of runs/; write run\.dir=~/x"):
        experiment("run.name=~/x")


def test_paths_are_expanded_in_one_place():
    for file in sorted((ROOT / "flowbench").rglob("*.py")):
        names = [n.attr for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Attribute)]
        if file.parent.name != "core":
            assert not {"expanduser", "expandvars"} & set(names), file


@pytest.mark.slow
def test_shipped_files_name_nothing_by_a_number():
    """So that a shipped fingerprint cannot depend on how a number is written."""
    count = 0
    for file in sorted((ROOT / "experiments").rglob("*.yaml")):
        try:
            resolved = compose([file]).resolved
        except ConfigError:  # a part of others
            continue
        if "model" in resolved and "data" in resolved:
            count += 1
            assert json.dumps(fit_experiment(resolved), sort_keys=True) == json.dumps(resolved, sort_keys=True), file
    assert count > 70
