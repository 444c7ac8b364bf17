"""Preparations that run side by side: which may, and what becomes of the others when one fails or the bench ends."""

from __future__ import annotations

import fcntl
import signal
from pathlib import Path

import pytest

from flowbench.bench.plan import make_plan
from flowbench.bench.preparation import Preparations
from flowbench.bench.status import read_status
from tests.marks import slow

from .conftest import start_bench, wait_for

KILL = -signal.SIGKILL
NOTES = [["training", k / 3] for k in range(3)]  # 1.2 seconds


def bench(workshop, requires: dict[str, str] | None = None, **contenders) -> Path:
    """Contenders on data sets of their own, with the fake's settings; some require a training."""
    texts: list[str] = []
    for name, fake in contenders.items():
        path = workshop.folder / workshop.experiment(name, **fake)
        text, needed = path.read_text(), (requires or {}).get(name)
        # What is required is trained on the data of whoever requires it.
        own = f"fake-data\n  batch_size: {8 + len(texts)}" if needed else f"{name}-data"
        text = text.replace("fake-data", own)
        texts.append(name)
        path.write_text(text + (f"requires: {{teacher: {needed}.yaml}}\n" if needed else ""))
    return workshop.bench(contenders={name: f"{name}.yaml" for name in contenders}, seeds=[0])


def states(workshop, *names: str) -> list[str]:
    return [read_status(workshop.cell(name, 0)).state for name in names]


def is_held(workshop, name: str) -> bool:
    """Whether a process prepares for a contender."""
    path = Path(f"{workshop.calls_file}-{name}")
    if not path.exists():
        return False
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_preparations_run_side_by_side(workshop):
    """Each waits until the other has begun."""
    meeting = {"prepare_meets": 2, "meet_in": str(workshop.folder / "meeting")}
    assert workshop.run(bench(workshop, a=meeting, b=meeting), jobs=2) == 0


def test_no_more_run_than_cells_may(workshop):
    """All of them hold one lock."""
    one = {"training": "machine", "prepare_notes": NOTES[:1]}
    assert workshop.run(bench(workshop, a=one, b=one, c=one), jobs=1) == 0


@pytest.mark.parametrize("deep", [slow(False), True])
def test_those_that_begin_with_the_same_training_run_one_after_the_other(workshop, deep):
    """And what has a training of its own runs beside them."""
    workshop.experiment("teacher")
    workshop.experiment("other", value=2.0)
    shared = {"training": "teacher", "prepare_notes": NOTES[:2]}
    requires = {"a": "teacher", "b": "teacher", "c": "other"}
    if deep:
        between = workshop.folder / workshop.experiment("between")
        between.write_text(between.read_text() + "requires: {teacher: teacher.yaml}\n")
        requires["b"] = "between"
    path = bench(workshop, requires, a=shared, b=shared, c={"prepare_notes": NOTES[:2]})
    assert workshop.run(path, jobs=3) == 0
    assert states(workshop, "a", "b", "c") == ["DONE"] * 3
    places = [line for line in workshop.output.splitlines() if "preparing" in line]
    assert [line.split("prerequisites of ")[1] for line in places] == ["a seed 0", "c seed 0", "b seed 0"]


@pytest.mark.slow
def test_two_of_one_data_set_do_not_train_its_classifier_at_once(workshop):
    one = {"training": "classifier", "prepare_notes": NOTES[:2]}
    path = bench(workshop, a=one, b=one)
    for name, size in (("a", 8), ("b", 16)):
        file = workshop.folder / f"{name}.yaml"
        file.write_text(file.read_text().replace(f"dataset: {name}-data", f"dataset: shared\n  batch_size: {size}"))
    assert workshop.run(path, jobs=2) == 0


def test_trainings_begin_at_once_beside_one_that_needs_none(workshop):
    """Its cells can run soon; those of the others wait for long."""
    workshop.experiment("teacher")
    path = bench(workshop, {"slow": "teacher"}, quick={}, more={}, slow={})
    plan = make_plan(path)
    for cell in plan.everything:
        cell.directory.mkdir(parents=True)
    said: list[str] = []

    class Endless:
        pid = 0

        def poll(self):
            return None

        def wait(self, timeout=None):
            raise AssertionError("nobody waits")

    preparations = Preparations(plan, lambda words, log, environment, title: Endless(), said.append)
    preparations.add(plan.everything)
    assert preparations.advance(2)
    assert [line.split("prerequisites of ")[1] for line in said] == ["quick seed 0", "slow seed 0"]
    assert set(preparations.progress) == {"prepare quick seed 0", "prepare slow seed 0"}
    assert len(preparations.processes) == preparations.places == 2


@pytest.mark.slow
def test_reference_rows_wait_for_the_preparation_of_their_own_problem(workshop):
    """Another one's fetches other feature networks."""
    workshop.experiment("a")
    problems = {
        "first": {"overrides": {"fake.prepare_notes": []}},
        "second": {"overrides": {"data.dataset": "other", "fake.prepare_notes": NOTES}},
    }
    path = workshop.bench(contenders={"a": "a.yaml"}, problems=problems, seeds=[0])
    assert workshop.run(path, jobs=2) == 0
    lines = [line[9:] for line in workshop.output.splitlines()]
    places = [
        next(k for k, line in enumerate(lines) if line.startswith(text))
        for text in ("start first/reference", "done  first/a", "start second/reference")
    ]
    assert places == sorted(places)


def test_one_that_fails_leaves_the_others_alone(workshop):
    path = bench(workshop, a={"prepare_fails": True}, b={"prepare_notes": NOTES})
    assert workshop.run(path, jobs=2) == 1
    assert states(workshop, "a", "b") == ["FAILED", "DONE"]
    assert "no such dataset" in read_status(workshop.cell("a", 0)).message
    workshop.calls()
    (workshop.folder / "a.yaml").write_text((workshop.folder / "a.yaml").read_text().replace("true", "false"))
    assert workshop.run(path, jobs=2) == 0
    assert "prepare b 0" not in workshop.calls()


@pytest.mark.slow
def test_one_that_was_killed_is_tried_once_more_with_no_other_beside_it(workshop):
    """The others may have taken the memory."""
    path = bench(workshop, a={"die": {"prepare": [KILL]}, "prepares_after": "b"}, b={"prepare_notes": NOTES}, c={})
    assert workshop.run(path, jobs=2) == 0
    calls = [call for call in workshop.calls() if call.startswith("prepare")]
    assert sorted(calls[:2]) == ["prepare a 0", "prepare b 0"]
    assert calls[2:] == ["prepare a 0", "prepare c 0"]
    assert "preparation was ended by SIGKILL" in workshop.output


@pytest.mark.parametrize("number", [signal.SIGINT, *(slow(number) for number in (signal.SIGTERM, signal.SIGKILL))])
def test_all_of_them_end_with_the_bench(workshop, number):
    endless = {"prepare_notes": [["training", 0.5]] * 200}
    process = start_bench(bench(workshop, a=endless, b=endless), jobs=2)
    wait_for(lambda: is_held(workshop, "a") and is_held(workshop, "b"), seconds=60)
    process.send_signal(number)
    assert process.wait(30) == (-number if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: not is_held(workshop, "a") and not is_held(workshop, "b"))
