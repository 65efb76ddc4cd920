"""The simulator's own settings, all from `TRTLLM_SIM_*` environment variables."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from console import Fatal

T = TypeVar("T")
FAULTS = """
    exit-loading:CODE hang-loading exit-serving:CODE[:SECONDS] kill-serving[:SECONDS] 503[:SECONDS]
    hang[:SECONDS] stuck-engine[:SECONDS] stuck-on-signal broken-engine[:SECONDS] ignore-term
    slow-health:SECONDS log-flood:MB_PER_S binary-log out-of-memory[:SECONDS]
    exit-rank:RANK:CODE[:SECONDS] kill-rank:RANK[:SECONDS]
""".split()  # README.md says what they do


class Settings:
    """Times are in seconds."""

    def __init__(self, env: Mapping[str, str]) -> None:
        def value(name: str, convert: Callable[[str], T], default: str) -> T:
            text = env.get(f"TRTLLM_SIM_{name}") or default
            try:
                return convert(text)
            except ValueError as error:
                raise Fatal("ValueError", f"TRTLLM_SIM_{name}={text}: {error}") from None

        self.version = value("VERSION", _one_of("1.1.0", "1.2.1"), "1.1.0")  # what is simulated
        self.gpus = int(value("GPUS", _not_negative, "8"))
        self.load_seconds = value("LOAD_SECONDS", _not_negative, "2")
        self.ttft = value("TTFT_MS", _not_negative, "20") / 1e3
        self.prefill_per_token = value("PREFILL_US_PER_TOKEN", _not_negative, "20") / 1e6
        self.itl = value("ITL_MS", _not_negative, "5") / 1e3
        self.itl_per_running = value("ITL_US_PER_RUNNING", _not_negative, "0") / 1e6
        self.cost = env.get("TRTLLM_SIM_COST")  # a model's name, in place of the four times above
        self.output_tokens = value("OUTPUT_TOKENS", _token_range, "32-256")
        self.launch = value("LAUNCH", _one_of("stuck", "propagate"), "stuck")  # see README.md
        self.faults = value("FAULT", _faults, "")


def _not_negative(text: str) -> float:
    if not 0 <= (number := float(text)) < float("inf"):
        raise ValueError("must be a number, not negative")
    return number


def _token_range(text: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    bounds = int(low), int(high if dash else low)
    if not 2 <= bounds[0] <= bounds[1]:
        raise ValueError("must be LOW-HIGH or one number, at least 2")
    return bounds


def _one_of(*known: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in known:
            raise ValueError(f"must be one of {', '.join(known)}")
        return text

    return check


def _faults(text: str) -> dict[str, tuple[float, ...]]:
    return dict(_fault(part.strip()) for part in text.split(",") if part.strip())


def _fault(text: str) -> tuple[str, tuple[float, ...]]:
    name, *arguments = text.split(":")
    known = {re.split(r"[:[]", spec)[0]: spec for spec in FAULTS}
    if name not in known:
        raise ValueError(f"unknown fault {name!r}, known are {', '.join(known)}")
    most, optional = known[name].count(":"), known[name].count("[")
    if not most - optional <= len(arguments) <= most:
        raise ValueError(f"wrong number of arguments, it is {known[name]}")
    return name, tuple(map(_not_negative, arguments))
