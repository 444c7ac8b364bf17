"""Sharded weights train, sample and travel in checkpoints as whole ones do."""

from __future__ import annotations

import shutil

import pytest
import torch
from processes import SHARDED, TARFLOW, Workplace, matching
from test_ddp import assert_finished, assert_same_measurements
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from flowbench.cli import main
from flowbench.data import Batch, DataSpec
from flowbench.families import Condition, TARFlow
from flowbench.training import count_flops
from flowbench.training.ema import ExponentialMovingAverage
from flowbench.training.parallel import gathered, shard

SPEC = DataSpec("x", "1", (1, 8, 8), 3, 256)
NOISY = {"augmentation": {"class_path": "flowbench.families.GaussianNoise", "init_args": {"std": 0.05}}}
TWEEDIE = {"denoiser": {"class_path": "flowbench.families.Tweedie"}}


def noisy(model: dict) -> dict:
    return {**model, "init_args": {**model["init_args"], **NOISY, **TWEEDIE}}


# ---- one process, whose shard is the whole: everything but the communication ---------------------------


@pytest.fixture(scope="module")
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def flow(**options) -> TARFlow:
    """With weights that do something: the output layers of a new flow are zero."""
    torch.manual_seed(0)
    module = TARFlow(SPEC, layers=[2, 1], width=16, head_dim=8, patch_size=4, conditional=True, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


def sharded_flow(mesh, **options) -> TARFlow:
    module = flow(**options)
    shard([module.flow], mesh, module.parameters())
    return module


X, LABEL = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_layers_are_units_inside_blocks_inside_the_flow(mesh):
    module = sharded_flow(mesh)
    units = [name for name, part in module.named_modules() if isinstance(part, FSDPModule)]
    layers = ["flow.blocks.0.network.blocks.0", "flow.blocks.0.network.blocks.1", "flow.blocks.1.network.blocks.0"]
    assert sorted(units) == sorted(["flow", "flow.blocks.0", "flow.blocks.1", *layers])
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    assert module.checkpoint_identity == flow().checkpoint_identity


@pytest.mark.parametrize("every", [0, 1])
def test_loss_and_gradients_are_those_of_whole_weights(mesh, every):
    plain, module = flow(), sharded_flow(mesh, checkpoint_every=every)
    losses = [m.loss(X, Condition(LABEL), Batch(X), torch.Generator()).total for m in (plain, module)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, one), two in zip(plain.named_parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(whole(two.grad), one.grad, msg=name)
        assert one.grad.abs().sum() > 0, name


def test_the_state_of_the_flow_stays_float32_under_autocast(mesh):
    module = sharded_flow(mesh)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, logdet = module.flow(module._tokens(X), LABEL)
    assert z.dtype == logdet.dtype == torch.float32


def test_samples_and_densities_are_those_of_whole_weights(mesh):
    plain, module = flow(), sharded_flow(mesh)
    with plain.evaluating(), module.evaluating():
        pairs = [(m.sample(X, LABEL.clamp(max=2)).x, m.log_prob(X, LABEL)) for m in (plain, module)]
    for one, two in zip(*pairs, strict=True):
        torch.testing.assert_close(two, one)
    # Afterwards the weights are sharded again, and the flow trains.
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    module.loss(X, Condition(LABEL), Batch(X), torch.Generator()).total.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_weights_are_sharded_again_after_an_error(mesh):
    module = sharded_flow(mesh)
    with pytest.raises(RuntimeError), gathered(module):
        assert not any(isinstance(parameter, DTensor) for parameter in module.parameters())
        raise RuntimeError
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())


def test_the_average_follows_a_module_that_is_sharded_later(mesh):
    plain, module = flow(), flow()
    averages = [ExponentialMovingAverage(m, 0.9) for m in (plain, module)]
    shard([module.flow], mesh)
    for m, average in zip((plain, module), averages, strict=True):
        with torch.no_grad():
            for parameter in m.parameters():
                parameter.mul_(1.5)
        average.update()
    states = [average.state_dict()["shadow"] for average in averages]
    for name, value in states[0].items():
        assert type(states[1][name]) is torch.Tensor
        torch.testing.assert_close(states[1][name], value)
    before = [whole(parameter).clone() for parameter in module.parameters()]
    with plain.evaluating("raw"), averages[0].applied(), averages[1].applied(), gathered(module):
        torch.testing.assert_close(module.log_prob(X, LABEL), plain.log_prob(X, LABEL))
    for old, parameter in zip(before, module.parameters(), strict=True):
        assert torch.equal(whole(parameter), old)
    averages[1].load_state_dict(averages[0].state_dict())
    torch.testing.assert_close(averages[1].state_dict()["shadow"], states[0], rtol=0, atol=0)


def test_parameters_beside_the_called_modules_are_refused(mesh):
    module = flow()
    module.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"cannot be sharded.*trainer\.strategy=ddp"):
        shard([module.flow], mesh, module.parameters())


def test_a_shard_is_counted_as_the_whole(mesh):
    losses = [
        lambda m=m: m.loss(X, Condition(LABEL), Batch(X), torch.Generator()).total for m in (flow(), sharded_flow(mesh))
    ]
    assert count_flops(losses[0]) == count_flops(losses[1]) > 0


