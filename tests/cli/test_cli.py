from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from flowbench import cli
from flowbench.cli import COMMANDS, main
from flowbench.config import compose
from flowbench.core.rows import Row, write_rows

ROW = Row(
    bench="", problem="", contender="left", family="F", dataset="digits", seed=0, metric="w2", value=0.5, n=10,
    protocol="test/10", unit="", network_evaluations=4.0, weights="ema",
)  # fmt: skip


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """A `flowbench.commands.runs` that writes down what it was asked, and leaves a folder with a row."""
    left = tmp_path / "left"
    left.mkdir()
    write_rows(left / "rows.jsonl", [ROW])
    calls: list[tuple] = []
    module = types.ModuleType("flowbench.commands.runs")
    for name in ("fit", "validate", "test", "predict", "reference", "prepare"):

        def record(*given, _name=name, **options):
            calls.append((_name, given[1:], options, given[0]))
            return {"validate": {"loss": 0.5}, "prepare": {}}.get(_name, left)

        setattr(module, name, record)
    monkeypatch.setitem(sys.modules, "flowbench.commands.runs", module)
    monkeypatch.setattr("flowbench.commands.runs", module, raising=False)
    return types.SimpleNamespace(calls=calls, module=module)


def _one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("flowbench: ")
    return captured.err.strip()


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "wcfm.yaml", "seed=5", "data.batch_size=4", "--test", "--resume", "never"],
        ["seed=5", "-c", "wcfm.yaml", "--test", "data.batch_size=4", "--resume=never"],
        ["--test", "--seed=5", "--resume", "never", "--data.batch_size=4", "-c", "wcfm.yaml"],
        ["-c", "wcfm.yaml", "--seed=1", "seed=5", "--test", "--resume", "never", "data={batch_size: 4}"],
    ],
)
def test_options_and_overrides_stand_in_any_order(experiment_file, runs, words):
    assert main(["fit", *words]) == 0
    [(name, given, options, experiment)] = runs.calls
    assert (name, given, options) == ("fit", (), {"test": True, "resume": "never"})
    assert experiment.seed == 5
    assert experiment.resolved["data"]["batch_size"] == 4


def test_several_files_in_order(experiment_file, write, runs):
    write("more.yaml", "seed: 8\n")
    assert main(["fit", "-c", "wcfm.yaml", "-c", "more.yaml"]) == 0
    assert runs.calls[0][3].seed == 8
    assert runs.calls[0][2] == {"test": False, "resume": "auto"}


@pytest.mark.parametrize(
    ("words", "given", "options"),
    [
        (["validate"], (None,), {}),
        (["validate", "--ckpt", "a.ckpt"], (Path("a.ckpt"),), {}),
        (["test", "--ckpt=a.ckpt"], (Path("a.ckpt"),), {}),
        (["reference"], (), {}),
        (["prepare"], (), {}),
        (
            ["predict", "--ckpt", "a", "--num-samples", "3", "--output", "out", "--guidance", "1.5"],
            (Path("a"),),
            {"num_samples": 3, "output": Path("out"), "guidance": 1.5},
        ),
        (
            ["predict", "--task", "inpaint", "--mask", "left", "--rounds", "8", "--draws=2", "--images", "x.npz"],
            (None,),
            {"task": "inpaint", "mask": "left", "rounds": 8, "draws": 2, "images": Path("x.npz")},
        ),
        (["predict", "--task", "edit", "--classes", "0,3"], (None,), {"task": "edit", "classes": (0, 3)}),
        (
            ["predict", "--task=classify", "--prior=train", "--split", "val"],
            (None,),
            {"task": "classify", "prior": "train", "split": "val"},
        ),
    ],
)
def test_commands_call_the_runs_with_a_validated_experiment(experiment_file, runs, words, given, options):
    assert main([*words, "-c", str(experiment_file)]) == 0
    assert runs.calls[0][:3] == (words[0], given, options)


def test_only_fit_needs_a_budget(experiment_file, runs, capsys):
    assert main(["test", "-c", "wcfm.yaml", "budget=null"]) == 0
    assert main(["fit", "-c", "wcfm.yaml", "budget=null"]) == 2
    assert "training has no end" in _one_line(capsys)


