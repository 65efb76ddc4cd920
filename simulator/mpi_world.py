"""What each rank does on the orders of the leader, which is at rank 0.

Nobody blocks inside MPI: Open MPI waits by spinning, and idle ranks must leave the cores alone.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from sched import scheduler
from types import SimpleNamespace
from typing import Any, NamedTuple

from console import Fatal, crash, log
from environment import Settings
from leader_link import Message

POLL = 0.03  # seconds between two looks at MPI
ORDER, REPORT = 1, 2  # tags of messages
KILLED = 128 + signal.SIGKILL


class Report(NamedTuple):
    """What a rank says of itself."""

    rank: int
    host: str
    gpus: int


def enter(size: int) -> Any:  # noqa: ANN401 (mpi4py's communicator, or what stands in for it)
    """Return MPI.COMM_WORLD once all its ranks are there; `size` is what the environment says."""
    if size == 1:
        return _alone()
    try:
        importlib.import_module("mpi4py").rc.thread_level = "funneled"
        return importlib.import_module("mpi4py.MPI").COMM_WORLD
    except ImportError as error:
        words = f"{error}\n[simulator] {size} ranks need the Python package mpi4py"
        raise Fatal(type(error).__name__, words) from None


def _alone() -> SimpleNamespace:
    """A world of one rank, which needs no MPI to talk to itself."""
    boxes: dict[int, deque[object]] = {ORDER: deque(), REPORT: deque()}

    def isend(message: object, dest: int, tag: int) -> SimpleNamespace:
        boxes[tag].append(message)
        return SimpleNamespace(Test=lambda: True)

    return SimpleNamespace(
        Get_rank=lambda: 0, Get_size=lambda: 1, isend=isend,
        iprobe=lambda tag: bool(boxes[tag]), recv=lambda tag: boxes[tag].popleft(),
    )  # fmt: skip


class Part:
    """One rank's part in the world."""

    def __init__(self, comm: Any, settings: Settings) -> None:  # noqa: ANN401
        self.rank, self.host = comm.Get_rank(), socket.gethostname()
        self._comm, self._settings = comm, settings
        self._sent: list[Any] = []  # kept: MPI still reads what has not been sent yet
        self._clock = scheduler()
        self._dies_after, self._code = _fate(self.rank, settings.faults)

    def turn(self) -> Message | None:
        """Do what there is to do; return the order to stop once it has come."""
        if self._comm.iprobe(tag=ORDER):
            order: Message = self._comm.recv(tag=ORDER)
            if order["op"] == "stop":
                return order
            self._begin(order)
        self._clock.run(blocking=False)
        return None

    def _begin(self, order: Message) -> None:
        """Schedule what the order asks for; a rank only waits."""
        takes = 0.0
        if order["op"] == "load":
            takes = self._settings.load_seconds
            name, gpu = f"rank {self.rank} on {self.host}", self.rank % int(order["gpus_per_node"])
            share = f"part {self.rank + 1} of {self._comm.Get_size()} of {order['model']}"
            log("I", f"{name}: loading {share} on GPU {gpu}")
            self._clock.enter(takes, 1, log, ("I", f"{name}: loaded"))
            if self._dies_after == 0:
                self._clock.enter(takes / 2, 1, self._die)
        elif order["op"] == "beat" and self._dies_after:  # the first: the server is ready
            self._clock.enter(self._dies_after, 1, self._die)
            self._dies_after = None
        report = Report(self.rank, self.host, self._settings.gpus)
        self._clock.enter(takes, 2, self.send, (report, 0, REPORT))

    def send(self, message: object, rank: int, tag: int) -> None:
        self._sent = [request for request in self._sent if not request.Test()]
        self._sent.append(self._comm.isend(message, rank, tag))

    def has_sent_all(self) -> bool:
        return all(request.Test() for request in self._sent)

    def _die(self) -> None:
        """Crash without a word to MPI, so that the others must find out by themselves."""
        if self._code == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)  # which a container's first process survives
        else:
            log("E", f"rank {self.rank} on {self.host}: CUDA error, exiting with code {self._code}")
        os._exit(self._code)


def _fate(rank: int, faults: Mapping[str, Sequence[float]]) -> tuple[float | None, int]:
    """Seconds from loading to its death (0: half way, None: never), and its exit code."""
    fates = []
    for name, given in (("exit-rank", 2), ("kill-rank", 1)):
        said = faults.get(name, [-1])
        if said[0] == rank:
            code = int(said[1]) if name == "exit-rank" else KILLED
            fates.append(((*said[given:], 0.0)[0], code))
    return min(fates, default=(None, 0))


def obey(rank: int, size: int, settings: Settings) -> bool:
    """Be a worker until told to stop; say whether all ranks are still there then."""
    part = Part(enter(size), settings)
    if part.rank != rank:  # each task is a world of its own: the launcher offered no PMI
        raise Fatal(
            "RuntimeError",
            f"rank{part.rank} should not have executor\n"
            f"[simulator] task {rank} of {size} is rank {part.rank} in an MPI world of 1: "
            "is `srun --mpi=pmix` missing, or its environment?",
        )
    while (order := part.turn()) is None:
        time.sleep(POLL)
    return bool(order["whole"])


def run_rank(work: Callable[[], bool]) -> int:
    """Return the exit code of a rank's work, which says whether the world is still whole."""
    for signum in (signal.SIGTERM, signal.SIGINT):  # to end even inside MPI's C code
        signal.signal(signum, signal.SIG_DFL)
        if os.getpid() == 1:  # a container's first process: the kernel ignores the default
            signal.signal(signum, lambda number, _: os._exit(128 + number))
    try:
        whole = work()
    except Fatal as error:
        return crash(error)
    except Exception:
        sys.excepthook(*sys.exc_info())
        os._exit(1)  # not by the normal way: MPI_Finalize would wait for all ranks
    if not whole:
        os._exit(0)  # the same, for a rank that will never come
    return 0
