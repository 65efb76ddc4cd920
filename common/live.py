"""One line of a terminal that tells how far a run or a download is."""

import os
import sys
import time
from typing import TextIO


def colour(text: str, code: str, stream: TextIO) -> str:
    plain = not stream.isatty() or bool(os.environ.get("NO_COLOR"))
    return text if plain else f"\033[{code}m{text}\033[0m"


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
        words = f"{self.label}: {done}/{self.total}{wrong}{rate}, {left}"
        print(f"\r\033[K{words}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
