"""HAProxy in front of a fleet's servers, for as long as our input is open."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from launch.node.base import STOPPED, Ends, ask, ending_with_us, listening, tell
from launch.node.messages import Error, Listens

Again = Callable[[], "subprocess.Popen[bytes]"]  # starts the next one

SYSTEMS = "/usr/local/sbin:/usr/sbin"  # where packages put it, though few users have that in PATH
MOST_FILES = 1 << 17  # open files; HAProxy prepares for all that it may open, which can be billions
OWN_FILES = 28  # of these it needs itself; a stream takes two
WARNED = "warned"


@dataclass
class Front:
    """Run HAProxy with these lines as its file; its exit code is ours.

    However we end, SIGKILL included, the kernel ends it. It leaves no file: its own has no name.
    """

    programs: list[str]  # the first one that accepts the file is run
    lines: list[str]
    port: int
    ask_every: float = 60
    ends: Ends = field(default_factory=Ends)

    def __call__(self) -> int:
        streams = allow_files()
        with tempfile.TemporaryFile() as file:
            file.write("".join(f"{line}\n" for line in self.lines).encode())
            file.flush()
            program, why = self.choose(file.fileno())
            if not program:
                tell(Error(why))
                return 1
            # Before any thread starts, since the child runs Python code first (preexec_fn).
            first = self.start(program, file.fileno())
            self.ends.hold(self.ask_every)
            signal.signal(signal.SIGUSR1, lambda *_: self.ends.events.put(WARNED))
            if first.poll() is None:
                tell(Listens(streams))
            return self.attend(first, lambda: self.start(program, file.fileno()))

    def choose(self, file: int) -> tuple[str, str]:
        """The first program that runs and accepts the file; else why none does."""
        path, why = f"{os.environ.get('PATH', os.defpath)}:{SYSTEMS}", []
        for name in self.programs:
            program = shutil.which(name, path=path)
            if not program:
                why.append(f"{name} is not there, or cannot be executed")
                continue
            code, said = ask(program, "-c", "-f", path_of(file), pass_fds=[file])
            if code == 0:
                return program, ""
            why.append(f"{program}: exit code {code}: {alerts(said)}")
        return "", "; ".join(why)

    def start(self, program: str, file: int) -> subprocess.Popen[bytes]:
        """Return when it listens, or has ended."""
        before = listening(self.port)
        process = subprocess.Popen(
            [program, "-db", "-f", path_of(file)],
            stdin=subprocess.DEVNULL,
            pass_fds=[file],
            preexec_fn=ending_with_us(signal.SIGKILL),
        )
        while process.poll() is None and not listening(self.port) - before:
            time.sleep(0.01)
        return process

    def attend(self, newest: subprocess.Popen[bytes], again: Again) -> int:
        """Wait until we are to stop, or the newest ends.

        Slurm's warning (SIGUSR1) may go to everything in a step. To HAProxy it means: take no more
        connections, and end with the last one. Then a second HAProxy beside it takes new ones.
        """
        running = [newest]
        self.ends.after(newest)
        while True:
            event = self.ends.events.get()
            if event == WARNED:
                if self.is_given_up():
                    running.append(again())
                    self.ends.after(running[-1])
            elif event == Ends.STOP or running[-1].poll() is not None:
                break
        for process in running:
            process.kill()
        return STOPPED if event == Ends.STOP else int(event)

    def is_given_up(self) -> bool:
        """Whether nobody listens any more; that may take up to a second."""
        deadline = time.monotonic() + 1
        while listening(self.port) and time.monotonic() < deadline:
            time.sleep(0.01)
        return not listening(self.port)


def allow_files() -> int:
    """Raise our limit of open files as far as we may; how many streams HAProxy can hold with it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return (most - OWN_FILES) // 2


def path_of(file: int) -> str:
    return f"/proc/self/fd/{file}"


def alerts(said: str) -> str:
    """What HAProxy says is wrong, without the rest of what it says."""
    lines = [line for line in said.splitlines() if line.startswith("[ALERT]")]
    words = [line.partition(" : ")[2] for line in lines] or said.splitlines()
    return words[0] if words else "no message"
