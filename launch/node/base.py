"""What every order needs: telling, asking, and ending when the launcher does.

The launcher sends this file, the parts that its order needs, and the order, through the standard
input of `python3 -IS -c ...`. That pipe stays open for as long as the order is wanted: however the
launcher ends, SIGKILL included, the kernel closes it, and the node cleans up by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

TYPE_CHECKING = False  # like typing's, whose import would cost every order 2 ms
if TYPE_CHECKING:
    from typing import Any, NoReturn

NODE = os.environ.get("SLURMD_NODENAME") or os.uname().nodename.partition(".")[0]
LABEL = "tensorrt-llm-serve"
TIMED_OUT, NOT_FOUND = 124, 127  # the exit codes that a shell would give
STOPPED = 143
CLIENT_FAILED = 125  # docker's own; if the daemon went away, the container may live on
ESTABLISHED, LISTENING = "01", "0A"  # states of a socket, as /proc/net/tcp has them
# Warnings that Slurm sends if the job asks for them (--signal=USR1@300). They kill a process that
# does not expect them.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGXCPU)
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# srun passes longer lines on 1024 bytes at a time, with other nodes' lines in between.
LONGEST, PIECE = 1000, 400
OVER = (
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT"
).split()


def tell(message: Any) -> None:  # noqa: ANN401 (any dataclass of messages.py)
    """One message on a line of its own, or in pieces on several."""
    line = line_of(type(message).__name__, vars(message))
    if len(line) < LONGEST:
        put(line)
        return
    for begin in range(0, len(line), PIECE):
        end = begin + PIECE
        put(line_of("Piece", {"text": line[begin:end], "last": end >= len(line)}))


def line_of(kind: str, fields: dict[str, Any]) -> str:
    return json.dumps({"node": NODE, kind: fields})


def put(line: str) -> None:
    """Write a line; a launcher that is gone must not stop a clean-up."""
    with contextlib.suppress(OSError):
        os.write(1, line.encode() + b"\n")


def ask(*argv: str, timeout: float = 10, **options: Any) -> tuple[int, str]:  # noqa: ANN401
    """Exit code and output of a short command; its errors, too, but only if it fails.

    Otherwise they may be no more than a warning, which Docker's client has beside each answer.
    """
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    options.setdefault("stderr", pipe)
    try:
        done = subprocess.run(argv, stdin=null, stdout=pipe, timeout=timeout, **options)
    except subprocess.TimeoutExpired:
        return TIMED_OUT, ""
    except OSError as error:
        return NOT_FOUND, f"{argv[0]}: {error.strerror}"
    said = done.stdout + ((done.stderr or b"") if done.returncode else b"")
    return done.returncode, said.decode(errors="replace").strip()


def shell_code(code: int) -> int:
    """An exit code as a shell tells it: 137 for a process that SIGKILL ended."""
    return code if code >= 0 else 128 - code


@dataclass
class Ends:
    """What ends an order: the end of our input, a signal, the job's end, or that of the process."""

    STOP = "stop"
    events: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)

    def hold(self, ask_every: float = 0) -> None:
        """From now on the end of our input is a STOP, and so is a signal.

        With `ask_every` seconds Slurm is asked, too, whether the job is over: a node that was out
        of reach may never hear of the end.
        """
        for signum in STOPS:
            signal.signal(signum, self._stop)
        threading.Thread(target=self._watch, args=(ask_every,), daemon=True).start()

    def _stop(self, signum: int, _: Any) -> None:  # noqa: ANN401
        """Stop, and say so in our log: the job's --signal must not look like a failure."""
        with contextlib.suppress(OSError):
            os.write(2, f"{LABEL}: {NODE}: stopped by {signal.Signals(signum).name}\n".encode())
        self.events.put(self.STOP)

    def _watch(self, ask_every: float) -> None:
        job = Job(os.environ.get("SLURM_JOB_ID", "") if ask_every else "")
        job.is_over()  # Slurm's word counts only when it has once known the job
        while True:
            if select.select([0], [], [], ask_every if job.id else None)[0]:
                if not os.read(0, 1 << 16):
                    break
            elif job.is_over():
                break
        self.events.put(self.STOP)

    def after(self, process: subprocess.Popen[Any]) -> None:
        """Make the end of a process an event, too: its exit code."""
        wait = lambda: self.events.put(shell_code(process.wait()))  # noqa: E731
        threading.Thread(target=wait, daemon=True).start()

    def code_of(self, process: subprocess.Popen[Any]) -> int | None:
        """Wait for a process: its exit code, or None when we are to stop first."""
        self.after(process)
        code = self.events.get()
        return None if code == self.STOP else int(code)

    def code_of_client(self, client: subprocess.Popen[Any]) -> int | None:
        """The same for Docker's client, which may have been ended by what is to stop us, too.

        A signal to our step reaches both, and so does the end of the input.
        """
        code = self.code_of(client)
        own = code is None or 0 < code < CLIENT_FAILED
        return code if own or not self.stop_within(0.1) else None

    def stop_within(self, seconds: float) -> bool:
        """Wait for at most so long; whether we are to stop."""
        with contextlib.suppress(queue.Empty):
            return bool(self.events.get(timeout=seconds) == self.STOP)
        return False


