"""Measurements against values computed by hand or by another library."""

from __future__ import annotations

import math
import re

import numpy as np
import ot
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_statistics_to_metric

from flowbench import evaluation
from flowbench.data import DataSpec, FlowDataModule
from flowbench.evaluation import (
    ClassAccuracy,
    Cost,
    CostReport,
    DensityCoverage,
    FrechetDistance,
    FrechetInfinity,
    InceptionScore,
    KernelDistance,
    MaximumMeanDiscrepancy,
    MeanNorm,
    Memorization,
    NegativeLogLikelihood,
    PathStraightness,
    PrecisionRecall,
    SampleSet,
    SlicedWasserstein2,
    Subject,
    TrainingPairs,
    Wasserstein2,
)
from flowbench.evaluation.samples import Collector, RealSet
from flowbench.metrics import (
    ClassifierFeatures,
    FeatureStatistics,
    IdentityFeatures,
    block_geometry,
    path_geometry,
    save_statistics,
    train_classifier,
)
from flowbench.metrics.features import NormFeatures

DIGITS = DataSpec("digits", "1", (1, 8, 8), num_classes=10, levels=17)
POINTS = DataSpec("points", "1", (2,))


def cloud(num: int, spec: DataSpec, seed: int, shift: float = 0.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (0.4 * torch.randn(num, *spec.shape, generator=rng) + shift).clamp(-0.999, 0.999)


def sample_set(x: Tensor, spec: DataSpec, name: str) -> SampleSet:
    """Samples as the evaluator collects them, all kept for the comparisons here."""
    collector = Collector(spec, extractors(spec), {"identity": len(x)}, len(x))
    for index in torch.arange(len(x)).split(25):
        collector.add(index, x[index])
    return collector.gathered(name)


def extractors(spec: DataSpec) -> dict:
    return {"identity": IdentityFeatures(spec.num_dims)}


def subject(spec: DataSpec = POINTS, num: int = 60, num_real: int = 90, **known) -> Subject:
    samples, real = (
        sample_set(cloud(num, spec, 0, 0.2), spec, "generated"),
        sample_set(cloud(num_real, spec, 1), spec, "val"),
    )
    return Subject(spec, samples, real, extractors=extractors(spec), **known)


def flat(x: Tensor, spec: DataSpec) -> np.ndarray:
    values = spec.to_uint8(x) if spec.modality == "image" else x
    return values.double().flatten(1).numpy()


@pytest.mark.parametrize("spec", [POINTS, DIGITS], ids=["points", "images"])
def test_fd_is_that_of_torch_fidelity(spec):
    """Images are compared as 8-bit pictures, points as they are."""
    given = subject(spec, num=200, num_real=150)
    (found,) = FrechetDistance("identity").measure(given)
    sides = [flat(part.shown, spec) for part in (given.samples, given.reference)]
    first, second = ({"mu": s.mean(0), "sigma": np.cov(s, rowvar=False)} for s in sides)
    expected = fid_statistics_to_metric(first, second, verbose=False)["frechet_inception_distance"]
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert (found.metric, found.n, found.protocol) == ("fd[identity]", 200, "identity/val-150/200")


def test_kid_is_the_mean_over_all_pairs():
    given = subject()
    (found,) = KernelDistance("identity").measure(given)
    x, y = given.samples.shown.double(), given.reference.shown.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 2 + 1) ** 3

    n, m = len(x), len(y)
    within = (kernel(x, x).sum() - kernel(x, x).trace()) / (n * (n - 1))
    within += (kernel(y, y).sum() - kernel(y, y).trace()) / (m * (m - 1))
    assert found.value == pytest.approx(float(within - 2 * kernel(x, y).mean()), rel=1e-4)


