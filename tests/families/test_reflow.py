"""Reflow: the pairs a teacher makes, where they are kept, and what training on them does."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from flowbench.config import Experiment
from flowbench.core.seeds import indexed_normal
from flowbench.data import FlowDataModule
from flowbench.evaluation.prospect import Prospect
from flowbench.families import FlowMap, FlowMatching
from flowbench.families.conditioning.condition import Condition
from flowbench.families.pairing.pair_store import PairStore, weights_checksum
from flowbench.families.reflow import Reflow, ReflowPairing
from flowbench.flows import DataObjective, Euler, Midpoint, PointTimes
from flowbench.metrics import wasserstein2
from flowbench.metrics.straightness import path_geometry
from flowbench.networks import MLP
from flowbench.tasks.generation.map_error import MapError
from flowbench.training import OptimizerConfig, Preparation, TrainingConfig
from flowbench.training.count import forward_flops
from tests.closeness import assert_near

from ..contract.builders import POINTS, build, perturb
from ..training.test_training import trainer
from .teachers import LABELLED, MEAN, PLANE, STD, gaussian_teacher

NETWORK = partial(MLP, width=16, depth=2)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pairs"


def plane(num: int = 200, labels: bool = False, **options) -> FlowDataModule:
    """Anything in the plane: reflow does not look at it."""
    return FlowDataModule("eight_gaussians", batch_size=16, **options)


def student(teacher, spec=PLANE, **options) -> Reflow:
    torch.manual_seed(0)
    options = {"num_pairs": 100, "initialise_from_teacher": False, **options}
    flow = Reflow(spec, NETWORK, teacher=teacher, **options)
    perturb(flow)
    return flow


def pairs_at(flow, data, position=0, label=None, split="train"):
    if split == "train":
        batch = data.train_batch_at(position)
    else:
        batch = next(iter(data.val_dataloader()))
    return flow.pairing.pairs(flow.pairing_context, batch.x, label, batch, torch.Generator())


# ---- the pairs ------------------------------------------------------------------------------------------


def test_pairs_are_noise_by_index_and_where_the_teacher_carries_it(cache):
    flow, data = student(gaussian_teacher()), plane()
    flow.pairing.setup(flow.pairing_context, data)
    noise = indexed_normal(range(100), (2,), 0, "reflow")
    seen = [pairs_at(flow, data, 16 * n) for n in range(6)]
    x0, x1 = torch.cat([p.x0 for p in seen]), torch.cat([p.x1 for p in seen])
    assert_near(x1, MEAN + STD * x0)
    # One epoch is every training pair once, in an order of its own; 95 of 100 are for training.
    assert sorted(x0[:95].tolist()) == sorted(noise[:95].tolist())
    assert not torch.equal(x0[:16], noise[:16])
    held_out = pairs_at(flow, data, split="val")
    assert {tuple(row) for row in held_out.x0.tolist()} == {tuple(row) for row in noise[95:].tolist()}


def test_a_later_process_describes_the_pairs_that_were_trained_on(cache):
    """Before anything is set up, as in `flowbench test`: the map is monotone, and its pairs cheaper than drawn ones."""
    data, trained = plane(), student(gaussian_teacher(), num_pairs=2000, hold_out=0.5)
    trained.pairing.setup(trained.pairing_context, data)
    expected = trained.training_pairs(data, 1000, 0)
    later = student(gaussian_teacher(), num_pairs=2000, hold_out=0.5)
    assert later.training_pairs(data, 1000, 0) == expected
    # Of x1 = m + s x0 in the plane: |m|^2 + 2 (s - 1)^2 over |m|^2 + 2 (s^2 + 1).
    square = float(torch.as_tensor(MEAN).expand(2).square().sum())
    exact = (square + 2 * (STD - 1) ** 2) / (square + 2 * (STD**2 + 1))
    assert expected["cost_ratio"] == pytest.approx(exact, rel=0.1)


def test_a_share_of_each_batch_belongs_to_each_process(cache):
    flow, data = student(gaussian_teacher()), plane()
    flow.pairing.setup(flow.pairing_context, data)
    whole = pairs_at(flow, data, 32).x0
    batch, parts = data.train_batch_at(32), []
    for rank in (0, 1):
        context = replace(flow.pairing_context, rank=rank, world_size=2)
        flow.pairing.setup(context, data)
        parts.append(flow.pairing.pairs(context, batch.x[:8], None, batch, torch.Generator()).x0)
    assert torch.equal(whole, torch.cat(parts))


def test_labels_are_those_the_pairs_were_made_with_and_stay_dropped(cache):
    data = plane()
    flow = student(gaussian_teacher(LABELLED, conditional=True), LABELLED, conditional=True, num_pairs=60)
    flow.pairing._labels = lambda data, num: torch.arange(num) % 2
    flow.pairing.setup(flow.pairing_context, data)
    told = torch.tensor([2] * 4 + [0] * 12)
    pairs = pairs_at(flow, data, label=told)
    assert (pairs.label[:4] == 2).all()
    shift = ((pairs.x1 - MEAN - STD * pairs.x0)[:, 0]).round().long()
    assert torch.equal(pairs.label[4:], shift[4:])
    assert set(shift.tolist()) == {0, 1}


def test_labels_are_drawn_from_the_training_split(cache):
    data = plane()
    teacher = build("cfm", data.spec, conditional=True)
    labels = ReflowPairing(teacher, 4000)._labels(data, 4000)
    share = torch.bincount(labels, minlength=8) / 4000
    assert (share - 1 / 8).abs().max() < 0.03
    assert torch.equal(labels, ReflowPairing(teacher, 4000)._labels(data, 4000))


def test_pairs_are_made_once_and_another_teacher_seed_or_solver_is_another_folder(cache):
    data = plane()

    def folders(**options):
        flow = student(options.pop("teacher", None) or gaussian_teacher(), **options)
        flow.pairing.setup(flow.pairing_context, data)
        return {path.name for path in cache.glob("reflow-*")}

    first = folders()
    assert folders() == first
    flow = student(gaussian_teacher())
    flow.seed = 7
    flow.pairing.setup(flow.pairing_context, data)
    assert {path.name for path in cache.glob("reflow-*")} == first, "runs with other seeds share the pairs"
    assert len(folders(pair_seed=1)) == 2
    assert len(folders(pair_solver=Euler(num_steps=3))) == 3
    assert len(folders(teacher=gaussian_teacher(optimal=False))) == 3, "the checksum is of the weights, not of the code"
    other = gaussian_teacher()
    with torch.no_grad():
        other.network.unused.fill_(1.0)
    assert len(folders(teacher=other)) == 4


def test_a_given_solver_makes_the_pairs(cache):
    flow, data = student(gaussian_teacher(optimal=False), pair_solver=Euler(num_steps=1)), plane()
    flow.pairing.setup(flow.pairing_context, data)
    pairs = pairs_at(flow, data)
    # One Euler step along the first velocity of the independent pairs, mean - x.
    torch.testing.assert_close(pairs.x1, torch.full_like(pairs.x1, MEAN), atol=1e-5, rtol=0)


def test_making_the_pairs_is_charged_by_the_operations_of_the_teachers_samples(cache):
    """Two evaluations of its network a step for each pair; whoever reads the pairs pays what they cost."""
    data = plane()
    torch.manual_seed(0)
    teacher = FlowMatching(data.spec, partial(MLP, width=16, depth=1)).eval()
    steps, num_pairs = 5, 100
    x, t = torch.zeros(1, 2), torch.zeros(1)
    costs = []
    for _ in range(2):
        flow = student(teacher, data.spec, num_pairs=num_pairs, pair_solver=Midpoint(num_steps=steps))
        flow.fit_to(data, training=True)
        costs.append(flow.preparation)
    assert costs[0].flops == costs[1].flops
    assert costs[0].flops == forward_flops(lambda: teacher.network(x, t)) * 2 * steps * num_pairs
    assert costs[0].seconds == costs[1].seconds > 0
    flow = student(teacher, data.spec, num_pairs=num_pairs, pair_solver=Midpoint(num_steps=steps))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow.pairing, "_made", lambda *_: pytest.fail("the teacher ran, but the pairs are there"))
        flow.fit_to(data, training=True)
    assert flow.preparation == costs[0]
    made = {path: path.stat().st_mtime_ns for path in cache.glob("*/*.pt")}
    flow.pairing.setup(flow.pairing_context, data)
    assert {path: path.stat().st_mtime_ns for path in cache.glob("*/*.pt")} == made
    flow = student(teacher, data.spec)
    flow.fit_to(data, training=False)
    assert flow.preparation == Preparation()


def test_counting_operations_needs_no_pairs(cache):
    flow = student(gaussian_teacher())
    loss = flow.training_loss(plane().train_batch_at(0), torch.Generator())
    assert loss.total.isfinite()
    assert not cache.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": None}, "Reflow learns from a trained flow and got none"),
        ({"num_pairs": 1}, "num_pairs must be a whole number in .*, got 1"),
        ({"hold_out": 1.0}, r"hold_out must be a number in \(0, 1\), got 1.0"),
        ({"pair_guidance": 2.0}, "guidance of scale 2 needs labels"),
        ({"initialise_from_teacher": True}, "the teacher has another network"),
        (
            {"teacher": FlowMap(PLANE, partial(NETWORK, second_time=True)), "pair_solver": Euler(num_steps=1)},
            "samples of FlowMap follow none: leave it out",
        ),
        (
            {
                "teacher": FlowMatching(PLANE, NETWORK, objective=DataObjective()),
                "initialise_from_teacher": True,
            },
            "predicts data and the student's velocity",
        ),
        (
            {"teacher": build("tarflow", replace(POINTS, name="plane")), "pair_solver": Euler(num_steps=1)},
            "samples of TARFlow follow none: leave it out",
        ),
        (
            {"teacher": build("tarflow", POINTS)},
            "the teacher was trained on points .* data are plane .* set requires.teacher.data.dataset=plane too",
        ),
    ],
)
def test_bad_options_are_refused(options, message):
    options = {"teacher": gaussian_teacher(), **options}
    with pytest.raises(ValueError, match=message):
        student(options.pop("teacher"), **options)


def test_a_teacher_that_diverged_is_refused(cache):
    teacher = gaussian_teacher()
    with torch.no_grad():
        teacher.network.unused.fill_(float("nan"))
    flow = student(teacher)
    with pytest.raises(ValueError, match="the teacher's samples hold NaN or infinity"):
        flow.pairing.setup(flow.pairing_context, plane())
    assert not list(cache.glob("*/*.pt")), "no half of a shard is left"


def test_the_teachers_weights_are_the_start():
    teacher = build("cfm", POINTS)
    flow = Reflow(POINTS, NETWORK, teacher=teacher, num_pairs=10)
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(flow.network.state_dict()[name], value)
    assert set(flow.state_dict()) == set(teacher.state_dict())


# ---- the store ------------------------------------------------------------------------------------------


def rows(index):
    return {"x": index.float()[:, None] * torch.ones(3), "label": index % 5}


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_store_gives_the_rows_it_was_asked_for(cache, in_memory, monkeypatch):
    if not in_memory:
        monkeypatch.setattr("flowbench.families.pairing.pair_store.IN_MEMORY_BYTES", 0)
    store = PairStore("test", {"a": 1}, 25, shard_rows=10)
    store.complete(rows)
    index = torch.tensor([24, 0, 9, 10, 3, 24])
    found = store.take(index, torch.device("cpu"))
    assert torch.equal(found["x"], rows(index)["x"])
    assert torch.equal(found["label"], rows(index)["label"])
    assert [len(torch.load(path)["rows"]["x"]) for path in sorted(store.folder.glob("*.pt"))] == [10, 10, 5]


def test_an_interrupted_generation_goes_on_where_it_stopped(cache):
    made = []

    def make(index, fail=False):
        if fail and index[0] == 20:
            raise KeyboardInterrupt
        made.append(int(index[0]))
        return rows(index)

    with pytest.raises(KeyboardInterrupt):
        PairStore("test", {}, 40, shard_rows=10).complete(lambda index: make(index, fail=True))
    assert made == [0, 10]
    store = PairStore("test", {}, 40, shard_rows=10)
    store.complete(make)
    assert made == [0, 10, 20, 30]
    PairStore("test", {}, 40, shard_rows=10).complete(lambda index: pytest.fail("made twice"))
    whole = torch.arange(40)
    assert torch.equal(store.take(whole, torch.device("cpu"))["x"], rows(whole)["x"])


def test_operations_are_noted_by_file_and_counted_where_they_were_not(cache):
    PairStore("test", {}, 25, shard_rows=10).complete(rows)  # as an earlier version did
    asked = []

    def flops(index):
        asked.append(index.tolist())
        return 3.0 * len(index)

    for _ in range(2):
        store = PairStore("test", {}, 25, shard_rows=10)
        store.complete(rows, flops)
        assert store.flops == 75.0
    assert asked == [list(range(25))] * 2
    next(iter(sorted(store.folder.glob("*.pt")))).unlink()
    store.complete(rows, flops)
    assert store.flops == 75.0
    assert asked[2:] == [list(range(10)), list(range(10, 25))]
    asked.clear()
    for _ in range(2):
        noted = PairStore("noted", {}, 25, shard_rows=10)
        noted.complete(rows, flops)
        assert noted.flops == 75.0
    assert asked == [list(range(10)), list(range(10, 20)), list(range(20, 25))]


def test_two_workers_share_the_shards(cache):
    made: list[int] = []
    both = threading.Barrier(2, timeout=20)

    def make(index):
        made.append(int(index[0]))
        if index[0] < 20:  # each has begun one of the first two before either is done
            both.wait()
        return rows(index)

    stores = [PairStore("test", {}, 40, shard_rows=10) for _ in range(2)]
    threads = [threading.Thread(target=store.complete, args=(make,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(made) == [0, 10, 20, 30]
    assert all(len(store.take(torch.arange(40), torch.device("cpu"))["x"]) == 40 for store in stores)


@pytest.mark.parametrize("content", [b"", b"half a file", b"PK\x03\x04"])
def test_a_damaged_shard_is_named(cache, content):
    store = PairStore("test", {}, 20, shard_rows=10)
    store.complete(rows)
    damaged = store.folder / "000000010.pt"
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read the stored pairs .*000000010.pt .*delete the file"):
        PairStore("test", {}, 20, shard_rows=10).complete(rows)


def test_the_checksum_knows_every_weight_and_fitted_state():
    module = torch.nn.Linear(3, 2)
    first = weights_checksum(module)
    assert weights_checksum(module) == first
    with torch.no_grad():
        module.weight[1, 2] += 1e-6
    assert weights_checksum(module) != first


def straightness(way) -> float:
    """S of some paths, averaged over them."""
    return float(path_geometry(way.states, way.velocities, way.times).straightness.mean())


# ---- training -------------------------------------------------------------------------------------------


def test_training_moves_the_weights_and_resumes(tmp_path, cache):
    def fit(path, resume=None, **options):
        torch.manual_seed(0)
        flow = student(gaussian_teacher(), training=TrainingConfig(OptimizerConfig(lr=1e-2)))
        run = trainer(tmp_path, max_steps=6, val_check_interval=3, limit_val_batches=1, **options)
        run.fit(flow, plane(eval_batch_size=32), ckpt_path=resume, weights_only=True)
        run.save_checkpoint(path)
        assert float(run.callback_metrics.get("val/loss", torch.ones(()))) > 0
        return flow.state_dict()

    start = student(gaussian_teacher()).state_dict()
    whole = fit(tmp_path / "whole.ckpt")
    fit(tmp_path / "half.ckpt", limit_train_batches=3, max_epochs=1)
    resumed = fit(tmp_path / "resumed.ckpt", resume=tmp_path / "half.ckpt")
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())
    assert all(not torch.equal(start[name], value) for name, value in whole.items() if "weight" in name)


def test_the_first_round_on_a_gaussian_is_straight_and_no_longer(cache):
    """Invariant 34 in closed form: independent pairs bend, their flow's pairs are straight and cost less."""
    teacher = gaussian_teacher(optimal=False)
    flow, data = student(teacher, num_pairs=4000), plane()
    flow.pairing.setup(flow.pairing_context, data)
    seen = [pairs_at(flow, data, 16 * n) for n in range(230)]
    x0, x1 = torch.cat([p.x0 for p in seen]), torch.cat([p.x1 for p in seen])
    cost = (x1 - x0).square().sum(1).mean()
    expected = 2 * (MEAN**2 + (1 - STD) ** 2)
    independent = 2 * (MEAN**2 + 1 + STD**2)
    assert float(cost) == pytest.approx(expected, rel=0.05)
    assert cost < 0.95 * independent
    # Marginals: the teacher's samples, N(3, 0.5^2 I), from the standard normal.
    assert (x1.mean(0) - MEAN).abs().max() < 0.05
    assert (x1.std(0) - STD).abs().max() < 0.05
    bent = teacher.trajectory(x0[:500], num_points=33)
    straight = gaussian_teacher().trajectory(x0[:500], num_points=33)
    s_teacher, s_round = (straightness(way) for way in (bent, straight))
    assert s_teacher == pytest.approx(2 * 0.4292 * STD, rel=0.15)  # 0.4292 d a b
    assert s_round < 1e-6