@dataclass
class Job:
    """Our job, by its id; '' if there is none."""

    id: str
    known: bool = False  # Slurm has called it running

    def is_over(self) -> bool:
        """Whether Slurm says so, after it has once said that the job runs."""
        if not self.id:
            return False
        command = "squeue --all --local --noheader --states=all".split()
        env = unfiltered("SLURM_CLUSTERS")  # nodes have one
        said = ask(*command, f"--jobs={self.id}", "--format=%A %T", timeout=5, env=env)[1]
        lines = said.splitlines()
        if f"{self.id} RUNNING" in lines:
            self.known = True
            return False
        gone = "Invalid job id specified" in said
        return self.known and (gone or any(f"{self.id} {state}" in lines for state in OVER))


def unfiltered(*more: str) -> dict[str, str]:
    """Our environment for Slurm's programs, without filters that make jobs or steps look ended."""
    leaves = ("SQUEUE_", "SCANCEL_", *more)
    return {name: value for name, value in os.environ.items() if not name.startswith(leaves)}


def listening(port: int) -> set[str]:
    """The sockets that listen on a port of this node, by their inodes."""
    return {row[9] for row in sockets(port, LISTENING)}


def sockets(port: int, state: str) -> list[list[str]]:
    """The kernel's rows for a port of this node: [2] is the other end, [9] the socket's inode."""
    pattern = re.compile(rf" [0-9A-F]+:{port:04X} [0-9A-F]+:[0-9A-F]{{4}} {state} ")
    return [line.split() for line in tables_of_sockets() if pattern.search(line)]


def ending_with_us(signum: int) -> Callable[[], None]:
    """For a child that is about to start: the kernel sends it the signal when our thread ends."""
    import ctypes  # late: few orders need it

    libc, on_death_of_parent = ctypes.CDLL(None), 1  # PR_SET_PDEATHSIG
    return lambda: libc.prctl(on_death_of_parent, signum)


def read(path: str, errors: str = "surrogateescape") -> str:
    with open(path, errors=errors) as file:
        return file.read()


def tables_of_sockets() -> list[str]:
    """The kernel's tables of TCP sockets: a row for each socket."""
    lines = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            lines += read(table).splitlines()[1:]
    return lines


def take_parts(sizes: list[str]) -> None:
    """Read the parts that follow this one, `name:bytes` each; together they are one module."""
    us = sys.modules["launch.node.base"] = sys.modules[__name__]
    for word in sizes:
        name, _, size = word.partition(":")
        sys.modules[f"launch.node.{name}"] = us
        source = sys.stdin.buffer.read(int(size))
        exec(compile(source, f"launch/node/{name}.py", "exec"), vars(us))


def read_order() -> Any:  # noqa: ANN401 (an order of one of the parts)
    """The order that follows the parts, up to an empty line: `{"Name": {its fields}}`."""
    lines: list[bytes] = []
    while (line := sys.stdin.buffer.readline()) != b"\n":
        if not line:
            os._exit(STOPPED)  # the sender was killed in the middle
        lines.append(line)
    [(name, fields)] = json.loads(b"".join(lines).decode(errors="surrogateescape")).items()
    return globals()[name](**fields)


def main() -> NoReturn:
    """Do what the launcher sent. Threads that still wait for something do not delay the end."""
    for signum in WARNINGS:
        signal.signal(signum, signal.SIG_IGN)  # all that we start inherits this
    take_parts(sys.argv[2:])
    try:
        code = read_order()()
    except OSError as error:
        print(f"ERROR: {NODE}: {error}", file=sys.stderr, flush=True)
        code = 1
    os._exit(code)


if __name__ == "__main__":
    main()
