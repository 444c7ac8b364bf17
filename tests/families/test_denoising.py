"""Denoising by the flow's score, by a network that learned it, and by the decoder."""

from __future__ import annotations

import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.utils.flop_counter import FlopCounterMode

from flowbench.data import Batch, DataSpec
from flowbench.families import Condition, DecoderDenoiser, FlowScoreDenoiser, GaussianNoise, STARFlow, TARFlow, Tweedie
from flowbench.families.noise.score_gradient import check_shared_backward, score, with_input_gradient
from flowbench.training import OptimizerConfig, count_flops

from ..closeness import assert_near, magnitude
from ..contract.builders import IMAGES, POINTS, autoencoder, batch_of, build

NOISE = 0.4


def points(num: int, spec=POINTS, seed: int = 1) -> torch.Tensor:
    return torch.randn(num, *spec.shape, generator=torch.Generator().manual_seed(seed))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_flow(mean: float, std: float, spec: DataSpec = POINTS, **options) -> TARFlow:
    """A flow that is exactly N(mean, std^2): the first block's output biases are the mean and the logarithm of std."""
    torch.manual_seed(0)
    sizes = {"layers": [1, 1], "width": 16, "head_dim": 8, "start": "learned"}
    flow = TARFlow(spec, **sizes, augmentation=GaussianNoise(NOISE), **options)
    with torch.no_grad():
        bias = flow.get_parameter("flow.blocks.0.network.out.bias")
        half = len(bias) // 2
        bias[:half], bias[half:] = mean, math.log(std)
    return flow


# ---- Tweedie ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_tweedie_on_gaussian_data_is_wieners_filter(strength):
    """Data N(m, s^2) with noise n^2: E[clean | noisy] = m + s^2 / (s^2 + n^2) (noisy - m)."""
    mean, std = 1.5, 0.8
    flow = gaussian_flow(mean, math.hypot(std, NOISE), denoiser=Tweedie(strength=strength))
    noise = points(50)
    noisy = mean + math.hypot(std, NOISE) * noise
    posterior = mean + std**2 / (std**2 + NOISE**2) * (noisy - mean)
    torch.testing.assert_close(flow.sample(noise).x, noisy + strength * (posterior - noisy))
    torch.testing.assert_close(flow.flow_decode(noise, Condition()).x, noisy)
    assert flow.describe().sampler == ("sequential+tweedie" if strength == 1 else "sequential+tweedie(0.7)")


