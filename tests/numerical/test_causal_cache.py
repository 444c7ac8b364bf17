"""Cached calls of the causal transformer: steps, runs of tokens, pages, temperature, static shapes, memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from flowbench.networks import key_value_cache as cache_module
from flowbench.networks.causal_transformer import CausalTransformer
from tests.closeness import assert_near

POSITIONS = [("rope", None), ("rope", (2, 5)), ("learned", None)]
STARTS = ["learned", "zero"]
TOKENS = 10


def network(seed: int = 0, num_classes=3, depth: int = 2, **options) -> CausalTransformer:
    """A small network whose output layer is not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = CausalTransformer(TOKENS, 2, num_classes, width=16, depth=depth, head_dim=8, **options)
        nn.init.normal_(net.out.weight, std=0.05)
        nn.init.normal_(net.out.bias, std=0.05)
    return net.double()


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def before(x: Tensor) -> Tensor:
    """The token before each; before the first stands what no caller should read."""
    return torch.cat([torch.full_like(x[:, :1], torch.nan), x[:, :-1]], dim=1)


def stepwise(net: CausalTransformer, x: Tensor, label: Tensor | None, *, static: bool = False, **options) -> Tensor:
    cache, previous = net.allocate_cache(len(x), static=static), before(x)
    positions = torch.arange(net.num_tokens).unbind() if static else range(net.num_tokens)
    rows = [net.step(previous[:, int(i)], i, cache, label, **options) for i in positions]
    return torch.stack(rows, dim=1)


def in_runs(net: CausalTransformer, x: Tensor, label: Tensor | None, lengths: list[int], **options) -> Tensor:
    cache, previous, rows, start = net.allocate_cache(len(x)), before(x), [], 0
    for length in lengths:
        rows.append(net.extend(previous[:, start : start + length], start, cache, label, **options))
        start += length
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize(("position", "start"), list(itertools.product(POSITIONS, STARTS)))
@pytest.mark.parametrize("temperature", [1.0, 0.4, torch.tensor([0.3, 1.0, 2.5])])
def test_every_way_through_the_sequence_gives_the_rows_of_the_parallel_pass(position, start, final_norm, temperature):
    net = network(position=position[0], grid=position[1], start=start, final_norm=final_norm)
    x, label = normal(3, TOKENS, 2), torch.tensor([0, 3, 1])
    with torch.no_grad():
        reference = net(x, label, temperature=temperature)
    ways = {"steps": stepwise(net, x, label, temperature=temperature)}
    ways["static steps"] = stepwise(net, x, label, static=True, temperature=temperature)
    for lengths in ([10], [1, 9], [9, 1], [3, 3, 4], [1, 1, 5, 2, 1]):
        ways[str(lengths)] = in_runs(net, x, label, lengths, temperature=temperature)
    for name, rows in ways.items():
        torch.testing.assert_close(rows, reference, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("page", [3, 4, 64])
def test_pages_change_nothing(start, page, monkeypatch):
    net = network(start=start).float()
    x, label = normal(3, TOKENS, 2, dtype=torch.float32), torch.tensor([0, 3, 1])
    with torch.no_grad():
        reference = net(x, label)
    monkeypatch.setattr(cache_module, "_RESIDENT", 0)
    monkeypatch.setattr(cache_module, "_PAGE", page)
    cache = net.allocate_cache(3)
    assert len(cache.layers[0].pages) == -(-net.num_slots // page)
    assert cache.num_bytes == 2 * 2 * 3 * net.num_slots * 16 * 4
    assert_near(stepwise(net, x, label), reference)
    assert_near(in_runs(net, x, label, [2, 5, 1, 2]), reference)
    if page < net.num_slots:
        with pytest.raises(ValueError, match="needs a static cache"):
            net.step(x[:, 0], torch.tensor(1), cache, label)


@pytest.mark.parametrize("inside", [False, True])
def test_a_cache_may_cross_the_border_of_autocast(inside, monkeypatch):
    """Paged float32 outside, bfloat16 inside."""
    monkeypatch.setattr(cache_module, "_RESIDENT", 0)
    monkeypatch.setattr(cache_module, "_PAGE", 4)
    net, x = network().float(), normal(3, TOKENS, 2, dtype=torch.float32)
    with torch.no_grad():
        reference = net(x)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
        cache = net.allocate_cache(3)
    assert (len(cache.layers[0].pages) == 1) == inside
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        rows = [net.step(token, i, cache) for i, token in enumerate(before(x).unbind(1))]
    torch.testing.assert_close(torch.stack(rows, 1).float(), reference, rtol=0, atol=2e-2)


@pytest.mark.parametrize("start", STARTS)
def test_a_temperature_of_one_changes_nothing(start):
    net, x = network(start=start), normal(3, TOKENS, 2)
    for one in (1.0, 1, torch.ones(3)):
        with torch.no_grad():
            assert net(x, temperature=one).equal(net(x))
        assert in_runs(net, x, None, [3, 7], temperature=one).equal(in_runs(net, x, None, [3, 7]))
        assert stepwise(net, x, None, temperature=one).equal(stepwise(net, x, None))


def test_large_float32_caches_are_paged_on_a_cpu():
    net = CausalTransformer(64, 2, width=256, depth=1, head_dim=64)
    small, large = net.allocate_cache(32), net.allocate_cache(256)
    assert [len(cache.layers[0].pages) for cache in (small, large)] == [1, 2]
    assert len(net.allocate_cache(256, static=True).layers[0].pages) == 1
    assert len(net.double().allocate_cache(256).layers[0].pages) == 1


@pytest.mark.parametrize("paged", [False, True])
def test_a_run_may_be_computed_again_with_other_tokens(paged, monkeypatch):
    """Jacobi iteration: the last call wins, and later runs see its rows only."""
    if paged:
        monkeypatch.setattr(cache_module, "_RESIDENT", 0)
        monkeypatch.setattr(cache_module, "_PAGE", 4)
    net = network().float() if paged else network()
    x = normal(2, TOKENS, 2).to(net.out.weight.dtype)
    previous, cache, rows = before(x), net.allocate_cache(2), []
    for start, length in ((0, 4), (4, 3), (7, 1), (8, 2)):
        here = slice(start, start + length)
        for scale in (50.0, -3.0, 1.0):
            row = net.extend(scale * previous[:, here], start, cache)
        rows.append(row)
    with torch.no_grad():
        tolerance = 1e-5 if paged else 1e-12
        torch.testing.assert_close(torch.cat(rows, 1), net(x), rtol=tolerance, atol=tolerance)


def test_rows_do_not_know_their_neighbours():
    net, x, label = network(), normal(4, TOKENS, 2), torch.tensor([0, 3, 2, 1])
    temperature = torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=torch.float64)
    together = stepwise(net, x, label, temperature=temperature)
    for row in range(4):
        here = slice(row, row + 1)
        alone = stepwise(net, x[here], label[here], temperature=float(temperature[row]))
        torch.testing.assert_close(together[here], alone, rtol=1e-12, atol=1e-12)


def test_temperature_divides_the_logits():
    """At a high temperature every slot takes the mean of the values it sees; at a low one, the best match."""
    net, x = network(num_classes=None, depth=1), normal(2, TOKENS, 2)
    with torch.no_grad():
        flat = net(x, temperature=1e9)
        net.blocks[0].attention.qkv.weight[:32] = 0  # queries and keys
        net.blocks[0].attention.qkv.bias[:32] = 0
        torch.testing.assert_close(flat, net(x), rtol=1e-6, atol=1e-7)
    assert (network(num_classes=None, depth=1)(x) - flat).abs().max() > 1e-4


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_memory_of_the_cache(start, dtype):
    net = network(start=start).to(dtype)
    slots = TOKENS - (start == "zero")
    assert net.allocate_cache(5).num_bytes == 5 * 2 * 2 * slots * 16 * dtype.itemsize
    assert net.allocate_cache(5).batch_size == 5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = dtype.itemsize if dtype == torch.float64 else 2
        assert net.allocate_cache(5).num_bytes == 5 * 2 * 2 * slots * 16 * kept


@pytest.mark.parametrize("start", STARTS)
def test_a_static_step_compiles_once_for_all_positions(start):
    torch.compiler.reset()
    net, x, label = network(start=start), normal(2, TOKENS, 2), torch.tensor([0, 3])
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(net.step, backend=backend, fullgraph=True)
    cache, previous = net.allocate_cache(2, static=True), before(x)
    rows = [compiled(previous[:, int(i)], i, cache, label) for i in torch.arange(TOKENS).unbind()]
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(rows, 1), net(x, label), rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_a_static_step_through_the_compiler(start):
    torch.compiler.reset()
    net, x, label = network(start=start), normal(2, TOKENS, 2), torch.tensor([0, 3])
    compiled = torch.compile(net.step, fullgraph=True)
    cache, previous = net.allocate_cache(2, static=True), before(x)
    rows = [compiled(previous[:, int(i)], i, cache, label) for i in torch.arange(TOKENS).unbind()]
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(rows, 1), net(x, label), rtol=1e-10, atol=1e-10)


