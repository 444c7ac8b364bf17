"""Which parameter is stepped by what, the step itself, its state, and the schedule."""

from __future__ import annotations

import copy
import io
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flowbench.networks import MLP, CausalTransformer, DiT, TokenTransformer, UNet
from flowbench.training import SGD, SWAN, AdamW, OptimizerConfig, SinkGD
from flowbench.training.optimizers import learning_rate_factor
from flowbench.training.optimizers.routing import parameter_groups


def test_only_matrices_are_decayed():
    module = nn.ModuleDict({"linear": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "table": nn.Embedding(3, 2)})
    decayed, kept = parameter_groups(module, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(module["linear"].weight)]
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    assert len(kept["params"]) == 4


def test_position_tables_and_start_tokens_are_not_decayed():
    flow = CausalTransformer(
        4, 2, 3, width=8, depth=1, head_dim=8, position="learned", start="learned", final_norm=True
    )
    score = TokenTransformer(4, 2, 3, width=8, depth=1, head_dim=8)
    module = nn.ModuleDict({"flow": flow, "score": score})
    decayed, kept = parameter_groups(module, 0.1)
    inside = {id(p) for p in decayed["params"]}
    assert inside == {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
    assert len(inside) + len(kept["params"]) == len(list(module.parameters()))


def test_shared_and_frozen_parameters():
    a, b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    b.weight = a.weight
    frozen = nn.Linear(2, 2).requires_grad_(False)
    groups = parameter_groups(nn.ModuleList([a, b, frozen]), 0.1)
    assert sum(len(group["params"]) for group in groups) == 1


@given(progress=st.floats(0, 1), warmup=st.floats(0, 0.9), final=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_factor_lies_between_zero_and_one(progress, warmup, final):
    config = OptimizerConfig(warmup_fraction=warmup, final_fraction=final)
    assert 0.0 <= learning_rate_factor(config, progress) <= 1.0


def test_schedule_agrees_with_torch():
    """Warm-up by LinearLR and cosine by CosineAnnealingLR, an independent implementation."""
    steps, warmup = 100, 20
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=0.1)
    config = OptimizerConfig(warmup_fraction=warmup / steps, final_fraction=0.1)
    for step in range(warmup, steps):
        assert learning_rate_factor(config, step / steps) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        cosine.step()
    assert learning_rate_factor(config, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(OptimizerConfig(schedule="constant"), 0.9) == 1.0


@pytest.mark.parametrize(
    "options", [{"lr": 0.0}, {"warmup_fraction": 1.0}, {"final_fraction": 2.0}, {"schedule": "linear"}]
)
def test_values_out_of_range(options):
    with pytest.raises(ValueError, match="optimizer\\."):
        OptimizerConfig(**options)


# ---- parameters with a rule for matrices ------------------------------------------------------------------

MATRIX_RULES = {
    "sinkgd": SinkGD(lr=1e-2, alpha=0.1),
    "sinkgd 1": SinkGD(lr=1e-2, iterations=1, weight_decay=0.1),
    "swan": SWAN(lr=1e-2, alpha=0.2),
    "sgd": SGD(lr=1e-2, alpha=10.0, weight_decay=0.1),
}
every_rule = pytest.mark.parametrize("rule", MATRIX_RULES.values(), ids=MATRIX_RULES)
NETWORKS = {
    "causal": (
        partial(CausalTransformer, 4, 2, 3, width=8, depth=1, head_dim=8, position="learned", final_norm=True),
        {"blocks.0.attention.qkv", "blocks.0.attention.out", "blocks.0.mlp.0", "blocks.0.mlp.2"},
    ),
    "tokens": (
        partial(TokenTransformer, 4, 2, 3, width=8, depth=1, head_dim=8),
        {"blocks.0.qkv", "blocks.0.attention_out", "blocks.0.mlp.0", "blocks.0.mlp.2"},
    ),
    "dit": (
        partial(DiT, (1, 4, 4), 3, width=8, depth=1, num_heads=2),
        {f"blocks.0.{name}" for name in ("attention.qkv", "attention.output", "mlp_in", "mlp_out", "modulation")},
    ),
    "mlp": (partial(MLP, (2,), 3, width=8, depth=1), {f"layers.0.{name}" for name in ("first", "condition", "second")}),
    # The modulations of its residual blocks and the attention in the middle; convolutions are no matrices.
    "unet": (
        partial(UNet, (1, 4, 4), 3, channels=4, channel_multipliers=[1], num_res_blocks=1, num_heads=2),
        {
            *(f"{name}.block.modulation" for name in ("encoder.0", "middle.0", "middle.1", "decoder.0", "decoder.1")),
            *(f"middle.0.attention.attention.{name}" for name in ("qkv", "output")),
        },
    ),
}


def filled(module: nn.Module, seed: int = 0, scale: float = 1.0) -> nn.Module:
    """Gradients of a normal law."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=rng).to(parameter)
    return module


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS["causal"][0]().to(dtype)


@pytest.mark.parametrize("name", NETWORKS)
def test_matrices_are_the_linear_layers_inside(name):
    make, inside = NETWORKS[name]
    module = make()
    optimizer = SinkGD().build(module)
    names = {id(parameter): key for key, parameter in module.named_parameters()}
    groups = [{names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups]
    assert groups[0] == {f"{layer}.weight" for layer in inside}
    assert sum(map(len, groups)) == len(names)
    assert set.union(*groups) == set(names.values())
    decayed, kept = optimizer.param_groups[1:]
    assert [group["kind"] for group in optimizer.param_groups] == ["sinkgd", "adamw", "adamw"]
    assert {type(module.get_submodule(names[id(p)].rpartition(".")[0])) for p in decayed["params"]} <= {
        type(m) for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)
    }
    assert kept["weight_decay"] == 0.0


def test_tied_and_frozen_weights_are_no_matrices():
    module = nn.ModuleDict({"head": nn.Linear(3, 5), "table": nn.Embedding(5, 3), "inner": nn.Linear(3, 3)})
    module["head"].weight = module["table"].weight
    module["frozen"] = nn.Linear(3, 3).requires_grad_(False)
    groups = SinkGD().build(module).param_groups
    assert [id(p) for p in groups[0]["params"]] == [id(module["inner"].weight)]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters() if p.requires_grad)


@every_rule
def test_what_cannot_be_trained_is_refused_in_one_line(rule):
    name = type(rule).__name__
    with pytest.raises(ValueError, match=rf"^{name} is for linear layers inside of networks.*take AdamW$"):
        rule.build(nn.Conv2d(1, 1, 3))
    with pytest.raises(ValueError, match=rf"^{name} needs whole matrices.*set trainer\.strategy=ddp, or take AdamW$"):
        rule.check(network(), sharded=True)


def expected_matrix(rule, weight: np.ndarray, gradient: np.ndarray, lr: float) -> np.ndarray:
    """The rules written out in NumPy, float64, for one matrix."""
    rows, columns = gradient.shape
    if isinstance(rule, SinkGD):
        x = gradient
        for _ in range(rule.iterations):
            x = np.diag(columns**0.5 / np.linalg.norm(x, axis=1)) @ x
            x = x @ np.diag(rows**0.5 / np.linalg.norm(x, axis=0))
    elif isinstance(rule, SWAN):
        x = (gradient - gradient.mean(1)[:, None]) / gradient.std(1)[:, None]
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        x = u @ np.diag((s > 1e-9 * s[0]).astype(float)) @ vt
        x *= (rows * columns) ** 0.5 / np.linalg.norm(x)
    else:
        x = gradient
    return weight - lr * (rule.alpha * x + rule.weight_decay * weight)


@every_rule
def test_three_steps_by_hand(rule):
    """Matrices by NumPy; everything else by PyTorch's AdamW of the same groups."""
    module = network(torch.float64)
    # Newton and Schulz go on until the matrix is white, as the decomposition is at once.
    rule = SWAN(lr=rule.lr, alpha=rule.alpha, iterations=60) if isinstance(rule, SWAN) else rule
    optimizer = rule.build(module)
    matrices = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    names = {key for key, parameter in module.named_parameters() if id(parameter) in matrices}
    weights = {key: dict(module.named_parameters())[key].detach().numpy().copy() for key in names}
    twin = copy.deepcopy(module)
    decayed, kept = parameter_groups(twin, rule.weight_decay)
    adamw = torch.optim.AdamW([decayed, kept], lr=rule.lr, betas=rule.betas, eps=rule.eps)
    for step in range(3):
        filled(module, step), filled(twin, step)
        optimizer.step(), adamw.step()
        for key, parameter in module.named_parameters():
            if key in names:
                weights[key] = expected_matrix(rule, weights[key], parameter.grad.numpy(), rule.lr)
    for key, parameter in module.named_parameters():
        if key in names:
            np.testing.assert_allclose(parameter.detach().numpy(), weights[key], atol=1e-6, err_msg=key)
        else:
            torch.testing.assert_close(parameter, dict(twin.named_parameters())[key], atol=1e-12, rtol=1e-9)


def test_adamw_is_that_of_pytorch_to_the_last_bit():
    module = network()
    twin = copy.deepcopy(module)
    own = AdamW(lr=3e-3, betas=(0.8, 0.9), weight_decay=0.1, eps=1e-6).build(module)
    is_decayed = {id(m.weight) for m in twin.modules() if isinstance(m, nn.Linear)}
    decayed = [p for p in twin.parameters() if id(p) in is_decayed]
    kept = [p for p in twin.parameters() if id(p) not in is_decayed]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=3e-3, betas=(0.8, 0.9), eps=1e-6, fused=True)
    for step in range(3):
        filled(module, step), filled(twin, step)
        own.step(), theirs.step()
    assert all(map(torch.equal, module.parameters(), twin.parameters()))
    assert OptimizerConfig is AdamW


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


@every_rule
@pytest.mark.parametrize("fused", [True, False])
def test_matrices_have_no_state_and_others_two_moments_and_a_counter(rule, fused):
    module = network()
    optimizer = rule.build(module, fused)
    filled(module)
    optimizer.step()
    matrices = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    assert not any(id(parameter) in matrices for parameter in optimizer.state)
    others = [parameter for parameter in module.parameters() if id(parameter) not in matrices]
    assert state_bytes(optimizer) == sum(4 * (2 * parameter.numel() + 1) for parameter in others)
    assert state_bytes(optimizer) == 4 * (rule.num_moments(module) + len(others))
    adamw = AdamW().build(filled(network()))
    adamw.step()
    assert state_bytes(adamw) == sum(4 * (2 * parameter.numel() + 1) for parameter in module.parameters())
    assert AdamW().num_moments(module) == 2 * sum(parameter.numel() for parameter in module.parameters())


@every_rule
@pytest.mark.parametrize("fused", [True, False])
def test_a_saved_state_goes_on_to_the_last_bit(rule, fused):
    module = network()
    optimizer = rule.build(module, fused)
    for step in range(2):
        filled(module, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weights": module.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = network()
    other.load_state_dict(saved["weights"])
    second = rule.build(other, fused)
    second.load_state_dict(saved["optimizer"])
    for step in range(2, 4):
        filled(module, step), filled(other, step)
        optimizer.step(), second.step()
    assert all(map(torch.equal, module.parameters(), other.parameters()))


def test_the_state_of_another_optimiser_is_refused():
    module = network()
    state = SinkGD().build(module).state_dict()
    with pytest.raises(ValueError, match=r"has groups \['sinkgd', 'adamw', 'adamw'\], this one \['swan',"):
        SWAN().build(module).load_state_dict(state)
    with pytest.raises(ValueError, match=r"has groups \[None, None\], this one"):
        SWAN().build(module).load_state_dict(AdamW().build(module).state_dict())


@pytest.mark.parametrize("rule", [SinkGD(weight_decay=0.1), SWAN()], ids=repr)
def test_the_scale_of_a_gradient_does_not_move_matrices(rule):
    found = []
    for scale in (1.0, 1000.0):
        module = network(torch.float64)
        optimizer = rule.build(module)
        for step in range(2):
            filled(module, step, scale)
            optimizer.step()
        found.append([parameter.detach() for parameter in optimizer.param_groups[0]["params"]])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-9)


@every_rule
def test_found_inf_leaves_weights_and_moments_alone(rule):
    """As the guard of losses uses it: 1 skips the step where the gradients lie, 0 does not."""
    module = network()
    optimizer = rule.build(module)
    assert optimizer._step_supports_amp_scaling
    filled(module)
    optimizer.step()
    before = [p.detach().clone() for p in module.parameters()]
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    filled(module, scale=float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(map(torch.equal, before, module.parameters()))
    for key, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[key][name]) for name, value in state.items())
    optimizer.found_inf = torch.zeros(())
    filled(module, 1)
    optimizer.step()
    assert not any(map(torch.equal, before, module.parameters()))
    assert not rule.build(module, fused=False)._step_supports_amp_scaling


