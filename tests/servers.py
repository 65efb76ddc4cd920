"""Servers as they are in the wild: a row says how one differs from a well-behaved server.

    SLOW_CHAT = Kind(ttft=0.2)
    with running(Kind(pieces=lambda ask: [(0.1, b": ping\n\n"), *tokens(ask)])) as server:
        run = bench(server)             # or smoke(server): test.py
        assert run.code == 0, run.said

A `Piece` is (seconds to wait, bytes of the body); each is sent as one chunk. What no row can say
(a reset, a header that never ends) is a function of a loopback.Request, as `answers=`.
"""

from __future__ import annotations

import contextlib
import io
import json
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import bench as bench_script
from tests.loopback import DONE, LAST, MODEL, Answer, Request, Server, chunk, event, serving
from tests.test_smoke import smoke as smoke_script

Piece = tuple[float, bytes]
CHUNKED = b"Transfer-Encoding: chunked\r\n"


@dataclass(frozen=True)
class Ask:
    """What a request wants, by either API, and what the server is like."""

    kind: Kind
    request: Request

    @property
    def body(self) -> dict[str, Any]:
        return dict(self.request.body or {})

    @property
    def chat(self) -> bool:
        return "messages" in self.body

    @property
    def wanted(self) -> int:
        """Tokens asked for."""
        return int(self.body.get("max_tokens") or self.body.get("max_completion_tokens") or 16)

    @property
    def prompt(self) -> int:
        """Tokens of the prompt: as many as ids or words."""
        said = self.body.get("prompt") or " ".join(m["content"] for m in self.body["messages"])
        return len(said) if isinstance(said, list) else len(said.split())

    def usage(self, output: int | None = None) -> dict[str, int]:
        output = self.wanted if output is None else output
        return {"prompt_tokens": self.prompt, "completion_tokens": output,
                "total_tokens": self.prompt + output}  # fmt: skip

    def event(self, text: str | None = " word", finish: str | None = None, **more: Any) -> bytes:
        """One event of a stream; no text: a chat's empty delta, a completion's empty text."""
        said = {"text": text or ""}
        if self.chat:
            said = {"delta": {} if text is None else {"content": text}}  # type: ignore[dict-item]
        return self.choice(finish_reason=finish, **said, **more)

    def choice(self, *, usage: Any = None, model: Any = MODEL, **fields: Any) -> bytes:
        """An event with one choice of these fields."""
        name = "chat.completion.chunk" if self.chat else "text_completion"
        document = {"id": "1", "object": name, "model": model, "choices": [{"index": 0, **fields}]}
        return event(document if usage is None else {**document, "usage": usage})

    def last_usage(self, output: int | None = None, **more: Any) -> bytes:
        """The event without choices that ends an honest stream."""
        said = self.usage(output)
        return event({"id": "1", "model": MODEL, "choices": [], "usage": said, **more})


def tokens(ask: Ask, count: int | None = None) -> Iterator[Piece]:
    """The role of a chat, then a token an event, the last with its finish reason."""
    count, kind = ask.wanted if count is None else count, ask.kind
    if ask.chat:
        yield kind.ttft, ask.choice(delta={"role": "assistant", "content": ""}, finish_reason=None)
    for i in range(count):
        wait = kind.itl if i else 0 if ask.chat else kind.ttft
        yield wait, ask.event(f" w{i}", "length" if i == count - 1 else None)


def usual(ask: Ask) -> Iterator[Piece]:
    """The whole stream of a well-behaved server."""
    yield from tokens(ask)
    yield 0, ask.last_usage()
    yield 0, DONE


def whole(ask: Ask) -> Any:
    """The document for a request that does not ask for a stream."""
    prompts = ask.body.get("prompt") or []
    batch = isinstance(prompts, list) and prompts and isinstance(prompts[0], str)
    said = {"message": {"role": "assistant", "content": "one two"}} if ask.chat else {"text": " 6"}
    finish = "stop" if ask.body.get("stop") else "length"
    choices = [{"index": i, **said, "finish_reason": finish}
               for i in range(len(prompts) if batch else 1)]  # fmt: skip
    return {"id": "1", "model": MODEL, "choices": choices,
            "usage": ask.usage(min(4, ask.wanted) * len(choices))}  # fmt: skip