@pytest.mark.slow
def test_a_round_straightens_a_trained_flow_and_keeps_its_samples(tmp_path, cache):
    """Invariant 34 on eight Gaussians, and the one-step distillation beats one Euler step of its teacher."""
    data = FlowDataModule("eight_gaussians", batch_size=256)
    network, optimizer = partial(MLP, width=64, depth=3), OptimizerConfig(lr=2e-3, weight_decay=0.0)

    def fit(cls, **options):
        torch.manual_seed(0)
        flow = cls(data.spec, network, training=TrainingConfig(optimizer), **options)
        trainer(tmp_path, max_steps=1500, gradient_clip_val=1.0).fit(flow, data)
        flow.load_state_dict(flow.ema.state_dict()["shadow"], strict=False)
        return flow.eval()

    rounds = [fit(FlowMatching)]
    for _ in range(2):
        rounds.append(fit(Reflow, teacher=rounds[-1], num_pairs=8000))
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    geometry, costs, samples = [], [], []
    for flow in rounds:
        way = flow.trajectory(noise, num_points=33)
        geometry.append(straightness(way))
        samples.append(way.states[-1])
        costs.append(float((way.states[-1] - noise).square().sum(1).mean()))
    assert costs[1] < 1.02 * costs[0]
    assert costs[2] < 1.02 * costs[1]
    assert geometry[1] < 0.3 * geometry[0]
    data_points = data.model_values("test", slice(2000)).double()
    distances = [float(wasserstein2(one.double(), data_points)) for one in samples]
    assert distances[1] < distances[0] + 0.3
    one_step = fit(Reflow, teacher=rounds[1], num_pairs=8000, times=PointTimes(0.0), solver=Euler(num_steps=1))
    single = [
        float(wasserstein2(f.sample(noise, network_evaluations=1).x.double(), data_points))
        for f in (rounds[0], one_step)
    ]
    assert single[1] < 0.5 * single[0]


