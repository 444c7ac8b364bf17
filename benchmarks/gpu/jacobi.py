"""Where fixed-point iteration overtakes the sequential inverse: by batch, on this device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.setting import Line, Setting, interleaved, median_ratio, milliseconds
from benchmarks.gpu.subjects import built
from flowbench.core.seeds import generator
from flowbench.flows import AutoregressiveFlow, JacobiInverse, SequentialInverse

__all__ = ["measure"]

TOLERANCE = 1e-3
# Blocks of the flow: the crossover is that of one block.
LAYERS = "[4,4]"


def measure(setting: Setting) -> Iterator[Line]:
    """Sequential against Jacobi on a flow trained for some steps, since random weights are too easy."""
    model = built(setting, "tarflow", [] if setting.tiny else [f"model.init_args.layers={LAYERS}"]).model
    flow: AutoregressiveFlow = model.flow
    loss = _train(setting, flow)
    flow.eval()
    for batch in setting.choose([1, 16, 64, 256], [1, 2]):
        rng = generator(0, "jacobi", batch)
        z = torch.randn(batch, 256, 12, generator=rng).to(setting.device)
        found = {}

        def run(name: str, method: object, z: torch.Tensor = z, found: dict = found) -> None:
            with torch.no_grad():
                found[name] = flow.invert(z, None, method=method)  # type: ignore[arg-type]

        methods = {"sequential": SequentialInverse(), "jacobi": JacobiInverse(TOLERANCE)}
        runs = {name: lambda name=name, method=method: run(name, method) for name, method in methods.items()}
        seconds = interleaved(setting, runs, setting.choose(2, 1))
        difference = (found["jacobi"].x - found["sequential"].x).abs().max().item()
        evaluations = found["jacobi"].network_evaluations
        note = f"{evaluations:.1f} passes, largest difference {difference:.1e}, flow trained to {loss:.2f}"
        what = f"Jacobi (residual {TOLERANCE:g} certified), 256 tokens, layers {LAYERS}, batch {batch}"
        ratio = median_ratio(seconds["sequential"], seconds["jacobi"])
        peer = f"sequential {milliseconds(seconds['sequential'])}"
        yield Line(what, milliseconds(seconds["jacobi"]), peer, f"{ratio} times as fast", note)


def _train(setting: Setting, flow: AutoregressiveFlow) -> float:
    """Fit smooth pictures with noise: a flow with structure, in seconds."""
    flow.train()
    optimizer = torch.optim.AdamW(flow.parameters(), lr=5e-4, betas=(0.9, 0.95), fused=True)
    rng = torch.Generator(setting.device).manual_seed(0)
    value = torch.zeros(())
    for _ in range(setting.choose(200, 2)):
        coarse = torch.randn(setting.choose(128, 2), 3, 4, 4, generator=rng, device=setting.device)
        x = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(-1, 1)
        x = x + 0.05 * torch.randn(x.shape, generator=rng, device=setting.device)
        with torch.autocast(setting.device.type, dtype=torch.bfloat16):
            z, logdet = flow(torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2))
            value = 0.5 * z.square().mean() - logdet.mean() / z[0].numel()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
    return float(value.detach())
