"""Parsers of bench.py's flags, each of which says what is wrong with a bad value."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from launch.arguments import from_home
from load.matrix import SWEEP, TYPES

LEAST = 1e-9  # for rates and the like: smaller values would overflow
GOODPUT_NAMES = ("ttft", "tpot", "e2el")
N = TypeVar("N", int, float)


def number(text: str, kind: Callable[[str], N]) -> N:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None


def numbers(text: str) -> tuple[int, ...]:
    found = tuple(number(word, int) for word in text.split(","))
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: all have to be 1 or more")
    return found


def streams(text: str) -> tuple[int | None, ...]:
    return tuple(None if w in ("unlimited", "inf") else numbers(w)[0] for w in text.split(","))


def rates(text: str) -> tuple[float, ...]:
    found = tuple(number(word, float) for word in text.split(","))
    if not all(rate > LEAST for rate in found):
        raise argparse.ArgumentTypeError(
            f"{text}: a rate is requests a second, more than 0, or inf"
        )
    return found


def positive(text: str) -> float:
    found = number(text, float)
    if not LEAST < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: has to be more than 0, and not infinite")
    return found


def types(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if wrong := [t for t in found if t not in (*TYPES, SWEEP.type, "all")]:
        known = ", ".join((*TYPES, SWEEP.type))
        raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: not one of {known}")
    return tuple(t for word in found for t in (TYPES if word == "all" else (word,)))


def limit(text: str) -> tuple[str, float]:
    name, _, ms = text.partition(":")
    if name not in GOODPUT_NAMES:
        raise argparse.ArgumentTypeError(
            f"{text}: write NAME:MS with one of {', '.join(GOODPUT_NAMES)}"
        )
    return name, positive(ms)


def unfit(limits: Sequence[tuple[str, float]], *, one_token: bool) -> Iterator[tuple[str, str]]:
    """Why these limits of --goodput cannot be judged, and a hint ('': none).

    `one_token` says that answers have one token.
    """
    if len(dict(limits)) < len(limits):
        yield "--goodput: a limit is named twice", ""
    if one_token and "tpot" in dict(limits):
        yield "--goodput tpot: answers of one token have no TPOT", "--output-len 2 or more"


def count(text: str) -> int:
    return numbers(text)[0]


def whole(text: str) -> int:
    if (found := number(text, int)) < 0:
        raise argparse.ArgumentTypeError(f"{text}: has to be 0 or more")
    return found


def path(text: str) -> Path:
    if not text:  # a variable that is not set; it would be the current folder
        raise argparse.ArgumentTypeError("an empty path")
    return Path(from_home(text))


def port(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text}: a port is 1 to 65535")
    return int(text)
