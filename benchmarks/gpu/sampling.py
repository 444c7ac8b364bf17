"""Drawing samples: token by token against Apple's code, and an ODE solver against a loop over the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.gpu.setting import Line, Setting, interleaved, median_ratio, milliseconds
from benchmarks.gpu.subjects import built, peer_tarflow
from flowbench.evaluation.override import SamplerOverride
from flowbench.families import Condition

__all__ = ["measure"]

PEER = "Apple's"


def measure(setting: Setting) -> Iterator[Line]:
    """Milliseconds a batch and samples a second of both kinds of flow."""
    yield _matching(setting)
    yield from _autoregressive(setting)


@torch.no_grad()
def _autoregressive(setting: Setting) -> Iterator[Line]:
    model = built(setting, "tarflow").model.eval()
    peer = peer_tarflow(setting)
    for number, batch in enumerate(setting.choose([256, 16], [2])):
        noise = torch.randn(batch, 3, 32, 32, device=setting.device)
        runs: dict[str, Callable[[], object]] = {"ours": lambda noise=noise: model.flow_decode(noise, Condition())}  # type: ignore[operator]
        if peer is not None:
            tokens = nn.functional.unfold(noise, 2, stride=2).transpose(1, 2)
            runs[PEER] = lambda tokens=tokens: peer.eval().reverse(tokens)  # type: ignore[operator,misc]
        seconds = interleaved(setting, runs, setting.choose(2, 1), warm_up=number == 0)
        rate = f"{batch / min(seconds['ours']):.0f} samples/s"
        other = f"Apple's {milliseconds(seconds[PEER])}" if peer is not None else ""
        ratio = median_ratio(seconds["ours"], seconds[PEER]) if peer is not None else ""
        what = f"sequential sampling, tarflow, 256 tokens, batch {batch}, float32"
        yield Line(what, milliseconds(seconds["ours"]), other, ratio, rate)


@torch.no_grad()
def _matching(setting: Setting) -> Line:
    model = built(setting, "cfm").model.eval()
    batch, steps = setting.choose((256, 10), (2, 2))
    noise = torch.randn(batch, 3, 32, 32, device=setting.device)

    def loop() -> Tensor:
        """The midpoint rule, written out."""
        x, h = noise, 1.0 / steps
        for index in range(steps):
            t = torch.full((batch,), index * h, device=setting.device)
            middle = x + 0.5 * h * model.network(x, t)
            x = x + h * model.network(middle, t + 0.5 * h)
        return x

    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: model.flow_sample(noise, Condition(), SamplerOverride(2 * steps)),  # type: ignore[operator]
        "loop": loop,
    }
    seconds = interleaved(setting, runs, setting.choose(3, 1))
    ratio, rate = median_ratio(seconds["ours"], seconds["loop"]), f"{batch / min(seconds['ours']):.0f} samples/s"
    what = f"sampling, cfm, midpoint, {2 * steps} evaluations, batch {batch}, float32"
    return Line(what, milliseconds(seconds["ours"]), f"loop {milliseconds(seconds['loop'])}", ratio, rate)