def test_print_config_composes_to_itself(experiment_file, write, runs, capsys):
    write("ae.yaml", "seed: 1\nmodel: {class_path: a.B}\n")
    words = [
        "model.init_args.network.init_args.scale=1e-3",
        "run.name=w-${seed}",
        "requires.autoencoder=ae.yaml",
    ]
    assert main(["fit", "-c", "wcfm.yaml", *words, "--print-config"]) == 0
    printed = capsys.readouterr().out
    write("printed.yaml", printed)
    resolved = compose(["printed.yaml"]).resolved
    assert resolved == compose(["wcfm.yaml"], words).resolved
    assert resolved["run"] == {"name": "w-3"}
    assert main(["fit", "-c", "printed.yaml", "--print-config"]) == 0
    assert capsys.readouterr().out == printed
    assert runs.calls == []


def test_dry_run_says_what_would_run(experiment_file, runs, capsys, monkeypatch):
    rehearsed = []  # the classes here are dummies, which no rehearsal takes for a flow
    monkeypatch.setattr(
        "flowbench.commands.rehearsal.Rehearsal.run", lambda self, experiment: rehearsed.append(experiment)
    )
    assert main(["fit", "-c", "wcfm.yaml", "--dry-run", "run.name=x"]) == 0
    assert [experiment.run_dir for experiment in rehearsed] == [Path("runs/x")]
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["run"] == "runs/x"
    assert lines["family"] == "cli_dummies.Family"
    assert lines["budget"] == "steps = 10"
    assert lines["metrics"] == "fd"
    assert lines["requires"] == "nothing"
    assert runs.calls == []
    assert not Path("runs").exists()
    assert main(["fit", "-c", "wcfm.yaml", "--dry-run", "data.batch=1"]) == 2


def test_bench_compare_report(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("flowbench.commands.bench.run_bench", lambda *given, server: calls.append(given) or 1)
    monkeypatch.setattr("flowbench.bench.compare", lambda runs: f"table of {len(runs)}")
    monkeypatch.setattr("flowbench.bench.build_report", lambda directory: directory / "report.md")
    assert main(["bench", "-c", "b.yaml", "seeds=[0]", "--jobs", "2", "--dry-run", "--budget.steps=3"]) == 1
    assert calls == [(Path("b.yaml"), ["seeds=[0]", "budget.steps=3"], 2, True)]
    assert main(["compare", "runs/a", "runs/b"]) == 0
    assert main(["report", "runs/a"]) == 0
    table, _, place = capsys.readouterr().out.splitlines()
    assert (table, place) == ("table of 2", "runs/a/report.md")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fitt"], "unknown command 'fitt'; did you mean 'fit'?"),
        (["xyz"], "unknown command 'xyz'; see flowbench --help"),
        (["fit"], "the following arguments are required: -c/--config; see flowbench fit --help"),
        (["fit", "-c"], "argument -c/--config: expected one argument"),
        (["fit", "-c", ""], "-c got an empty file name"),
        (["fit", "-c", "none.yaml"], "file none.yaml does not exist"),
        (["fit", "-c", "wcfm.yaml", "seed"], "override 'seed' has no value; write key=value"),
        (["fit", "-c", "wcfm.yaml", "--resmue=never"], "unknown key 'resmue' in the experiment"),
        (["fit", "-c", "wcfm.yaml", "--resume", "maybe"], "argument --resume: invalid choice: 'maybe'"),
        (
            ["fit", "-c", "wcfm.yaml", "--trainer.max_steps", "5"],
            "unrecognized arguments: --trainer.max_steps; options of the experiment are written key=value",
        ),
        (["fit", "-c", "wcfm.yaml", "--tes"], "unrecognized arguments: --tes"),
        (["predict", "-c", "wcfm.yaml", "--ckpt", "a", "--num-samples", "0", "--output", "o"], "got '0'"),
        (["predict", "-c", "wcfm.yaml", "--ckpt"], "expected one argument"),
        (["predict", "-c", "wcfm.yaml", "--task", "dream"], "argument --task: invalid choice: 'dream'"),
        (["predict", "-c", "wcfm.yaml", "--classes", "1,x"], "expected class numbers such as 0,3,8, got '1,x'"),
        (["compare", "runs/a"], "compare needs two run directories or more, got 1"),
        (["compare", "runs/a", "runs/b", "--json", "c.json"], "--json goes with --baseline"),
        (["compare", "--baseline", "runs/a", "runs/b", "runs/c"], "takes one run to compare with it, got 2"),
        (["list", "famlies"], "invalid choice: 'famlies'"),
        (["data"], "the following arguments are required: action"),
        (["bench", "-c", "b.yaml", "--jobs", "-1"], "--jobs"),
        (["fit", "-c", "wcfm.yaml", "model.init_args.netwrk=1"], "did you mean 'network'?"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_two(experiment_file, runs, capsys, words, expected):
    assert main(words) == 2
    assert expected in _one_line(capsys)
    assert runs.calls == []


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("a\nmistake"), 2, "flowbench: error: a mistake"),
        (
            FileNotFoundError(2, "No such file or directory", "x"),
            1,
            "flowbench: error: [Errno 2] No such file",
        ),
        (OSError(28, "No space left on device"), 1, "flowbench: error: [Errno 28] No space left on device"),
        (FloatingPointError("loss is nan"), 1, "flowbench: error: loss is nan"),
        (KeyboardInterrupt(), 130, "flowbench: interrupted; the same command continues"),
    ],
)
def test_failures_of_a_run(experiment_file, runs, capsys, error, status, line):
    def fail(*_given, **_options):
        raise error

    runs.module.fit = fail
    assert main(["fit", "-c", "wcfm.yaml"]) == status
    assert _one_line(capsys).startswith(line)


