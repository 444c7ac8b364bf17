"""One number that cannot be computed costs its own rows, which say why; everything else is measured and written."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from flowbench import evaluation
from flowbench.core.no_solution import NoSolutionError
from flowbench.core.rows import Row, read_rows, unmeasured_text
from flowbench.data import FlowDataModule
from flowbench.evaluation import CostReport, FrechetDistance, MaximumMeanDiscrepancy, Measurement, Metric, Wasserstein2
from flowbench.evaluation.failures import Failures
from flowbench.evaluation.feature_metrics import FeatureMetric
from flowbench.evaluation.sample_metric import SampleMetric
from flowbench.evaluation.sampling import samples_of
from flowbench.evaluation.score import score
from flowbench.families import (
    Autoencoder,
    FlowMatching,
    FlowModule,
    InpaintingConditioner,
    LatentCFM,
    LatentSpace,
)
from flowbench.networks import DiT, KLAutoencoder
from flowbench.tasks import generation
from flowbench.tasks.generation import (
    ConditionAgreement,
    LatentBound,
    NegativeLogLikelihood,
    PathStraightness,
    Reconstruction,
    TrainingPairs,
)

from .evaluator_runs import digits, evaluator, flow, points, quick, trainer
from .known import known

NUMERICAL = [
    NoSolutionError("DormandPrince() failed (underflow): loosen the tolerances"),
    ValueError("the median distance between reference samples is 0"),
    FloatingPointError("not a number"),
    torch.linalg.LinAlgError("the factorization could not be completed"),
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
]
MISTAKES = [TypeError("unsupported operand"), AttributeError("no such thing"), AssertionError(), RuntimeError("shapes")]


class Given(SampleMetric):
    """A metric of the user's own, without names: it gives a number."""

    in_sweep = True

    def measure(self, answers):
        return [Measurement("given", 1.0, len(samples_of(answers)), "own")]


def metrics(vectors: bool) -> dict[str, Metric]:
    distance = Wasserstein2() if vectors else FrechetDistance("identity")
    rest = {"pairs": TrainingPairs(16), "nll": NegativeLogLikelihood(), "paths": PathStraightness()}
    latent = {} if vectors else {"reconstruction": Reconstruction("identity"), "bound": LatentBound(num_times=1)}
    return {"own": Given(), "distance": distance, **rest, **latent, "keeps": ConditionAgreement(), "cost": CostReport()}


KINDS = ("points", "latents", "conditioned")


def made(kind: str) -> tuple[FlowModule, FlowDataModule]:
    """A flow of each kind that has parts of its own to measure, and its data."""
    torch.manual_seed(0)
    data = points() if kind == "points" else digits()
    network = partial(DiT, width=16, depth=1, num_heads=2)
    if kind == "points":
        return quick(flow("cfm", data)), data
    if kind == "conditioned":
        network = partial(network, patch_size=2, condition_channels=2)
        return quick(FlowMatching(data.spec, network, conditioner=InpaintingConditioner("half"))), data
    trained = Autoencoder(data.spec, partial(KLAutoencoder, latent_channels=2, width=8))
    return quick(LatentCFM(data.spec, partial(network, patch_size=1), autoencoder=trained)), data


def rows_of(tmp_path, kind: str, family=None, own: dict | None = None, raises: Exception | None = None) -> list[Row]:
    built, data = made(kind)
    family = family or built
    measure = evaluator(own or metrics(kind == "points"), sweep={"network_evaluations": [2, 4]})
    run = trainer(tmp_path, measure, limit_test_batches=1)
    if raises is None:
        run.test(family, data, verbose=False)
    else:
        with pytest.raises(type(raises)) as caught:
            run.test(family, data, verbose=False)
        assert caught.value is raises
    return read_rows(tmp_path / "rows.jsonl")


