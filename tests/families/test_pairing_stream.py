"""Pairs of several batches at once: a function of the seed and the group, whoever solves and when."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from flowbench.core.seeds import generator
from flowbench.data import Batch, FlowDataModule
from flowbench.families.pairing.job import CouplingJob, solve
from flowbench.families.pairing.stream import StreamPairing
from flowbench.flows import OptimalTransportCoupling

from ..contract.builders import build
from ..training.test_training import trainer

SIZE = 16


def points(seed: int = 4) -> FlowDataModule:
    return FlowDataModule("eight_gaussians", batch_size=SIZE, seed=seed)


def flow_for(data: FlowDataModule, pairing: StreamPairing | None = None, **options):
    flow = build("cfm", data.spec, pairing=pairing, **options)
    flow.seed = data.seed
    return flow


def pairs_of(pairing: StreamPairing, data: FlowDataModule, batches, **options):
    """x0 and x1 of some batches of the stream."""
    flow, rng = flow_for(data, **options), torch.Generator().manual_seed(0)
    pairing.setup(flow.pairing_context, data)
    found = []
    for number in batches:
        batch = data.train_batch_at(number * SIZE)
        label = batch.label if flow.num_classes else None
        found.append(pairing.pairs(flow.pairing_context, batch.x, label, batch, rng))
    return found


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
            pairing.setup(flow.pairing_context, data)
        batch = Batch(x, index=torch.arange(SIZE))
        assert torch.equal(
            pairing.pairs(flow.pairing_context, x, None, batch, torch.Generator().manual_seed(1)).x0, expected
        )
    pairing.close()
    assert (
        pairing.pairs(flow.pairing_context, x, None, data.train_batch_at(0), torch.Generator().manual_seed(1)).x0.shape
        == x.shape
    )


def test_what_is_logged():
    data = points()
    found = pairs_of(StreamPairing(oversample=2, ahead=0), data, range(2))[1].diagnostics()
    assert found["effective_batch"] == 2 * SIZE
    assert 0 < found["cost_ratio"] < 1
    assert 0 < found["coupling_ms"] <= found["coupling_wait_ms"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"oversample": 0}, "oversample must be a whole number in .*, got 0"),
        ({"ahead": -1}, "ahead must"),
        ({"workers": 0}, r"workers must be a whole number in \[1, 1\], got 0: each needs one of the ahead=1 groups"),
        ({"workers": 3, "ahead": 2}, "workers must"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StreamPairing(**options)


def test_without_a_stream_there_is_nothing_to_look_ahead_in():
    with pytest.raises(ValueError, match="needs the stream of a FlowDataModule, got NoneType"):
        StreamPairing().setup(flow_for(points()).pairing_context, None)


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


# ---- the threads beside the training -------------------------------------------------------------------


class Watched(OptimalTransportCoupling):
    """Notes the threads that it is called in, and waits there for permission."""

    def __init__(self, refused: float | None = None) -> None:
        self.threads: list[str] = []
        self.may_go = threading.Event()
        self.may_go.set()
        self.is_asked = threading.Event()
        self.refused = refused

    def _pair(self, x0, x1, generator, condition):
        self.threads.append(threading.current_thread().name)
        self.is_asked.set()
        assert self.may_go.wait(60)
        if self.refused is not None and len(self.threads) > self.refused:
            raise ValueError("no more points are coupled")
        return super()._pair(x0, x1, generator, condition)


def of_the_pool() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("flowbench-coupling")]


@pytest.mark.parametrize(("ahead", "workers"), [(1, 1), (4, 1), (4, 2)])
def test_pairs_are_the_same_when_they_are_solved_ahead(ahead, workers):
    watched = Watched()
    in_line = pairs_of(StreamPairing(oversample=2, ahead=0), points(), range(3, 12))
    pairing = StreamPairing(watched, oversample=2, ahead=ahead, workers=workers)
    ahead_of_it = pairs_of(pairing, points(), range(3, 12))
    for one, other in zip(in_line, ahead_of_it, strict=True):
        assert torch.equal(one.x0, other.x0)
    pairing._stream.threads.shutdown(wait=True)
    # Groups 1 to 5 once each, the first in line, and `ahead` more: bounded.
    assert [name.startswith("flowbench-coupling") for name in watched.threads] == [False] + [True] * (4 + ahead)


def test_the_training_does_not_wait_for_a_solve_that_it_does_not_need():
    watched = Watched()
    pairing, data = StreamPairing(watched, ahead=2), points()
    flow, rng = flow_for(data), torch.Generator().manual_seed(0)
    pairing.setup(flow.pairing_context, data)
    first, second = (data.train_batch_at(number * SIZE) for number in (0, 1))
    pairing._stream._work_ahead(-1)
    pairing.pairs(flow.pairing_context, first.x, None, first, rng)
    watched.may_go.clear()
    pairing._stream.queued.clear()
    pairing._stream._work_ahead(0)  # returns although nothing may be solved
    ready = pairing._stream.queued[1][1]
    assert not ready.done()
    watched.may_go.set()
    found = pairing.pairs(flow.pairing_context, second.x, None, second, rng)
    assert ready.done()
    assert torch.equal(found.x0, pairs_of(StreamPairing(ahead=0), data, [1])[0].x0)
    pairing.close()


def test_closing_drops_what_is_queued_and_ends_the_threads():
    watched = Watched()
    pairing, data = StreamPairing(watched, ahead=3), points()
    flow, rng = flow_for(data), torch.Generator().manual_seed(0)
    pairing.setup(flow.pairing_context, data)
    batch = data.train_batch_at(0)
    watched.may_go.clear()
    pairing._stream._work_ahead(-1)
    futures = [future for _, future in pairing._stream.queued.values()]
    pool = of_the_pool()
    assert len(pool) == 1
    assert watched.is_asked.wait(60)
    pairing.close()
    assert [future.cancelled() for future in futures[1:]] == [True, True]
    watched.may_go.set()
    pool[0].join(30)
    assert not of_the_pool()
    assert len(watched.threads) == 1
    pairing.close()
    assert pairing.pairs(flow.pairing_context, batch.x, None, batch, rng).x0.shape == batch.x.shape


def test_what_a_thread_is_refused_is_said_when_its_group_comes():
    watched = Watched(refused=2)
    pairing, data = StreamPairing(watched, ahead=1), points()
    assert len(pairs_of(pairing, data, range(2))) == 2
    refused = data.train_batch_at(2 * SIZE)
    with pytest.raises(ValueError, match=r"^no more points are coupled$"):
        pairing.pairs(flow_for(data).pairing_context, refused.x, None, refused, torch.Generator())
    assert watched.threads[2].startswith("flowbench-coupling")
    pairing.close()


def test_solves_leave_every_thread_its_number_of_threads():
    """Two that overlap too: PyTorch's number for threads to come is one for the whole process."""
    before = torch.get_num_threads()
    noise, x1 = torch.randn(2, 40, 3, generator=generator(0))
    job = CouplingJob(noise, x1, None, 0)
    torch.set_num_threads(2)
    slow = Watched()
    slow.may_go.clear()
    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(solve, slow, job, 2)
            assert slow.is_asked.wait(60)
            second = pool.submit(solve, OptimalTransportCoupling(), job, 2).result()
            slow.may_go.set()
            found = first.result()
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)
    assert found.seconds > 0
    assert torch.equal(found.index, second.index)
    assert torch.equal(found.index, OptimalTransportCoupling()(noise, x1, generator(1)))


def test_a_copy_of_a_pairing_shares_no_thread():
    pairing = StreamPairing(oversample=2, ahead=1)
    pairing.setup(flow_for(points()).pairing_context, points())
    other = copy.deepcopy(pairing)
    assert pairing._stream is not None
    assert other._stream is None
    assert repr(other) == repr(pairing)
    pairing.close()
