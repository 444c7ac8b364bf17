"""Processes forked from a server that has imported what they need: they begin where new ones would still import.

The server has one thread and does nothing but fork. What it forks is a child of whoever started the server, who must
take orphans (:func:`~flowbench.core.processes.takes_orphans`): it outlives the server and dies with that process.
Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import socket
import sys
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from flowbench.core.processes import die_with_parent

__all__ = ["READY", "ask", "become", "serve"]

READY = b"ready"
"""What the server sends when it has imported everything."""

_MADV_POPULATE_READ = 22  # from Linux 5.14 on
_LONGEST = 2**16  # bytes of a message


def ask(channel: socket.socket, words: Sequence[str], environment: Mapping[str, str], log: int) -> int | None:
    """Ask a server for a process, which leads its own session.

    Args:
        channel: to the server.
        words: of its command.
        environment: added to the server's.
        log: descriptor of the file that its output goes to.

    Returns:
        Its number; None where the server cannot fork, and it is certain that there is no such process.

    Raises:
        ConnectionError: the server has ended before it could be asked.
        EOFError: it ended before it answered, so that nobody can tell whether there is a process.
    """
    message = json.dumps({"words": list(words), "environment": dict(environment)}).encode()
    socket.send_fds(channel, [message], [log])
    try:
        answer = channel.recv(_LONGEST)
    except ConnectionError:
        answer = b""
    if not answer:
        raise EOFError("the server ended before it answered")
    return int(answer) or None


def serve(channel: socket.socket) -> list[str] | None:
    """Fork a process for each request; returns in each of them, and in the server when nobody can ask any more.

    Args:
        channel: to the process that started this one, of the kind ``SOCK_SEQPACKET``.

    Returns:
        The words of the process's command; None in the server itself.

    Raises:
        RuntimeError: this process has several threads, of which a fork copies one: the others' locks stay held.
    """
    if (number := len(os.listdir("/proc/self/task"))) > 1:
        raise RuntimeError(f"a process with {number} threads cannot be forked")
    parent = os.getppid()
    # Else a child's first collection writes to every object, and with that copies all of them.
    gc.collect()
    gc.freeze()
    resident = _resident_files()
    channel.sendall(READY)
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, _LONGEST, 1)
        if not message:
            return None
        (log,) = descriptors
        try:
            number = _fork_away(parent)
        except OSError:  # no memory, or too many processes
            channel.sendall(b"0")
        else:
            if number == 0:
                _populate(resident)
                return _begin(channel, json.loads(message), log)
            channel.sendall(str(number).encode())
        os.close(log)


def become(module: str, words: Sequence[str]) -> None:
    """Run a module as ``python -m module words`` does."""
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _fork_away(parent: int) -> int:
    """Fork a process that leads its own session and is a child of `parent`.

    Returns:
        Its number, and 0 in it.

    Raises:
        OSError: it cannot be forked.
    """
    hook = die_with_parent(parent)
    reading, writing = os.pipe()
    between = os.fork()
    if between == 0:
        try:
            between = os.getpid()
            if os.fork():
                os._exit(0)  # its child is an orphan now, and falls to `parent`
        except OSError:
            os._exit(1)
        while os.getppid() == between:
            time.sleep(0.0005)
        os.setsid()
        if hook is not None:
            hook()
        os.close(reading)
        os.write(writing, str(os.getpid()).encode())
        os.close(writing)
        return 0
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        os.waitpid(between, 0)
        answer = pipe.read()
    if not answer:
        raise OSError("the process ended before it began")
    return int(answer)


def _resident_files() -> list[tuple[int, int]]:
    """Address and length of the parts of files, libraries above all, that are in the memory of this process."""
    size, found = os.sysconf("SC_PAGE_SIZE"), []
    try:
        with (
            open("/proc/self/maps", encoding="utf-8") as maps,
            open("/proc/self/pagemap", "rb", buffering=0) as pagemap,
        ):
            for line in maps:
                span, _, _, _, inode, *_ = line.split()
                start, end = (int(address, 16) for address in span.split("-"))
                if inode != "0":
                    pagemap.seek(start // size * 8)
                    is_present = [entry >> 63 for entry in array("Q", pagemap.read((end - start) // size * 8))]
                    found += [(start + first * size, number * size) for first, number in _runs(is_present)]
    except (OSError, ValueError):  # it is for an equal account of memory, no more
        return []
    return found


def _runs(flags: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First place and number of each run of true values."""
    place = 0
    for flag, run in groupby(flags):
        length = len(list(run))
        if flag:
            yield place, length
        place += length


def _populate(parts: Sequence[tuple[int, int]]) -> None:
    """Map parts of files into this process.

    A fork has a copy of the server's own memory, but meets the libraries' pages one by one. The memory of a process is
    to be that of one that has imported the same.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for address, length in parts:
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_POPULATE_READ)


def _begin(channel: socket.socket, request: Mapping[str, Any], log: int) -> list[str]:
    """Make a process that was just forked look like a new one."""
    channel.close()
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)
    os.environ.update(request["environment"])
    return list(request["words"])