def test_a_step_never_asks_for_a_value():
    """On meta tensors any look at a value raises, as it would wait for the device elsewhere."""
    net = network().to("meta")
    x, label = torch.empty(2, 2, device="meta", dtype=torch.float64), torch.empty(2, device="meta", dtype=torch.int64)
    position, temperature = torch.empty((), device="meta", dtype=torch.int64), torch.empty(2, device="meta")
    cache = net.allocate_cache(2)
    assert net.step(x, position, cache, label, temperature=temperature).shape == (2, 4)
    assert net.step(x, 3, cache, label, temperature=temperature).shape == (2, 4)


def test_wrong_calls_are_named():
    net, x = network(), normal(2, TOKENS, 2)
    cache = net.allocate_cache(2)
    with pytest.raises(ValueError, match="missing at position 1"):
        net.step(None, 1, cache)
    with pytest.raises(ValueError, match=r"previous tokens must have shape \(2, L, 2\), got \(3, 1, 2\)"):
        net.step(normal(3, 2), 1, cache)
    with pytest.raises(ValueError, match=r"previous tokens must have shape \(2, L, 2\), got \(2,\)"):
        net.extend(x[:, 0, 0], 1, cache)
    with pytest.raises(ValueError, match="tokens 8 to 10 are not within 0 to 9"):
        net.extend(x[:, :3], 8, cache)
    with pytest.raises(ValueError, match="temperature must be a number in"):
        net(x, temperature=0.0)
    with pytest.raises(ValueError, match=r"temperature must be one number or have shape \(2,\), got \(3,\)"):
        net.extend(x, 0, cache, temperature=torch.ones(3))
