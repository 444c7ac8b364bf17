"""Training steps of compiled networks against the same without `torch.compile`."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu.setting import Line, Setting, interleaved, median_ratio, milliseconds
from benchmarks.gpu.training import PRECISIONS, lightning_steps

__all__ = ["measure"]


# Fewer blocks than shipped: each is compiled by itself, and the ratio of their times is that of all.
SHORT = {"tarflow": "model.init_args.layers=[4,4]", "cfm": "model.init_args.network.init_args.num_res_blocks=1"}


def measure(setting: Setting) -> Iterator[Line]:
    """Milliseconds of a step of both kinds of flow in bfloat16."""
    for name in SHORT:
        yield _compared(setting, name)


def _compared(setting: Setting, name: str) -> Line:
    steps, rounds = setting.choose((20, 3), (1, 1))
    overrides = [*PRECISIONS["bf16"], *([] if setting.tiny else [SHORT[name]])]
    runs = {
        "compiled": lightning_steps(setting, name, [*overrides, "model.init_args.training.compile=true"], steps),
        "plain": lightning_steps(setting, name, overrides, steps),
    }
    seconds = interleaved(setting, runs, rounds)
    ratio = median_ratio(seconds["compiled"], seconds["plain"])
    plain = f"plain {milliseconds(seconds['plain'], steps)}"
    what = f"training step, {name}, {SHORT[name].rpartition('.')[2]}, bf16, compiled"
    return Line(what, milliseconds(seconds["compiled"], steps), plain, ratio)
