"""Released weights under our names: the published equations in NumPy, on a file in the layout of apple/ml-tarflow.

Zhai et al. (2024), arXiv 2412.06329.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowbench.data import DataSpec
from flowbench.families import TARFlow
from flowbench.families.released import load_released

from ..contract.builders import IMAGES, build
from ..numerical.test_ported_weights import layer_norm

SIDE, PATCH, CHANNELS, WIDTH, HEAD, LAYERS, CLASSES = 8, 4, 2, 128, 64, 2, 3
TOKENS, DIM = (SIDE // PATCH) ** 2, CHANNELS * PATCH**2

State = dict[str, torch.Tensor]


def released(blocks: int, classes: int = CLASSES, seed: int = 0) -> State:
    """What such a file holds: every tensor of every block, the mask of the attention and the prior's variance."""
    rng = torch.Generator().manual_seed(seed)
    state = {"var": torch.ones(TOKENS, DIM)}
    shapes = {
        "proj_in": (WIDTH, DIM),
        "proj_out": (2 * DIM, WIDTH),
        **{f"attn_blocks.{i}.attention.qkv": (3 * WIDTH, WIDTH) for i in range(LAYERS)},
        **{f"attn_blocks.{i}.attention.proj": (WIDTH, WIDTH) for i in range(LAYERS)},
        **{f"attn_blocks.{i}.mlp.main.0": (4 * WIDTH, WIDTH) for i in range(LAYERS)},
        **{f"attn_blocks.{i}.mlp.main.2": (WIDTH, 4 * WIDTH) for i in range(LAYERS)},
    }
    norms = [f"attn_blocks.{i}.{part}.norm" for i in range(LAYERS) for part in ("attention", "mlp")]
    for block in range(blocks):
        own: State = {"pos_embed": torch.randn(TOKENS, WIDTH, generator=rng)}
        if classes:
            # Multiples of 3 / 8, whose mean over three classes is exact.
            own["class_embed"] = 0.375 * torch.randint(-4, 5, (classes, 1, WIDTH), generator=rng)
        for name, shape in shapes.items():
            own[f"{name}.weight"] = torch.randn(shape, generator=rng) / shape[1] ** 0.5
            own[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=rng)
        for name in norms:
            own[f"{name}.weight"] = 1 + 0.1 * torch.randn(WIDTH, generator=rng)
            own[f"{name}.bias"] = 0.1 * torch.randn(WIDTH, generator=rng)
        own["proj_out.weight"] *= 0.3
        own["attn_mask"] = torch.ones(TOKENS, TOKENS).tril()
        state |= {f"blocks.{block}.{name}": value for name, value in own.items()}
    return state


def model(blocks: int = 2, classes: int = CLASSES, **options) -> TARFlow:
    spec = DataSpec("images", "1", (CHANNELS, SIDE, SIDE), levels=256, num_classes=classes or None)
    sizes = {"layers": [LAYERS] * blocks, "width": WIDTH, "head_dim": HEAD, "patch_size": PATCH}
    given = {"conditional": bool(classes), "last_order": None if blocks % 2 == 0 else "identity"}
    return TARFlow(spec, **{**sizes, **given, **options}).eval()


# ---- the published forward pass


def gelu(x: np.ndarray) -> np.ndarray:
    return torch.nn.functional.gelu(torch.from_numpy(x)).numpy()


def patches(x: np.ndarray) -> np.ndarray:
    """Tokens in raster order, each with its channels, rows and columns in this order."""
    rows = [
        np.concatenate([x[:, c, i : i + PATCH, j : j + PATCH].reshape(len(x), -1) for c in range(CHANNELS)], axis=1)
        for i in range(0, SIDE, PATCH)
        for j in range(0, SIDE, PATCH)
    ]
    return np.stack(rows, axis=1)


