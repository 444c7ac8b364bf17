"""Pairs of several batches at once: a function of the seed and the group, whoever solves and when."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from flowbench.coupling_worker import CouplingWorker, Problem, solve
from flowbench.data import Batch, FlowDataModule
from flowbench.families.pairing.stream import StreamPairing
from flowbench.flows import OptimalTransportCoupling
from flowbench.seeds import generator

from ..contract.builders import build
from .coupling_dummies import Picky
from .test_training import trainer

SIZE = 16


def points(seed: int = 4) -> FlowDataModule:
    return FlowDataModule("eight_gaussians", batch_size=SIZE, seed=seed)


def flow_for(data: FlowDataModule, pairing: StreamPairing | None = None, **options):
    flow = build("cfm", data.spec, coupling=pairing, **options)
    flow.seed = data.seed
    return flow


def pairs_of(pairing: StreamPairing, data: FlowDataModule, batches, **options):
    """x0 and x1 of some batches of the stream."""
    flow, rng = flow_for(data, **options), torch.Generator().manual_seed(0)
    pairing.setup(flow, data)
    found = []
    for number in batches:
        batch = data.train_batch_at(number * SIZE)
        label = batch.label if flow.num_classes else None
        found.append(pairing.pairs(flow, batch.x, label, batch, rng))
    return found


def until(condition, seconds: float = 60) -> None:
    """Wait for something that is to happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as handle:
        return handle.read().rpartition(")")[2].split()[0] != "Z"


# ---- what is paired -------------------------------------------------------------------------------------


def test_a_group_is_one_exact_problem_over_its_batches():
    data = points()
    found = pairs_of(StreamPairing(oversample=3, ahead=0), data, range(3, 6))
    noise = torch.randn(3 * SIZE, 2, generator=generator(data.seed, "coupling", 1))
    x1 = torch.cat([data.train_batch_at(n * SIZE).x for n in range(3, 6)])
    best = linear_sum_assignment(torch.cdist(x1.double(), noise.double()).square().numpy())[1]
    torch.testing.assert_close(torch.cat([pairs.x0 for pairs in found]), noise[best], rtol=0, atol=0)
    assert torch.equal(torch.cat([pairs.x1 for pairs in found]), x1)


def test_the_noise_of_a_group_is_permuted_and_otherwise_as_drawn():
    data = points()
    for group in (0, 2):
        found = pairs_of(StreamPairing(oversample=4, ahead=0), data, range(4 * group, 4 * group + 4))
        x0 = torch.cat([pairs.x0 for pairs in found])
        noise = torch.randn(4 * SIZE, 2, generator=generator(data.seed, "coupling", group))
        assert not torch.equal(x0, noise)
        assert sorted(x0.tolist()) == sorted(noise.tolist())


def test_larger_problems_make_shorter_pairs():
    def mean_cost(oversample):
        found = pairs_of(StreamPairing(oversample=oversample, ahead=0), points(), range(32))
        return torch.cat([(pairs.x0 - pairs.x1).square().sum(1) for pairs in found]).mean()

    small, large = mean_cost(1), mean_cost(16)
    assert large < 0.97 * small


def test_pairs_do_not_depend_on_where_a_run_begins_or_on_the_order_of_batches():
    whole = pairs_of(StreamPairing(oversample=4, ahead=0), points(), range(12))
    resumed = pairs_of(StreamPairing(oversample=4, ahead=0), points(), range(6, 12))
    jumped = pairs_of(StreamPairing(oversample=4, ahead=0), points(), [9, 2])
    for one, other in zip([*whole[6:], whole[9], whole[2]], [*resumed, *jumped], strict=True):
        assert torch.equal(one.x0, other.x0)
    assert not torch.equal(whole[0].x0, pairs_of(StreamPairing(oversample=4, ahead=0), points(5), [0])[0].x0)


def test_images_are_paired_by_their_bins_centres_and_mirror_images_as_they_are(tmp_path):
    """Half a grey level changes no pair that matters; a mirror image is another point."""
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (48, 1, 4, 4), dtype=np.uint8)
    labels = {f"{split}_label": np.arange(num) % 3 for split, num in (("train", 32), ("val", 8), ("test", 8))}
    np.savez(tmp_path / "x.npz", train=images[:32], val=images[32:40], test=images[40:], **labels)
    data = FlowDataModule("npz", path=str(tmp_path / "x.npz"), batch_size=SIZE, seed=4, random_flip=True)
    found = pairs_of(StreamPairing(oversample=2, ahead=0), data, range(2))
    noise = torch.randn(2 * SIZE, 1, 4, 4, generator=generator(4, "coupling", 0))
    centred = FlowDataModule(
        "npz", path=str(tmp_path / "x.npz"), batch_size=SIZE, seed=4, random_flip=True, dequantize="none"
    )
    x1 = torch.cat([centred.train_batch_at(n * SIZE).x for n in range(2)])
    best = linear_sum_assignment(torch.cdist(x1.flatten(1).double(), noise.flatten(1).double()).square().numpy())[1]
    assert torch.equal(torch.cat([pairs.x0 for pairs in found]), noise[best])
    assert torch.equal(found[1].x1, data.train_batch_at(SIZE).x), "the points themselves stay dequantised"


