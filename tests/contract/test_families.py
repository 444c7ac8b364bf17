"""What every family promises, checked on every family: a new one joins by a line in `builders.CASES`."""

from __future__ import annotations

import lightning as L
import pytest
import torch

import flowbench.families as families
from flowbench.data import Batch
from flowbench.families import FlowModule
from flowbench.flows import ClassifierFreeGuidance
from flowbench.training import load_checkpoint

from .builders import CASES, IMAGES, PARAMETERS, batch_of, build

every_family = pytest.mark.parametrize(("name", "spec"), PARAMETERS)


def answer(module: FlowModule, x: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
    """Log-densities of points; the samples of a family that has none."""
    if module.density != "none":
        return module.log_prob(x, label)
    return module.sample(module.draw_noise(torch.arange(len(x)), 0), label).x


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_exported_family_is_in_the_contract():
    # Reflow is FlowMatching on pairs that are made and stored before the first step: see test_reflow.py.
    apart = {FlowModule, families.Reflow}
    exported = {cls for cls in vars(families).values() if isinstance(cls, type) and issubclass(cls, FlowModule)} - apart
    assert exported == {type(build(name, spec)) for name, spec in CASES}


@every_family
def test_one_step_of_the_trainer_moves_every_parameter(name, spec):
    module = build(name, spec)
    before = {k: v.clone() for k, v in module.named_parameters()}
    loader = torch.utils.data.DataLoader([batch_of(spec, 32, seed=s) for s in range(2)], batch_size=None)
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    for key, parameter in module.named_parameters():
        assert not torch.equal(before[key], parameter), key


@every_family
def test_the_optimizer_holds_every_parameter_once(name, spec):
    module = build(name, spec)
    held = [id(p) for group in module.optimizer_config.build(module).param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters())


@every_family
def test_conditioning_changes_the_result_and_the_null_label_is_no_label(name, spec):
    module, batch = build(name, spec, conditional=True).eval(), batch_of(spec)
    null = torch.full((len(batch),), spec.num_classes)
    torch.testing.assert_close(answer(module, batch.x, null), answer(module, batch.x))
    assert not torch.allclose(answer(module, batch.x, batch.label), answer(module, batch.x))
    noise = module.draw_noise(torch.arange(2), 0)
    a, b = (module.sample(noise, torch.full((2,), c)).x for c in (0, 1))
    assert not torch.allclose(a, b)


@every_family
def test_guidance_of_scale_one_is_none_and_a_larger_one_costs_more(name, spec):
    module = build(name, spec, conditional=True).eval()
    noise, label = module.draw_noise(torch.arange(2), 0), torch.tensor([0, 2])
    plain, one = module.sample(noise, label), module.sample(noise, label, guidance=1.0)
    assert torch.equal(plain.x, one.x)
    guided = module.sample(noise, label, guidance=3.0)
    assert not torch.allclose(guided.x, plain.x)
    assert guided.network_evaluations > plain.network_evaluations


@every_family
def test_the_number_of_evaluations_can_be_chosen_or_is_refused(name, spec):
    module = build(name, spec).eval()
    noise = module.draw_noise(torch.arange(2), 0)
    if module.describe().can_choose_evaluations:
        for n in (1, 2, 4, 8):
            assert module.sample(noise, network_evaluations=n).network_evaluations == n
    else:
        with pytest.raises(ValueError, match="fixed cost"):
            module.sample(noise, network_evaluations=4)


@every_family
def test_save_and_load_give_the_same_density_and_samples(name, spec, tmp_path):
    module, batch = build(name, spec).eval(), batch_of(spec)
    module.ema.update()
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    other = build(name, spec, seed=5).eval()
    load_checkpoint(other, tmp_path / "a.ckpt")
    assert torch.equal(answer(module, batch.x), answer(other, batch.x))
    noise = module.draw_noise(torch.arange(2), 0)
    with module.evaluating("ema"), other.evaluating("ema"):
        assert torch.equal(module.sample(noise).x, other.sample(noise).x)


@every_family
def test_a_checkpoint_of_another_family_is_refused_in_one_line(name, spec, tmp_path):
    module = build(name, spec)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    stranger = build("tarflow" if name.startswith("cfm") else "cfm", spec)
    with pytest.raises(ValueError, match="checkpoint's family is") as caught:
        load_checkpoint(stranger, tmp_path / "a.ckpt")
    assert "\n" not in str(caught.value)


@every_family
def test_dropout_and_mode_are_restored_after_evaluation_even_when_it_fails(name, spec):
    module = build(name, spec)
    module.ema.update()
    before = {key: value.clone() for key, value in module.state_dict().items() if torch.is_tensor(value)}
    with pytest.raises(RuntimeError, match="boom"), module.evaluating("ema"):
        assert not module.training
        raise RuntimeError("boom")
    assert module.training
    for key, value in before.items():
        assert torch.equal(module.state_dict()[key], value), key


@every_family
def test_repr_names_the_class(name, spec):
    assert type(build(name, spec)).__name__ in repr(build(name, spec))


@every_family
def test_double_precision_end_to_end(name, spec):
    module = build(name, spec).double().eval()
    x = batch_of(spec).x.double()
    if "latent" in name or "starflow" in name:
        module.space.autoencoder.double()
    assert answer(module, x).dtype == torch.float64


@every_family
def test_bad_input_gets_one_clear_line(name, spec):
    module = build(name, spec)
    noise = module.draw_noise(torch.arange(2), 0)
    with pytest.raises(ValueError, match="unconditional model"):
        module.sample(noise, torch.tensor([0, 1]))
    if not module.describe().has_label_free_guidance:
        with pytest.raises(ValueError, match=r"guidance=2\.0 needs labels"):
            module.sample(noise, guidance=2.0)
        with pytest.raises(ValueError, match="needs a trained null label"):
            build(name, spec, conditional=True, label_dropout=0.0).sample(noise, torch.tensor([0, 1]), guidance=2.0)
    with pytest.raises(ValueError, match="expected points of shape"):
        module.log_prob(torch.zeros(2, 9))
    batch = batch_of(spec)
    with pytest.raises(ValueError, match="class labels only"):
        module.training_loss(Batch(batch.x, condition=torch.zeros(6, 1)), rng())
    conditional = build(name, spec, conditional=True)
    with pytest.raises(ValueError, match=r"labels must lie in 0..3"):
        conditional.sample(noise, torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="expected 2 labels"):
        conditional.sample(noise, torch.tensor([0]))


def test_conditioning_needs_labelled_data():
    from dataclasses import replace

    with pytest.raises(ValueError, match="no labels"):
        build("cfm", replace(IMAGES, num_classes=None), conditional=True)


@pytest.mark.parametrize("name", ["starflow", "latent_cfm"])
def test_the_autoencoder_stays_outside_parameters_averages_and_checkpoints(name):
    module = build(name, IMAGES)
    inside = {id(p) for p in module.parameters()}
    assert not inside & {id(p) for p in module.space.autoencoder.parameters()}
    assert not any("autoencoder" in key for key in module.state_dict())
    assert not any(p.requires_grad for p in module.space.autoencoder.parameters())


@pytest.mark.parametrize("name", ["starflow", "latent_cfm"])
def test_a_latent_family_without_an_autoencoder_says_what_to_add(name):
    cls = families.STARFlow if name == "starflow" else families.LatentCFM
    arguments = (IMAGES,) if name == "starflow" else (IMAGES, lambda shape, classes: torch.nn.Identity())
    with pytest.raises(ValueError, match=r"requires: \{autoencoder"):
        cls(*arguments)


@pytest.mark.parametrize(("name", "guidance"), [("cfm", ClassifierFreeGuidance(2.0)), ("tarflow", 2.0)])
def test_guidance_that_could_not_act_is_refused(name, guidance):
    with pytest.raises(ValueError, match=r"guidance of scale 2 needs labels: set conditional=true"):
        build(name, IMAGES, guidance=guidance)
    with pytest.raises(ValueError, match=r"guidance of scale 2 needs a trained null label: set label_dropout above 0"):
        build(name, IMAGES, guidance=guidance, conditional=True, label_dropout=0.0)
    assert build(name, IMAGES, guidance=guidance, conditional=True).num_classes == 3


@pytest.mark.parametrize("name", ["starflow", "latent_cfm"])
def test_a_checkpoint_belongs_to_its_autoencoder(name, tmp_path):
    module, other = build(name, IMAGES), build(name, IMAGES)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    load_checkpoint(other, tmp_path / "a.ckpt")
    stranger = build(name, IMAGES)
    with torch.no_grad():
        next(stranger.space.autoencoder.parameters()).add_(0.1)
    with pytest.raises(ValueError, match="checkpoint's autoencoder is"):
        load_checkpoint(stranger, tmp_path / "a.ckpt")


def test_a_conditional_checkpoint_does_not_fit_an_unconditional_model(tmp_path):
    module = build("cfm", IMAGES, conditional=True)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="checkpoint's classes is 3, but the configuration builds None"):
        load_checkpoint(build("cfm", IMAGES), tmp_path / "a.ckpt")
