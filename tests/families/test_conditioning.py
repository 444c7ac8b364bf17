"""Conditions of inpainting and of semantic maps: geometry, keys, grids, and whether a flow learns to use them."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from flowbench.data import Batch, DataSpec
from flowbench.families import (
    Condition,
    FlowMatching,
    InpaintingConditioner,
    LatentCFM,
    PixelSpace,
    Reflow,
    SemanticConditioner,
    SpatialCondition,
)
from flowbench.families.conditioning.base import check_condition_channels, guided_network
from flowbench.families.conditioning.inpainting import draw_masks
from flowbench.families.conditioning.semantic import derived_map
from flowbench.families.latents.space import LatentSpace
from flowbench.flows import ClassifierFreeGuidance, Midpoint, RungeKutta4
from flowbench.networks import MLP, DiT
from flowbench.training import EMAConfig, OptimizerConfig, TrainingConfig

from ..contract.builders import IMAGES, POINTS, autoencoder, batch_of, perturb

PIXELS = PixelSpace(IMAGES.shape)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(num: int, *sides: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(num, *sides, generator=rng(seed))


# ---- masks --------------------------------------------------------------------------------------------


def test_half_masks_are_the_four_halves_equally_often():
    masks = draw_masks("half", uniform(4000, 4, 6), (4, 6))
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    halves = [columns < 3, columns >= 3, rows < 2, rows >= 2]
    counts = [int((masks == half).flatten(1).all(1).sum()) for half in halves]
    assert sum(counts) == 4000
    assert min(counts) > 900  # 1000 +- 27
    points = draw_masks("half", uniform(50, 4), (4,))
    assert {tuple(mask.tolist()) for mask in points} == {(True, True, False, False), (False, False, True, True)}


def test_square_masks_are_half_of_both_sides_and_reach_every_place():
    masks = draw_masks("square", uniform(3000, 6, 8), (6, 8))
    rows, columns = masks.any(2), masks.any(1)
    assert torch.equal(masks, rows[:, :, None] & columns[:, None, :])
    assert set(rows.sum(1).tolist()) == {3}
    assert set(columns.sum(1).tolist()) == {4}
    # Contiguous: one edge going in, at the first hidden row.
    assert set(rows.int().argmax(1).tolist()) == {0, 1, 2, 3}
    assert set(columns.int().argmax(1).tolist()) == {0, 1, 2, 3, 4}
    assert all(mask.nonzero().flatten().diff().eq(1).all() for mask in rows[:20])


def test_random_masks_hide_exactly_their_share_evenly():
    masks = draw_masks("random-0.25", uniform(4000, 4, 4), (4, 4))
    assert set(masks.flatten(1).sum(1).tolist()) == {4}
    assert (masks.float().mean(0) - 0.25).abs().max() < 0.03  # four standard errors
    assert bool(draw_masks("random-0.01", uniform(2, 4, 4), (4, 4)).flatten(1).any(1).all())


def test_fixed_masks_are_those_of_zero_shot_inpainting():
    masks = draw_masks("left", uniform(3, 4, 4), (4, 4))
    assert masks.shape == (3, 4, 4)
    assert bool(masks[..., :2].all())
    assert not masks[..., 2:].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "circle"}, "unknown mask 'circle': choose half"),
        ({"mask": "random-2"}, r"share in \(0, 1\]"),
        ({"mask": "random-x"}, r"share in \(0, 1\]"),
        ({"dropout": 1.0}, "conditioner.dropout"),
    ],
)
def test_inpainting_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        InpaintingConditioner(**options)


def test_points_have_no_square():
    with pytest.raises(ValueError, match="the data are points"):
        InpaintingConditioner("square").training_condition(batch_of(POINTS), PixelSpace((2,)), rng())


# ---- inpainting ---------------------------------------------------------------------------------------


def test_in_data_space_the_condition_is_the_masked_image_and_the_mask():
    x = batch_of(IMAGES).x
    unknown = draw_masks("half", uniform(len(x), 4, 4), (4, 4))
    condition = InpaintingConditioner("half").masked(x, unknown, PIXELS)
    assert condition.values.shape == (len(x), 2, 4, 4)
    assert torch.equal(condition.values[:, 1], unknown.float())
    assert torch.equal(condition.values[:, 0], x[:, 0] * ~unknown)


def test_in_latent_space_it_is_the_posterior_mean_and_the_share_of_unknown_pixels():
    space = LatentSpace(autoencoder())
    x = batch_of(IMAGES).x
    unknown = torch.zeros(len(x), 4, 4, dtype=torch.bool)
    unknown[:, 0, 0] = unknown[:, 2:, 2:] = True
    condition = InpaintingConditioner().masked(x, unknown, space)
    channels, rows, columns = space.shape
    assert InpaintingConditioner().channels(space) == channels + 1
    assert condition.values.shape == (len(x), channels + 1, rows, columns)
    torch.testing.assert_close(condition.values[:, :-1], space.encode_mean(x.masked_fill(unknown[:, None], 0.0)))
    cells = unknown.float().view(len(x), rows, 4 // rows, columns, 4 // columns).mean((2, 4))
    torch.testing.assert_close(condition.values[:, -1], cells)


@pytest.mark.parametrize("space", [PIXELS, LatentSpace(autoencoder())], ids=["pixels", "latents"])
@pytest.mark.parametrize("mask", ["half", "square", "random-0.5"])
def test_the_condition_knows_nothing_of_unknown_pixels(space, mask):
    x, index = batch_of(IMAGES).x, torch.arange(6)
    conditioner = InpaintingConditioner(mask)
    first = conditioner.evaluation_condition(x, index, 3, space)
    other = torch.where(first.unknown[:, None], torch.full_like(x, 0.77), x)
    assert torch.equal(first.values, conditioner.evaluation_condition(other, index, 3, space).values)


@pytest.mark.parametrize("mask", ["half", "square", "random-0.5"])
def test_evaluation_masks_are_keyed_by_index_and_seed(mask):
    x = batch_of(IMAGES, 40).x
    conditioner, index = InpaintingConditioner(mask), torch.arange(40)
    whole = conditioner.evaluation_condition(x, index, 5, PIXELS)
    backward = [
        conditioner.evaluation_condition(x[part], index[part], 5, PIXELS).unknown for part in index.flip(0).split(7)
    ]
    assert torch.equal(torch.cat(backward).flip(0), whole.unknown)
    assert not torch.equal(conditioner.evaluation_condition(x, index, 6, PIXELS).unknown, whole.unknown)
    assert len(whole.unknown.flatten(1).unique(dim=0)) > 2


def test_training_masks_come_from_the_generator_alone():
    batch, conditioner = batch_of(IMAGES), InpaintingConditioner("random-0.5")
    first, again = (conditioner.training_condition(batch, PIXELS, rng(1)).values for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, conditioner.training_condition(batch, PIXELS, rng(2)).values)


def test_points_get_their_known_coordinates_and_the_mask():
    batch, space = batch_of(POINTS), PixelSpace((2,))
    conditioner = InpaintingConditioner("right")
    values = conditioner.training_condition(batch, space, rng()).values
    assert conditioner.channels(space) == 4
    torch.testing.assert_close(values[:, 0], batch.x[:, 0])
    assert values[:, 1:].tolist() == [[0.0, 0.0, 1.0]] * len(batch)


def test_pasting_puts_known_pixels_back_and_leaves_the_others():
    x, drawn = batch_of(IMAGES).x, torch.full((6, 1, 4, 4), 0.3)
    condition = InpaintingConditioner().evaluation_condition(x, torch.arange(6), 0, PIXELS)
    finished = InpaintingConditioner().finish(drawn, condition)
    hidden = condition.unknown[:, None]
    assert torch.equal(finished[hidden], drawn[hidden])
    assert torch.equal(finished[~hidden], x[~hidden])
    plain = InpaintingConditioner(paste=False)
    assert torch.equal(plain.finish(drawn, condition), drawn)
    assert (InpaintingConditioner().sampler_name, plain.sampler_name) == (
        "inpainting[square,pasted]",
        "inpainting[square]",
    )


def test_psnr_of_known_and_unknown_pixels_by_hand():
    x = torch.zeros(1, 1, 4, 4)
    unknown = torch.zeros(1, 4, 4, dtype=torch.bool)
    unknown[:, :, :2] = True
    drawn = torch.where(unknown[:, None], 0.2, 0.02)
    scores = InpaintingConditioner().scores(drawn, InpaintingConditioner().masked(x, unknown, PIXELS))
    # 10 log10(4 / 0.04) = 20 dB and 10 log10(4 / 0.0004) = 40 dB.
    assert {name: round(float(value), 4) for name, (value, _) in scores.items()} == {
        "inpainting_psnr": 20.0,
        "known_psnr": 40.0,
    }


# ---- semantic maps ------------------------------------------------------------------------------------


def test_derived_maps_are_levels_of_the_blurred_image():
    x = torch.full((1, 3, 6, 6), -1.0)
    x[..., 3:] = 0.9
    levels = derived_map(x, 4, 3)[0]
    # Columns 2 and 3 average two of one side and one of the other: -0.367 and 0.267.
    assert levels.tolist() == [[0, 0, 1, 2, 3, 3]] * 6
    assert derived_map(x, 4, 1)[0].tolist() == [[0, 0, 0, 3, 3, 3]] * 6
    assert set(derived_map(torch.tensor([-3.0, 3.0]).view(2, 1, 1, 1), 5, 1).flatten().tolist()) == {0, 4}


def test_semantic_channels_are_shares_of_the_categories_in_each_cell():
    space = LatentSpace(autoencoder())
    maps = torch.tensor([[0, 0, 1, 2], [0, 1, 1, 2], [2, 2, 0, 0], [2, 2, 0, 0]])[None]
    values = SemanticConditioner(3, maps="given").of_map(maps, space).values
    assert values.shape == (1, 3, *space.shape[1:])
    assert values[0, :, 0, 0].tolist() == [0.75, 0.25, 0.0]
    assert values[0, :, 0, 1].tolist() == [0.0, 0.5, 0.5]
    torch.testing.assert_close(values.sum(1), torch.ones(1, *space.shape[1:]))
    exact = SemanticConditioner(3, maps="given").of_map(maps, PIXELS).values
    assert torch.equal(exact.argmax(1), maps)


def test_given_maps_come_from_the_batch_and_derived_ones_from_the_image():
    batch = batch_of(IMAGES)
    maps = torch.randint(0, 3, (6, 4, 4), generator=rng())
    given, derived = SemanticConditioner(3, maps="given"), SemanticConditioner(3)
    with_maps = Batch(batch.x, batch.label, condition=maps)
    assert torch.equal(given.training_condition(with_maps, PIXELS, rng()).categories, maps)
    found = derived.training_condition(batch, PIXELS, rng())
    assert torch.equal(found.values, derived.evaluation_condition(batch.x, torch.arange(6), 9, PIXELS).values)
    with pytest.raises(ValueError, match="maps=given, but the batch has no condition"):
        given.training_condition(batch, PIXELS, rng())
    with pytest.raises(ValueError, match="maps=derived, but the batch has a condition"):
        derived.training_condition(with_maps, PIXELS, rng())
    with pytest.raises(ValueError, match="of_map"):
        given.evaluation_condition(batch.x, torch.arange(6), 0, PIXELS)
    with pytest.raises(ValueError, match="leave it out"):
        InpaintingConditioner().training_condition(with_maps, PIXELS, rng())


def test_agreement_counts_pixels():
    conditioner = SemanticConditioner(2, blur=1)
    x = batch_of(IMAGES).x
    condition = conditioner.evaluation_condition(x, torch.arange(6), 0, PIXELS)
    changed = x.clone()
    changed[0, 0, 0, :2] *= -1
    ((name, (share, _)),) = conditioner.scores(changed, condition).items()
    assert name == "semantic_agreement"
    assert share.tolist() == [14 / 16, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SemanticConditioner(1), r"categories must be a whole number in \[2, .*, got 1"),
        (lambda: SemanticConditioner(blur=2), "odd side"),
        (lambda: SemanticConditioner(maps="drawn"), "maps must be one of derived, given"),
        (lambda: SemanticConditioner().channels(PixelSpace((2,))), "the data are points"),
        (lambda: SemanticConditioner(2).of_map(torch.full((1, 4, 4), 2), PIXELS), r"0\.\.1, got 2\.\.2"),
        (lambda: SemanticConditioner(2).of_map(torch.zeros(1, 4, 4), PIXELS), "integers"),
    ],
)
def test_semantic_conditions_refuse_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- what all conditioners share ----------------------------------------------------------------------


def test_dropping_zeroes_whole_conditions_and_draws_nothing_at_a_share_of_zero():
    condition = SpatialCondition(torch.ones(4000, 2, 1, 1))
    generator = rng()
    kept = SemanticConditioner().dropped(condition, generator)
    assert kept is condition
    assert torch.equal(generator.get_state(), rng().get_state())
    dropped = SemanticConditioner(dropout=0.25).dropped(condition, generator).values.flatten(1)
    assert bool((dropped[:, 0] == dropped[:, 1]).all())
    assert abs(float((dropped[:, 0] == 0).float().mean()) - 0.25) < 0.03


def test_a_network_of_other_channels_is_refused_with_the_number_that_fits():
    network = DiT(IMAGES.shape, None, width=16, depth=1, num_heads=2, condition_channels=2)
    check_condition_channels(network, SemanticConditioner(2), PIXELS)
    with pytest.raises(ValueError, match=r"takes 2 condition channels.*set condition_channels=4"):
        check_condition_channels(network, SemanticConditioner(4), PIXELS)
    with pytest.raises(ValueError, match="there is no conditioner: set condition_channels=0"):
        check_condition_channels(network, None, PIXELS)


class Recorder(torch.nn.Module):
    """Answers with the sum of what it is told."""

    def forward(self, x, t, label=None, condition=None):
        self.asked = (label, condition)
        return x + (0 if label is None else 10 * label.view(-1, 1)) + condition


@pytest.mark.parametrize(
    ("dropout", "label", "null", "costs"),
    [
        (0.0, None, 1.0, 1),  # nothing to be guided by
        (0.5, None, 0.0, 2),  # guided by the condition
        (0.0, torch.tensor([1, 2]), 1.0, 2),
        (0.5, torch.tensor([1, 2]), 1.0, 2),  # guided by labels, under one condition
    ],
)
def test_guidance_goes_away_from_the_null_branch_that_was_trained(dropout, label, null, costs):
    """Invariant 44 with conditions: scale 1 is the conditional velocity, 0 the null branch, 2 beyond."""
    condition = Condition(label, SpatialCondition(torch.ones(2, 1)))
    guided, given = guided_network(Recorder(), condition, SemanticConditioner(dropout=dropout))
    x, t = torch.zeros(2, 1), torch.zeros(2)
    branch = torch.full((2, 1), null)
    whole = 1.0 + (0 if label is None else 10 * label.view(-1, 1).float()) + torch.zeros(2, 1)
    unconditional = branch if costs == 2 else whole
    for scale in (0.0, 1.0, 2.0):
        found = ClassifierFreeGuidance(scale).velocity(guided, x, t, given)
        torch.testing.assert_close(found, unconditional + scale * (whole - unconditional))
    assert (given is None) == (costs == 1)


def test_without_conditions_the_network_itself_is_guided():
    network, label = Recorder(), torch.tensor([1])
    assert guided_network(network, Condition(label), None) == (network, label)


# ---- a flow learns to use them ------------------------------------------------------------------------

STRIPES = DataSpec("stripes", "1", (1, 4, 4), num_classes=2, levels=17)


def images(num: int, seed: int = 0) -> torch.Tensor:
    """Each image is of one grey value, which its known half tells."""
    value = torch.rand(num, 1, 1, 1, generator=rng(seed)) * 1.6 - 0.8
    return value.expand(num, 1, 4, 4).contiguous()


def flow(conditioner, latent: bool = False, **options):
    torch.manual_seed(0)
    space = LatentSpace(autoencoder()) if latent else PixelSpace(STRIPES.shape)
    channels = conditioner.channels(space)
    network = partial(DiT, width=32, depth=1, num_heads=2, patch_size=1 if latent else 2, condition_channels=channels)
    family = partial(LatentCFM, autoencoder=autoencoder()) if latent else FlowMatching
    fast = {"solver": Midpoint(num_steps=4), "likelihood_solver": RungeKutta4(num_steps=4)}
    optimizer = OptimizerConfig(lr=5e-3, weight_decay=0.0)
    return family(
        STRIPES, network, conditioner=conditioner, training=TrainingConfig(optimizer, EMAConfig(0.0)), **fast, **options
    )


def trained(module, steps: int = 150):
    before = {key: value.clone() for key, value in module.network.state_dict().items()}
    optimizer = module.optimizer_config.build(module)
    generator = rng(7)
    for step in range(steps):
        x = images(64, seed=step)
        loss = module.training_loss(Batch(x, torch.zeros(64, dtype=torch.int64)), generator).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(not torch.equal(before[key], value) for key, value in module.network.state_dict().items())
    return module.eval()


CONDITIONERS = {
    "inpainting": partial(InpaintingConditioner, "half"),
    "semantic": partial(SemanticConditioner, 8),
    "guided": partial(SemanticConditioner, 8, dropout=0.2),
}


# One condition is learned by every run, the others by the slow one.
@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name != "semantic")) for name in CONDITIONERS],
)
def learned(request):
    return trained(flow(CONDITIONERS[request.param]()))


@torch.no_grad()
def test_the_right_condition_gives_a_smaller_loss_than_another_samples(learned):
    x = images(256, seed=99)
    condition = learned.conditioner.evaluation_condition(x, torch.arange(256), 0, learned.space).values
    noise, t = torch.randn(x.shape, generator=rng(3)), torch.rand(256, generator=rng(4))
    pair = learned.path.sample(noise, x, t)

    def loss(values):
        return float((learned.network(pair.xt, t, None, values) - pair.velocity).square().mean())

    assert loss(condition) < 0.8 * loss(condition.roll(1, 0))


@torch.no_grad()
def test_samples_follow_their_condition(learned):
    x, index = images(64, seed=5), torch.arange(64)
    condition = learned.conditioner.evaluation_condition(x, index, 0, learned.space)
    drawn = learned.sample(learned.draw_noise(index, 0), Condition(grid=condition))
    error = (drawn.x - x).abs().mean()
    assert error < 0.5 * (drawn.x - x.roll(1, 0)).abs().mean()
    if isinstance(learned.conditioner, InpaintingConditioner):
        known = ~condition.unknown[:, None]
        assert torch.equal(drawn.x[known], x[known])


@torch.no_grad()
def test_guidance_of_a_condition_costs_two_evaluations_and_needs_a_trained_null(learned):
    x, index = images(4, seed=5), torch.arange(4)
    condition = learned.conditioner.evaluation_condition(x, index, 0, learned.space)
    noise = learned.draw_noise(index, 0)
    plain = learned.sample(noise, Condition(grid=condition))
    if learned.conditioner.dropout:
        guided = learned.sample(noise, Condition(grid=condition), guidance=2.0)
        assert guided.network_evaluations == 2 * plain.network_evaluations
        assert not torch.equal(guided.x, plain.x)
    else:
        with pytest.raises(ValueError, match="guidance"):
            learned.sample(noise, Condition(grid=condition), guidance=2.0)


@torch.no_grad()
def test_encoding_under_a_condition_undoes_decoding_under_it_and_no_other(learned):
    x, index = images(4, seed=5), torch.arange(4)
    condition = learned.conditioner.evaluation_condition(x, index, 0, learned.space)
    other = learned.conditioner.evaluation_condition(x.roll(1, 0), index, 0, learned.space)
    learned.solver, solver = RungeKutta4(40), learned.solver
    try:
        noise = learned.draw_noise(index, 0)
        points = learned.flow_decode(noise, Condition(grid=condition)).x
        back = learned.flow_encode(points, Condition(grid=condition))
        moved = learned.flow_encode(points, Condition(grid=other))
    finally:
        learned.solver = solver
    assert float((moved - noise).abs().max()) > 0.05
    assert float((back - noise).abs().max()) < 0.05 * float((moved - noise).abs().max())


def test_the_null_condition_is_the_null_label_and_zeros(learned):
    given = learned.null_condition(3)
    assert given.label is None
    assert given.values.shape == (3, learned.conditioner.channels(learned.space), 4, 4)
    assert not given.values.any()
    labelled = FlowMatching(STRIPES, partial(DiT, width=16, depth=1, num_heads=2), conditional=True)
    assert labelled.null_condition(3).label.tolist() == [2, 2, 2]
    assert labelled.null_condition(3).grid is None


def test_missing_and_foreign_conditions_are_refused(learned):
    noise = learned.draw_noise(torch.arange(4), 0)
    with pytest.raises(ValueError, match="condition"):
        learned.sample(noise)
    with pytest.raises(ValueError, match="condition"):
        learned.encode(images(4))
    with pytest.raises(ValueError, match=r"got SpatialCondition: .* Condition\(grid=...\)"):
        learned.sample(noise, learned.null_condition(4).grid)
    with pytest.raises(ValueError, match="Reflow needs one without a conditioner"):
        Reflow(STRIPES, partial(DiT, width=16, depth=1, num_heads=2), teacher=learned)
    with pytest.raises(ValueError, match="expected 4 spatial conditions, got 3"):
        learned.sample(noise, Condition(grid=SpatialCondition(torch.zeros(3, 1, 4, 4))))
    plain = FlowMatching(STRIPES, partial(DiT, width=16, depth=1, num_heads=2))
    with pytest.raises(ValueError, match="without a conditioner"):
        plain.sample(noise, Condition(grid=SpatialCondition(torch.zeros(4, 1, 4, 4))))


@pytest.mark.parametrize("name", CONDITIONERS)
def test_likelihood_trajectory_and_samples_under_a_condition_in_latent_space(name):
    module = flow(CONDITIONERS[name](), latent=True)
    perturb(module)
    x, index = images(3, seed=1), torch.arange(3)
    with torch.no_grad():
        condition = module.conditioner.evaluation_condition(x, index, 0, module.space)
    other = module.conditioner.evaluation_condition(-x, index, 0, module.space)
    first = module.log_prob(x, Condition(grid=condition), index=index)
    assert first.shape == (3,)
    assert not torch.allclose(first, module.log_prob(x, Condition(grid=other), index=index))
    noise = module.draw_noise(index, 0)
    path = module.trajectory(noise, Condition(grid=condition), num_points=3)
    assert path.states.shape == (3, 3, *module.flow_shape)
    assert module.sample(noise, Condition(grid=condition)).x.shape == x.shape


def test_points_learn_the_missing_coordinate():
    torch.manual_seed(0)
    network = partial(MLP, width=32, depth=2, condition_channels=4)
    module = FlowMatching(POINTS, network, conditioner=InpaintingConditioner("right"), solver=Midpoint(num_steps=4))
    optimizer = torch.optim.Adam(module.network.parameters(), lr=5e-3)
    generator = rng()
    for _ in range(200):
        first = torch.randn(128, 1, generator=generator)
        loss = module.training_loss(Batch(torch.cat([first, first], 1)), generator).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.tensor([[-1.0, 9.0], [1.0, 9.0]])
    condition = module.conditioner.evaluation_condition(x, torch.arange(2), 0, module.space)
    drawn = module.sample(torch.randn(2, 2, generator=rng(1)), Condition(grid=condition)).x
    assert drawn[:, 0].tolist() == [-1.0, 1.0]
    assert (drawn[:, 1] - torch.tensor([-1.0, 1.0])).abs().max() < 0.4