def test_lightnings_own_errors_and_exits(experiment_file, runs, capsys):
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    def misconfigured(*_given, **_options):
        raise MisconfigurationException("no\nGPU here")

    def interrupted(*_given, **_options):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    runs.module.fit = misconfigured
    assert main(["fit", "-c", "wcfm.yaml"]) == 2
    assert _one_line(capsys) == "flowbench: error: no GPU here"
    runs.module.fit = interrupted
    assert main(["fit", "-c", "wcfm.yaml"]) == 130
    assert "interrupted" in _one_line(capsys)


class Foreign(Exception):
    """An error of a library that nobody thought of."""


@pytest.mark.parametrize(
    "error", [KeyError("bug"), Foreign("two\nlines"), RuntimeError("shapes"), ImportError("none such"), TypeError()]
)
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "reference", "prepare"])
def test_what_nobody_expects_is_one_line_with_its_type_and_the_place_of_the_traceback(
    experiment_file, runs, capsys, tmp_path, monkeypatch, command, error
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def bug(*_given, **_options):
        raise error

    setattr(runs.module, command, bug)
    assert main([command, "-c", "wcfm.yaml"]) == 1
    line = _one_line(capsys)
    assert line.startswith(f"flowbench: error: {type(error).__name__}")
    assert line.endswith("; --debug shows the traceback")
    log = Path(re.search(r"details in (\S+);", line)[1])
    text = log.read_text()
    assert "Traceback (most recent call last)" in text
    assert "in bug" in text


def test_commands_without_a_run_end_the_same_way(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def bug(*_given, **_options):
        raise ZeroDivisionError("division by zero")

    for place, words in {
        "flowbench.bench.compare": ["compare", "a", "b"],
        "flowbench.bench.build_report": ["report", "a"],
        "flowbench.commands.bench.run_bench": ["bench", "-c", "b.yaml"],
        "flowbench.commands.listing.listing": ["list"],
        "flowbench.commands.listing.data_table": ["data", "list"],
    }.items():
        monkeypatch.setattr(place, bug)
        assert main(words) == 1
        assert _one_line(capsys).startswith("flowbench: error: ZeroDivisionError: division by zero; details in ")


def test_debug_shows_every_traceback(experiment_file, runs):
    def bug(*_given, **_options):
        raise KeyError("bug")

    runs.module.fit = bug
    with pytest.raises(KeyError, match="bug"):
        main(["fit", "-c", "wcfm.yaml", "--debug"])
    with pytest.raises(ValueError, match="has no value"):
        main(["fit", "-c", "wcfm.yaml", "seed", "--debug"])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_ends_a_command_with_one_line_and_the_status_of_shells(experiment_file, runs, capsys, name):
    number = getattr(signal, name)

    def work(*_given, **_options):
        signal.raise_signal(number)
        pytest.fail("went on")

    before = signal.getsignal(number)
    runs.module.fit = work
    assert main(["fit", "-c", "wcfm.yaml"]) == 128 + number
    said = "interrupted" if name == "SIGINT" else f"ended by {name}"
    assert _one_line(capsys) == f"flowbench: {said}; the same command continues"
    assert signal.getsignal(number) == before


def test_what_is_ignored_stays_ignored(experiment_file, runs, monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        runs.module.fit = lambda *_given, **_options: signal.raise_signal(signal.SIGHUP) or Path("run")
        assert main(["fit", "-c", "wcfm.yaml"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_lightnings_exit_at_sigterm_is_no_success(experiment_file, runs, capsys):
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    def ended(*_given, **_options):
        raise SIGTERMException

    runs.module.fit = ended
    assert main(["fit", "-c", "wcfm.yaml"]) == 143
    assert "ended by SIGTERM" in _one_line(capsys)


def test_an_exit_with_a_text_shows_it(experiment_file, runs, capsys):
    runs.module.fit = lambda *_given, **_options: sys.exit("no licence")
    assert main(["fit", "-c", "wcfm.yaml"]) == 1
    assert _one_line(capsys) == "flowbench: error: no licence"


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "RANK", "NODE_RANK", "SLURM_PROCID"])
def test_of_several_processes_the_first_speaks(experiment_file, runs, capsys, monkeypatch, variable):
    def fail(*_given, **_options):
        raise ValueError("a mistake")

    runs.module.fit = fail
    if variable == "SLURM_PROCID":
        monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv(variable, "1")
    assert main(["fit", "-c", "wcfm.yaml"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(variable, "0")
    assert main(["fit", "-c", "wcfm.yaml"]) == 2
    assert "a mistake" in _one_line(capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    examples = text.split("examples:")[1]
    assert f"flowbench {name}" in examples
    shipped = re.findall(r"experiments/[\w/]+\.yaml", examples)
    assert all((Path(__file__).parents[2] / file).is_file() for file in shipped)
    assert ("key=value" in text) == ("overrides" in text)


def test_overview(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert "flowbench 0." in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"], ["bench", "--help"], ["fit", "--tes"]])
def test_help_imports_nothing_heavy(words):
    code = (
        "import json, sys\n"
        "from flowbench.cli import main\n"
        f"main({words!r})\n"
        "print('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "flowbench" in loaded
    assert not loaded & {"torch", "lightning", "omegaconf", "jsonargparse", "numpy", "yaml", "rich", "scipy"}


def test_print_config_needs_no_torch(experiment_file):
    code = (
        "import sys\nfrom flowbench.cli import main\n"
        "status = main(['fit', '-c', 'wcfm.yaml', '--print-config'])\n"
        "sys.exit(status or ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_closed_pipe_is_no_error(experiment_file):
    words = f"{sys.executable} -m flowbench.cli fit -c wcfm.yaml --print-config"
    done = subprocess.run(f"{words} | true", shell=True, capture_output=True, text=True)
    assert "Broken pipe" not in done.stderr


def test_the_module_is_a_command_too(experiment_file):
    words = [sys.executable, "-m", "flowbench.cli", "fit", "-c", "missing.yaml"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "flowbench: error: file missing.yaml does not exist; did you mean 'wcfm.yaml'?\n" or (
        done.stderr.startswith("flowbench: error: file missing.yaml does not exist")
    )


def test_commands_are_the_documented_ones():
    documented = "fit validate test predict reference prepare count bench compare report check list evaluate stats data"
    assert list(cli.COMMANDS) == documented.split()
