"""One HTTP answer: its bytes as they came, where it ends, and what its header says.

While a request is being measured, only `Reply.add` runs, which looks at the last few bytes.
Everything else happens after it has ended (load/answer.py).
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

# JSON text holds no raw line ends, so this is never content.
STREAM_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
HEAD_END = re.compile(rb"\r?\n\r?\n")  # a bare \n is against the standard, but some send it
NO_ANSWER = "the connection closed before the answer began"
BROKEN_OFF = "the connection closed in the middle of the answer"
ERROR_LENGTH = 300
COMPRESSIONS = re.compile(r"gzip|deflate|\bbr\b|zstd|compress")  # `none` is no compression
HEAD_LIMIT = 1 << 16  # bytes; no real header is nearly as long
INTERIMS = 9
WORDS = ("error", "message", "detail", "msg", "text", "errors")  # where servers put an error's text
PROTOCOLS = {  # what else may listen on a port, by the first bytes it sends
    b"\x15\x03": "it speaks TLS: write https://",
    b"\x16\x03": "it speaks TLS: write https://",
    b"\x00\x00": "it may be the port for HTTP/2 or gRPC",
}


class Malformed(Exception):
    """The server did not speak HTTP, or broke off in the middle."""


class Head(NamedTuple):
    """The part of a response's header that decides where the body ends, and what it is."""

    status: int
    end: int
    chunked: bool
    length: int | None
    close: bool
    kind: str  # the content type, without parameters; '' for none
    encoding: str  # gzip and the like, which we did not ask for; usually ''
    location: str
    server: str
    retry_after: str = ""

    @property
    def moved(self) -> str:
        """Where a redirect leads, in words; '' if this is not one."""
        if not 300 <= self.status < 400:
            return ""
        where = f" to {shown(self.location)}" if self.location else ""
        return f"a redirect{where}, not followed: name the server itself with -H"


def parse_head(raw: bytes | bytearray) -> Head | None:
    end = len(raw) - len(raw.lstrip(b"\r\n"))  # left over from the last answer
    for _ in range(INTERIMS):
        start = end
        if not b"HTTP/1.".startswith(bytes(raw[start : start + 7])):
            raise Malformed(f"not an HTTP response: {foreign(bytes(raw[start : start + 60]))}")
        found = HEAD_END.search(raw, start, start + HEAD_LIMIT)
        if not found and len(raw) - start >= HEAD_LIMIT:
            raise Malformed(f"the header does not end: {len(raw):,} bytes so far")
        if not found:
            return None
        end = found.end()
        head = read_head(raw[start : found.start()].decode("latin-1"), end)
        if head.status >= 200:  # interim answers (100 Continue) come first
            return head
    raise Malformed(f"{INTERIMS} times 100 Continue, and no answer")


def foreign(start: bytes) -> str:
    hint = PROTOCOLS.get(start[:2], "")
    return f"{start!r}" + (f" ({hint})" if hint else "")


def read_head(text: str, end: int) -> Head:
    if not (line := re.match(r"HTTP/1\.(\d) (\d{3})(?!\d)", text, re.ASCII)):
        raise Malformed(f"not an HTTP response: {text[:60]!r}")
    fields = {k.lower(): v.strip() for k, _, v in (h.partition(":") for h in text.split("\n")[1:])}
    length = fields.get("content-length")
    if length is not None and not re.fullmatch("[0-9]{1,18}", length):
        raise Malformed(f"bad Content-Length {length[:20]!r}")
    # There may be several of these lines, from the server and from a proxy.
    lines = re.findall("^connection:(.*)", text.lower(), re.MULTILINE)
    connection = [word.strip() for word in ",".join(lines).split(",")]
    return Head(
        status=int(line[2]),
        end=end,
        chunked="chunked" in fields.get("transfer-encoding", "").lower(),
        length=0 if line[2] in ("204", "304") else None if length is None else int(length),
        close="close" in connection or (line[1] == "0" and "keep-alive" not in connection),
        kind=fields.get("content-type", "").partition(";")[0].strip().lower(),
        encoding=" ".join(COMPRESSIONS.findall(fields.get("content-encoding", "").lower())),
        location=fields.get("location", ""),
        server=fields.get("server", ""),
        retry_after=fields.get("retry-after", "")[:40],
    )


