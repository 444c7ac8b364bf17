"""Conditions of samples come from held-out images, keyed by index; agreement and the bound's terms."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from flowbench.data import Batch, FlowDataModule
from flowbench.evaluation import Evaluator, Setup
from flowbench.families import (
    OTCFM,
    Autoencoder,
    Condition,
    FlowMatching,
    InpaintingConditioner,
    LatentCFM,
    SemanticConditioner,
    TARFlow,
)
from flowbench.families.conditioning.by_index import condition_at
from flowbench.flows import Midpoint, RungeKutta4
from flowbench.networks import DiT, KLAutoencoder
from flowbench.tasks.generation import ConditionAgreement, LatentBound
from flowbench.tasks.generation.condition_agreement import ConditionScores
from flowbench.tasks.generation.latent_bound import LatentBoundTerms, held_out_loss
from flowbench.tasks.generation.paths import Paths

from ...contract.builders import IMAGES, build, perturb
from ...evaluation.setups import setup_of


@pytest.fixture(scope="module")
def data() -> FlowDataModule:
    return FlowDataModule("digits", batch_size=16)


@pytest.fixture(scope="module")
def encoder(data) -> Autoencoder:
    torch.manual_seed(0)
    module = Autoencoder(data.spec, partial(KLAutoencoder, latent_channels=2, width=8))
    perturb(module)
    return module.eval()


def flow(data, conditioner, encoder=None, conditional=True) -> FlowMatching:
    torch.manual_seed(0)
    channels = 3 if isinstance(conditioner, InpaintingConditioner) else 4
    if encoder is None and channels == 3:
        channels = 2
    network = partial(DiT, width=16, depth=1, num_heads=2, patch_size=2, condition_channels=channels)
    family = FlowMatching if encoder is None else partial(LatentCFM, autoencoder=encoder)
    fast = {"solver": Midpoint(num_steps=1), "likelihood_solver": RungeKutta4(num_steps=1)}
    module = family(data.spec, network, conditioner=conditioner, conditional=conditional, **fast)
    perturb(module)
    return module.eval()


def asked(module, data, num: int = 24, **options) -> Setup:
    return setup_of(module, data, **{"seed": 3, "num_samples": num, "batch_size": 5, **options})


def test_sample_i_is_given_image_i_and_its_label(data):
    made = asked(flow(data, InpaintingConditioner()), data, num=800)
    index = torch.tensor([0, 7, 360, 367])  # digits hold out 360
    given = condition_at(made.module, made, index)
    condition = given.grid
    assert torch.equal(condition.original, data.model_values("test", index % 360))
    assert torch.equal(condition.original[:2], condition.original[2:])
    # An image that comes again has another mask.
    assert not torch.equal(condition.unknown[:2], condition.unknown[2:])
    label = made.module.labels_of_samples(made)
    assert torch.equal(label[index], data.split("test").label[index % 360])
    assert torch.equal(given.label, label[index])


def test_samples_and_paths_do_not_depend_on_batches_or_processes(data):
    module = flow(data, InpaintingConditioner("square"))
    made = asked(module, data)
    whole = module.sample_at(torch.arange(24), made).x
    parts = [module.sample_at(part, made).x for part in torch.arange(24).flip(0).split(7)]
    torch.testing.assert_close(torch.cat(parts).flip(0), whole)
    other = module.sample_at(torch.arange(24), asked(module, data, rank=1, world_size=2)).x
    assert torch.equal(other, whole)
    paths = Paths().ask(asked(module, data, num_paths=6, path_points=3, num_pictures=2))
    assert paths.shown.shape == (3, 2, 1, 8, 8)
    assert bool(paths.geometry.straightness.isfinite().all())


def test_a_flow_without_conditions_is_given_none(data):
    module = build("cfm", data.spec, conditional=True)
    made = asked(module, data)
    assert condition_at(made.module, made, torch.arange(3)).grid is None
    assert ConditionScores(4).ask(made) is None


# ---- agreement ----------------------------------------------------------------------------------------


def test_scores_are_those_of_samples_that_were_not_pasted(data):
    module = flow(data, InpaintingConditioner("half"), conditional=False)
    made = asked(module, data)
    scores = ConditionScores(9).ask(made)
    index = torch.arange(9)
    condition = condition_at(made.module, made, index).grid
    raw = module.sample(module.draw_noise(index, 3), Condition(grid=replace(condition, original=None))).x.clamp(-1, 1)
    pasted = module.sample_at(index, made).x
    square = (raw - condition.original).double().square()
    for name, where in (("inpainting_psnr", condition.unknown), ("known_psnr", ~condition.unknown)):
        mean = torch.stack([error[0][mask].mean() for error, mask in zip(square, where, strict=True)])
        torch.testing.assert_close(scores[name].values, -10 * (mean / 4).log10())
        assert scores[name].floor is None
        assert scores[name].protocol == "inpainting[half]/test"
    known = ~condition.unknown[:, None]
    assert torch.equal(pasted[known], condition.original[known])


def test_a_latent_flow_has_the_autoencoders_agreement_beside_its_own(data, encoder):
    module = flow(data, SemanticConditioner(4), encoder)
    made = asked(module, data)
    ((name, score),) = ConditionScores(12).ask(made).items()
    assert name == "semantic_agreement"
    x = data.model_values("test", slice(12))
    ideal = module.space.reconstruct(x)
    condition = module.conditioner.evaluation_condition(x, torch.arange(12), 0, module.space)
    torch.testing.assert_close(score.floor, module.conditioner.scores(ideal, condition)[name][0])
    assert score.protocol == "semantic[4 derived]/test"


# ---- the two terms of the bound -----------------------------------------------------------------------


class Constant(nn.Module):
    """One velocity everywhere."""

    condition_channels = 0

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.value.expand(x.shape)


def test_terms_against_their_definition(data, encoder):
    module = LatentCFM(data.spec, lambda *_: Constant(0.5), autoencoder=encoder).eval()
    terms = LatentBoundTerms(16, 360).ask(asked(module, data))
    x = data.model_values("test")
    with torch.no_grad():
        mean, log_variance = encoder.network.encode(x)
        difference = (x - encoder.network.decode(mean)).flatten(1).double()
    torch.testing.assert_close(terms.reconstruction, difference.square().sum(1), rtol=1e-5, atol=0)
    # E |x1 - x0 - c|^2 = E |mean - c|^2 + variance + 1 per dimension, whatever the time.
    scale = encoder.latent_std
    expected = ((mean / scale - 0.5).square() + log_variance.exp() / scale**2 + 1).flatten(1).sum(1).double()
    error = (terms.flow_loss.mean() - expected.mean()).abs()
    assert error < 4 * (terms.flow_loss - expected).std() / 360**0.5
    assert error < 0.02 * expected.mean()


def test_terms_do_not_depend_on_batches_or_processes(data, encoder):
    module = flow(data, InpaintingConditioner(), encoder)
    whole = LatentBoundTerms(2, 20).ask(asked(module, data))
    other = LatentBoundTerms(2, 20).ask(asked(module, data, batch_size=20))
    torch.testing.assert_close(whole.flow_loss, other.flow_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(whole.reconstruction, other.reconstruction, rtol=1e-5, atol=0)
    assert whole.latent == "2x4x4"


def test_other_objectives_have_no_flow_term(data, encoder):
    batch = Batch(data.model_values("test", slice(4)), index=torch.arange(4))
    network = partial(DiT, width=16, depth=1, num_heads=2)
    assert held_out_loss(OTCFM(data.spec, network), batch, 0) is None
    assert held_out_loss(build("wcfm", data.spec), batch, 0) is None
    assert held_out_loss(TARFlow(IMAGES, layers=[1], width=8, head_dim=8), batch, 0) is None
    assert held_out_loss(FlowMatching(data.spec, network), batch, 0).shape == (4,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConditionAgreement(0), "num_samples must be a whole number in .*, got 0"),
        (lambda: LatentBound(num_samples=0), "num_samples must be a whole number in .*, got 0"),
        (lambda: LatentBound(num_times=0), "num_times must be a whole number in .*, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- through the trainer ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditioner", "expected"),
    [
        (InpaintingConditioner("half"), {"inpainting_psnr", "known_psnr"}),
        (SemanticConditioner(4, dropout=0.2), {"semantic_agreement"}),
    ],
    ids=["inpainting", "semantic"],
)
def test_trained_and_scored_through_the_trainer(data, encoder, tmp_path, conditioner, expected):
    module = flow(data, conditioner, encoder)
    metrics = {"conditions": ConditionAgreement(8), "bound": LatentBound(8, num_times=2)}
    evaluator = Evaluator(metrics, num_samples=12, num_likelihood=4, num_pictures=4)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=3,
        max_epochs=-1,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        limit_test_batches=1,
        inference_mode=False,
        default_root_dir=tmp_path,
        callbacks=[evaluator],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = {key: value.clone() for key, value in module.network.state_dict().items()}
    trainer.fit(module, datamodule=data)
    assert all(not torch.equal(before[key], value) for key, value in module.network.state_dict().items())
    trainer.test(module, datamodule=data, verbose=False)
    rows = {row.metric: row for row in evaluator.rows}
    names = expected | {f"reconstruction_{name}" for name in expected}
    assert set(rows) == names | {"w2_bound_reconstruction", "w2_bound_flow_loss"}
    assert all(row.n == 8 for row in rows.values())
    told = f"variance of the target included/given label and {conditioner.name}"
    assert rows["w2_bound_flow_loss"].protocol.endswith(told)
    assert conditioner.sampler_name in rows[min(expected)].sampler
