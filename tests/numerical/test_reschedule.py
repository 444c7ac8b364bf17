"""Rescheduled fields against the closed-form Gaussian field of the new path."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowbench.flows.path.affine import CosinePath, LinearPath, TargetConditionalPath
from flowbench.flows.path.base import Path
from flowbench.flows.path.bridge import SchrodingerBridgePath
from flowbench.flows.path.diffusion import VariancePreservingPath
from flowbench.flows.path.reschedule import RescheduledField
from flowbench.flows.solver.fixed_step import RungeKutta4
from tests.marks import slow

from .gaussian_flow import GaussianFlow

PATHS = [
    LinearPath(),
    CosinePath(),
    VariancePreservingPath(),
    VariancePreservingPath(9.0, 9.0),
    TargetConditionalPath(0.1),
]
MEAN = torch.tensor([1.5, -0.5, 0.2], dtype=torch.float64)
every_pair = pytest.mark.parametrize(("trained", "path"), [(p, q) for p in PATHS for q in PATHS], ids=lambda p: repr(p))


def solve(field, x, interval, steps: int = 100):
    return RungeKutta4(steps).solve(field, x, torch.tensor(interval, dtype=torch.float64)).states[-1]


@every_pair
def test_the_field_is_that_of_the_new_path(trained: Path, path: Path):
    flow = GaussianFlow(trained, 1.0, 0.6, MEAN)
    field = RescheduledField(flow, trained, path)
    first, last = field.interval
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = GaussianFlow(path, 1.0, 0.6, MEAN)
    for share in (1e-6, 0.01, 0.3, 0.5, 0.9, 1 - 1e-4):
        t = torch.tensor(first + share * (last - first), dtype=torch.float64)
        torch.testing.assert_close(field(t, x), expected(t, x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("trained", PATHS, ids=repr)
@pytest.mark.parametrize("path", [LinearPath(), slow(CosinePath())], ids=repr)
def test_paths_that_reach_every_ratio_lead_to_the_same_end(trained: Path, path: Path):
    flow = GaussianFlow(trained, 1.0, 0.6, MEAN)
    field = RescheduledField(flow, trained, path)
    z0 = flow.noise(20)
    end = field.finish(solve(field, field.start(z0), field.interval))
    torch.testing.assert_close(end, solve(flow, z0, trained.interval), rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", [VariancePreservingPath(), TargetConditionalPath(0.01)], ids=repr)
def test_elsewhere_the_ends_differ_by_what_the_path_itself_neglects(path: Path):
    flow = GaussianFlow(LinearPath(), 1.0, 0.6, MEAN)
    field = RescheduledField(flow, LinearPath(), path)
    assert field.interval == path.interval
    z0 = flow.noise(20)
    end = field.finish(solve(field, field.start(z0), field.interval))
    # A trace of the data in the source (0.0066), or of the source in the data (0.01).
    torch.testing.assert_close(end, solve(flow, z0, (0.0, 1.0)), rtol=0, atol=0.05)


def test_a_trained_diffusion_is_followed_from_its_own_start_to_its_own_end():
    field = RescheduledField(lambda t, x: x, VariancePreservingPath(), LinearPath())
    first, last = field.interval
    # alpha / sigma of the diffusion: 0.0066 at its start, 1 / sqrt(1e-6) just before its end (noise rate 0.1).
    assert first == pytest.approx(0.0066 / 1.0066, rel=0.01)
    assert 1 - last == pytest.approx(1e-3, rel=0.01)
    assert field.start_scale == pytest.approx(1 - first, abs=1e-4)
    assert field.finish_scale == pytest.approx(1 / last, abs=1e-4)


@pytest.mark.parametrize(("trained", "path"), [(LinearPath(), CosinePath()), (CosinePath(), LinearPath())], ids=repr)
def test_paths_that_begin_in_the_source_and_end_in_the_data_need_no_scaling(trained: Path, path: Path):
    flow = GaussianFlow(trained, 1.0, 0.6, MEAN)
    field = RescheduledField(flow, trained, path)
    assert field.interval == (0, 1)
    clock = field.trained_time(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(clock, torch.tensor([0, 0.5, 1], dtype=torch.float64))  # both are symmetric
    third = torch.tensor(1 / 3, dtype=torch.float64)
    expected = {
        LinearPath: math.tan(math.pi / 6) / (1 + math.tan(math.pi / 6)),
        CosinePath: math.atan(0.5) * 2 / math.pi,
    }
    assert field.trained_time(third).item() == pytest.approx(expected[type(trained)])
    x = flow.noise(3)
    assert field.start(x) is x
    assert field.finish(x) is x
    for time in (0.0, 1.0):
        t = torch.tensor(time, dtype=torch.float64)
        torch.testing.assert_close(field(t, x), GaussianFlow(path, 1.0, 0.6, MEAN)(t, x))


def test_a_time_per_sample_and_single_precision():
    flow = GaussianFlow(LinearPath(), 1.0, 0.6, MEAN.float())

    def batched(t, x):
        assert t.dtype == torch.float32
        return torch.stack([flow(s, row) for s, row in zip(t.expand(len(x)), x, strict=True)])

    field = RescheduledField(batched, LinearPath(), CosinePath())
    x, t = flow.noise(4).float(), torch.tensor([0.0, 0.2, 0.7, 1.0])
    together = field(t, x)
    assert together.dtype == torch.float32
    alone = torch.cat([field(s, row[None]) for s, row in zip(t, x, strict=True)])
    torch.testing.assert_close(together, alone)


class Reads(TorchDispatchMode):
    """Counts the values that are read from tensors: ``item``, ``bool``, ``float``; on a GPU each waits for it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@every_pair
@pytest.mark.parametrize("size", [(), (4,)], ids=["one time", "a time per sample"])
def test_no_value_is_read_back_from_the_device(trained: Path, path: Path, size):
    field = RescheduledField(lambda t, x: x, trained, path)
    t, x = torch.full(size, sum(field.interval) / 2), torch.ones(4, 3)
    with Reads() as reads:
        field.finish(field(t, field.start(x)))
    assert reads.count == 0
    with Reads() as reads:
        bool((t > 0).any())
    assert reads.count == 1, "the counter counts"


def test_a_whole_solve_reads_nothing_back():
    """Tensors on the meta device have no values to read."""
    field = RescheduledField(lambda t, x: x, LinearPath(), CosinePath())
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.ones((), device="meta"))
    assert solve(field, torch.ones(4, 3, device="meta"), field.interval, 5).is_meta


def test_what_cannot_be_rescheduled_is_refused_in_one_line():
    class Unknown(LinearPath):
        def _time_of_log_snr(self, log_snr):
            return Path._time_of_log_snr(self, log_snr)

    flow = GaussianFlow(LinearPath(), 1.0, 0.6, MEAN)
    early, late = VariancePreservingPath(1e-4, 1e-4), TargetConditionalPath(0.9)
    for trained, path, message in [
        (LinearPath(), SchrodingerBridgePath(1.0), "no signal-to-noise ratio: use a path without noise"),
        (LinearPath(0.1), LinearPath(), r"LinearPath\(sigma=0.1\) adds noise"),
        (LinearPath(), Unknown(), "no closed form"),
        (late, early, "share no signal-to-noise ratio"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            RescheduledField(flow, trained, path)
        assert "\n" not in str(error.value)
