"""The plan of a bench: every cell with its directory and experiment, settled before anything runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from flowbench.bench.benchfile import BenchFile, Contender, Problem, load_bench_file
from flowbench.bench.machine import Policy, choose_policy
from flowbench.bench.variations import MAIN, Variation, variations
from flowbench.config import ConfigError, compose_tree, fingerprint
from flowbench.config.merge import Layer, merge
from flowbench.config.references import reference_names
from flowbench.config.text import write_yaml
from flowbench.core.nearest import suggestion
from flowbench.core.places import expand
from flowbench.core.resources import portable_name
from flowbench.core.sweep import SWEEP_AXES

__all__ = ["Cell", "Plan", "make_plan", "pair_name"]


@dataclass(frozen=True)
class Cell:
    """One process of the bench: a contender with one seed and variation, or the reference rows of a problem.

    Attributes:
        kind: the subcommand the process runs: ``fit`` (then test), ``test`` of another cell's weights, ``reference``.
        problem: problem name, empty where the bench has one unnamed problem.
        contender: name in the bench file; ``reference`` for the reference rows.
        seed: training seed.
        directory: the cell's run directory.
        config: content of its ``cell.yaml``.
        config_hash: fingerprint of the composed experiment; another one means other results.
        preparation: cells with the same value share one ``prepare`` (same data, evaluator and prerequisites);
            empty where none is needed.
        trained: directory of the cell whose weights a ``test`` cell measures.
        variation: what it differs in from the main cell of its contender and seed.

    Example:
        >>> cell = make_plan("flowbench:nfm.yaml").cells[0]
        >>> cell.label, cell.kind
        ('teacher seed 0', 'fit')
    """

    kind: Literal["fit", "test", "reference"]
    problem: str
    contender: str
    seed: int
    directory: Path
    config: Mapping[str, Any]
    config_hash: str
    preparation: str
    trained: Path | None = None
    variation: Variation = MAIN

    @property
    def label(self) -> str:
        """Name for people: ``problem/contender seed 0``."""
        prefix = f"{self.problem}/" if self.problem else ""
        varied = f" {self.variation.folder}" if self.variation.folder else ""
        return f"{prefix}{self.contender}" + (" rows" if self.kind == "reference" else f"{varied} seed {self.seed}")

    @property
    def config_path(self) -> Path:
        """The file that ``flowbench fit -c`` is given."""
        return self.directory / "cell.yaml"

    def config_text(self) -> str:
        """``cell.yaml`` as YAML."""
        return write_yaml(self.config)


@dataclass(frozen=True)
class Plan:
    """A bench file with everything that follows from it.

    Attributes:
        bench: the bench file.
        directory: where everything is written.
        cells: the cells, in the order in which they start.
        references: the reference rows of each problem.
        policy: how many cells run at once.
        experiments: by problem and contender what its main cells are composed to, with the first seed.
        varied: the same of the cells on the largest part of the training split; empty where no sizes are swept.
        cpu_only: whether all of them ask for ``trainer.accelerator: cpu``.

    Example:
        >>> plan = make_plan("flowbench:nfm.yaml", ["seeds=[0, 1]"])
        >>> len(plan.cells), plan.problems
        (8, {'': ['teacher', 'nfm', 'cfm', 'ot_cfm']})
    """

    bench: BenchFile
    directory: Path
    cells: tuple[Cell, ...]
    references: tuple[Cell, ...]
    policy: Policy
    experiments: Mapping[tuple[str, str], Mapping[str, Any]]
    cpu_only: bool
    varied: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)

    @property
    def everything(self) -> tuple[Cell, ...]:
        """All cells, the reference rows first: the order in which they run."""
        return (*self.references, *self.cells)

    def reference_names(self, problem: str) -> tuple[str, ...]:
        """Names of the reference rows of a problem."""
        return reference_names(self.experiments[problem, self.problems[problem][0]])

    @property
    def problems(self) -> dict[str, list[str]]:
        """Problem name -> contenders that take part, in the order of the bench file."""
        return {t.name: [c.name for c in self.bench.contenders if t.has(c.name)] for t in self.bench.problems}

    def describe(self) -> dict[str, Any]:
        """What the report needs, as JSON values; directories relative to the bench's."""
        axes, shares = self.bench.seed_axes.axes, self.bench.budget_shares
        return {
            "name": self.bench.name,
            "question": self.bench.question,
            "contenders": [c.name for c in self.bench.contenders],
            "seeds": list(self.bench.seeds),
            **({"seed_axes": {name: list(seeds) for name, seeds in axes.items()}} if axes else {}),
            "budget": dict(self.bench.budget),
            **({"budget_shares": shares} if shares else {}),
            "sweep": dict(self.bench.sweep),
            **({"best_by": self.bench.best_by} if self.bench.best_by else {}),
            **({"equal": list(self.bench.equal)} if self.bench.equal else {}),
            "claims": [claim.text for claim in self.bench.claims],
            "problems": self.problems,
            "references": {name: list(self.reference_names(name)) for name in self.problems},
            "trained": {c.name: c.trained for c in self.bench.contenders if c.trained},
            "reasons": {t.name: t.reason for t in self.bench.problems if t.only is not None},
            "policy": self.policy.describe(),
            "jobs": self.policy.jobs,
            "threads": self.policy.threads,
            "cells": [
                {
                    "kind": cell.kind,
                    "problem": cell.problem,
                    "contender": cell.contender,
                    "seed": cell.seed,
                    "directory": str(cell.directory.relative_to(self.directory)),
                    **({"axis": cell.variation.axis, "at": cell.variation.at} if cell.variation.axis else {}),
                }
                for cell in self.everything
            ],
        }


