"""Counts from shapes against counts by hand, and against the operations of real runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowbench.cli import main
from flowbench.commands import runs
from flowbench.commands.counting import count, count_text, meta_module
from flowbench.config import Experiment
from flowbench.data import Batch, DataSpec
from flowbench.families import DiffusersAutoencoder
from flowbench.training import Count, count_flops
from tests.contract.builders import POINTS
from tests.contract.outside import outside

SHAPE, CLASSES = (3, 8, 8), 7
WIDTH, HEAD, LAYERS, PATCH = 16, 8, (2, 3), 4
TOKENS, DIM = 4, 3 * PATCH**2
TARFLOW = {"layers": list(LAYERS), "width": WIDTH, "head_dim": HEAD, "patch_size": PATCH, "conditional": True}
STARFLOW = {"deep_layers": 3, "shallow_blocks": 1, "shallow_layers": 2, "width": WIDTH, "head_dim": HEAD}
AUTOENCODER = {
    "class_path": "flowbench.families.Autoencoder",
    "init_args": {
        "network": {
            "class_path": "flowbench.networks.KLAutoencoder",
            "init_args": {"latent_channels": 4, "width": 8, "downsamplings": 1, "num_res_blocks": 1},
        }
    },
}


def experiment(tmp_path: Path, family: str, arguments: dict, **sections) -> Experiment:
    """An experiment on data that exist nowhere."""
    data = {"dataset": "image_folder", "path": "nowhere", "image_size": 8, "shape": list(SHAPE), "num_classes": CLASSES}
    model = {"class_path": f"flowbench.families.{family}", "init_args": arguments}
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump({"data": data, "model": model, "budget": {"steps": 1}, **sections}))
    return Experiment.from_files([path])


def counted(tmp_path: Path, family: str, arguments: dict, **sections) -> Count:
    return count(experiment(tmp_path, family, arguments, **sections))


def block_parameters(layers: int, slots: int) -> int:
    """Embedding and output layer, positions, labels with the null label; a layer's two norms and four matrices."""
    ends = (DIM + 1) * WIDTH + slots * WIDTH + (CLASSES + 1) * WIDTH + (WIDTH + 1) * 2 * DIM
    return ends + layers * (2 * 2 * WIDTH + 4 * (WIDTH + 1) * WIDTH + 4 * WIDTH * (WIDTH + 1) + WIDTH * (4 * WIDTH + 1))


def token_products(layers: int) -> int:
    """Multiply-adds of one token without attention: 2 M N K each, in halves."""
    return WIDTH * DIM + layers * 12 * WIDTH**2 + WIDTH * 2 * DIM


def test_parameters_of_every_block_are_those_counted_by_hand(tmp_path):
    found = counted(tmp_path, "TARFlow", TARFLOW)
    expected = [block_parameters(layers, TOKENS - 1) for layers in LAYERS]
    assert [block.parameters for block in found.blocks] == expected
    assert found.parameters == sum(expected)
    assert found.state_bytes == 5 * 4 * sum(expected)
    unaveraged = counted(tmp_path, "TARFlow", {**TARFLOW, "training": {"ema": {"decay": 0.0}}})
    assert unaveraged.state_bytes == 4 * 4 * sum(expected)


def test_an_optimiser_without_state_for_matrices_keeps_no_moments_of_them(tmp_path):
    optimizer = {"class_path": "flowbench.training.SinkGD"}
    found = counted(tmp_path, "TARFlow", {**TARFLOW, "training": {"optimizer": optimizer}})
    matrices = sum(layers * 12 * WIDTH**2 for layers in LAYERS)  # of attention and MLP
    assert found.state_bytes == 4 * (5 * found.parameters - 2 * matrices)
    assert f"AdamW's moments ({8 * (found.parameters - matrices) / 1e3:.3g} kB)" in " ".join(count_text(found).split())