def published_block(w: dict[str, np.ndarray], x: np.ndarray, labels: list[int | None], flip: bool):
    """One block: its output, and its log-determinant per image."""
    linear = lambda name, h: h @ w[f"{name}.weight"].T + w[f"{name}.bias"]  # noqa: E731
    norm = lambda name, h: layer_norm(h, w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
    order = slice(None, None, -1) if flip else slice(None)
    x = x[:, order]
    h = linear("proj_in", x) + w["pos_embed"][order]
    if "class_embed" in w:
        mean = w["class_embed"].mean(0)
        h = h + np.stack([mean if label is None else w["class_embed"][label] for label in labels])
    for i in range(LAYERS):
        q, k, v = np.split(linear(f"attn_blocks.{i}.attention.qkv", norm(f"attn_blocks.{i}.attention.norm", h)), 3, -1)
        mixed = np.empty_like(h)
        for start in range(0, WIDTH, HEAD):
            part = slice(start, start + HEAD)
            for t in range(TOKENS):  # token by token: no mask to get wrong
                logits = np.einsum("bd,bsd->bs", q[:, t, part], k[:, : t + 1, part]) / np.sqrt(HEAD)
                share = np.exp(logits - logits.max(1, keepdims=True))
                share /= share.sum(1, keepdims=True)
                mixed[:, t, part] = np.einsum("bs,bsd->bd", share, v[:, : t + 1, part])
        h = h + linear(f"attn_blocks.{i}.attention.proj", mixed)
        hidden = gelu(linear(f"attn_blocks.{i}.mlp.main.0", norm(f"attn_blocks.{i}.mlp.norm", h)))
        h = h + linear(f"attn_blocks.{i}.mlp.main.2", hidden)
    out = linear("proj_out", h)
    z, logdet = x.copy(), np.zeros(len(x))
    for t in range(1, TOKENS):
        log_scale, shift = out[:, t - 1, :DIM], out[:, t - 1, DIM:]
        z[:, t] = (x[:, t] - shift) * np.exp(-log_scale)
        logdet -= log_scale.sum(1)
    return z[:, order], logdet


def published(state: State, x: np.ndarray, labels: list[int | None], blocks: int):
    z, total = patches(x), np.zeros(len(x))
    for number in range(blocks):
        prefix = f"blocks.{number}."
        own = {k.removeprefix(prefix): v.double().numpy() for k, v in state.items() if k.startswith(prefix)}
        z, logdet = published_block(own, z, labels, flip=number % 2 == 1)
        total += logdet
    return z, total


@pytest.mark.parametrize(("blocks", "classes"), [(2, CLASSES), (3, 0), (3, CLASSES)])
def test_codes_and_densities_are_those_of_the_published_forward_pass(tmp_path, blocks, classes):
    state = released(blocks, classes)
    torch.save(state, tmp_path / "model.pth")
    flow = model(blocks, classes)
    load_released(flow, tmp_path / "model.pth", "tarflow")
    flow = flow.double()
    x = torch.rand(4, CHANNELS, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    names: list[int | None] = [0, None, 2, 1]
    label = torch.tensor([classes if name is None else name for name in names]) if classes else None
    z, logdet = published(state, x.numpy(), names, blocks)
    assert np.abs(z - patches(x.numpy())).max() > 0.5
    found, found_logdet = flow.flow(flow._tokens(x), label)
    np.testing.assert_allclose(found.detach().numpy(), z, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found_logdet.detach().numpy(), logdet, rtol=1e-9, atol=1e-9)
    density = -0.5 * (z**2 + np.log(2 * np.pi)).sum((1, 2)) + logdet
    np.testing.assert_allclose(flow.log_prob(x, label).detach().numpy(), density, rtol=1e-7)


# ---- what is refused


def refusal(tmp_path, flow, state, layout="tarflow") -> str:
    path = tmp_path / "model.pth"
    torch.save(state, path)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_released(flow, path, layout)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 4}, "blocks 2, here 4"),
        ({"layers": [3, 3]}, "layers 2, here 3"),
        ({"width": 64}, "width 128, here 64"),
        ({"patch_size": 2}, "tokens 4, here 16; numbers in a token 32, here 8"),
        ({"classes": 0}, "classes 3, here 0"),
        ({"head_dim": 32}, "channels of a head 64, here 32"),
        ({"scale": "softplus"}, "scale exp, here softplus"),
        ({"soft_clip": 3.0}, "soft_clip None, here 3.0"),
        ({"conditioned": "deep"}, "conditioned all, here deep"),
        ({"last_order": "identity"}, "token orders ['identity', 'flip'], here ['flip', 'identity']"),
        ({"position": "rope"}, "the model has no blocks.0.network.position_embedding"),
        ({"final_norm": True}, "the file has no blocks.0.network.final_norm"),
        ({"mlp_ratio": 2.0}, "blocks.0.network.blocks.0.mlp.0.weight has the shape (512, 128), not (256, 128)"),
    ],
)
def test_a_model_of_other_sizes_is_refused_with_what_differs(tmp_path, options, message):
    assert message in refusal(tmp_path, model(**options), released(2))


def test_a_volume_preserving_flow_and_a_prior_of_its_own_are_refused(tmp_path):
    state = released(2)
    shift_only = {k: v[:DIM] if ".proj_out." in k else v for k, v in state.items()}
    assert "preserves volume" in refusal(tmp_path, model(), shift_only)
    assert "prior of its own" in refusal(tmp_path, model(), {**state, "var": 2 * state["var"]})


def test_files_that_hold_no_such_weights_are_refused(tmp_path):
    state = released(2)
    assert "no matrix blocks.0.proj_in.weight" in refusal(tmp_path, model(), {"weight": torch.ones(2)})
    incomplete = {name: value for name, value in state.items() if name != "blocks.1.attn_blocks.0.mlp.norm.bias"}
    assert "without blocks.1.attn_blocks.0.mlp.norm.bias" in refusal(tmp_path, model(), incomplete)
    assert "holds no tensors by name" in refusal(tmp_path, model(), {"optimizer": {"lr": 1.0}})
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ValueError, match="cut short or corrupt"):
        load_released(model(), tmp_path / "cut.pth", "tarflow")
    with pytest.raises(ValueError, match="there are no weights at"):
        load_released(model(), tmp_path / "none.pth", "tarflow")


def test_layouts_and_families_that_do_not_go_together_are_refused(tmp_path):
    assert "did you mean 'tarflow'?" in refusal(tmp_path, model(), released(2), "tarflw")
    message = refusal(tmp_path, build("cfm", IMAGES), released(2))
    assert message == "the layout tarflow is that of a TARFlow, but the experiment builds FlowMatching"