def make_plan(path: str | Path, overrides: Sequence[str] = (), jobs: int | None = None) -> Plan:
    """Read a bench file and settle its cells; nothing is written to the bench's directory.

    Args:
        path: the bench file.
        overrides: ``key=value`` changes of the bench file.
        jobs: cells at once; None takes the bench file's ``jobs`` (default ``auto``).

    Raises:
        ValueError: one line, for everything that is wrong in the bench file or its experiment files.
    """
    bench = load_bench_file(path, overrides)
    root = expand(os.environ.get("FLOWBENCH_RUNS") or "runs")
    directory = (bench.run_dir or root / bench.name).absolute()
    pairs = [(problem, c) for problem in bench.problems for c in bench.contenders if problem.has(c.name)]
    composed = {
        varied.folder: {(t.name, c.name): _content(bench, c, t, varied, directory) for t, c in pairs}
        for varied in variations(bench)
    }
    contents = composed[MAIN.folder]
    cells = _cells(bench, pairs, composed, directory)
    firsts = {cell.problem: cell for cell in reversed(cells)}
    references = tuple(
        _reference(firsts[t.name], contents[t.name, firsts[t.name].contender], directory) for t in bench.problems
    )
    cpu_only = all((content.get("trainer") or {}).get("accelerator") == "cpu" for content in contents.values())
    policy = choose_policy(bench.jobs if jobs is None else jobs, len(cells), cpu_only=cpu_only)
    largest = max(bench.sweep.get("train_size", []), default=None)
    varied = {} if largest is None else composed[f"train_size-{largest}"]
    plan = Plan(bench, directory, cells, references, policy, contents, cpu_only, varied)
    _check_names(plan)
    return plan


def _check_names(plan: Plan) -> None:
    """Refuse contenders that have the name of a reference row, and claims on names that nobody has."""
    contenders = [contender.name for contender in plan.bench.contenders]
    references = {name for problem in plan.problems for name in plan.reference_names(problem)}
    for name in contenders:
        if name in references:
            raise ValueError(
                f"{plan.bench.path}: contender {name!r}: the name belongs to the reference rows; choose another"
            )
    for claim in plan.bench.claims:
        for side in claim.quantities:
            if side.contender not in (*contenders, *references):
                hint = suggestion(side.contender, (*contenders, *sorted(references)))
                raise ValueError(f"{plan.bench.path}: claim {claim.text!r}: unknown contender {side.contender!r}{hint}")


def _cells(
    bench: BenchFile,
    pairs: Sequence[tuple[Problem, Contender]],
    composed: Mapping[str, Mapping[tuple[str, str], Mapping[str, Any]]],
    directory: Path,
) -> tuple[Cell, ...]:
    """The cells, seed by seed; one that measures another one's weights comes after it and holds its directory."""
    cells: dict[tuple[int, str, str, str], Cell] = {}
    for seed in bench.seeds:
        for problem, contender in pairs:
            for varied in variations(bench):
                config = _cell_config(bench, contender, problem, seed, varied, directory)
                cell = _cell(config, composed[varied.folder][problem.name, contender.name], varied)
                source = _source(cells, seed, problem.name, contender, varied)
                if source is not None:
                    own_hash = fingerprint({"own": cell.config_hash, "trained": source.config_hash})
                    cell = replace(cell, kind="test", trained=source.directory, config_hash=own_hash)
                cells[seed, problem.name, contender.name, varied.folder] = cell
    return tuple(cells.values())