@pytest.mark.parametrize("spec", [POINTS, IMAGES], ids=lambda spec: spec.name)
@pytest.mark.parametrize("conditional", [False, True])
def test_the_step_is_along_the_gradient_of_the_log_density(spec, conditional):
    """Central differences; under the sample's own label, of guided samples too."""
    noisy_options = {"augmentation": GaussianNoise(0.2), "denoiser": Tweedie()}
    flow = build("tarflow", spec, conditional=conditional, **noisy_options).double()
    noise, label = points(4, spec).double(), torch.tensor([0, 2, 1, 0]) if conditional else None
    guided = {"guidance": 2.0} if conditional else {}
    noisy = flow.flow_decode(noise, Condition(label), **guided).x
    clean = flow.sample(noise, label, **guided).x
    h = 1e-5
    for axis in range(noisy[0].numel()):
        shift = torch.zeros_like(noisy).flatten(1)
        shift[:, axis] = h
        shift = shift.view_as(noisy)
        slope = (flow.log_prob(noisy + shift, label) - flow.log_prob(noisy - shift, label)) / (2 * h)
        torch.testing.assert_close((clean - noisy).flatten(1)[:, axis], 0.04 * slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_step_does_not_depend_on_the_batch_or_its_parts(batch_size):
    noisy = {"conditional": True, "augmentation": GaussianNoise(0.2)}
    flow = build("tarflow", IMAGES, **noisy, denoiser=Tweedie(batch_size=batch_size))
    whole = build("tarflow", IMAGES, **noisy, denoiser=Tweedie())
    noise, label = points(7, IMAGES), torch.arange(7) % 3
    drawn = flow.sample(noise, label).x
    torch.testing.assert_close(drawn, whole.sample(noise, label).x)
    torch.testing.assert_close(drawn[2:3], whole.sample(noise[2:3], label[2:3]).x)
    assert flow.flow_denoise(noise[:0], Condition(label[:0])).shape == (0, *IMAGES.shape)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_score_works_where_autograd_is_off_and_leaves_nothing_behind(mode):
    flow = build("tarflow_tweedie", POINTS)
    with mode():
        drawn = flow.sample(points(3)).x
    assert not drawn.requires_grad
    assert all(parameter.grad is None for parameter in flow.parameters())


def test_tweedie_costs_two_forward_passes():
    """Counted operations of matrix products: one pass forward, and as many for the gradient by the input."""
    spec = DataSpec("wide", "1", (1, 8, 8))
    flow = TARFlow(spec, layers=[2, 2], width=64, patch_size=2, augmentation=GaussianNoise(0.1), denoiser=Tweedie())
    noise = points(4, spec)
    with FlopCounterMode(display=False) as forward:
        flow.flow_encode(noise, Condition())
    with FlopCounterMode(display=False) as denoising:
        flow.flow_denoise(noise, Condition())
    assert all(parameter.requires_grad for parameter in flow.parameters())
    # The backward of attention computes its scores again, a small part of the whole.
    assert denoising.get_total_flops() / forward.get_total_flops() == pytest.approx(2.0, abs=0.1)
    assert flow.sample(noise).network_evaluations == pytest.approx(3.0)


def test_operations_of_the_shared_backward_are_counted_once():
    """What a budget counts: score matching adds its own network, not another pass through the flow."""
    with_denoiser, plain = losses("tarflow", IMAGES)
    with_denoiser.latent_norm = plain.latent_norm = 0.0
    x = points(8, IMAGES)
    counts = [
        count_flops(lambda f=flow: f.loss(x, Condition(), Batch(x), rng()).total) for flow in (with_denoiser, plain)
    ]
    tokens = plain._tokens(x)
    own = count_flops(lambda: with_denoiser.denoiser.matching_loss(tokens, None, torch.zeros_like(tokens)))
    # Beside the input gradient of the first linear layer of the first block.
    assert counts[0] - counts[1] - own < 0.05 * counts[1]


# ---- the shared backward ----------------------------------------------------------------------------------


def losses(name: str, spec: DataSpec, **options):
    """A flow with and one without a score-matching denoiser, with equal weights."""
    with_denoiser = build(f"{name}_score_matching", spec, **options)
    plain = build(name, spec, augmentation=with_denoiser.augmentation, latent_norm=with_denoiser.latent_norm, **options)
    plain.flow.load_state_dict(with_denoiser.flow.state_dict())
    return with_denoiser, plain


@pytest.mark.parametrize(("name", "spec"), [("tarflow", IMAGES), ("tarflow", POINTS), ("starflow", IMAGES)])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_gradients_of_the_flow_are_those_of_a_plain_backward(name, spec, scale):
    """With the latent regulariser, under any scaling of the loss; the denoiser's gradient is its own alone."""
    module, plain = losses(name, spec, conditional=True)
    batch = batch_of(spec, 16)
    (scale * module.training_loss(batch, rng()).total).backward()
    (scale * plain.training_loss(batch, rng()).total).backward()
    # The bias of an attention's keys has no gradient but rounding.
    least = 0.01 * magnitude(theirs.grad for theirs in plain.flow.parameters())
    for (key, mine), theirs in zip(module.flow.named_parameters(), plain.flow.parameters(), strict=True):
        assert_near(mine.grad, theirs.grad, scale=least, label=key)
    x = module.space.encode(batch.x, rng())
    generator = rng()
    module.space.encode(batch.x, generator)
    label = module.drop_labels(batch.label, generator)
    tokens = module._tokens(x)
    expected = module.denoiser.matching_loss(tokens, label, score(plain._log_density, tokens, label))
    wanted = torch.autograd.grad(scale * expected, list(module.denoiser.parameters()))
    least = 0.01 * magnitude(wanted)
    for (key, parameter), gradient in zip(module.denoiser.named_parameters(), wanted, strict=True):
        assert_near(parameter.grad, gradient, ulps=1024, scale=least, label=key)


def test_the_target_does_not_depend_on_batch_accumulation_or_scaling():
    """Every point has its own: two halves give what the whole gives."""
    module, _ = losses("tarflow", IMAGES)
    seen = []
    inner = module.denoiser.matching_loss
    module.denoiser.matching_loss = lambda x, label, target: seen.append(target) or inner(x, label, target)
    x = points(8, IMAGES)
    for part in (x, x[:4], x[4:]):
        module.loss(part, Condition(), Batch(part), rng()).total.mul(7.0).backward()
    whole, *halves = seen
    torch.testing.assert_close(torch.cat(halves), whole)
    torch.testing.assert_close(whole, score(module._log_density, module._tokens(x), None))


def test_accumulated_gradients_equal_those_of_one_batch():
    module, _ = losses("tarflow", IMAGES)
    x = points(8, IMAGES)
    module.loss(x, Condition(), Batch(x), rng()).total.backward()
    whole = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    for half in x.split(4):
        (module.loss(half, Condition(), Batch(half), rng()).total / 2).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], msg=name)


