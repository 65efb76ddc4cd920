"""What one answer was, read from its raw bytes and their arrival times after it has ended.

While a request is measured nothing here runs but `Reply.add`, which looks at the last few bytes.
All else happens when the load generator has nothing better to do.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

# No JSON text holds a raw line end: this is never content.
STREAM_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
COMPACT, SPACED = b'"choices":[{', b'"choices": [{'  # likewise: inside a string quotes are escaped
TEXT_KEYS = ("text", "content", "reasoning_content", "reasoning", "tool_calls", "token_ids")
NO_ANSWER = "the connection closed before the answer began"
LATE = 1.5  # times the usual pace
BROKEN_OFF = "the connection closed in the middle of the answer"
ERROR_LENGTH = 300
HEAD_LIMIT = 1 << 16  # bytes; no honest header comes near
INTERIMS = 9

Json = Any


class Malformed(Exception):
    """The server did not speak HTTP, or broke off in the middle."""


class Head(NamedTuple):
    """The part of a response's header that decides where the body ends."""

    status: int
    end: int
    chunked: bool
    length: int | None
    close: bool
    event_stream: bool
    encoding: str  # gzip and its like, which was not asked for; mostly ''


def parse_head(raw: bytes | bytearray) -> Head | None:
    end = -4
    for _ in range(INTERIMS):
        start = end + 4
        if not b"HTTP/1.".startswith(bytes(raw[start : start + 7])):
            raise Malformed(f"not an HTTP response: {bytes(raw[start : start + 60])!r}")
        end = raw.find(b"\r\n\r\n", start, HEAD_LIMIT)
        if end < 0 and len(raw) >= HEAD_LIMIT:
            raise Malformed(f"the header does not end: {len(raw):,} bytes so far")
        if end < 0:
            return None
        head = read_head(raw[start:end].decode("latin-1"), end + 4)
        if head.status >= 200:  # 100 Continue and its like come before the answer
            return head
    raise Malformed(f"{INTERIMS} times 100 Continue, and no answer")


def read_head(text: str, end: int) -> Head:
    if not (line := re.match(r"HTTP/1\.(\d) (\d{3})(?!\d)", text, re.ASCII)):
        raise Malformed(f"not an HTTP response: {text[:60]!r}")
    headers = (header.partition(":") for header in text.split("\r\n")[1:])
    fields = {name.lower(): value.strip() for name, _, value in headers}
    length = fields.get("content-length")
    if length is not None and not re.fullmatch("[0-9]{1,18}", length):
        raise Malformed(f"bad Content-Length {length[:20]!r}")
    connection = fields.get("connection", "").lower()
    return Head(
        status=int(line[2]),
        end=end,
        chunked="chunked" in fields.get("transfer-encoding", "").lower(),
        length=None if length is None else int(length),
        close=connection == "close" or (line[1] == "0" and connection != "keep-alive"),
        event_stream="event-stream" in fields.get("content-type", ""),
        encoding=fields.get("content-encoding", "").lower().replace("identity", ""),
    )


class Reply:
    """The bytes of one answer as they came: `ends[i]` bytes had arrived at `stamps[i]`."""

    __slots__ = ("ends", "head", "raw", "seen", "stamps", "walked")

    def __init__(self) -> None:
        self.raw = bytearray()
        self.ends = array("q")
        self.stamps = array("q")  # arrival of each read's last packet, ns since 1970
        self.seen = array("q")  # when the client got round to it
        self.head: Head | None = None
        self.walked = 0

    def add(self, data: bytes, stamp: int, seen: int) -> bool:
        """Keep what came; true when it was the end of the answer."""
        self.raw += data
        self.ends.append(len(self.raw))
        self.stamps.append(stamp)
        self.seen.append(seen)
        return self.complete()

    def complete(self) -> bool:
        head = self.head
        if head is None:
            head = self.head = parse_head(self.raw)
            if head is None:
                return False
            self.walked = head.end
        if head.chunked:
            return self.raw.endswith(b"\r\n\r\n") and (
                self.raw.endswith(STREAM_END) or self._at_last_chunk()
            )
        return head.length is not None and len(self.raw) >= head.end + head.length

    def _at_last_chunk(self) -> bool:
        for at, size in chunks(self.raw, self.walked):
            if size == 0:
                return True
            self.walked = at + size + 2
        return False


def chunks(raw: bytes | bytearray, at: int) -> Iterator[tuple[int, int]]:
    """Where each whole chunk's data begins, and its size; the last one has size 0."""
    while (eol := raw.find(b"\r\n", at)) >= 0:
        try:
            size = int(raw[at:eol].partition(b";")[0], 16)
        except ValueError:
            size = -1
        if size < 0:  # one that went back would be read for ever
            raise Malformed(f"bad chunk size {bytes(raw[at:eol][:20])!r}")
        if eol + 4 + size > len(raw):
            return
        yield eol + 2, size
        if size == 0:
            return
        at = eol + 4 + size


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


class Body(NamedTuple):
    """A body without its transfer encoding, and how to find its bytes in the raw answer again."""

    data: bytes
    ends: list[int]  # where each chunk ends in `data`
    shifts: list[int]  # how much further on the chunk's bytes lie in the raw answer

    def raw_offset(self, offset: int) -> int:
        return offset + self.shifts[bisect_left(self.ends, offset)]


def read_body(raw: bytearray, head: Head) -> Body:
    if head.encoding:
        raise Malformed(f"the answer came as {head.encoding[:20]!r}, which was not asked for")
    if not head.chunked:
        data = bytes(raw[head.end :])
        if head.length is not None and len(data) < head.length:
            raise Malformed(BROKEN_OFF)
        return Body(data, [len(data)], [head.end])
    pieces: list[bytearray] = []
    ends, shifts, length, size = [], [], 0, -1
    for at, size in chunks(raw, head.end):
        pieces.append(raw[at : at + size])
        shifts.append(at - length)
        length += size
        ends.append(length)
    if size != 0:
        raise Malformed(BROKEN_OFF)
    return Body(b"".join(pieces), ends, shifts)


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


def error_message(body: bytes) -> str:
    """The words of an error answer: flat as TensorRT-LLM's, nested as OpenAI's, or any text."""
    text = body.decode("utf-8", "replace").strip()
    start, end = text.find("{"), text.rfind("}")  # chunk sizes may stand around it
    try:
        document = json.loads(text[start : end + 1])
        found = document.get("error") or document.get("message") or document.get("detail") or text
        text = str(found.get("message", text) if isinstance(found, dict) else found)
    except (ValueError, RecursionError):
        pass
    return " ".join(text.split())[:ERROR_LENGTH] or "(empty body)"