@pytest.mark.parametrize("sizes", [(60, 90), (90, 60)])
def test_neighbour_metrics_take_equal_numbers_and_say_so(sizes):
    given = subject(num=sizes[0], num_real=sizes[1])
    generated, real = given.samples.shown[:60].double(), given.reference.shown[:60].double()

    def covered(points: Tensor, centres: Tensor, k: int) -> Tensor:
        radius = torch.cdist(centres, centres).sort(1).values[:, k]
        return torch.cdist(points, centres) <= radius

    results = {
        m.metric: m
        for metric in (PrecisionRecall("identity"), DensityCoverage("identity"))
        for m in metric.measure(given)
    }
    expected = {
        "precision": covered(generated, real, 3).any(1).double().mean(),
        "recall": covered(real, generated, 3).any(1).double().mean(),
        "density": covered(generated, real, 5).double().sum() / (5 * 60),
        "coverage": covered(generated, real, 5).any(0).double().mean(),
    }
    for name, value in expected.items():
        found = results[f"{name}[identity]"]
        assert found.value == pytest.approx(float(value), abs=1e-12), name
        assert found.n == 60
        assert found.protocol == f"identity/val-60/60/k{3 if name in ('precision', 'recall') else 5}"


def test_point_metrics_against_pot():
    given = subject()
    x, y = given.samples.shown.numpy().astype(float), given.reference.shown[:60].numpy().astype(float)
    (w2,) = Wasserstein2().measure(given)
    assert w2.value == pytest.approx(math.sqrt(ot.emd2([], [], ot.dist(x, y))), rel=1e-6)
    assert (w2.n, w2.protocol, w2.unit) == (60, "points/val-60/60", "data units")
    (sliced,) = SlicedWasserstein2(num_projections=4000).measure(given)
    assert sliced.value == pytest.approx(ot.sliced_wasserstein_distance(x, y, n_projections=20_000, seed=0), rel=0.02)
    assert SlicedWasserstein2(num_projections=8).measure(given) == SlicedWasserstein2(num_projections=8).measure(given)
    (mmd,) = MaximumMeanDiscrepancy().measure(given)
    same = Subject(POINTS, given.reference, given.reference)
    assert mmd.value > MaximumMeanDiscrepancy().measure(same)[0].value


def test_a_uniform_density_over_the_grey_levels_costs_their_logarithm():
    """log2(17) bits per pixel, whatever the number of pixels: the density of model space is 2^-64."""
    uniform = torch.full((5,), -64 * math.log(2.0), dtype=torch.float64)
    (found,) = NegativeLogLikelihood().measure(subject(DIGITS, log_prob=uniform))
    assert found.value == pytest.approx(math.log2(17), rel=1e-12)
    assert (found.unit, found.n) == ("bits/dim", 5)
    assert found.protocol == "exact/test/5/uniform-dequantisation-17-levels"


def test_the_density_of_noisy_data_is_no_code_length():
    log_prob = torch.full((5,), -64 * 0.5)
    (found,) = NegativeLogLikelihood().measure(subject(DIGITS, log_prob=log_prob, in_bits=False))
    assert (found.value, found.unit) == (0.5, "nats/dim")


def test_points_are_counted_in_nats():
    (found,) = NegativeLogLikelihood().measure(subject(log_prob=torch.tensor([-1.0, -3.0]), likelihood="ode"))
    assert (found.value, found.unit, found.protocol) == (2.0, "nats", "ode/test/2")


def test_the_protocol_of_a_likelihood_names_what_moves_it():
    log_prob = torch.zeros(3)
    known = {"likelihood": "ode", "given_label": True, "dequantize": "none", "likelihood_method": "Euler(num_steps=2)"}
    (found,) = NegativeLogLikelihood().measure(subject(DIGITS, log_prob=log_prob, **known))
    assert found.protocol == "ode/test/3/given-label/bin-centres-17-levels/Euler(num_steps=2)"
    (found,) = NegativeLogLikelihood().measure(subject(POINTS, log_prob=log_prob, dequantize="none"))
    assert found.protocol == "exact/test/3", "points have no bins"