@pytest.mark.parametrize(
    "strategy", ["fsdp", "deepspeed_stage_2", "{class_path: lightning.pytorch.strategies.ModelParallelStrategy}"]
)
def test_other_ways_of_sharding_are_refused_in_one_line(workplace, capsys, strategy):
    path = workplace.write("refused", TARFLOW, evaluator=None)
    words = ["fit", "-c", str(path), f"run.dir={workplace.folder / 'refused'}", f"trainer.strategy={strategy}"]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "set trainer.strategy={class_path: flowbench.training.FullyShardedStrategy}" in line


# ---- two processes, as a user starts them -------------------------------------------------------------


def assert_same_training(one: dict, two: dict, **tolerance: float) -> None:
    """Weights, averages and the optimiser's moments, and in plain tensors."""
    pairs = [(one["state_dict"], two["state_dict"]), (one["ema"]["shadow"], two["ema"]["shadow"])]
    first, second = one["optimizer_states"][0], two["optimizer_states"][0]
    assert [group["params"] for group in first["param_groups"]] == [g["params"] for g in second["param_groups"]]
    pairs += [(first["state"][i], second["state"][i]) for i in first["state"]]
    for left, right in pairs:
        for name, value in left.items():
            assert type(right[name]) is type(value)
            torch.testing.assert_close(right[name], value, msg=str(name), **tolerance)


@pytest.mark.slow
def test_sharded_training_gives_the_weights_of_one_process(workplace: Workplace):
    path = workplace.write("sharded", TARFLOW, evaluator=None)
    outcome = workplace.two("fit", "-c", path, f"run.dir={workplace.folder / 'sharded-2'}", strategy=SHARDED)
    assert outcome.status == 0, outcome.stderr
    workplace.one("fit", "-c", path, f"run.dir={workplace.folder / 'sharded-1'}")
    one, two = workplace.checkpoint("sharded-1"), workplace.checkpoint("sharded-2")
    assert one["ema"]["num_updates"] == two["ema"]["num_updates"] == 6
    assert_same_training(one, two, rtol=1e-5, atol=1e-5)
    assert one["state_dict"]["flow.blocks.0.network.out.weight"].abs().max() > 0.01  # it began at zero


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flow", "matching"])
def test_sharded_training_measures_and_samples_as_replicas_do(workplace: Workplace, name):
    model = noisy(TARFLOW) if name == "flow" else matching("FlowMatching", conditional=True)
    path = workplace.write(f"{name}-s", model)
    outcome = workplace.two("fit", "-c", path, "--test", f"run.dir={workplace.folder / name}-s2", strategy=SHARDED)
    assert_finished(workplace, f"{name}-s2", outcome)
    assert_same_measurements(workplace, f"{name}-s2")
    replicas = workplace.two("fit", "-c", path, f"run.dir={workplace.folder / name}-d2")
    assert replicas.status == 0, replicas.stderr
    assert_same_training(workplace.checkpoint(f"{name}-d2"), workplace.checkpoint(f"{name}-s2"), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_sharded_run_stops_at_nan_and_goes_on_sharded_or_whole(workplace: Workplace):
    path = workplace.write("halted", {**TARFLOW, "class_path": "ddp_dummies.PoisonedTARFlow"}, evaluator=None)
    runs = {name: workplace.folder / f"halted-{name}" for name in ("sharded", "whole", "straight")}
    command = ("fit", "-c", path)
    outcome = workplace.two(*command, f"run.dir={runs['sharded']}", strategy=SHARDED, FLOWBENCH_TEST_POISON="1")
    assert outcome.status == 1
    assert "the loss became nan at step 2" in outcome.stderr
    assert workplace.checkpoint("halted-sharded")["global_step"] == 2
    (runs["whole"] / "checkpoints").mkdir(parents=True)
    shutil.copy(workplace.last("halted-sharded"), workplace.last("halted-whole"))
    assert workplace.two(*command, f"run.dir={runs['sharded']}", strategy=SHARDED).status == 0
    assert workplace.two(*command, f"run.dir={runs['straight']}", strategy=SHARDED).status == 0
    workplace.one(*command, f"run.dir={runs['whole']}")
    straight = workplace.checkpoint("halted-straight")
    assert_same_training(straight, workplace.checkpoint("halted-sharded"), rtol=0, atol=0)
    assert_same_training(straight, workplace.checkpoint("halted-whole"), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_sharded(workplace: Workplace):
    """The optimiser's groups number parameters in another order than the model does."""
    path = workplace.write("handed", {**TARFLOW, "class_path": "ddp_dummies.PoisonedTARFlow"}, evaluator=None)
    half, on = workplace.folder / "handed-1", workplace.folder / "handed-2"
    outcome = workplace.two("fit", "-c", path, f"run.dir={half}", FLOWBENCH_TEST_POISON="1")
    assert outcome.status == 1
    (on / "checkpoints").mkdir(parents=True)
    shutil.copy(workplace.last("handed-1"), workplace.last("handed-2"))
    assert workplace.two("fit", "-c", path, f"run.dir={on}", strategy=SHARDED).status == 0
    assert workplace.two("fit", "-c", path, f"run.dir={half}").status == 0
    assert_same_training(workplace.checkpoint("handed-1"), workplace.checkpoint("handed-2"), rtol=1e-5, atol=1e-5)
