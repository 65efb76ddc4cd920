"""The ranks other than 0: they do what the leader orders, until it stops them."""

from __future__ import annotations

import os
import time
import traceback

from console import Fatal
from environment import Settings
from mpi_world import POLL, Comm, Part, Request, Task, advance, die_of_signals, enter


def main(rank: int, size: int, settings: Settings) -> int:
    die_of_signals()
    comm = enter(size)
    if comm.Get_rank() != rank:  # every task a world of its own: the launcher spoke no PMI to it
        raise Fatal(
            "RuntimeError",
            f"rank{comm.Get_rank()} should not have executor\n"
            f"[simulator] task {rank} of {size} is rank {comm.Get_rank()} in an MPI world of "
            f"{comm.Get_size()}: is `srun --mpi=pmix` missing, or its environment?",
        )
    try:
        world_is_whole = obey(comm, Part(comm, settings))
    except Exception:
        traceback.print_exc()
        os._exit(1)  # not by the normal way: MPI_Finalize would wait for all ranks
    if not world_is_whole:
        os._exit(0)  # the same, for a rank that will never come
    return 0


def obey(comm: Comm, part: Part) -> bool:
    """Work until told to stop; say whether all ranks are still there then."""
    task: Task | None = None
    answer: Request | None = None  # kept: MPI still reads what has not been sent yet
    while True:
        if comm.iprobe():
            order = comm.recv()
            if order["op"] == "stop":
                return bool(order["whole"])
            task = part.perform(order)
        result = advance(task) if task else None
        if result:
            task, answer = None, comm.isend(result, 0)
        if answer and answer.Test():
            answer = None
        part.strike()
        time.sleep(POLL)
