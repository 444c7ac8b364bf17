"""Pairs gathered over two processes are those of one."""

from __future__ import annotations

import pytest
import torch
from processes import Outcome, Workplace, matching
from torch import Tensor

from flowbench.core.seeds import generator

STEPS, BATCH, SEED = 5, 32, 5


def experiment(workplace: Workplace, name: str, cls: str = "SpyPairing", **options):
    """Five steps under pairs of three batches of 32: two groups, the second cut short."""
    pairing = {"class_path": f"pairing_spy.{cls}", "init_args": {"oversample": 3, "ahead": 0, **options}}
    trainer = {"max_steps": STEPS, "val_check_interval": STEPS, "limit_val_batches": 1}
    return workplace.write(name, matching("FlowMatching", pairing=pairing), evaluator=None, trainer=trainer)


def two(workplace: Workplace, name: str, **options) -> Outcome:
    folder = workplace.folder / f"{name}-2"
    folder.mkdir()
    path = experiment(workplace, name, **options)
    return workplace.two("fit", "-c", path, f"run.dir={folder}", FLOWBENCH_TEST_PAIRS=str(folder))


def pairs_of(workplace: Workplace, run: str, world_size: int) -> tuple[Tensor, Tensor]:
    """Source and data points of all steps, each process's share after the other's."""
    folder = workplace.folder / run
    parts = [
        torch.load(folder / f"pairs-{n}-{r}.pt", weights_only=True) for n in range(STEPS) for r in range(world_size)
    ]
    return tuple(torch.cat(points) for points in zip(*parts, strict=True))


@pytest.fixture(scope="module")
def one_process(workplace: Workplace) -> tuple[Tensor, Tensor]:
    folder = workplace.folder / "gathered-1"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(__file__.rpartition("/")[0])
        patch.setenv("FLOWBENCH_TEST_PAIRS", str(folder))
        workplace.one("fit", "-c", experiment(workplace, "single"), f"run.dir={folder}")
    return pairs_of(workplace, "gathered-1", 1)


@pytest.mark.slow
def test_gathered_pairs_are_those_of_one_process(workplace, one_process):
    """Invariant 11: one global problem, its answer sent to all; solved in line or by a thread beside."""
    outcome = two(workplace, "gathered", ahead=1)
    assert outcome.status == 0, outcome.stderr
    x0, x1 = pairs_of(workplace, "gathered-2", 2)
    assert torch.equal(x0, one_process[0])
    assert torch.equal(x1, one_process[1])


@pytest.mark.slow
def test_each_process_couples_its_own_share_where_it_is_asked_to(workplace, one_process):
    outcome = two(workplace, "apart", gather=False)
    assert outcome.status == 0, outcome.stderr
    x0, x1 = pairs_of(workplace, "apart-2", 2)
    assert torch.equal(x1, one_process[1])
    for rank in (0, 1):
        noise = torch.randn(3 * BATCH // 2, 1, 8, 8, generator=generator(SEED, "coupling", 0, rank))
        used = torch.cat([x0[BATCH * n + 16 * rank : BATCH * n + 16 * rank + 16] for n in range(3)])
        assert sorted(used.flatten(1).tolist()) == sorted(noise.flatten(1).tolist())


@pytest.mark.slow
def test_a_coupling_that_fails_stops_both_processes(workplace):
    """The one that solves says why; the other does not wait for it."""
    outcome = two(workplace, "failing", cls="FailingPairing")
    assert outcome.status != 0
    assert "no pairs today: give another coupling" in outcome.stderr
