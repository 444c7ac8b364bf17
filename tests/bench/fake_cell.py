"""A stand-in for the ``flowbench`` program: same command line and files, no training."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml


def merged(path: Path) -> dict:
    content = yaml.safe_load(path.read_text())
    out: dict = {}
    for base in content.pop("base", []):
        out.update(merged(path.parent / base))
    out.update(content)
    return out


def record(**fields: object) -> dict:
    run = CONFIG["run"]
    return {
        "schema": 3,
        "bench": run["bench"],
        "problem": run["problem"],
        "contender": run["contender"],
        "family": "Fake",
        "dataset": "fake-data",
        "seed": CONFIG["seed"],
        "metric": "fd[fake]",
        "value": 1.0,
        "n": 10,
        "protocol": "fake/test/10",
        "unit": "",
        "goal": "down",
        "group": "quality",
        "axis": "",
        "at": None,
        "network_evaluations": 8.0,
        "guidance": None,
        "sampler": "",
        "weights": "ema",
        "status": "ok",
        "provenance": {
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "wait": os.environ.get("OMP_WAIT_POLICY"),
        },
        **fields,
    }


def write(name: str, text: str) -> None:
    partial = RUN / f".{name}.tmp"
    partial.write_text(text)
    os.replace(partial, RUN / name)


def write_rows(rows: list[dict]) -> None:
    write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def train() -> int:
    """Count steps, each kept in a checkpoint; returns the step it resumed from."""
    checkpoint = RUN / "checkpoint"
    start = int(checkpoint.read_text()) if checkpoint.exists() else 0
    steps = FAKE.get("steps", 1)
    for step in range(start, steps):
        time.sleep(FAKE.get("step_seconds", 0.0))
        write("checkpoint", str(step + 1))
        progress = {"phase": "fit", "step": step + 1, "max_steps": steps, "fraction": (step + 1) / steps}
        write("progress.json", json.dumps({**progress, "loss": 0.5, "updated": time.time()}))
    return start


def meet() -> None:
    """Return once as many cells as asked for run at the same time."""
    folder = Path(FAKE["meet_in"])
    folder.mkdir(exist_ok=True)
    (folder / f"{CONFIG['run']['contender']}-{CONFIG['seed']}").touch()
    deadline = time.time() + 20
    while len(list(folder.iterdir())) < (FAKE["prepare_meets"] if VERB == "prepare" else FAKE["meet"]):
        if time.time() > deadline:
            sys.exit("nobody came")
        time.sleep(0.02)


def facts() -> dict:
    """What a process finds when it begins."""
    return {
        "parent": os.getppid(),
        "leads": os.getsid(0) == os.getpid() == os.getpgid(0),
        "words": sys.argv,
        "path": sys.path[0],
        "folder": str(Path.cwd()),
        "environment": dict(os.environ),
        "signals": {number.name: str(signal.getsignal(number)) for number in signal.Signals},
        "descriptors": sorted(os.listdir("/proc/self/fd"), key=int),
        "input": os.readlink("/proc/self/fd/0"),
        "output": [os.readlink(f"/proc/self/fd/{number}") for number in (1, 2)],
        "threads": len(os.listdir("/proc/self/task")),
        "module": __name__,
        "is_main": sys.modules["__main__"].__dict__ is globals(),
    }


def die() -> None:
    """End by a signal as often as the experiment says for this command: ``{fit: [SIGKILL, SIGSEGV]}`` is twice."""
    signals = FAKE.get("die", {}).get(VERB, [])
    file = Path(f"{os.environ['FAKE_CALLS']}-{VERB}-{CONFIG['run']['contender']}-{CONFIG['seed']}")
    done = int(file.read_text()) if file.exists() else 0
    file.write_text(str(done + 1))
    if done < len(signals):
        print(f"step {done}", flush=True)
        if signals[done] < 0:
            os.kill(os.getpid(), -signals[done])
            signal.pause()
        sys.exit(signals[done])


def fit() -> None:
    with (RUN / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if "facts" in FAKE:
            Path(FAKE["facts"]).write_text(json.dumps({**facts(), "forked": FORKED}))
        if FAKE.get("kills_the_server"):
            os.kill(int(Path(f"{os.environ['FAKE_CALLS']}-server").read_text()), signal.SIGKILL)
        if "meet" in FAKE:
            meet()
        die()
        resumed = train() if VERB == "fit" else int((Path(sys.argv[5]).parents[1] / "checkpoint").read_text())
        if "crash_unless" in FAKE and not Path(FAKE["crash_unless"]).exists():
            print("RuntimeError: loss is nan at step 7", file=sys.stderr)
            sys.exit(1)
        value = FAKE.get("value", 1.0) + 0.1 * CONFIG["seed"]
        size = CONFIG.get("data", {}).get("train_size")
        if size and size == FAKE.get("crash_at_size"):
            sys.exit("RuntimeError: too few")
        value += 100 / size if size else 0.0
        row = record(value=value)
        row["provenance"]["resumed_from"] = resumed
        counts = (CONFIG.get("evaluator", {}).get("sweep") or {}).get("network_evaluations", [])
        sweep = [record(value=value / k, axis="network_evaluations", at=float(k)) for k in counts]
        if not FAKE.get("no_rows"):
            write_rows([row, *sweep])
        if VERB == "fit":
            write("progress.json", json.dumps({"phase": "done", "fraction": 1.0}))


def prepare() -> None:
    """Hold a lock for as long as it takes, that of the training that it begins with."""
    with Path(f"{os.environ['FAKE_CALLS']}-{FAKE.get('training', CONFIG['run']['contender'])}").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit("another process trains it")
        if "prepare_meets" in FAKE:
            meet()
        die()
        if (
            "prepares_after" in FAKE
            and not Path(f"{os.environ['FAKE_CALLS']}-prepared-{FAKE['prepares_after']}").exists()
        ):
            sys.exit("too early")
        for what, fraction in FAKE.get("prepare_notes", []):
            Path(os.environ["FLOWBENCH_PROGRESS"]).write_text(json.dumps({"what": what, "fraction": fraction}))
            time.sleep(0.4)
        Path(f"{os.environ['FAKE_CALLS']}-prepared-{CONFIG['run']['contender']}").touch()
        if FAKE.get("prepare_fails"):
            sys.exit("autoencoder.yaml: no such dataset")


FORKED = "flowbench.core.forking" in sys.modules
VERB, PATH = sys.argv[1], Path(sys.argv[3])
if VERB == "bench":  # its dry run: what is fake cannot be rehearsed
    sys.exit(0)
CONFIG = merged(PATH)
FAKE = CONFIG.get("fake", {})
RUN = Path(CONFIG["run"]["dir"])
with Path(os.environ["FAKE_CALLS"]).open("a") as calls:
    calls.write(f"{VERB} {CONFIG['run']['contender']} {CONFIG['seed']}\n")
if VERB == "prepare":
    prepare()
elif VERB == "reference":
    die()
    write_rows([record(contender=name, family="reference", weights="none") for name in ("floor", "noise")])
else:
    fit()
