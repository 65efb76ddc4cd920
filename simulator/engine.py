"""The running batch: every sequence has a timetable, kept by timers of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic

from cost import Cost
from environment import Settings
from faults import Faults
from words import GENERATED, Prompt, token_id

Stop = tuple[str | int, list[int]]  # what the client named, and its token ids


@dataclass(eq=False)
class Generation:
    """One answer, generated a token at a time; `sink` takes what each iteration has added."""

    index: int
    prompt: Prompt
    tokens: Iterator[str]
    max_tokens: int
    eos_at: int | None  # the token count at which the model ends by itself
    interval: float  # tokens between two calls of the sink; infinite: only the last
    sink: Callable[[Generation], None]
    stops: Sequence[Stop] = ()
    keeps_stop: bool = False
    prefilled: bool = False  # by a context server; we answer its first token, too
    state: str = ""  # a context server's, for the generation server
    text: str = ""
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cancelled: bool = False
    _shown: int = 0
    _counted: int = -1

    def step(self) -> bool:
        """Produce the next token, and say whether it was the last."""
        count = len(self.pieces) + 1
        ended = count == self.eos_at
        piece = "" if ended else next(self.tokens)
        self.pieces.append(piece)
        self.text += piece
        if ended or count >= self.max_tokens:
            self.finish_reason = "stop" if ended else "length"
        for stop in self.stops:
            self._look_for(*stop, len(piece))
        if self.finish_reason or count == 1 or count % self.interval == 0:
            self.sink(self)
        return self.finish_reason is not None

    def diff(self) -> tuple[bool, str, list[str]]:
        """Return whether it is the first call, and the text and the tokens that are new since the
        last one. What has been shown is never taken back."""
        first, text = self._counted < 0, self.text[self._shown :]
        pieces = self.pieces[max(0, self._counted) :]
        self._shown, self._counted = len(self.text), len(self.pieces)
        return first, text, pieces

    def _look_for(self, reason: str | int, ids: list[int], new: int) -> None:
        """Look for a stop in the last tokens, which then do not count, or else in the text."""
        if [token_id(piece) for piece in self.pieces[-len(ids) :]] == ids:
            self.finish_reason, self.stop_reason = "stop", reason
            if not self.keeps_stop:
                self.text = self.text[: len(self.text) - len("".join(self.pieces[-len(ids) :]))]
                del self.pieces[-len(ids) :]
        elif isinstance(reason, str):
            at = self.text.find(reason, max(0, len(self.text) - new - len(reason)))
            if at >= 0:
                self.finish_reason, self.stop_reason = "stop", reason
                self.text = self.text[: at + (len(reason) if self.keeps_stop else 0)]


def stops_of(texts: Sequence[str], ids: Sequence[int]) -> list[Stop]:
    split = [(text, [token_id(piece) for piece in GENERATED.findall(text)]) for text in texts]
    return [stop for stop in split if stop[0]] + [(number, [number]) for number in ids]


class Engine:
    def __init__(
        self, settings: Settings, faults: Faults, max_batch_size: int, cost: Cost | None
    ) -> None:
        self.submitted = 0
        self.iterations: deque[dict[str, int]] = deque(maxlen=1000)  # since the last reading
        self._faults = faults
        self._settings = settings
        self._max_batch_size = max_batch_size
        self._cost = cost
        self._prefilled = 0.0  # when the next prompt may begin, if prompts have a cost
        self._waiting: deque[Generation] = deque()
        self._running: set[Generation] = set()

    def submit(self, generations: list[Generation]) -> None:
        self.submitted += 1
        self._waiting += generations
        self._admit()

    def cancel(self, generations: list[Generation]) -> None:
        """Free the slots at once; the timers notice when they fire."""
        for generation in generations:
            generation.cancelled = True
        self._running -= {*generations}
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._has_room():
            generation = self._waiting.popleft()
            if not generation.cancelled:
                self._running.add(generation)
                self._schedule(self._first_token(generation), generation)

    def _has_room(self) -> bool:
        """Is there room in the batch, and for the keys and values of all that runs?"""
        if not (self._cost and self._running):
            return len(self._running) < self._max_batch_size
        cached = sum(each.prompt.tokens + each.max_tokens for each in self._running)
        return len(self._running) < self._max_batch_size and cached <= self._cost.room

    def _first_token(self, generation: Generation) -> float:
        """When the first token comes. Prompts that have a cost follow each other, a stage apart."""
        now, tokens = monotonic(), generation.prompt.tokens
        if generation.prefilled:  # by a context server
            return now + self._itl()
        if not self._cost:
            return now + self._settings.ttft + tokens * self._settings.prefill_per_token
        takes = self._cost.prefill(tokens)
        begins = max(now, self._prefilled)
        self._prefilled = begins + takes / self._cost.pp
        return begins + takes + self._cost.step(1, tokens)

    def _itl(self) -> float:
        running = len(self._running)
        if not self._cost:
            return self._settings.itl + self._settings.itl_per_running * running
        context = sum(each.prompt.tokens + len(each.pieces) for each in self._running)
        return self._cost.step(running, context / max(1, running))

    def _schedule(self, due: float, generation: Generation) -> None:
        asyncio.get_running_loop().call_at(due, self._advance, due, generation)

    def _advance(self, due: float, generation: Generation) -> None:
        """The next due time follows from the last, not from now, so a late timer delays tokens but
        never stretches the timetable."""
        if generation.cancelled or self._faults.dead_engine:
            return
        itl = self._itl()
        if generation.step():
            self._running.discard(generation)
            self._admit()
        else:
            self._schedule(due + itl, generation)
        levels = {"numActiveRequests": len(self._running), "numQueuedRequests": len(self._waiting)}
        self.iterations.append(levels)