def by_key(rows: list[Row]) -> dict[tuple, float | None]:
    """What a row is of, and its number; costs are measured on a clock."""
    timed = ("samples_per_second", "peak_memory")
    return {(r.metric, r.axis, r.network_evaluations): r.value for r in rows if r.metric not in timed}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, list[Row]]:
    """Everything measured, by kind of flow."""
    return {kind: rows_of(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


PATHS = {"straightness", "path_energy", "displacement", "path_length_ratio"}
OF_PATHS = {"curvature", "one_step_error", "npe", "npe_curvature", "npe_coupling"}


def break_method(monkeypatch, owner: object, name: str, error: Exception) -> None:
    def broken(*given, **options):
        raise error

    monkeypatch.setattr(owner, name, broken)


@pytest.mark.parametrize("error", NUMERICAL, ids=lambda error: type(error).__name__)
def test_a_computation_without_an_answer_costs_its_own_rows(tmp_path, monkeypatch, whole, error):
    family, _ = made("points")
    break_method(monkeypatch, family, "flow_log_prob", error)
    rows = rows_of(tmp_path, "points", family)
    check_lost(rows, whole["points"], {"nll"}, str(error) or type(error).__name__, {"nll_error"})


@pytest.mark.parametrize("error", MISTAKES, ids=lambda error: type(error).__name__)
def test_a_mistake_of_the_code_is_seen_when_all_other_rows_are_written(tmp_path, monkeypatch, whole, error):
    family, _ = made("points")
    break_method(monkeypatch, family, "flow_log_prob", error)
    rows = rows_of(tmp_path, "points", family, raises=error)
    check_lost(rows, whole["points"], {"nll"}, type(error).__name__, {"nll_error"})


def check_lost(rows: list[Row], expected: list[Row], lost: set[str], reason: str, also: set[str] = frozenset()) -> None:
    failed = [row for row in rows if row.status == "failed"]
    assert {row.metric for row in failed if not row.axis} == lost
    assert all(row.value is None and reason in row.provenance["message"] for row in failed)
    assert all("\n" not in row.provenance["message"] for row in failed)
    gone = lost | also
    kept = {key: value for key, value in by_key(expected).items() if key[0] not in gone or key[1]}
    found = by_key([row for row in rows if row.status != "failed"])
    assert {key: value for key, value in found.items() if key[0] not in also} == kept


PARTS = {  # what is broken: of which flow, whose method, the rows that say so, and those that follow from it
    "paths": ("points", lambda flow: (flow, "trajectory"), PATHS, OF_PATHS),
    "pairs": ("points", lambda flow: (flow, "training_pairs"), {"pairs"}, {"cost_ratio"}),
    "likelihood of latents": ("latents", lambda flow: (flow, "flow_log_prob"), {"nll"}, set()),
    "bound": (
        "latents",
        lambda flow: (LatentSpace, "encode_indexed"),
        {"w2_bound_reconstruction"},
        {"w2_bound_flow_loss"},
    ),
    "conditions": (
        "conditioned",
        lambda flow: (flow.conditioner, "scores"),
        {"keeps"},
        {"inpainting_psnr", "known_psnr"},
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_a_measurement_fails_by_itself(tmp_path, monkeypatch, whole, part):
    kind, owner, lost, also = PARTS[part]
    family, _ = made(kind)
    break_method(monkeypatch, *owner(family), NoSolutionError("gave up"))
    check_lost(rows_of(tmp_path, kind, family), whole[kind], lost, "gave up", also)


def test_reconstructions_fail_by_themselves(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(
        "flowbench.tasks.generation.reconstruction.psnr", lambda *_: (_ for _ in ()).throw(ValueError("no picture"))
    )
    lost = {"reconstruction_fd[identity]", "reconstruction_psnr"}
    check_lost(rows_of(tmp_path, "latents"), whole["latents"], lost, "no picture")


def test_the_distance_of_source_and_data_fails_by_itself(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(
        "flowbench.tasks.generation.paths.transport_cost", lambda *_: (_ for _ in ()).throw(NoSolutionError("no plan"))
    )
    lost = {"npe", "npe_curvature", "npe_coupling"}
    check_lost(rows_of(tmp_path, "points"), whole["points"], lost, "no plan")


@pytest.mark.parametrize("budget", [None, 4])
def test_a_sampler_that_gives_up_costs_the_samples_of_that_point(tmp_path, monkeypatch, whole, budget):
    """Outside of the sweep, or at one of its points; the likelihood, the paths and the other points stay."""
    family, _ = made("points")
    inner = family.flow_sample

    def sample(noise, condition, override):
        if override.network_evaluations == budget:
            raise NoSolutionError("underflow in dt")
        return inner(noise, condition, override)

    monkeypatch.setattr(family, "flow_sample", sample)
    rows = rows_of(tmp_path, "points", family)
    failed = [row for row in rows if row.status == "failed"]
    assert {row.metric for row in failed} == {"own", "w2"}
    assert {row.network_evaluations for row in failed} == {budget}
    assert {(row.protocol, row.axis, row.at) for row in failed} == {
        ("", "" if budget is None else "network_evaluations", budget)
    }
    expected = by_key(whole["points"])
    found = by_key([row for row in rows if row.status != "failed"])
    for key, value in expected.items():
        of_point = (not key[1]) if budget is None else (key[1] and key[2] == budget)
        if key[0] in ("given", "w2") and of_point:
            assert key not in found
        elif key[0] not in ("network_evaluations",) and budget is not None:
            assert found[key] == value
    numbers = {row.metric: row.value for row in rows if row.status == "ok" and not row.axis}
    assert {"nll", "straightness", "parameters"} <= numbers.keys()


# ---- metrics --------------------------------------------------------------------------------------------


def own_metrics() -> list[type[Metric]]:
    values = [*vars(evaluation).values(), *vars(generation).values()]
    found = [value for value in values if isinstance(value, type) and issubclass(value, Metric)]
    return [cls for cls in found if cls is not Metric and not cls.__name__.startswith("_")]


def instance(cls: type[Metric]) -> Metric:
    own = {evaluation.NearestData: {"radius": 1.0}, evaluation.FrechetRatio: {"features": ["identity"]}}
    arguments = own.get(cls, {})
    named = cls in (evaluation.InceptionScore, evaluation.MeanNorm) or not issubclass(cls, FeatureMetric)
    return cls(**arguments) if named else cls("identity")


@pytest.mark.parametrize("error", [NUMERICAL[0], MISTAKES[0]], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("cls", own_metrics(), ids=lambda cls: cls.__name__)
def test_a_metric_that_cannot_be_computed_leaves_rows_of_its_names(cls, error, whole):
    metric = instance(cls)
    metric.measure = lambda answers: (_ for _ in ()).throw(error)
    failures = Failures()
    found = list(score(known(num=5), {"mine": metric, "own": Given()}, failures))
    assert [m.metric for m in found] == [*(metric.names or ("mine",)), "given"]
    assert all(str(error) in m.reason for m in found[:-1])
    assert (found[-1].reason, found[-1].value) == ("", 1.0)
    if error is MISTAKES[0]:
        with pytest.raises(TypeError):
            failures.raise_bug()
    else:
        failures.raise_bug()


def test_names_are_those_of_the_rows(whole):
    """Of every metric that measured something: those that do not depend on the flow are all there."""
    for kind, rows in whole.items():
        measured = {row.metric for row in rows}
        for metric in metrics(kind == "points").values():
            told = set(metric.names)
            assert told <= measured or not told & measured, (kind, metric)


@pytest.mark.parametrize("wrong", [None, 1.0, [1.0], {"w2": 1.0}], ids=str)
def test_a_metric_that_returns_no_measurements_is_named(tmp_path, wrong):
    class Wrong(SampleMetric):
        def measure(self, answers):
            return wrong

    rows = rows_of(tmp_path, "points", own={"mine": Wrong(), "nll": NegativeLogLikelihood()})
    (row,) = [row for row in rows if row.status == "failed"]
    assert row.metric == "mine"
    assert row.provenance["message"].startswith("Wrong.measure must return a ")
    assert any(row.metric == "nll" and row.status == "ok" for row in rows)


def test_points_that_are_mostly_one_value_cost_the_discrepancy_alone(tmp_path):
    """Of the references: their median distance is zero, which a kernel cannot take for its width."""
    x = torch.zeros(200, 2)
    x[::5] = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    torch.save(x, tmp_path / "own.pt")
    data = FlowDataModule("pt", str(tmp_path / "own.pt"))
    measure = evaluator({"mmd": MaximumMeanDiscrepancy(), "w2": Wasserstein2(), "nll": NegativeLogLikelihood()})
    rows = list(measure.reference_rows(data))
    measure.raise_bug()
    assert {row.contender for row in rows} == {"floor", "noise", "gaussian", "gmm"}
    for row in rows:
        assert row.status == ("failed" if row.metric == "mmd" else "ok"), row
    text = unmeasured_text(rows)
    assert text.startswith("floor.mmd, noise.mmd, gaussian.mmd, gmm.mmd (the median distance")


def test_a_reference_that_cannot_be_made_costs_its_own_rows(monkeypatch):
    monkeypatch.setattr(
        "flowbench.tasks.generation.references.fit_mixture", lambda *_: (_ for _ in ()).throw(ValueError("singular"))
    )
    measure = evaluator({"w2": Wasserstein2(), "nll": NegativeLogLikelihood()})
    found = {(row.contender, row.metric): row.status for row in measure.reference_rows(points())}
    lost = {(name, metric): "failed" for name in ("gaussian", "gmm") for metric in ("w2", "nll")}
    assert found == {("floor", "w2"): "ok", ("noise", "w2"): "ok", **lost}


# ---- during training ------------------------------------------------------------------------------------


def test_training_goes_on_without_a_point_of_its_curve(tmp_path, monkeypatch, capsys):
    family, data = made("points")
    inner, calls = family.flow_sample, []

    def sample(*given):
        calls.append(1)
        if len(calls) == 1:
            raise NoSolutionError("too early")
        return inner(*given)

    monkeypatch.setattr(family, "flow_sample", sample)
    run = trainer(tmp_path, evaluator({"w2": Wasserstein2()}, curve=["w2"]), limit_val_batches=1)
    run.fit(family, data)
    assert run.global_step == 6
    assert "no point of w2 at step 2: too early" in capsys.readouterr().err
    lines = (tmp_path / "curve.jsonl").read_text().splitlines()
    assert ['"step": 4' in lines[0], '"step": 6' in lines[1], len(lines)] == [True, True, 2]
