"""A server on the loopback whose every byte a test decides."""

from __future__ import annotations

import json
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
LAST = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"
MODEL = "test-model"


@dataclass
class Request:
    """What the server was asked, and over which connection."""

    number: int  # of all requests, from 1
    on_connection: int  # of those on this connection, from 1
    line: str
    fields: dict[str, str]
    body: Any
    socket: socket.socket

    def send(self, *pieces: bytes, pause: float = 0.0) -> None:
        for piece in pieces:
            self.socket.sendall(piece)
            if pause:
                time.sleep(pause)

    def document(self, body: Any, status: str = "200 OK", fields: str = "") -> None:
        text = json.dumps(body).encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{fields}"
        self.send(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)

    def hang_up(self) -> None:
        """Close it in good order: what was sent arrives, then the end."""
        if isinstance(self.socket, ssl.SSLSocket):
            with suppress(OSError, ValueError):
                self.socket.unwrap()
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close it hard, under the file that still reads from it."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with Path(os.devnull).open() as nothing:
            os.dup2(nothing.fileno(), self.socket.fileno())


Answer = Callable[[Request], None]


@dataclass
class Server:
    answer: Answer
    listener: socket.socket
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    sockets: list[socket.socket] = field(default_factory=list)
    workers: AbstractContextManager[Any] = field(default_factory=nullcontext)  # or a semaphore

    def serve(self, connection: socket.socket, tls: ssl.SSLContext | None) -> None:
        with self.workers, suppress(OSError, ValueError):
            if tls:
                connection = tls.wrap_socket(connection, server_side=True)
            file = connection.makefile("rb")
            count = 0
            while line := file.readline():
                count += 1
                self.handle(connection, file, line, count)
        with suppress(OSError):
            connection.close()

    def handle(self, connection: socket.socket, file: Any, line: bytes, count: int) -> None:
        fields = {}
        while (header := file.readline().decode().strip()) != "":
            name, _, value = header.partition(":")
            fields[name.lower()] = value.strip()
        text = file.read(int(fields.get("content-length", 0)))
        body = json.loads(text) if text else None
        with self.lock:
            request = Request(
                len(self.requests) + 1, count, line.decode(), fields, body, connection
            )
            self.requests.append(request)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            self.answer(request)
        finally:
            with self.lock:
                self.in_flight -= 1


@contextmanager
def serving(answer: Answer, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    with socket.socket() as listener:
        server = Server(answer, listener)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen(512)
        server.port = listener.getsockname()[1]
        accepting = threading.Thread(target=accept, args=(listener, server, tls), daemon=True)
        accepting.start()
        try:
            yield server
        finally:
            with suppress(OSError):  # a test may have closed it
                listener.shutdown(socket.SHUT_RDWR)
            accepting.join(5)
            for connection in server.sockets:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()


def accept(listener: socket.socket, server: Server, tls: ssl.SSLContext | None) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.connections += 1
        server.sockets.append(connection)
        threading.Thread(target=server.serve, args=(connection, tls), daemon=True).start()


# --- pieces of answers ----------------------------------------------------------------------------


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


def token(text: str = " word", finish: str | None = None, model: str = MODEL) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return event({"id": "cmpl-1", "model": model, "choices": [choice]})


def delta(finish: str | None = None, **fields: Any) -> bytes:
    choice = {"index": 0, "delta": fields, "finish_reason": finish}
    return event({"id": "chatcmpl-1", "model": MODEL, "choices": [choice]})


def usage(prompt: int, output: int) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": output}
    return event({"model": MODEL, "choices": [], "usage": counts})


def stream(
    tokens: int = 3, prompt: int = 4, count: int | None = None, text: str = " word"
) -> bytes:
    """A whole, usual answer."""
    said = usage(prompt, tokens if count is None else count)
    return HEAD + b"".join(map(chunk, [*[token(text)] * tokens, said, DONE])) + LAST


def model_server(answer: Answer, model: str = MODEL) -> Answer:
    """Answers what bench.py asks besides completions."""

    def route(request: Request) -> None:
        path = request.line.split()[1]
        if path == "/v1/models":
            request.document({"data": [{"id": model}]}, fields="Server: uvicorn\r\n")
        elif path == "/version":
            request.document({"version": "1.1.0"})
        elif path.startswith("/v1/"):
            answer(request)
        else:
            request.document({"detail": "Not Found"}, "404 Not Found")

    return route


def obedient(request: Request, ttft: float = 0.03) -> None:
    """Writes as many tokens as it was asked for: a few at once, more as an engine does."""
    body = request.body
    wanted = body.get("max_tokens") or body.get("max_completion_tokens")
    prompt = body.get("prompt")
    said = usage(len(prompt) if isinstance(prompt, list) else 7, wanted)
    make = chunk(delta(content="hi") if "messages" in body else token())
    time.sleep(ttft)
    tokens = [make] * wanted if wanted >= 8 else [make * wanted]
    request.send(HEAD + tokens[0])
    request.send(*tokens[1:], pause=0.02)
    request.send(chunk(said) + chunk(DONE) + LAST)
