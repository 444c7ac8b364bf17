"""TARFlow: variants, losses that are logged, conditioning, extreme inputs, checkpoints."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from torch import nn

from flowbench.data import Batch, DataSpec, FlowDataModule
from flowbench.families import Condition, GaussianNoise, TARFlow, Tweedie, UniformDequantization
from flowbench.flows import AutoregressiveGuidance, JacobiInverse, SequentialInverse
from flowbench.training import OptimizerConfig, TrainingConfig, load_checkpoint
from tests.closeness import assert_near

from ..contract.builders import IMAGES, POINTS, batch_of, build, perturb

OBLONG = DataSpec("oblong", "1", (1, 4, 8), num_classes=3, levels=256)


def points(num: int = 6, spec=POINTS, seed: int = 1) -> torch.Tensor:
    return torch.randn(num, *spec.shape, generator=torch.Generator().manual_seed(seed))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def oblong(**options) -> TARFlow:
    torch.manual_seed(0)
    flow = TARFlow(OBLONG, **{"layers": [1, 2, 1], "width": 16, "head_dim": 8, "patch_size": 2, **options})
    perturb(flow)
    return flow


# ---- variants of the bijector -----------------------------------------------------------------------------

VARIANTS = {
    "widths": {"width": [8, 24, 16]},
    "starflow's": {"scale": "softplus", "soft_clip": 4.0, "start": "learned", "position": "rope"},
    "last order": {"last_order": "identity"},
    "extent": {"position": "rope", "extent": 16.0, "final_norm": True},
    "orders": {"permutations": ["transpose", "reverse-columns", "transpose-flip"], "position": "rope"},
    "learned positions in odd orders": {"permutations": ["reverse-rows", "transpose", "flip"]},
    "checkpointed": {"checkpoint_every": 1},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_is_inverted_and_its_determinant_is_the_jacobians(options):
    flow = oblong(**options).double()
    x = points(2, OBLONG).double()
    noise = flow.flow_encode(x, Condition())
    torch.testing.assert_close(flow.flow_decode(noise, Condition()).x, x, atol=1e-10, rtol=0.0)
    one = flow._tokens(x[:1])
    jacobian = torch.autograd.functional.jacobian(lambda t: flow.flow(t)[0], one).reshape(32, 32)
    torch.testing.assert_close(flow.flow(one)[1], jacobian.slogdet().logabsdet[None], rtol=1e-10, atol=1e-10)
    expected = flow.source.log_prob(flow._tokens(noise[:1])) + jacobian.slogdet().logabsdet
    torch.testing.assert_close(flow.log_prob(x[:1]), expected)


def test_an_extent_changes_the_positions_and_checkpointing_changes_nothing():
    plain, extent = oblong(position="rope"), oblong(position="rope", extent=40.0)
    x = points(2, OBLONG)
    assert not torch.allclose(plain.log_prob(x), extent.log_prob(x))
    losses = []
    for flow in (oblong(), oblong(checkpoint_every=1)):
        loss = flow.train().loss(x, Condition(), Batch(x), rng()).total
        loss.backward()
        losses.append([loss.detach(), *(p.grad for p in flow.parameters())])
    for a, b in zip(*losses, strict=True):
        torch.testing.assert_close(a, b)


def test_labels_go_to_all_blocks_or_to_the_deep_one():
    def labelled(flow: TARFlow) -> list[bool]:
        return [block.network.num_classes is not None for block in flow.flow.blocks]

    assert labelled(oblong(conditional=True)) == [True] * 3
    assert labelled(oblong(conditional=True, conditioned="deep")) == [False, False, True]


def test_compilation_reaches_the_layers_of_all_transformers():
    module = build("tarflow_score_matching", IMAGES)
    layers = module.compiled_modules()
    assert len(layers) == 3 + 1
    assert all(hasattr(layer, "mlp") for layer in layers)
    held = {id(p) for part in module.sharded_modules() for p in part.parameters()}
    assert held == {id(p) for p in module.parameters()}


# ---- sampling ---------------------------------------------------------------------------------------------


def test_a_jacobi_sampler_draws_what_the_sequential_one_draws():
    sequential, jacobi = oblong(inverse=SequentialInverse()), oblong(inverse=JacobiInverse(tolerance=1e-6))
    noise = points(3, OBLONG)
    torch.testing.assert_close(jacobi.sample(noise).x, sequential.sample(noise).x, atol=1e-4, rtol=1e-4)
    assert jacobi.sample(noise).network_evaluations > sequential.sample(noise).network_evaluations == 1.0
    assert jacobi.describe().sampler == "jacobi(1e-06)"
    assert sequential.describe().sampler == oblong().describe().sampler == ""


def test_samples_carry_the_certificate_of_their_inverse():
    noise = points(3, OBLONG)
    plain = oblong().sample(noise)
    assert plain.residual is None
    assert plain.iterations.shape == (3, 3)
    flow = oblong(inverse=JacobiInverse(1e-2))  # coarse, so that the residual is more than rounding
    drawn = flow.sample(noise)
    z, _ = flow.flow(flow._tokens(drawn.x), None)
    residual = (z - flow._tokens(noise)).abs().flatten(1).amax(1)
    assert 1e-4 < float(drawn.residual.max()) <= 1e-2
    assert_near(drawn.residual, residual.detach(), scale=0.1 * float(noise.abs().max()))


def test_the_sampler_has_a_name():
    options = {"conditional": True, "guidance": AutoregressiveGuidance(3.0, rule="linear")}
    flow = oblong(**options, augmentation=GaussianNoise(0.1), denoiser=Tweedie(0.9))
    assert flow.describe().sampler == "sequential+guidance[linear]+tweedie(0.9)", "the scale has a column of its own"
    assert flow.describe().guidance_scale == 3.0
    plain = oblong(conditional=True)
    assert (plain.describe().guidance_scale, plain.describe().sampler) == (1.0, "sequential+guidance[product]")
    rule = AutoregressiveGuidance(rule="log-scale", annealed=True, temperature=0.3)
    assert oblong(guidance=rule).describe().sampler == "sequential+guidance[log-scale,annealed,temperature=0.3]"
    assert oblong().describe().guidance_scale is None


def test_a_number_guides_the_blocks_that_know_labels_by_the_closed_form():
    assert oblong(conditional=True, guidance=2.0).guidance == AutoregressiveGuidance(2.0)
    deep = oblong(conditional=True, conditioned="deep", guidance=2)
    assert deep.guidance == AutoregressiveGuidance(2.0, blocks="deep")
    noise, label = points(2, OBLONG), torch.tensor([0, 1])
    own, asked = deep.sample(noise, label), deep.sample(noise, label, guidance=4.0)
    assert not torch.allclose(own.x, asked.x)
    torch.testing.assert_close(oblong(conditional=True, conditioned="deep").sample(noise, label, guidance=2.0).x, own.x)


def test_a_temperature_guides_without_labels():
    """And costs twice; at temperature 1, or without weight, it does nothing."""
    noise = points(2, OBLONG)
    plain = oblong().sample(noise)
    guided = oblong(guidance=AutoregressiveGuidance(2.0, temperature=0.3)).sample(noise)
    assert not torch.allclose(guided.x, plain.x)
    assert guided.network_evaluations == 2 * plain.network_evaluations
    off = oblong(guidance=AutoregressiveGuidance(1.0, temperature=0.3))
    assert torch.equal(off.sample(noise).x, plain.x)
    assert torch.equal(off.sample(noise, guidance=2.0).x, guided.x), "a sweep may choose the scale"
    assert off.describe().guidance_scale == 1.0


def test_encoding_and_decoding_know_no_denoiser():
    flow = build("tarflow_tweedie", POINTS, conditional=True).double()
    x, label = points(4).double(), torch.tensor([0, 1, 2, 3])
    noise = flow.encode(x, label)
    torch.testing.assert_close(flow.flow_decode(noise, Condition(label)).x, x, atol=1e-10, rtol=0.0)
    torch.testing.assert_close(flow.flow_denoise(x, Condition(label)), flow.sample(noise, label).x)


# ---- conditioning -----------------------------------------------------------------------------------------


def test_a_dropped_label_in_training_is_the_null_label_in_sampling():
    """Invariant 15: one vector; all labels dropped is the unconditional density."""
    flow = oblong(conditional=True, label_dropout=1.0 - 1e-9)
    batch = Batch(points(5, OBLONG), label=torch.tensor([0, 1, 2, 0, 1]))
    loss = flow.training_loss(batch, rng()).total.detach()
    torch.testing.assert_close(loss, -flow.log_prob(batch.x).mean() / 32)
    noise = points(2, OBLONG)
    null = torch.full((2,), OBLONG.num_classes)
    torch.testing.assert_close(flow.sample(noise, null).x, flow.sample(noise).x)


def test_a_batch_of_labels_and_nulls_is_what_separate_calls_give():
    flow = oblong(conditional=True)
    x, label = points(4, OBLONG), torch.tensor([0, 3, 2, 3])
    whole = flow.log_prob(x, label)
    torch.testing.assert_close(whole[label == 3], flow.log_prob(x[label == 3]))
    torch.testing.assert_close(whole[label != 3], flow.log_prob(x[label != 3], label[label != 3]))


# ---- the loss and what is logged --------------------------------------------------------------------------


def test_the_loss_is_nats_per_dimension_and_bits_where_they_mean_something():
    """Bits by the change of units: a density of x in [-1, 1) times the bin's width is the mass of a grey level."""
    flow, x = oblong(), points(4, OBLONG)
    loss = flow.loss(x, Condition(), Batch(x), rng())
    torch.testing.assert_close(loss.total.detach(), -flow.log_prob(x).mean() / 32)
    nats = float(loss.total.detach())
    assert float(loss.metrics["bits_per_dim"]) == pytest.approx(nats / math.log(2) + 7.0, rel=1e-6)
    noisy = oblong(augmentation=GaussianNoise(0.1)).loss(x, Condition(), Batch(x), rng())
    assert "bits_per_dim" not in noisy.metrics, "a density of noisy data is no code length"
    assert "bits_per_dim" not in build("starflow", IMAGES).training_loss(batch_of(IMAGES), rng()).metrics
    continuous = DataSpec("plane", "1", (2,))
    plane = TARFlow(continuous, layers=[1], width=8, head_dim=8)
    assert "bits_per_dim" not in plane.loss(points(), Condition(), Batch(points()), rng()).metrics
    assert isinstance(oblong().augmentation, UniformDequantization)


