"""The flows that are timed: as the shipped CIFAR-10 files build them, on pictures of noise, beside Apple's TARFlow."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.gpu.setting import Setting
from flowbench.config import Built, Experiment

__all__ = ["BATCH", "TARFLOW", "built", "experiment", "peer_tarflow", "perturb"]

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments" / "cifar10" / "gpu"
BATCH = {"tarflow": 256, "cfm": 128}
# Blocks, layers of each, width: those of tarflow.yaml, and of a dry run.
TARFLOW = {False: (8, 4, 256), True: (2, 1, 64)}
_SMALL = {
    "tarflow": ["model.init_args.layers=[1,1]", "model.init_args.width=64"],
    "cfm": [
        "model.init_args.network.init_args.channels=8",
        "model.init_args.network.init_args.num_res_blocks=1",
        "model.init_args.network.init_args.num_heads=1",
    ],
}


def pictures(setting: Setting, side: int = 32) -> Path:
    """A file of square pictures of noise, in CIFAR-10's shape: speed does not depend on what they show."""
    path = setting.folder / f"noise{side}.npz"
    if not path.is_file():
        count = setting.choose(5000, 40)
        values = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
        np.savez(path, x=values, y=np.arange(count) % 10)
    return path


def experiment(setting: Setting, name: str, overrides: Sequence[str] = ()) -> Experiment:
    """A shipped CIFAR-10 experiment on pictures of noise, on the setting's device, without evaluator and loggers."""
    batch = setting.choose(BATCH[name], 4)
    device = "gpu" if setting.device.type == "cuda" else "cpu"
    common = [
        "data.dataset=npz",
        f"data.path={pictures(setting)}",
        "data.random_flip=false",
        "data.train_on_val=false",
        f"data.batch_size={batch}",
        "evaluator=null",
        "loggers=null",
        "requires=null",
        f"trainer.accelerator={device}",
        "budget.steps=1000000",
        f"run.dir={setting.folder / 'run'}",
    ]
    small = _SMALL[name] if setting.tiny else []
    return Experiment.from_files([EXPERIMENTS / f"{name}.yaml"], [*common, *small, *overrides])


def built(setting: Setting, name: str, overrides: Sequence[str] = ()) -> Built:
    """The same, built, with output layers that are not zero."""
    found = experiment(setting, name, overrides).build()
    perturb(found.model)
    found.model.to(setting.device)
    return found


def perturb(module: nn.Module) -> None:
    """Move zero-initialised layers a little: zeros make iterations too easy, eight strong random blocks overflow."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.002)


def peer_tarflow(setting: Setting) -> nn.Module | None:
    """Apple's TARFlow of the same shape, where its checkout is given."""
    if setting.reference is None:
        return None
    spec = importlib.util.spec_from_file_location("tarflow_reference", setting.reference / "transformer_flow.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"no transformer_flow.py in {setting.reference}; give a checkout of ml-tarflow")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    blocks, layers, width = TARFLOW[setting.tiny]
    model: nn.Module = module.Model(3, 32, 2, width, blocks, layers)
    perturb(model)
    return model.to(setting.device)
