"""Every command that a text shows is one: its options are read, its files compose, its keys exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from flowbench.bench.plan import make_plan
from flowbench.cli import COMMANDS, main
from flowbench.cli.parser import make_parser, plain_overrides
from flowbench.config import Experiment
from flowbench.core.resources import find_experiment

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
STAND_IN = "experiments/digits/wcfm.yaml"


def help_text(*words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*words, "--help"]) == 0
    return out.getvalue()


def commands_in(text: str) -> list[str]:
    """The flowbench commands of a help text, or of a page's code: indented, fenced or in backticks."""
    text = re.sub(r"\\\n\s*", "", text)
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    code = [*"".join(fenced).splitlines(), *re.findall(r"^ {2,}.*$", text, re.MULTILINE)]
    code += re.findall(r"`(flowbench [^`]+)`", text)
    lines = [part.strip() for line in code for part in re.split(r"(?<=\S)\s{2,}(?=flowbench )", line)]
    return [line for line in lines if re.match(r"flowbench \w", line)]


HELP = sorted({line for name in COMMANDS for line in commands_in(help_text(name))} | set(commands_in(help_text())))
DOCUMENTED = sorted({line for page in PAGES for line in commands_in(page.read_text(encoding="utf-8"))})


def test_there_are_examples():
    assert {line.split()[1] for line in HELP} >= set(COMMANDS)
    assert len(DOCUMENTED) > 20


@pytest.mark.parametrize("line", sorted({*HELP, *DOCUMENTED}))
def test_an_example_is_a_command(line, tmp_path, monkeypatch):
    words = shlex.split(line, comments=True)[1:]
    if len(words) == 1 or words[0] == "COMMAND":  # a text that speaks of a command
        return
    assert words[0] in COMMANDS, line
    parser = make_parser(words[0], COMMANDS[words[0]])
    if words[0] not in ("data", "list", "compare", "report", "stats"):
        words = [re.sub(r"^(runs/\S*|FILE|file|mine)\.yaml$|^FILE$", STAND_IN, word) for word in words]
    given = parser.parse_intermixed_args(plain_overrides(parser, words[1:]))
    monkeypatch.chdir(ROOT)
    files = getattr(given, "files", None) or []
    whole = [file for file in files if is_here(file)]
    if files and len(whole) == len(files):
        check_experiment(whole, given.overrides)
    if words[0] == "bench" and is_here(str(given.file)):
        make_plan(given.file, given.overrides)


def is_here(file: str) -> bool:
    """Whether a file is one, here or among those that ship; a name of the latter that is none is an error."""
    return find_experiment(file) is not None or Path(file).is_file()


def check_experiment(files: list[str], overrides: list[str]) -> None:
    """Every override names something that there is, and what there is takes it."""
    validated(tuple(files), tuple(overrides))


@cache
def validated(files: tuple[str, ...], overrides: tuple[str, ...]) -> Experiment:
    return Experiment.from_files(files, overrides)


def test_every_shipped_file_that_a_text_names_is_there():
    texts = [*(help_text(name) for name in COMMANDS), *(page.read_text(encoding="utf-8") for page in PAGES)]
    form = r"(?:experiments/|flowbench:)[\w/]+\.yaml"
    found = {name for text in texts for name in re.findall(form, re.sub(r"\\\n\s*", "", text))}
    named = {name.replace("flowbench:", "experiments/") for name in found}
    assert len(named) > 10
    missing = {name for name in named if not (ROOT / name).is_file()}
    assert missing <= {"experiments/base/trainer.yaml"}, missing


SECTIONS = "data|model|trainer|evaluator|budget|run|seed|callbacks|loggers|requires"


# What a page writes where a number is to be chosen.
PLACEHOLDERS = {"N": "2", "K": "2", "[low,high]": "[0, 1]"}


def overrides_in(text: str) -> set[str]:
    """`key=value` words of a help text that belong to an experiment."""
    return {word.rstrip(".,;)") for word in re.findall(rf"(?<![\w.=/-])(?:{SECTIONS})[\w.\[\]]*=[^\s`,;)]+", text)}


def test_the_pages_name_no_override_that_is_refused():
    spans = {
        span.strip("\"'") for page in PAGES for span in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    }
    found = {span for span in spans if re.fullmatch(rf"(?:{SECTIONS})[\w.\[\]]*=[^|]+", span)}
    assert len(found) > 5
    for override in sorted(found):
        limits = ["budget=null"] if override.startswith("trainer.max_steps") else []
        key, _, value = override.partition("=")
        check_experiment([str(ROOT / STAND_IN)], [*limits, f"{key}={PLACEHOLDERS.get(value, value)}"])


def test_the_help_names_no_override_that_is_refused():
    """The help once offered optimizer.lr, a key that no experiment has."""
    texts = [help_text(name).partition("examples:")[0] for name in COMMANDS if name != "bench"]
    named = set().union(*map(overrides_in, texts))
    assert "model.init_args.training.optimizer.lr=1e-3" in named
    for override in sorted(named):
        if not override.startswith(("budget", "trainer.max_steps")):
            check_experiment([str(ROOT / STAND_IN)], [override])
    assert not re.search(r"(?<![\w.])optimizer\.", "".join(map(help_text, COMMANDS)))


@pytest.mark.parametrize("columns", ["80", "60", "200"])
def test_help_fits_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    for words in ([], *([name] for name in COMMANDS)):
        for line in help_text(*words).splitlines():
            longest_word = max(map(len, line.split()), default=0)
            assert len(line) <= int(columns) or longest_word > int(columns) - 30, line


def test_brackets_in_what_a_person_wrote_are_text(tmp_path, monkeypatch, capsys):
    """In no command are they markup."""
    monkeypatch.chdir(tmp_path)
    text = "[bold]Which[/bold] one [0, 1] of [red]two?"
    Path("experiments").mkdir()
    Path("experiments/duel.yaml").write_text(f"question: '{text}'\n")
    assert main(["list", "experiments"]) == 0
    assert text in " ".join(capsys.readouterr().out.split())
    assert main(["fit", "-c", str(ROOT / STAND_IN), "run.name='[bold]x[/]'", "--dry-run"]) == 0
    assert "runs/[bold]x[/]" in capsys.readouterr().out
    assert main(["fit", "-c", str(ROOT / STAND_IN), "run.name='[bold]x[/]'", "--print-config"]) == 0
    assert "[bold]x[/]" in capsys.readouterr().out
