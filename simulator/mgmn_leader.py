"""Rank 0: asks all ranks, itself among them, for what trtllm-serve wants of them."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence

from console import Fatal, crash, log
from environment import read_settings
from leader_link import Message, read_key, seal, unseal
from mpi_world import POLL, Comm, Part, Report, Request, Task, advance, die_of_signals, enter

HEARTBEAT = 1.0  # seconds between two questions whether all ranks are alive
PATIENCE = 5.0  # seconds after which a rank that has not answered counts as dead
FAREWELL = 1.0  # seconds to get the last order out


class Broken(Exception):
    """Ranks have stopped answering."""


class World:
    """All ranks, seen from the first."""

    def __init__(self, comm: Comm, part: Part) -> None:
        self.size = comm.Get_size()
        self.whole = True
        self._comm = comm
        self._part = part
        self._own: Task | None = None
        self._answers: dict[int, Report] = {}
        self._hosts: dict[int, str] = {}
        self._sent: list[Request] = []  # kept: MPI still reads what has not been sent yet

    async def ask(self, order: Message, patience: float = float("inf")) -> list[Report]:
        """Return the answers of all ranks, in their order."""
        self._answers = {}
        self._own = self._part.perform(order)
        self._send(order)
        deadline = time.monotonic() + patience
        while len(self._answers) < self.size:
            if time.monotonic() > deadline:
                raise self._broken()
            self._progress()
            await asyncio.sleep(POLL)
        self._hosts = {rank: report.host for rank, report in self._answers.items()}
        return [self._answers[rank] for rank in range(self.size)]

    async def idle(self) -> None:
        """Do what is due without being asked."""
        while True:
            self._part.strike()
            await asyncio.sleep(POLL)

    async def stop(self) -> None:
        """Send all workers home."""
        self._send({"op": "stop", "whole": self.whole})
        deadline = time.monotonic() + FAREWELL
        while self._sent and time.monotonic() < deadline:
            self._forget_sent()
            await asyncio.sleep(POLL)

    def _send(self, order: Message) -> None:
        self._sent += [self._comm.isend(order, rank) for rank in range(1, self.size)]

    def _progress(self) -> None:
        self._forget_sent()
        while self._comm.iprobe():
            self._take(self._comm.recv())
        if self._own and (own := advance(self._own)):
            self._own = None
            self._take(own)

    def _forget_sent(self) -> None:
        self._sent = [request for request in self._sent if not request.Test()]

    def _take(self, answer: Message) -> None:
        report = Report(**answer)
        self._answers[report.rank] = report

    def _broken(self) -> Broken:
        self.whole = False
        missing = [rank for rank in range(self.size) if rank not in self._answers]
        names = ", ".join(f"{rank} ({self._hosts.get(rank, 'unknown host')})" for rank in missing)
        return Broken(f"no answer for {PATIENCE:g} s from rank {names}")


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
        other = taken.setdefault((report.host, gpu), report.rank)
        if other != report.rank:
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

    def __init__(self, world: World, key: bytes) -> None:
        self.stopped = asyncio.Event()
        self._world = world
        self._key = key
        self._gpus_per_node = 1

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
            await self._load(message)
            writer.write(seal(self._key, {"loaded": True}))
            await self._watch(reader)

    async def _join(self, message: Message) -> Message:
        self._gpus_per_node = message["gpus_per_node"]
        reports = await self._world.ask({"op": "join"}, PATIENCE)
        try:
            check_world(reports, message["world_size"], self._gpus_per_node)
        except Fatal as error:
            return {"kind": error.kind, "error": str(error)}
        return {"joined": True}

    async def _load(self, message: Message) -> None:
        await self._world.ask({**message, "gpus_per_node": self._gpus_per_node})
        await self._world.ask({"op": "meet"})  # no rank serves before all can

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        """Make sure that all ranks are alive, as long as there is somebody to tell."""
        while not reader.at_eof():
            await asyncio.sleep(HEARTBEAT)
            await self._world.ask({"op": "beat"}, PATIENCE)


async def lead(comm: Comm, listener: socket.socket) -> bool:
    """Serve until told to stop; say whether all ranks are still there then."""
    world = World(comm, Part(comm, read_settings(os.environ)))
    leader = Leader(world, read_key(os.environ))
    server = await asyncio.start_server(leader.connected, sock=listener)
    idle = asyncio.create_task(world.idle())
    await leader.stopped.wait()
    idle.cancel()
    server.close()
    await world.stop()
    return world.whole


def main(size: int, listener: socket.socket) -> int:
    """Lead `size` ranks; `listener` is bound already, and listens once all of them are there."""
    die_of_signals()
    try:
        whole = asyncio.run(lead(enter(size), listener))
    except Fatal as error:
        crash(error)
        return 1
    except Exception:
        traceback.print_exc()
        os._exit(1)  # not by the normal way: MPI_Finalize would wait for all ranks
    if not whole:
        os._exit(0)  # the same, for a rank that will never come
    return 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))))