def test_a_long_sum_of_float32_densities_is_done_in_double():
    values = torch.full((100_000,), 1e7, dtype=torch.float32) + torch.arange(100_000) % 2
    (found,) = NegativeLogLikelihood().measure(subject(log_prob=values))
    assert found.value == -10_000_000.5


def test_block_paths_by_hand():
    """(0,0) -> (3,4) -> (3,0): lengths 5 and 4, half a unit of time each; the chord is 3."""
    states = torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]], [[3.0, 0.0]]])
    given = subject(geometry=block_geometry(states), space="data", transport_cost=4.0)
    found = {m.metric: m for m in PathStraightness().measure(given)}
    energy = 0.5 * (10.0**2 + 8.0**2)
    assert found["path_energy"].value == pytest.approx(energy)
    assert found["displacement"].value == pytest.approx(9.0)
    assert found["straightness"].value == pytest.approx(energy - 9.0)
    assert found["path_length_ratio"].value == pytest.approx(3.0)
    assert found["npe"].value == pytest.approx((energy - 4.0) / 4.0)
    assert found["npe_curvature"].value == pytest.approx((energy - 9.0) / 4.0)
    assert found["npe_coupling"].value == pytest.approx((9.0 - 4.0) / 4.0)
    assert found["npe"].protocol == "data/1-paths/2048-points-w2-squared=4.0000"
    assert not {"curvature", "one_step_error"} & set(found), "a path with corners has neither"
    assert found["path_energy"].unit == "squared data units"
    latent = {
        m.metric: m for m in PathStraightness().measure(subject(geometry=block_geometry(states), space="latent 4x4x4"))
    }
    assert not {"npe", "npe_curvature", "npe_coupling"} & set(latent)
    assert (latent["straightness"].protocol, latent["straightness"].unit) == (
        "latent 4x4x4/1-paths",
        "squared latent units",
    )


def test_paths_of_a_continuous_flow_by_hand():
    """Z_t = t^2 / 2 in one dimension: v = t, a = 1; one Euler step from rest goes nowhere."""
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    geometry = path_geometry((times**2 / 2)[:, None, None], times[:, None, None], times)
    given = subject(geometry=geometry, transport_cost=0.2, transport_origin="reference")
    found = {m.metric: m for m in PathStraightness().measure(given)}
    assert found["curvature"].value == pytest.approx(1.0)
    assert found["one_step_error"].value == pytest.approx(0.25)
    assert found["straightness"].value == pytest.approx(1 / 3 - 1 / 4)
    assert found["npe"].value == pytest.approx((1 / 3 - 0.2) / 0.2)
    assert found["npe"].value == pytest.approx(found["npe_curvature"].value + found["npe_coupling"].value)
    assert {found[name].unit for name in ("curvature", "one_step_error")} == {"squared data units"}
    assert found["npe_coupling"].protocol == "data/1-paths/reference-w2-squared=0.2000"
    assert found["npe_coupling"].unit == ""


def test_training_pairs_are_reported_as_the_family_gives_them():
    pairs = {"ess": 0.6, "tilt_source": 0.1, "tilt_target": 0.4, "cost_ratio": 0.7}
    found = TrainingPairs(num_pairs=512).measure(subject(training_pairs=pairs))
    assert {m.metric: m.value for m in found} == pairs
    assert {(m.n, m.protocol, m.unit) for m in found} == {(512, "training-pairs/512", "")}
    with pytest.raises(ValueError, match="num_pairs must be at least 2, got 1"):
        TrainingPairs(num_pairs=1)


def norm_subject(spec: DataSpec, scale: float, bad: float | None = None) -> Subject:
    real = cloud(70, spec, 1)
    drawn = scale * cloud(50, spec, 2)
    if bad is not None:
        drawn[7].fill_(bad)
    norm = {"norm": NormFeatures()}
    sides = []
    for name, x in (("generated", drawn), ("val", real)):
        collector = Collector(spec, norm, {"norm": len(x)}, len(x))
        collector.add(torch.arange(len(x)), x)
        sides.append(collector.gathered(name))
    return Subject(spec, *sides, extractors=norm)


