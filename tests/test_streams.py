"""Streams as servers, proxies and gateways really send them: what bench.py makes of each."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

import bench as bench_script
from load.answer import Outcome
from load.metrics import Wanted, summarise
from load.streams import judge
from load.target import Load, Result, Target
from tests.conftest import PATIENCE
from tests.loopback import DONE, LAST, MODEL, Request, Server, chunk, event
from tests.servers import Ask, Kind, Piece, bench, call, running, smoke, tokens, usual

Pieces = Callable[[Ask], Iterable[Piece]]

pytestmark = pytest.mark.usefixtures("clean_environment", "same_signals", "any_machine")


def test_a_well_behaved_server_is_valid_and_its_times_are_true() -> None:
    with running(Kind(ttft=0.05, itl=0.01)) as server:
        for backend in ("openai", "openai-chat"):
            run = bench(server, "--backend", backend, "-o", backend)
            assert run.code == 0, run.said
            assert run.run["mean_ttft_ms"] >= 50 and run.run["mean_itl_ms"] > 7
        assert smoke(server).code == 0


# --- whole answers, oddly sent --------------------------------------------------------------------


def with_usage(said: dict[str, int] | None) -> Pieces:
    """This usage in every event; the true one at the end."""

    def write(ask: Ask) -> Iterator[Piece]:
        for i in range(ask.wanted):
            finish = "length" if i == ask.wanted - 1 else None
            yield 0.005, ask.event(" w", finish).replace(b"}]}", b'}],"usage":%s}' % dumped(said))
        yield 0, ask.last_usage()
        yield 0, DONE

    return write


def dumped(document: object) -> bytes:
    return json.dumps(document).encode()


def counting_on(ask: Ask) -> Iterator[Piece]:
    for i in range(1, ask.wanted + 1):
        yield 0.005, ask.event(" w", "length" if i == ask.wanted else None, usage=ask.usage(i))
    yield 0, DONE


def empty_first(ask: Ask) -> Iterator[Piece]:
    yield 0, ask.event("")
    yield from usual(ask)


def empty_between(ask: Ask) -> Iterator[Piece]:
    for wait, text in usual(ask):
        yield wait / 2, ask.event("")
        yield wait / 2, text


def like_litellm(ask: Ask) -> Iterator[Piece]:
    yield ask.kind.ttft, ask.choice(delta={"role": "assistant", "content": ""})
    for i in range(ask.wanted):
        yield ask.kind.itl if i else 0, ask.event(" w")
    yield 0.001, ask.choice(delta={}, finish_reason="length")
    yield 0.001, ask.choice(delta={}, usage=ask.usage())
    yield 0, DONE


def letters(ask: Ask, pause: float = 0.003) -> Iterator[Piece]:
    for i in range(4 * ask.wanted):
        yield ask.kind.itl if i % 4 == 0 else pause, ask.event("x", "length" if i > 99 else None)
    yield 0, ask.last_usage()
    yield 0, DONE


def in_pairs(ask: Ask) -> Iterator[Piece]:
    for i in range(0, ask.wanted, 2):
        yield ask.kind.itl, ask.event(" w w", "length" if i + 2 >= ask.wanted else None)
    yield 0, ask.last_usage()
    yield 0, DONE


def each(change: Callable[[bytes], bytes]) -> Pieces:
    return lambda ask: ((wait, change(text)) for wait, text in usual(ask))


def in_turn(ask: Ask) -> Iterator[Piece]:
    """As a proxy that adds its own line ends to the server's."""
    ends = (b"\n", b"\r\n", b"\r")
    for i, (wait, text) in enumerate(usual(ask)):
        yield wait, b": beat" + 2 * ends[i % 3] + text.replace(b"\n", ends[(i + 1) % 3])


def heartbeats(ask: Ask) -> Iterator[Piece]:
    beats = (b": PROCESSING\n\n", b"data:\n\n", b"data: \n\n", b"event: ping\ndata: now\n\n",
             b"retry: 3000\n\n", b"\n\n", b'event: ping\ndata: {"type": "ping"}\n\n',
             b"data: [KEEPALIVE]\n\n", b"data: ping\n\n", b"data: null\n\n")  # fmt: skip
    for wait, text in usual(ask):
        # Text behind the last object would be an error's.
        yield from ((0.0, beat) for beat in (beats[:-3] if text == DONE else beats))
        yield wait, text


def without_done(ask: Ask) -> Iterator[Piece]:
    """As `transformers serve` does it: usage is in the event with the finish reason."""
    *pieces, (wait, last), (_, counts), _ = usual(ask)
    yield from pieces
    usage = json.loads(counts.partition(b"data: ")[2])["usage"]
    whole = json.loads(last.partition(b"data: ")[2]) | {"usage": usage}
    yield wait, b"data: " + json.dumps(whole).encode() + b"\n\n"


