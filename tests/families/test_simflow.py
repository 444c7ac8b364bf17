"""An autoencoder of constant posterior deviation trained together with an autoregressive flow."""

from __future__ import annotations

import copy
import math
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from flowbench.data import Batch, FlowDataModule
from flowbench.families import (
    Autoencoder,
    BiFlow,
    Condition,
    FlowMatching,
    GaussianNoise,
    JointLatentSpace,
    LatentSpace,
    SimFlow,
    STARFlow,
)
from flowbench.families.zero_shot import _noisy
from flowbench.networks import DiT, KLAutoencoder
from flowbench.training import count_flops
from tests.closeness import assert_near, magnitude

from ..contract.builders import IMAGES, autoencoder, batch_of, build, joint_network, perturb
from ..ranks import run_ranks

STD = 0.5
SIZES = {"width": 16, "head_dim": 8, "deep_layers": 2, "shallow_blocks": 1, "shallow_layers": 1}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frozen_like(flow: SimFlow) -> STARFlow:
    """A STARFlow on the frozen latents of the same autoencoder, with the same weights."""
    model = Autoencoder(IMAGES, joint_network())
    model.network.load_state_dict(flow.autoencoder.state_dict())
    plain = STARFlow(IMAGES, autoencoder=model.eval(), **SIZES)
    plain.flow.load_state_dict(flow.flow.state_dict())
    return plain.eval()


# ---- the autoencoder --------------------------------------------------------------------------------------


def test_a_constant_posterior_has_its_deviation_and_half_the_outputs():
    network = KLAutoencoder((1, 4, 4), latent_channels=2, width=8, posterior_std=0.3)
    mean, log_variance = network.encode(batch_of(IMAGES).x)
    torch.testing.assert_close((0.5 * log_variance).exp(), torch.full_like(mean, 0.3))
    learned = KLAutoencoder((1, 4, 4), latent_channels=2, width=8)
    assert (network.encoder[-1].out_channels, learned.encoder[-1].out_channels) == (2, 4)
    assert (network.posterior_std, learned.posterior_std) == (0.3, None)
    # KL of N(mean, 0.09) from N(0, 1), by torch.
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, 0.3), normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(network.kl(mean, log_variance), expected)


# ---- the loss and the bound -------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_loss_is_the_negative_bound_with_its_reconstruction_weighted(weight):
    """From torch's normals: -log p_flow(z) + log q(z | x) - lambda log p(x | z), the middle one in expectation."""
    flow = build("simflow", IMAGES, reconstruction_weight=weight)
    batch = batch_of(IMAGES, 8)
    loss = flow.training_loss(batch, rng(3))
    mean, _ = flow.autoencoder.encode(batch.x)
    z = mean + STD * torch.randn(mean.shape, generator=rng(3))
    likelihood = torch.distributions.Normal(flow.autoencoder.decode(z), flow.autoencoder.decoder_std)
    reconstruction = -likelihood.log_prob(batch.x).flatten(1).sum(1).mean()
    entropy = torch.distributions.Normal(0.0, STD).entropy() * z[0].numel()
    rate = -flow.flow_log_prob(z, Condition(), torch.arange(8), 0).mean() - entropy
    # The networks compute in float32, whatever the sums are kept in.
    assert_near(loss.total.float(), ((rate + weight * reconstruction) / IMAGES.num_dims).float(), 32)
    assert_near(loss.metrics["rate"].float(), rate.detach().float(), 32)


def test_the_loss_is_the_mean_of_the_measured_bound():
    """Many draws of both agree: what is trained is what `log_prob` reports."""
    flow = build("simflow", IMAGES).eval()
    x = batch_of(IMAGES, 4).x.repeat(500, 1, 1, 1)
    with torch.no_grad():
        loss = flow.training_loss(Batch(x), rng(1)).total
    bound = -flow.log_prob(x, index=torch.arange(len(x)), seed=2) / IMAGES.num_dims
    spread = float(bound.std()) / math.sqrt(len(bound))
    assert float(loss) == pytest.approx(float(bound.mean()), abs=6 * spread)


