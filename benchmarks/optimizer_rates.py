"""Learning rates of the optimisers, chosen on the validation split: the grid behind experiments/optimizers_digits.yaml.

Every point trains an experiment for a number of steps from one seed and prints the loss on the validation split, with
the averaged weights, and the milliseconds of a step. Choose rates at the length of training that they are meant for.

    OMP_NUM_THREADS=1 python benchmarks/optimizer_rates.py --steps 200        # the tables of docs/results/optimizers.md
    OMP_NUM_THREADS=1 python benchmarks/optimizer_rates.py --experiments cfm --arms adamw swan --steps 1000
"""

from __future__ import annotations

import argparse
import itertools
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from flowbench.config import Experiment
from flowbench.training import NonFiniteLossError

import lightning as L  # isort: skip (after flowbench, whose guard it needs beside some builds of torchvision)

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
RATES = [4e-3, 8e-3, 1.6e-2]
ALPHAS = [0.2, 0.5]
# Class, its own arguments, peak rates, and rates of matrices over them.
ARMS: dict[str, tuple[str, dict[str, int], list[float], list[float | None]]] = {
    "adamw": ("AdamW", {}, [2e-3, *RATES], [None]),
    "sinkgd_1": ("SinkGD", {"iterations": 1}, RATES, [*ALPHAS]),
    "sinkgd_5": ("SinkGD", {"iterations": 5}, RATES, [*ALPHAS]),
    "swan": ("SWAN", {}, RATES, [*ALPHAS]),
    "sgd": ("SGD", {}, RATES[:2], [10.0, 50.0, 250.0]),
}


def grid(arm: str) -> Iterator[tuple[float, float | None, str]]:
    """Rate, alpha and the override that sets them."""
    cls, own, rates, alphas = ARMS[arm]
    for lr, alpha in itertools.product(rates, alphas):
        given = {"lr": lr, "warmup_fraction": 0.1, **own, **({} if alpha is None else {"alpha": alpha})}
        arguments = ", ".join(f"{key}: {value}" for key, value in given.items())
        spec = f"{{_replace_: true, class_path: flowbench.training.{cls}, init_args: {{{arguments}}}}}"
        yield lr, alpha, f"model.init_args.training.optimizer={spec}"


def validation_loss(experiment: str, override: str, steps: int, seed: int) -> tuple[float, float]:
    """Train, and return the loss on the validation split, NaN where the training diverged, and milliseconds a step."""
    common = ["evaluator=null", "loggers=null", "budget=null", f"seed={seed}"]
    built = Experiment.from_files([EXPERIMENTS / "digits" / f"{experiment}.yaml"], [*common, override]).build()
    module, data = built.model, built.datamodule
    module.seed = seed
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    try:
        trainer.fit(module, data)
    except NonFiniteLossError:
        return float("nan"), float("nan")
    seconds = time.perf_counter() - start
    judge = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    (found,) = judge.validate(module, data, verbose=False)
    return found["val/loss"], 1000 * seconds / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", default=["tarflow", "cfm"], help="files of experiments/digits")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--rates", nargs="+", type=float, help="only these of the grid's lr")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    steps, seed = arguments.steps, arguments.seed
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {steps} steps, seed {seed}")
    print("| experiment | arm | lr | alpha | validation loss | ms a step |\n|---|---|---:|---:|---:|---:|")
    for experiment, arm in itertools.product(arguments.experiments, arguments.arms):
        for lr, alpha, override in grid(arm):
            if arguments.rates and lr not in arguments.rates:
                continue
            loss, milliseconds = validation_loss(experiment, override, steps, seed)
            shown = "" if alpha is None else f"{alpha:g}"
            result = "diverged | " if loss != loss else f"{loss:.4f} | {milliseconds:.1f}"
            print(f"| {experiment} | {arm} | {lr:g} | {shown} | {result} |", flush=True)


if __name__ == "__main__":
    main()
