"""Rank 0: asks all ranks, itself among them, for what trtllm-serve wants of them."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Sequence
from math import inf
from typing import Any

from console import Fatal, log
from environment import read_settings
from leader_link import Message, read_key, seal, unseal
from mpi_world import ORDER, POLL, REPORT, Part, Report, enter, run_rank

HEARTBEAT = 1.0  # seconds between two questions whether all ranks are alive
PATIENCE = 5.0  # seconds after which a rank that has not answered counts as dead
FAREWELL = 1.0  # seconds to get the last order out


class Broken(Exception):
    """Ranks have stopped answering."""


def check_world(reports: Sequence[Report], wanted: int, gpus_per_node: int) -> None:
    """Hold the world against the engine's size, and the ranks' GPUs against each other."""
    if len(reports) != wanted:
        raise Fatal(
            "ValueError",
            "n_workers must be equal to the number of processes in MPI, "
            f"got {wanted} vs {len(reports)}\n"
            f"[simulator] tp_size * pp_size * cp_size = {wanted} needs exactly that many ranks",
        )
    taken: dict[tuple[str, int], int] = {}
    for report in reports:
        gpu = report.rank % gpus_per_node
        if (other := taken.setdefault((report.host, gpu), report.rank)) != report.rank:
            raise Fatal(
                "RuntimeError",
                "NCCL error: invalid usage\n"
                f"Duplicate GPU detected : rank {report.rank} and rank {other} "
                f"both on CUDA device {gpu} of {report.host}\n"
                f"[simulator] GPU = rank % {gpus_per_node}: ranks must be distributed in blocks",
            )
        if gpu >= report.gpus:
            raise Fatal(
                "RuntimeError",
                f"CUDA error: invalid device ordinal\n[simulator] rank {report.rank} wants GPU "
                f"{gpu} of {report.host}, which has {report.gpus}",
            )


class Leader:
    """Serves the one trtllm-serve that belongs to this world."""

    def __init__(self, comm: Any) -> None:  # noqa: ANN401
        self.stopped = asyncio.Event()
        self.whole = True
        self._comm = comm
        self._part = Part(comm, read_settings(os.environ))
        self._key = read_key(os.environ)
        self._reports: dict[int, Report] = {}
        self._hosts: dict[int, str] = {}
        self._gpus_per_node = 1

    async def turn(self) -> None:
        """Do rank 0's own part, and take in what the ranks report."""
        while True:
            self._part.turn()
            while self._comm.iprobe(tag=REPORT):
                report = Report(*self._comm.recv(tag=REPORT))
                self._reports[report.rank], self._hosts[report.rank] = report, report.host
            await asyncio.sleep(POLL)

    async def ask(self, order: Message, patience: float = inf) -> list[Report]:
        """Return the reports of all ranks, in their order."""
        self._reports = {}
        ranks, deadline = range(self._comm.Get_size()), time.monotonic() + patience
        for rank in ranks:
            self._part.send(order, rank, ORDER)
        while missing := [rank for rank in ranks if rank not in self._reports]:
            if time.monotonic() > deadline:
                self.whole = False
                names = (f"{rank} ({self._hosts.get(rank, 'unknown host')})" for rank in missing)
                raise Broken(f"no answer for {PATIENCE:g} s from rank {', '.join(names)}")
            await asyncio.sleep(POLL)
        return [self._reports[rank] for rank in ranks]

    async def say_goodbye(self) -> None:
        """Send all workers home."""
        for rank in range(1, self._comm.Get_size()):
            self._part.send({"op": "stop", "whole": self.whole}, rank, ORDER)
        deadline = time.monotonic() + FAREWELL
        while not self._part.has_sent_all() and time.monotonic() < deadline:
            await asyncio.sleep(POLL)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                await self._obey(unseal(self._key, line), reader, writer)
        except Broken as error:
            log("E", f"[simulator] the MPI world is broken: {error}")
            writer.write(seal(self._key, {"broken": str(error)}))
            return  # with the connection open: nothing that trtllm-serve waits for comes any more
        except ValueError as error:
            log("W", f"[simulator] the leader refuses a client: {error}")
        except OSError:
            pass  # it went away in the middle of an answer
        writer.close()

    async def _obey(
        self, message: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if message["op"] == "stop":
            self.stopped.set()
        elif message["op"] == "join":
            writer.write(seal(self._key, await self._join(message)))
        elif message["op"] == "load":
            await self.ask({**message, "gpus_per_node": self._gpus_per_node})
            await self.ask({"op": "meet"})  # no rank serves before all can
            writer.write(seal(self._key, {"loaded": True}))
        elif message["op"] == "watch":
            while not reader.at_eof():  # alive, as long as there is somebody to tell
                await self.ask({"op": "beat"}, PATIENCE)
                await asyncio.sleep(HEARTBEAT)

    async def _join(self, message: Message) -> Message:
        self._gpus_per_node = message["gpus_per_node"]
        try:
            reports = await self.ask({"op": "join"}, PATIENCE)
            check_world(reports, message["world_size"], self._gpus_per_node)
        except Fatal as error:
            return {"kind": error.kind, "error": str(error)}
        return {"joined": True}


async def lead(size: int, listener: socket.socket) -> bool:
    """Serve until told to stop, once all ranks are there; say whether they all still are then."""
    leader = Leader(enter(size))
    server = await asyncio.start_server(leader.connected, sock=listener)
    turns = asyncio.create_task(leader.turn())
    await leader.stopped.wait()
    turns.cancel()
    server.close()
    await leader.say_goodbye()
    return leader.whole


if __name__ == "__main__":
    listening = socket.socket(fileno=int(sys.argv[2]))
    raise SystemExit(run_rank(lambda: asyncio.run(lead(int(sys.argv[1]), listening))))
