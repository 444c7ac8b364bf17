"""Velocity networks: shapes, conditioning, gradients and the parts that have an oracle."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flowbench.core.seeds import generator
from flowbench.networks import MLP, DiT, HybridDiT, UNet, VelocityNetwork
from flowbench.networks.blocks import ResidualBlock, SelfAttention, group_norm
from flowbench.networks.embedding import TimeLabelEmbedding, grid_features

NUM_CLASSES = 5
BUILDERS = {
    "mlp": lambda num_classes: MLP((2,), num_classes, width=16, depth=2),
    "dit": lambda num_classes: DiT((1, 8, 8), num_classes, width=16, depth=2, num_heads=2, patch_size=2),
    # The gates of linear attention act in sequences only: see test_hybrid_attention.py.
    "hybrid_dit": lambda num_classes: HybridDiT(
        (1, 8, 8), num_classes, width=16, depth=2, num_heads=2, patch_size=2, across="full"
    ),
    "unet": lambda num_classes: UNet(
        (1, 8, 8), num_classes, channels=8, num_res_blocks=1, attention_resolutions=(8,), num_heads=2
    ),
}
every_network = pytest.mark.parametrize("name", BUILDERS)


def build(name, num_classes=NUM_CLASSES, perturbed=True):
    """A float64 network; perturbed: no weight is zero, so that zero-initialised branches hide nothing."""
    rng = generator(0, "init", name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = BUILDERS[name](num_classes).double().eval()
    if perturbed:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return network


def inputs(network, batch=3, name="inputs"):
    rng = generator(1, name)
    x = torch.randn((batch, *network.shape), generator=rng, dtype=torch.float64)
    t = torch.rand((batch,), generator=rng, dtype=torch.float64)
    label = torch.randint(0, NUM_CLASSES, (batch,), generator=rng)
    return x, t, label


@every_network
@pytest.mark.parametrize("num_classes", [None, NUM_CLASSES])
def test_output_has_the_shape_and_dtype_of_the_input(name, num_classes):
    network = build(name, num_classes)
    x, t, label = inputs(network)
    assert isinstance(network, VelocityNetwork)
    assert network(x, t).shape == x.shape
    assert network(x, t).dtype == torch.float64
    single = network.float()(x.float(), t.float(), None if num_classes is None else label)
    assert single.dtype == torch.float32
    assert torch.isfinite(single).all()


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 4), dim=st.integers(1, 6), width=st.integers(1, 24), depth=st.integers(1, 3))
def test_mlp_shapes(batch, dim, width, depth):
    network = MLP((dim,), None, width=width, depth=depth)
    assert network(torch.zeros(batch, dim), torch.rand(batch)).shape == (batch, dim)


@settings(max_examples=20, deadline=None)
@given(
    channels=st.integers(1, 4),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch_size=st.sampled_from([1, 2, 4]),
    heads=st.sampled_from([1, 2, 4]),
)
def test_dit_shapes(channels, rows, columns, patch_size, heads):
    shape = (channels, rows * patch_size, columns * patch_size)
    network = DiT(shape, 3, width=16, depth=1, num_heads=heads, patch_size=patch_size)
    assert network(torch.zeros(2, *shape), torch.rand(2)).shape == (2, *shape)


@settings(max_examples=15, deadline=None)
@given(
    levels=st.integers(1, 3),
    rows=st.integers(1, 2),
    columns=st.integers(1, 3),
    channels=st.sampled_from([4, 6, 12]),
    num_res_blocks=st.integers(1, 2),
    attends=st.booleans(),
)
def test_unet_shapes(levels, rows, columns, channels, num_res_blocks, attends):
    factor = 2 ** (levels - 1)
    shape = (2, rows * factor, columns * factor)
    network = UNet(
        shape,
        None,
        channels=channels,
        channel_multipliers=(1, 2, 3)[:levels],
        num_res_blocks=num_res_blocks,
        attention_resolutions=(rows * factor,) if attends else (),
        num_heads=2,
    )
    assert network(torch.zeros(2, *shape), torch.rand(2)).shape == (2, *shape)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (4, 32, 32)])
@pytest.mark.parametrize("network", [DiT, UNet])
def test_default_options_fit_the_sizes_of_the_catalogue(network, shape):
    assert network(shape, 10)(torch.zeros(1, *shape), torch.rand(1)).shape == (1, *shape)


@every_network
def test_gradients_reach_every_parameter(name):
    network = build(name).train()
    x, t, label = inputs(network)
    network(x, t, label).square().sum().backward()
    unreached = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == []


@every_network
def test_velocity_starts_at_exactly_zero_and_learns_away_from_it(name):
    network = build(name, perturbed=False)
    x, t, label = inputs(network)
    assert torch.equal(network(x, t, label), torch.zeros_like(x))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = (network(x, t, label) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_mlp_without_zero_output_starts_moving():
    x = torch.ones(2, 2)
    assert MLP((2,), None, width=8, zero_output=False)(x, torch.rand(2)).any()


@every_network
def test_a_fresh_image_network_starts_with_identity_blocks(name):
    network = build(name, perturbed=False)
    rng = generator(3, "features")
    if name == "dit":
        tokens = torch.randn(2, 16, 16, generator=rng, dtype=torch.float64)
        condition = torch.randn(2, 16, generator=rng, dtype=torch.float64)
        assert torch.equal(network.blocks[0](tokens, condition), tokens)
    if name == "unet":
        features = torch.randn(2, 8, 8, 8, generator=rng, dtype=torch.float64)
        embedding = torch.randn(2, 32, generator=rng, dtype=torch.float64)
        assert torch.equal(network.encoder[0](features, embedding), features)


@every_network
def test_time_and_label_change_the_velocity(name):
    network = build(name)
    x, t, label = inputs(network)
    velocity = network(x, t, label)
    later, other = network(x, (t + 0.01).clamp(max=1), label), network(x, t, (label + 1) % NUM_CLASSES)
    for changed in (later, other, network(x, t)):
        distance = (changed - velocity).flatten(1).norm(dim=1) / velocity.flatten(1).norm(dim=1)
        assert (distance > 1e-3).all()


@every_network
def test_no_label_is_the_null_label(name):
    network = build(name)
    x, t, _ = inputs(network)
    null = torch.full((len(x),), NUM_CLASSES)
    assert torch.equal(network(x, t), network(x, t, null))


@every_network
def test_a_sample_does_not_depend_on_the_rest_of_the_batch(name):
    network = build(name)
    x, t, label = inputs(network, batch=4)
    label[1] = NUM_CLASSES
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(network(x, t, label), alone, rtol=1e-10, atol=1e-10)


@every_network
def test_a_scalar_time_holds_for_every_sample(name):
    network = build(name)
    x, _, label = inputs(network)
    time = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(network(x, time, label), network(x, time.expand(len(x)), label))


@every_network
def test_input_gradient_against_finite_differences(name):
    network = build(name).requires_grad_(False)
    x, t, label = inputs(network, batch=1)
    assert torch.autograd.gradcheck(lambda x: network(x, t, label), x.requires_grad_(), fast_mode=True)
    assert torch.autograd.gradcheck(lambda t: network(x.detach(), t, label), t.requires_grad_(), fast_mode=True)


@every_network
def test_bfloat16_weights_still_see_small_steps_of_time(name):
    network = build(name).bfloat16()
    x, _, _ = inputs(network, batch=1)
    near, far = (network(x.bfloat16(), torch.tensor([t])) for t in (0.900, 0.903))
    assert near.dtype == torch.bfloat16
    assert not torch.equal(near, far)  # 0.900 and 0.903 are the same number in bfloat16


@every_network
def test_state_dict_round_trip_and_no_saved_buffers(name):
    network, fresh = build(name), build(name, perturbed=False)
    assert set(network.state_dict()) == {key for key, _ in network.named_parameters()}
    fresh.load_state_dict(network.state_dict())
    x, t, label = inputs(network)
    assert torch.equal(fresh(x, t, label), network(x, t, label))


@pytest.mark.slow
@every_network
def test_traces_as_one_graph(name):
    network = build(name)
    x, t, label = inputs(network)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, label), network(x, t, label))


# Oracles of the parts


def test_time_features_vary_over_the_unit_interval():
    """Trap 27: with unscaled times no feature varies by half a unit between 0 and 1; here half do."""
    seen = []
    embedding = TimeLabelEmbedding(4, None)
    embedding.time[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    embedding(torch.linspace(0, 1, 1001))
    assert (seen[0].std(dim=0) > 0.5).double().mean() > 0.5
    assert seen[0].abs().max() <= 1


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), quarter=st.integers(1, 6))
def test_grid_features_by_hand(rows, columns, quarter):
    table = grid_features(rows, columns, 4 * quarter)
    for row in range(rows):
        for column in range(columns):
            expected = [
                wave(axis / 10000 ** (k / quarter))
                for axis in (row, column)
                for wave in (math.cos, math.sin)
                for k in range(quarter)
            ]
            torch.testing.assert_close(table[row * columns + column], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_against_torch(heads):
    ours, theirs = SelfAttention(16, heads), nn.MultiheadAttention(16, heads, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.output.weight,
            "out_proj.bias": ours.output.bias,
        }
    )
    x = torch.randn(3, 5, 16, generator=generator(0, "tokens"))
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patches_against_pixel_unshuffle(patch_size):
    network = DiT((3, 8, 12), None, width=8, depth=1, num_heads=1, patch_size=patch_size)
    x = torch.randn(2, 3, 8, 12, generator=generator(0, "patches"))
    expected = nn.functional.pixel_unshuffle(x, patch_size).flatten(2).transpose(1, 2)
    assert torch.equal(network.patchify(x), expected)
    assert torch.equal(network.unpatchify(expected), x)


def test_dit_without_positions_would_commute_with_a_permutation_of_patches():
    """Positions are the only thing that tells patches apart; with them the symmetry is broken."""
    network = build("dit")
    x, t, label = inputs(network, batch=1)
    rolled = x.roll(2, dims=-1)
    assert not torch.allclose(network(rolled, t, label), network(x, t, label).roll(2, dims=-1), atol=1e-3)
    network.positions.zero_()
    torch.testing.assert_close(network(rolled, t, label), network(x, t, label).roll(2, dims=-1))


@settings(max_examples=20, deadline=None)
@given(
    quarter=st.integers(1, 8),
    depth=st.integers(1, 3),
    patch_size=st.sampled_from([1, 2, 4]),
    channels=st.integers(1, 4),
    num_classes=st.none() | st.integers(1, 20),
)
def test_dit_parameter_count(quarter, depth, patch_size, channels, num_classes):
    width, patch = 4 * quarter, channels * patch_size**2
    network = DiT((channels, 8, 8), num_classes, width=width, depth=depth, num_heads=2, patch_size=patch_size)
    time = (256 + 1) * width + (width + 1) * width
    label = 0 if num_classes is None else (num_classes + 1) * width
    attention, mlp, modulation = 4 * width**2 + 4 * width, 8 * width**2 + 5 * width, 6 * width**2 + 6 * width
    ends = (patch + 1) * width + 2 * (width**2 + width) + (width + 1) * patch
    expected = time + label + depth * (attention + mlp + modulation) + ends
    assert sum(p.numel() for p in network.parameters()) == expected


@settings(max_examples=50, deadline=None)
@given(channels=st.integers(1, 512))
def test_group_norm_divides_the_channels(channels):
    groups = group_norm(channels).num_groups
    assert channels % groups == 0
    assert groups <= 32
    assert groups == 1 or channels // groups >= 4


@pytest.mark.parametrize(("resample", "size"), [("up", 8), ("down", 2), (None, 4)])
def test_fresh_residual_block_is_its_resampled_shortcut(resample, size):
    x = torch.randn(2, 8, 4, 4, generator=generator(0, "map"))
    y = ResidualBlock(8, 8, resample=resample)(x)
    oracle = {"up": nn.Upsample(scale_factor=2), "down": nn.AvgPool2d(2), None: nn.Identity()}[resample]
    assert y.shape == (2, 8, size, size)
    torch.testing.assert_close(y, oracle(x))


def test_unet_attention_at_a_level_mixes_distant_pixels():
    """Two 3 x 3 convolutions reach only near pixels; attention in the encoder reaches the far corner."""

    def reach(**options):
        network = UNet((1, 16, 16), None, channels=8, channel_multipliers=(1,), num_res_blocks=1, **options)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1)
        stage = network.encoder[0]
        # The statistics of a normalisation are global, too: leave them out.
        stage.block.norm_in = stage.block.norm_out = nn.Identity()
        x = torch.randn(1, 8, 16, 16, generator=generator(0, "map")).requires_grad_()
        stage(x, torch.zeros(1, 32))[0, 0, 0, 0].backward()
        return x.grad[0, :, -1, -1].abs().max()

    assert reach() == 0
    assert reach(attention_resolutions=(16,)) > 0


def test_dropout_acts_in_training_only():
    network = UNet((1, 8, 8), None, channels=8, dropout=0.5, num_heads=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    x, t = torch.randn(2, 1, 8, 8, generator=generator(0, "x")), torch.rand(2, generator=generator(0, "t"))
    assert not torch.equal(network(x, t), network(x, t))
    network.eval()
    assert torch.equal(network(x, t), network(x, t))


# User errors


@every_network
def test_wrong_inputs_are_named(name):
    network, unconditional = build(name), build(name, None)
    x, t, label = inputs(network)
    wrong = torch.zeros(3, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\(3, 7\).*built for \(B, "):
        network(wrong, t)
    with pytest.raises(ValueError, match="unconditional"):
        unconditional(x, t, label)
    with pytest.raises(ValueError, match=r"t has shape \(2,\).*\(3,\)"):
        network(x, t[:2])
    with pytest.raises(ValueError, match=r"dtype torch.int64"):
        network(x, torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"label has shape \(2,\)"):
        network(x, t, label[:2])
    with pytest.raises(ValueError, match=r"label has dtype torch.float"):
        network(x, t, label.float())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP((1, 8, 8), None), r"\(1, 8, 8\); MLP takes vectors"),
        (lambda: MLP((2,), 0), r"num_classes must be .*, got 0"),
        (lambda: MLP((2,), None, width=0), r"width must be .*, got 0"),
        (lambda: MLP((2,), None, depth=0), r"depth must be .*, got 0"),
        (lambda: MLP((), None), r"shape must be .*, got \(\)"),
        (lambda: DiT((2,), None), r"\(2,\); DiT takes images"),
        (lambda: DiT((1, 8, 8), None, patch_size=3), "patch_size is 3.*H = 8"),
        (lambda: DiT((1, 8, 6), None, patch_size=4), "patch_size is 4.*W = 6"),
        (lambda: DiT((1, 8, 8), None, width=30, num_heads=2), "width is 30.*multiple of 4"),
        (lambda: DiT((1, 8, 8), None, width=32, num_heads=5), "num_heads is 5.*32"),
        (lambda: DiT((1, 8, 8), None, depth=0), r"depth must be .*, got 0"),
        (lambda: UNet((2,), None), r"\(2,\); UNet takes images"),
        (lambda: UNet((1, 8, 8), None, channel_multipliers=(1, 1, 1, 1, 1)), "5 levels.*divisible by 16"),
        (lambda: UNet((1, 8, 8), None, channel_multipliers=()), "channel_multipliers"),
        (lambda: UNet((1, 8, 8), None, attention_resolutions=(16,)), r"\[16\].*\[8, 4\]"),
        (lambda: UNet((1, 8, 8), None, num_res_blocks=0), r"num_res_blocks must be .*, got 0"),
        (lambda: UNet((1, 8, 8), None, dropout=1.0), r"dropout must be .*, got 1.0"),
        (
            lambda: UNet((1, 8, 8), None, channels=6, num_heads=4, channel_multipliers=(1,)),
            "num_heads is 4.*6",
        ),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
