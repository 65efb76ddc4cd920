"""One rank of a multi-node server, in the order of TensorRT-LLM's shell script of the same name.

Rank 0 has two children: trtllm-serve in the background, which must not see that MPI is there, and
the leader in the foreground. Every other rank is a worker.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count
from types import FrameType
from typing import NoReturn

from console import Fatal, crash, log, say
from environment import Settings
from leader_link import ADDRESS, KEY, PROXY, Link
from mpi_world import obey, run_rank

FIRST_PORT = 10012
RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMI_ID")
SIZES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
MPI_PREFIXES = tuple(
    "OMPI_ PMIX_ PMI_ SLURM_ MPI_ UCX_ I_MPI_ HYDRA_ KMP_ MPICH_ MV2_ CRAY_".split()
)
LEADER = f"{sys.path[0]}/mgmn_leader.py"


def main(argv: Sequence[str]) -> int:
    if not argv:
        say("Usage: trtllm-llmapi-launch COMMAND [ARGS]...", error=True)
        return 2
    try:
        settings = Settings(os.environ)
        rank, size = _number(RANKS, 0), _number(SIZES, 1)
    except Fatal as error:
        return crash(error)
    _yellow(f"mpi_rank: {rank}")
    with _reserve() as listener:
        _prepare(size, listener.getsockname()[1])
        if rank == 0:
            return RankZero(argv, size, settings, listener).wait()
    name = f"SIMULATOR of TensorRT-LLM {settings.version}"
    log("I", f"This is a {name}: rank {rank} computes nothing")
    _yellow(f"rank{rank} run mgmn worker node with mpi_world_size: {size} ...")
    return run_rank(lambda: obey(rank, size, settings))


def _number(names: Sequence[str], default: int) -> int:
    """Return the first that is set; empty counts as not set, as in the shell."""
    name = next((name for name in names if os.environ.get(name)), None)
    if name and not os.environ[name].isdecimal():
        raise Fatal("ValueError", f"{name}={os.environ[name]} is not a number")
    return int(os.environ[name]) if name else default


def _prepare(size: int, port: int) -> None:
    """Export what trtllm-serve and the leader read. The key goes into the environment only."""
    address = f"tcp://127.0.0.1:{port}"
    os.environ |= {PROXY: "1", "tllm_mpi_size": str(size), ADDRESS: address}
    os.environ[KEY] = os.urandom(32).hex()
    _yellow(f"tllm_mpi_size: {size}")
    _yellow(f"{ADDRESS}: {address}")


def _reserve() -> socket.socket:
    """Bind the first free port. The real script only looks for one: two that look at the same
    moment, even two ranks of one world, find the same one, and a leader cannot listen."""
    for port in count(FIRST_PORT):
        listener = socket.socket()
        with suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return listener
        listener.close()
    raise AssertionError("bind refuses numbers that are no ports")


class RankZero:
    """The two children, and whose end ends the rank."""

    def __init__(
        self, command: Sequence[str], size: int, settings: Settings, listener: socket.socket
    ) -> None:
        self._children: list[int] = []
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._pass_on)
        self._propagate = settings.launch == "propagate"
        # The older script loses the quotes around its arguments.
        command = command if self._propagate else " ".join(command).split()
        _yellow(f"rank0 run {' '.join(command)} in background")
        # Inside an MPI environment trtllm-serve would join the world itself.
        clean = {k: v for k, v in os.environ.items() if not k.startswith(MPI_PREFIXES)}
        self._server = self._spawn(["sh", "-c", 'exec "$@"', "sh", *command], clean)
        _yellow(f"rank0 run mgmn leader node with mpi_world_size: {size} ...")
        _yellow(f"rank0 host: {socket.gethostname()}")
        listener.set_inheritable(True)
        leader = [sys.executable, LEADER, str(size), str(listener.fileno())]
        self._leader = self._spawn(leader, os.environ)
        listener.close()  # or it would outlive the leader

    def _spawn(self, command: list[str], env: Mapping[str, str]) -> int:
        ignored = [signal.SIGPIPE, signal.SIGXFSZ]  # by Python
        pid = os.posix_spawnp(command[0], command, env, setsigdef=ignored)
        self._children.append(pid)
        return pid

    def wait(self) -> int:
        """Older script, `set -e`: after a failure of trtllm-serve nobody stops the leader. Newer
        one: the leader is stopped, and the first failure is the rank's."""
        codes: dict[int, int] = {}
        while self._leader not in codes or (self._propagate and self._server not in codes):
            pid, status = os.wait()
            code = os.waitstatus_to_exitcode(status)
            codes[pid] = code if code >= 0 else 128 - code
            if pid == self._server and (self._propagate or code == 0):
                _yellow(f"Rank0 Task exit code: {codes[pid]}")
                # In a thread: the leader may not listen yet, and may end before it does.
                threading.Thread(target=self._stop, daemon=True).start()
        return (self._propagate and codes[self._server]) or codes[self._leader]

    def _stop(self) -> None:
        Link(os.environ).send({"op": "stop"})

    def _pass_on(self, signum: int, _: FrameType | None) -> NoReturn:
        """End at once; a trtllm-serve that ignores the signal stays behind."""
        for pid in self._children:
            with suppress(ProcessLookupError):
                os.kill(pid, signum)
        os._exit(128 + signum)


def _yellow(text: str) -> None:
    say(f"\033[33m{text}\033[0m", error=True)
