"""Whatever a user writes, wherever: it is taken, or refused in one line, and never anything else."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowbench.bench.plan import make_plan
from flowbench.cli import main
from flowbench.config import ConfigError, Experiment, compose
from flowbench.config.text import plain, read_yaml

ROOT = Path(__file__).parents[2] / "experiments"
FILES = sorted(ROOT.rglob("*.yaml"))
BENCHES = [file for file in FILES if "contenders:" in file.read_text(encoding="utf-8")]
# One of each kind: they are validated to the end, which takes its time.
WHOLE = [ROOT / name for name in ("toy/wcfm.yaml", "digits/starflow.yaml", "digits/latent_cfm_inpaint.yaml")]

SCALARS: list[Any] = [
    None, True, False, 0, 1, -1, 1.5, 1e300, float("nan"), float("inf"), 10**30, 10**400, "", "text", "~", "~nobody/x",
    "${", "${a}", "${data}", "${data.dataset}", "${oc.env:HOME}", "${oc.env:NOPE}", "${oc.decode:'[1'}", "${..a}",
    "${a:b}", "\\${x}", "???", "yes", "null", "2020-01-01", "1e3", "007", "a.b.c", "flowbench.families.FlowMatching",
    "flowbench.flows.GibbsWeight", "torch.nn.Linear", "os.system", "a\nb", "\0", "é", "x" * 500, "/", "..",
    "[bold]x[/]", "npz", "cfm.w2 < 1", "lightning.pytorch.loggers.CSVLogger", "\x85", "\x1b[0m", "toy/cfm.yaml",
    "data.yaml",
]  # fmt: skip
KEYS = [
    "a", "class_path", "init_args", "base", "_replace_", "seed", "data", "model", "trainer", "budget", "steps", "run",
    "evaluator", "metrics", "callbacks", "loggers", "requires", "name", "dir", "", "0", "a.b", "yes", "1e3", "${a}",
    "<<", "dataset", "path", "overrides", "experiment", "trained", "only", "reason", "problems", "contenders", "claims",
    "sweep",
]  # fmt: skip
PIECES = [
    "\t",
    "\n",
    "---\n",
    "&a ",
    "*a ",
    "!!binary ",
    "!x ",
    "? ",
    "- ",
    "# ",
    '"',
    "'",
    "\ufeff",
    "%",
    "|\n",
    ": ",
    "{",
    "]",
]

values = st.recursive(
    st.sampled_from(SCALARS) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def texts(draw: st.DrawFn, value: Any = None) -> str:
    """A value as YAML, every second time with something amiss."""
    text = json.dumps(draw(values) if value is None else value, ensure_ascii=draw(st.booleans()))
    if draw(st.booleans()):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.sampled_from(PIECES)) + text[place + draw(st.integers(0, 2)) :]
    return text


def places(tree: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of a tree, by the way to it."""
    if prefix:
        yield prefix
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, item in items:
        yield from places(item, (*prefix, key))


@cache
def places_in(file: Path) -> list[tuple[Any, ...]]:
    try:
        return list(places(compose([file]).resolved))
    except ConfigError:  # a part, whose interpolations name what others hold
        return list(places(read_yaml(file.read_text(encoding="utf-8"), str(file))))


def dotted(place: tuple[Any, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def nested(place: tuple[Any, ...], value: Any) -> Any:
    for part in reversed(place):
        value = [value] if isinstance(part, int) else {part: value}
    return value


def replaced(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    tree = copy.deepcopy(tree)
    node = tree
    for part in place[:-1]:
        node = node[part]
    node[place[-1]] = value
    return tree


def fault(action) -> str | None:
    """What is wrong with how a text was met: it may be taken, or refused in one line. Other exceptions end the test."""
    try:
        action()
    except ValueError as error:
        said = str(error)
        sound = type(error) in (ConfigError, ValueError) and "\n" not in said and 0 < len(said) < 1500
        return None if sound else repr(error)
    return None


relaxed = {"deadline": None, "suppress_health_check": list(HealthCheck)}
mutations = st.sampled_from(FILES).flatmap(lambda file: st.tuples(st.just(file), st.sampled_from(places_in(file))))
bench_mutations = st.sampled_from(BENCHES).flatmap(lambda f: st.tuples(st.just(f), st.sampled_from(places_in(f))))
whole_mutations = st.sampled_from(WHOLE).flatmap(lambda f: st.tuples(st.just(f), st.sampled_from(places_in(f))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("texts")


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


@pytest.mark.slow
@settings(max_examples=60, **relaxed)
@given(mutations, values, st.data())
def test_over_every_shipped_file_as_override_as_file_and_as_base(folder, mutation, value, data):
    file, place = mutation
    override = f"{dotted(place)}={data.draw(texts(value))}"
    assert fault(lambda: compose([file], [override])) is None
    layer = write(folder / "layer.yaml", data.draw(texts(nested(place, value))))
    assert fault(lambda: compose([file, layer])) is None
    leaf = write(folder / "leaf.yaml", f"base: [{file}, layer.yaml]\nseed: 1\n")
    assert fault(lambda: compose([leaf])) is None


@settings(max_examples=40, **relaxed)
@given(st.binary(max_size=40) | texts().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_as_a_file(folder, content):
    path = folder / "bytes.yaml"
    path.write_bytes(content)
    assert fault(lambda: compose([path])) is None
    assert fault(lambda: make_plan(path)) is None


@settings(max_examples=25, **relaxed)
@given(whole_mutations, values, st.data())
def test_to_the_end_of_the_validation(mutation, value, data):
    file, place = mutation
    assert fault(lambda: Experiment.from_files([file], [f"{dotted(place)}={data.draw(texts(value))}"])) is None


@pytest.mark.slow
@settings(max_examples=20, **relaxed)
@given(bench_mutations, values, st.data())
def test_as_the_text_of_every_shipped_bench(folder, mutation, value, data):
    file, place = mutation
    assert fault(lambda: make_plan(file, [f"{dotted(place)}={data.draw(texts(value))}"])) is None
    tree = plain(read_yaml(file.read_text(encoding="utf-8"), str(file)))
    # Beside the shipped ones lie the experiments that it names.
    (folder / "benches").mkdir(exist_ok=True)
    for part in ROOT.iterdir():
        if part.is_dir() and not (folder / "benches" / part.name).exists():
            (folder / "benches" / part.name).symlink_to(part)
    text = data.draw(texts(replaced(tree, place, value)))
    assert fault(lambda: make_plan(write(folder / "benches" / "bench.yaml", text))) is None


@settings(max_examples=6, **relaxed)
@given(texts())
@pytest.mark.parametrize("command", ["fit", "bench"])
def test_through_the_command_line(capsys, command, text):
    file, key = (WHOLE[0], "evaluator") if command == "fit" else (ROOT / "toy_2d.yaml", "problems")
    status = main([command, "-c", str(file), f"{key}={text}", "--dry-run"])
    err = capsys.readouterr().err
    assert (status, err) == (0, "") or (status == 2 and err.count("\n") == 1 and err.startswith("flowbench: error: "))
