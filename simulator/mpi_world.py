"""The MPI world: what a rank does in it, and what of mpi4py it takes.

Nobody blocks inside MPI: Open MPI waits by spinning, and idle ranks must leave the cores alone.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import time
from collections.abc import Generator
from typing import Any, NamedTuple, Protocol

from console import Fatal, log
from environment import Settings
from leader_link import Message

POLL = 0.03  # seconds between two looks at MPI
Pauses = Generator[None, None, None]
Task = Generator[None, None, Message]


class Request(Protocol):
    def Test(self) -> bool: ...


class Comm(Protocol):
    """The part of mpi4py's communicator that is used here."""

    def Get_rank(self) -> int: ...
    def Get_size(self) -> int: ...
    def iprobe(self) -> bool: ...
    def recv(self) -> Any: ...  # noqa: ANN401 (whatever the other side has sent)
    def isend(self, obj: object, dest: int) -> Request: ...
    def Ibarrier(self) -> Request: ...


class Done:
    def Test(self) -> bool:
        return True


class Alone:
    """A world of one rank, which needs no MPI."""

    def Get_rank(self) -> int:
        return 0

    def Get_size(self) -> int:
        return 1

    def iprobe(self) -> bool:
        return False

    def recv(self) -> Any:  # noqa: ANN401
        raise AssertionError("nobody can have sent anything")

    def isend(self, obj: object, dest: int) -> Request:
        raise AssertionError(f"there is no rank {dest}")

    def Ibarrier(self) -> Request:
        return Done()


def enter(size: int) -> Comm:
    """Return MPI.COMM_WORLD once all its ranks are there; `size` is what the environment says."""
    if size == 1:
        return Alone()
    try:
        mpi4py = importlib.import_module("mpi4py")
        mpi4py.rc.threads = False
        comm: Comm = importlib.import_module("mpi4py.MPI").COMM_WORLD
    except ImportError as error:
        message = f"{error}\n[simulator] {size} ranks need the Python package mpi4py"
        raise Fatal(type(error).__name__, message) from None
    return comm


class Report(NamedTuple):
    """What a rank says of itself."""

    rank: int
    host: str
    gpus: int


class Part:
    """What one rank does when the leader asks for it."""

    def __init__(self, comm: Comm, settings: Settings) -> None:
        self._comm = comm
        self._settings = settings
        self._host = socket.gethostname()
        self._rank = comm.Get_rank()
        self._fault_at: float | None = None

    def perform(self, order: Message) -> Task:
        """Do as ordered; yields where there is nothing to do but wait."""
        if order["op"] == "load":
            yield from self._load(order)
        if order["op"] == "meet":
            request = self._comm.Ibarrier()
            while not request.Test():
                yield
        report = Report(self._rank, self._host, int(self._settings.gpus))
        return report._asdict()

    def strike(self) -> None:
        """Let the fault happen whose time has come."""
        if self._fault_at is not None and time.monotonic() >= self._fault_at:
            self._die()

    def _load(self, order: Message) -> Pauses:
        gpu = self._rank % int(order["gpus_per_node"])
        share = f"part {self._rank + 1} of {self._comm.Get_size()} of {order['model']}"
        log("I", f"rank {self._rank} on {self._host}: loading {share} on GPU {gpu}")
        half = self._settings.load_seconds / 2
        yield from _wait(half)
        if self._fault_delay() == 0:
            self._die()
        yield from _wait(half)
        log("I", f"rank {self._rank} on {self._host}: loaded")
        if delay := self._fault_delay():
            self._fault_at = time.monotonic() + delay

    def _fault_delay(self) -> float | None:
        """Return the seconds after loading at which this rank dies; 0: while it loads."""
        delays = [
            (*arguments[position:], 0.0)[0]
            for kind, position in (("exit-rank", 2), ("kill-rank", 1))
            if (arguments := self._settings.faults.get(kind)) and arguments[0] == self._rank
        ]
        return min(delays, default=None)

    def _die(self) -> None:
        """Crash: without a word to MPI, so that the others must find out by themselves."""
        kill = self._settings.faults.get("kill-rank")
        if kill and kill[0] == self._rank:
            os.kill(os.getpid(), signal.SIGKILL)
            os._exit(137)  # a container's first process cannot be killed from inside
        code = int(self._settings.faults["exit-rank"][1])
        log("E", f"rank {self._rank} on {self._host}: CUDA error, exiting with code {code}")
        os._exit(code)


def _wait(seconds: float) -> Pauses:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield


def advance(task: Task) -> Message | None:
    """Go on with a task; return its result when it has come to its end."""
    try:
        next(task)
    except StopIteration as done:
        result: Message = done.value
        return result
    return None


def die_of_signals() -> None:
    """Let signals end this process even inside MPI's C code, where Python handles none."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL)
        if os.getpid() == 1:  # a container's first process: the kernel spares it the default
            signal.signal(signum, lambda number, _: os._exit(128 + number))