def _source(
    cells: Mapping[tuple[int, str, str, str], Cell], seed: int, problem: str, contender: Contender, varied: Variation
) -> Cell | None:
    """The cell whose weights another one measures; None of one that is trained itself."""
    if not contender.trained and varied.trains:
        return None
    return cells[seed, problem, contender.trained or contender.name, varied.folder if varied.trains else MAIN.folder]


def _content(bench: BenchFile, contender: Contender, problem: Problem, varied: Variation, root: Path) -> dict[str, Any]:
    """What a contender's cells of one variation are composed to, with the first seed."""
    return _compose(_cell_config(bench, contender, problem, bench.seeds[0], varied, root), bench.path)


def _cell_config(
    bench: BenchFile, contender: Contender, problem: Problem, seed: int, varied: Variation, root: Path
) -> dict[str, Any]:
    """Content of a cell.yaml: the experiment, the problem, and what the bench sets."""
    place = str(bench.path)
    own = merge(
        Layer.of(dict(problem.overrides), f"{place}, problem '{problem.name}'"),
        Layer.of(dict(contender.overrides), f"{place}, contender '{contender.name}'"),
    )
    seeds_layer = Layer.of(bench.seed_axes.settings(seed), place)
    set_by_bench: dict[str, Any] = {"seed": seed, "budget": _shared(bench.budget, contender.budget_share)}
    swept = {name: list(points) for name, points in bench.sweep.items() if name in SWEEP_AXES}
    if swept and varied == MAIN:
        set_by_bench["evaluator"] = {"sweep": swept, **({"best_by": bench.best_by} if bench.best_by else {})}
    own = merge(merge(own, seeds_layer), Layer.of({**set_by_bench, **varied.overrides}, place))
    run = {
        "dir": str(root / "cells" / problem.name / contender.name / varied.folder / f"seed-{seed}"),
        "name": "-".join(filter(None, (contender.name, varied.folder, f"seed-{seed}"))),
        "bench": bench.name,
        "problem": problem.name,
        "contender": contender.name,
    }
    return {"base": [portable_name(contender.experiment)], **own.tree, "run": run}


def _shared(budget: Mapping[str, Any], share: float) -> dict[str, Any]:
    """A share of a budget; whole numbers stay whole."""
    if share == 1.0:
        return dict(budget)
    return {kind: max(1, round(share * n)) if isinstance(n, int) else share * n for kind, n in budget.items()}


def _compose(config: Mapping[str, Any], bench: Path) -> dict[str, Any]:
    """The configuration a cell will see, composed as its process will compose it from cell.yaml."""
    run = config["run"]
    try:
        return compose_tree(config, str(bench), Path(run["dir"])).resolved
    except ConfigError as error:
        raise ValueError(f"{pair_name(run['problem'], run['contender'])}: {error}") from error


def pair_name(problem: str, contender: str) -> str:
    """A contender in a problem, as messages name it."""
    return f"problem '{problem}', contender '{contender}'" if problem else f"contender '{contender}'"


def _cell(config: Mapping[str, Any], content: Mapping[str, Any], varied: Variation) -> Cell:
    run = config["run"]
    return Cell(
        kind="fit",
        problem=run["problem"],
        contender=run["contender"],
        seed=config["seed"],
        directory=Path(run["dir"]),
        # With what the user's files hold, so that a cell which finds something else is refused.
        config={**config, **_part(content, "files")},
        config_hash=fingerprint(_with_seeds(content, config)),
        preparation=fingerprint(_part(content, "data", "evaluator", "requires", "files")),
        variation=varied,
    )


def _with_seeds(content: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell is composed to, from what that of the first seed is: they differ in their seeds alone."""
    seeded = {**content, "seed": config["seed"]}
    if "seeds" not in config:
        return seeded
    return {**seeded, "seeds": config["seeds"], "data": {**content["data"], "seed": config["data"]["seed"]}}


def _reference(first: Cell, content: Mapping[str, Any], root: Path) -> Cell:
    """The reference rows of a problem: they belong to the data and the evaluator, and need no preparation."""
    directory = root / "reference" / first.problem
    run = {**first.config["run"], "dir": str(directory), "name": "reference", "contender": "reference"}
    return replace(
        first,
        kind="reference",
        contender="reference",
        directory=directory,
        config={**first.config, "run": run},
        config_hash=fingerprint({**_part(content, "data", "evaluator", "files"), "seed": first.seed}),
        preparation="",
    )


def _part(content: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: content[key] for key in keys if key in content}