def test_a_coupling_is_given_the_labels_of_the_group_where_the_flow_has_labels():
    class Watching(OptimalTransportCoupling):
        def __call__(self, x0, x1, generator, condition=None):
            seen.append(condition)
            return super().__call__(x0, x1, generator, condition)

    seen: list = []
    data = points()
    (pairs, _) = pairs_of(StreamPairing(Watching(), oversample=2, ahead=0), data, range(2), conditional=True)
    labels = torch.cat([data.train_batch_at(n * SIZE).label for n in range(2)])
    assert torch.equal(seen[0], labels)
    assert torch.equal(pairs.label, labels[:SIZE])
    pairs_of(StreamPairing(Watching(), oversample=2, ahead=0), data, range(2))
    assert seen[1] is None


def test_outside_of_the_stream_pairs_are_found_inside_the_batch():
    data = points()
    pairing = StreamPairing(oversample=4, ahead=0)
    flow = flow_for(data, pairing)
    x = data.model_values("val", slice(SIZE))
    noise = torch.randn(SIZE, 2, generator=torch.Generator().manual_seed(1))
    expected = noise[OptimalTransportCoupling()(noise, x, torch.Generator())]
    for ready in (False, True):
        if ready:
            pairing.setup(flow, data)
        batch = Batch(x, index=torch.arange(SIZE))
        assert torch.equal(pairing.pairs(flow, x, None, batch, torch.Generator().manual_seed(1)).x0, expected)
    pairing.close()
    assert pairing.pairs(flow, x, None, data.train_batch_at(0), torch.Generator().manual_seed(1)).x0.shape == x.shape


def test_what_is_logged():
    data = points()
    found = pairs_of(StreamPairing(oversample=2, ahead=0), data, range(2))[1].diagnostics()
    assert found["effective_batch"] == 2 * SIZE
    assert 0 < found["cost_ratio"] < 1
    assert 0 < found["coupling_ms"] <= found["coupling_wait_ms"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"oversample": 0}, "oversample must be at least 1, got 0"),
        ({"ahead": -1}, "ahead must"),
        ({"workers": 0}, r"workers must lie in \[1, ahead\], got workers=0 and ahead=1"),
        ({"workers": 3, "ahead": 2}, "workers must"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StreamPairing(**options)


def test_without_a_stream_there_is_nothing_to_look_ahead_in():
    with pytest.raises(ValueError, match="needs the stream of a FlowDataModule, got NoneType"):
        StreamPairing().setup(flow_for(points()), None)


# ---- training -------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_the_uninterrupted_one_inside_a_group(tmp_path):
    def fit(path, resume=None, **options):
        flow = flow_for(points(), StreamPairing(oversample=4, ahead=0))
        run = trainer(tmp_path, max_steps=6, **options)
        run.fit(flow, points(), ckpt_path=resume, weights_only=True)
        run.save_checkpoint(path)
        assert flow.pairing._stream is None, "closed at the end"
        return flow.state_dict()

    start = flow_for(points()).state_dict()
    whole = fit(tmp_path / "whole.ckpt")
    fit(tmp_path / "half.ckpt", limit_train_batches=3, max_epochs=1)
    resumed = fit(tmp_path / "resumed.ckpt", resume=tmp_path / "half.ckpt")
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())
    assert not any(torch.equal(start[name], value) for name, value in whole.items() if "weight" in name)


# ---- the process beside the training -------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker():
    found = CouplingWorker(OptimalTransportCoupling())
    until(lambda: found.ready)
    yield found
    found.stop()


def problem(value: float | None = None, num: int = 40, seed: int = 0) -> Problem:
    rng = torch.Generator().manual_seed(seed)
    noise, x1 = torch.randn(2, num, 3, generator=rng)
    return Problem("group 3", noise, x1 if value is None else torch.full_like(x1, value), None, seed)


def test_a_worker_answers_what_this_process_would(worker):
    problems = [problem(seed=seed) for seed in range(3)]
    answers = [worker.submit(one) for one in problems]
    for one, answer in zip(problems, answers, strict=True):
        assert torch.equal(answer.result(30).index, solve(OptimalTransportCoupling(), one).index)
        assert answer.result().seconds > 0