@pytest.mark.parametrize("spec", [POINTS, DIGITS], ids=["points", "images"])
def test_mean_norms_by_numpy(spec):
    given = norm_subject(spec, 0.5)
    (found,) = MeanNorm().measure(given)

    def mean(part: SampleSet) -> float:
        x = flat(part.shown, spec)
        x = x / 127.5 - 1 if spec is DIGITS else x
        return float((np.linalg.norm(x, axis=1) / math.sqrt(x.shape[1])).mean())

    assert found.value == pytest.approx(mean(given.samples) / mean(given.reference), rel=1e-6)
    assert 0.4 < found.value < 0.6
    assert (found.metric, found.n, found.protocol, found.unit) == ("mean_norm_ratio", 50, "norm/val-70/50", "")
    given.swept = "guidance"
    assert MeanNorm().measure(given)[0].protocol == "norm/val-70/50/sweep-guidance"
    (same,) = MeanNorm().measure(Subject(spec, given.reference, given.reference, extractors=given.extractors))
    assert same.value == 1.0


def test_a_diverged_sample_has_no_norm():
    (found,) = MeanNorm().measure(norm_subject(POINTS, 1.0, math.nan))
    assert math.isnan(found.value)


def classified(label: Tensor | None, x: Tensor) -> tuple[Subject, ClassifierFeatures]:
    images = DIGITS.to_uint8(cloud(60, DIGITS, 3))
    model = train_classifier(images, torch.arange(60) % 10, 10, 0, num_steps=2)
    network = ClassifierFeatures(model)
    collector = Collector(DIGITS, {"digits-cnn": network}, {"digits-cnn": len(x)}, len(x))
    collector.add(torch.arange(len(x)), x)
    drawn = collector.gathered("generated", label=label)
    return Subject(DIGITS, drawn, drawn, extractors={"digits-cnn": network}), network


def test_class_accuracy_is_that_of_the_whole_classifier():
    x = cloud(40, DIGITS, 4)
    guess = classified(None, x)[1].model(DIGITS.to_uint8(x)).argmax(dim=1)
    label = torch.where(torch.arange(40) < 25, guess, (guess + 1) % 10)
    given, _ = classified(label, x)
    (found,) = ClassAccuracy("digits-cnn").measure(given)
    assert found.value == 25 / 40
    assert (found.metric, found.n) == ("class_accuracy[digits-cnn]", 40)
    assert found.protocol == "digits-cnn/given-label/40"
    given.swept = "guidance"
    (few,) = ClassAccuracy("digits-cnn", num_samples=30).measure(given)
    assert (few.value, few.n, few.protocol) == (25 / 30, 30, "digits-cnn/given-label/30/sweep-guidance")
    x[0] = math.nan
    assert math.isnan(ClassAccuracy("digits-cnn").measure(classified(label, x)[0])[0].value)


def test_class_accuracy_needs_labels_and_a_classifier():
    assert ClassAccuracy("digits-cnn").measure(classified(None, cloud(12, DIGITS, 4))[0]) == []
    with pytest.raises(ValueError, match="class_accuracy needs a classifier of the data set, identity is none"):
        ClassAccuracy("identity").measure(subject(DIGITS))


def test_real_images_bring_their_own_labels():
    data = FlowDataModule("digits", batch_size=8)
    real = RealSet(data, "test", 20)
    assert torch.equal(real.label, data.split("test").label[:20])
    assert RealSet(FlowDataModule("s_curve", batch_size=8), "test").label is None