def test_bfloat16_gradients_are_normalised_in_float32():
    module = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    seen = []
    optimizer = SinkGD().build(module)
    optimizer._direction = lambda grad: seen.append(grad.dtype) or SinkGD().direction(grad)
    filled(module)
    optimizer.step()
    assert seen == [torch.float32]
    assert module.weight.dtype == torch.bfloat16


def test_parameters_without_a_gradient_and_pieces_of_a_batch(monkeypatch):
    module = nn.ModuleList([nn.Linear(3, 3) for _ in range(5)])
    filled(module)
    module[2].weight.grad = None
    twin = copy.deepcopy(module)
    for one, other in zip(module.parameters(), twin.parameters(), strict=True):
        other.grad = None if one.grad is None else one.grad.clone()
    SinkGD().build(module).step()
    monkeypatch.setattr("flowbench.training.optimizers.matrix.MOST_AT_ONCE", 20)  # two at a time
    SinkGD().build(twin).step()
    assert module[2].weight.grad is None
    for one, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_closure_is_called_with_gradients():
    module = nn.Linear(2, 2)
    optimizer = SGD().build(module)

    def closure():
        optimizer.zero_grad()
        loss = module(torch.ones(1, 2)).sum()
        loss.backward()
        return loss

    before = module.weight.detach().clone()
    assert optimizer.step(closure) is not None
    assert not torch.equal(before, module.weight)


@pytest.mark.parametrize(("saved", "own"), [(SinkGD(), AdamW()), (AdamW(), SinkGD())])
def test_the_state_of_another_optimiser_is_refused_whichever_it_is(saved, own):
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    state = saved.build(network).state_dict()
    with pytest.raises(ValueError, match="the checkpoint's optimiser has groups"):
        own.build(network).load_state_dict(state)
