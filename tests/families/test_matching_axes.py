"""The axes of FlowMatching put together: what is refused, what is counted, what is fitted, what is described."""

from __future__ import annotations

from functools import partial

import lightning as L
import pytest
import torch

from flowbench.data import FlowDataModule
from flowbench.families import Condition, FlowMatching, InpaintingConditioner, StreamPairing, TARFlow, WeightedCFM
from flowbench.families.family_contract import Case, check_family
from flowbench.families.pairing.description import OF_WEIGHT
from flowbench.flows import (
    ClassifierFreeGuidance,
    CosinePath,
    EulerMaruyama,
    GaussianSource,
    GibbsWeight,
    Heun,
    IndependentCoupling,
    LowFrequencySource,
    NormAlignedSource,
    OptimalTransportCoupling,
    PrunedSource,
    RungeKutta4,
    SchrodingerBridgeCoupling,
    SchrodingerBridgePath,
    TargetConditionalPath,
    VonMisesFisherSource,
)
from flowbench.networks import DiT
from flowbench.training import load_checkpoint

from ..contract.builders import IMAGES, POINTS, batch_of, build

GUIDED = {"conditional": True, "guidance": ClassifierFreeGuidance(3.0, interval=(0.25, 0.75))}


def noise_and_labels(module: FlowMatching, num: int = 3):
    return module.draw_noise(torch.arange(num), 0), torch.arange(num) % module.spec.num_classes


# ---- what excludes what ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": TargetConditionalPath(), "coupling": OptimalTransportCoupling()}, "independent pairs only"),
        ({"path": TargetConditionalPath(), "source": GaussianSource(2.0)}, "standard normal noise"),
        ({"solver": EulerMaruyama(4), "coupling": OptimalTransportCoupling()}, "needs a Gaussian source"),
        ({"solver": EulerMaruyama(4), "source": GaussianSource(2.0)}, "source_std"),
        ({"solver": EulerMaruyama(4), "weight": GibbsWeight(kappa=1.0)}, "pairs of one weight"),
        ({"solver": EulerMaruyama(4), "sampling_source": GaussianSource(3.0)}, "pairs of one weight"),
        (
            {"weight": GibbsWeight(kappa=1.0, correction="target"), "coupling": OptimalTransportCoupling()},
            "correction target is that of independent pairs",
        ),
        (
            {"weight": GibbsWeight(kappa=1.0, correction="target"), "source": VonMisesFisherSource(5.0)},
            "correction target is that of independent pairs",
        ),
        ({"likelihood_solver": EulerMaruyama(4)}, "cannot integrate a density"),
        ({"path": SchrodingerBridgePath(0.5), "sampling_path": CosinePath()}, "noise of its own"),
        ({"path": SchrodingerBridgePath(0.5), "solver": EulerMaruyama(4)}, "noise of its own"),
        (
            {"path": SchrodingerBridgePath(0.5), "coupling": SchrodingerBridgeCoupling(1.0)},
            "one sigma, got 0.5 on the path and 1 in the coupling: set both alike",
        ),
        ({"guidance": ClassifierFreeGuidance(2.0)}, "needs labels"),
        (
            {"source": LowFrequencySource(2), "conditional": True},
            r"LowFrequencySource\(.* a condition gets noise that its samples do not start from: set conditional=false",
        ),
        ({"source": VonMisesFisherSource(5.0), "conditional": True}, "set conditional=false"),
    ],
)
def test_choices_that_exclude_each_other_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        build("cfm", IMAGES, **options)
    assert "\n" not in str(caught.value)


def test_a_flow_from_low_frequencies_keeps_the_contract():
    """Apart from the families of tests/contract, which are built with labels too."""
    outcomes = check_family(Case(lambda: build("cfm_low_frequency", IMAGES), IMAGES))
    assert [outcome for outcome in outcomes if outcome.status == "failed"] == []