@pytest.mark.parametrize("ahead", [1, 4])
def test_pairs_are_the_same_when_they_are_solved_ahead(ahead, worker, monkeypatch):
    monkeypatch.setattr("flowbench.families.pairing.stream.CouplingWorker", lambda coupling: worker)
    asked: list[str] = []
    submit = CouplingWorker.submit
    monkeypatch.setattr(worker, "submit", lambda one: (asked.append(one.name), submit(worker, one))[1], raising=False)
    in_line = pairs_of(StreamPairing(oversample=2, ahead=0), points(), range(3, 12))
    ahead_of_it = pairs_of(StreamPairing(oversample=2, ahead=ahead), points(), range(3, 12))
    for one, other in zip(in_line, ahead_of_it, strict=True):
        assert torch.equal(one.x0, other.x0)
    # Groups 1 to 5 were asked for once each, and `ahead` more: bounded.
    assert asked == [f"group {n}" for n in range(1, 6 + ahead)]


@dataclass
class Recorder:
    """A worker's clerk: notes what it is given and passes it on."""

    worker: CouplingWorker
    asked: list[str] = field(default_factory=list)
    stopped: bool = False
    ready: bool = True

    def submit(self, one: Problem):
        self.asked.append(one.name)
        return self.worker.submit(one)

    def stop(self) -> None:
        self.stopped = True


def test_workers_take_the_groups_in_turn(worker, monkeypatch):
    clerks: list[Recorder] = []

    def clerk(coupling):
        clerks.append(Recorder(worker))
        return clerks[-1]

    monkeypatch.setattr("flowbench.families.pairing.stream.CouplingWorker", clerk)
    in_line = pairs_of(StreamPairing(ahead=0), points(), range(5))
    pairing = StreamPairing(ahead=3, workers=2)
    shared = pairs_of(pairing, points(), range(5))
    for one, other in zip(in_line, shared, strict=True):
        assert torch.equal(one.x0, other.x0)
    assert [one.asked for one in clerks] == [[f"group {n}" for n in turn] for turn in ((0, 2, 4, 6), (1, 3, 5, 7))]
    pairing.close()
    assert all(one.stopped for one in clerks)


def test_a_worker_says_what_went_wrong_and_its_death_is_one_clear_error(monkeypatch):
    """It is up, refuses, fails, and dies; a pairing then says so at the next group."""
    found = CouplingWorker(Picky())
    assert found.submit(problem()).result(60).index.sort().values.tolist() == list(range(40))
    with pytest.raises(ValueError, match=r"^sevens are not coupled: give other points$"):
        found.submit(problem(7)).result(30)
    with pytest.raises(RuntimeError, match=r"^the coupling failed: KeyError: 'eight'$"):
        found.submit(problem(8)).result(30)
    with pytest.raises(RuntimeError) as caught:
        found.submit(problem(9)).result(30)
    message = str(caught.value)
    assert "ended with exit status -9 while it solved group 3 (40 points): lower oversample" in message
    assert "\n" not in message

    monkeypatch.setattr("flowbench.families.pairing.stream.CouplingWorker", lambda coupling: found)
    with pytest.raises(RuntimeError, match="ended with exit status -9"):
        pairs_of(StreamPairing(ahead=1), points(), [0])
    found.stop()
    found.stop()
    assert not alive(found.pid)


def test_a_copy_of_a_pairing_shares_no_process():
    pairing = StreamPairing(oversample=2, ahead=0)
    pairing.setup(flow_for(points()), points())
    other = copy.deepcopy(pairing)
    assert pairing._stream is not None
    assert other._stream is None
    assert repr(other) == repr(pairing)


PARENT = """
import sys, time
sys.path.insert(0, {root!r})
import torch
from flowbench.coupling_worker import CouplingWorker, Problem
from tests.families.coupling_dummies import Slow
if __name__ == "__main__":
    worker = CouplingWorker(Slow())
    worker.submit(Problem("a group", torch.zeros(4, 2), torch.zeros(4, 2), None, 0))
    while not worker.ready: time.sleep(0.02)
    time.sleep(0.2)
    print(worker.pid, flush=True)
    {then}
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", ["killed", "interrupted", "finished"])
def test_no_worker_outlives_its_parent(end, tmp_path):
    """However it ends: in the middle of a solve too."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(root=root, then="pass" if end == "finished" else "time.sleep(100)"))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    if end != "finished":
        assert alive(pid)
        process.send_signal(signal.SIGKILL if end == "killed" else signal.SIGINT)
    process.wait(30)
    until(lambda: not alive(pid), 10)