def test_validation_has_the_same_loss_without_a_backward():
    module, _ = losses("tarflow", IMAGES)
    x = points(8, IMAGES)
    trained = module.loss(x, Condition(), Batch(x), rng())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            held_out = module.loss(x.clone(), Condition(), Batch(x.clone()), rng())
        assert not held_out.total.requires_grad
        for name, value in trained.metrics.items():
            torch.testing.assert_close(held_out.metrics[name], value, msg=name)


def test_a_parameter_that_the_loss_leaves_out_gets_no_gradient():
    used, unused = torch.nn.Parameter(torch.tensor(2.0)), torch.nn.Parameter(torch.tensor(3.0))
    x = torch.tensor([1.0, 4.0], requires_grad=True)
    loss, gradient = with_input_gradient((used * x.square()).sum(), x, [used, unused])
    assert float(loss.detach()) == 34.0
    assert gradient.tolist() == [4.0, 16.0]
    (0.5 * loss).backward()
    assert float(used.grad) == 8.5
    assert unused.grad is None
    with pytest.raises(RuntimeError, match=r"go backward once|second time"):
        loss.backward()


def test_trainings_without_whole_gradients_are_refused_in_one_line():
    class Sharded:
        pass

    fine = SingleDeviceStrategy(torch.device("cpu")), DDPStrategy()
    for strategy in fine:
        check_shared_backward(SimpleNamespace(strategy=strategy, precision="bf16-mixed"))
    with pytest.raises(ValueError, match="needs whole gradients, which Sharded shards: use one device or") as caught:
        check_shared_backward(SimpleNamespace(strategy=Sharded(), precision="32-true"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"cannot be trained with trainer\.precision=16-mixed"):
        check_shared_backward(SimpleNamespace(strategy=fine[0], precision="16-mixed"))


def quiet_trainer(**options) -> L.Trainer:
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return L.Trainer(accelerator="cpu", **dict.fromkeys(off, False), **options)


@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")
@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
def test_the_trainer_moves_flow_and_denoiser(options):
    module = build("tarflow_score_matching", IMAGES, conditional=True, checkpoint_every=1)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    loader = torch.utils.data.DataLoader([batch_of(IMAGES, 32, seed=s) for s in range(4)], batch_size=None)
    quiet_trainer(max_steps=2, **options).fit(module, loader)
    for name, parameter in module.named_parameters():
        assert parameter.isfinite().all()
        assert not torch.equal(before[name], parameter), name


@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")
def test_clipping_keeps_the_denoisers_gradient_out_of_the_flows():
    module = build("tarflow_score_matching", IMAGES)
    norms = {}

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            for name in ("flow", "denoiser"):
                gradients = [p.grad.norm() for p in getattr(module, name).parameters()]
                norms[name] = float(torch.stack(gradients).norm())

    loader = torch.utils.data.DataLoader([batch_of(IMAGES, 32)], batch_size=None)
    quiet_trainer(max_steps=1, gradient_clip_val=1e-3, callbacks=[Watch()]).fit(module, loader)
    # Each has the norm it is clipped to; Lightning calls the hook before it clips, so clip once more by hand.
    module.configure_gradient_clipping(None, 1e-3, "norm")
    assert norms["flow"] > 1e-3
    for part in (module.flow, module.denoiser):
        clipped = torch.stack([p.grad.norm() for p in part.parameters()]).norm()
        # torch divides by the norm plus 1e-6.
        assert float(clipped) == pytest.approx(1e-3, rel=1e-2)


# ---- flow-score matching ----------------------------------------------------------------------------------


def test_an_untrained_denoiser_leaves_samples_alone():
    flow = gaussian_flow(0.3, 0.9, denoiser=FlowScoreDenoiser(width=16, depth=1, head_dim=8))
    noise = points(5)
    torch.testing.assert_close(flow.sample(noise).x, flow.flow_decode(noise, Condition()).x)


@pytest.mark.slow
def test_at_the_optimum_the_network_is_the_score_and_the_step_is_tweedies():
    """A fixed flow N(m, S^2) has noise * grad(-log p) = noise (x - m) / S^2; the trained step is Tweedie's."""
    mean, std = 0.5, 0.9
    torch.manual_seed(0)
    denoiser = FlowScoreDenoiser(width=32, depth=2, head_dim=16)
    flow = gaussian_flow(mean, std, denoiser=denoiser)
    exact = gaussian_flow(mean, std, denoiser=Tweedie())
    flow.flow.requires_grad_(False)
    optimizer = OptimizerConfig(lr=3e-3, weight_decay=0.0).build(flow)
    generator = rng()
    first = None
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 300)
        x = mean + std * torch.randn(256, 2, generator=generator)
        loss = flow.loss(x, Condition(), Batch(x), generator)
        first = loss.metrics["score_matching"] if first is None else first
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert float(first) == pytest.approx(NOISE**2 / std**2, rel=0.2), "zero output: the target's own mean square"
    noise = points(500)
    x = mean + std * noise
    with torch.no_grad():
        learned = denoiser.network(x[..., None])[..., 0]
    target = NOISE * (x - mean) / std**2
    error = (learned - target).square().mean() / target.square().mean()
    assert float(error) < 0.01
    torch.testing.assert_close(flow.sample(noise).x, exact.sample(noise).x, atol=0.1, rtol=0.0)
    drift = (flow.sample(noise).x - exact.sample(noise).x).square().mean().sqrt()
    assert float(drift) < 0.02