def test_a_source_that_looks_at_the_data_point_takes_no_condition_made_from_it():
    network = partial(DiT, width=16, depth=1, num_heads=2, condition_channels=2)
    with pytest.raises(ValueError, match="set conditioner to null"):
        FlowMatching(IMAGES, network, conditioner=InpaintingConditioner("half"), source=LowFrequencySource(2))


def test_a_label_that_was_never_dropped_guides_nothing():
    """Dropped conditions train another null branch than the one that guidance by labels goes away from."""
    conditioner = InpaintingConditioner(mask="half", dropout=0.1)
    network = partial(DiT, width=16, depth=1, num_heads=2, patch_size=2, condition_channels=2)
    module = FlowMatching(IMAGES, network, conditioner=conditioner, conditional=True, label_dropout=0.0).eval()
    noise, label = noise_and_labels(module)
    condition = conditioner.evaluation_condition(batch_of(IMAGES, 3).x, torch.arange(3), 0, module.space)
    module.sample(noise, Condition(label, condition))
    with pytest.raises(ValueError, match="needs a trained null label"):
        module.sample(noise, Condition(label, condition), guidance=3.0)


def test_a_pairing_is_closed_when_training_breaks_off():
    closed = []
    module = build("cfm", POINTS)
    module.pairing.close = lambda: closed.append(True)
    (callback,) = module.configure_callbacks()
    callback.on_exception(None, module, RuntimeError())
    assert closed == [True]


# ---- sampling ---------------------------------------------------------------------------------------------


