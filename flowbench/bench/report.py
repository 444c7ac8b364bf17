"""The report of a bench: tables and pictures from results.jsonl, plan.json and the cells' files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from flowbench.bench.claim_tables import claim_notes, claims_json, claims_markdown, claims_rich
from flowbench.bench.claims import parse_claim
from flowbench.bench.correction import Corrected, judge_file
from flowbench.bench.equality import equality_notes
from flowbench.bench.notes import reading_notes
from flowbench.bench.plots import plot_bars, plot_evaluations, plot_guidance, plot_train_sizes, plot_training
from flowbench.bench.provenance_lines import provenance_lines
from flowbench.bench.published import published_table
from flowbench.bench.results import UNFINISHED, Results, load_plan, load_rows
from flowbench.bench.sample_pictures import draw_samples, draw_strips, plot_trajectories
from flowbench.bench.seed_axes import TRAINING_AXES, Seeds
from flowbench.bench.shares import shares_text
from flowbench.bench.size_table import size_table
from flowbench.bench.tables import COST, difference_table, metric_table, seed_table
from flowbench.bench.tuned import tuned_table
from flowbench.bench.variance import variance_table
from flowbench.core.rows import Row
from flowbench.core.storage import write_text

__all__ = ["build_report", "print_summary"]


_BARS = {
    "straightness": "Straightness S (0: every sample travels on a straight line at constant speed)",
    "path_length_ratio": "Length of the way over the distance between its ends (1: straight); no unit, so that "
    "families that travel in different spaces can stand side by side",
}


def build_report(bench_dir: str | Path) -> Path:
    """Write report.md, its pictures and claims.json from what the bench directory holds; nothing is trained.

    Args:
        bench_dir: directory of a bench, finished or not.

    Returns:
        Path of report.md.

    Raises:
        ValueError: when the directory holds no bench, or its rows are damaged.
    """
    directory = Path(bench_dir)
    plan = load_plan(directory)
    results = Results.of_bench(plan, load_rows(directory))
    verdicts = _verdicts(plan, results)
    parts = [
        f"# {plan['name']}",
        plan["question"],
        _failures(plan, results),
        claims_markdown(verdicts, claim_notes(verdicts, Seeds.of_plan(plan))),
        *_result_sections(plan, results),
        *_pictures(plan, results, directory),
        _per_seed(plan, results),
        _protocol(plan, results),
    ]
    if verdicts:
        write_text(directory / "claims.json", claims_json(verdicts))
    report = directory / "report.md"
    write_text(report, "\n\n".join(part for part in parts if part) + "\n")
    return report


def print_summary(bench_dir: str | Path, console: Console) -> None:
    """Print the quality and transport tables, the claims and the failures of a bench."""
    directory = Path(bench_dir)
    plan = load_plan(directory)
    results = Results.of_bench(plan, load_rows(directory))
    for problem in plan["problems"]:
        for group in results.groups():
            table = None if group == COST else metric_table(plan, results, problem, group)
            if table is not None:
                table.print(console)
    for note in _notes(plan, results):
        console.print(note, markup=False, highlight=False)
    verdicts = _verdicts(plan, results)
    if verdicts:
        console.print(claims_rich(verdicts))
        for note in claim_notes(verdicts, Seeds.of_plan(plan)):
            console.print(note, markup=False, highlight=False)
    for row in results.failures():
        console.print(
            f"FAILED {_where(row.problem, row.contender)}{_place(row)} seed {row.seed}: {row.provenance['message']}",
            markup=False,
        )
        console.print(f"  log: {row.provenance['log']}", markup=False, soft_wrap=True, highlight=False)


def _where(problem: str, contender: str) -> str:
    return f"{problem}/{contender}" if problem else contender


def _place(row: Row) -> str:
    """Of a cell beside the main one: where on its axis."""
    return f" {row.axis}={row.at:g}" if row.at is not None else ""


def _verdicts(plan: Mapping[str, Any], results: Results) -> list[Corrected]:
    names = {problem: [*contenders, *plan["references"][problem]] for problem, contenders in plan["problems"].items()}
    return judge_file([parse_claim(text) for text in plan["claims"]], results, names)


def _failures(plan: Mapping[str, Any], results: Results) -> str:
    failed = results.failures()
    lines = [
        f"- {_where(row.problem, row.contender)}{_place(row)} seed {row.seed} ({row.provenance['attempts']} attempts): "
        f"{row.provenance['message']} Log: `{row.provenance['log']}`"
        for row in failed
    ]
    fits = [c for c in plan["cells"] if c["kind"] != "reference"]
    missing = [c for c in fits if results.lost_seeds(c["problem"], c["contender"]).get(c["seed"]) == UNFINISHED]
    if missing:
        lines.append(f"- {len(missing)} of {len(fits)} cells are not finished; run the bench again to continue.")
    return "\n".join(["> **Incomplete.** The tables below hold what is finished.", "", *lines]) if lines else ""


def _result_sections(plan: Mapping[str, Any], results: Results) -> list[str]:
    parts = ["## Results", _reading_guide(plan)]
    for problem in plan["problems"]:
        tables = [metric_table(plan, results, problem, group) for group in results.groups()]
        tables += [difference_table(plan, results, problem), size_table(plan, results, problem)]
        tables += [variance_table(plan, results, problem), tuned_table(plan, results, problem)]
        tables.append(published_table(results, problem, plan["problems"][problem]))
        for table in tables:
            if table is not None:
                parts += [f"### {table.title}", table.to_markdown()]
    notes = _notes(plan, results)
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return parts


def _notes(plan: Mapping[str, Any], results: Results) -> list[str]:
    unequal = [note for problem in plan["problems"] for note in equality_notes(plan, results, problem)]
    reading = [note for problem in plan["problems"] for note in reading_notes(results, problem)]
    return [*unequal, *results.notes, *reading]


def _reading_guide(plan: Mapping[str, Any]) -> str:
    number = len(plan["seeds"])
    if number == 1:
        spread = "One seed: there are no intervals, so no difference below is shown to be real."
    else:
        spread = f"Mean ± half width of the 95 % t-interval over {number} training seeds."
    seeds = Seeds.of_plan(plan)
    if seeds.crossed:
        spread += (
            " The trainings are all combinations of the seeds of several axes: those that share a seed are not "
            "independent, so the intervals are narrower than those of as many independent trainings, and no claim is "
            "decided by them."
        )
    if seeds.evaluations:
        spread += " The numbers are of the first evaluation seed."
    return (
        f"{spread} Arrows point to the better value; bold: the best contender and those whose paired "
        "difference to it cannot be told from 0. `≤`: an upper bound. _floor_: held-out real data scored as "
        "if generated; _noise_: the source; _gaussian_, _gmm_: classical baselines fitted on the same split; other "
        "names in italics: images that other code made. †: a planned seed is missing. "
        "Differences are paired by seed; bold: the interval excludes 0."
    )


def _pictures(plan: Mapping[str, Any], results: Results, directory: Path) -> list[str]:
    folder = directory / "pictures"
    one_unit = all(len(results.units(problem, "straightness")) < 2 for problem in plan["problems"])
    bars = "straightness" if one_unit else "path_length_ratio"
    band = "Bands: range of the seeds." if len(plan["seeds"]) > 1 else ""
    drawn = [
        ("Samples from the same noise", draw_samples(plan, directory, folder / "samples.png")),
        (
            f"Quality against network evaluations. {band}",
            plot_evaluations(plan, results, folder / "evaluations.png"),
        ),
        (
            f"Quality against the scale of guidance. {band}",
            plot_guidance(plan, results, folder / "guidance.png"),
        ),
        (
            f"Quality against the number of training samples. {band}",
            plot_train_sizes(plan, results, folder / "train_sizes.png"),
        ),
        (
            f"Quality against training time. {band}",
            plot_training(plan, results, directory, folder / "training.png"),
        ),
        (
            "Ways of the samples, from the source (grey)",
            plot_trajectories(plan, directory, folder / "trajectories.png"),
        ),
        (
            "Ways of the samples, noise (left) to image (right)",
            draw_strips(plan, directory, folder / "strips.png"),
        ),
        (
            _BARS[bars],
            plot_bars(plan, results, bars, folder / "straightness.png"),
        ),
    ]
    shown = [(caption.strip(), path) for caption, path in drawn if path is not None]
    if not shown:
        return []
    return [
        "## Pictures",
        *(f"![{caption}]({path.relative_to(directory)})\n\n*{caption}*" for caption, path in shown),
    ]


def _per_seed(plan: Mapping[str, Any], results: Results) -> str:
    tables = [table for problem in plan["problems"] if (table := seed_table(plan, results, problem)) is not None]
    if not tables:
        return ""
    body = "\n\n".join(f"**{table.title}**\n\n{table.to_markdown()}" for table in tables)
    return f"<details>\n<summary>Values of every seed</summary>\n\n{body}\n\n</details>"


def _protocol(plan: Mapping[str, Any], results: Results) -> str:
    ((kind, amount),) = plan["budget"].items()
    lines = [
        "## Protocol and provenance",
        "",
        f"- budget of every contender: {kind} = {amount:g}{shares_text(plan.get('budget_shares', {}))}",
        f"- seeds: {', '.join(map(str, plan['seeds']))}",
        *_seed_lines(plan),
        f"- cells ran {plan['policy']}",
    ]
    if plan["sweep"]:
        swept = "; ".join(f"{name.replace('_', ' ')} {_join(points)}" for name, points in plan["sweep"].items())
        lines.append(f"- swept: {swept}")
    lines += [f"- {name} measures the weights of {source} again" for name, source in plan.get("trained", {}).items()]
    if kind in ("train_seconds", "train_hours") and plan["jobs"] > 1:
        lines.append(f"- training seconds were taken under {plan['jobs']} concurrent cells")
    return "\n".join([*lines, *_protocol_lines(results), *_sampler_lines(results), *provenance_lines(plan, results)])


def _seed_lines(plan: Mapping[str, Any]) -> list[str]:
    """What the seeds of crossed axes stand for."""
    combined = Seeds.of_plan(plan)
    if not combined.axes:
        return []
    lines = [f"  - seed {number}: {_named(combined.of(number))}" for number in plan["seeds"]]
    return [*lines, f"  - each measured with the evaluation seeds {_join(combined.axes['evaluation'])}"]


def _named(seeds: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {seed}" for name, seed in seeds.items() if name in TRAINING_AXES)


def _join(points: Sequence[float]) -> str:
    return ", ".join(f"{point:g}" for point in points)


def _sampler_lines(results: Results) -> list[str]:
    """Per contender, what its samples depend on beside the weights."""
    found: dict[str, dict[str, None]] = {}
    for row in results.rows:
        if row.sampler and not row.axis:
            scale = "" if row.guidance in (None, 1.0) else f", guidance scale {row.guidance:g}"
            found.setdefault(row.contender, {})[f"`{row.sampler}`{scale}"] = None
    lines = [f"  - {contender}: {'; '.join(samplers)}" for contender, samplers in found.items()]
    return ["- samplers:", *lines] if lines else []


def _protocol_lines(results: Results) -> list[str]:
    """Per metric, its protocols and sample counts; different ones make numbers incomparable."""
    found: dict[str, dict[str, None]] = {}
    for row in results.rows:
        if row.status != "failed" and not row.axis and row.group != COST:
            text = f"`{row.protocol}`" if row.protocol else "no protocol"
            found.setdefault(row.metric, {})[f"{text}{f' (n = {row.n})' if row.n else ''}"] = None
    lines = [f"  - {metric}: {'; '.join(protocols)}" for metric, protocols in found.items()]
    return ["- protocols:", *lines] if lines else []