def test_the_mean_step_is_reported_where_steps_were_counted():
    cost = Cost(
        parameters=7, train_seconds=1.5, train_flops=2e9, samples_seen=64, peak_memory_mb=9.0, samples_per_second=3.0,
        steps=300,
    )  # fmt: skip
    found = {m.metric: m for m in CostReport().measure(subject(cost=cost))}
    assert (found["step_milliseconds"].value, found["step_milliseconds"].unit) == (5.0, "ms")


def test_costs_are_reported_as_given():
    cost = Cost(
        parameters=7, train_seconds=1.5, train_flops=2e9, samples_seen=64, peak_memory_mb=9.0, samples_per_second=3.0
    )
    found = {m.metric: m.value for m in CostReport().measure(subject(cost=cost, network_evaluations=40.0))}
    assert found == {
        "parameters": 7,
        "train_flops": 2e9,
        "train_seconds": 1.5,
        "samples_seen": 64,
        "peak_memory": 9.0,
        "samples_per_second": 3.0,
        "network_evaluations": 40.0,
    }


@pytest.mark.parametrize(
    "metric",
    [NegativeLogLikelihood(), PathStraightness(), TrainingPairs(), CostReport()],
    ids=lambda m: type(m).__name__,
)
def test_what_is_not_known_is_not_measured(metric):
    assert metric.measure(subject()) == []


def everything() -> list[evaluation.Metric]:
    featured = [cls("identity") for cls in (FrechetDistance, KernelDistance, PrecisionRecall, DensityCoverage)]
    return [*featured, Wasserstein2(), SlicedWasserstein2(), MaximumMeanDiscrepancy()]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("metric", everything(), ids=lambda m: type(m).__name__)
def test_a_diverged_sample_gives_the_same_rows_without_a_number(metric, bad):
    healthy = subject()
    x = healthy.samples.shown.clone()
    x[3, 0] = bad
    broken = Subject(POINTS, sample_set(x, POINTS, "generated"), healthy.reference, extractors=healthy.extractors)
    expected = [(m.metric, m.n, m.protocol, m.unit) for m in metric.measure(healthy)]
    found = metric.measure(broken)
    assert [(m.metric, m.n, m.protocol, m.unit) for m in found] == expected
    assert all(math.isnan(m.value) for m in found)


@pytest.mark.parametrize("metric", everything(), ids=lambda m: type(m).__name__)
def test_a_single_point_gives_rows_and_no_failure(metric):
    """A split of the user's own data may be as small as that; the other rows must not be lost."""
    found = metric.measure(subject(num=1))
    assert found
    assert all(m.n == 1 and math.isnan(m.value) for m in found)


@pytest.mark.parametrize(("metric", "k"), [(PrecisionRecall("identity"), 3), (DensityCoverage("identity"), 5)])
def test_balls_need_more_points_than_neighbours(metric, k):
    assert all(math.isnan(m.value) for m in metric.measure(subject(num=k)))
    assert all(math.isfinite(m.value) for m in metric.measure(subject(num=k + 1)))


@pytest.mark.parametrize("metric", everything(), ids=lambda m: type(m).__name__)
def test_a_swept_row_says_so(metric):
    given = subject()
    given.swept = "network_evaluations"
    assert all(m.protocol.endswith("/sweep") for m in metric.measure(given))


def test_every_exported_metric_is_tested_here():
    exported = {v for v in vars(evaluation).values() if isinstance(v, type) and issubclass(v, evaluation.Metric)}
    tested = {type(m) for m in everything()} | {NegativeLogLikelihood, PathStraightness, CostReport, evaluation.Metric}
    tested |= {FrechetInfinity, InceptionScore, Memorization}  # below
    tested |= {MeanNorm, ClassAccuracy, TrainingPairs}  # above
    tested |= {evaluation.Reconstruction}  # in test_evaluator, it needs a flow
    # In files of their own.
    tested |= {evaluation.ConditionAgreement, evaluation.LatentBound, evaluation.ModeRecovery, evaluation.NearestData}
    assert exported == tested


