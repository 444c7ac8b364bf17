"""Rules for the whole source, read from its syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "flowbench"
FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def everything() -> list[tuple[str, ast.AST]]:
    """Every node of the package with its place."""
    names = {file: str(file.relative_to(PACKAGE)) for file in FILES}
    return [
        (f"{name}:{getattr(node, 'lineno', 0)}", node)
        for file, name in names.items()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    ]


def nodes(kind: type | tuple[type, ...]) -> Iterator[tuple[str, ast.AST]]:
    """Every node of a kind, with its place."""
    return ((place, node) for place, node in everything() if isinstance(node, kind))


def called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def mode(call: ast.Call) -> str:
    """The text that says how a file is opened; the default where none does."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    given += [argument for argument in call.args if isinstance(argument, ast.Constant)]
    texts = [g.value for g in given if isinstance(g, ast.Constant) and isinstance(g.value, str)]
    return next((text for text in texts if set(text) <= set("rwxabt+")), "r")


# What has a method `open` that is no text file.
OTHER_OPENS = {"ArrayFile", "os", "Image", "tarfile", "zipped", "store", "webbrowser"}


def test_text_files_are_utf8_on_every_machine():
    found = 0
    for place, call in nodes(ast.Call):
        name, keywords = called(call), {keyword.arg for keyword in call.keywords}
        owner = call.func.value if isinstance(call.func, ast.Attribute) else None
        if getattr(owner, "id", "") == "distribution":  # of importlib.metadata: its files are UTF-8
            continue
        if name in ("read_text", "write_text") and owner is not None:
            found += 1
            assert "encoding" in keywords, place
        elif name in ("open", "fdopen", "NamedTemporaryFile"):
            if (name == "open" and getattr(owner, "id", "") in OTHER_OPENS) or "b" in mode(call):
                continue
            found += 1
            assert "encoding" in keywords, place
        elif name in ("run", "Popen", "check_output") and {"text", "universal_newlines"} & keywords:
            assert "encoding" in keywords, place
    assert found > 10


# Conditions on numbers that no caller can break: each has its reason beside it.
INVARIANTS = {"evaluation/samples.py": 2}


def is_narrowing(test: ast.expr) -> bool:
    """Whether a condition only tells the type checker what holds anyway: `x is not None`, `isinstance(x, C)`."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return is_narrowing(test.operand)
    if isinstance(test, ast.Call):
        return called(test) == "isinstance"
    none = isinstance(test, ast.Compare) and isinstance(test.comparators[0], ast.Constant)
    return none and test.comparators[0].value is None and isinstance(test.ops[0], (ast.Is, ast.IsNot))


def test_asserts_are_no_control_flow():
    """They vanish under `python -O`: none has an effect, and none stands between a user's input and the work."""
    others: dict[str, int] = {}
    count = 0
    for place, node in nodes(ast.Assert):
        count += 1
        assert not any(isinstance(part, (ast.NamedExpr, ast.Await, ast.Yield)) for part in ast.walk(node.test)), place
        calls = [called(part) for part in ast.walk(node.test) if isinstance(part, ast.Call)]
        assert set(calls) <= {"isinstance", "len"}, place
        if not is_narrowing(node.test):
            file = place.rpartition(":")[0]
            others[file] = others.get(file, 0) + 1
    assert count > 10
    assert others == INVARIANTS


def test_docstrings_are_no_data():
    """They vanish under `python -OO`."""
    for place, node in nodes(ast.Attribute):
        assert node.attr != "__doc__", place
    for place, call in nodes(ast.Call):
        assert called(call) != "getdoc", place
    for place, name in nodes(ast.Name):
        assert name.id not in ("__doc__", "__debug__"), place


def test_commands_print_plain_text():
    """Rich reads brackets as markup; what a person wrote is none. The bench marks its text."""
    for place, node in nodes((ast.Import, ast.ImportFrom)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        if any(name.partition(".")[0] == "rich" for name in names):
            assert place.startswith(("bench/", "commands/bench.py")), place
