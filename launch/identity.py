"""Who a launcher is, and whether it still lives: host, boot, process and its start."""

import functools
import hashlib
import os
import socket
from pathlib import Path


def process_start(pid: int) -> str:
    """When a process began (clock ticks since boot), to identify it beside its pid; '' if gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # a zombie has ended
    except OSError:
        return ""


@functools.cache
def machine() -> str:
    """This machine, whatever its name: a hash of its machine id, which is not for all to see."""
    try:
        return hashlib.sha256(Path("/etc/machine-id").read_bytes()).hexdigest()[:12]
    except OSError:
        return ""


def here() -> str:
    """This machine, this boot, this process table: where a process id means something."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    table = Path("/proc/self/ns/pid").stat().st_ino
    return f"{socket.gethostname()}/{machine()}/{boot}/{table}"


def launcher() -> str:
    """Who we are: host, pid and start of this process, to tell later whether we still live."""
    return f"{here()}:{os.getpid()}:{process_start(os.getpid())}"


def is_alive(who: str, job: str = "") -> bool | None:
    """Whether the launcher called `who` lives; None if only another host could tell.

    For a job of Slurm's, another boot proves nothing: hosts may share a name, and a disk image with
    its machine id. Slurm knows whether the job has ended.
    """
    where, _, rest = who.partition(":")
    pid, _, start = rest.partition(":")
    if where == here() and pid.isdigit():
        return process_start(int(pid)) == start != ""
    *same, boot, _ = here().split("/")
    known = not job.isdigit() and machine()
    theirs = where.split("/")
    if known and len(theirs) == 4 and theirs[:2] == same and theirs[2] not in ("", boot):
        return False  # it lived before this machine was booted
    return None