def test_the_learned_denoiser_counts_by_its_parameters():
    flow = build("tarflow_score_matching", IMAGES)
    share = sum(p.numel() for p in flow.denoiser.parameters()) / sum(p.numel() for p in flow.flow.parameters())
    drawn = flow.sample(points(2, IMAGES))
    assert drawn.network_evaluations == pytest.approx(1 + share)
    assert flow.describe().sampler == "sequential+flow-score-matching"


def test_the_learned_denoiser_is_averaged_and_saved():
    flow = build("tarflow_score_matching", IMAGES)
    assert any(name.startswith("denoiser.network") for name in flow.state_dict())
    flow.ema.update()
    noise = points(2, IMAGES)
    with flow.evaluating("ema"):
        averaged = flow.sample(noise).x
    with torch.no_grad():
        for parameter in flow.denoiser.parameters():
            parameter.add_(1.0)  # live weights only
    assert not torch.allclose(flow.sample(noise).x, averaged)
    with flow.evaluating("ema"):
        assert torch.equal(flow.sample(noise).x, averaged)


def test_labels_reach_the_learned_denoiser():
    flow = build("tarflow_score_matching", IMAGES, conditional=True)
    x, null = flow._tokens(points(3, IMAGES)), torch.full((3,), IMAGES.num_classes)
    with torch.no_grad():
        none, explicit, labelled = (flow.denoiser.network(x, given) for given in (None, null, torch.zeros_like(null)))
    torch.testing.assert_close(none, explicit)
    assert not torch.allclose(labelled, none)