def test_with_the_same_weights_it_gives_the_frozen_pipelines_numbers():
    flow = build("simflow", IMAGES).eval()
    plain = frozen_like(flow)
    batch, noise = batch_of(IMAGES), flow.draw_noise(torch.arange(3), 0)
    assert torch.equal(flow.log_prob(batch.x), plain.log_prob(batch.x))
    assert torch.equal(flow.sample(noise).x, plain.sample(noise).x)
    assert torch.equal(flow.encode(batch.x), plain.encode(batch.x))
    with torch.no_grad():
        joint, frozen = (f.training_loss(batch, rng(2)) for f in (flow, plain))
    assert torch.equal(joint.metrics["nll"], frozen.metrics["nll"])


def test_as_the_deviation_vanishes_the_draw_is_the_mean():
    network = joint_network(1e-6)
    space = JointLatentSpace(Autoencoder(IMAGES, network))
    perturb(space.autoencoder)
    batch = batch_of(IMAGES)
    torch.testing.assert_close(space.encode_batch(batch, rng()), space.encode_mean(batch.x), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("std", [0.3, 0.7])
def test_the_rate_does_not_fall_below_the_entropy_of_the_noise(std):
    """E[-log p(z)] >= h(mean(x) + s e) >= h(s e), on held-out digits after a short training."""
    data = FlowDataModule("digits", batch_size=64)
    data.setup("fit")
    torch.manual_seed(0)
    network = partial(KLAutoencoder, latent_channels=4, width=16, downsamplings=2, posterior_std=std)
    flow = SimFlow(data.spec, network, reconstruction_weight=0.1, **SIZES).train()
    optimizer = flow.optimizer_config.build(flow)
    train = data.model_values("train", slice(1024))
    for step in range(150):
        x = train[torch.randint(len(train), (64,), generator=rng(step))]
        loss = flow.training_loss(Batch(x), rng(step))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    flow.eval()
    held_out = data.model_values("test", slice(None))
    with torch.no_grad():
        rate = float(flow.training_loss(Batch(held_out), rng(99)).metrics["nll"])
    bound = 0.5 * math.log(2 * math.pi * math.e * std**2)
    assert bound - 0.01 <= rate
    assert rate < bound + 2.0, "trained at all"


# ---- what is trained --------------------------------------------------------------------------------------


def test_gradients_reach_encoder_decoder_and_flow_and_a_step_moves_them():
    flow = build("simflow", IMAGES)
    before = {name: parameter.detach().clone() for name, parameter in flow.named_parameters()}
    optimizer = flow.optimizer_config.build(flow)
    flow.training_loss(batch_of(IMAGES, 32), rng()).total.backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    optimizer.step()
    for part in ("autoencoder.encoder", "autoencoder.decoder", "autoencoder.log_sigma", "flow."):
        names = [name for name in before if name.startswith(part)]
        assert names
        assert all(not torch.equal(before[name], flow.get_parameter(name)) for name in names), part


def test_gradients_of_the_encoder_are_those_of_finite_differences():
    """Through the draw, the flow and the decoder, in float64."""
    flow = build("simflow", IMAGES).double()
    flow.space.autoencoder.double()
    batch = batch_of(IMAGES, 4)
    batch = Batch(batch.x.double())
    flow.training_loss(batch, rng()).total.backward()
    weight, h = flow.get_parameter("autoencoder.encoder.0.weight"), 1e-5
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            weight[0, 0, 1, 1] += sign * h
            values.append(float(flow.training_loss(batch, rng()).total))
            weight[0, 0, 1, 1] -= sign * h
    assert float(weight.grad[0, 0, 1, 1]) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)


