"""Weights that other code released, scored through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowbench.cli import main
from flowbench.cli.data_commands import COMMANDS
from flowbench.cli.parser import make_parser
from flowbench.core.rows import read_rows
from flowbench.families.released import LAYOUTS

WIDTH, TOKENS, DIM = 64, 4, 16

EXPERIMENT = """
data: {dataset: digits, batch_size: 16}
model:
  class_path: flowbench.families.TARFlow
  init_args:
    {layers: [1, 1], width: 64, head_dim: 64, patch_size: 4, conditional: true, training: {ema: {decay: 0.9}}}
trainer: {accelerator: cpu, devices: 1}
budget: {steps: 6}
evaluator:
  num_samples: 40
  metrics:
    fd: {class_path: flowbench.evaluation.FrechetDistance, init_args: {features: identity}}
    nll: {class_path: flowbench.tasks.generation.NegativeLogLikelihood}
    cost: {class_path: flowbench.evaluation.CostReport}
"""


def identity_flow() -> dict[str, torch.Tensor]:
    """A file in the layout of apple/ml-tarflow whose output layers are zero: its flow is the identity."""
    state = {"var": torch.ones(TOKENS, DIM)}
    for block in range(2):
        shapes = {
            "proj_in": (WIDTH, DIM),
            "proj_out": (2 * DIM, WIDTH),
            "attn_blocks.0.attention.qkv": (3 * WIDTH, WIDTH),
            "attn_blocks.0.attention.proj": (WIDTH, WIDTH),
            "attn_blocks.0.mlp.main.0": (4 * WIDTH, WIDTH),
            "attn_blocks.0.mlp.main.2": (WIDTH, 4 * WIDTH),
        }
        own = {f"{name}.weight": 0.1 * torch.randn(shape) for name, shape in shapes.items()}
        own |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}
        for part in ("attention", "mlp"):
            own |= {f"attn_blocks.0.{part}.norm.weight": torch.ones(WIDTH)}
            own |= {f"attn_blocks.0.{part}.norm.bias": torch.zeros(WIDTH)}
        own |= {"pos_embed": torch.randn(TOKENS, WIDTH), "class_embed": torch.randn(10, 1, WIDTH)}
        own["proj_out.weight"] = torch.zeros(2 * DIM, WIDTH)
        state |= {f"blocks.{block}.{name}": value for name, value in own.items()}
    return state


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(EXPERIMENT)
    torch.save(identity_flow(), tmp_path / "theirs.pth")
    return tmp_path


EVALUATE = ["evaluate", "--ckpt", "theirs.pth", "--format", "tarflow", "-c", "x.yaml"]


def test_a_released_file_gets_the_rows_of_everybody_but_what_training_cost(capsys):
    assert main(EVALUATE) == 0
    rows = {row.metric: row for row in read_rows("runs/theirs/rows.jsonl")}
    assert {"fd[identity]", "nll", "parameters", "samples_per_second", "network_evaluations"} <= set(rows)
    assert not {"train_flops", "train_seconds", "samples_seen", "flop_utilisation"} & set(rows)
    row = rows["nll"]
    assert (row.contender, row.family, row.weights, row.status) == ("theirs", "TARFlow", "raw", "ok")
    # The identity: the density is the standard normal's, of digits of 17 levels that lie in [-1, 1].
    from flowbench.data import FlowDataModule

    x = FlowDataModule("digits").model_values("test", slice(None))
    nats = (0.5 * (x.double() ** 2 + torch.log(torch.tensor(2 * torch.pi)))).flatten(1).sum(1).mean()
    bits = (nats / 64 - torch.log(torch.tensor(2 / 17))) / torch.log(torch.tensor(2.0))
    assert row.value == pytest.approx(float(bits), abs=0.01)  # up to the place in the bins
    assert "theirs" in capsys.readouterr().out


def test_the_same_file_again_replaces_its_rows_and_another_one_sets_them_aside():
    assert main(EVALUATE) == 0
    assert main(EVALUATE) == 0
    assert not Path("runs/theirs/before").exists()
    other = identity_flow()
    other["blocks.0.proj_out.bias"] += 0.1
    torch.save(other, "theirs.pth")
    assert main(EVALUATE) == 0
    assert len(list(Path("runs/theirs/before").iterdir())) == 1


def test_a_trained_runs_folder_is_refused(capsys):
    folder = Path("runs/theirs")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    assert main(EVALUATE) == 2
    assert "holds a trained run" in capsys.readouterr().err
    assert main([*EVALUATE, "--name", "stranger"]) == 0
    assert Path("runs/stranger/rows.jsonl").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "-c", "x.yaml"], "needs either of --samples and --ckpt"),
        ([*EVALUATE, "--samples", "s.npz"], "needs one of --samples and --ckpt"),
        (["evaluate", "--ckpt", "theirs.pth", "--format", "tarflow"], "--ckpt needs -c FILE"),
        (["evaluate", "--ckpt", "theirs.pth", "-c", "x.yaml"], "--ckpt needs -c FILE, which says"),
        (["evaluate", "--samples", "s.npz", "--data", "digits", "--format", "tarflow"], "--format goes with --ckpt"),
        ([*EVALUATE, "--num-samples", "5"], "give evaluator.num_samples=N"),
        ([*EVALUATE, "--bench", "runs/b"], "--bench does not go with --ckpt"),
        ([*EVALUATE, "--features", "inception"], "--features goes with --data"),
        ([*EVALUATE, "model.init_args.width=128"], "width 64, here 128"),
    ],
)
def test_what_does_not_go_together_is_one_line(capsys, words, message):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("runs").exists() or not list(Path("runs").glob("*/rows.jsonl"))


def test_the_option_names_all_layouts():
    parser = make_parser("evaluate", COMMANDS["evaluate"])
    (option,) = [action for action in parser._actions if action.dest == "format"]
    assert set(option.choices) == set(LAYOUTS)