def test_step_zero_is_the_standard_normal():
    torch.manual_seed(0)
    flow = TARFlow(OBLONG, layers=[1, 1], width=16, head_dim=8, patch_size=2)
    x = points(4, OBLONG)
    expected = 0.5 * x.double().square().mean() + 0.5 * math.log(2 * math.pi)
    assert float(flow.loss(x, Condition(), Batch(x), rng()).total.detach()) == pytest.approx(float(expected), rel=1e-6)


def test_the_latent_norm_is_that_of_the_states_between_the_blocks():
    x = points(4, OBLONG)
    plain, regular = oblong(), oblong(latent_norm=0.1)
    states = plain.flow.states(plain._tokens(x)).detach()
    expected = sum(float(state.square().mean()) for state in states[1:-1])
    losses = [flow.loss(x, Condition(), Batch(x), rng()) for flow in (plain, regular)]
    assert float(losses[1].metrics["latent_norm"]) == pytest.approx(expected, rel=1e-5)
    assert float((losses[1].total - losses[0].total).detach()) == pytest.approx(0.1 * expected, rel=1e-4)
    assert torch.equal(losses[0].metrics["nll"], losses[1].metrics["nll"])
    with pytest.raises(ValueError, match=r"latent_norm must be a number in .*, got -1: 0 is no regulariser"):
        oblong(latent_norm=-1)


