"""The forms of hybrid attention against a quadratic form written from the equations, and causality across images."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.nn.functional import logsigmoid, silu

from flowbench.families.family_contract import perturb
from flowbench.networks import HybridDiT
from flowbench.networks.hybrid_attention import HybridAttention, image_mixing

B, S, N, D, H = 2, 4, 3, 8, 2
E = D // H
RULES = [("linear", "cumsum"), ("linear", "mean"), ("full", None), ("none", None)]
every_rule = pytest.mark.parametrize(("across", "decay"), RULES)


def attention(across, decay=None) -> HybridAttention:
    torch.manual_seed(0)
    module = HybridAttention(D, H, image_mixing(across, decay)).double()
    if module.mixing.gated:
        torch.nn.init.normal_(module.decay.weight, std=8.0)  # gates far from 1, so that every decay shows
    return module


def inputs(images: int = S) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(B * images, N, D, generator=rng, dtype=torch.float64)
    return x, torch.randn(B * images, D, generator=rng, dtype=torch.float64)


def network(across, decay=None, **options) -> HybridDiT:
    """With weights none of which is zero, and gates that forget."""
    torch.manual_seed(0)
    module = HybridDiT((1, 4, 4), 3, width=16, depth=2, num_heads=2, across=across, decay=decay, **options).double()
    perturb(module, std=0.2)
    for block in module.blocks:
        if block.attention.mixing.gated:
            block.attention.decay.weight.data.mul_(20)
    return module.eval()


def images(num: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(num, 1, 4, 4, generator=rng, dtype=torch.float64)
    return x, torch.rand(num, generator=rng, dtype=torch.float64), torch.arange(num) % 3


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def by_loops(module: HybridAttention, x, c, across, decay):
    """Every query against every key of its sequence, one number at a time: the quadratic form."""
    q, k, v = (rms(part) for part in module.qkv(x).chunk(3, -1))
    out = torch.zeros_like(x)
    g = None if not module.mixing.gated else logsigmoid(module.decay(x + c[:, None])) / 16
    for b in range(B):
        for h in range(H):
            part = slice(h * E, (h + 1) * E)
            for i in range(S):
                here = b * S + i
                for n in range(N):
                    query = q[here, n, part]
                    earlier = range(i + 1) if across == "full" else [i]
                    own = [(b * S + j, m) for j in earlier for m in range(N)]
                    logits = torch.stack([query @ k[j, m, part] / math.sqrt(E) for j, m in own])
                    mixed = sum(p * v[j, m, part] for p, (j, m) in zip(logits.softmax(0), own, strict=True))
                    for j in range(i if across == "linear" else 0):
                        between = sum((g[b * S + m, :, h].mean() for m in range(j + 1, i)), torch.zeros(()))
                        read = g[here, : n + 1, h].sum() if decay == "cumsum" else g[here, :, h].mean()
                        for m in range(N):
                            weight = query @ k[b * S + j, m, part] / math.sqrt(E)
                            mixed = mixed + (read + between).exp() * weight * v[b * S + j, m, part]
                    out[here, n, part] = rms(mixed)
    return module.output(silu(module.gate(x)) * out)


@every_rule
def test_parallel_recurrent_and_quadratic_forms_agree(across, decay):
    module, (x, c) = attention(across, decay), inputs()
    expected = by_loops(module, x, c, across, decay)
    parallel = module(x, c, S)
    past, steps = (), []
    for i in range(S):
        y, entry = module.extend(x[i::S], c[i::S], past)
        past = module.mixing.remembered(past, entry, None)
        steps.append(y)
    recurrent = torch.stack(steps, 1).flatten(0, 1)
    assert float((parallel - expected).detach().abs().max()) < 1e-10
    assert float((recurrent - expected).detach().abs().max()) < 1e-10


@every_rule
def test_chunk_by_chunk_with_memory_is_the_full_forward(across, decay):
    module, (x, t, label) = network(across, decay), images()
    whole = module(x, t, label, group_size=3)
    memory, steps = module.empty_memory(), []
    for i in range(3):
        velocity, entries = module.extend(x[i::3], t[i::3], label[i::3], memory)
        memory = module.remembered(memory, entries)
        steps.append(velocity)
    assert float((torch.stack(steps, 1).flatten(0, 1) - whole).detach().abs().max()) < 1e-10
    assert float(whole.detach().abs().max()) > 0.1


@every_rule
@pytest.mark.parametrize("changed", range(3))
def test_an_image_reaches_itself_and_later_ones_only(across, decay, changed):
    module, (x, t, label) = network(across, decay), images()
    other = x.clone()
    other[changed] += 1.0  # in the first of two sequences of three
    moved = (module(other, t, label, group_size=3) - module(x, t, label, group_size=3)).detach().abs().amax((1, 2, 3))
    reached = [i >= changed if across != "none" else i == changed for i in range(3)] + [False] * 3
    assert [bool(m > 0) for m in moved] == reached


@pytest.mark.parametrize(("across", "decay"), RULES[:3])
def test_a_sequence_of_one_is_softmax_attention_within_the_image(across, decay):
    module, plain = network(across, decay), network("none")
    state = {name: value for name, value in module.state_dict().items() if ".decay." not in name}
    plain.load_state_dict(state)
    x, t, label = images()
    assert torch.equal(module(x, t, label), plain(x, t, label))
    # torch's own multi-head softmax, on the same projections.
    single, (y, c) = attention(across, decay), inputs()
    q, k, v = (rms(part).unflatten(-1, (H, E)).transpose(1, 2) for part in single.qkv(y).chunk(3, -1))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    expected = single.output(silu(single.gate(y)) * rms(mixed).transpose(1, 2).flatten(2))
    torch.testing.assert_close(single(y, c), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("across", "decay"), RULES[:3])
def test_a_window_forgets_what_is_older_and_no_window_nothing(across, decay):
    module, (x, t, label) = network(across, decay), images(5)
    steps = [(x[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(5)]

    def last(window, first=0):
        memory = module.empty_memory()
        for step in steps[first:4]:
            memory = module.remembered(memory, module.extend(*step, memory)[1], window)
        return memory

    longer = module.extend(*steps[4], last(None))[0]
    torch.testing.assert_close(module.extend(*steps[4], last(4))[0], longer, rtol=1e-10, atol=1e-10)
    assert float((module.extend(*steps[4], last(2))[0] - longer).detach().abs().max()) > 1e-6
    # What a window of one keeps is the last image: two of them read the same number of entries.
    assert all(len(past) == 2 for past in last(2))


def test_mean_decay_does_not_look_at_the_order_of_the_tokens_and_cumsum_does():
    order, (x, c) = torch.tensor([2, 0, 1]), inputs()
    moved = {}
    for decay in ("mean", "cumsum"):
        module = attention("linear", decay)
        moved[decay] = float((module(x[:, order], c, S) - module(x, c, S)[:, order]).detach().abs().max())
    assert moved["mean"] < 1e-10 < 1e-3 < moved["cumsum"]


def test_the_gain_at_the_last_token_is_that_of_the_running_sum():
    """Gates of a half: token n of an image reads the state with 2^(-n/16), the last of 64 with 0.0625."""
    module = image_mixing("linear", "cumsum")
    q = torch.ones(1, 1, 64, 1, dtype=torch.float64)
    zero = torch.zeros(1, 1, 64, 1, dtype=torch.float64)
    log_decay = torch.full((1, 1, 64), math.log(0.5) / 16, dtype=torch.float64)
    past = ((torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)),)
    gain = module.recurrent(q, zero, zero, log_decay, past).flatten()
    torch.testing.assert_close(gain[[0, 15, 63]], torch.tensor([0.5 ** (1 / 16), 0.5, 0.0625], dtype=torch.float64))


def test_a_memory_is_not_changed_by_what_is_added_to_it():
    module, (x, t, label) = network("linear", "cumsum"), images()
    empty = module.empty_memory()
    first = module.remembered(empty, module.extend(x, t, label, empty)[1])
    before = [tuple(part.clone() for part in entry) for past in first for entry in past]
    module.remembered(first, module.extend(x, t, label, first)[1])
    assert empty == ((), ())
    for entry, kept in zip([entry for past in first for entry in past], before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(entry, kept, strict=True))


def test_every_weight_gets_a_gradient_from_sequences():
    for across, decay in RULES:
        module, (x, t, label) = network(across, decay), images()
        module(x, t, label, group_size=3).square().mean().backward()
        for name, parameter in module.named_parameters():
            assert bool(parameter.grad.abs().max() > 0), (across, name)


@pytest.mark.slow
def test_a_network_in_half_precision_stays_near_that_of_full_precision():
    """The state forgets, so that roundings do not add up over a long sampling."""
    module, rng = network("linear", "cumsum").float(), torch.Generator().manual_seed(3)
    half = network("linear", "cumsum").bfloat16()
    memories, off = [module.empty_memory(), half.empty_memory()], []
    for step in range(250):
        x, t, label = torch.randn(2, 1, 4, 4, generator=rng), torch.tensor(step / 250), torch.tensor([0, 1])
        one, entries = module.extend(x, t, label, memories[0])
        other, others = half.extend(x.bfloat16(), t.bfloat16(), label, memories[1])
        memories = [module.remembered(memories[0], entries), half.remembered(memories[1], others)]
        off.append(float((one - other.float()).detach().abs().max() / one.detach().abs().max()))
    early, late = (sum(part) / len(part) for part in (off[50:100], off[-50:]))
    assert late < 2 * early < 0.3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(network, "some"), "across must be one of none, linear, full, got 'some'"),
        (partial(network, "linear", "sum"), "decay must be one of cumsum, mean, got 'sum'"),
        (partial(network, "full", "mean"), "decay='mean' belongs to across='linear', got across='full'"),
        (lambda: network("linear")(*images(), group_size=4), "group_size is 4; give a divisor of the 6 images"),
        (lambda: network("none")(*images(), torch.zeros(6, 1, 4, 4)), "a condition was given to a HybridDiT without"),
        (lambda: HybridAttention(8, 3, image_mixing("none", None)), "num_heads is 3; give a divisor of the width 8"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
