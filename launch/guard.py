"""Waits beside a launcher and, when that dies, removes its records, known by its name in them.

Run as a program of its own, by `python -IS guard.py LAUNCHER FILE...`. It ends with its standard
input, whose other end the launcher holds. Standard library only.
"""

import os
import signal
import sys
import time
from pathlib import Path

TRIES = 600  # one a second, in case the file system is read-only just then


def main(launcher: str, *files: str) -> None:
    for name in "TERM INT HUP USR1 USR2 ALRM XCPU".split():  # Slurm signals all that a job runs
        signal.signal(signal.Signals[f"SIG{name}"], signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    for file in map(Path, files):
        for _ in range(TRIES):
            if is_gone(file, launcher):
                break
            time.sleep(1)


def is_gone(file: Path, launcher: str) -> bool:
    """Remove the launcher's record, if it is there; whether none is left."""
    try:
        if launcher not in file.read_text(errors="replace"):
            return True
    except OSError:
        return True
    try:
        file.unlink(missing_ok=True)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main(*sys.argv[1:])
