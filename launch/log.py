"""The server's log: followed on the terminal, kept in a file."""

import os
import re
import sys
from pathlib import Path

from common.talk import Record, say

# What Slurm says whenever a step starts or ends. If that is a cause, the launcher says so.
NOISE = re.compile(
    rb"^(srun|slurmstepd[^:]*): (error: )?("
    rb"cluster configuration lacks support|\*\*\* (STEP|JOB) |Job step aborted|"
    rb"Force Terminated|forcing job termination|Terminating StepId|launch/slurm: )"
    rb"[^\n]*\n?",
    re.M,
)
LONGEST = 1 << 16  # bytes; a longer line is shown before it ends


class Log:
    """The server's log file: written by its step, followed by us, kept.

    It is shown on the screen once the server is ready; with -v from the beginning.
    """

    def __init__(self, path: Path, label: str = "") -> None:
        """`label` is put before each line on the screen, if several servers speak there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.label = path, label.encode()
        self.sink = path.open("ab")
        self.reader = path.open("rb", buffering=0)
        self.start = self.reader.seek(0, os.SEEK_END)
        self.last_line = ""
        self.shown = Record.verbose
        self.unseen = b""  # the end of what has not been shown
        self.begun = b""  # the line that is not complete yet, if there is a label

    def pump(self, limit: int = 1 << 20) -> bytes:
        """Return what is new, and show it. A flood is skipped on screen, not in the file."""
        size = os.fstat(self.reader.fileno()).st_size
        if size < self.reader.tell():  # truncated in place: start again, as tail -F does
            self.start = self.reader.seek(0)
        behind = size - self.reader.tell()
        if behind > 8 * limit:
            where = f"all of it is in {self.path}"
            say(f"log: {behind / 1e6:.0f} MB behind, skipped on screen; {where}")
            self.reader.seek(-limit, os.SEEK_END)
        if new := self.reader.read(limit):
            if said := new.rstrip():
                self.last_line = said.rpartition(b"\n")[2].decode(errors="replace").strip()
            if self.shown:
                self._show(new)
            else:
                self.unseen = (self.unseen + new)[-(1 << 14) :]
        return new

    def show(self, words: bytes) -> None:
        """Show the log from now on, and what has come since those words."""
        if not self.shown:
            unseen = self.unseen[max(0, self.unseen.find(words)) :]
            self._show(unseen)
        self.shown, self.unseen = True, b""

    def _show(self, new: bytes) -> None:
        try:
            sys.stdout.buffer.write(self._labelled(NOISE.sub(b"", new)))
            sys.stdout.flush()
        except (OSError, ValueError):  # a closed terminal or pipe
            # Nobody reads any more: the file keeps it all, the server goes on.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123

    def _labelled(self, new: bytes) -> bytes:
        if not self.label:
            return new
        *lines, self.begun = (self.begun + new).split(b"\n")
        if len(self.begun) > LONGEST:
            lines, self.begun = [*lines, self.begun], b""
        return b"".join(b"%s | %s\n" % (self.label, line) for line in lines)

    def tail(self, lines: int = 50) -> str:
        """This launch's last lines, even if somebody has moved the file."""
        return "\n".join(self.end().splitlines()[-lines:])

    def end(self, size: int = 1 << 16) -> str:
        return end_of(Path(f"/proc/self/fd/{self.reader.fileno()}"), self.start, size)

    def close(self) -> None:
        self.reader.close()
        self.sink.close()


def end_of(path: Path, start: int = 0, size: int = 1 << 16) -> str:
    """The last bytes of a file, but none before `start`; '' if there is no file.

    A file shorter than `start` has been truncated: all of it is newer.
    """
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(start if start <= end else 0, end - size))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
