"""Shipped files by name: from any directory, in every place that takes a file, wherever the package lies."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from flowbench.bench.plan import make_plan
from flowbench.bench.preview import plan_table
from flowbench.cli import main
from flowbench.config import ConfigError, Experiment, compose, fingerprint
from flowbench.core import resources
from flowbench.core.resources import PREFIX, experiment_names, find_experiment, portable_name, resource, shipped_like

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path.relative_to(ROOT / "experiments").as_posix() for path in (ROOT / "experiments").rglob("*.yaml"))
# With files under them, with something required, with something that it requires in turn.
CHAINED = [
    "digits/wcfm.yaml",
    "digits/latent_cfm.yaml",
    "digits/reflow_distilled.yaml",
    "cifar10/gpu/starflow.yaml",
]


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package as a wheel lays it: what ships lies inside."""
    shipped = tmp_path / "site-packages" / "flowbench" / "shipped"
    shutil.copytree(ROOT / "experiments", shipped / "experiments")
    monkeypatch.setattr(resources, "_PACKAGE", shipped.parent)
    experiment_names.cache_clear()
    yield shipped
    monkeypatch.undo()
    experiment_names.cache_clear()


def message(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_every_file_of_the_repository_ships_under_its_name() -> None:
    assert list(experiment_names()) == SOURCES
    for name in SOURCES:
        assert find_experiment(f"{PREFIX}{name}") == ROOT / "experiments" / name
        assert portable_name(ROOT / "experiments" / name) == f"{PREFIX}{name}"
    assert resource("data/fashion_mnist_mini.npz").is_file()


def test_a_path_is_no_name(empty_directory: Path) -> None:
    assert find_experiment("digits/wcfm.yaml") is None
    own = write("digits/wcfm.yaml", "seed: 0\n")
    assert portable_name(own) == "digits/wcfm.yaml"
    assert portable_name(ROOT / "README.md") == str(ROOT / "README.md")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("digits/wcmf.yaml", "did you mean 'flowbench:digits/wcfm.yaml'?"),
        ("base/trainer", "did you mean 'flowbench:base/trainer.yaml'?"),
        ("../pyproject.toml", "see flowbench list experiments"),
        ("/etc/passwd", "see flowbench list experiments"),
        ("", "see flowbench list experiments"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name: str, hint: str) -> None:
    expected = f"flowbench:{name}: no file of that name ships with flowbench; {hint}"
    assert message(lambda: find_experiment(f"flowbench:{name}")) == expected
    assert message(lambda: compose([f"flowbench:{name}"])) == expected
    write("mine.yaml", yaml.safe_dump({"base": [f"flowbench:{name}"]}))
    assert message(lambda: compose(["mine.yaml"])) == f"{expected} (named in {Path.cwd() / 'mine.yaml'})"
    write("needs.yaml", yaml.safe_dump({"seed": 0, "requires": {"autoencoder": f"flowbench:{name}"}}))
    assert message(lambda: compose(["needs.yaml"])) == expected
    bench = {"contenders": {"a": f"flowbench:{name}"}, "budget": {"steps": 1}}
    write("bench.yaml", yaml.safe_dump(bench))
    assert message(lambda: make_plan("bench.yaml")) == f"bench.yaml: contender 'a': {expected}"
    assert message(lambda: make_plan(f"flowbench:{name}")) == expected


def test_a_path_of_the_checkout_is_pointed_to_the_name() -> None:
    hint = "; it ships as 'flowbench:base/trainer.yaml'"
    assert hint in message(lambda: compose(["experiments/base/trainer.yaml"]))
    write("mine.yaml", "base: [../base/trainer.yaml]\n")
    assert hint in message(lambda: compose(["mine.yaml"]))
    assert "it ships as 'flowbench:toy_2d.yaml'" in message(lambda: make_plan("experiments/toy_2d.yaml"))
    write("bench.yaml", "contenders: {a: experiments/toy/cfm.yaml}\nbudget: {steps: 1}\n")
    assert "it ships as 'flowbench:toy/cfm.yaml'" in message(lambda: make_plan("bench.yaml"))
    assert shipped_like(Path("nothing/like.yaml")) == ""


@pytest.mark.parametrize("name", CHAINED)
def test_an_experiment_is_the_same_however_it_is_named_and_wherever_it_lies(name: str, installed: Path) -> None:
    write("mine.yaml", f"base: ['flowbench:{name}']\n")
    files = (f"flowbench:{name}", ROOT / "experiments" / name, "mine.yaml")
    by_name, by_path, as_base = (compose([file]).resolved for file in files)
    assert by_name == by_path == as_base
    assert fingerprint(by_name) == fingerprint(by_path)
    assert str(installed) not in str(by_name)


def test_a_run_is_the_same_however_its_experiment_is_named(installed: Path) -> None:
    by_name = Experiment.from_files(["flowbench:toy/cfm.yaml"])
    assert by_name.run_dir == Path(f"runs/cfm-{by_name.fingerprint}")
    assert by_name.run_dir == Experiment.from_files([ROOT / "experiments/toy/cfm.yaml"]).run_dir


def test_what_is_required_may_ship() -> None:
    own = {"base": ["flowbench:digits/cfm.yaml"], "model": {"class_path": "flowbench.families.LatentCFM"}}
    write("mine.yaml", yaml.safe_dump({**own, "requires": {"autoencoder": "flowbench:digits/autoencoder.yaml"}}))
    wanted = compose([ROOT / "experiments/digits/autoencoder.yaml"]).resolved
    wanted.pop("evaluator", None)
    composed = compose(["mine.yaml"])
    assert composed.resolved["requires"] == {"autoencoder": wanted}
    assert composed.source["requires"]["autoencoder"] == "flowbench:digits/autoencoder.yaml"
    write("own.yaml", yaml.safe_dump(own))
    added = compose(["own.yaml"], ["requires.autoencoder=flowbench:digits/autoencoder.yaml"])
    assert added.resolved == composed.resolved
    changed = compose(["mine.yaml"], ["requires.autoencoder.budget.steps=7"]).resolved["requires"]["autoencoder"]
    assert changed == {**wanted, "budget": {"steps": 7}}


BENCH = """
contenders:
  cfm: {0}digits/cfm.yaml
  wcfm: {{experiment: {0}digits/wcfm.yaml, overrides: {{data.batch_size: 8}}}}
seeds: [0, 1]
budget: {{steps: 5}}
name: duel
"""


def test_a_bench_is_the_same_however_its_contenders_are_named(installed: Path) -> None:
    write("names.yaml", BENCH.format("flowbench:"))
    write("paths.yaml", BENCH.format(f"{installed / 'experiments'}/"))
    names, paths = make_plan("names.yaml"), make_plan("paths.yaml")
    assert [cell.config_text() for cell in names.cells] == [cell.config_text() for cell in paths.cells]
    assert [cell.config_hash for cell in names.cells] == [cell.config_hash for cell in paths.cells]
    write("checkout.yaml", BENCH.format(f"{ROOT / 'experiments'}/"))
    assert [cell.config_hash for cell in make_plan("checkout.yaml").cells] == [c.config_hash for c in names.cells]
    assert names.cells[0].config["base"] == ["flowbench:digits/cfm.yaml"], "it holds when the package moves"
    shown = [str(cell) for cell in plan_table(names).columns[1].cells]
    assert shown == ["flowbench:digits/cfm.yaml", "flowbench:digits/wcfm.yaml"]


def test_a_shipped_bench_is_planned_in_any_directory(installed: Path) -> None:
    plan = make_plan("flowbench:starflow_vs_wcfm.yaml")
    assert plan.directory == Path.cwd() / "runs" / "starflow_vs_wcfm"
    assert [str(cell) for cell in plan_table(plan).columns[1].cells] == ["digits/starflow.yaml", "digits/wcfm.yaml"]


def test_what_ships_is_listed_by_the_names_that_commands_take(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # one line for each
    assert main(["list", "experiments"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert listed == [f"flowbench:{name}" for name in SOURCES if not name.startswith("base/")]
    write("experiments/own/cfm.yaml", "# Mine.\n")
    assert main(["list", "experiments"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["experiments/own/cfm.yaml", "Mine."]


def test_in_the_checkout_files_are_listed_by_their_paths(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["list", "experiments"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert listed == [f"experiments/{name}" for name in SOURCES if not name.startswith("base/")]


def test_a_cycle_through_names_is_told(installed: Path) -> None:
    (installed / "experiments" / "loop.yaml").write_text("base: ['flowbench:loop.yaml']\n")
    experiment_names.cache_clear()
    with pytest.raises(ConfigError, match="name each other in a cycle"):
        compose(["flowbench:loop.yaml"])
