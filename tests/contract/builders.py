"""Small instances of every family, with output weights that are not zero."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from flowbench.data import DataSpec
from flowbench.families import (
    OTCFM,
    ARFlow,
    Autoencoder,
    BiFlow,
    ConditionedNoise,
    DecoderDenoiser,
    DivergenceHead,
    FlowMap,
    FlowMatching,
    FlowModule,
    FlowScoreDenoiser,
    GaussianNoise,
    LatentCFM,
    NoiseAnnealing,
    NormalizedFlowMatching,
    SimFlow,
    STARFlow,
    TARFlow,
    Tweedie,
    WeightedCFM,
)
from flowbench.families.family_contract import perturb
from flowbench.families.latents.decoder_finetuning import DecoderFineTuning
from flowbench.flows import (
    AutoregressiveGuidance,
    ConsistencyTraining,
    CosineGrid,
    CosinePath,
    DataObjective,
    GaussianMixtureSource,
    GibbsWeight,
    JacobiInverse,
    Lagrangian,
    LogitNormalTimes,
    LowFrequencySource,
    MeanFlow,
    NoiseObjective,
    NormAlignedSource,
    Progressive,
    Renoise,
    RungeKutta4,
    SchrodingerBridgePath,
    ScoreObjective,
    Shortcut,
)
from flowbench.flows.coupling.entropic import SchrodingerBridgeCoupling
from flowbench.networks import MLP, DiT, HybridDiT, KLAutoencoder
from flowbench.training import OptimizerConfig, TrainingConfig

IMAGES = DataSpec("images", "1", (1, 4, 4), num_classes=3, levels=17)
POINTS = DataSpec("points", "1", (2,), num_classes=3)
# Enough for what every likelihood must do; how exact a longer solution is stands in tests/numerical.
LIKELIHOOD_STEPS = 3

# (name, data): every family on every kind of data that it takes.
CASES = [
    ("tarflow", IMAGES),
    ("tarflow", POINTS),
    ("tarflow_widths", IMAGES),
    ("tarflow_jacobi", IMAGES),
    ("tarflow_temperature", IMAGES),
    ("tarflow_tweedie", POINTS),
    ("tarflow_noise_conditioned", IMAGES),
    ("tarflow_noise_conditioned", POINTS),
    ("tarflow_score_matching", IMAGES),
    ("tarflow_score_matching", POINTS),
    ("starflow", IMAGES),
    ("starflow_score_matching", IMAGES),
    ("starflow_decoder", IMAGES),
    ("simflow", IMAGES),
    ("cfm", IMAGES),
    ("cfm", POINTS),
    ("ot_cfm", IMAGES),
    ("ot_cfm", POINTS),
    ("cfm_bridge", POINTS),
    ("cfm_cosine", IMAGES),
    ("cfm_rescheduled", IMAGES),
    ("cfm_aligned", IMAGES),
    ("cfm_data", IMAGES),
    ("cfm_data", POINTS),
    ("cfm_noise", POINTS),
    ("cfm_score", POINTS),
    ("wcfm", IMAGES),
    ("wcfm", POINTS),
    ("wcfm_corrected", IMAGES),
    ("latent_cfm", IMAGES),
    ("nfm", IMAGES),
    ("biflow", IMAGES),
    ("biflow", POINTS),
    ("biflow_noisy", IMAGES),
    ("biflow_end", IMAGES),
    ("biflow_latent", IMAGES),
    ("arflow", IMAGES),
    ("map", IMAGES),
    ("map", POINTS),
    ("map_progressive", POINTS),
    ("map_shortcut", IMAGES),
    ("map_lagrangian", POINTS),
    ("map_meanflow", IMAGES),
    ("map_consistency", POINTS),
    ("map_head", POINTS),
]
IDS = [f"{name}-{spec.name}" for name, spec in CASES]
# Cases whose code a sibling runs too, but for what has tests of its own: slow tests.
LIKE_A_SIBLING = {
    "biflow-images", "biflow_noisy-images", "biflow_end-images", "cfm_data-images", "cfm_data-points",
    "cfm_noise-points", "map-images", "map_progressive-points", "map_lagrangian-points", "map_consistency-points",
    "map_head-points", "tarflow_noise_conditioned-images", "tarflow_widths-images", "tarflow_temperature-images",
    "starflow_score_matching-images", "cfm_rescheduled-images", "map_shortcut-images",
}  # fmt: skip

# The families without a density; of all others the contract checks it.
WITHOUT_DENSITY = {"biflow", "biflow_noisy", "biflow_end", "biflow_latent"}


def late(own: str) -> list[pytest.MarkDecorator]:
    """The marks of the case of an id."""
    return [pytest.mark.slow] * (own in LIKE_A_SIBLING)


PARAMETERS = [pytest.param(name, spec, id=own, marks=late(own)) for (name, spec), own in zip(CASES, IDS, strict=True)]


def autoencoder(noise_std: float = 0.0) -> Autoencoder:
    """With a decoder that was fine-tuned at a noise level, or without."""
    torch.manual_seed(7)
    network = partial(KLAutoencoder, latent_channels=2, width=8)
    module = DecoderFineTuning(IMAGES, network, noise_std=noise_std) if noise_std else Autoencoder(IMAGES, network)
    perturb(module)
    return module.eval()


def joint_network(posterior_std: float | None = 0.5):
    """Of the autoencoder that is trained with its flow."""
    return partial(KLAutoencoder, latent_channels=2, width=8, posterior_std=posterior_std)


def teacher(spec: DataSpec, conditional: bool) -> FlowModule:
    """An autoregressive flow whose pairs are taught."""
    return build("tarflow", spec, conditional=conditional, seed=3).eval()


def exact() -> dict:
    """Solvers of an untrained prediction, whose field contracts or expands to the ends of the clipped times.

    Steps end at these times, 0.4 and 0.6, where the field has a kink.
    """
    return {"solver": RungeKutta4(num_steps=20), "likelihood_solver": RungeKutta4(num_steps=20)}


def taught(name: str, spec: DataSpec, conditional: bool) -> FlowModule:
    """The teacher of a learned inverse."""
    kind = {"biflow_noisy": "tarflow_tweedie", "biflow_latent": "starflow"}.get(name, "tarflow")
    return build(kind, spec, conditional=conditional, seed=3).eval()


def variant(name: str) -> dict:
    """Options of a variant of a family, new objects each time."""
    score_matching = {"denoiser": FlowScoreDenoiser(width=16, depth=1, head_dim=8), "latent_norm": 0.01}
    orders = {"layers": [1, 1, 1], "width": [8, 16, 8], "permutations": ["transpose", "reverse-rows", "identity"]}
    return {
        "tarflow_widths": {**orders, "position": "rope", "extent": 4.0, "start": "learned", "final_norm": True},
        "tarflow_jacobi": {"inverse": JacobiInverse(tolerance=1e-6)},
        "tarflow_temperature": {"guidance": AutoregressiveGuidance(temperature=0.5, rule="log-scale")},
        "tarflow_tweedie": {"augmentation": GaussianNoise(0.2), "denoiser": Tweedie()},
        "tarflow_noise_conditioned": {"augmentation": ConditionedNoise(0.1, 0.4), "denoiser": NoiseAnnealing(3)},
        "tarflow_score_matching": {"augmentation": GaussianNoise(0.2), **score_matching},
        "starflow_score_matching": {"augmentation": GaussianNoise(0.3), **score_matching},
        "cfm_bridge": {"path": SchrodingerBridgePath(0.5), "coupling": SchrodingerBridgeCoupling(0.5)},
        "cfm_cosine": {"path": CosinePath(), "times": LogitNormalTimes(), "solver": RungeKutta4(num_steps=16)},
        "cfm_rescheduled": {"sampling_path": CosinePath(), "solver": RungeKutta4(num_steps=16, grid=CosineGrid())},
        "cfm_low_frequency": {"source": LowFrequencySource(2, prior=GaussianMixtureSource(1))},
        "cfm_aligned": {"source": NormAlignedSource()},
        "cfm_data": {"objective": DataObjective("velocity", clip=0.4), **exact()},
        "cfm_noise": {"objective": NoiseObjective(clip=0.4), **exact()},
        "cfm_score": {"objective": ScoreObjective("elbo", clip=0.4), **exact()},
        "wcfm_corrected": {"weight": GibbsWeight(kappa=1.0, correction="mixed")},
        "biflow_end": {"alignment": "none"},
        "starflow_decoder": {"augmentation": GaussianNoise(0.3), "denoiser": DecoderDenoiser()},
        "map_progressive": {"map_objective": Progressive(split="uniform")},
        "map_shortcut": {"map_objective": Shortcut(levels=3)},
        "map_lagrangian": {"map_objective": Lagrangian()},
        "map_meanflow": {"map_objective": MeanFlow(tangent="self"), "diagonal": 0.25},
        "map_consistency": {"map_objective": ConsistencyTraining(), "jumps": Renoise()},
        "map_head": {"map_objective": Progressive(), "divergence_head": DivergenceHead(widths=[8])},
    }.get(name, {})


def build(name: str, spec: DataSpec, *, conditional: bool = False, seed: int = 0, **options) -> FlowModule:
    torch.manual_seed(seed)
    if spec.modality == "image":
        network = partial(DiT, width=16, depth=1, num_heads=2, patch_size=1 if "latent" in name else 2)
        tokens = {"width": 16, "head_dim": 8}
    else:
        network = partial(MLP, width=16, depth=2)
        # With a free first token two numbers leave a single slot, and attention over one slot has no gradient.
        tokens = {"width": 16, "head_dim": 8, "start": "learned"}
    if name.startswith("map"):
        network = partial(network, second_time=True)
    common = {"training": TrainingConfig(OptimizerConfig(lr=1e-2)), **options, "conditional": conditional}
    family = name.partition("_")[0]
    tarflow = {"layers": [1, 2], "patch_size": 2 if spec is IMAGES else 1, **tokens, **variant(name), **common}
    starflow = {"deep_layers": 2, "shallow_blocks": 1, "shallow_layers": 1, **tokens, **variant(name), **common}
    noise_std = 0.3 if name == "starflow_decoder" else 0.0
    biflow = {"width": 16, "head_dim": 8, **common}
    matching = {"likelihood_solver": RungeKutta4(num_steps=LIKELIHOOD_STEPS)}
    common = {**matching, **(variant(name) if family in ("cfm", "wcfm", "map") else {}), **common}
    makers = {
        "tarflow": lambda: TARFlow(spec, **tarflow),
        "starflow": lambda: STARFlow(spec, autoencoder=autoencoder(noise_std), **starflow),
        "simflow": lambda: SimFlow(spec, joint_network(), **starflow),
        "cfm": lambda: FlowMatching(spec, network, **common),
        "map": lambda: FlowMap(spec, network, **common),
        "ot_cfm": lambda: OTCFM(spec, network, **common),
        "wcfm": lambda: WeightedCFM(spec, network, **common),
        "nfm": lambda: NormalizedFlowMatching(spec, network, teacher=teacher(spec, conditional), **common),
        "biflow": lambda: BiFlow(spec, teacher=taught(name, spec, conditional), depth=1, **biflow, **variant(name)),
        # Without the state: with it there is no density, see tests/families/test_arflow.py.
        "arflow": lambda: ARFlow(spec, partial(HybridDiT, width=16, depth=1, num_heads=2), state="drop", **common),
        "latent_cfm": lambda: LatentCFM(spec, network, autoencoder=autoencoder(), **common),
    }
    module = makers[family if family in ("tarflow", "starflow", "cfm", "wcfm", "biflow", "map") else name]()
    perturb(module, seed)
    fitted(module)
    return module


def fitted(module: FlowModule) -> None:
    """Fit what a run fits to its data before the first step."""
    if isinstance(module, FlowMatching):
        points = batch_of(module.spec, 64).x
        if module.source.needs_fit:
            module.source.fit(points, torch.Generator().manual_seed(0))
        if module.weight.needs_fit:
            rng = torch.Generator().manual_seed(0)
            module.weight.fit(module.source.sample_for(points, rng), points, rng, True, source_std=1.0)


def batch_of(spec: DataSpec, size: int = 6, seed: int = 0):
    from flowbench.data import Batch

    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(size, *spec.shape, generator=rng) * 1.8 - 0.9
    label = torch.arange(size) % spec.num_classes
    # What is trained on sequences takes the samples in pairs, and the first label of each.
    return Batch(x, label=label, index=torch.arange(size), group_size=1 if size % 2 else 2)
