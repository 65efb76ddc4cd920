"""How a launch of a real engine ends: by ^C, by the death of its inner process, by its hanging."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

END_SECONDS = 120  # until the launcher has noticed, ended everything, and gone
WELL = 15  # seconds in which it has served by the time something happens to it


@dataclass(frozen=True)
class End:
    """What happens to a server, to the launcher's process or to the inner one, and what follows."""

    name: str
    signal: int
    code: int  # the launcher's exit code
    says: str  # what it says
    inner: bool = True
    environ: dict[str, str] = field(default_factory=dict)


PROBED = {"PROBE_SECONDS": "2", "PROBE_TIMEOUT": "20"}
NAMED = r"ERROR .* ended with exit code [^\n]*: (?!its log names no cause)"
HANGS = r"ERROR .* it is idle, and in \d+ s has not"
ENDS = (
    End("^C", signal.SIGINT, 130, "stopped by SIGINT", inner=False),
    End("its inner process is killed", signal.SIGKILL, 1, NAMED),
    End("its inner process hangs", signal.SIGSTOP, 1, HANGS, environ=PROBED),
)


@dataclass(frozen=True)
class Process:
    """A process; a number alone may be another's by and by."""

    pid: int
    parent: int
    started: str

    @property
    def title(self) -> str:
        with suppress(OSError):
            return Path(f"/proc/{self.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        return ""


def processes() -> Iterator[Process]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, *rest = path.read_text().rpartition(")")[2].split()
            if state != "Z":
                yield Process(int(path.parent.name), int(parent), rest[17])


def family(pid: int) -> list[Process]:
    """A process and all that it has brought forth."""
    found, every = [each for each in processes() if each.pid == pid], list(processes())
    for one in found:
        found += [each for each in every if each.parent == one.pid]
    return found


def play(end: End, launcher: subprocess.Popen[bytes], inner: str, port: int, log: Path) -> str:
    """Let it happen; '' where all is as it should be, else what is not."""
    time.sleep(WELL)
    before = family(launcher.pid)
    target = [each.pid for each in before if inner in each.title] if end.inner else [launcher.pid]
    if not target:
        return f"there is no process {inner}"
    os.kill(target[0], end.signal)
    try:
        code = launcher.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        return f"the launcher has not ended within {END_SECONDS} s"
    said = log.read_text(errors="replace")
    if code != end.code or not re.search(end.says, said):
        return f"exit code {code}: {said[-2000:]}"
    return left(before, port)


def left(before: list[Process], port: int) -> str:
    """What remains of it; '' for nothing."""
    there = set(processes())
    if remain := [f"{each.pid} {each.title}" for each in before if each in there]:
        return f"left: {'; '.join(remain)}"
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return f"port {port} still answers"
    return ""
