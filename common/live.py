"""One line of a terminal that tells how far a run or a download is."""

import contextlib
import os
import re
import shutil
import sys
import time
from typing import ClassVar, TextIO


def colour(text: str, code: str, stream: TextIO) -> str:
    plain = not stream.isatty() or bool(os.environ.get("NO_COLOR"))
    return text if plain else f"\033[{code}m{text}\033[0m"


def at_terminal() -> bool:
    """Somebody looks at all that we write."""
    with contextlib.suppress(ValueError):
        return sys.stdout.isatty() and sys.stderr.isatty()
    return False


class Live:
    """The line of the terminal that is written over. Whoever else talks there clears it first."""

    shown: ClassVar[bool] = False

    @classmethod
    def show(cls, words: str) -> None:
        cls.shown = True
        width = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be taken back
        bare = re.sub(r"\033\[\d*m", "", words)
        cls.write("\r\033[K" + (words if len(bare) <= width else bare[:width]))

    @classmethod
    def clear(cls) -> None:
        if cls.shown:
            cls.shown = False
            cls.write("\r\033[K")

    @staticmethod
    def write(words: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
            print(words, end="", file=sys.stderr, flush=True)


class LiveLine:
    """On one line of a terminal: what is done, tokens a second if there are any, the time left."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.start = label, total, time.monotonic()

    def __call__(self, done: int, failed: int, tokens: int) -> None:
        if not sys.stderr.isatty():
            return
        took = time.monotonic() - self.start
        left = f"{took / done * (self.total - done):.0f} s left" if done else "waiting"
        wrong = colour(f", {failed} failed", "31", sys.stderr) if failed else ""
        rate = f", {tokens / took:,.0f} tokens/s" if tokens and took else ""
        Live.show(f"{self.label}: {done}/{self.total}{wrong}{rate}, {left}")

    def clear(self) -> None:
        Live.clear()
