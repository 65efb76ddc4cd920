"""Messages for people and files for programs: errors, progress, files that are written whole."""

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
WIDTH = 120  # columns used on a terminal


class Failure(Exception):
    """What failed, in one sentence, and what to do next. Ends the program with its exit code.

    A `passing` failure may not happen again when the server is restarted (--restart).
    """

    def __init__(self, message: str, hint: str = "", passing: bool = False, code: int = 1) -> None:
        super().__init__(message)
        self.message, self.hint, self.passing, self.code = message, hint, passing, code


def die(message: str, *, hint: str = "", passing: bool = False) -> NoReturn:
    raise Failure(message, hint, passing)


def misused(message: str, *, hint: str = "") -> NoReturn:
    """Wrong arguments or settings, found before anything is done. Exit code 2, like argparse's."""
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
    """The hint, on a line of its own below the error."""
    return f"\n           next: {hint}" if hint else ""


class Record:
    """The launch's log of all that is said, and whether the terminal shows all of it, too."""

    verbose = False  # -v: commands, too
    file: IO[str] | None = None
    early: ClassVar[list[str]] = []  # said before the log was open

    @classmethod
    def open(cls, path: Path) -> None:
        """Log to this file from now on, starting with what was said so far."""
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
    """Call `speak` regularly during the block, with the seconds that have passed."""
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
    """Print a message to stderr with the time, in colour if `code` is given.

    A terminal that is gone must not stop a clean-up.
    """
    line = f"[{time.strftime('%H:%M:%S')}] {visible(message)}"
    Record.keep(line)
    Live.clear()
    try:
        text = colour(folded(line), code, sys.stderr) if code else folded(line)
        print(text + "\n", end="", file=sys.stderr, flush=True)  # one write, as other threads print
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123


def counted(number: int, what: str) -> str:
    """`1 node`, `2 nodes`"""
    return f"{number} {what}{'s' * (number != 1)}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def visible(text: str) -> str:
    """Text made safe for a terminal: control characters are shown, not obeyed."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def clean(data: Any) -> Any:  # noqa: ANN401
    """A document made safe to pass on: visible text, and no NaN, which JSON does not have."""
    if isinstance(data, str):
        return visible(data)
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: clean(value) for key, value in data.items()}
    return [clean(value) for value in data] if isinstance(data, list | tuple) else data


def plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode what stdout cannot show as ASCII, but keep the bytes of file names as they are."""
    assert isinstance(error, UnicodeEncodeError)
    first = error.object[error.start]
    if "\udc80" <= first <= "\udcff":  # a byte of a name that is not UTF-8
        return first.encode("ascii", "surrogateescape"), error.start + 1
    text = first.replace("±", "+-")
    return text.encode("ascii", "backslashreplace").decode(), error.start + 1


codecs.register_error("plain", plain)


def print_plainly() -> None:
    """No character may stop us after hours of work because stdout is ASCII (unless it is captured).

    Nor may a stream that was closed at our start (`>&-`): a pipe of ours would take its number.
    """
    while (null := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(null, True)
    os.close(null)
    sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="plain")


def folded(text: str) -> str:
    """Fold long sentences for a terminal. Lines to be pasted (indented ones) stay as they are."""
    if not sys.stderr.isatty():
        return text
    return "\n".join(folded_line(line) for line in text.split("\n"))


def folded_line(line: str) -> str:
    if len(line) <= WIDTH or line[11:13] == "  ":
        return line
    wrap = partial(textwrap.wrap, width=WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrap(line, subsequent_indent=" " * 11))  # below the first word


def note(message: str) -> None:
    """Write a full command to the launch's log, and to the terminal only with -v."""
    if Record.verbose:
        say(message)
    else:
        Record.keep(f"[{time.strftime('%H:%M:%S')}] {message}")


def keep_ours() -> None:
    """Files that we write are never world-writable, whatever our umask was."""
    os.umask(os.umask(0o077) | 0o002)


def read_json(path: Path) -> Any:  # noqa: ANN401
    """A JSON document, with None for a NaN. OSError, or ValueError if it is not JSON.

    Only a regular file is opened: reading anything else could block for ever.
    """
    if not path.is_file():
        raise OSError(f"{path.name} is not a file")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_json(path: Path, data: object) -> None:
    with whole_file(path) as file:
        json.dump(data, file, indent=2)
        file.write("\n")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """Write a file whole or not at all, because others may read it at any moment."""
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
