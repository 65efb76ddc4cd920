"""Words for people, and files for programs: what failed, what goes on, results written whole."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import math
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar, NoReturn

from common.live import Live, colour

HEARTBEAT = 30.0  # seconds between two lines while something takes long
WIDTH = 120  # columns of a terminal that are used


class Failure(Exception):
    """What failed, in one sentence, and what to do next. Ends the program with its exit code.

    One that is `passing` may not happen again when the server is started anew (--restart).
    """

    def __init__(self, message: str, hint: str = "", passing: bool = False, code: int = 1) -> None:
        super().__init__(message)
        self.message, self.hint, self.passing, self.code = message, hint, passing, code


def die(message: str, *, hint: str = "", passing: bool = False) -> NoReturn:
    raise Failure(message, hint, passing)


def misused(message: str, *, hint: str = "") -> NoReturn:
    """Wrong usage: of words or settings, before anything is done. Exit code 2, as argparse's."""
    raise Failure(message, hint, code=2)


def complain(error: Failure | OSError) -> int:
    """Say what ended the program and what to do next; returns its exit code."""
    if isinstance(error, BrokenPipeError):  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, Failure):
        say(f"ERROR {error.message}{next_line(error.hint)}")
        return error.code
    say(f"ERROR {error.strerror or error}: {error.filename or ''}".rstrip(": "))
    return 1


def next_line(hint: str) -> str:
    """What to do next, below the word ERROR."""
    return f"\n           next: {hint}" if hint else ""


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


@contextlib.contextmanager
def speaking(speak: Callable[[float], object], every: float = 0) -> Iterator[None]:
    """While the block lasts, `speak` is called now and then, with the seconds that it has taken."""
    over, begun = threading.Event(), time.monotonic()

    def beat() -> None:
        while not over.wait(every or HEARTBEAT):
            speak(time.monotonic() - begun)

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def say(message: str, code: str = "") -> None:
    """Talk goes to stderr, with the time, in a colour where a code asks for one.

    A terminal that is gone must not stop a clean-up.
    """
    line = f"[{time.strftime('%H:%M:%S')}] {visible(message)}"
    Record.keep(line)
    Live.clear()
    try:
        text = colour(folded(line), code, sys.stderr) if code else folded(line)
        print(text + "\n", end="", file=sys.stderr, flush=True)  # at once: other threads talk, too
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123


def counted(number: int, what: str) -> str:
    """`1 node`, `2 nodes`"""
    return f"{number} {what}{'s' * (number != 1)}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of as many words each, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def visible(text: str) -> str:
    """What a server or a file says must not drive the terminal: an escape is shown, not obeyed."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def clean(data: Any) -> Any:  # noqa: ANN401
    """A document as others may have it: words visible, and no NaN, which JSON does not know."""
    if isinstance(data, str):
        return visible(data)
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: clean(value) for key, value in data.items()}
    return [clean(value) for value in data] if isinstance(data, list | tuple) else data


def plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """What a terminal does not know, in characters that all know; a byte of a name as it is."""
    assert isinstance(error, UnicodeEncodeError)
    first = error.object[error.start]
    if "\udc80" <= first <= "\udcff":  # of a name that is not UTF-8
        return first.encode("ascii", "surrogateescape"), error.start + 1
    text = first.replace("±", "+-")
    return text.encode("ascii", "backslashreplace").decode(), error.start + 1


codecs.register_error("plain", plain)


def print_plainly() -> None:
    """No character stops us: a log may be ASCII, after hours. Who captures stdout is left alone.

    Nor does a stream that was closed before we began (`>&-`): a pipe of ours would be in its place.
    """
    while (null := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(null, True)
    os.close(null)
    sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="plain")


def folded(text: str) -> str:
    """A long sentence on several lines of a terminal. What can be pasted stays as it is."""
    if not sys.stderr.isatty():
        return text
    return "\n".join(folded_line(line) for line in text.split("\n"))


def folded_line(line: str) -> str:
    if len(line) <= WIDTH or line[11:13] == "  ":
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


def read_json(path: Path) -> Any:  # noqa: ANN401
    """A document; null for a NaN, which other programs write. OSError; ValueError where it is none.

    What is no regular file is not opened: it could keep its reader waiting for ever.
    """
    if not path.is_file():
        raise OSError(f"{path.name} is not a file")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


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
        with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        part.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(part)):
            error.filename = str(path)
        raise
