"""The running batch: every sequence has a timetable, one timer of the event loop serves all."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Optional

from environment import Settings
from stops import StopFilter
from words import token_id

# (sequence, text, finish_reason); the token is sequence.last_token
Sink = Callable[["Sequence", str, Optional[str]], None]  # noqa: UP045 (3.9)


@dataclass(eq=False)
class Sequence:
    """One choice of one request, generated a token at a time."""

    index: int
    prompt_tokens: int
    tokens: Iterator[str]
    max_tokens: int
    eos_at: int | None  # the token count at which the model ends by itself
    sink: Sink
    stop: StopFilter | None = None
    stop_token_ids: frozenset[int] = frozenset()
    count: int = 0
    last_token: str = ""
    stop_reason: str | int | None = None
    cancelled: bool = False

    def step(self) -> bool:
        """Produce the next token, hand it to the sink, say whether it was the last."""
        self.count += 1
        ended = self.count == self.eos_at
        token = self.last_token = "" if ended else next(self.tokens)
        finish = "stop" if ended else "length" if self.count >= self.max_tokens else None
        if self.stop_token_ids and token_id(token) in self.stop_token_ids:
            finish, self.stop_reason = "stop", token_id(token)
        if self.stop:
            token, hit = self.stop.feed(token)
            if hit is not None:
                finish, self.stop_reason = "stop", hit
            elif finish:
                token += self.stop.flush()
        self.sink(self, token, finish)
        return finish is not None


class Engine:
    def __init__(
        self, loop: asyncio.AbstractEventLoop, settings: Settings, max_batch_size: int
    ) -> None:
        self.dead = False  # a dead engine keeps every request waiting for ever
        self._loop = loop
        self._settings = settings
        self._max_batch_size = max_batch_size
        self._waiting: deque[Sequence] = deque()
        self._due: list[tuple[float, int, Sequence]] = []  # heap; the number breaks ties
        self._running: set[Sequence] = set()
        self._serial = 0
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)
        self._admit()

    def cancel(self, sequence: Sequence) -> None:
        """Free the slot at once; the heap entry is dropped when its time comes."""
        sequence.cancelled = True
        if sequence in self._running:
            self._running.discard(sequence)
            self._admit()

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_batch_size:
            sequence = self._waiting.popleft()
            if not sequence.cancelled:
                self._running.add(sequence)
                prefill = sequence.prompt_tokens * self._settings.prefill_per_token
                self._schedule(self._loop.time() + self._settings.ttft + prefill, sequence)
        self._arm()

    def _schedule(self, due: float, sequence: Sequence) -> None:
        self._serial += 1
        heappush(self._due, (due, self._serial, sequence))

    def _arm(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._due and not self.dead:
            self._timer = self._loop.call_at(self._due[0][0], self._tick)

    def _tick(self) -> None:
        """Advance everything that is due. The next due time follows from the last, not from now,
        so a late tick delays tokens but never stretches the timetable."""
        now = self._loop.time()
        itl = self._settings.itl + self._settings.itl_per_running * len(self._running)
        while self._due and self._due[0][0] <= now and not self.dead:
            due, _, sequence = heappop(self._due)
            if sequence.cancelled:
                continue
            if sequence.step():
                self._running.discard(sequence)
            else:
                self._schedule(due + itl, sequence)
            if itl == 0:  # every token is due at once: let connections have their turn
                break
        self._admit()