def test_another_path_for_the_samples_ends_where_the_trained_one_does():
    plain = build("cfm", IMAGES, solver=RungeKutta4(64)).eval()
    moved = build("cfm", IMAGES, solver=RungeKutta4(64), sampling_path=CosinePath()).eval()
    noise, _ = noise_and_labels(plain)
    torch.testing.assert_close(moved.sample(noise).x, plain.sample(noise).x, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(moved.trajectory(noise, None, 5).states[2], plain.trajectory(noise, None, 5).states[2])
    assert "CosinePath()" in moved.describe().sampler
    assert "CosinePath()" not in plain.describe().sampler


def test_only_times_inside_the_interval_of_guidance_cost_twice():
    module = build("cfm", IMAGES, solver=Heun(num_steps=8), **GUIDED).eval()
    noise, label = noise_and_labels(module)
    # Stages at k/8 and (k + 1)/8: inside [0.25, 0.75] lie 5 starts and 5 ends of the 16.
    assert module.sample(noise, label).network_evaluations == 16 + 10
    assert module.sample(noise).network_evaluations == 16, "without labels there is nothing to be guided by"
    for budget in (14, 26):  # four steps: three starts and three ends lie inside
        assert module.sample(noise, label, network_evaluations=budget).network_evaluations == budget
    with pytest.raises(ValueError, match="cannot spend exactly 5"):
        module.sample(noise, label, network_evaluations=5)


def test_the_interval_of_guidance_is_one_of_the_trained_clock():
    module = build("cfm", IMAGES, solver=Heun(num_steps=8), sampling_path=CosinePath(), **GUIDED).eval()
    noise, label = noise_and_labels(module)
    cost = int(module.sample(noise, label).network_evaluations)
    # tan(pi r / 2) = t / (1 - t): t in [1/4, 3/4] is r in [0.205, 0.795], six of the nine times k/8 but for the ends.
    assert cost == 16 + 10
    assert module.sample(noise, label, network_evaluations=cost).network_evaluations == cost


def test_samples_and_their_densities_come_from_one_pass():
    module = build("cfm", POINTS, likelihood_solver=RungeKutta4(64)).eval()
    noise, _ = noise_and_labels(module, 5)
    x, likelihood = module.sample_with_log_prob(noise)
    torch.testing.assert_close(module.log_prob(x).double(), likelihood.log_prob, atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="in data space"):
        build("latent_cfm", IMAGES).sample_with_log_prob(noise)


@pytest.mark.parametrize("name", ["cfm", "tarflow"])
def test_samples_may_start_elsewhere_than_training_did(name):
    pruned = PrunedSource(max_cosine=0.6, quantile=0.5)
    module = build(name, IMAGES, sampling_source=pruned).eval()
    plain = build(name, IMAGES).eval()
    data = FlowDataModule("digits")
    with pytest.raises(ValueError, match="not fitted"):
        module.draw_noise(torch.arange(2), 0)
    assert isinstance(module, FlowMatching | TARFlow)
    pruned.fit(batch_of(IMAGES, 64).x, torch.Generator().manual_seed(0))
    module.fit_to(data, training=False)  # fitted already: it stays
    index = torch.arange(32)
    there, here = module.draw_noise(index, 0), plain.draw_noise(index, 0)
    assert there.shape == here.shape
    assert 0 < (there != here).flatten(1).any(1).sum() < 32, "some draws are kept, some are not"


def test_weights_trained_without_a_sampling_source_load_into_a_module_that_has_one(tmp_path):
    plain = build("cfm", IMAGES)
    checkpoint = {"state_dict": plain.state_dict()}
    plain.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    module = build("cfm", IMAGES, seed=1, sampling_source=PrunedSource(max_cosine=0.6, quantile=0.5))
    load_checkpoint(module, tmp_path / "a.ckpt")
    for name, value in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


@pytest.mark.parametrize("family", ["cfm", "tarflow"])
@pytest.mark.parametrize("source", [None, GaussianSource(2.0), PrunedSource(max_cosine=0.7, quantile=0.5)], ids=repr)
def test_weights_with_a_sampling_source_load_into_a_module_without_it_or_with_another(tmp_path, family, source):
    pruned = PrunedSource(max_cosine=0.6, quantile=0.5, source=NormAlignedSource())
    pruned.fit(batch_of(IMAGES, 64).x, torch.Generator().manual_seed(0))
    trained = build(family, IMAGES, sampling_source=pruned)
    checkpoint = {"state_dict": trained.state_dict()}
    assert {name for name in checkpoint["state_dict"] if name.startswith("sampling_source")} == {
        "sampling_source._extra_state",
        "sampling_source.source._extra_state",
    }
    trained.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    module = build(family, IMAGES, seed=1, sampling_source=source)
    load_checkpoint(module, tmp_path / "a.ckpt")
    known = dict(trained.named_parameters())
    for name, value in module.named_parameters():
        assert torch.equal(known[name], value), name
    assert source is None or source.needs_fit == isinstance(source, PrunedSource), "the fit is that of other options"
    # The state of a source that is configured still travels, and any other surplus is still refused.
    again = build(family, IMAGES, sampling_source=PrunedSource(0.6, quantile=0.5, source=NormAlignedSource()))
    load_checkpoint(again, tmp_path / "a.ckpt")
    assert torch.equal(again.draw_noise(torch.arange(3), 0), trained.draw_noise(torch.arange(3), 0))
    checkpoint["state_dict"]["surplus"] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"does not fit the configured model: .*surplus"):
        load_checkpoint(module, tmp_path / "b.ckpt")


# ---- what is fitted to the data ---------------------------------------------------------------------------


