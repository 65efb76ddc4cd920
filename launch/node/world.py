"""One model over several nodes: a waiting container per node, with a rank per GPU in it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

from launch.node.base import NODE, STOPPED, Ends, ask, listening, tell
from launch.node.containers import Serve, keep_removing, popen, stop
from launch.node.inside import ENTRY, UP
from launch.node.messages import Beat, Ended, Left

SLURMD_PORT = "6818"
TO_RANKS = re.compile("(PMIX|PMI|PMI2|SLURM)[A-Za-z0-9_]*$")  # variables that wire up the ranks
SERVES_WITHIN = 60  # seconds until rank 0's engine is looked for


@dataclass
class Hold(Serve):
    """Run a container for ranks for as long as our input is open, and give signs of life."""

    beat_every: float = 2

    def __call__(self) -> int:
        ends = Ends()
        ends.hold(self.ask_every)
        config = ask("scontrol", "show", "config", timeout=30)[1]
        words = [self.image, "-c", UP, "up", NODE]
        client = self.start(words, "--entrypoint=sh", *mount_of_slurm(config))
        beating = threading.Event()
        port = value_of(config, "SlurmdPort") or SLURMD_PORT
        beats = int(port), self.beat_every, beating
        threading.Thread(target=beat, args=beats, daemon=True).start()
        code = ends.code_of_client(client)
        if code is None:
            stop(client, self.launcher, self.replica)
        else:
            tell(Ended(code))
        beating.set()
        # The launcher listens a little longer than this, even to a node in trouble.
        tell(Left(keep_removing(self.launcher, self.replica, 2, 0.1)))
        return STOPPED if code is None else code


def value_of(config: str, name: str) -> str:
    """One value of `scontrol show config`; '' if it is not there."""
    found = re.search(rf"^{name} *= *(\S.*)$", config, re.M)
    return found[1].strip() if found else ""


def mount_of_slurm(config: str) -> list[str]:
    """Mount slurmd's spool directory: PMIx's files are below it once the ranks' step has begun."""
    host = os.uname().nodename.partition(".")[0]
    spool = value_of(config, "SlurmdSpoolDir").replace("%n", NODE).replace("%h", host)
    return ["--mount", f"type=bind,source={spool},target={spool}"] if os.path.isdir(spool) else []


def beat(port: int, every: float, over: threading.Event) -> None:
    """Give signs of life, and tell whether slurmd is there: a step outlives its slurmd."""
    while not over.is_set():
        tell(Beat(bool(listening(port))))
        over.wait(every)


@dataclass
class Rank:
    """Run one rank in the node's container, by `docker exec`; its exit code is ours.

    Some versions of the leader wait for ever when the engine itself has failed, so rank 0 looks.
    """

    LEFT = "left"

    name: str  # of the container, without the node's name
    cwd: str
    command: list[str]  # the leader and the engine that it leads
    leader: str = ""  # what the leader is known by among the container's processes
    engine: str = ""
    look_every: float = 1
    ends: Ends = field(default_factory=Ends)

    def __call__(self) -> int:
        self.ends.hold()
        client = self.start()
        if os.environ.get("SLURM_PROCID") == "0":
            threading.Thread(target=self.look, daemon=True).start()
        self.ends.after(client)
        code = self.ends.events.get()
        if isinstance(code, int):
            return code
        self.end(client)
        if code == Ends.STOP:
            return STOPPED
        client.wait()
        print(f"{self.engine} has ended, its leader has not", file=sys.stderr, flush=True)
        return 1

    @property
    def container(self) -> str:
        return f"{self.name}-{NODE}"

    def start(self) -> subprocess.Popen[bytes]:
        """Pass the variables by a pipe: no file is left when Slurm kills us with another rank."""
        reading, writing = os.pipe()
        os.set_inheritable(reading, True)
        ours = ((name, value) for name, value in os.environ.items() if TO_RANKS.match(name))
        variables = "".join(f"{name}={value.partition(chr(10))[0]}\n" for name, value in ours)
        threading.Thread(target=fill, args=(writing, variables), daemon=True).start()
        into = ["docker", "exec", "--env-file", f"/dev/fd/{reading}", "--workdir", self.cwd or "/"]
        return popen([*into, self.container, "sh", "-c", ENTRY, "rank", *self.command], [reading])

    def end(self, client: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            client.kill()

    def look(self) -> None:
        """Once the engine has run in the container, its end is the rank's."""
        for _ in range(SERVES_WITHIN):
            if self.is_serving():
                break
            time.sleep(self.look_every)
        while self.is_serving() is not False:
            time.sleep(self.look_every)
        time.sleep(2 * self.look_every)
        self.ends.events.put(self.LEFT)

    def is_serving(self) -> bool | None:
        """Whether the engine is among the container's processes; None if nobody can say."""
        code, processes = ask("docker", "top", self.container, "-eo", "pid,args")
        if code:
            return None
        lines = [line for line in processes.splitlines() if self.leader not in line]
        return any(self.engine in line for line in lines)


@dataclass
class Part(Rank):
    """Run a server's one process on this node, with the arguments that are its own."""

    parts: list[list[str]] = field(default_factory=list)  # for each node, a list of arguments

    def __call__(self) -> int:
        self.command += self.parts[int(os.environ["SLURM_PROCID"])]
        return super().__call__()

    def look(self) -> None:
        """Nothing to look for: it has no leader that could outlive it."""


def fill(pipe: int, text: str) -> None:
    with contextlib.suppress(OSError), os.fdopen(pipe, "w") as file:
        file.write(text)
