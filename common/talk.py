"""Words for people, and files for programs: what failed, what goes on, results written whole."""

import contextlib
import json
import os
import sys
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, ClassVar, NoReturn

WIDTH = 120  # columns of a terminal that are used


class Failure(Exception):
    """What failed, in one sentence, and what to do next. Ends the program with exit code 1.

    One that is `passing` may not happen again when the server is started anew (--restart).
    """

    def __init__(self, message: str, hint: str = "", passing: bool = False) -> None:
        super().__init__(message)
        self.message, self.hint, self.passing = message, hint, passing


def die(message: str, *, hint: str = "", passing: bool = False) -> NoReturn:
    raise Failure(message, hint, passing)


def complain(error: Failure | OSError) -> int:
    """Say what ended the program and what to do next; returns its exit code."""
    if isinstance(error, Failure):
        hint = f"\n           next: {error.hint}" if error.hint else ""  # below the word ERROR
        say(f"ERROR {error.message}{hint}")
    else:
        say(f"ERROR {error.strerror or error}: {error.filename or ''}".rstrip(": "))
    return 1


class Record:
    """What is kept of the talk: lines for a launch's own log, and whether the terminal gets all."""

    verbose = False  # -v: commands, too
    file: IO[str] | None = None
    early: ClassVar[list[str]] = []  # said before the log was there

    @classmethod
    def open(cls, path: Path) -> None:
        """Write to this file from now on, first what was said before."""
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            cls.file = path.open("a", encoding="utf-8", errors="surrogateescape")
        early, cls.early = cls.early, []
        for line in early:
            cls.keep(line)

    @classmethod
    def keep(cls, line: str) -> None:
        if not cls.file:
            cls.early.append(line)
            return
        with contextlib.suppress(OSError, ValueError):  # a full disk must not stop a clean-up
            cls.file.write(line + "\n")
            cls.file.flush()


def say(message: str) -> None:
    """Talk goes to stderr, with the time. A terminal that is gone must not stop a clean-up."""
    line = f"[{time.strftime('%H:%M:%S')}] {message}"
    Record.keep(line)
    try:
        print(folded(line), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123


def folded(line: str) -> str:
    """A long sentence on several lines of a terminal. What can be pasted stays as it is."""
    if len(line) <= WIDTH or not sys.stderr.isatty() or line[11:13] == "  ":
        return line
    wrap = partial(textwrap.wrap, width=WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrap(line, subsequent_indent=" " * 11))  # below the first word


def note(message: str) -> None:
    """For the launch's log, and for the terminal only where -v asks for it: a command in full."""
    if Record.verbose:
        say(message)
    else:
        Record.keep(f"[{time.strftime('%H:%M:%S')}] {message}")


def keep_ours() -> None:
    """What we write is not for everybody to change, whatever umask we were given."""
    os.umask(os.umask(0o077) | 0o002)


def write_json(path: Path, data: object) -> None:
    with whole_file(path) as file:
        json.dump(data, file, indent=2)
        file.write("\n")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """To write all of it or nothing, for readers that look at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        part.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(part)):
            error.filename = str(path)
        raise