def test_source_and_weight_are_fitted_before_the_first_step_and_travel_in_the_checkpoint(tmp_path):
    def module() -> FlowMatching:
        torch.manual_seed(0)
        return WeightedCFM(
            data.spec,
            build("cfm", POINTS).network.__class__,
            source=NormAlignedSource(),
            weight=GibbsWeight(kappa=1.0, correction="mixed"),
        )

    data = FlowDataModule("moons", batch_size=32)
    first = module()
    assert first.source.needs_fit
    assert first.weight.needs_fit
    trainer = L.Trainer(
        max_steps=3,
        default_root_dir=tmp_path,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    before = [p.detach().clone() for p in first.network.parameters()]
    trainer.fit(first, datamodule=data)
    assert any(not torch.equal(a, b) for a, b in zip(before, first.network.parameters(), strict=True))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = module()
    load_checkpoint(again, tmp_path / "a.ckpt")
    assert not again.source.needs_fit
    assert not again.weight.needs_fit
    assert torch.equal(again.draw_noise(torch.arange(3), 0), first.draw_noise(torch.arange(3), 0))
    x0, x1 = first.draw_noise(torch.arange(8), 1), batch_of(POINTS, 8).x
    first.weight.eval()
    again.weight.eval()
    torch.testing.assert_close(again.weight(x0, x1).weight, first.weight(x0, x1).weight)


# ---- what the pairs look like -----------------------------------------------------------------------------


def described(name: str, **options) -> dict[str, float]:
    data = FlowDataModule("eight_gaussians", batch_size=128)
    module = build(name, POINTS, **options)
    return module.training_pairs(data, 1024, 0)


def test_independent_pairs_cost_what_they_cost_and_optimal_ones_less():
    plain, optimal = described("cfm"), described("ot_cfm")
    assert plain.keys() == {"cost_ratio"}
    assert plain["cost_ratio"] == pytest.approx(1.0, abs=0.05)
    assert optimal["cost_ratio"] < 0.7


def test_described_points_keep_their_own_labels_where_only_a_part_is_trained_on():
    """A coupling within labels, of points that are not the first of their split, under noisy labels."""

    class Watching(IndependentCoupling):
        def __call__(self, x0, x1, generator, condition=None):
            seen.append((x1, condition))
            return super().__call__(x0, x1, generator, condition)

    seen: list = []
    data = FlowDataModule("digits", train_size=100, batch_size=128, dequantize="none", label_noise=0.3)
    torch.manual_seed(0)
    network = partial(DiT, width=16, depth=1, num_heads=2)
    module = FlowMatching(data.spec, network, coupling=Watching(), conditional=True)
    module.training_pairs(data, 1024, 0)
    chosen = data.train_indices
    assert not torch.equal(chosen, torch.arange(100))
    ((points, label),) = seen
    assert torch.equal(points, data.model_values("train", chosen))
    assert torch.equal(label, data.train_label[chosen])


def test_larger_problems_are_described_as_large_as_they_are():
    plain = described("ot_cfm")["cost_ratio"]
    small, large = (described("ot_cfm", pairing=StreamPairing(oversample=n))["cost_ratio"] for n in (1, 8))
    assert small == pytest.approx(plain, abs=0.02)
    assert large < small


@pytest.mark.parametrize("normalization", ["running", "batch", "raw"])
def test_a_weight_is_described_however_it_is_normalised(normalization):
    found = described("wcfm", weight=GibbsWeight(epsilon=2.0, normalization=normalization))
    assert found.keys() == {"cost_ratio", *OF_WEIGHT}
    assert found == described("wcfm", weight=GibbsWeight(epsilon=2.0))
    assert found["weighted_norm_ratio"] < 1


def test_corrected_weights_have_no_tilt_of_the_data():
    plain = described("wcfm", weight=GibbsWeight(kappa=1.0))
    assert plain["tilt_target"] > 0.005
    module = build("wcfm", POINTS, weight=GibbsWeight(kappa=1.0, correction="target"))
    data = FlowDataModule("gaussian_mixture", batch_size=128)
    module.weight = GibbsWeight(kappa=1.0, correction="target")
    module.fit_to(data, training=True)
    uncorrected = build("wcfm", POINTS, weight=GibbsWeight(kappa=1.0)).training_pairs(data, 1024, 0)
    corrected = module.training_pairs(data, 1024, 0)
    assert corrected["tilt_target"] < 0.2 * uncorrected["tilt_target"]


def test_describing_pairs_leaves_the_running_normaliser_alone():
    module = build("wcfm", POINTS)
    module.training_loss(batch_of(POINTS, 16), torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in module.weight.state_dict().items() if torch.is_tensor(v)}
    module.training_pairs(FlowDataModule("moons", batch_size=64), 256, 0)
    assert module.weight.training
    for key, value in before.items():
        assert torch.equal(module.weight.state_dict()[key], value), key