def test_block_statistics_are_those_of_the_states_and_scales():
    flow, x = oblong(), points(4, OBLONG)
    loss = flow.loss(x, Condition(), Batch(x), rng())
    found = loss.diagnostics()
    states = flow.flow.states(flow._tokens(x)).detach()
    assert len(found) == 3 * 3
    for k, block in enumerate(flow.flow.blocks):
        assert float(found[f"block{k}/variance"]) == pytest.approx(float(states[k + 1].var(correction=0)), rel=1e-5)
        params = block.network(block.ordered(states[k])).detach()
        std = params[..., 4:].exp()
        assert float(found[f"block{k}/min_std"]) == pytest.approx(float(std.min()), rel=1e-5)
        assert float(found[f"block{k}/max_std"]) == pytest.approx(float(std.max()), rel=1e-5)
        assert not block.network._forward_hooks, "nothing is left listening"
        assert not block._forward_hooks


def quiet_trainer(tmp_path, **options) -> L.Trainer:
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    base = {"accelerator": "cpu", "num_sanity_val_steps": 0, "default_root_dir": tmp_path, **dict.fromkeys(off, False)}
    return L.Trainer(
        **{**base, "max_epochs": -1, "val_check_interval": 1000, "check_val_every_n_epoch": None, **options}
    )


