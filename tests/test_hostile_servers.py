"""Servers that lie, never end, or never speak: a sentence, in bounded time and memory.

test.py's own table of them is in test_smoke.py.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import bench
from common.ask import ask
from common.response import Malformed, Reply
from launch import health, status
from launch.order import Command
from load import endpoint
from load.answer import Outcome, read_reply
from tests.conftest import PATIENCE, ROOT
from tests.loopback import (
    DONE,
    HEAD,
    LAST,
    MODEL,
    Request,
    chunk,
    event,
    model_server,
    obedient,
    serving,
    stream,
    token,
    usage,
)
from tests.test_hostile_input import JSON, PEAK, TOO_DEEP, call
from tests.test_smoke import CHECKS, smoke

pytestmark = pytest.mark.usefixtures("clean_environment")

Misbehave = Callable[[Request], None]
OK = b"HTTP/1.1 200 OK\r\n"
EVENTS = OK + b"Content-Type: text/event-stream\r\n\r\n"
WORD = token()


def once(content: bytes) -> Misbehave:
    """This, and the end of the connection."""

    def write(request: Request) -> None:
        request.send(content)
        request.socket.shutdown(1)

    return write


def kept(content: bytes) -> Misbehave:
    """This, and then nothing."""

    def write(request: Request) -> None:
        request.send(content)
        request.socket.recv(1)

    return write


def flood(block: bytes, head: bytes = b"", pause: float = 0.0) -> Misbehave:
    """For ever the same."""

    def write(request: Request) -> None:
        request.send(head)
        while True:
            request.send(block, pause=pause)

    return write


def document(body: bytes, head: bytes = OK) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


@cache
def bomb(megabytes: int) -> bytes:
    """A gzip bomb of so many zeros. It is made when it is sent: that takes a while."""
    packed = gzip.compress(bytes(megabytes << 20), 1)
    return document(packed, OK + b"Content-Encoding: gzip\r\n")


def bombs(megabytes: int) -> Misbehave:
    return lambda request: kept(bomb(megabytes))(request)


# What it does, and a word of the sentence for it: to a question, and to a measured request.
SERVERS: dict[str, tuple[Misbehave, str, str]] = {
    "says nothing": (kept(b""), "no whole answer within", "no whole answer within"),
    "closes at once": (once(b""), "", "closed"),
    "drips a status line": (flood(b"H", pause=0.05), "not an HTTP", "not an HTTP"),
    "drips headers": (flood(b"x", OK + b"X-", 0.05), "no whole answer", "no whole answer"),
    "sends headers for ever": (flood(b"X: y\r\n" * 999, OK), "header does not", "header does not"),
    "sends a header for ever": (flood(b"x" * 65536, OK), "header does not", "header does not"),
    "says 100 for ever": (flood(b"HTTP/1.1 100 \r\n\r\n" * 99), "100 Continue", "100 Continue"),
    "drips a body": (flood(b" ", OK + b"\r\n", 0.05), "no whole answer", "no whole answer"),
    "sends a body for ever": (flood(b" " * 65536, OK + b"\r\n"), "does not end", "does not end"),
    "sends 100 GB": (flood(b" " * 65536, OK + b"Content-Length: 100000000000\r\n\r\n"),
                     "does not end", "does not end"),
    "sends chunks for ever": (flood(b"4\r\nabcd\r\n" * 999, HEAD), "does not end", "does not end"),
    "sends chunk ends for ever": (flood(b"4\r\n\r\n\r\n\r\n" * 999, HEAD), "not end", "not end"),
    "sends a chunk size for ever": (flood(b"0" * 65536, HEAD), "does not end", "does not end"),
    "sends no chunks": (kept(HEAD + b"X: y\r\n\r\n"), "bad chunk", "bad chunk"),
    "has a negative chunk size": (kept(HEAD + b"-6\r\nabcd\r\n\r\n"), "bad chunk", "bad chunk"),
    "breaks off": (once(OK + b"Content-Length: 99\r\n\r\n{}"), "middle", "middle"),
    "breaks off a chunk": (once(HEAD + b"9\r\n{}"), "middle", "middle"),
    "speaks SSH": (once(b"SSH-2.0-OpenSSH_9.0\r\n"), "not an HTTP", "not an HTTP"),
    "sends binary": (once(bytes(range(256))), "not an HTTP", "not an HTTP"),
    "has no status": (once(b"HTTP/1.1 abc\r\n\r\n"), "not an HTTP", "not an HTTP"),
    "has a long status": (once(b"HTTP/1.1 2000 OK\r\n\r\n"), "not an HTTP", "not an HTTP"),
    "has a length beyond int()": (kept(OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n"),
                                  "bad Content-Length", "bad Content-Length"),
    "sends a gzip bomb": (bombs(32), "came as 'gzip'", "came as 'gzip'"),
    "sends no UTF-8": (kept(document(b"\xff\xff")), "decode", "unreadable"),
    "is nested deeply": (kept(document(TOO_DEEP)), "nested too deeply", "unreadable"),
    "sends another shape": (kept(document(b"[1]")), "names no model", "no choices"),
    "sends a long number": (kept(document(b"[" + b"9" * 5000 + b"]")), "limit", "limit"),
    "answers 401": (kept(document(b"no", b"HTTP/1.1 401 No\r\n")), "/models: 401", "HTTP 401: no"),
}  # fmt: skip

# In an event stream, where the others do not apply; measured requests only.
STREAMS: dict[str, tuple[Misbehave, str]] = {
    "ends the lines of its chunks oddly": (kept(stream().replace(b"\r\n", b"\n")), "a bare"),
    "streams for ever": (flood(WORD, EVENTS), "does not end"),
    "streams for ever, slowly": (flood(WORD, EVENTS, 0.02), "no whole answer within"),
    "sends an endless line": (flood(b"x" * 65536, EVENTS + b"data: "), "does not end"),
    "sends events of 1 MB": (flood(token("x" * (1 << 20)), EVENTS), "does not end"),
    "ends without [DONE]": (once(EVENTS + WORD), "without [DONE]"),
    "nests an event deeply": (once(EVENTS + b"data: " + TOO_DEEP + b"\n\n" + DONE), "unreadable"),
    "sends other events": (once(EVENTS + b"data: 3\n\ndata: []\n\n" + DONE), "unreadable"),
    "sends no UTF-8 event": (once(EVENTS + b'data: {"choices":[{\xff}]}\n\n' + DONE), "unreadable"),
}


def counts(prompt: Any, output: Any, model: Any = MODEL) -> Misbehave:
    said = {"prompt_tokens": prompt, "completion_tokens": output}
    word = event({"model": model, "choices": [{"index": 0, "text": " word"}]})
    last = event({"model": model, "choices": [], "usage": said})
    return kept(HEAD + b"".join(map(chunk, [word, word, last, DONE])) + LAST)


# Counts that are none: the run is invalid and says so, and every report can be written.
COUNTS: dict[str, tuple[Misbehave, str]] = {
    "counts in words": (counts("4", "2"), "without usage"),
    "counts less than nothing": (counts(-4, -2), "without usage"),
    "counts in lists": (counts([4], {"a": 1}), "without usage"),
    "counts too high": (counts(4, 10**400), "without usage"),
    "counts in halves": (counts(4.5, 1e308), "without usage"),
    "counts what it did not write": (counts(4, 99), "are not 4 tokens long (one has 99)"),
    "is another model each time": (
        lambda request: counts(4, 4, model=str(request.number) * 9_000)(request),
        "answers came from ",
    ),
}


MEASURED = {kind: (row[0], row[-1]) for kind, row in SERVERS.items()} | STREAMS | COUNTS


@pytest.fixture
def timeout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Short where it has to run out, long where a busy machine must not let it."""
    kind = request.node.callspec.params["kind"]
    seconds = 1.0 if "no whole answer" in MEASURED[kind][1] else PATIENCE
    monkeypatch.setattr(endpoint, "TIMEOUT", seconds)
    monkeypatch.setattr(health, "HEALTH_TIMEOUT", seconds)
    monkeypatch.setattr(status, "TIMEOUT", seconds)
    monkeypatch.setattr(health, "DAY", seconds)
    return str(seconds)