def test_samples_are_seen_as_they_would_be_in_a_file():
    """On the grid of the grey levels, and without gradients."""
    samples = sample_set(cloud(9, DIGITS, 0).requires_grad_(), DIGITS, "generated")
    assert set(samples.features(IdentityFeatures(64)).unique().tolist()) <= {float(k * 255 // 16) for k in range(17)}
    assert not samples.shown.requires_grad


@pytest.mark.parametrize("metric", [FrechetDistance("identity", 40, 70), KernelDistance("identity", 40, 70)])
def test_a_metric_may_look_at_the_first_few_samples_only(metric):
    whole = subject(DIGITS)
    part = subject(DIGITS)
    part.samples = sample_set(whole.samples.shown[:40], DIGITS, "generated")
    part.reference = sample_set(whole.reference.shown[:70], DIGITS, "val")
    (limited,), (cut,) = metric.measure(whole), type(metric)("identity").measure(part)
    assert limited == cut
    assert limited.protocol == "identity/val-70/40"
    # A limit beyond what there is takes what there is.
    assert type(metric)("identity", 999, 999).measure(whole) == type(metric)("identity").measure(whole)


def test_only_float32_inception_features_make_an_fid():
    for features, expected in (("inception", "fid"), ("inception-bf16", "fd[inception-bf16]"), ("x-cnn", "fd[x-cnn]")):
        assert FrechetDistance(features).label("fd") == expected
    assert KernelDistance("inception").label("kid") == "kid[inception]"


@pytest.mark.parametrize("options", [{"num_samples": 1}, {"num_reference": 0}])
def test_counts_out_of_range(options):
    with pytest.raises(ValueError, match=r"must be at least 2 or null for all, got [01]"):
        FrechetDistance("identity", **options)


def test_the_interval_of_the_distance_is_centred_and_shrinks_with_n():
    widths = []
    for num in (60, 600):
        low, value, high = (
            m.value
            for name in ("fd_low[identity]", "fd[identity]", "fd_high[identity]")
            for m in FrechetDistance("identity", interval=True).measure(subject(num=num))
            if m.metric == name
        )
        assert low < value < high
        assert value == FrechetDistance("identity").measure(subject(num=num))[0].value
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_moments_from_a_file_take_the_place_of_the_reference(tmp_path):
    given = subject()
    real = given.reference.shown.double().numpy()
    np.savez(tmp_path / "others.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    (own,) = FrechetDistance("identity").measure(given)
    metric = FrechetDistance("identity", statistics=str(tmp_path / "others.npz"))
    (found,) = metric.measure(given)
    assert found.value == pytest.approx(own.value, rel=1e-9)
    assert re.fullmatch(r"identity/statistics-[0-9a-f]{8}-foreign-unknown-N/60", found.protocol)
    assert metric.num_reference == 0
    with pytest.raises(ValueError, match=r"num_reference=5 has no say over the statistics in a.npz; remove it"):
        FrechetDistance("identity", num_reference=5, statistics="a.npz")


def test_statistics_of_other_weights_are_refused(tmp_path):
    given = subject()
    statistics = FeatureStatistics.from_features(given.reference.shown)
    metadata = {"extractor": "identity", "checksum": "of other weights", "protocol": "identity"}
    save_statistics(tmp_path / "s.npz", statistics, metadata)
    metric = FrechetDistance("identity", statistics=str(tmp_path / "s.npz"))
    with pytest.raises(ValueError, match="checksum='of other weights', expected"):
        metric.measure(given)
    metric = FrechetDistance("identity", statistics=str(tmp_path / "s.npz"))
    metadata["checksum"] = given.extractors["identity"].checksum
    save_statistics(tmp_path / "s.npz", statistics, metadata)
    assert re.fullmatch(r"identity/statistics-[0-9a-f]{8}-90/60", metric.measure(given)[0].protocol)


def test_the_extrapolated_distance_of_equal_gaussians_is_nought_where_the_plain_one_is_biased():
    rng = torch.Generator().manual_seed(0)
    spec = DataSpec("points", "1", (20,))
    samples = sample_set(torch.randn(400, 20, generator=rng), spec, "generated")
    real = sample_set(torch.randn(20_000, 20, generator=rng), spec, "val")
    given = Subject(spec, samples, real, extractors=extractors(spec))
    value, low, high = (m.value for m in FrechetInfinity("identity").measure(given))
    assert low < 0.05
    assert low < value < high
    assert abs(value) < FrechetDistance("identity").measure(given)[0].value / 3
    # Too few samples cost this row and no others.
    assert all(math.isnan(m.value) for m in FrechetInfinity("identity", num_samples=40).measure(given))


def split_subject(samples: Tensor, train: Tensor, held_out: Tensor, spec: DataSpec) -> Subject:
    named = {"generated": samples, "train": train, "test": held_out}
    sets = {name: sample_set(x, spec, name) for name, x in named.items()}
    for kept, name in ((sets["generated"], "generated"), (sets["train"], "train")):
        kept._images = lambda index, x=named[name]: spec.to_uint8(x[index])
    return Subject(spec, sets["generated"], sets["train"], extractors=extractors(spec), held_out=sets["test"])


def test_copies_are_found_and_shown():
    """Seven of twenty samples are training images: they are the worst pairs, beside the image they copy."""
    train, fresh, held_out = (cloud(num, DIGITS, seed) for num, seed in ((80, 1), (20, 2), (30, 3)))
    copies = fresh.clone()
    copies[5:12] = train[30:37]
    metric = Memorization("identity", num_pairs=7)
    found = {m.metric: m for m in metric.measure(split_subject(copies, train, held_out, DIGITS))}
    plain = {m.metric: m for m in metric.measure(split_subject(fresh, train, held_out, DIGITS))}
    assert found["data_copying[identity]"].value < plain["data_copying[identity]"].value - 1
    assert found["authenticity[identity]"].value == pytest.approx(plain["authenticity[identity]"].value, abs=7 / 20)
    assert found["authenticity[identity]"].value <= 13 / 20
    assert found["authenticity[identity]"].protocol == "identity/train-80/20/test-20"
    picture = metric.pictures(split_subject(copies, train, held_out, DIGITS))["nearest-identity"]
    # Two rows of seven, framed and enlarged: the upper row is the lower one.
    assert torch.equal(picture[:, :34], picture[:, 34:])
    assert picture.shape == (1, 2 * 34, 7 * 34)


def test_diverged_samples_have_no_memorisation():
    samples = cloud(20, DIGITS, 0)
    samples[3, 0, 0, 0] = math.nan
    given = split_subject(samples, cloud(30, DIGITS, 1), cloud(30, DIGITS, 2), DIGITS)
    metric = Memorization("identity")
    assert all(math.isnan(m.value) for m in metric.measure(given))
    assert metric.pictures(given) == {}


class Logits(IdentityFeatures):
    """Two pixels as the logits of two classes."""

    def __init__(self) -> None:
        super().__init__(64, "inception-logits")
        self.dimension = 2

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().flatten(1)[:, :2]


def test_inception_score_of_two_sure_classes_is_two():
    spec, network = DIGITS, Logits()
    x = torch.full((40, 1, 8, 8), -1.0)
    x[::2, 0, 0, 0] = 0.999
    x[1::2, 0, 0, 1] = 0.999
    collector = Collector(spec, {network.name: network}, {network.name: 40}, 1)
    collector.add(torch.arange(40), x)
    given = Subject(
        spec, collector.gathered("generated"), collector.gathered("train"), extractors={network.name: network}
    )
    (found,) = InceptionScore(splits=4).measure(given)
    assert found.value == pytest.approx(2.0, rel=1e-6)
    assert (found.metric, found.protocol) == ("inception_score", "inception-logits/40/4-splits")
