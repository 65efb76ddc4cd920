"""What one answer was, read from its raw bytes and their arrival times after it has ended."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from common.response import (
    ERROR_LENGTH,
    NO_ANSWER,
    Body,
    Malformed,
    Reply,
    error_message,
    read_body,
)

COMPACT, SPACED = b'"choices":[{', b'"choices": [{'  # likewise: inside a string quotes are escaped
TEXT_KEYS = ("text", "content", "reasoning_content", "reasoning", "tool_calls", "token_ids")
LATE = 1.5  # times the usual pace

Json = Any


@dataclass(slots=True)
class Outcome:
    """What one request turned out to be. Times are ns since 1970, on the client's clock."""

    index: int
    intended: int
    sent: int
    first: int = 0
    last: int = 0
    gaps: array[float] = field(default_factory=lambda: array("f"))  # ms between token events
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    events: int = 0
    merged: int = 0  # events that came with another in one read, so their times are one
    blurred: int = 0  # those of them that had waited for each other: somebody was late
    first_blurred: bool = False  # the first one came with others, and was read late
    has_text: bool = False
    streamed: bool = True
    model: str = ""
    error: str = ""
    retried: bool = False


class Event(NamedTuple):
    """One server-sent event: where it ends in the body, and its text, unread."""

    end: int
    text: bytes

    def read(self) -> Json:
        lines = self.text.replace(b"\r", b"").split(b"\n")
        data = b"".join(line[5:] for line in lines if line.startswith(b"data:")).strip()
        return json.loads(data) if data and data != b"[DONE]" else None


def split_events(data: bytes) -> tuple[list[Event], list[Event]]:
    """The events that carry choices, and the others, told apart without decoding them."""
    separator = b"\r\n\r\n" if b"\r\n" in data[: data.find(b"\n") + 1] else b"\n\n"
    tokens, others, end = [], [], 0
    for text in data.split(separator):
        end += len(text)
        if COMPACT in text or SPACED in text:
            tokens.append(Event(end, text))
        elif text:
            others.append(Event(end, text))
        end += len(separator)
    return tokens, others


def read_reply(reply: Reply, outcome: Outcome, chat: bool) -> Outcome:
    """Fill in what the server answered; a problem becomes `outcome.error`."""
    try:
        _read(reply, outcome, chat)
    except Malformed as e:
        outcome.error = outcome.error or str(e)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        outcome.error = outcome.error or f"unreadable answer: {e!r}"[:ERROR_LENGTH]
    return outcome


def _read(reply: Reply, outcome: Outcome, chat: bool) -> None:
    if reply.head is None:
        raise Malformed(NO_ANSWER)
    if reply.head.status != 200:
        message = error_message(bytes(reply.raw[reply.head.end :]))
        raise Malformed(f"HTTP {reply.head.status}: {message}")
    body = read_body(reply.raw, reply.head)
    if reply.head.event_stream:
        _read_stream(reply, body, outcome, chat)
    else:
        _read_document(reply, body, outcome)


def _read_document(reply: Reply, body: Body, outcome: Outcome) -> None:
    """The server did not stream: everything arrives at the end."""
    document = json.loads(body.data)
    outcome.streamed = False
    outcome.events = 1
    outcome.has_text = says(document)
    outcome.first = outcome.last = reply.stamps[-1]
    _note(document, outcome)


def _read_stream(reply: Reply, body: Body, outcome: Outcome, chat: bool) -> None:
    tokens, others = split_events(body.data)
    done = False
    for event in others:
        done = done or b"[DONE]" in event.text
        _note(event.read(), outcome)
    if not done:
        raise Malformed("the stream ended without [DONE]")
    tokens = tokens or [e for e in others if (e.read() or {}).get("choices")]  # written oddly
    if not tokens:
        raise Malformed("the stream held no token")
    _note(tokens[-1].read(), outcome)
    spoken = next((i for i, e in enumerate(tokens) if says(e.read())), None)
    outcome.has_text = spoken is not None
    # A chat stream begins with the role alone, which is no token, nor is an event that only says
    # why the answer ended. An empty text in a completion is one: half a character, say.
    first = (spoken or 0) if chat else 0
    last = len(tokens) - 1
    if last > first and not says(tokens[last].read()):
        last -= 1
    _time(reply, [body.raw_offset(e.end) for e in tokens], outcome, first, last)


def _time(reply: Reply, offsets: list[int], outcome: Outcome, first: int, last: int) -> None:
    reads = [bisect_left(reply.ends, offset) for offset in offsets]
    times = [reply.stamps[read] for read in reads]
    outcome.first, outcome.last = times[first], times[-1]
    counted = times[first : last + 1]
    outcome.gaps.extend((b - a) / 1e6 for a, b in pairwise(counted))
    outcome.events = len(counted)
    brought = Counter(reads[first : last + 1])  # events a read
    outcome.merged = len(counted) - len(brought)
    if outcome.merged:
        outcome.blurred = count_blurred(brought, reply.stamps)
    # A server may send its first tokens together; then the client has them as soon as they arrive.
    at, pace = reads[first], (times[last] - times[first]) / max(last - first, 1)
    outcome.first_blurred = brought[at] > 1 and reply.seen[at] - reply.stamps[at] > pace / 2 > 0


def count_blurred(brought: Counter[int], stamps: Sequence[int]) -> int:
    """Events in reads that came later after the last one than usual.

    A server that sends its events in pairs sends pairs at its usual pace. When several came at
    once *and* after a longer time, they were sent singly, and only the last one's time is known.
    """
    steps = [(stamps[b] - stamps[a], brought[b]) for a, b in pairwise(sorted(brought))]
    usual = sorted(wait for wait, _ in steps)[len(steps) // 2] if steps else 0
    return sum(events - 1 for wait, events in steps if wait > LATE * usual)


def _note(document: Json, outcome: Outcome) -> None:
    """Keep the usage, the model's name and any error a document or event holds."""
    if not isinstance(document, dict):
        return
    if document.get("error") or document.get("object") == "error":
        raise Malformed(f"error from the server: {error_message(json.dumps(document).encode())}")
    outcome.model = str(document.get("model") or outcome.model)[:ERROR_LENGTH]
    if usage := document.get("usage"):
        outcome.prompt_tokens = counted(usage.get("prompt_tokens"))
        outcome.output_tokens = counted(usage.get("completion_tokens"))


def counted(value: Json) -> int | None:
    """A number of tokens; None for what cannot be one."""
    return value if type(value) is int and 0 <= value < 1 << 32 else None


def says(document: Json) -> bool:
    """Does this answer, or piece of one, carry any output?"""
    for choice in document.get("choices") or ():
        holder = choice.get("delta") or choice.get("message") or choice
        if any(holder.get(key) for key in TEXT_KEYS):
            return True
    return False