def test_the_trainer_logs_blocks_on_logging_steps_only(tmp_path):
    flow = build("tarflow", FlowDataModule("digits", batch_size=16).spec)
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append({name for name in trainer.callback_metrics if "block" in name})

    trainer = quiet_trainer(tmp_path, max_steps=3, log_every_n_steps=2, callbacks=[Watch()])
    trainer.fit(flow, FlowDataModule("digits", batch_size=16))
    # The trainer keeps a value until it is written again.
    assert [bool(names) for names in seen] == [False, True, True]
    assert {"train/nll", "train/bits_per_dim", "train/block1/max_std"} <= set(trainer.callback_metrics)


def test_bits_are_not_logged_of_values_that_were_not_spread_over_their_bins(tmp_path):
    data = FlowDataModule("digits", batch_size=16, dequantize="none")
    flow = build("tarflow", data.spec)
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(flow, data)
    assert "train/bits_per_dim" not in trainer.callback_metrics


# ---- training ---------------------------------------------------------------------------------------------


def test_the_loss_decreases_and_all_parameters_move():
    flow = oblong(conditional=True, label_dropout=0.3, training=TrainingConfig(OptimizerConfig(lr=3e-3)))
    before = [p.clone() for p in flow.parameters()]
    optimizer, generator, losses = flow.optimizer_config.build(flow), rng(), []
    pattern = points(1, OBLONG, seed=4)
    for _ in range(60):
        label = torch.randint(0, 3, (32,), generator=generator)
        x = pattern * (label[:, None, None, None] - 1.0) + 0.3 * torch.randn(32, 1, 4, 8, generator=generator)
        loss = flow.training_loss(Batch(x, label=label), generator).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5
    assert all(not torch.equal(a, b) for a, b in zip(before, flow.parameters(), strict=True))


@pytest.mark.parametrize("options", [{}, VARIANTS["starflow's"]], ids=["tarflow's", "starflow's"])
@pytest.mark.parametrize("x", [0.0, 1.0, -1.0, 10.0], ids=lambda value: f"all {value:g}")
def test_constant_saturated_and_large_inputs_stay_finite(options, x):
    flow = oblong(**options)
    loss = flow.loss(torch.full((3, *OBLONG.shape), x), Condition(), Batch(torch.full((3, *OBLONG.shape), x)), rng())
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(torch.isfinite(p.grad).all() for p in flow.parameters())
    assert all(torch.isfinite(value) for value in {**loss.metrics, **loss.diagnostics()}.values())


