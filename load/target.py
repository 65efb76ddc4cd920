"""A load (where it goes, what it sends, how fast) and its result."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from common.ask import USER_AGENT, authority
from common.signals import Stopped
from load.answer import Outcome


class LoadError(Exception):
    """The load cannot be put on the server at all."""


class CutShort(Stopped):
    """A signal ended a measurement; `result` holds what came until then."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.stopped)
        self.result = result


@dataclass(frozen=True)
class Target:
    host: str
    port: int
    tls: bool = False
    api_key: str = ""
    verify: bool = True

    def without_key(self, text: str) -> str:
        """The text without our API key: some servers repeat it in an error."""
        return text.replace(self.api_key, "***") if self.api_key else text

    def request(self, path: str, body: bytes) -> bytes:
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        host = authority(self.host, self.port, self.tls)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {USER_AGENT}\r\n{key}"
            f"Accept: text/event-stream, application/json\r\nAccept-Encoding: identity\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass(frozen=True)
class Load:
    """What to send, how much of it, and how fast."""

    target: Target
    path: str
    body: Callable[[int], bytes]
    count: int
    streams: int | None = None  # most requests in flight; None: no limit
    rate: float = math.inf  # requests a second
    burstiness: float = 1.0  # 1: Poisson; less: in bursts; more: more even
    timeout: float = 600.0  # seconds a request may take
    seed: int = 0
    chat: bool = False
    shards: int = 0  # processes; 0: as many as the load needs
    largest: int = 64 << 20  # bytes of an answer; a server that never ends must not fill our memory

    @property
    def open_loop(self) -> bool:
        return math.isfinite(self.rate)

    @property
    def width(self) -> int:
        return min(self.streams or self.count, self.count)


@dataclass
class Result:
    outcomes: list[Outcome]
    cut: str = ""  # why it ended before all requests had
    stopped: int = 0  # the signal that ended it
    kernel_stamps: bool = True
    shards: int = 1
    clock_step: float = 0.0  # ms that the wall clock moved against the monotonic one
    lags: Counter[int] = field(default_factory=Counter)  # reads by their lateness, in 0.1 ms
    cpu: float = 0.0  # the busiest process: share of a core
    waited: float = 0.0  # ms that it was ready to run but others had its core


Progress = Callable[[int, int, int], None]  # requests done, requests failed, tokens received


def no_progress(done: int, failed: int, tokens: int) -> None:
    """For callers that do not watch."""