def test_a_field_trained_at_one_time_has_no_density():
    teacher = FlowMatching(PLANE, NETWORK)
    perturb(teacher)
    flow = student(teacher.eval(), times=PointTimes(0.0), solver=Euler(num_steps=1)).eval()
    assert (flow.density, flow.solved_density()) == ("none", None)
    facts = flow.describe()
    assert (facts.likelihood, facts.has_velocities) == ("none", False)
    assert MapError().expected(Prospect(PLANE, flow)) == ()
    assert MapError().expected(Prospect(PLANE, teacher)) == ("map_error",)
    with pytest.raises(ValueError, match="no density"):
        flow.log_prob(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="no map between two times"):
        flow.flow_jump(torch.zeros(1, 2), Condition(), 0.0, 1.0)
    noise = flow.draw_noise(torch.arange(3), seed=0)
    step = flow.network(noise, torch.zeros(3))
    assert step.abs().min() > 0
    torch.testing.assert_close(flow.sample(noise).x, noise + step)


# ---- chains of experiments ------------------------------------------------------------------------------


CHAIN = {
    "cfm": """
seed: 0
data: {dataset: eight_gaussians, batch_size: 32}
model:
  class_path: flowbench.families.FlowMatching
  init_args:
    network: {class_path: flowbench.networks.MLP, init_args: {width: 16, depth: 2}}
    solver: {class_path: flowbench.flows.Midpoint, init_args: {num_steps: 2}}
trainer: {accelerator: cpu, devices: 1}
budget: {steps: 4}
evaluator: {num_samples: 50, metrics: {w2: {class_path: flowbench.evaluation.Wasserstein2}}}
""",
    "reflow1": """
base: [cfm.yaml]
requires: {teacher: cfm.yaml}
model: {class_path: flowbench.families.reflow.Reflow, init_args: {num_pairs: 64}}
""",
    "reflow2": """
base: [reflow1.yaml]
requires: {teacher: reflow1.yaml}
""",
}


