from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from flowbench.bench.machine import available_cores, choose_policy
from flowbench.bench.plan import make_plan
from flowbench.bench.preview import plan_lines
from flowbench.bench.report import build_report
from flowbench.bench.results import collect
from flowbench.bench.shares import share_notes
from flowbench.config import ConfigError
from flowbench.config.budget_section import read_budget


def test_cells_are_problems_times_contenders_times_seeds(workshop):
    workshop.experiment("cfm")
    path = workshop.bench(
        contenders={
            "cfm": "cfm.yaml",
            "wide": {"experiment": "cfm.yaml", "overrides": {"model.init_args.width": 8}},
        },
        problems={
            "moons": {"overrides": {"data.dataset": "moons"}},
            "rings": {"overrides": {"data": {"dataset": "rings"}}, "only": ["cfm"], "reason": "too wide"},
        },
        sweep={"network_evaluations": [1, 2]},
        budget={"train_flops": 4.0e12},
    )
    plan = make_plan(path)
    names = [(c.problem, c.contender, c.seed) for c in plan.cells]
    assert names == [
        (problem, name, seed)
        for seed in (0, 1)
        for problem, name in [("moons", "cfm"), ("moons", "wide"), ("rings", "cfm")]
    ]
    cell = plan.cells[1]
    assert cell.directory == workshop.runs / "mini/cells/moons/wide/seed-0"
    loaded = OmegaConf.to_container(OmegaConf.create(cell.config_text()))
    assert loaded["data"] == {"dataset": "moons"}
    assert loaded["model"] == {"init_args": {"width": 8}}
    assert loaded["budget"] == {"train_flops": 4.0e12}
    assert isinstance(loaded["budget"]["train_flops"], float)
    assert loaded["evaluator"] == {"sweep": {"network_evaluations": [1, 2]}}
    assert loaded["run"]["contender"] == "wide"
    assert Path(loaded["base"][0]) == workshop.folder / "cfm.yaml"
    assert len({c.config_hash for c in plan.cells}) == len(plan.cells)
    assert len({c.preparation for c in plan.cells}) == 2  # one per data set
    assert [c.problem for c in plan.references] == ["moons", "rings"]


def test_a_contender_may_measure_the_weights_of_another(workshop):
    workshop.experiment("cfm")
    path = workshop.bench(
        contenders={
            "cfm": {"experiment": "cfm.yaml", "overrides": {"model.init_args.width": 8}},
            "guided": {"trained": "cfm", "overrides": {"model.init_args.guidance": 3}},
        },
        sweep={"guidance": [1, 2.5]},
    )
    plan = make_plan(path)
    assert [(c.kind, c.contender, c.seed) for c in plan.cells] == [
        (kind, name, seed) for seed in (0, 1) for kind, name in (("fit", "cfm"), ("test", "guided"))
    ]
    cell = plan.cells[1]
    assert cell.trained == workshop.cell("cfm", 0)
    assert cell.config["model"]["init_args"] == {"width": 8, "guidance": 3}
    assert cell.config["evaluator"] == {"sweep": {"guidance": [1, 2.5]}}
    assert plan.describe()["trained"] == {"guided": "cfm"}
    width = {"trained": "cfm", "overrides": {"model": {"_replace_": True, "class_path": "x"}}}
    other = workshop.bench(
        contenders={"cfm": {"experiment": "cfm.yaml", "overrides": {"model.init_args.width": 8}}, "other": width}
    )
    assert make_plan(other).cells[1].config["model"] == {"_replace_": True, "class_path": "x"}
    # Other weights are another measurement, whatever the sampler's own settings.
    assert make_plan(path, ["budget.steps=4"]).cells[1].config_hash != cell.config_hash


def test_the_hash_sees_base_files_but_not_comments_or_the_place(workshop, monkeypatch):
    workshop.experiment("base")
    (workshop.folder / "cfm.yaml").write_text("base: [base.yaml]\n")
    path = workshop.bench(contenders={"cfm": "cfm.yaml"})
    before = make_plan(path).cells[0].config_hash
    (workshop.folder / "cfm.yaml").write_text("base: [base.yaml]  # a remark\n")
    monkeypatch.setenv("FLOWBENCH_RUNS", str(workshop.folder / "elsewhere"))
    assert make_plan(path).cells[0].config_hash == before
    workshop.experiment("base", value=2)
    assert make_plan(path).cells[0].config_hash != before
    assert make_plan(path, ["budget.steps=4"]).cells[0].config_hash != before