class Reply:
    """The bytes of one answer as they came: `ends[i]` bytes had arrived at `stamps[i]`."""

    __slots__ = ("ends", "head", "raw", "seen", "stamps", "walked")

    def __init__(self) -> None:
        self.raw = bytearray()
        self.ends = array("q")
        self.stamps = array("q")  # arrival of each read's last packet, ns since 1970
        self.seen = array("q")  # when the client read it
        self.head: Head | None = None
        self.walked = 0

    def add(self, data: bytes, stamp: int, seen: int) -> bool:
        """Keep what came; true if it completes the answer."""
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

    def said_done(self) -> bool:
        """Is [DONE] the last thing that came? Some servers never end the transfer after it."""
        return self.raw[-32:].rstrip(b"\r\n").endswith(b"[DONE]")

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
        if size < 0:  # a negative size would make us loop for ever
            raise Malformed(f"bad chunk size {bytes(raw[at:eol][:20])!r}")
        if eol + 4 + size > len(raw):
            return
        yield eol + 2, size
        if size == 0:
            return
        at = eol + 4 + size


class Body(NamedTuple):
    """A body without its transfer encoding, and where its bytes are in the raw answer."""

    data: bytes
    ends: list[int]  # where each chunk ends in `data`
    shifts: list[int]  # how much further on the chunk's bytes are in the raw answer
    whole: bool  # false if the connection closed before the end

    def raw_offset(self, offset: int) -> int:
        return offset + self.shifts[bisect_left(self.ends, offset)]


def read_body(raw: bytearray, head: Head) -> Body:
    """The body, or as much of it as came."""
    if head.encoding:
        status = f"HTTP {head.status}: " * (head.status >= 300)
        kind = head.encoding[:20]
        raise Malformed(f"{status}the answer came as {kind!r}, which was not asked for")
    if not head.chunked:
        data = bytes(raw[head.end :])
        return Body(data, [len(data)], [head.end], len(data) >= (head.length or 0))
    pieces: list[bytearray] = []
    ends, shifts, length, after, size = [], [], 0, head.end, -1
    for at, size in chunks(raw, head.end):
        pieces.append(raw[at : at + size])
        shifts.append(at - length)
        length += size
        ends.append(length)
        after = at + size + 2
    if size != 0 and (eol := raw.find(b"\r\n", after)) >= 0:  # a part of a chunk
        pieces.append(raw[eol + 2 :])
        shifts.append(eol + 2 - length)
        ends.append(length + len(pieces[-1]))
    return Body(b"".join(pieces), ends, shifts, size == 0)


def error_message(body: bytes) -> str:
    """An error's message, from JSON (flat, or nested as OpenAI's), an HTML page or any text."""
    text = body.decode("utf-8", "replace").strip()
    start, end = text.find("{"), text.rfind("}")  # `data:` may come before it
    try:
        document = json.loads(text[start : end + 1])
        words = (document[key] for key in WORDS if document.get(key) not in (None, "", True, []))
        found = next(words, text)
        found = found[0] if isinstance(found, list) and found else found  # Cloudflare's errors
        text = str((found.get("message") or text) if isinstance(found, dict) else found)
    except (ValueError, RecursionError, AttributeError):
        page = re.search(r"<title[^>]*>(.*?)</title>", text[:4096], re.IGNORECASE | re.DOTALL)
        text = f"an HTML page, {page[1].strip()!r}" if page else text
    return shown(text) or "(empty body)"


def shown(text: str) -> str:
    """A server's words made safe for a terminal and a report: one line, no control characters."""
    line = " ".join(text.split())[:ERROR_LENGTH]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
