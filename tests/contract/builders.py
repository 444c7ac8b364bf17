"""Small instances of every family, with output weights that are not zero."""

from __future__ import annotations

from functools import partial

import torch

from flowbench.data import DataSpec
from flowbench.families import (
    OTCFM,
    Autoencoder,
    FlowMatching,
    FlowModule,
    LatentCFM,
    OptimizerConfig,
    STARFlow,
    TARFlow,
    WeightedCFM,
)
from flowbench.networks import MLP, DiT, KLAutoencoder

IMAGES = DataSpec("images", "1", (1, 4, 4), num_classes=3, levels=17)
POINTS = DataSpec("points", "1", (2,), num_classes=3)

# (name, data): every family on every kind of data that it takes.
CASES = [
    ("tarflow", IMAGES),
    ("tarflow", POINTS),
    ("starflow", IMAGES),
    ("cfm", IMAGES),
    ("cfm", POINTS),
    ("ot_cfm", IMAGES),
    ("ot_cfm", POINTS),
    ("wcfm", IMAGES),
    ("wcfm", POINTS),
    ("latent_cfm", IMAGES),
]
IDS = [f"{name}-{spec.name}" for name, spec in CASES]


def perturb(module: torch.nn.Module, seed: int = 0, std: float = 0.05) -> None:
    """Zero-initialised output layers hide mistakes: move every parameter."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=rng).to(parameter))


def autoencoder() -> Autoencoder:
    torch.manual_seed(7)
    module = Autoencoder(IMAGES, partial(KLAutoencoder, latent_channels=2, width=8))
    perturb(module)
    return module.eval()


def build(name: str, spec: DataSpec, *, conditional: bool = False, seed: int = 0, **options) -> FlowModule:
    torch.manual_seed(seed)
    if spec.modality == "image":
        network = partial(DiT, width=16, depth=1, num_heads=2, patch_size=1 if "latent" in name else 2)
        tokens = {"width": 16, "head_dim": 8}
    else:
        network = partial(MLP, width=16, depth=2)
        # With a free first token two numbers leave a single slot, and attention over one slot has no gradient.
        tokens = {"width": 16, "head_dim": 8, "start": "learned"}
    common = {"optimizer": OptimizerConfig(lr=1e-2), **options, "conditional": conditional}
    makers = {
        "tarflow": lambda: TARFlow(spec, layers=[1, 2], patch_size=2 if spec is IMAGES else 1, **tokens, **common),
        "starflow": lambda: STARFlow(
            spec,
            autoencoder=autoencoder(),
            deep_layers=2,
            shallow_blocks=1,
            shallow_layers=1,
            **tokens,
            **common,
        ),
        "cfm": lambda: FlowMatching(spec, network, **common),
        "ot_cfm": lambda: OTCFM(spec, network, **common),
        "wcfm": lambda: WeightedCFM(spec, network, **common),
        "latent_cfm": lambda: LatentCFM(spec, network, autoencoder=autoencoder(), **common),
    }
    module = makers[name]()
    perturb(module, seed)
    return module


def batch_of(spec: DataSpec, size: int = 6, seed: int = 0):
    from flowbench.data import Batch

    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(size, *spec.shape, generator=rng) * 1.8 - 0.9
    label = torch.arange(size) % spec.num_classes
    return Batch(x, label=label, index=torch.arange(size))