def test_a_regulariser_is_trained_on_but_is_no_part_of_the_rate():
    plain, pulled = build("simflow", IMAGES), build("simflow", IMAGES, latent_norm=0.5)
    found = [flow.training_loss(batch_of(IMAGES), rng()) for flow in (plain, pulled)]
    torch.testing.assert_close(found[1].metrics["rate"], found[0].metrics["rate"])
    assert found[1].total > found[0].total + 0.01


def test_known_latents_of_inpainting_have_the_spread_of_training():
    """The flow never saw means: latents are mean + s e, whatever noise the space adds besides."""
    space = build("simflow", IMAGES).space
    z = space.encode(x := batch_of(IMAGES, 64).x, rng()) - space.encode_mean(x)
    assert space.spread == STD
    assert float(z.std()) == pytest.approx(STD, rel=0.1)
    module = build("simflow", IMAGES).eval()
    mean = module.space.encode_mean(x)
    noise = (_noisy(module, mean, torch.arange(64), 0) - mean).detach()
    assert float(noise.std()) == pytest.approx(STD, rel=0.1)
    frozen = LatentSpace(Autoencoder(IMAGES, joint_network()).eval(), noise_std=0.3)
    assert frozen.spread == pytest.approx(math.hypot(STD / float(frozen.autoencoder.latent_std), 0.3))
    assert LatentSpace(autoencoder(), noise_std=0.3).spread == 0.3


def test_a_learned_inverse_takes_its_mean_squares_of_draws():
    """Under a teacher of latents about zero, means of latents have another mean square than what it is trained on."""
    data = FlowDataModule("digits", train_size=64)
    torch.manual_seed(0)
    teacher = SimFlow(data.spec, partial(KLAutoencoder, latent_channels=2, width=8, posterior_std=5.0), **SIZES).eval()
    student = BiFlow(data.spec, teacher=teacher, depth=1, width=16, head_dim=8, alignment="none")
    student.fit_to(data, training=True)
    drawn = student.fit_points(data, drawn=True)
    torch.testing.assert_close(student.mean_squares, drawn.square().mean().view(1))
    assert float(student.mean_squares) > 2 * float(student.fit_points(data).square().mean())


def test_operations_of_the_autoencoder_are_counted_both_ways():
    """A joint step costs what the flow's step and the autoencoder's own cost, and the gradient by the latents."""
    flow = build("simflow", IMAGES)
    plain, model = frozen_like(flow), Autoencoder(IMAGES, joint_network())
    alone = count_flops(plain.loss_of_one) + count_flops(model.loss_of_one)
    counted = flow.count().training_flops
    assert counted == count_flops(lambda: flow.training_loss(Batch(torch.zeros(1, 1, 4, 4)), rng()).total)
    assert alone <= counted < 1.02 * alone
    assert flow.count().parameters == sum(p.numel() for p in (*plain.parameters(), *model.network.parameters()))


def gradients(flow: SimFlow) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in flow.named_parameters()}