@pytest.fixture
def chain(tmp_path) -> Path:
    for name, text in CHAIN.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def test_a_required_teacher_is_trained_and_not_measured(chain):
    """Its metrics belong to no result of the student: they change no fingerprint."""
    plain = Experiment.from_files([chain / "reflow2.yaml"])
    teacher = plain.requirements["teacher"]
    assert "evaluator" in plain.resolved
    assert "evaluator" not in teacher.resolved
    assert "evaluator" not in teacher.requirements["teacher"].resolved
    (chain / "cfm.yaml").write_text(CHAIN["cfm"].replace("num_samples: 50", "num_samples: 60"))
    again = Experiment.from_files([chain / "reflow2.yaml"])
    assert again.requirements["teacher"].fingerprint == teacher.fingerprint
    (chain / "cfm.yaml").write_text(CHAIN["cfm"].replace("steps: 4", "steps: 5"))
    longer = Experiment.from_files([chain / "reflow2.yaml"], ["budget.steps=4", "requires.teacher.budget.steps=4"])
    assert longer.requirements["teacher"].fingerprint != teacher.fingerprint
    assert longer.fingerprint != plain.fingerprint


def trained(experiment: Experiment, folder: Path) -> Path:
    """A checkpoint whose averaged weights are 7 everywhere."""
    module = experiment.build({name: trained(e, folder) for name, e in experiment.requirements.items()}).model
    state = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(state)
    for value in state["ema"]["shadow"].values():
        value.fill_(7.0)
    path = folder / f"{experiment.fingerprint}.ckpt"
    torch.save(state, path)
    return path