MODELS = {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1}]}


@dataclass(frozen=True)
class Kind:
    """A server; every field has a well-behaved default."""

    ttft: float = 0.02  # s
    itl: float = 0.005  # s
    pieces: Callable[[Ask], Iterable[Piece]] = usual
    document: Callable[[Ask], Any] = whole
    status: bytes = b"200 OK"  # of a stream
    content_type: bytes = b"text/event-stream; charset=utf-8"  # b"": no such header
    headers: bytes = b""  # more of them, each with its b"\r\n"
    chunked: bool = True  # else the end of the connection is the end of the body
    end: bytes = LAST
    closes: bool = False  # the connection, after each stream
    refuses: Callable[[dict[str, Any]], str] = lambda body: ""  # the words of a 400, or none
    models: Any = field(default_factory=lambda: MODELS)  # a document, or an Answer
    paths: Mapping[str, Any] = field(default_factory=dict)  # others: documents, or Answers
    answers: Answer | None = None  # in place of all of the above, for /v1/... but the models

    def __call__(self, request: Request) -> None:
        path = request.line.split()[1].partition("?")[0]
        found = self.models if path.endswith("/v1/models") else self.paths.get(path)
        if request.line.startswith("POST"):
            (self.answers or self.complete)(request)
        elif callable(found):
            found(request)
        elif found is not None:
            request.document(found)
        elif path == "/health":
            request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        else:
            request.document({"detail": "Not Found"}, "404 Not Found")

    def complete(self, request: Request) -> None:
        ask = Ask(self, request)
        if words := self.refuses(ask.body):
            request.document({"object": "error", "message": words}, "400 Bad Request")
        elif ask.body.get("stream"):
            self.stream(ask)
        else:
            request.document(self.document(ask))

    def stream(self, ask: Ask) -> None:
        request = ask.request
        request.send(self.head())
        for wait, data in self.pieces(ask):
            time.sleep(wait)  # never to catch up with a timetable: that would look like a proxy
            if data:
                request.send(chunk(data) if self.chunked else data)
        request.send(self.end if self.chunked else b"")
        if self.closes or not self.chunked:
            request.hang_up()

    def head(self) -> bytes:
        kind = b"Content-Type: %s\r\n" % self.content_type if self.content_type else b""
        frame = CHUNKED if self.chunked else b""
        return b"HTTP/1.1 %s\r\n%s%s%s\r\n" % (self.status, kind, frame, self.headers)


@contextlib.contextmanager
def running(kind: Answer, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    with serving(kind, tls) as server:
        yield server


# --- what our scripts make of it ------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """Exit code, all that was said, and the JSON document of the last line of stdout."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err

    @property
    def last(self) -> dict[str, Any]:
        lines = self.out.splitlines()
        try:
            return dict(json.loads(lines[-1]))
        except (IndexError, ValueError):
            return {}

    @property
    def run(self) -> dict[str, Any]:
        """bench.py's first run; {} where it measured nothing."""
        return dict((self.last.get("runs") or [{}])[0])

    @property
    def notes(self) -> str:
        return "\n".join(line for line in self.out.splitlines() if line.startswith("note"))


LOAD = {"-t": "throughput", "--num-prompts": "4", "--concurrency": "2", "--input-len": "16",
        "--output-len": "8", "--client": "builtin"}  # fmt: skip


def bench(server: Server, *args: str, url: str = "") -> Said:
    """bench.py on a small load; args may give each of its flags another value."""
    given = [word for flag, value in LOAD.items() if flag not in args for word in (flag, value)]
    return call(bench_script.main, "-H", url or f"http://127.0.0.1:{server.port}", *given, *args)


def smoke(server: Server, *args: str, url: str = "") -> Said:
    return call(smoke_script.main, "-H", url or f"http://127.0.0.1:{server.port}", *args)


def call(main: Callable[[list[str]], int], *argv: str) -> Said:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(argv))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return Said(code, out.getvalue(), err.getvalue())
