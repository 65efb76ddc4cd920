"""One answer over HTTP: its bytes as they came, where it ends, and what its header says.

While a request is measured nothing here runs but `Reply.add`, which looks at the last few bytes.
All else happens when it has ended (load/answer.py).
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, NamedTuple

STREAM_END = (
    b"data: [DONE]\n\n\r\n0\r\n\r\n"  # no JSON text holds a raw line end: this is never content
)
NO_ANSWER = "the connection closed before the answer began"
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
    fields = {
        k.lower(): v.strip() for k, _, v in (h.partition(":") for h in text.split("\r\n")[1:])
    }
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
