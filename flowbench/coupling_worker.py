"""One process beside the training that solves couplings.

It stands outside the families because the new process imports this module: theirs would take seconds longer.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import time
import weakref
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from flowbench.flows import Coupling

__all__ = ["CouplingWorker", "Problem", "Solved", "solve"]


@dataclass(frozen=True)
class Problem:
    """What a coupling is asked, on the CPU.

    Attributes:
        name: for messages.
        noise: source points, shape (N, *D).
        points: data points, shape (N, *D).
        condition: of the data points, first dimension N, or None.
        seed: of the coupling's own draws.
    """

    name: str
    noise: Tensor
    points: Tensor
    condition: Tensor | None
    seed: int


@dataclass(frozen=True)
class Solved:
    """What a coupling answered.

    Attributes:
        index: a source point for every data point, int64 (N,).
        seconds: wall time of the solve.
    """

    index: Tensor
    seconds: float


def solve(coupling: Coupling, problem: Problem) -> Solved:
    """Ask a coupling in this process, on one thread, so that the answer is the same in any process.

    Raises:
        ValueError: what the coupling refuses.
    """
    start = time.perf_counter()
    rng = torch.Generator().manual_seed(problem.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of distances depend on it in their last bits, and ties with them
    try:
        index = coupling(problem.noise, problem.points, rng, problem.condition)
    finally:
        torch.set_num_threads(threads)
    return Solved(index.to(torch.int64), time.perf_counter() - start)


class CouplingWorker:
    """Solves problems one after the other in a process of its own, on one thread.

    Points travel through a pipe as bytes and indices come back; the coupling is sent once, when the process starts. A
    thread serves the pipe, so nobody waits who does not ask for a result. The process ends with :meth:`stop`, with the
    last reference to this object, and with the process that made it, however that ends.

    Args:
        coupling: must be picklable, as everything that a new process is given.
    """

    def __init__(self, coupling: Coupling) -> None:
        context = get_context("spawn")  # a fork would copy a process that may hold threads and a GPU
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, coupling), daemon=True, name="flowbench-coupling")
        process.start()
        theirs.close()  # or the pipe would stay open when the worker dies
        self._jobs: queue.SimpleQueue[tuple[Problem, Future[Solved]] | None] = queue.SimpleQueue()
        self._ready = threading.Event()
        threading.Thread(target=_relay, args=(ours, process, self._jobs, self._ready), daemon=True).start()
        self.pid = process.pid
        self._stop = weakref.finalize(self, _end, self._jobs, process, ours)

    @property
    def ready(self) -> bool:
        """Whether the process is up: its imports take seconds."""
        return self._ready.is_set()

    def submit(self, problem: Problem) -> Future[Solved]:
        """Queue a problem.

        Returns:
            Its solution to come. A ValueError in it is what the coupling refused, a RuntimeError that the coupling
            failed or the process is gone.
        """
        future: Future[Solved] = Future()
        self._jobs.put((problem, future))
        return future

    def stop(self) -> None:
        """End the process; what is queued is not solved."""
        self._stop()


# ---- in the training process --------------------------------------------------------------------------


def _end(jobs: queue.SimpleQueue[Any], process: Any, connection: Connection) -> None:
    jobs.put(None)
    process.kill()  # it holds nothing that could be left half done
    process.join()
    connection.close()


def _relay(connection: Connection, process: Any, jobs: queue.SimpleQueue[Any], ready: threading.Event) -> None:
    """Carry problems to the process and solutions back, one at a time."""
    failure = ""
    try:
        connection.recv_bytes()
        ready.set()
    except (EOFError, OSError):
        failure = _obituary(process, "before it was ready")
    while (job := jobs.get()) is not None:
        problem, future = job
        if not future.set_running_or_notify_cancel():
            continue
        try:
            if failure:
                raise RuntimeError(failure)
            future.set_result(_ask(connection, problem))
        except (EOFError, OSError):
            failure = _obituary(process, f"while it solved {problem.name} ({len(problem.points)} points)")
            future.set_exception(RuntimeError(failure))
        except (ValueError, RuntimeError) as error:
            future.set_exception(error)


def _obituary(process: Any, when: str) -> str:
    process.join(timeout=1.0)
    return (
        f"the worker process of the coupling ended with exit status {process.exitcode} {when}: "
        "lower oversample if memory ran out, or set ahead=0 to solve in the training process"
    )


def _ask(connection: Connection, problem: Problem) -> Solved:
    tensors = [problem.noise, problem.points] + ([] if problem.condition is None else [problem.condition])
    connection.send_bytes(json.dumps({"seed": problem.seed, "tensors": len(tensors)}).encode())
    for tensor in tensors:
        _send(connection, tensor)
    answer: dict[str, Any] = json.loads(connection.recv_bytes())
    if "refusal" in answer:
        raise ValueError(answer["refusal"])
    if "failure" in answer:
        raise RuntimeError(answer["failure"])
    return Solved(_receive(connection), answer["seconds"])


# ---- in the worker --------------------------------------------------------------------------------------


def _serve(connection: Connection, coupling: Coupling) -> None:
    """Answer until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the training's to answer
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(1)
    connection.send_bytes(b"ready")
    try:
        while True:
            _answer(connection, coupling)
    except (EOFError, OSError):
        return


def _follow_parent() -> None:
    """End with the training process, in the middle of a solve too."""
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(0)


def _answer(connection: Connection, coupling: Coupling) -> None:
    head: dict[str, Any] = json.loads(connection.recv_bytes())
    noise, points, *rest = [_receive(connection) for _ in range(head["tensors"])]
    try:
        found = solve(coupling, Problem("", noise, points, rest[0] if rest else None, head["seed"]))
    except ValueError as error:
        connection.send_bytes(json.dumps({"refusal": str(error)}).encode())
    except Exception as error:
        connection.send_bytes(json.dumps({"failure": f"the coupling failed: {type(error).__name__}: {error}"}).encode())
    else:
        connection.send_bytes(json.dumps({"seconds": found.seconds}).encode())
        _send(connection, found.index)


# ---- tensors as bytes -----------------------------------------------------------------------------------


def _send(connection: Connection, tensor: Tensor) -> None:
    array = tensor.detach().contiguous().numpy()
    connection.send_bytes(json.dumps({"dtype": str(array.dtype), "shape": array.shape}).encode())
    connection.send_bytes(array.reshape(-1).data.cast("B"))


def _receive(connection: Connection) -> Tensor:
    head: dict[str, Any] = json.loads(connection.recv_bytes())
    content = bytearray(connection.recv_bytes())
    return torch.frombuffer(content, dtype=getattr(torch, head["dtype"])).reshape(head["shape"])