NAMELESS = [
    *("-t", "throughput", "--num-prompts", "2", "--concurrency", "2", "--input-len", "4"),
    *("--output-len", "4", "--warmup", "0", "-o", "out"),
]
QUICK = [*NAMELESS, "-m", MODEL]


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.usefixtures("timeout")
def test_a_question_to_a_server_that(kind: str) -> None:
    misbehave, words, _ = SERVERS[kind]
    with serving(misbehave) as there:
        code, out, err = call(bench.main, "-H", f"http://127.0.0.1:{there.port}", *NAMELESS)
    assert (code, out) == (1, b"") and "ERROR" in err and words in err, err
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", MEASURED)
def test_a_measured_request_to_a_server_that(kind: str, timeout: str) -> None:
    misbehave, words = MEASURED[kind]
    with serving(model_server(misbehave)) as there:
        url = f"http://127.0.0.1:{there.port}"
        code, out, _ = call(bench.main, "-H", url, *QUICK, "--timeout", timeout)
    last = json.loads(out.splitlines()[-1])
    [run] = last["runs"]
    assert code == 1 and not run["valid"]
    problems = " / ".join(run["problems"]).replace("no warm-up request had its", "no whole")
    assert words in problems and len(problems) < 2000, problems
    assert {"summary.json", "summary.csv", "report.html"} <= {p.name for p in Path("out").iterdir()}


