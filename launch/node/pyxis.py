"""What runs in a step of pyxis, inside its container, and what waits beside that step."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from glob import glob

from launch.node.bare import Run, end, give_time, start
from launch.node.base import NODE, STOPPED, Ends, ask, read, tell, unfiltered
from launch.node.containers import set_interfaces
from launch.node.messages import Left, Up
from launch.node.world import SLURMD_PORT, Part, Rank, beat, value_of

NOT_INSIDE = 120  # an exit code that nobody else uses
NVIDIA_ENTRY = "/opt/nvidia/nvidia_entrypoint.sh"  # sets up the image's libraries
GRACE, ENDS_WITHIN = 4.0, 9.0  # seconds: until a step is cancelled; until we no longer wait for it


@dataclass
class Inside(Run):
    """Run the engine in the step's container, once it is certain that we are in it."""

    proof: str = ""  # a directory that only the container has
    environ: dict[str, str] = field(default_factory=dict)  # for the engine

    def __call__(self) -> int:
        return super().__call__() if is_inside(self.proof) else NOT_INSIDE

    def command(self) -> list[str]:
        return with_entry(self.engine)

    def variables(self) -> dict[str, str]:
        return {**super().variables(), **path_of_image(), **self.environ}


@dataclass
class RankInside(Rank):
    """Run one rank of several in its node's container."""

    proof: str = ""
    environ: dict[str, str] = field(default_factory=dict)

    def __call__(self) -> int:
        return super().__call__() if is_inside(self.proof) else NOT_INSIDE

    def start(self) -> subprocess.Popen[bytes]:
        set_interfaces()
        self.process = start(
            with_entry(self.command), {**os.environ, **path_of_image(), **self.environ}
        )
        return self.process

    def end(self, client: subprocess.Popen[bytes]) -> None:
        give_time(client.pid)
        end(client.pid, signal.SIGKILL)

    def is_serving(self) -> bool | None:
        """Whether the engine is among this rank's own processes."""
        lines = commands_of(self.process.pid)
        return any(self.engine in line and self.leader not in line for line in lines)


@dataclass
class PartInside(RankInside, Part):
    """Run the one process of a server on this node, in its container."""


def is_inside(proof: str) -> bool:
    """Whether we are in the container: without the plug-in, Slurm runs a step on the bare node."""
    if os.path.isdir(proof):
        return True
    without = "does not load the plug-in: this step runs on the bare node"
    print(f"pyxis: {NODE} {without}", file=sys.stderr, flush=True)
    return False


def with_entry(command: list[str]) -> list[str]:
    return [NVIDIA_ENTRY, *command] if os.access(NVIDIA_ENTRY, os.X_OK) else command


def path_of_image() -> dict[str, str]:
    """The image's PATH, which a login shell may have replaced by its own."""
    with contextlib.suppress(OSError):
        lines = read("/etc/environment").splitlines()
        return {"PATH": line[5:] for line in lines if line.startswith("PATH=")}  # noqa: B035
    return {}


def commands_of(session: int) -> list[str]:
    """The command lines of a session's processes."""
    found = []
    for process in glob("/proc/[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(os.path.basename(process))) == session:
                found.append(read(f"{process}/cmdline", errors="replace").replace("\0", " "))
    return found


@dataclass
class Attend:
    """Beside a step of pyxis, on each of its nodes: give signs of life, and end the step with us.

    While a container is being unpacked, nothing in it hears that the launcher is gone.
    """

    step: str  # its name
    caches: list[str]  # directories to make first: pyxis refuses to mount what is not there
    ask_every: float = 60
    beat_every: float = 2

    def __call__(self) -> int:
        ends, beating = Ends(), threading.Event()
        ends.hold(self.ask_every)
        for path in self.caches:
            os.makedirs(path, exist_ok=True)
        port = (
            value_of(ask("scontrol", "show", "config", timeout=30)[1], "SlurmdPort") or SLURMD_PORT
        )
        beats = int(port), self.beat_every, beating
        threading.Thread(target=beat, args=beats, daemon=True).start()
        tell(Up())
        ends.events.get()
        first = os.environ.get("SLURM_NODEID", "0") == "0"  # one asks Slurm, for all of them
        tell(Left(end_step(self.step) if first else ""))
        beating.set()
        return STOPPED


@dataclass
class EndSteps:
    """End the steps of these names, in case what attends them did not."""

    names: list[str]

    def __call__(self) -> int:
        for name in self.names:
            if why := end_step(name, grace=0):
                tell(Left(why))
        return 0


def end_step(name: str, grace: float = GRACE) -> str:
    """Wait for a step, and cancel it if it does not end by itself; why it may be left, or ''."""
    begun = time.monotonic()
    while step := find_step(name):
        if (waited := time.monotonic() - begun) > ENDS_WITHIN:
            return f"it has not ended within {ENDS_WITHIN:g} s: scancel {step}"
        if waited >= grace:
            ask("scancel", step, env=unfiltered("SLURM_CLUSTERS"))
        time.sleep(0.2)
    return ""


def find_step(name: str) -> str:
    """The id of our job's step of that name; '' if there is none."""
    job = os.environ.get("SLURM_JOB_ID", "")
    command = "squeue --all --local --steps --noheader".split()
    said = ask(*command, f"--jobs={job}", "--format=%i %j", env=unfiltered("SLURM_CLUSTERS"))[1]
    found = (line.split(" ", 1) for line in said.splitlines() if " " in line)
    return next((step for step, its in found if its.strip() == name), "")
