"""Blocks with weights in the layouts of Apple's TARFlow and STARFlow, against NumPy written from the equations.

TARFlow: Zhai et al. (2024), arXiv:2412.06329. STARFlow: Gu et al. (2025), arXiv:2506.06276.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import erf

from flowbench.flows import AffineBlock
from flowbench.networks.causal_transformer import CausalTransformer

ROWS, COLUMNS, DIM, WIDTH, HEAD, DEPTH, CLASSES, BATCH = 2, 3, 2, 16, 8, 2, 3, 4
TOKENS, HIDDEN = ROWS * COLUMNS, 4 * WIDTH
EXTENT, CLIP = 7.0, 4.0

Weights = dict[str, np.ndarray]


def draw(seed: int, **shapes: tuple[int, ...]) -> Weights:
    rng = np.random.default_rng(seed)
    return {name.replace("__", "."): 0.3 * rng.standard_normal(shape) for name, shape in shapes.items()}


def transformer_weights(seed: int) -> Weights:
    """What both references have, under their names."""
    weights = draw(
        seed,
        proj_in__weight=(WIDTH, DIM),
        proj_in__bias=(WIDTH,),
        proj_out__weight=(2 * DIM, WIDTH),
        proj_out__bias=(2 * DIM,),
    )
    for layer in range(DEPTH):
        own = draw(
            seed + 1 + layer,
            attention__norm__weight=(WIDTH,),
            attention__norm__bias=(WIDTH,),
            attention__qkv__weight=(3 * WIDTH, WIDTH),
            attention__qkv__bias=(3 * WIDTH,),
            attention__proj__weight=(WIDTH, WIDTH),
            attention__proj__bias=(WIDTH,),
            mlp__norm__weight=(WIDTH,),
            mlp__norm__bias=(WIDTH,),
            mlp__main__0__weight=(HIDDEN, WIDTH),
            mlp__main__0__bias=(HIDDEN,),
            mlp__main__2__weight=(WIDTH, HIDDEN),
            mlp__main__2__bias=(WIDTH,),
        )
        weights |= {f"attn_blocks.{layer}.{name}": value for name, value in own.items()}
    return weights


def tarflow_weights(seed: int = 0) -> Weights:
    return transformer_weights(seed) | draw(seed + 9, pos_embed=(TOKENS, WIDTH), class_embed=(CLASSES, 1, WIDTH))


def starflow_weights(seed: int = 0) -> Weights:
    return transformer_weights(seed) | draw(seed + 9, sos_embed=(1, 1, DIM))


# The published equations


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def turn_pairs(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Neighbouring channels (2 j, 2 j + 1) turn by angle j: a complex product."""
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def grid_angles() -> np.ndarray:
    """Row angles, then column angles, of every cell; the grid's mean side spans EXTENT."""
    scale = EXTENT / np.sqrt(ROWS * COLUMNS)
    frequencies = 10_000.0 ** (-np.arange(HEAD // 4) / (HEAD // 4))
    cells = [(row * scale, column * scale) for row in range(ROWS) for column in range(COLUMNS)]
    return np.array([[p * f for p in cell for f in frequencies] for cell in cells])


def transformer(w: Weights, h: np.ndarray, angles: np.ndarray | None) -> np.ndarray:
    length = h.shape[1]
    causal = np.tril(np.ones((length, length), dtype=bool))
    for layer in range(DEPTH):
        p = {name.split(".", 2)[2]: value for name, value in w.items() if name.startswith(f"attn_blocks.{layer}.")}
        normed = layer_norm(h, p["attention.norm.weight"], p["attention.norm.bias"])
        q, k, v = np.split(normed @ p["attention.qkv.weight"].T + p["attention.qkv.bias"], 3, axis=-1)
        heads = []
        for head in range(WIDTH // HEAD):
            part = slice(head * HEAD, (head + 1) * HEAD)
            q_h, k_h = q[..., part], k[..., part]
            if angles is not None:
                q_h, k_h = turn_pairs(q_h, angles), turn_pairs(k_h, angles)
            logits = np.where(causal, q_h @ k_h.swapaxes(1, 2) / np.sqrt(HEAD), -np.inf)
            share = np.exp(logits - logits.max(-1, keepdims=True))
            heads.append(share / share.sum(-1, keepdims=True) @ v[..., part])
        h = h + np.concatenate(heads, -1) @ p["attention.proj.weight"].T + p["attention.proj.bias"]
        hidden = layer_norm(h, p["mlp.norm.weight"], p["mlp.norm.bias"]) @ p["mlp.main.0.weight"].T
        hidden = hidden + p["mlp.main.0.bias"]
        hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
        h = h + hidden @ p["mlp.main.2.weight"].T + p["mlp.main.2.bias"]
    return h @ w["proj_out.weight"].T + w["proj_out.bias"]


def tarflow(w: Weights, x: np.ndarray, labels: list[int | None], flip: bool) -> tuple[np.ndarray, ...]:
    """Mean, log scale, noise and log-determinant; the mean of all classes stands for no label."""
    order = slice(None, None, -1) if flip else slice(None)
    x = x[:, order]
    means = w["class_embed"].mean(0)
    classes = np.stack([means if label is None else w["class_embed"][label] for label in labels])
    h = x @ w["proj_in.weight"].T + w["proj_in.bias"] + w["pos_embed"][order] + classes
    out = transformer(w, h, None)
    out = np.concatenate([np.zeros_like(out[:, :1]), out[:, :-1]], 1)
    log_scale, mean = np.split(out, 2, axis=-1)
    z = (x - mean) * np.exp(-log_scale)
    return mean, log_scale, z[:, order], -log_scale.sum((1, 2))


def starflow(w: Weights, x: np.ndarray, flip: bool) -> tuple[np.ndarray, ...]:
    order = slice(None, None, -1) if flip else slice(None)
    x = x[:, order]
    shifted = np.concatenate([np.broadcast_to(w["sos_embed"], (len(x), 1, DIM)), x[:, :-1]], 1)
    out = transformer(w, shifted @ w["proj_in.weight"].T + w["proj_in.bias"], grid_angles())
    raw, mean = np.split(CLIP * np.tanh(out / CLIP), 2, axis=-1)
    std = np.log1p(np.exp(raw + np.log(np.e - 1)))
    return mean, std, ((x - mean) / std)[:, order], -np.log(std).sum((1, 2))


# The same weights under our names


def mapped(w: Weights) -> Weights:
    """References put the raw scale before the mean, and name things otherwise."""
    ours = {"embed.weight": w["proj_in.weight"], "embed.bias": w["proj_in.bias"]}
    for name in ("weight", "bias"):
        ours[f"out.{name}"] = np.roll(w[f"proj_out.{name}"], DIM, axis=0)
    names = {
        "attention.norm": "attention_norm",
        "attention.qkv": "attention.qkv",
        "attention.proj": "attention.out",
        "mlp.norm": "mlp_norm",
        "mlp.main.0": "mlp.0",
        "mlp.main.2": "mlp.2",
    }
    for layer in range(DEPTH):
        for (theirs, own), kind in ((pair, kind) for pair in names.items() for kind in ("weight", "bias")):
            ours[f"blocks.{layer}.{own}.{kind}"] = w[f"attn_blocks.{layer}.{theirs}.{kind}"]
    return ours


def halved(ours: Weights) -> Weights:
    """Pairs of neighbours become pairs of halves: channel j of a head is their 2 j, channel j + E / 2 their 2 j + 1."""
    within = np.concatenate([np.arange(0, HEAD, 2), np.arange(1, HEAD, 2)])
    rows = np.concatenate([head * HEAD + within for head in range(2 * WIDTH // HEAD)])  # queries and keys
    rows = np.concatenate([rows, np.arange(2 * WIDTH, 3 * WIDTH)])
    return {name: value[rows] if ".attention.qkv." in name else value for name, value in ours.items()}


def load(net: CausalTransformer, ours: Weights) -> CausalTransformer:
    net.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in ours.items()})
    return net


def build(**options) -> CausalTransformer:
    return CausalTransformer(TOKENS, DIM, width=WIDTH, depth=DEPTH, head_dim=HEAD, **options).double()


def assert_same(
    block: AffineBlock, x: np.ndarray, label: torch.Tensor | None, expected: tuple[np.ndarray, ...]
) -> None:
    z, logdet = block(torch.from_numpy(x), label)
    np.testing.assert_allclose(z.detach().numpy(), expected[2], rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(logdet.detach().numpy(), expected[3], rtol=1e-11, atol=1e-11)
    assert np.abs(expected[2] - x).max() > 0.1


def inputs() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((BATCH, TOKENS, DIM))


@pytest.mark.parametrize("permutation", ["identity", "flip"])
def test_tarflow_block(permutation):
    w, x = tarflow_weights(), inputs()
    labels: list[int | None] = [0, None, 2, 1]
    expected = tarflow(w, x, labels, permutation == "flip")
    net = build(num_classes=CLASSES, position="learned", start="zero")
    order = slice(None, None, -1) if permutation == "flip" else slice(None)
    ours = mapped(w)
    ours["position_embedding"] = w["pos_embed"][order][:-1]  # the last token predicts nothing
    ours["label_embedding.weight"] = np.concatenate([w["class_embed"][:, 0], w["class_embed"].mean(0)])
    load(net, ours)
    label = torch.tensor([CLASSES if label is None else label for label in labels])
    params = net(torch.from_numpy(x[:, order].copy()), label).detach().numpy()
    np.testing.assert_allclose(params, np.concatenate(expected[:2], -1), rtol=1e-11, atol=1e-11)
    assert_same(AffineBlock(net, permutation, "exp"), x, label, expected)


@pytest.mark.parametrize("permutation", ["identity", "flip"])
def test_starflow_block(permutation):
    w, x = starflow_weights(), inputs()
    expected = starflow(w, x, permutation == "flip")
    net = build(grid=(ROWS, COLUMNS), extent=EXTENT, start="learned")
    ours = halved(mapped(w))
    ours["start_token"] = w["sos_embed"][0, 0]
    load(net, ours)
    assert_same(AffineBlock(net, permutation, "softplus", CLIP), x, None, expected)


def test_extent_makes_the_table_of_the_equations():
    table = build(grid=(ROWS, COLUMNS), extent=EXTENT).table.numpy()
    np.testing.assert_allclose(table, np.stack([np.cos(grid_angles()), np.sin(grid_angles())]), rtol=0, atol=1e-13)
