"""Velocity networks with a condition on the grid of x."""

from __future__ import annotations

import pytest
import torch

from flowbench.networks import MLP, DiT, UNet

from ..contract.builders import perturb

CHANNELS = 3
MAKERS = {
    "mlp": lambda **more: MLP((2,), 4, width=16, depth=2, **more),
    "dit": lambda **more: DiT((1, 4, 4), 4, width=16, depth=1, num_heads=2, patch_size=2, **more),
    "unet": lambda **more: UNet((1, 4, 4), 4, channels=8, channel_multipliers=(1, 2), num_res_blocks=1, **more),
}
every = pytest.mark.parametrize("name", MAKERS)


def build(name: str, condition_channels: int = CHANNELS):
    torch.manual_seed(0)
    network = MAKERS[name](condition_channels=condition_channels)
    perturb(network, std=0.2)
    return network.double().eval()


def inputs(network, batch: int = 3):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *network.shape, generator=rng, dtype=torch.float64)
    condition = torch.randn(batch, CHANNELS, *network.shape[1:], generator=rng, dtype=torch.float64)
    return x, torch.rand(batch, generator=rng, dtype=torch.float64), condition


@every
def test_the_velocity_keeps_its_shape_and_depends_on_the_condition_of_its_own_sample(name):
    network = build(name)
    x, t, condition = inputs(network)
    velocity = network(x, t, None, condition)
    assert velocity.shape == x.shape
    assert velocity.abs().min() > 0
    changed = condition.clone()
    changed[1] += 1
    moved = (network(x, t, None, changed) - velocity).flatten(1).abs().amax(1)
    assert moved[1] > 1e-3
    assert moved[0] == moved[2] == 0


@every
def test_gradients_reach_every_channel_of_the_condition_and_the_weights_that_read_it(name):
    network = build(name)
    x, t, condition = inputs(network)
    network(x, t, None, condition.requires_grad_()).square().sum().backward()
    assert bool((condition.grad.abs().transpose(0, 1).flatten(1).amax(1) > 0).all())
    first = {"mlp": "input", "dit": "input", "unet": "stem"}[name]
    assert bool((network.get_submodule(first).weight.grad.abs().flatten(1).amax(1) > 0).all())


@every
def test_only_the_first_layer_is_wider(name):
    plain, wide = build(name, 0), build(name)
    sizes = {key: tuple(value.shape) for key, value in plain.state_dict().items()}
    other = {key: tuple(value.shape) for key, value in wide.state_dict().items()}
    assert list(sizes) == list(other)
    assert [key for key in sizes if sizes[key] != other[key]] == [
        {"mlp": "input.weight", "dit": "input.weight", "unet": "stem.weight"}[name]
    ]


@every
def test_without_condition_channels_the_initial_weights_are_those_of_a_network_that_knows_none(name):
    torch.manual_seed(3)
    given = MAKERS[name](condition_channels=0).state_dict()
    torch.manual_seed(3)
    plain = MAKERS[name]().state_dict()
    assert list(given) == list(plain)
    assert all(torch.equal(given[key], plain[key]) for key in plain)


@every
def test_zero_columns_for_the_condition_are_the_network_without_it(name):
    """The widened layer reads x first: an oracle for the order of the channels."""
    plain, wide = build(name, 0), build(name)
    state = plain.state_dict()
    key = {"mlp": "input.weight", "dit": "input.weight", "unet": "stem.weight"}[name]
    weight = torch.zeros_like(wide.state_dict()[key])
    # Patches list their channels first, as convolutions do.
    weight[:, : state[key].shape[1]] = state[key]
    wide.load_state_dict({**state, key: weight})
    x, t, condition = inputs(wide)
    torch.testing.assert_close(wide(x, t, None, condition), plain(x, t))


@every
def test_the_null_condition_is_zeros(name):
    network = build(name)
    x, t, _ = inputs(network)
    null = network.null_condition(x)
    assert null.shape == (3, CHANNELS, *network.shape[1:])
    assert not null.any()
    assert network(x, t, None, null).isfinite().all()
    assert build(name, 0).null_condition(x) is None


@every
def test_conditions_that_do_not_fit_are_refused_in_one_line(name):
    network, plain = build(name), build(name, 0)
    x, t, condition = inputs(network)
    with pytest.raises(ValueError, match=r"condition_channels=3; give a condition \(3, 3") as error:
        network(x, t)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="build it with condition_channels"):
        plain(x, t, None, condition)
    with pytest.raises(ValueError, match="the condition has shape"):
        network(x, t, None, condition[:, :2])
    with pytest.raises(ValueError, match=r"condition_channels must be a whole number in .*, got -1"):
        MAKERS[name](condition_channels=-1)


def test_conditions_are_read_in_the_precision_of_the_states():
    network = build("dit").float()
    x, t, condition = inputs(network)
    assert network(x.float(), t.float(), None, condition).dtype == torch.float32