def test_operations_of_a_block_are_those_counted_by_hand(tmp_path):
    """One pass: all slots at once, attention over the full square. Sampling: a slot sees itself and those before."""
    found, slots = counted(tmp_path, "TARFlow", TARFLOW), TOKENS - 1
    for block, layers in zip(found.blocks, LAYERS, strict=True):
        products = slots * token_products(layers)
        assert block.evaluation_flops == 2 * (products + layers * 2 * slots**2 * WIDTH)
        assert block.sampling_flops == 2 * (products + layers * 2 * WIDTH * slots * (slots + 1) // 2)
        assert block.cache_bytes == 2 * layers * slots * WIDTH * 4
    assert found.evaluation_flops == sum(block.evaluation_flops for block in found.blocks)
    assert found.sampling_flops == sum(block.sampling_flops for block in found.blocks)
    assert found.cache_bytes == max(block.cache_bytes for block in found.blocks)


def test_a_training_step_costs_three_passes_less_the_gradients_that_nobody_wants(tmp_path):
    found, slots = counted(tmp_path, "TARFlow", TARFLOW), TOKENS - 1
    # The data have no gradient, so the first block's embedding goes back to its weight alone.
    assert found.training_flops == 3 * found.evaluation_flops - 2 * slots * WIDTH * DIM


def test_activation_checkpointing_computes_each_layer_twice_but_for_its_last_product(tmp_path):
    plain, slots = counted(tmp_path, "TARFlow", TARFLOW), TOKENS - 1
    again = 2 * (slots * 12 * WIDTH**2 + 2 * slots**2 * WIDTH) - 2 * slots * 4 * WIDTH**2
    found = counted(tmp_path, "TARFlow", {**TARFLOW, "checkpoint_every": 1})
    assert found.training_flops - plain.training_flops == sum(LAYERS) * again


def test_sampling_costs_what_a_real_sampler_does(tmp_path):
    module = experiment(tmp_path, "TARFlow", TARFLOW).build_model(DataSpec("x", "1", SHAPE, CLASSES, 256))
    found = counted(tmp_path, "TARFlow", TARFLOW)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module.sample(torch.randn(3, *SHAPE), torch.tensor([0, 1, 2]))
    # The sampler may read a page of the cache beyond the last token.
    assert counter.get_total_flops() == pytest.approx(3 * found.sampling_flops, rel=0.02)


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("TARFlow", TARFLOW),
        ("FlowMatching", {"network": {"class_path": "flowbench.networks.DiT", "init_args": {"width": 16, "depth": 1}}}),
        ("FlowMatching", {"network": {"class_path": "flowbench.networks.UNet", "init_args": {"channels": 8}}}),
    ],
)
def test_a_training_step_costs_what_the_budget_counts_on_data(tmp_path, family, arguments):
    found = counted(tmp_path, family, arguments)
    module = experiment(tmp_path, family, arguments).build_model(DataSpec("x", "1", SHAPE, CLASSES, 256))
    batch = Batch(torch.randn(4, *SHAPE), torch.arange(4))
    real = count_flops(lambda: module.training_loss(batch, torch.Generator().manual_seed(0)).total)
    assert real == 4 * found.training_flops
    assert found.parameters == sum(p.numel() for p in module.parameters())


def test_matching_flows_are_counted_by_the_evaluation(tmp_path):
    width, depth = 32, 2
    network = {"class_path": "flowbench.networks.MLP", "init_args": {"width": width, "depth": depth}}
    solver = {"class_path": "flowbench.flows.Midpoint", "init_args": {"num_steps": 5}}
    points = {"dataset": "npz", "path": "nowhere", "shape": [2]}
    found = counted(tmp_path, "OTCFM", {"network": network, "solver": solver}, data=points)
    assert found.evaluations == 10
    assert found.sampling_flops == 10 * found.evaluation_flops
    assert found.blocks == ()
    assert found.cache_bytes is None
    adaptive = {"class_path": "flowbench.flows.DormandPrince"}
    undecided = counted(tmp_path, "FlowMatching", {"network": network, "solver": adaptive}, data=points)
    assert undecided.evaluations is undecided.sampling_flops is None
    assert "depends on the data" in count_text(undecided)


def test_a_latent_flow_is_counted_without_training_its_autoencoder(tmp_path):
    required = {"data": {"dataset": "npz", "path": "nowhere", "shape": list(SHAPE)}, "budget": {"steps": 1}}
    required["model"] = AUTOENCODER
    found = counted(tmp_path, "STARFlow", STARFLOW, requires={"autoencoder": required})
    assert found.space == (4, 4, 4)
    assert [(block.layers, block.labelled) for block in found.blocks] == [(2, False), (3, False)]
    assert found.blocks[1].cache_bytes == 2 * 3 * 16 * WIDTH * 4  # 16 latent points, all of them transformed
    assert "latents 4x4x4" in count_text(found)


