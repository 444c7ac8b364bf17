"""Published values: each is whole and was read, and stands beside a row with a verdict on the comparison."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import flowbench.families
import flowbench.flows
from flowbench.bench import build_report
from flowbench.bench.plan import make_plan
from flowbench.bench.published import FILE, PublishedResult, comparisons, load_published, page_rows, published_table
from flowbench.bench.results import Results
from flowbench.core.rows import Row, read_rows, write_rows
from flowbench.data.catalogue import list_datasets

from .synthetic import write_synthetic_bench

DOCS = Path(__file__).parents[2] / "docs"
FID = PublishedResult(
    metric="fid",
    value=4.4,
    unit="",
    dataset="cifar10",
    family="OTCFM",
    protocol={
        "extractor": "inception-v3-compat",
        "resize": "bilinear-299",
        "reference": "train-50000",
        "samples": "50000",
    },
    sampler="Euler(num_steps=100)",
    network_evaluations=100,
    guidance=None,
    source={"arxiv": "2512.18184", "table": "6", "line": "OT-CFM", "seen_in": "paper"},
    read=True,
)


def row(value: float, seed: int = 0, **fields) -> Row:
    """A row that was measured just as FID was."""
    return Row(
        **{
            "bench": "b",
            "problem": "",
            "contender": "ot_cfm",
            "family": "OTCFM",
            "dataset": "cifar10",
            "seed": seed,
            "metric": "fid",
            "value": value,
            "n": 50000,
            "protocol": "inception-v3-compat/bilinear-299/train-50000/50000",
            "unit": "",
            "goal": "down",
            "network_evaluations": 100.0,
            "sampler": "Euler(num_steps=100)",
            "weights": "ema",
            **fields,
        }
    )


def compared(*rows: Row, entry: PublishedResult = FID):
    (found,) = comparisons(Results(rows), "", ["ot_cfm"], [entry])
    return found


# ---- what ships


def test_every_shipped_value_has_all_fields_and_was_read():
    fields = set("metric value unit dataset family protocol sampler network_evaluations guidance source read".split())
    raw = yaml.safe_load(FILE.read_text(encoding="utf-8"))["results"]
    assert len(raw) > 20
    for entry in raw:
        assert set(entry) == fields
        assert entry["read"] is True
        assert set(entry["source"]) == {"arxiv", "table", "line", "seen_in"}
        assert "recall" not in str(entry)
        likelihood = {"kind", "split", "samples"}
        features = {"extractor", "resize", "reference", "samples"}
        names = {"fid": features, "nll": likelihood, "nll_head": likelihood}
        assert names[entry["metric"]] <= set(entry["protocol"])
    assert [one.value for one in load_published()] == [entry["value"] for entry in raw]


def test_shipped_values_name_what_rows_can_name():
    # The last three are for the page alone: the catalogue has no ImageNet.
    names = {entry.name for entry in list_datasets()} | {"imagenet64", "imagenet256", "imagenet512"}
    for entry in load_published():
        assert entry.dataset in names
        assert hasattr(flowbench.families, entry.family)
        solvers = [entry.sampler, entry.protocol.get("solver")]
        for solver in solvers:
            assert solver in (None, "not stated") or hasattr(flowbench.flows, solver.partition("(")[0])


def test_no_two_shipped_values_are_of_one_thing():
    keys = [
        (e.metric, e.family, e.source["arxiv"], e.source["table"], e.source["line"], e.sampler)
        for e in load_published()
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"read": False}, "read is False; only values that were read"),
        ({"read": "recalled"}, "read is 'recalled'; only values that were read"),
        ({"value": "4.4"}, "value is '4.4'; it must be a finite number"),
        ({"value": float("nan")}, "value is nan"),
        ({"value": True}, "value is True"),
        ({"dataset": None}, "dataset is None; it must be text"),
        ({"guidance": "none"}, "guidance is 'none'"),
        ({"sampler": 5}, "sampler is 5"),
        ({"protocol": "inception"}, "protocol is 'inception'; give its words by name"),
        ({"source": {"arxiv": "2512.18184", "table": "6"}}, "give all of arxiv, table, line, seen_in"),
        ({"source": {"arxiv": 2512.1, "table": "6", "line": "a", "seen_in": "paper"}}, "source.arxiv is 2512.1"),
        ({"source": {"arxiv": "2512.18184", "table": "6", "line": "a", "seen_in": "memory"}}, "seen_in is 'memory'"),
        ({"published": 2025}, "with unknown published; known: metric,"),
        ({"family": ...}, "without family"),
    ],
)
def test_a_bad_entry_is_refused_in_one_line_that_names_it(tmp_path, change, message):
    good = yaml.safe_load(FILE.read_text(encoding="utf-8"))["results"][0]
    bad = {name: value for name, value in {**good, **change}.items() if value is not ...}
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump({"results": [good, bad]}))
    with pytest.raises(ValueError, match="entry 2: ") as caught:
        load_published(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_results_is_refused(tmp_path):
    path = tmp_path / "values.yaml"
    path.write_text("values: []\n")
    with pytest.raises(ValueError, match="must hold a list 'results'"):
        load_published(path)


def test_the_page_of_published_values_has_every_one_under_its_family():
    text = (DOCS / "results" / "published.md").read_text(encoding="utf-8")
    found = {}
    for part in text.split("\n## ")[1:]:
        title, *lines = part.splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        assert cells[0] == ["metric", "published", "source", "ours", "comparable"]
        assert all(len(row) == 5 and row[4].startswith("no, because ") for row in cells[2:])
        (family,) = title.split("`")[1::2]
        found[family] = [tuple(row[:3]) for row in cells[2:]]
    assert found == page_rows(load_published())
    assert list(found) == list(page_rows(load_published()))
    assert sum(line.count("| no, because") for line in text.splitlines()) == len(load_published())


# ---- the comparison


def test_equal_words_make_the_values_comparable():
    found = compared(row(4.6, 0), row(4.8, 1))
    assert found.verdict == "yes"
    assert found.ours.mean == pytest.approx(4.7)
    assert "published for OTCFM: 4.4 (arXiv 2512.18184, Table 6 (OT-CFM)); comparable: yes." in found.sentence


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"protocol": "inception-v3-compat/bilinear-299/train-50000/10000"}, "samples 10000 here, 50000 there"),
        (
            {"protocol": "inception-v3-compat/bilinear-299/test-10000/50000"},
            "reference test-10000 here, train-50000 there",
        ),
        ({"protocol": "inception-v3-compat/bilinear-299/bf16/train-50000/50000"}, "resize bilinear-299/bf16 here"),
        ({"guidance": 1.0}, "guidance 1 with labels here, without labels there"),
        ({"network_evaluations": 40.0}, "network evaluations 40 here, 100 there"),
        ({"sampler": "Midpoint(num_steps=50)"}, "sampler Midpoint() here, Euler() there"),
        ({"unit": "bits/dim"}, "unit bits/dim here, none there"),
    ],
)
def test_a_differing_word_is_the_reason_against(fields, reason):
    found = compared(row(4.6, **fields))
    assert found.verdict.startswith("no, because ")
    assert reason in found.verdict
    assert len(found.reasons) == 1


def test_what_the_source_does_not_state_is_a_reason_against():
    silent = replace(FID, protocol={**FID.protocol, "samples": "not stated", "resize": "not stated"})
    assert compared(row(4.6), entry=silent).verdict == "no, because not stated there: resize, samples"


def test_a_choice_that_only_they_made_is_a_reason_against():
    best = replace(FID, protocol={**FID.protocol, "selection": "best of 11 checkpoints"})
    assert compared(row(4.6), entry=best).verdict == "no, because selection none here, best of 11 checkpoints there"


def test_evaluations_of_an_adaptive_solver_are_an_outcome():
    adaptive = replace(FID, sampler="DormandPrince(rtol=1e-05, atol=1e-05)", network_evaluations=142)
    ours = row(4.6, sampler="DormandPrince(rtol=1e-05, atol=1e-05)", network_evaluations=137.5)
    assert compared(ours, entry=adaptive).verdict == "yes"


def test_the_point_of_a_sweep_stands_in_where_the_row_spent_another_number():
    main = row(4.0, network_evaluations=200.0, sampler="Euler(num_steps=200)")
    point = row(4.9, axis="network_evaluations", at=100.0, sampler="Euler(num_steps=200)")
    found = compared(main, point)
    assert (found.ours.mean, found.verdict) == (4.9, "yes")
    assert compared(main).reasons == ("network evaluations 200 here, 100 there",)


def test_likelihood_words():
    entry = replace(
        FID,
        metric="nll",
        unit="bits/dim",
        sampler=None,
        network_evaluations=None,
        protocol={
            "kind": "exact",
            "split": "test",
            "samples": 10000,
            "dequantisation": "uniform-dequantisation-256-levels",
        },
    )
    ours = {"metric": "nll", "unit": "bits/dim", "sampler": "", "network_evaluations": None}
    exact = "exact/test/10000/uniform-dequantisation-256-levels"
    assert compared(row(3.0, protocol=exact, **ours), entry=entry).verdict == "yes"
    labelled = compared(row(3.0, protocol=exact.replace("10000/", "10000/given-label/"), **ours), entry=entry)
    assert labelled.reasons == ("condition given-label here, none there",)
    noisy = compared(row(3.0, protocol="exact/test/10000/bin-centres-256-levels", **ours), entry=entry)
    assert "dequantisation bin-centres-256-levels here" in noisy.verdict


def test_other_data_families_and_metrics_have_nothing_beside_them():
    for fields in ({"dataset": "mnist"}, {"family": "TARFlow"}, {"metric": "kid[inception]"}, {"value": None}):
        assert comparisons(Results([replace(row(4.6), **fields)]), "", ["ot_cfm"], [FID]) == []
    assert published_table(Results([replace(row(4.6), dataset="mnist")]), "", ["ot_cfm"]) is None


# ---- where it is shown


def test_the_report_shows_published_values_where_there_are_some(workshop):
    workshop.experiment("x")
    bench = workshop.bench(
        contenders={"wcfm": "x.yaml", "cfm": "x.yaml"}, seeds=[0, 1], sweep={"network_evaluations": [1]}
    )
    directory = write_synthetic_bench(make_plan(bench))
    assert "Published beside ours" not in build_report(directory).read_text()
    rows = read_rows(directory / "results.jsonl")
    ours = {"contender": "wcfm", "family": "WeightedCFM", "guidance": 1.0}
    write_rows(directory / "results.jsonl", [*rows, row(12.5, 0, **ours), row(12.7, 1, **ours)])
    text = build_report(directory).read_text()
    section = text.split("### Published beside ours")[1]
    (line,) = [line for line in section.splitlines() if "Table 2" in line]
    assert line.startswith("| wcfm | fid | 12.6 ± 1.3 | 7.33 | no, because ")
    assert "not stated there: extractor, resize, reference, samples" in line
    assert line.endswith("arXiv 2507.22270, Table 2 (W-CFM), read in a transcription |")


def test_the_sentence_on_the_page_of_likelihoods_is_what_the_code_says_of_its_numbers():
    protocol = (
        "ode/test/128/uniform-dequantisation-256-levels/RungeKutta4(num_steps=32)/"
        "HutchinsonDivergence(num_probes=2, distribution='rademacher')"
    )
    fields = {
        "contender": "cfm",
        "family": "FlowMatching",
        "metric": "nll",
        "unit": "bits/dim",
        "n": 128,
        "sampler": "",
    }
    spread = 0.2 / 12.7062  # of two seeds about their mean, for the page's interval of 0.20
    rows = [
        row(4.58 + sign * spread, seed, protocol=protocol, network_evaluations=None, **fields)
        for seed, sign in ((0, -1), (1, 1))
    ]
    first, *_ = comparisons(Results(rows), "", ["cfm"])
    text = " ".join((DOCS / "results" / "likelihood.md").read_text(encoding="utf-8").split())
    assert first.sentence in text
