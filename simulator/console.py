"""What the process prints: TensorRT-LLM's log lines on stdout, errors on stderr."""

from __future__ import annotations

import sys
import time
from contextlib import suppress


class Fatal(Exception):
    """The server cannot start: printed as a Python exception's last line, exit code 1."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def say(line: str, *, error: bool = False) -> None:
    """Print a line at once; a reader that went away must not take the server down."""
    with suppress(OSError):
        print(line, file=sys.stderr if error else sys.stdout, flush=True)


def log(letter: str, message: str) -> None:
    """Print a line in TensorRT-LLM's own log format."""
    say(f"[{time.strftime('%m/%d/%Y-%H:%M:%S')}] [TRT-LLM] [{letter}] {message}")


def crash(error: Fatal) -> int:
    """Imitate the end of a traceback; return the exit code."""
    say(f"Traceback (most recent call last):\n{error.kind}: {error}", error=True)
    return 1
