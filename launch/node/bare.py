"""An engine without a container: it has a session of its own, to be signalled as one."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

from launch.node.base import NOT_FOUND, STOPPED, Ends
from launch.node.containers import set_interfaces
from launch.node.inside import OUTLIVES

HELD: list[subprocess.Popen[bytes]] = []  # their input stays open for as long as we live
# MPI must not see Slurm's variables, or its spawning of workers inside a step fails.
HIDDEN = re.compile("(SLURM|SLURMD|SBATCH|SALLOC|PMI|PMI2|PMIX|OMPI)_")


@dataclass
class Run:
    """Run the engine from PATH; its exit code is ours. Nothing of its session outlives it or us."""

    engine: list[str]
    # Which of the GPUs that we see, by number; or in CUDA's own words. []: all.
    gpus: list[int | str] = field(default_factory=list)
    ask_every: float = 60

    def __call__(self) -> int:
        ends = Ends()
        ends.hold(self.ask_every)
        set_interfaces()
        engine = start(self.command(), self.variables())
        if (code := ends.code_of(engine)) is None:
            give_time(engine.pid)
        kill(engine.pid)
        return STOPPED if code is None else code

    def command(self) -> list[str]:
        return self.engine

    def variables(self) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if not HIDDEN.match(name)}
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = some(self.gpus, env.get("CUDA_VISIBLE_DEVICES", ""))
        return env


def start(command: list[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start it in a session of its own. As in a shell, 127 means not found, 126 not executable."""
    null = subprocess.DEVNULL
    try:
        engine = subprocess.Popen(command, stdin=null, env=variables, start_new_session=True)
        ends_with_us(engine.pid)
        return engine
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_FOUND - 1
        return subprocess.Popen(["sh", "-c", f"exit {code}"], start_new_session=True)


def ends_with_us(session: int) -> None:
    """Have the session killed with us: a Slurm that tracks processes by parents may miss it."""
    outlives = ["sh", "-c", OUTLIVES, "outlives", str(session)]
    attendant = subprocess.Popen(outlives, stdin=subprocess.PIPE, start_new_session=True)
    attendant.wait()
    HELD.append(attendant)


def some(gpus: list[int | str], visible: str) -> str:
    """In CUDA's words, which need not be Slurm's: the first, third, ... of the GPUs that we see."""
    last = max((gpu for gpu in gpus if isinstance(gpu, int)), default=-1)
    every = visible.split(",") if visible else [str(gpu) for gpu in range(last + 1)]
    if last >= len(every):
        wanted = ", ".join(map(str, gpus))
        raise OSError(f"CUDA_VISIBLE_DEVICES={visible} has too few GPUs (wanted: {wanted})")
    return ",".join(every[gpu] if isinstance(gpu, int) else gpu for gpu in gpus)


def give_time(session: int) -> None:
    """Send SIGTERM, and give it three seconds to end by itself."""
    end(session, signal.SIGTERM)
    await_gone(session, 3)


def kill(session: int) -> None:
    """Send SIGKILL, and wait: a large process holds its port and its GPUs a moment longer."""
    end(session, signal.SIGKILL)
    await_gone(session, 5)


def await_gone(session: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while end(session, 0) and time.monotonic() < deadline:
        time.sleep(0.02)


def end(session: int, signum: int) -> bool:
    """Signal every process of a session; whether there was any."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signum)
        return True
    return False
