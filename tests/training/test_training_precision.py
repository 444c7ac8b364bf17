"""A step of training under every precision, clipping, accumulation and optimiser that an experiment file can name."""

from __future__ import annotations

import itertools
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from flowbench.cli import main
from flowbench.families import Autoencoder, GaussianNoise
from flowbench.families.noise.denoising import FlowScoreDenoiser
from flowbench.networks import KLAutoencoder
from flowbench.training import SGD, SWAN, OptimizerConfig, SinkGD, TrainingConfig, TrainingModule

from ..commands.conftest import POINTS
from ..contract.builders import perturb
from .test_training import digits, model, trainer

PRECISIONS = ["32-true", "bf16-mixed"]
CLIPPINGS = [(None, None), (1e-3, None), (1e-3, "norm"), (1e-3, "value")]
OPTIMISERS = {
    "cosine": OptimizerConfig(lr=1e-2),
    "constant": OptimizerConfig(lr=1e-2, schedule="constant"),
    "undecayed": OptimizerConfig(lr=1e-2, weight_decay=0.0, betas=(0.9, 0.999), warmup_fraction=0.0),
    "sinkgd": SinkGD(lr=1e-2),
    "swan": SWAN(lr=1e-2),
    "sgd": SGD(lr=1e-2),
}


def autoencoder(**options) -> Autoencoder:
    module = Autoencoder(digits().spec, partial(KLAutoencoder, latent_channels=2, width=8), **options)
    perturb(module)  # layers that are zero at first leave others without a gradient
    return module


def score_matching(**options) -> TrainingModule:
    noise = {"augmentation": GaussianNoise(0.2), "denoiser": FlowScoreDenoiser(width=16, depth=1, head_dim=8)}
    return model("tarflow", **noise, patch_size=4, **options)


MAKERS = {
    "autoregressive": partial(model, "tarflow"),
    "matching": partial(model, "cfm"),
    "autoencoder": autoencoder,
    "score matching": score_matching,
}


class Gradients(L.Callback):
    """Keeps the last step's gradients before and after they were clipped."""

    def on_train_start(self, trainer, module):
        trainer.optimizers[0].register_step_post_hook(lambda *_: self._keep("clipped", module))

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self._keep("raw", module)

    def _keep(self, name, module):
        found = {key: p.grad.double().clone() for key, p in module.named_parameters() if p.grad is not None}
        setattr(self, name, found)


def norm(gradients: list[torch.Tensor]) -> float:
    return sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5


def expected(raw: dict[str, torch.Tensor], limit: float | None, algorithm: str | None) -> dict[str, torch.Tensor]:
    """By hand. A denoiser that learns beside the flow has a norm of its own."""
    if limit is None:
        return raw
    if algorithm == "value":
        return {key: gradient.clamp(-limit, limit) for key, gradient in raw.items()}
    parts = {key: key.startswith("denoiser.") for key in raw}
    norms = {part: norm([raw[key] for key in raw if parts[key] is part]) for part in set(parts.values())}
    assert all(length > limit for length in norms.values()), "there is nothing to clip"
    return {key: gradient * limit / norms[parts[key]] for key, gradient in raw.items()}


def check_step(module: TrainingModule, tmp_path, limit: float | None, algorithm: str | None, **options) -> Gradients:
    seen = Gradients()
    before = {key: p.detach().clone() for key, p in module.named_parameters()}
    clipping = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm}
    trainer(tmp_path, max_steps=1, callbacks=[seen], **clipping, **options).fit(module, digits())
    moved = {key: not torch.equal(before[key], p) for key, p in module.named_parameters() if key in seen.raw}
    assert sum(moved.values()) > 0.9 * len(moved)  # a gradient may be zero
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in module.parameters())
    for key, gradient in expected(seen.raw, limit, algorithm).items():
        torch.testing.assert_close(seen.clipped[key], gradient, rtol=2e-3, atol=0.0)
    return seen


@pytest.mark.parametrize(("limit", "algorithm"), CLIPPINGS, ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_step_moves_the_weights_by_gradients_that_are_clipped_as_the_trainer_says(
    kind, precision, accumulate, limit, algorithm, tmp_path
):
    module = MAKERS[kind](training=TrainingConfig(OPTIMISERS["constant"]))
    check_step(module, tmp_path, limit, algorithm, precision=precision, accumulate_grad_batches=accumulate)


@pytest.mark.parametrize(
    ("optimiser", "precision", "clipping"), list(itertools.product(OPTIMISERS, PRECISIONS, CLIPPINGS[1:])), ids=str
)
def test_every_optimiser_steps_under_every_precision_and_clipping(optimiser, precision, clipping, tmp_path):
    check_step(model("cfm", training=TrainingConfig(OPTIMISERS[optimiser])), tmp_path, *clipping, precision=precision)


@pytest.mark.parametrize(("limit", "algorithm"), CLIPPINGS, ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimiser", ["cosine", "sinkgd"])
def test_gradients_of_a_scaled_loss_are_unscaled_before_they_are_clipped(
    optimiser, accumulate, limit, algorithm, tmp_path
):
    """Lightning has no float16 on a CPU; the plugin that it takes on a GPU does run there."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))
    options = {"accumulate_grad_batches": accumulate}
    cfm = partial(model, "cfm", training=TrainingConfig(OPTIMISERS[optimiser]))
    scaled = check_step(cfm(), tmp_path, limit, algorithm, plugins=[plugin], **options)
    plain = check_step(cfm(), tmp_path, limit, algorithm, **options)
    assert norm(list(scaled.raw.values())) == pytest.approx(norm(list(plain.raw.values())), rel=0.02)


@pytest.mark.parametrize("precision", ["64-true", "16-true", "bf16-true", "16-mixed", "16", "transformer-engine"])
def test_a_precision_that_cannot_be_had_is_refused_in_one_line(precision, tmp_path, capfd):
    """Before anything is trained or written."""
    (tmp_path / "a.yaml").write_text(POINTS)
    folder = tmp_path / "run"
    words = ["-c", str(tmp_path / "a.yaml"), f"run.dir={folder}", f"trainer.precision='{precision}'"]
    assert main(["fit", *words, "--test"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("flowbench: error: trainer.precision=")
    assert err.count("\n") == 1
    assert "take " in err
    assert not (folder / "checkpoints").exists()