class Step(torch.nn.Module):
    """The loss as the forward of a module, as Lightning's strategies call it."""

    def __init__(self, flow: SimFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: torch.Tensor, seed: int) -> torch.Tensor:
        return self.flow.training_loss(Batch(x), rng(seed)).total


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    flow = build("simflow", IMAGES)
    x = batch_of(IMAGES, 16).x[8 * rank : 8 * rank + 8]
    parallel = DistributedDataParallel(Step(flow))  # kept: its hooks reduce the gradients during the backward pass
    parallel(x, rank).backward()
    torch.save(gradients(flow), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_gradients_of_encoder_decoder_and_flow(tmp_path):
    run_ranks(one_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    flow = build("simflow", IMAGES)
    x = batch_of(IMAGES, 16).x
    (sum(Step(flow)(x[8 * rank : 8 * rank + 8], rank) for rank in range(2)) / 2).backward()
    largest = magnitude(gradients(flow).values())
    for name, expected in gradients(flow).items():
        assert torch.equal(first[name], second[name]), name
        assert_near(first[name], expected, scale=1e-3 * largest, label=name)


# ---- checkpoints, averages, copies ------------------------------------------------------------------------


def test_a_checkpoint_holds_the_autoencoder_and_its_average():
    flow, other = build("simflow", IMAGES).eval(), build("simflow", IMAGES, seed=4).eval()
    flow.ema.update()
    x, noise = batch_of(IMAGES).x, flow.draw_noise(torch.arange(2), 0)
    checkpoint = {"state_dict": flow.state_dict()}
    flow.on_save_checkpoint(checkpoint)
    assert any(name.startswith("autoencoder.decoder") for name in checkpoint["state_dict"])
    assert any(name.startswith("autoencoder.encoder") for name in checkpoint["ema"]["shadow"])
    assert not torch.equal(flow.log_prob(x), other.log_prob(x))
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(flow.log_prob(x), other.log_prob(x))
    assert torch.equal(flow.sample(noise).x, other.sample(noise).x)
    for module in (flow, other):
        with torch.no_grad():
            module.autoencoder.log_sigma.add_(1.0)  # live weights only
    with flow.evaluating("ema"), other.evaluating("ema"):
        assert torch.equal(flow.log_prob(x), other.log_prob(x))


def test_the_identity_does_not_change_by_training_but_the_checksum_does():
    flow = build("simflow", IMAGES)
    identity, checksum = flow.checkpoint_identity, flow.space.checksum
    with torch.no_grad():
        flow.autoencoder.log_sigma.add_(1.0)
    assert flow.checkpoint_identity == identity
    assert identity["autoencoder"] == "joint(0.5)"
    assert flow.space.checksum != checksum
    other = {"state_dict": {}, "flowbench": {**identity, "autoencoder": "joint(0.3)"}}
    with pytest.raises(ValueError, match=r"the checkpoint's autoencoder is joint\(0.3\), but"):
        flow.on_load_checkpoint(other)


def test_a_copy_has_an_autoencoder_of_its_own():
    flow = build("simflow", IMAGES)
    other = copy.deepcopy(flow)
    assert other.space.trained is other.autoencoder
    assert other.autoencoder is not flow.autoencoder


# ---- misuse -----------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_together_is_refused_in_one_line():
    with pytest.raises(
        ValueError, match="needs a constant posterior_std, this one learns it and could let the latents"
    ):
        SimFlow(IMAGES, joint_network(None), **SIZES)
    with pytest.raises(ValueError, match=r"SimFlow adds no noise to latents .*, got augmentation GaussianNoise\(0.3\)"):
        build("simflow", IMAGES, augmentation=GaussianNoise(0.3))
    with pytest.raises(ValueError, match="has a space of its own here and takes no autoencoder: leave it out"):
        build("simflow", IMAGES, autoencoder=autoencoder())
    with pytest.raises(ValueError, match="has a space of its own here and takes no cache_latents: leave it out"):
        build("simflow", IMAGES, cache_latents=True)
    space = JointLatentSpace(Autoencoder(IMAGES, joint_network()))
    network = partial(DiT, width=16, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"FlowMatching regresses, its loss is no -log p\(z\)"):
        FlowMatching(IMAGES, network, space=space)
    assert isinstance(FlowMatching(IMAGES, network, space=LatentSpace(space.autoencoder)).space, LatentSpace)


def test_sharded_weights_are_refused(monkeypatch):
    monkeypatch.setattr("flowbench.families.base.shards_weights", lambda strategy: True)
    monkeypatch.setattr("flowbench.training.module.shards_weights", lambda strategy: False)
    flow, trainer = build("simflow", IMAGES), SimpleNamespace(strategy=object(), precision="32-true")
    with pytest.raises(ValueError, match="cannot be trained with its flow under object, which shards weights"):
        flow.check_training(FlowDataModule("digits", batch_size=8), trainer)
