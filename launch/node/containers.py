"""Runs an engine in a container of its own, and leaves nothing of it behind."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob

from launch.node.base import CLIENT_FAILED, LABEL, NODE, STOPPED, Ends, ask, listening, read, tell
from launch.node.inside import ATTENDED, OPEN_FILES
from launch.node.messages import Left, Owner

CREATES_WITHIN = 5  # seconds for a daemon to complete what its client no longer waits for
GAVE_UP = (125, 130, 143)  # client exit codes after which there may have been no container
# Every address, and the loopback of its kind: an asyncio server on :: takes no IPv4.
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
# Interface, destination, gateway, flags, three counters and the mask; the best metric comes first.
DEFAULT_ROUTE = r"^(\w\S*)\t0{8}(?:\t\w+){5}\t0{8}\t"


@dataclass
class Serve:
    """Run the engine in a container; its exit code is ours. Whatever ends us, it is removed."""

    name: str  # of the container, without the node's name
    launcher: str  # our containers have it as a label
    gpus: str  # auto, none, or docker's own words
    shares: dict[str, str]  # the job's GPUs, on nodes where it has not all: {"n1": "0,1"}
    caches: list[str]  # directories to make first
    options: list[str]  # of docker run
    image: str
    engine: list[str]
    replica: str = ""  # which of the launch's servers it is; '': there is one
    ask_every: float = 60

    def __call__(self) -> int:
        ends = Ends()
        ends.hold(self.ask_every)
        attended = [self.image, "-c", ATTENDED, "container", *self.engine]
        client = self.start(attended, "--entrypoint=sh")
        code = ends.code_of_client(client)
        if code is None:
            return stop(client, self.launcher, self.replica)
        if client.returncode < 0:
            killed = f"its client was killed (signal {-client.returncode})"
            print(f"docker: {killed}, and with it the container", file=sys.stderr, flush=True)
            code = CLIENT_FAILED
        if code == CLIENT_FAILED:
            remove(self.launcher, self.replica)
        return code

    def start(self, command: list[str], *options: str) -> subprocess.Popen[bytes]:
        """Start Docker's client. The options that only the node knows come before the ordered ones.

        Only these devices are passed on: EFA's verbs (RDMA between nodes) and gdrdrv (GDRCopy, for
        NCCL's small messages), if they are there; GPUs come with --gpus.
        """
        for path in self.caches:
            os.makedirs(path, exist_ok=True)
        set_interfaces()
        found = [*glob("/dev/infiniband/uverbs*"), *glob("/dev/gdrdrv")]
        devices = [word for path in found for word in ("--device", path)]
        words = self.which_gpus()
        gpus = ["--gpus", words] if words else []
        label = [f"--label={LABEL}.replica={self.replica}"] if self.replica else []
        run = ["docker", "run", "--name", f"{self.name}-{NODE}", *gpus, *devices, *options]
        return popen([*run, *label, *self.options, *command])

    def which_gpus(self) -> str:
        """The job's GPUs, if it has not all of the node's; '' for none."""
        if self.gpus != "auto":
            return "" if self.gpus == "none" else self.gpus
        ours = self.shares.get(NODE)
        if ours is None:
            return "all"
        return f'"device={ours}"' if ours else ""


def popen(command: list[str], files: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start a client. One that cannot be started ends with 127, as in a shell."""
    try:
        return subprocess.Popen(command, pass_fds=files)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        return subprocess.Popen(["sh", "-c", "exit 127"])


def set_interfaces() -> None:
    """Have NCCL and Gloo use the interface that leads out of the node, unless users name one."""
    if found := way_out():
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
            os.environ[name] = os.environ.get(name) or found


def way_out(table: str = "/proc/net/route") -> str:
    """The interface of the default route, by the kernel's table; '' if there is none."""
    with contextlib.suppress(OSError):
        if found := re.search(DEFAULT_ROUTE, read(table), re.M):
            return found[1]
    return ""


def remove(launcher: str, replica: str) -> str | None:
    """Remove this server's containers; return why one may be left, or ''. None if there was none.

    They go by our label: another launch of the job may have a container of the same name.
    """
    labels = [f"launcher={launcher}", *([f"replica={replica}"] if replica else [])]
    ours = [word for label in labels for word in ("--filter", f"label={LABEL}.{label}")]
    code, said = ask("docker", "ps", "--all", "--quiet", *ours, timeout=3)
    if code:
        return said or "Docker does not answer"
    ids = [word for word in said.split() if re.fullmatch(r"[\w.-]+", word)]
    if not ids:
        return None
    code, said = ask("docker", "rm", "--force", *ids, timeout=4)
    return (said or "Docker does not answer") if code else ""


def keep_removing(launcher: str, replica: str, seconds: float, pause: float) -> str:
    """Try for so many seconds: a daemon that is only restarted is back soon."""
    deadline = time.monotonic() + seconds
    while (why := remove(launcher, replica)) and time.monotonic() < deadline:
        time.sleep(pause)
    return why or ""


def stop(client: subprocess.Popen[bytes], launcher: str, replica: str) -> int:
    """End the container, whatever ended us: the launcher's end, scancel, a signal.

    We keep removing it until the client has ended, since that may yet create it. If we saw none, we
    go on for a while: Slurm's signals can end the client in the middle of a creation, and then the
    daemon completes it.
    """
    deadline, seen = time.monotonic() + 12, False
    while time.monotonic() < deadline:
        seen = remove(launcher, replica) is not None or seen
        if (code := client.poll()) is not None:
            if seen or (code >= 0 and code not in GAVE_UP):
                break
            deadline = min(deadline, time.monotonic() + CREATES_WITHIN)
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        client.kill()
    remove(launcher, replica)
    return STOPPED


@dataclass
class Remove:
    """Remove a server's containers, in case its own order did not; tell what is left."""

    launcher: str
    replica: str = ""  # '': all of the launch

    def __call__(self) -> int:
        if why := keep_removing(self.launcher, self.replica, 3, 0.3):
            tell(Left(why))
        return 0


@dataclass
class Reap:
    """Remove the containers of launchers that are gone, by their ids."""

    ids: list[str]

    def __call__(self) -> int:
        for each in self.ids:
            ask("docker", "rm", "--force", each, timeout=30)
        return 0


@dataclass
class AskOwner:
    """Tell whether our own engine listens on a port: one of its processes has that socket open.

    Also tell what it answers on the node itself, where no firewall is in between.
    """

    host: str  # the engine's --host
    port: int
    container: str  # '': no container, any process of the node

    def __call__(self) -> int:
        name = f"{self.container}-{NODE}"
        inside = ["docker", "exec", name, "sh", "-c", OPEN_FILES]
        code, files = ask(*inside, timeout=5) if self.container else (0, open_files())
        owned = any(f"socket:[{inode}]" in files for inode in listening(self.port))
        known = not self.container or "/fd:" in files  # ls prints this above each list
        why = "" if known else f"docker exec: {code} {files[-200:]}"
        tell(Owner(owned, why, health(self.host, self.port)))
        return 0


def health(host: str, port: int) -> str:
    """What /health answers to us: its status, or why there is none."""
    from http.client import HTTPConnection, HTTPException  # late: no other order needs it

    here = ANY.get(host, host)
    try:
        asked = HTTPConnection(here, port, timeout=3)
        asked.request("GET", "/health")
        return str(asked.getresponse().status)
    except (OSError, HTTPException) as error:
        return str(error)


def open_files() -> str:
    """What this node's processes have open, as far as we may look."""
    found = []
    for link in glob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(link))
    return "\n".join(found)
