"""Networks of two times: average velocities between them, and what a network of one time makes of its weights."""

from __future__ import annotations

import pytest
import torch

from flowbench.core.seeds import generator
from flowbench.families.family_contract import perturb
from flowbench.networks import MLP, DiT, UNet

BUILDERS = {
    "mlp": lambda **options: MLP((2,), 5, width=16, depth=2, **options),
    "dit": lambda **options: DiT((1, 8, 8), 5, width=16, depth=2, num_heads=2, **options),
    "unet": lambda **options: UNet((1, 8, 8), 5, channels=8, num_res_blocks=1, num_heads=2, **options),
}
every_network = pytest.mark.parametrize("name", BUILDERS)


def build(name, perturbed=True, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = BUILDERS[name](**options).eval()
    if perturbed:
        perturb(network, seed, std=0.2)
    return network


def inputs(network, num=4):
    rng = generator(1, "second-time")
    x, times = torch.randn(num, *network.shape, generator=rng), torch.rand(2, num, generator=rng)
    return x, *times.sort(0).values, torch.arange(num) % 6


@every_network
def test_the_second_time_changes_neither_the_other_weights_nor_their_first_values(name):
    one, two = (build(name, perturbed=False, second_time=given) for given in (False, True))
    extra = {f"embedding.length.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert set(two.state_dict()) == {*one.state_dict(), *extra}
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key


@every_network
def test_a_checkpoint_of_one_time_gives_the_same_velocity_bit_for_bit(name):
    """Whatever the second embedding had learned before; and at every end."""
    one, two = build(name), build(name, seed=3, second_time=True)
    two.load_state_dict(one.state_dict())
    x, t, end, label = inputs(one)
    expected = one(x, t, label)
    for found in (two(x, t, label), two(x, t, label, None, end), two(x, t, label, None, 0 * end)):
        assert torch.equal(found, expected)


@every_network
def test_no_other_weight_may_be_missing(name):
    one, two = build(name), build(name, second_time=True)
    state = one.state_dict()
    del state["embedding.time.0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*embedding.time.0.weight"):
        two.load_state_dict(state)
    state = two.state_dict()
    del state["embedding.length.2.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*embedding.length.2.bias"):
        two.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*embedding.length"):
        one.load_state_dict(two.state_dict())


@every_network
def test_the_end_matters_and_none_is_the_time_itself(name):
    network = build(name, second_time=True)
    x, t, end, label = inputs(network)
    assert torch.equal(network(x, t, label), network(x, t, label, None, t))
    assert not torch.allclose(network(x, t, label), network(x, t, label, None, end), atol=1e-3)
    # One time for all is the same as the same time for each.
    half = torch.tensor(0.5)
    alike = network(x, t, label, None, half.expand(4))
    torch.testing.assert_close(network(x, t, label, None, half), alike)


@every_network
def test_both_embeddings_learn(name):
    network = build(name, second_time=True)
    x, t, end, label = inputs(network)
    network(x, t, label, None, end).square().sum().backward()
    for key in ("embedding.length.0.weight", "embedding.length.2.bias", "embedding.time.0.weight"):
        assert network.get_parameter(key).grad.abs().max() > 0, key


@every_network
def test_what_does_not_fit_is_refused_in_one_line(name):
    one, two = build(name), build(name, second_time=True)
    x, t, end, label = inputs(one)
    with pytest.raises(ValueError, match="build it with second_time=true or pass None"):
        one(x, t, label, None, end)
    with pytest.raises(ValueError, match=r"give a floating scalar or shape \(4,\)"):
        two(x, t, label, None, end[:2])
    with pytest.raises(ValueError, match=r"end is torch.int64"):
        two(x, t, label, None, end.long())