def test_teachers_come_with_their_averaged_weights_to_any_depth(chain):
    experiment = Experiment.from_files([chain / "reflow2.yaml"])
    first = experiment.requirements["teacher"]
    paths = {
        "teacher": chain / f"{first.fingerprint}.ckpt",
        "teacher.teacher": trained(first.requirements["teacher"], chain),
    }
    module = first.build({"teacher": paths["teacher.teacher"]}).model
    state = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(state)
    torch.save(state, paths["teacher"])
    built = experiment.build(paths).model
    teacher = built.pairing.teacher
    assert isinstance(teacher, Reflow)
    deepest = teacher.pairing.teacher
    assert type(deepest) is FlowMatching
    assert all(bool((p == 7).all()) for p in deepest.parameters())
    for name, value in deepest.network.state_dict().items():
        assert torch.equal(built.network.state_dict()[name], value), "each round starts from the former"
    from flowbench.config import ConfigError

    for name in ("other", "teacher.other", "teacher.teacher.teacher"):
        with pytest.raises(ConfigError, match="is given, but the experiment does not require it"):
            experiment.build({**paths, name: paths["teacher"]})


@pytest.mark.slow
def test_a_chain_is_prepared_in_order_and_once(chain, cache):
    from flowbench.commands import runs

    experiment = Experiment.from_files([chain / "reflow2.yaml"], [f"run.dir={chain / 'run'}", "evaluator=null"])
    found = runs.prepare(experiment)
    assert set(found) == {"teacher", "teacher.teacher"}
    assert len(list(cache.glob("reflow-*"))) == 1, "the first round made its pairs"
    times = {name: path.stat().st_mtime for name, path in found.items()}
    assert times["teacher.teacher"] < times["teacher"]
    runs.fit(experiment)
    assert len(list(cache.glob("reflow-*"))) == 2
    assert {name: path.stat().st_mtime for name, path in runs.prepare(experiment).items()} == times


def test_an_override_replaces_the_budget_of_a_teacher_at_any_depth(chain):
    (chain / "cfm.yaml").write_text(CHAIN["cfm"].replace("{steps: 4}", "{train_flops: 1.0e+9}"))
    overrides = ["requires.teacher.budget.steps=3", "requires.teacher.requires.teacher.budget.samples_seen=64"]
    found = Experiment.from_files([chain / "reflow2.yaml"], overrides)
    assert found.budget == {"train_flops": 1e9}
    assert found.requirements["teacher"].budget == {"steps": 3}
    assert found.requirements["teacher"].requirements["teacher"].budget == {"samples_seen": 64}