def unasked(every: float) -> Command:
    raise NotImplementedError


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.usefixtures("timeout")
def test_a_launcher_whose_server(kind: str) -> None:
    """Each is a missed health check, or one without a model, as soon as its time is over."""
    misbehave = SERVERS[kind][0]
    with serving(misbehave) as there:
        url = f"http://127.0.0.1:{there.port}"
        asked, probe = health.Health(url, [MODEL]), health.Probe(url, 1, 60, unasked)
        assert not asked._ask() and asked.misses == 1 and not asked.model
        assert "Error" not in asked.answer and len(asked.answer) < 330, asked.answer
        assert status.health(url).startswith(("not ready", "unhealthy", "ready"))
        probe._ask()
        assert len(probe.answer) < 300


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_and_takes_no_key(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serving(obedient) as other:
        target = f"Location: http://127.0.0.1:{other.port}/v1/models\r\n".encode()
        away = kept(document(b"", b"HTTP/1.1 %d Away\r\n" % status + target))
        for answer in (away, model_server(away)):
            with serving(answer) as there:
                url = f"http://127.0.0.1:{there.port}"
                code, out, err = call(bench.main, "-H", url, *NAMELESS)
                assert code == 1 and (f"{status}" in err or f"HTTP {status}" in out.decode())
                assert not health.Health(url, [MODEL])._ask()
        assert other.connections == 0


@pytest.mark.parametrize("where", ["question", "measured"])
def test_a_server_that_repeats_the_key_does_not_bring_it_into_the_results(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")

    def tells(request: Request) -> None:
        text = json.dumps({"error": {"message": f"no {request.fields['authorization']}"}})
        request.send(document(text.encode(), b"HTTP/1.1 401 sk-secret\r\n"))

    with serving(tells if where == "question" else model_server(tells)) as there:
        code, out, err = call(bench.main, "-H", f"http://127.0.0.1:{there.port}", *QUICK)
    assert code == 1 and "401" in err and b"sk-secret" not in out and "sk-secret" not in err
    for path in Path().rglob("*"):
        assert path.is_dir() or b"sk-secret" not in path.read_bytes(), path


# --- memory ---------------------------------------------------------------------------------------

MEGABYTE = b" " * (1 << 20)
HEAVY: dict[str, Misbehave] = {
    "sends a body for ever": flood(MEGABYTE, OK + b"\r\n"),
    "sends events of 1 MB": flood(token("x" * (1 << 20)), EVENTS),
    "sends a gzip bomb": bombs(300),
}  # fmt: skip
ASK = """import sys
from launch import health
asked, probe = health.Health(sys.argv[1], ["m"]), health.Probe(sys.argv[1], 1, 60, None)
print(asked._ask(), asked.answer, probe._ask(), probe.answer)"""


def peaks(*scripts: list[str]) -> list[tuple[int, int, str]]:
    """Of processes of their own: exit code, most memory in MB, and all that each said."""
    env, one = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}, subprocess.STDOUT
    commands = [[sys.executable, "-c", PEAK, *script] for script in scripts]
    started = [
        subprocess.Popen(c, env=env, stdout=subprocess.PIPE, stderr=one, text=True)
        for c in commands
    ]
    said = [process.communicate(timeout=2 * PATIENCE)[0].rpartition("peak ") for process in started]
    return [(p.returncode, int(s[2]) >> 10, s[0]) for p, s in zip(started, said, strict=True)]


@pytest.mark.parametrize("kind", HEAVY)
def test_memory_has_a_bound_against_a_server_that(kind: str, tmp_path: Path) -> None:
    """Two streams, of 40 tokens each at most: a few MB. Python and matplotlib take the rest."""
    (tmp_path / "asks.py").write_text(ASK)
    if "bomb" in kind:
        bomb(300)  # made before anybody's time runs
    with serving(model_server(HEAVY[kind])) as there, serving(HEAVY[kind]) as worse:
        bad, worst = (f"http://127.0.0.1:{s.port}" for s in (there, worse))
        measured, checked, watched = peaks(
            [str(ROOT / "bench.py"), "-H", bad, *QUICK, "--timeout", "2"],
            [str(ROOT / "test.py"), "-H", worst, "--timeout", "2"],
            [str(tmp_path / "asks.py"), worst],
        )
    for code, megabytes, said in (measured, checked):
        assert code == 1 and "Traceback" not in said, said
        assert megabytes < 200, said
    assert watched[1] < 80 and watched[2].startswith("False /"), watched


# --- the parsers ----------------------------------------------------------------------------------

TEXT = st.text(min_size=1, max_size=6)


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, int]:
    """A valid answer, cut into chunks anywhere, and its number of tokens."""
    texts = draw(st.lists(TEXT, min_size=1, max_size=5))
    newline = draw(st.sampled_from([b"\n", b"\r\n"]))
    events = [*map(token, texts), usage(4, len(texts)), DONE]
    body = b"".join(events).replace(b"\n", newline)
    how = draw(st.sampled_from(["chunks", "length", "close"]))
    interim = draw(st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n"]))
    if how == "length":
        return interim + document(body, EVENTS[:-2]), len(texts)
    if how == "close":
        return interim + EVENTS + body, len(texts)
    cuts = sorted(draw(st.sets(st.integers(1, len(body) - 1), max_size=6)))
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    return interim + HEAD + b"".join(map(chunk, pieces)) + LAST, len(texts)


def read(packets: list[bytes]) -> tuple[Outcome, bool]:
    """What was understood, and whether the end was seen before the connection's."""
    reply, outcome, ended = Reply(), Outcome(0, 0, 0), False
    try:
        for i, packet in enumerate(packets):
            assert not ended
            ended = reply.add(packet, i, i)
    except Malformed as e:
        outcome.error = str(e)
    return read_reply(reply, outcome, False), ended


@given(answer=answers(), data=st.data())
def test_any_split_of_a_stream_is_the_same_answer(
    answer: tuple[bytes, int], data: st.DataObject
) -> None:
    raw, count = answer
    cuts = sorted(data.draw(st.sets(st.integers(1, len(raw) - 1), max_size=12)))
    packets = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    for split in (packets, [raw], [raw[i : i + 1] for i in range(len(raw))]):
        outcome, ended = read(split)
        assert (outcome.error, outcome.output_tokens, outcome.events) == ("", count, count)
        assert outcome.model == MODEL and outcome.prompt_tokens == 4
        assert ended or EVENTS in raw


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """An answer in which bytes were changed, left out, or put in."""
    raw = bytearray(draw(answers())[0])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        end = at + draw(st.integers(0, 8))
        raw[at:end] = draw(st.binary(max_size=4) | st.sampled_from(JUNK))
    return bytes(raw)


JUNK = [b"\r\n", b"\r\n\r\n", b"-6\r\n", b"0\r\n\r\n", b"data: ", b"[" * 5000, b"9" * 5000, b"\xff"]
LINES = st.sampled_from([HEAD, EVENTS, OK, b"HTTP/1.1 100 \r\n\r\n", *JUNK])


@given(raw=damaged() | st.lists(LINES | st.binary(max_size=9), max_size=6).map(b"".join))
@example(raw=HEAD + b"-6\r\nabcd\r\n\r\n")
@example(raw=b"HTTP/1.1 100 \r\n\r\n" * 3000)
@example(raw=EVENTS + b"data: " + TOO_DEEP + b"\n\n" + DONE)
@example(raw=document(b'{"usage": 3}'))
def test_garbage_is_an_error_and_never_an_exception(raw: bytes) -> None:
    for packets in ([raw], [raw[i : i + 7] for i in range(0, len(raw), 7)]):
        reply, outcome = Reply(), Outcome(0, 0, 0)
        with suppress(Malformed):
            for packet in packets:
                if reply.add(packet, 1, 1):
                    break
        read_reply(reply, outcome, False)
        assert outcome.output_tokens is None or 0 <= outcome.output_tokens < 1 << 32
        assert isinstance(outcome.model, str) and len(outcome.error) < 1000


@given(document=JSON, key=st.sampled_from(["usage", "choices", "model", "error", "delta"]))
def test_events_of_any_shape(document: Any, key: str) -> None:
    for said in (document, {key: document}, {"choices": [{key: document}], "usage": document}):
        outcome, _ = read([HEAD + b"".join(map(chunk, [event(said), DONE])) + LAST])
        assert outcome.error or outcome.events


@given(document=JSON, key=st.sampled_from(["choices", "usage", "data", "message", "delta", "text"]))
def test_test_py_takes_answers_of_any_shape(document: Any, key: str) -> None:
    choice = {"index": 0, "finish_reason": "stop", "text": "x", key: document}
    for said in (document, {key: document}, {"choices": [choice], "usage": document}):
        for check in CHECKS.values():
            for body in (json.dumps(said).encode(), event(said) + event(said) + DONE):
                answer = smoke.Answer(200, "text/event-stream", bytearray(body), [(len(body), 1.0)])
                with suppress(smoke.Wrong):
                    assert isinstance(check.predicate(answer, {"model": "", **check.body}), dict)


@given(raw=st.binary(max_size=40) | damaged())
def test_test_py_takes_any_bytes(raw: bytes) -> None:
    for check in CHECKS.values():
        answer = smoke.Answer(200, "text/event-stream", bytearray(raw), [(len(raw), 1.0)])
        with suppress(smoke.Wrong):
            check.predicate(answer, {"model": "", **check.body})


def test_a_good_server_is_asked_in_one_go() -> None:
    """The same reader takes what is sound: chunks, lengths, and the end of the connection."""
    for raw in (stream(2), document(b"{}"), OK + b"\r\n{}"):
        with serving(once(raw)) as there:
            answer = ask(f"http://127.0.0.1:{there.port}/x?", 2, key="k")
        assert answer.status == 200 and answer.body in (
            b"{}",
            b"".join([WORD, WORD, usage(4, 2), DONE]),
        )
        assert there.requests[0].fields["authorization"] == "Bearer k"
    assert os.environ.get("http_proxy") is None