def cut_before_done(ask: Ask) -> Iterator[Piece]:
    yield from list(usual(ask))[:-1]


def held_open(ask: Ask) -> Iterator[Piece]:
    yield from usual(ask)
    yield PATIENCE, b": bye\n\n"


def reset(ask: Ask) -> Iterator[Piece]:
    yield from usual(ask)
    time.sleep(0.1)
    ask.request.reset()
    raise OSError


# What it is like, by which backend, and a word of the note about it, if there is one.
WHOLE: dict[str, tuple[Kind, str]] = {
    "has zeros for usage in every event": (
        Kind(pieces=with_usage({"prompt_tokens": 0, "completion_tokens": 0})), ""),
    "has null for usage in every event": (Kind(pieces=with_usage(None)), ""),
    "counts its usage on": (Kind(pieces=counting_on), ""),
    "begins with an empty text": (Kind(pieces=empty_first), ""),
    "sends an empty text before each token": (Kind(pieces=empty_between), ""),
    "is LiteLLM": (Kind(pieces=like_litellm), ""),
    "sends a token as four events": (Kind(pieces=letters), "an event carried 0.25 tokens"),
    "sends a token as four events at once": (Kind(pieces=lambda a: letters(a, 0)), ""),
    "sends two tokens an event": (Kind(pieces=in_pairs), "an event carried 2.0 tokens"),
    "calls it text/plain": (Kind(content_type=b"text/plain"), "though sent as text/plain"),
    "calls it nothing": (Kind(content_type=b""), "though sent as no content type"),
    "calls it in capitals": (Kind(content_type=b"Text/Event-Stream"), ""),
    "begins with a BOM": (Kind(pieces=lambda a: [(0, b"\xef\xbb\xbf"), *usual(a)]), ""),
    "ends lines by CRLF": (Kind(pieces=each(lambda t: t.replace(b"\n", b"\r\n"))), ""),
    "ends lines by CR": (Kind(pieces=each(lambda t: t.replace(b"\n", b"\r"))), ""),
    "ends lines by turns": (Kind(pieces=in_turn), ""),
    "leaves the space out": (Kind(pieces=each(lambda t: t.replace(b"data: ", b"data:"))), ""),
    "leaves blank lines out": (Kind(pieces=each(lambda t: t[:-1])), ""),
    "leaves one out before [DONE]": (
        Kind(pieces=each(lambda t: t[: -1 if b"usage" in t else None])), ""),
    "keeps it alive": (Kind(pieces=heartbeats), ""),
    "sends no [DONE]": (Kind(pieces=without_done), "ended without [DONE]"),
    "sends no [DONE] and closes": (Kind(pieces=without_done, chunked=False), "without [DONE]"),
    "sends no last chunk": (Kind(end=b"", closes=True), "without the end of the transfer"),
    "is reset after [DONE]": (Kind(pieces=reset), "without the end of the transfer"),
    "keeps the transfer open": (Kind(pieces=held_open), "the transfer stayed open"),
    "keeps a connection open": (Kind(pieces=held_open, chunked=False), "the transfer stayed open"),
    "forbids proxies to compress it": (Kind(headers=b"Content-Encoding: none\r\n"), ""),
    "has a trailer": (Kind(end=b"0\r\nX-Cost: 1\r\n\r\n"), ""),
    "lists what becomes of the connection": (
        Kind(headers=b"Connection: Upgrade, Close\r\n", closes=True), "closes its connections"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_answer_of_a_server_that(kind: str) -> None:
    server_is, words = WHOLE[kind]
    backend = "openai-chat" if "LiteLLM" in kind else "openai"
    for attempt in range(5):  # a busy machine's client finds several tokens in one read: a note
        with running(server_is) as server:
            run = bench(server, "--backend", backend, "-o", f"{attempt}")
        right = words in run.notes if words else "answers" not in run.notes
        if run.code == 0 and right:
            break
    assert run.code == 0, run.said
    assert right, run.notes


def test_a_stream_that_was_cut_between_usage_and_done_is_not_whole() -> None:
    with running(Kind(pieces=cut_before_done)) as server:
        run = bench(server)
    assert run.code == 1 and "without [DONE], which follows" in run.said, run.said


def test_the_first_token_counts_not_the_first_event() -> None:
    with running(Kind(ttft=0.3, pieces=empty_first)) as server:
        run = bench(server, "--num-prompts", "2").run
    assert run["mean_ttft_ms"] >= 300


def test_finish_and_usage_events_are_no_tokens() -> None:
    with running(Kind(ttft=0.02, itl=0.03, pieces=like_litellm)) as server:
        one = bench(server, "--backend", "openai-chat", "--output-len", "1", "-o", "1").run
        four = bench(server, "--backend", "openai-chat", "--output-len", "4", "-o", "4").run
    assert one["mean_itl_ms"] is None and one["mean_e2el_ms"] == one["mean_ttft_ms"]
    assert four["mean_itl_ms"] > 25  # not 18


# --- errors, in any shape -------------------------------------------------------------------------

WORDS = "the upstream model is out of capacity"
ERRORS: dict[str, bytes] = {
    "bare JSON": b'{"error":{"message":"%s","code":529}}\n\n',
    "bare JSON, broken into lines": b'{"error":\n{"message":\n"%s"}}\n\n',
    "an event of that name": b'event: error\ndata: {"type":"overloaded","message":"%s"}\n\n',
    "an event of that name, and text": b"event: error\ndata: %s\n\n",
    "FastChat's": b'data: {"text":"%s","error_code":50001}\n\ndata: [DONE]\n\n',
    "llama.cpp's": b'error: {"code":500,"message":"%s","type":"server_error"}\n\n',
    "TGI's": b'data: {"error":"%s","error_type":"overloaded"}\n\n',
    "OpenAI's": b'data: {"error":{"message":"%s","type":"server_error"}}\n\ndata: [DONE]\n\n',
    "OpenRouter's": b'data: {"error":{"code":502,"message":"%s"},"choices":[{"index":0,'
                    b'"delta":{"content":""},"finish_reason":"error"}]}\n\ndata: [DONE]\n\n',
    "FastAPI's": b'data: {"detail":"%s"}\n\n',
    "plain text": b"%s\n\n",
    "plain text as data": b"data: %s\n\n",
}  # fmt: skip


@pytest.mark.parametrize("shape", ERRORS)
@pytest.mark.parametrize("after", [0, 3])
def test_an_error_in_a_stream_of_status_200(shape: str, after: int) -> None:
    def pieces(ask: Ask) -> Iterator[Piece]:
        yield from list(tokens(ask))[:after]
        yield 0.01, ERRORS[shape] % WORDS.encode()

    with running(Kind(pieces=pieces)) as server:
        run = bench(server, "--warmup", "0", "--num-prompts", "2")
    assert run.code == 1
    (problem,) = run.run["problems"]
    assert problem.endswith(WORDS) and "{" not in problem


def test_an_error_in_chunks_is_its_words() -> None:
    def answer(request: Request) -> None:
        text = dumped({"error": {"message": "the model is overloaded, try again"}})
        head = b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n"
        request.send(head + chunk(text[:30]) + chunk(text[30:]) + LAST)

    with running(Kind(answers=answer)) as server:
        run = bench(server)
    (problem,) = run.run["problems"]
    assert problem.endswith(": HTTP 503: the model is overloaded, try again")


def test_a_gateways_page_is_its_title() -> None:
    def answer(request: Request) -> None:
        page = b"<html><head><title>502 Bad\n Gateway</title></head><body>nginx</body></html>"
        request.send(b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\n"
                     b"Content-Length: %d\r\n\r\n%s" % (len(page), page))  # fmt: skip

    with running(Kind(answers=answer)) as server:
        (problem,) = bench(server).run["problems"]
    assert problem.endswith("HTTP 502: an HTML page, '502 Bad\\n Gateway'")


def test_a_terminal_gets_no_escape_sequence() -> None:
    words = "\x1b[31mTraceback\x1b[0m \x1b]0;owned\x07 \u202eout of memory\x9b1m"

    def answer(request: Request) -> None:
        request.document({"error": {"message": words}}, "500 Oops")

    with running(Kind(answers=answer)) as server:
        run = bench(server)
    assert "out of memory" in run.said and not set("\x1b\x07\x9b\u202e") & set(run.said)
    assert "\\x1b[31mTraceback" in run.out


@pytest.mark.parametrize("where", ["models", "completions"])
def test_a_redirect_says_where_to(where: str) -> None:
    def away(request: Request) -> None:
        request.send(b"HTTP/1.1 308 Moved\r\nLocation: https://elsewhere/v1\r\n"
                     b"Content-Length: 0\r\n\r\n")  # fmt: skip

    with running(Kind(models=away) if where == "models" else Kind(answers=away)) as server:
        run = bench(server)
    assert run.code == 1 and "https://elsewhere/v1, not followed" in run.said


def refuse(listener: socket.socket) -> None:
    """As uvicorn does what is no HTTP."""
    connection, _ = listener.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def test_https_to_a_server_without_it_says_so(certificate: ssl.SSLContext) -> None:
    with socket.create_server(("127.0.0.1", 0)) as plain:
        refusing = threading.Thread(target=refuse, args=(plain,), daemon=True)
        refusing.start()
        run = call(bench_script.main, "-H", f"https://127.0.0.1:{plain.getsockname()[1]}")
        refusing.join(PATIENCE)
    assert run.code == 1 and "did you mean http://?" in run.err, run.err
    with running(Kind(), certificate) as server:
        run = bench(server, url=f"https://127.0.0.1:{server.port}")
    assert run.code == 1 and "REQUESTS_CA_BUNDLE" in run.err and "--insecure" in run.err


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_certificate_is_trusted_by_the_variables_that_test_py_knows(
    certificate: ssl.SSLContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for other in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, str(tmp_path / "cert.pem"))
    with running(Kind(), certificate) as server:
        run = bench(server, url=f"https://localhost:{server.port}")
        assert run.code == 0, run.said
        monkeypatch.setenv(name, "/nowhere.pem")
        run = bench(server, url=f"https://localhost:{server.port}")
    assert run.code == 1 and f"{name}=/nowhere.pem: No such file" in run.err


def test_an_answer_without_a_body_is_not_waited_for() -> None:
    nothing = b"HTTP/1.1 204 No Content\r\n\r\n"
    with running(Kind(answers=lambda request: request.send(nothing))) as server:
        run = bench(server, "--timeout", "60")
    assert "HTTP 204: (empty body)" in run.said


# --- connections ----------------------------------------------------------------------------------


def test_a_connection_that_the_server_closes_is_not_the_clients_delay(
    certificate: ssl.SSLContext,
) -> None:
    class Far(ssl.SSLContext):
        """Some way off."""

        def wrap_socket(self, *args: object, **more: object) -> ssl.SSLSocket:
            time.sleep(0.06)
            return certificate.wrap_socket(*args, **more)  # type: ignore[arg-type]

    closing = Kind(headers=b"Connection: close\r\n", closes=True)
    with running(closing, Far(ssl.PROTOCOL_TLS_SERVER)) as server:
        url = f"https://127.0.0.1:{server.port}"
        run = bench(server, "--num-prompts", "6", "--insecure", url=url)
    assert run.code == 0, run.said
    assert "closes its connections: 4 of 6 requests waited for a new one" in run.notes


def test_a_server_with_one_worker_has_no_idle_connection_before_it() -> None:
    """It takes the next connection only when one has closed."""
    kind = Kind()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answering = threading.Thread(target=one_by_one, args=(listener, kind), daemon=True)
        answering.start()
        server = type("At", (), {"port": listener.getsockname()[1]})
        for name, more in (("closed", ()), ("open", ("--request-rate", "5"))):
            load = ("--concurrency", "1", "--num-prompts", "3", "--timeout", str(PATIENCE))
            run = bench(server, *load, *more, "-o", name)  # type: ignore[arg-type]
            assert run.code == 0, run.said
        listener.shutdown(socket.SHUT_RDWR)
        answering.join(PATIENCE)


def one_by_one(listener: socket.socket, kind: Kind) -> None:
    server = Server(kind, listener)
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.serve(connection, None)


# --- held back on the way -------------------------------------------------------------------------


def collected(ask: Ask) -> Iterator[Piece]:
    text = [*usual(ask)]
    yield sum(wait for wait, _ in text), b"".join(piece for _, piece in text)


def by_fours(ask: Ask) -> Iterator[Piece]:
    text = [*usual(ask)]
    for i in range(0, len(text), 4):
        yield sum(wait for wait, _ in text[i : i + 4]), b"".join(t for _, t in text[i : i + 4])


def late_head(ask: Ask) -> Iterator[Piece]:
    text = [*usual(ask)]
    yield sum(wait for wait, _ in text[:8]), b"".join(piece for _, piece in text[:8])
    yield from text[8:]


HELD: dict[str, tuple[Kind, list[str], str]] = {
    "whole": (Kind(itl=0.02, pieces=collected), ["ttft", "itl", "tpot"], "in one piece"),
    "every four tokens": (Kind(itl=0.02, pieces=by_fours), ["ttft", "itl"], "4 tokens together"),
    "at its beginning": (Kind(itl=0.02, pieces=late_head), ["ttft"], "the first 8 tokens"),
}


@pytest.mark.parametrize("held", HELD)
def test_a_stream_that_a_proxy_holds_back(held: str) -> None:
    kind, wrong, words = HELD[held]
    with running(kind) as server:
        run = bench(server, "--output-len", "24", "-o", "out")
    (problem,) = run.run["problems"]
    assert run.code == 1 and words in problem and "proxy_buffering off" in problem
    with open("out/throughput-in16-out24-c2.json") as file:  # noqa: PTH123
        assert json.load(file)["invalid_metrics"] == wrong


def test_a_stream_with_a_length_was_collected_however_slowly_it_comes() -> None:
    def answer(request: Request) -> None:
        ask = Ask(Kind(), request)
        text = [piece for _, piece in usual(ask)]
        size = sum(map(len, text))
        request.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                     b"Content-Length: %d\r\n\r\n" % size)  # fmt: skip
        request.send(*text, pause=0.005)

    with running(Kind(answers=answer)) as server:
        run = bench(server)
    assert "4 of 4 answers came in one piece" in run.said


def test_a_few_tokens_at_once_are_only_noted() -> None:
    with running(Kind(pieces=collected)) as server:
        run = bench(server, "--output-len", "4")
    assert run.code == 0 and "came all at once" in run.notes


def outcome(*gaps: float, output: int | None = None) -> Outcome:
    found = Outcome(0, 0, 1, 50_000_000, int(50e6 + sum(gaps) * 1e6), array("f", gaps))
    found.events, found.prompt_tokens, found.has_text = len(gaps) + 1, 4, True
    found.output_tokens, found.model = output or found.events, MODEL
    return found


@pytest.mark.parametrize(
    ("gap", "tokens", "ttft", "noted"),
    [(0.5, 64, 700, True), (0.5, 64, 100, False), (3, 8, 700, False), (0.5, 4, 700, False),
     (10, 64, 700, False)],
)  # fmt: skip
def test_an_answer_that_was_collected_and_sent_on_event_by_event_is_noted(
    gap: float, tokens: int, ttft: int, noted: bool
) -> None:
    replayed = outcome(*[gap] * (tokens - 1))
    replayed.sent = replayed.first - ttft * 1_000_000
    found = judge([replayed] * 4)
    assert not found.problems
    assert ("4 of 4 answers came whole in less than a tenth" in " ".join(found.notes)) == noted


def test_speculation_a_hiccup_and_pairs_are_no_proxy() -> None:
    speculating = outcome(*[20] * 15, output=64)
    hiccup = outcome(*[10] * 20, 60, 0, 0, 0, 0, *[10] * 20)
    pairs = outcome(*[20, 0] * 20)
    assert not judge([speculating, hiccup, pairs] * 9).problems


@pytest.mark.parametrize(("waited", "words"), [(0, "proxy_buffering"), (5000, "the client read")])
@pytest.mark.usefixtures("real_limits")
def test_a_client_without_a_core_is_not_taken_for_a_proxy(waited: float, words: str) -> None:
    answers = [outcome(*[0, 0, 0, 30] * 8) for _ in range(4)]
    for each in answers:
        each.merged, each.blurred = 24, 24
    load = Load(Target("h", 1), "/", lambda _: b"", 4, 4)
    made = summarise(load, Result(answers, waited=waited), Wanted(MODEL, None), {})
    assert len(made["problems"]) == 1 and words in made["problems"][0]


@pytest.mark.parametrize("usage", [{"completion_tokens": 0}, {"completion_tokens": 8.0}])
def test_text_of_no_tokens_is_text_without_a_count(usage: dict[str, float]) -> None:
    """Zeros would make a valid run of 0 tokens/s; a gateway in Lua or Java writes 8.0."""

    def pieces(ask: Ask) -> Iterator[Piece]:
        for i in range(8):
            yield 0.01, ask.event(f" w{i}", "stop" if i == 7 else None)
        yield 0, event({"choices": [], "usage": {"prompt_tokens": 0, **usage}})
        yield 0, DONE

    with running(Kind(pieces=pieces)) as server:
        run = bench(server, "--backend", "openai-chat")
    counted = usage["completion_tokens"] > 0
    assert run.run["problems"] == ([] if counted else ["4 answers came without usage"]), run.said


def test_zeros_behind_the_true_usage_change_nothing() -> None:
    def pieces(ask: Ask) -> Iterator[Piece]:
        yield from tokens(ask)
        yield 0, ask.last_usage()
        yield 0, event({"choices": [], "usage": {"prompt_tokens": 0, "completion_tokens": 0}})
        yield 0, DONE

    with running(Kind(pieces=pieces)) as server:
        run = bench(server)
    assert run.code == 0, run.said
