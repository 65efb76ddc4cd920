"""HTTP/1.1 requests out of bytes, however they are cut into packets."""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_HEAD = 64 << 10
MAX_BODY = 64 << 20
REQUEST_LINE = re.compile(rb"([A-Za-z]+) (\S+) HTTP/1\.([01])")
HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\x00\r\n]*?)[ \t]*")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;.*)?")


class HttpError(Exception):
    """The bytes are not an acceptable request; the connection cannot go on."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Request(NamedTuple):
    method: str
    target: str
    minor: int  # of HTTP/1.minor
    headers: dict[str, str]
    body: bytes = b""

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def keep_alive(self) -> bool:
        connection = self.headers.get("connection", "").lower()
        return "close" not in connection if self.minor else "keep-alive" in connection


class RequestParser:
    def __init__(self) -> None:
        self._buffer = bytearray()
        self._head: Request | None = None
        self._chunks = bytearray()
        self.wants_continue = False  # the client waits for "100 Continue" before its body

    def feed(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) > MAX_HEAD + MAX_BODY:
            raise HttpError(413, "Request too large.")

    @property
    def pending(self) -> bool:
        return bool(self._buffer)

    def next_request(self) -> Request | None:
        """Return a request once it is complete; bytes after it stay for the next call."""
        if self._head is None:
            self._head = self._take_head()
        if self._head is None:
            return None
        body = self._take_body(self._head.headers)
        if body is None:
            return None
        request, self._head, self.wants_continue = self._head._replace(body=body), None, False
        return request

    def _take_head(self) -> Request | None:
        while self._buffer[:2] == b"\r\n":  # a stray line break between requests is allowed
            del self._buffer[:2]
        end = self._buffer.find(b"\r\n\r\n", 0, MAX_HEAD)
        if end < 0:
            if len(self._buffer) >= MAX_HEAD or b"\n\n" in self._buffer:
                raise HttpError(400, "Invalid HTTP request received.")
            self._check_start()
            return None
        first, *lines = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + 4]
        return self._parse_head(first, lines)

    def _check_start(self) -> None:
        """Refuse at the first line what can never become a request, e.g. a TLS greeting."""
        first, line_end, _ = bytes(self._buffer[:MAX_HEAD]).partition(b"\r\n")
        if first and (not first[:1].isalpha() or (line_end and not REQUEST_LINE.fullmatch(first))):
            raise HttpError(400, "Invalid HTTP request received.")

    def _parse_head(self, first: bytes, lines: list[bytes]) -> Request:
        match = REQUEST_LINE.fullmatch(first)
        pairs = [HEADER.fullmatch(line) for line in lines]
        if not match or not all(pairs):
            raise HttpError(400, "Invalid HTTP request received.")
        headers = {
            pair[1].decode("latin-1").lower(): pair[2].decode("latin-1") for pair in pairs if pair
        }
        if match[3] == b"1" and "host" not in headers:
            raise HttpError(400, "Invalid HTTP request received.")
        self.wants_continue = headers.get("expect", "").lower() == "100-continue"
        return Request(match[1].decode(), match[2].decode("latin-1"), int(match[3]), headers)

    def _take_body(self, headers: dict[str, str]) -> bytes | None:
        if "transfer-encoding" in headers:
            if headers["transfer-encoding"].lower() != "chunked" or "content-length" in headers:
                raise HttpError(400, "Invalid HTTP request received.")
            return self._take_chunks()
        length = headers.get("content-length", "0")
        if not re.fullmatch("[0-9]{1,15}", length):
            raise HttpError(400, "Invalid HTTP request received.")
        return self._take(int(length))

    def _take(self, length: int) -> bytes | None:
        if length > MAX_BODY:
            raise HttpError(413, "Request too large.")
        if len(self._buffer) < length:
            return None
        taken = bytes(self._buffer[:length])
        del self._buffer[:length]
        return taken

    def _take_chunks(self) -> bytes | None:
        """Decode what has arrived; return the body when its last chunk is in."""
        while (line_end := self._buffer.find(b"\r\n", 0, MAX_HEAD)) >= 0:
            match = CHUNK_SIZE.fullmatch(bytes(self._buffer[:line_end]))
            if not match:
                raise HttpError(400, "Invalid HTTP request received.")
            size, start = int(match[1], 16), line_end + 2
            if size == 0:
                return self._take_trailer(start)
            if len(self._chunks) + size > MAX_BODY:
                raise HttpError(413, "Request too large.")
            if len(self._buffer) < start + size + 2:
                return None
            if self._buffer[start + size : start + size + 2] != b"\r\n":
                raise HttpError(400, "Invalid HTTP request received.")
            self._chunks += self._buffer[start : start + size]
            del self._buffer[: start + size + 2]
        if len(self._buffer) >= MAX_HEAD:
            raise HttpError(400, "Invalid HTTP request received.")
        return None

    def _take_trailer(self, start: int) -> bytes | None:
        if self._buffer[start : start + 2] == b"\r\n":
            end = start + 2
        else:
            end = self._buffer.find(b"\r\n\r\n", start, start + MAX_HEAD) + 4
            if end < start + 4:
                if len(self._buffer) > start + MAX_HEAD:
                    raise HttpError(400, "Invalid HTTP request received.")
                return None
        body = bytes(self._chunks)
        self._chunks.clear()
        del self._buffer[:end]
        return body