# ---- misuse and the decoder -------------------------------------------------------------------------------


def test_denoisers_without_noise_are_refused():
    for denoiser in (Tweedie(), FlowScoreDenoiser(), DecoderDenoiser()):
        message = f"denoiser {type(denoiser).__name__} has no noise to remove: set augmentation to GaussianNoise"
        with pytest.raises(ValueError, match=message):
            build("tarflow", IMAGES, denoiser=denoiser)


def test_a_denoiser_belongs_to_one_flow():
    denoiser = Tweedie()
    build("tarflow", POINTS, augmentation=GaussianNoise(0.1), denoiser=denoiser)
    with pytest.raises(ValueError, match="this Tweedie belongs to another flow already: make one for each"):
        build("tarflow", POINTS, augmentation=GaussianNoise(0.2), denoiser=denoiser)


def test_values_out_of_range():
    with pytest.raises(ValueError, match=r"Tweedie strength must be a number in .*, got"):
        Tweedie(strength=0.0)
    with pytest.raises(ValueError, match=r"Tweedie batch_size must be a whole number in .*, got 0"):
        Tweedie(batch_size=0)
    for std in (0.0, -0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"GaussianNoise std must be a number in .*, got"):
            GaussianNoise(std)


def test_the_decoder_denoises_latents_at_its_own_noise_level():
    flow = build("starflow_decoder", IMAGES)
    plain = build("starflow", IMAGES, augmentation=GaussianNoise(0.3))
    noise = flow.draw_noise(torch.arange(3), 0)
    assert torch.equal(flow.sample(noise).x, plain.sample(noise).x)
    assert flow.describe().sampler == "sequential+decoder"
    assert flow.describe().likelihood_method == "noise(0.3)+decoder"
    assert flow.sample(noise).network_evaluations == 1
    sizes = {"width": 16, "head_dim": 8}
    with pytest.raises(ValueError, match=r"needs a decoder trained on latents with noise 0.3, this one knows 0:"):
        STARFlow(
            IMAGES, autoencoder=autoencoder(), augmentation=GaussianNoise(0.3), denoiser=DecoderDenoiser(), **sizes
        )
    with pytest.raises(ValueError, match="DecoderDenoiser needs an autoencoder, this flow lives in data space"):
        build("tarflow", IMAGES, augmentation=GaussianNoise(0.3), denoiser=DecoderDenoiser())


def test_training_points_are_noisy_and_likelihoods_are_not():
    x = points(64, IMAGES)
    noisy, plain = (build("tarflow", IMAGES, **options) for options in ({"augmentation": GaussianNoise(0.5)}, {}))
    for flow in (noisy, plain):
        torch.nn.utils.vector_to_parameters(
            torch.zeros(sum(p.numel() for p in flow.flow.parameters())), flow.flow.parameters()
        )
    drawn = [f.training_loss(Batch(x), rng(3)).total.detach() for f in (noisy, plain)]
    # Of the identity, the loss grows by half the noise's variance.
    assert float(drawn[0] - drawn[1]) == pytest.approx(0.5 * 0.25, abs=0.05)
    assert noisy.training_loss(Batch(x), rng(3)).total.detach() == drawn[0]
    assert torch.equal(noisy.log_prob(x), plain.log_prob(x))
    assert noisy.describe().likelihood_method == "density-of-noisy-data(0.5)"
    assert plain.describe().likelihood_method == ""