def test_declared_latents_stand_in_for_an_autoencoder_that_is_not_here(monkeypatch):
    with torch.device("meta"):
        assert DiffusersAutoencoder((3, 64, 32), path="nowhere", latents=(4, 8)).latent_shape == (4, 8, 4)
    vae = nn.Module()
    vae.config = SimpleNamespace(block_out_channels=(8, 8), latent_channels=4, in_channels=3)
    monkeypatch.setattr("flowbench.families.latents.pretrained._read_diffusers", lambda path: vae)
    assert DiffusersAutoencoder((3, 64, 32), path="here", latents=(4, 2)).latent_shape == (4, 32, 16)
    with pytest.raises(ValueError, match=r"declared as \(4, 8\), but the autoencoder in here has 4 channels at 1/2"):
        DiffusersAutoencoder((3, 64, 32), path="here", latents=(4, 8))


def test_an_autoencoder_has_no_evaluations(tmp_path):
    found = counted(tmp_path, "Autoencoder", AUTOENCODER["init_args"])
    assert found.training_flops > 0
    assert found.evaluation_flops is found.evaluations is found.sampling_flops is None


def test_counting_leaves_a_module_as_it_was(tmp_path):
    network = {"class_path": "flowbench.networks.MLP", "init_args": {"width": 16, "depth": 1}}
    weight = {"class_path": "flowbench.flows.GibbsWeight", "init_args": {"epsilon": "elbow"}}
    points = {"dataset": "npz", "path": "nowhere", "shape": [2]}
    module = meta_module(experiment(tmp_path, "OTCFM", {"network": network, "weight": weight}, data=points))
    parts = (module.pairing, module.source, module.weight, module.conditioner)
    assert module.count() == module.count()
    now = (module.pairing, module.source, module.weight, module.conditioner)
    assert all(one is other for one, other in zip(parts, now, strict=True))


def test_a_family_of_another_package_counts_itself():
    module = outside()(POINTS)
    found = module.count()
    assert (found.family, found.parameters, found.state_bytes) == ("Mine", 2, 4 * 5 * 2)
    assert (found.training_flops, found.evaluation_flops, found.blocks) == (0, None, ())


def test_a_module_that_builds_on_a_trained_one_is_not_counted(tmp_path):
    arguments = {**AUTOENCODER["init_args"], "noise_std": 0.1}
    with pytest.raises(ValueError, match="DecoderFineTuning builds on a trained one"):
        counted(tmp_path, "DecoderFineTuning", arguments)


def test_nothing_is_allocated_and_nothing_is_read(tmp_path):
    """A model of 40 billion parameters, on data that exist nowhere."""
    found = counted(tmp_path, "TARFlow", {"layers": [2, 2], "width": 28672, "head_dim": 64, "patch_size": 4})
    assert found.parameters > 3.8e10


def test_the_command_prints_a_table(tmp_path, capsys):
    experiment(tmp_path, "TARFlow", TARFLOW)
    assert main(["count", "-c", str(tmp_path / "model.yaml")]) == 0
    printed_text = capsys.readouterr().out
    lines = printed_text.splitlines()
    assert lines[0].split() == ["block", "layers", "labels", "parameters", "pass", "sampling", "cache"]
    assert lines[1].startswith("0 (data)")
    assert lines[2].startswith("1 (noise)")
    printed = {line.split("  ")[0]: line for line in lines if line}
    total = sum(block_parameters(layers, TOKENS - 1) for layers in LAYERS)
    assert f"{total:,}" in printed["parameters"]
    assert "B: weights" in printed["training memory"]
    assert "activations come on top" in " ".join(printed_text.split())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.shape=null", "data.shape: the shape of 'image_folder' is known only once it is read"),
        ("data.dataset=digits", "shape: the catalogue knows shape and classes of 'digits'"),
        ("data.num_classes=null", "conditional=true, but image_folder has no labels"),
    ],
)
def test_what_cannot_be_counted_is_said_in_one_line(tmp_path, capsys, override, message):
    experiment(tmp_path, "TARFlow", TARFLOW)
    overrides = [override, *(["data.num_classes=null"] if override == "data.shape=null" else [])]
    assert main(["count", "-c", str(tmp_path / "model.yaml"), *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_large_model_is_metered_by_its_shapes(tmp_path, monkeypatch):
    """The budget of a model too large for a batch in the host's memory is the same number, counted without one."""
    sections = {"data": {"dataset": "digits", "batch_size": 16}, "trainer": {"accelerator": "cpu"}}
    arguments = {**TARFLOW, "augmentation": {"class_path": "flowbench.families.UniformDequantization"}}
    one = experiment(tmp_path, "TARFlow", arguments, **sections, run={"dir": str(tmp_path / "run")})
    metered = []
    for largest in (10**8, 0):
        monkeypatch.setattr(runs, "COUNTED_ON_DATA", largest)
        metered.append(runs._build(one, training=True).budget.flops_per_step)
    assert metered[0] == metered[1] > 0
