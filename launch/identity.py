"""Who a launcher is, and whether it still lives: host, boot, process and its start."""

import os
import socket
from pathlib import Path


def process_start(pid: int) -> str:
    """When a process began, in clock ticks since boot: its identity beside its pid; '' if gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # a zombie has ended
    except OSError:
        return ""


def here() -> str:
    """This host, this boot, this process table: where a process id means something."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"


def launcher() -> str:
    """Who we are: host, pid and start of this process, to tell later whether we still live."""
    return f"{here()}:{os.getpid()}:{process_start(os.getpid())}"


def is_alive(who: str) -> bool | None:
    """Whether the launcher of that name lives; None where only another host could tell."""
    where, _, rest = who.partition(":")
    pid, _, start = rest.partition(":")
    (host, boot, *_), (our_host, our_boot, *_) = f"{where}//".split("/"), here().split("/")
    if host == our_host and boot and boot != our_boot:
        return False  # it lived before this host was booted
    if where != here() or not pid.isdigit():
        return None
    return process_start(int(pid)) == start != ""
