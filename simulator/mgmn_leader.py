"""Rank 0: passes what trtllm-serve wants on to all ranks, itself included.

Each client has a thread; only the main thread uses MPI.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from math import inf
from threading import Lock, Thread
from typing import Any

from console import Fatal, log
from environment import Settings
from leader_link import Message, read_key, seal, unseal
from mpi_world import ORDER, POLL, REPORT, Part, Report, enter, run_rank

HEARTBEAT = 1.0  # seconds between two questions whether all ranks are alive
PATIENCE = 5.0  # seconds after which a rank that has not answered counts as dead
FAREWELL = 1.0  # seconds to get the last order out
LONGEST = 1 << 16  # bytes of a line


class Broken(Exception):
    """Ranks have stopped answering."""


def check_world(reports: Sequence[Report], wanted: int, gpus_per_node: int) -> None:
    """Check that there are as many ranks as wanted, each with a GPU of its own; Fatal if not."""
    if len(reports) != wanted:
        raise Fatal(
            "ValueError",
            "n_workers must be equal to the number of processes in MPI, "
            f"got {wanted} vs {len(reports)}\n"
            f"[simulator] tp_size * pp_size * cp_size = {wanted} needs exactly that many ranks",
        )
    taken: dict[tuple[str, int], int] = {}
    for rank, host, gpus in reports:
        gpu = rank % gpus_per_node
        if (other := taken.setdefault((host, gpu), rank)) != rank:
            raise Fatal(
                "RuntimeError",
                "NCCL error: invalid usage\n"
                f"Duplicate GPU detected : rank {rank} and rank {other} "
                f"both on CUDA device {gpu} of {host}\n"
                f"[simulator] GPU = rank % {gpus_per_node}: ranks must be distributed in blocks",
            )
        if gpu >= gpus:
            raise Fatal(
                "RuntimeError",
                f"CUDA error: invalid device ordinal\n[simulator] rank {rank} wants GPU "
                f"{gpu} of {host}, which has {gpus}",
            )


class Leader:
    """Serves the one trtllm-serve that belongs to this world."""

    def __init__(self, comm: Any) -> None:  # noqa: ANN401
        self.stopped, self.whole = False, True
        self._comm, self._ranks = comm, range(comm.Get_size())
        self._part = Part(comm, Settings(os.environ))
        self._key = read_key(os.environ)
        self._orders: deque[Message] = deque()
        self._reports: dict[int, Report] = {}
        self._hosts: dict[int, str] = {}
        self._gpus_per_node = 1
        self._asking = Lock()

    def lead(self) -> None:
        """Pass orders on, do rank 0's own part, and take in what the ranks report."""
        while not self.stopped:
            while self._orders:
                self._send_all(self._orders.popleft(), self._ranks)
            self._part.turn()
            while self._comm.iprobe(tag=REPORT):
                report = Report(*self._comm.recv(tag=REPORT))
                self._reports[report.rank], self._hosts[report.rank] = report, report.host
            time.sleep(POLL)
        self._send_all({"op": "stop", "whole": self.whole}, self._ranks[1:])
        deadline = time.monotonic() + FAREWELL
        while not self._part.has_sent_all() and time.monotonic() < deadline:
            time.sleep(POLL)

    def _send_all(self, order: Message, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self._part.send(order, rank, ORDER)

    def _ask(self, order: Message, patience: float = inf) -> list[Report]:
        """Return the reports of all ranks, in their order."""
        with self._asking:
            self._reports, deadline = {}, time.monotonic() + patience
            self._orders.append(order)
            while missing := self._ranks - self._reports.keys():
                if time.monotonic() > deadline:
                    self.whole = False
                    names = (f"{r} ({self._hosts.get(r, 'unknown host')})" for r in sorted(missing))
                    raise Broken(f"no answer for {PATIENCE:g} s from rank {', '.join(names)}")
                time.sleep(POLL)
            return [self._reports[rank] for rank in self._ranks]

    def accept(self, listener: socket.socket) -> None:
        while True:
            Thread(target=self._serve, args=listener.accept()[:1], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, client.makefile("rb") as lines:
                while line := lines.readline(LONGEST):
                    try:
                        self._obey(unseal(self._key, line), client)
                    except Broken as error:
                        log("E", f"[simulator] the MPI world is broken: {error}")
                        client.sendall(seal(self._key, {"broken": str(error)}))
                        lines.read()  # what trtllm-serve waits for will not come any more
        except ValueError as error:
            log("W", f"[simulator] the leader refuses a client: {error}")
        except OSError:
            pass  # it went away in the middle of an answer

    def _obey(self, message: Message, client: socket.socket) -> None:
        if message["op"] == "stop":
            self.stopped = True
        elif message["op"] == "join":
            client.sendall(seal(self._key, self._join(message)))
        elif message["op"] == "load":
            self._ask({**message, "gpus_per_node": self._gpus_per_node})
            client.sendall(seal(self._key, {"loaded": True}))
        elif message["op"] == "watch":
            self._ask({"op": "beat"}, PATIENCE)
            while not select.select([client], [], [], HEARTBEAT)[0]:  # readable: it is gone
                self._ask({"op": "beat"}, PATIENCE)

    def _join(self, message: Message) -> Message:
        self._gpus_per_node = message["gpus_per_node"]
        try:
            check_world(self._ask({"op": "join"}, PATIENCE), message["world_size"],
                        self._gpus_per_node)  # fmt: skip
        except Fatal as error:
            return {"kind": error.kind, "error": str(error)}
        return {"joined": True}


def main(size: int, listener: socket.socket) -> bool:
    """Serve until told to stop; return whether all ranks are still there."""
    leader = Leader(enter(size))
    listener.listen()
    Thread(target=leader.accept, args=[listener], daemon=True).start()
    leader.lead()
    return leader.whole


if __name__ == "__main__":
    listening = socket.socket(fileno=int(sys.argv[2]))
    raise SystemExit(run_rank(lambda: main(int(sys.argv[1]), listening)))