def test_only_matrices_are_decayed():
    """Neither biases and norms nor embeddings, learned positions and start tokens; every parameter once."""
    flow = build(
        "tarflow_score_matching", IMAGES, conditional=True, position="learned", start="learned", final_norm=True
    )
    decayed, kept = flow.optimizer_config.build(flow).param_groups
    names = {id(p): name for name, p in flow.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        f"{name}.weight" for name, m in flow.named_modules() if isinstance(m, nn.Linear)
    }
    left = {names[id(p)].rpartition(".")[2] for p in kept["params"]}
    assert {"bias", "start_token", "position_embedding"} <= left
    assert any("label_embedding.weight" in names[id(p)] for p in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


@pytest.mark.parametrize("name", ["tarflow_score_matching", "tarflow_widths"])
def test_a_checkpoint_gives_the_same_density_and_the_same_next_step(name, tmp_path):
    def trained(steps: int, ckpt: str | None = None, module=None):
        module = module or build(name, data().spec, seed=0 if ckpt is None else 7)
        trainer = quiet_trainer(tmp_path, max_steps=steps)
        trainer.fit(module, data(), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return module, trainer

    def data() -> FlowDataModule:
        return FlowDataModule("digits", batch_size=16)

    constant = {"training": TrainingConfig(OptimizerConfig(lr=1e-2, schedule="constant", warmup_fraction=0.0))}
    first, trainer = trained(2, module=build(name, data().spec, **constant))
    path = str(tmp_path / "a.ckpt")
    trainer.save_checkpoint(path)
    loaded = build(name, data().spec, seed=5)
    load_checkpoint(loaded, path)
    x = points(3, data().spec)
    assert torch.equal(first.log_prob(x), loaded.log_prob(x))
    straight, _ = trained(3, module=build(name, data().spec, **constant))
    resumed, _ = trained(3, ckpt=path, module=build(name, data().spec, seed=7, **constant))
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize("denoiser", [None, "tweedie"])
def test_weights_serve_without_the_denoiser_that_learned_beside_them(tmp_path, denoiser):
    """So that a bench measures one training under several denoisers."""
    data = FlowDataModule("digits", batch_size=16)
    learned = build("tarflow_score_matching", data.spec)
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(learned, data)
    trainer.save_checkpoint(str(tmp_path / "a.ckpt"))
    plain = build("tarflow_score_matching", data.spec, seed=3, denoiser=Tweedie() if denoiser else None)
    load_checkpoint(plain, tmp_path / "a.ckpt")
    x = points(3, data.spec)
    assert torch.equal(learned.log_prob(x), plain.log_prob(x))
    with learned.evaluating(), plain.evaluating():
        assert torch.equal(learned.log_prob(x), plain.log_prob(x))


def test_weights_of_other_noise_are_refused(tmp_path):
    data = FlowDataModule("digits", batch_size=16)
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(build("tarflow_tweedie", data.spec), data)
    trainer.save_checkpoint(str(tmp_path / "a.ckpt"))
    for other in (None, GaussianNoise(0.3)):
        flow = build("tarflow_tweedie", data.spec, augmentation=other, denoiser=None)
        with pytest.raises(ValueError, match=r"noise_std is 0\.2, but the configuration builds 0\."):
            load_checkpoint(flow, tmp_path / "a.ckpt")


def test_only_the_likelihood_of_clean_data_is_in_bits():
    assert oblong().describe().reports_bits_per_dim
    assert not oblong(augmentation=GaussianNoise(0.1)).describe().reports_bits_per_dim
    assert build("starflow_decoder", IMAGES).describe().reports_bits_per_dim


# ---- what is refused --------------------------------------------------------------------------------------


def test_spaces_and_augmentations_must_agree():
    from flowbench.families import PixelSpace

    with pytest.raises(ValueError, match=r"the space adds noise of 0\.1, the augmentation says 0: give them the same"):
        oblong(space=PixelSpace(OBLONG.shape, 0.1))
    assert oblong(space=PixelSpace(OBLONG.shape, 0.1), augmentation=GaussianNoise(0.1)).space.noise_std == 0.1


def test_guidance_that_could_not_act_is_refused():
    with pytest.raises(ValueError, match=r"guidance of scale 2 needs labels"):
        oblong(guidance=AutoregressiveGuidance(2.0))
    with pytest.raises(ValueError, match=r"guidance scale must be a number in \[1, .*, got"):
        oblong(conditional=True, guidance=0.5)
    oblong(guidance=AutoregressiveGuidance(2.0, temperature=0.5))
