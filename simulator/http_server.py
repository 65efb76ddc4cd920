"""Connections: requests in, plain or streamed answers out, with uvicorn's manners.

Built on asyncio protocols rather than streams: with hundreds of token streams on one core a
coroutine switch per token would cost more than the token.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from console import say
from http_parser import HttpError, Request, RequestParser

KEEP_ALIVE_SECONDS = 5.0
MAX_UNSENT = 64 << 20  # a client that stops reading is dropped before it fills the memory
STATUS = {
    200: "OK",
    307: "Temporary Redirect",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Content Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
to_text = json.JSONEncoder(separators=(",", ":")).encode  # compact, as FastAPI writes it
Handler = Callable[[Request, "Connection"], None]


class Connection(asyncio.Protocol):
    """One client connection; also what a handler answers through."""

    _transport: asyncio.Transport

    def __init__(self, handler: Handler, connections: set[Connection]) -> None:
        self.on_disconnect: Callable[[], None] | None = None
        self._handler = handler
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._parser = RequestParser()
        self._request: Request | None = None  # the one being answered
        self._keep_alive_timer: asyncio.TimerHandle | None = None
        self._peer = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._connections.add(self)
        host, port = transport.get_extra_info("peername")[:2]
        self._peer = f"{host}:{port}"

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._stop_keep_alive_timer()
        if self.on_disconnect:
            self.on_disconnect()

    def data_received(self, data: bytes) -> None:
        self._stop_keep_alive_timer()
        try:
            self._parser.feed(data)
            self._take_request()
        except HttpError as error:
            self._refuse(error)

    def abort(self) -> None:
        self._transport.abort()

    # -- the handler's side --

    def send(
        self,
        status: int,
        body: bytes = b"",
        content_type: str = "",
        *,
        headers: tuple[str, ...] = (),
    ) -> None:
        lines = [f"content-length: {len(body)}", *headers]
        if content_type:
            lines.append(f"content-type: {content_type}")
        head = self._head(status, lines)
        self._transport.write(head if self._is_head_request() else head + body)
        self._end()

    def start_stream(self) -> None:
        lines = ["content-type: text/event-stream; charset=utf-8"]
        if self._is_chunked():
            lines.append("transfer-encoding: chunked")
        self._transport.write(self._head(200, lines))

    def stream(self, data: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked() else data)
        if self._transport.get_write_buffer_size() > MAX_UNSENT:
            self.abort()

    def end_stream(self) -> None:
        if self._is_chunked():
            self._transport.write(b"0\r\n\r\n")
        self._end()

    # -- the way of a request --

    def _take_request(self) -> None:
        """Hand over the next request, one at a time: a later one waits for its turn."""
        if self._request or self._transport.is_closing():
            return
        request = self._parser.next_request()
        if request:
            self._request = request
            self._handler(request, self)
        elif self._parser.wants_continue:
            self._parser.wants_continue = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _end(self) -> None:
        self.on_disconnect = None
        keep_alive = self._keeps_alive()
        self._request = None
        if not keep_alive:
            self._transport.close()
            return
        self._keep_alive_timer = self._loop.call_later(KEEP_ALIVE_SECONDS, self._transport.close)
        if self._parser.pending:
            self._loop.call_soon(self.data_received, b"")

    def _refuse(self, error: HttpError) -> None:
        if self._request:  # an answer is under way, words of ours would end up inside it
            self.abort()
            return
        body = str(error).encode()
        head = self._head(
            error.status, [f"content-length: {len(body)}", "content-type: text/plain"]
        )
        self._transport.write(head + body)
        self._transport.close()

    def _head(self, status: int, lines: list[str]) -> bytes:
        if self._request:
            line = f"{self._request.method} {self._request.target} HTTP/1.{self._request.minor}"
            say(f'INFO:     {self._peer} - "{line}" {status} {STATUS[status]}')
        if not self._keeps_alive():
            lines.append("connection: close")
        text = "\r\n".join([f"HTTP/1.1 {status} {STATUS[status]}", "server: uvicorn", *lines])
        return text.encode("latin-1") + b"\r\n\r\n"

    def _keeps_alive(self) -> bool:
        # An HTTP/1.0 stream has no other end than the connection's.
        return self._request is not None and self._request.keep_alive and self._request.minor == 1

    def _is_chunked(self) -> bool:
        return self._request is not None and self._request.minor == 1

    def _is_head_request(self) -> bool:
        return self._request is not None and self._request.method == "HEAD"

    def _stop_keep_alive_timer(self) -> None:
        if self._keep_alive_timer:
            self._keep_alive_timer.cancel()
            self._keep_alive_timer = None