def test_overrides_replace_the_budget(workshop):
    workshop.experiment("cfm")
    path = workshop.bench(contenders={"cfm": "cfm.yaml"})
    plan = make_plan(path, ["budget.train_seconds=2", "seeds=[7]"])
    assert plan.bench.budget == {"train_seconds": 2}
    assert [c.seed for c in plan.cells] == [7]


@pytest.mark.parametrize(
    "budget",
    [
        {"epochs": 0.5},
        {"epochs": 2},
        {"steps": 3.0},
        {"steps": 1.5},
        {"samples_seen": 0.5},
        {"train_flops": 1e12},
        {"train_seconds": 0.1},
        {"steps": None, "train_seconds": 2},
        {"steps": 0},
        {"epochs": float("nan")},
        {"hours": 1},
    ],
)
def test_a_bench_takes_the_budgets_that_an_experiment_takes(workshop, budget):
    workshop.experiment("cfm")
    path = workshop.bench(contenders={"cfm": "cfm.yaml"}, budget=budget)
    try:
        expected = read_budget(budget, {})
    except ConfigError:
        with pytest.raises(ConfigError, match="budget"):
            make_plan(path)
    else:
        assert make_plan(path).bench.budget == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": [0]}, "unknown key 'seed'; did you mean 'seeds'"),
        ({"seeds": [0, 1, 0]}, "more than once"),
        ({"seeds": []}, "seeds is"),
        ({"seeds": [0.5]}, "seeds is"),
        ({"seeds": [0, -1]}, "seeds[1] must be a whole number in [0, 9223372036854775807], got -1"),
        ({"seeds": [2**64]}, "9223372036854775807], got 18446744073709551616"),
        ({"sweep": {"guidance": [1, float("inf")]}}, "sweep.guidance[1] must be a number in [1, 1e+12], got inf"),
        ({"budget": {"steps": 1e300}}, "budget.steps must be a number in (0, 1e+30], got 1e+300"),
        ({"contenders": {}}, "contenders is"),
        ({"contenders": {"cfm": "cmf.yaml"}}, "does not exist; did you mean 'cfm.yaml'?"),
        ({"contenders": {"noise": "cfm.yaml"}}, "reference rows"),
        ({"contenders": {"cfm": {"experiment": "cfm.yaml", "override": {}}}}, "did you mean 'overrides'"),
        ({"contenders": {"cfm": {"experiment": "cfm.yaml", "overrides": {"seed": 3}}}}, "may not set 'seed'"),
        ({"budget": {}}, "exactly one of"),
        ({"budget": {"steps": 1, "epochs": 1}}, "exactly one of"),
        ({"budget": {"train_flop": 1}}, "did you mean 'train_flops'"),
        ({"budget": {"steps": -1}}, "budget.steps must be a number in (0, 1e+30], got -1"),
        ({"budget": {"steps": 1.5}}, "whole number"),
        ({"sweep": {"nfe": [1]}}, "sweep goes over network_evaluations, guidance and train_size, got nfe"),
        ({"sweep": {"network_evaluations": [1, 1]}}, "sweep.network_evaluations must be distinct numbers, got 1 twice"),
        ({"sweep": {"guidance": [0.5, 2]}}, "sweep.guidance[0] must be a number in [1, 1e+12], got 0.5"),
        ({"claims": ["cfm.nll@guidance=3 < 1"]}, "3 is not swept; sweep.guidance is []"),
        ({"claims": ["cfm.nll@2.5 < 1"]}, "no whole number"),
        ({"contenders": {"cfm": "cfm.yaml", "b": {"trained": "cmf", "overrides": {"a.b": 1}}}}, "did you mean 'cfm'"),
        ({"contenders": {"cfm": "cfm.yaml", "b": {"trained": "cfm"}}}, "would repeat 'cfm'"),
        ({"contenders": {"cfm": "cfm.yaml", "b": {"trained": "cfm", "experiment": "cfm.yaml"}}}, "write a path"),
        ({"problems": {"t": {"only": ["cmf"]}}}, "did you mean 'cfm'"),
        ({"problems": {"t": {"reason": "x"}}}, "no `only`"),
        ({"claims": ["cfn.nll < 1"]}, "unknown contender 'cfn'; did you mean 'cfm'"),
        ({"claims": ["t/cfm.nll < 1"]}, "unknown problem 't'; the bench file has no problems"),
        ({"claims": ["cfm.nll@3 < 1"]}, "3 is not swept; sweep.network_evaluations is []"),
        ({"claims": ["cfm.nll"]}, "exactly one"),
        ({"jobs": "many"}, "jobs is 'many'"),
        ({"jobs": 0}, "jobs must be a whole number in [1, 1e+09], got 0: or auto"),
        ({"name": "a/b"}, "name is"),
    ],
)
def test_mistakes_cost_one_line(workshop, change, message):
    workshop.experiment("cfm")
    path = workshop.bench(**{"contenders": {"cfm": "cfm.yaml"}, **change})
    with pytest.raises(ValueError, match=r".") as caught:
        make_plan(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_mistakes(workshop):
    with pytest.raises(ValueError, match="does not exist"):
        make_plan(workshop.folder / "nothing.yaml")
    (workshop.folder / "broken.yaml").write_text("a: [1\nb: }")
    with pytest.raises(ValueError, match="not valid YAML"):
        make_plan(workshop.folder / "broken.yaml")
    workshop.experiment("cfm")
    path = workshop.bench(
        contenders={"a": "cfm.yaml", "b": {"experiment": "cfm.yaml", "overrides": {"data.dataset": "x"}}},
        problems={"t": {"overrides": {"data": {"dataset": "y"}}}},
    )
    with pytest.raises(ValueError, match=r"data\.dataset is also set by contender 'b'"):
        make_plan(path)
    with pytest.raises(ValueError, match="takes part in no problem"):
        make_plan(workshop.bench(contenders={"a": "cfm.yaml", "b": "cfm.yaml"}, problems={"t": {"only": ["a"]}}))


def test_the_users_limit_of_threads_is_kept(monkeypatch):
    monkeypatch.setattr("flowbench.bench.machine.available_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_policy(1, 9, cpu_only=True).threads == 3
    assert "OMP_NUM_THREADS" in choose_policy(1, 9, cpu_only=True).reason
    assert choose_policy(4, 9, cpu_only=True).threads == 2


def test_policy_divides_the_cores(monkeypatch):
    monkeypatch.setattr("flowbench.bench.machine.available_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert (
        choose_policy("auto", 100, cpu_only=True).jobs,
        choose_policy("auto", 100, cpu_only=True).threads,
    ) == (8, 1)
    assert (
        choose_policy("auto", 3, cpu_only=True).jobs,
        choose_policy("auto", 3, cpu_only=True).threads,
    ) == (3, 2)
    assert choose_policy(16, 3, cpu_only=True).threads == 1
    environment = choose_policy(2, 3, cpu_only=True).environment
    assert {environment[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")} == {"4"}
    assert environment["FLOWBENCH_JOBS"] == "2"
    assert (environment["OMP_WAIT_POLICY"], environment["KMP_BLOCKTIME"]) == ("PASSIVE", "0")
    monkeypatch.setattr("flowbench.bench.machine._has_gpu", lambda: True)
    assert choose_policy("auto", 3, cpu_only=False).jobs == 1
    assert choose_policy("auto", 3, cpu_only=True).jobs == 3


def test_cores_respect_the_control_group(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr("flowbench.bench.machine._cgroup_quota", lambda: 2.5)
    assert available_cores() == 2
    monkeypatch.setattr("flowbench.bench.machine._cgroup_quota", lambda: None)
    assert available_cores() == 6


def test_bench_imports_neither_torch_nor_matplotlib():
    """`flowbench bench` must answer at once, and a cell's libraries must not be able to break the bench."""
    code = (
        "import flowbench.bench, sys; "
        "print([m for m in ('torch', 'lightning', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_earlier_name_of_problems_is_read_in_a_file_and_in_an_override(workshop, capsys):
    workshop.experiment("cfm")
    given = {"contenders": {"cfm": "cfm.yaml"}}
    entries = {"moons": {"overrides": {"data.dataset": "moons"}}}
    now = make_plan(workshop.bench(**given, problems=entries))
    assert capsys.readouterr().err == ""
    before = make_plan(workshop.bench(**given, tasks=entries), ["tasks.moons.overrides={data.dataset: moons}"])
    assert "tasks is read as problems" in capsys.readouterr().err
    assert [c.config_hash for c in before.cells] == [c.config_hash for c in now.cells]
    assert [c.directory for c in before.cells] == [c.directory for c in now.cells]
    with pytest.raises(ValueError, match="tasks is the earlier name of problems; give one of the two"):
        make_plan(workshop.bench(**given, problems=entries, tasks=entries))


def test_a_contender_may_leave_a_share_of_the_budget_to_what_it_requires(workshop):
    workshop.experiment("cfm")
    contenders = {
        "cfm": "cfm.yaml",
        "taught": {"experiment": "cfm.yaml", "budget_share": 0.25, "overrides": {"model.init_args.width": 8}},
    }
    for budget, own in (({"train_flops": 4.0e12}, {"train_flops": 1.0e12}), ({"steps": 10}, {"steps": 2})):
        cells = make_plan(workshop.bench(contenders=contenders, budget=budget)).cells
        assert [cell.config["budget"] for cell in cells[:2]] == [budget, own]
        assert [type(value) for value in cells[1].config["budget"].values()] == [type(*budget.values())]
    for share in (0, 1.5, "half"):
        contenders["taught"]["budget_share"] = share
        with pytest.raises(ValueError, match=rf"contender 'taught'.*budget_share must be .*, got {share!r}"):
            make_plan(workshop.bench(contenders=contenders))
    contenders["again"] = {"trained": "cfm", "budget_share": 0.5}
    contenders["taught"]["budget_share"] = 1
    with pytest.raises(ValueError, match="contender 'again': trained and budget_share exclude each other"):
        make_plan(workshop.bench(contenders=contenders))


def test_weights_measured_again_are_those_of_the_share_that_they_were_trained_on(workshop):
    workshop.experiment("cfm")
    contenders = {
        "taught": {"experiment": "cfm.yaml", "budget_share": 0.5},
        "again": {"trained": "taught", "overrides": {"model.init_args.solver.init_args.num_steps": 3}},
    }
    plan = make_plan(workshop.bench(contenders=contenders, budget={"steps": 10}))
    assert [cell.config["budget"] for cell in plan.cells[:2]] == [{"steps": 5}, {"steps": 5}]


def test_shares_of_the_budget_are_said_in_plan_preview_and_report(workshop):
    workshop.experiment("cfm")
    contenders = {"cfm": "cfm.yaml", "taught": {"experiment": "cfm.yaml", "budget_share": 0.5}}
    plan = make_plan(workshop.bench(contenders=contenders, budget={"steps": 10}))
    assert plan.describe()["budget_shares"] == {"taught": 0.5}
    said = "10; of it taught 0.5, the rest for what they require"
    assert f"every contender: steps {said}" in plan_lines(plan)
    plan.directory.mkdir(parents=True)
    (plan.directory / "plan.json").write_text(json.dumps(plan.describe()))
    collect(plan.directory)
    assert f"- budget of every contender: steps = {said}" in build_report(plan.directory).read_text()
    whole = make_plan(workshop.bench(contenders={"cfm": "cfm.yaml"}, budget={"steps": 10}))
    assert "budget_shares" not in whole.describe()
    assert "require" not in plan_lines(whole)


@pytest.mark.parametrize(
    ("teacher", "said"), [({"steps": 4}, True), ({"steps": 3}, False), ({"train_flops": 9}, False)]
)
def test_a_share_that_does_not_leave_what_is_required_is_told(teacher, said):
    """Of a teacher that is required twice, at two depths, the budget counts once."""
    needed = {"model": {"class_path": "A"}, "budget": teacher}
    between = {"model": {"class_path": "B"}, "budget": {"steps": 2}, "requires": {"teacher": needed}}
    both = {"requires": {"teacher": needed, "autoencoder": between}}
    notes = share_notes({"steps": 10}, {"taught": 0.5}, {("a", "taught"): both, ("b", "taught"): both})
    wanted = "not equal: taught has 0.5 of steps 10 and what it requires 6, 11 in all"
    assert notes == ([wanted] if said else [])


EXPERIMENTS = Path(__file__).parents[2] / "experiments"
WITH_SHARES = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml") if "budget_share" in path.read_text("utf-8"))


def test_benches_of_teachers_and_autoencoders_share_their_budgets():
    assert {"few_step_digits", "few_step_2d", "simflow", "learned_inverse"} <= set(WITH_SHARES)


@pytest.mark.parametrize("name", WITH_SHARES)
def test_contenders_of_shipped_benches_with_shares_cost_what_the_others_do(name):
    plan = make_plan(f"flowbench:{name}.yaml")
    assert plan.bench.budget_shares
    assert "not equal" not in plan_lines(plan)
    for (problem, contender), content in plan.experiments.items():
        shares = contender in plan.bench.budget_shares
        assert bool(content.get("requires")) == shares, f"{problem} {contender}: what is required is paid for"
    doubled = make_plan(f"flowbench:{name}.yaml", [f"budget.train_flops={2 * plan.bench.budget['train_flops']}"])
    assert plan_lines(doubled).count("not equal") == len(plan.bench.budget_shares)
