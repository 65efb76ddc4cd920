"""One rank of a multi-node server, in the order of TensorRT-LLM's shell script of the same name.

Rank 0 has two children: trtllm-serve in the background, which must not see that MPI is there, and
the leader in the foreground. Every other rank is a worker.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import FrameType
from typing import NoReturn

import mgmn_worker
from console import Fatal, crash, log, say
from environment import Settings, read_settings
from leader_link import ADDRESS, KEY, PROXY, Link

FIRST_PORT = 10012
RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMI_ID")
SIZES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
MPI_PREFIXES = (
    *("OMPI_", "PMIX_", "PMI_", "SLURM_", "MPI_", "UCX_"),
    *("I_MPI_", "HYDRA_", "KMP_", "MPICH_", "MV2_", "CRAY_"),
)
LEADER = Path(__file__).resolve().parent / "mgmn_leader.py"


def main(argv: Sequence[str]) -> int:
    if not argv:
        say("Usage: trtllm-llmapi-launch COMMAND [ARGS]...", error=True)
        return 2
    try:
        settings = read_settings(os.environ)
        rank, size = _number(RANKS, 0), _number(SIZES, 1)
        _yellow(f"mpi_rank: {rank}")
        with _reserve() as listener:
            _prepare(os.environ, size, listener.getsockname()[1])
            if rank == 0:
                return RankZero(argv, settings, listener).run(size)
        return _worker(rank, size, settings)
    except Fatal as error:
        crash(error)
        return 1


def _number(names: Sequence[str], default: int) -> int:
    """Return the first that is set; empty counts as not set, as in the shell."""
    for name in names:
        if text := os.environ.get(name):
            if not text.isdecimal():
                raise Fatal("ValueError", f"{name}={text} is not a number")
            return int(text)
    return default


def _prepare(env: MutableMapping[str, str], size: int, port: int) -> None:
    """Export what trtllm-serve and the leader read. The key is for the environment alone."""
    address = f"tcp://127.0.0.1:{port}"
    env.update({PROXY: "1", "tllm_mpi_size": str(size), ADDRESS: address})
    env[KEY] = secrets.token_hex(32)
    _yellow(f"tllm_mpi_size: {size}")
    _yellow(f"{ADDRESS}: {address}")


def _reserve() -> socket.socket:
    """Bind the first free port. The real script only looks for one: two that look at the same
    moment, be they ranks of one world, find the same one, and then a leader cannot listen."""
    for port in count(FIRST_PORT):
        listener = socket.socket()
        with suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return listener
        listener.close()
    raise AssertionError("bind refuses numbers that are no ports")


def _worker(rank: int, size: int, settings: Settings) -> int:
    log("I", f"This is a SIMULATOR of TensorRT-LLM 1.1.0: rank {rank} computes nothing")
    _yellow(f"rank{rank} run mgmn worker node with mpi_world_size: {size} ...")
    return mgmn_worker.main(rank, size, settings)


def without_mpi(env: Mapping[str, str]) -> dict[str, str]:
    """Return what trtllm-serve gets: inside an MPI environment it would join the world itself."""
    return {name: value for name, value in env.items() if not name.startswith(MPI_PREFIXES)}


class RankZero:
    """The two children, and which of their ends ends the rank."""

    def __init__(self, command: Sequence[str], settings: Settings, listener: socket.socket) -> None:
        self._listener = listener
        self._propagate = settings.launch == "propagate"
        # The older script loses the quotes around its arguments.
        self._command = list(command) if self._propagate else " ".join(command).split()
        self._children: list[int] = []

    def run(self, size: int) -> int:
        if self._propagate:
            return self._wait_for_both(*self._start(size))
        return self._wait_for_leader(*self._start(size))

    def _start(self, size: int) -> tuple[int, int]:
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._pass_on)
        _yellow(f"rank0 run {' '.join(self._command)} in background")
        server = self._spawn(self._command, without_mpi(os.environ))
        _yellow(f"rank0 run mgmn leader node with mpi_world_size: {size} ...")
        _yellow(f"rank0 host: {socket.gethostname()}")
        self._listener.set_inheritable(True)
        fd = str(self._listener.fileno())
        leader = self._spawn([sys.executable, str(LEADER), str(size), fd], dict(os.environ))
        self._listener.close()
        return server, leader

    def _spawn(self, command: list[str], env: dict[str, str]) -> int:
        pid = os.fork()
        if pid == 0:
            _execute(command, env)
        self._children.append(pid)
        return pid

    def _wait_for_leader(self, server: int, leader: int) -> int:
        """Older script, `set -e`: after a failure of trtllm-serve nobody stops the leader."""
        while True:
            pid, code = _next_end()
            if pid == leader:
                return code
            if pid == server and code == 0:
                _stop_leader()

    def _wait_for_both(self, server: int, leader: int) -> int:
        """Newer script: the leader is stopped, and the first failure is the rank's."""
        codes: dict[int, int] = {}
        while not {server, leader} <= codes.keys():
            pid, code = _next_end()
            codes[pid] = code
            if pid == server:
                _yellow(f"Rank0 Task exit code: {code}")
                _stop_leader()
        return codes[server] or codes[leader]

    def _pass_on(self, signum: int, _: FrameType | None) -> NoReturn:
        """End at once; a trtllm-serve that ignores the signal stays behind."""
        for pid in self._children:
            with suppress(ProcessLookupError):
                os.kill(pid, signum)
        os._exit(128 + signum)


def _execute(command: list[str], env: dict[str, str]) -> NoReturn:
    """Become the command; one that cannot be started is a child that ends, as in the shell."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE):  # Python ignores the last
        signal.signal(signum, signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, env)
    except OSError as error:
        say(f"trtllm-llmapi-launch: {command[0]}: {error.strerror}", error=True)
    os._exit(127)


def _next_end() -> tuple[int, int]:
    pid, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    return pid, code if code >= 0 else 128 - code


def _stop_leader() -> None:
    """In a thread: the leader may not listen yet, and may end without ever having done so."""

    def stop() -> None:
        link = Link(os.environ)
        link.send({"op": "stop"})

    threading.Thread(target=stop, daemon=True).start()


def _yellow(text: str) -> None:
    say(f"\033[33m{text}\033[0m", error=True)
