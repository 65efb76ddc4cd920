"""Is the server well: what the two threads make of its answers."""

from __future__ import annotations

import http.server
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from launch import busy, health
from launch.node.clients import WatchClients
from launch.order import Command
from tests.conftest import PATIENCE, wait_until


class Engine(http.server.BaseHTTPRequestHandler):
    replies: dict[str, tuple[int, bytes]] = {}  # noqa: RUF012

    key = ""  # which /v1 asks for

    def do_GET(self) -> None:
        code, body = self.replies[self.path]
        if self.path.startswith("/v1") and self.key:
            known = self.headers["Authorization"] == f"Bearer {self.key}"
            code, body = (code, body) if known else (401, b'{"error": "Unauthorized"}')
        self.send_response(code)
        if code == 302:
            self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    engine = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    thread = threading.Thread(target=engine.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{engine.server_port}"
    engine.shutdown()
    engine.server_close()
    thread.join()


GOOD_MODELS = b'{"data": [{"id": "org/m"}]}'


@pytest.mark.parametrize(
    ("healthy", "models", "good", "answer"),
    [
        ((200, b""), (200, GOOD_MODELS), True, "/health answered 200"),
        ((200, b"x" * 100_000), (200, GOOD_MODELS), True, "/health answered 200"),
        ((503, b""), (200, GOOD_MODELS), False, "/health answered 503"),
        ((302, b""), (200, GOOD_MODELS), False, "/health answered 302"),
        ((404, b""), (200, GOOD_MODELS), False, "/health answered 404"),
        ((200, b""), (404, b"<html>"), False, "/v1/models gave no list of models"),
        ((200, b""), (200, b"{}"), False, "/v1/models gave no list of models"),
        ((200, b""), (200, b'{"data": []}'), False, "/v1/models gave no list of models"),
        ((200, b""), (200, b"[1]"), False, "/v1/models gave no list of models"),
        ((200, b""), (200, b'{"data": null}'), False, "/v1/models gave no list of models"),
    ],
)
def test_ready_means_healthy_and_a_known_model(
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    healthy: tuple[int, bytes],
    models: tuple[int, bytes],
    good: bool,
    answer: str,
) -> None:
    Engine.replies = {"/health": healthy, "/v1/models": models}
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    asked = health.Health(url, ["org/m"])
    asked.start()
    wait_until(lambda: asked.ready.is_set() or asked.misses)
    asked.end()
    asked.join()
    assert asked.ready.is_set() is good
    assert asked.answer.startswith(answer)
    assert (asked.model, asked.misses > 0) == ("org/m" if good else "", not good)


def test_no_answer_is_told_as_that() -> None:
    asked = health.Health("http://127.0.0.1:1", ["m"])
    asked.start()
    wait_until(lambda: asked.misses)
    asked.end()
    asked.join()
    assert asked.answer == "/health did not answer (Connection refused)" and not asked.reached


def test_misses_count_in_a_row(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "HEALTH_EVERY", 0.01)
    Engine.replies = {"/health": (200, b""), "/v1/models": (200, GOOD_MODELS)}
    asked = health.Health(url, ["org/m"])
    asked.start()
    wait_until(asked.ready.is_set)
    Engine.replies["/health"] = (503, b"")
    wait_until(lambda: asked.misses > 2)
    Engine.replies["/health"] = (200, b"")
    wait_until(lambda: asked.misses == 0)
    asked.end()
    asked.join()


# Is it ours


@pytest.fixture
def healthy(url: str) -> Iterator[health.Health]:
    Engine.replies = {"/health": (200, b""), "/v1/models": (200, GOOD_MODELS)}
    asked = health.Health(url, ["my/model", "model"])
    yield asked
    asked.end()
    asked.join()


def test_a_server_with_another_model_is_not_ours(healthy: health.Health) -> None:
    healthy.start()
    wait_until(healthy.is_stranger)
    assert (healthy.stranger, healthy.model, healthy.ready.is_set()) == ("org/m", "", False)


def test_a_server_whose_log_says_that_it_listens_is_ours_by_whatever_name(
    healthy: health.Health,
) -> None:
    healthy.listening = True
    healthy.start()
    wait_until(healthy.ready.is_set)
    assert healthy.model == "org/m" and not healthy.is_stranger()


def test_one_of_several_names_is_enough(healthy: health.Health) -> None:
    Engine.replies["/v1/models"] = (200, b'{"data": [{"id": "adapter"}, {"id": "my/model"}]}')
    healthy.start()
    wait_until(healthy.ready.is_set)
    assert healthy.model == "my/model"


@pytest.mark.parametrize(
    ("sent", "listening", "ready", "model"),
    [
        ("sk-1", False, True, "model"),
        ("", True, True, "my/model"),  # ours: what it serves was said when it was started
        ("", False, False, ""),
    ],
)
def test_a_server_with_a_key_is_ready_for_who_has_it_and_where_it_is_ours(
    healthy: health.Health,
    monkeypatch: pytest.MonkeyPatch,
    sent: str,
    listening: bool,
    ready: bool,
    model: str,
) -> None:
    monkeypatch.setattr(Engine, "key", "sk-1")
    Engine.replies["/v1/models"] = (200, b'{"data": [{"id": "model"}]}')
    healthy.key, healthy.listening = sent, listening
    healthy.start()
    wait_until(lambda: healthy.ready.is_set() or healthy.misses)
    assert (healthy.ready.is_set(), healthy.model, healthy.reached) == (ready, model, True)


# The probe


class Prober:
    """A probe against a server of ours: what that was asked, and what it answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[tuple[str, dict[str, object]]] = []
        self.keys: set[str | None] = set()
        self.status, self.delay = 200, threading.Event()
        self.delay.set()
        self.busy = False  # the log shows answers to others, too
        self.metrics: Callable[[], str] = str  # what /metrics says
        self.read = 0  # how often that was asked
        prober = self

        class Server(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = prober.metrics().encode() if self.path == "/metrics" else b""
                self.send_response(200 if body else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                prober.read += self.path == "/metrics"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                prober.requests.append((self.path, json.loads(body)))
                prober.keys.add(self.headers["Authorization"])
                prober.delay.wait(PATIENCE)
                if prober.busy:
                    prober.probe.traffic = time.monotonic()
                self.send_response(prober.status)
                self.send_header("Content-Length", "5")
                self.end_headers()
                self.wfile.write(b"words")

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        monkeypatch.setattr(health, "PROBE_PATIENCE", 0.3)
        self.port = self.server.server_port
        self.monkeypatch = monkeypatch
        self.probe = health.Probe(f"http://127.0.0.1:{self.port}", 0.02, 0.3, self.ask)

    def ask(self, every: float) -> Command:
        """What tells who is connected; nobody can, unless a test says so."""
        return Command(["false"], WatchClients(0, every))

    def watched(self, timeout: float) -> None:
        """Who is connected is told; and what is not idle has half an hour."""
        self.probe.timeout, self.probe.order = timeout, self.watch
        self.patient()

    def patient(self) -> None:
        """However slow the machine is, no answer is taken for a missing one."""
        self.monkeypatch.setattr(health, "PROBE_PATIENCE", 1800.0)

    def watch(self, every: float) -> Command:
        return Command([], WatchClients(self.port, every))

    def until_asked(self, times: int) -> None:
        wait_until(lambda: len(self.requests) >= times)

    def close(self) -> None:
        self.probe.end()
        self.delay.set()
        if self.probe.ident:
            self.probe.join(PATIENCE)
            assert not self.probe.is_alive()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def prober(monkeypatch: pytest.MonkeyPatch) -> Iterator[Prober]:
    prober = Prober(monkeypatch)
    yield prober
    prober.close()


def test_the_probe_asks_for_one_token_and_nothing_unusual(prober: Prober) -> None:
    prober.probe.key = "sk-1"
    prober.patient()
    prober.probe.begin("org/m")
    prober.until_asked(3)
    assert prober.probe.fault() == ""
    path, body = prober.requests[0]
    assert path == "/v1/completions"
    assert body == {"model": "org/m", "prompt": "Hello", "max_tokens": 1, "temperature": 0}
    assert prober.keys == {"Bearer sk-1"}


def test_without_seconds_nothing_is_asked(prober: Prober) -> None:
    prober.probe.every = 0
    prober.probe.begin("org/m")
    assert prober.probe.ident is None and prober.probe.fault() == ""


@pytest.mark.parametrize("every", [math.inf, 1e300])
def test_the_first_one_is_made_at_once_and_seldom_is_not_again(
    prober: Prober, every: float
) -> None:
    prober.probe.every = every
    prober.probe.begin("org/m")
    prober.until_asked(1)
    time.sleep(0.05)
    assert prober.probe.is_alive() and len(prober.requests) == 1


def test_an_engine_that_answers_nobody_is_found(
    prober: Prober, monkeypatch: pytest.MonkeyPatch
) -> None:
    prober.delay.clear()
    with monkeypatch.context() as patient:
        patient.setattr(health, "PROBE_PATIENCE", 100)
        prober.probe.begin("org/m")
        prober.until_asked(1)
        assert prober.probe.fault() == ""
    wait_until(prober.probe.fault)
    words = r"for \d+ s no request was answered, not even one for one token"
    assert re.fullmatch(words, prober.probe.fault())
    assert len(prober.requests) == 1  # it keeps its place where it queues


# Idle or busy


IDLE = r"it is idle, and in \d+ s has not generated the one token that it was asked for"


def test_an_idle_engine_that_does_not_answer_is_found_soon(prober: Prober) -> None:
    prober.watched(0.5)
    prober.delay.clear()
    prober.probe.begin("org/m")
    wait_until(prober.probe.fault)
    assert re.fullmatch(IDLE, prober.probe.fault())
    assert len(prober.requests) == 1
    prober.delay.set()  # it has answered after all
    wait_until(lambda: not prober.probe.fault())


def test_who_waits_before_us_makes_it_busy_and_who_comes_later_does_not(prober: Prober) -> None:
    prober.watched(0.3)
    prober.delay.clear()
    with socket.create_connection(("127.0.0.1", prober.port)):
        prober.probe.begin("org/m")
        wait_until(lambda: prober.read >= 15)  # looks, of which 6 are a timeout
        assert prober.probe.fault() == ""
    wait_until(lambda: prober.probe.busy and prober.probe.busy.alone < math.inf)
    with socket.create_connection(("127.0.0.1", prober.port)):
        wait_until(prober.probe.fault)


COUNTERS = """# HELP vllm:generation_tokens_total Number of generation tokens processed.
vllm:generation_tokens_total{{model_name="m"}} {made}
vllm:num_requests_running{{model_name="m"}} {level}
http_requests_total{{handler="/metrics"}} {level}
process_cpu_seconds_total {level}
"""
CALL_FOR_CALL = {
    "tokens are made": (COUNTERS, True),
    "iterations are done": ('[{{"numActiveRequests": {made}}}]', True),
    "nothing but levels and the page's own counters move": (
        COUNTERS.replace("{made}", "7"),
        False,
    ),
    "no iteration is done": ("[]", False),
    "it has no counters": ("{{}}", False),
}


@pytest.mark.parametrize("what", CALL_FOR_CALL)
def test_by_its_counters_the_engine_is_at_work_when(prober: Prober, what: str) -> None:
    page, works = CALL_FOR_CALL[what]
    prober.metrics = lambda: page.format(made=prober.read, level=prober.read)
    prober.watched(0.3)
    prober.delay.clear()
    prober.probe.begin("org/m")
    wait_until(lambda: prober.read >= 4)
    assert prober.probe.busy
    if works:
        wait_until(lambda: prober.probe.busy and prober.probe.busy.progress)
        prober.probe.timeout = 100
        assert prober.probe.fault() == ""
        prober.probe.timeout = 0.3
        prober.metrics = lambda: page.format(made=7, level=7) if page[0] == "#" else "[]"
    wait_until(prober.probe.fault)
    assert bool(prober.probe.busy.progress) is works


def test_progress_of_any_kind_starts_the_clock_anew(prober: Prober) -> None:
    prober.watched(60)
    probe, now = prober.probe, time.monotonic()
    prober.monkeypatch.setattr(time, "monotonic", lambda: now)
    probe.timeout, probe.asked, probe.looked = 60, now - 1000, now
    probe.busy = busy.Busy(probe.url, prober.ask, 60)
    probe.busy.alone = now - 900
    # Not zero: the machine may be just up.
    probe.back = probe.traffic = probe.busy.progress = now - 1000
    assert probe.fault().startswith("it is idle, and in 900 s")
    for who, what in (probe, "traffic"), (probe.busy, "progress"), (probe.busy, "alone"):
        setattr(who, what, now - 50)
        assert probe.fault() == ""
        setattr(who, what, now - 900)


def test_a_node_that_cannot_tell_who_waits_leaves_the_server_in_peace(
    prober: Prober, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(busy, "PAUSE", 0.01)
    prober.watched(0.05)
    orders: list[float] = []

    def ask(every: float) -> Command:
        orders.append(every)
        return Command(["false"], WatchClients(0, every))

    prober.probe.order = ask
    prober.delay.clear()
    prober.probe.begin("org/m")
    prober.until_asked(1)
    time.sleep(0.5)
    assert orders and prober.probe.fault() == ""


def test_the_time_for_which_we_stood_still_does_not_count(
    prober: Prober, monkeypatch: pytest.MonkeyPatch
) -> None:
    prober.watched(100)
    prober.delay.clear()
    prober.probe.begin("org/m")
    wait_until(lambda: prober.probe.busy and prober.probe.busy.alone < math.inf)
    assert prober.probe.fault() == ""
    later = time.monotonic() + 1000  # as after ^Z and `fg`
    with monkeypatch.context() as asleep:
        asleep.setattr(time, "monotonic", lambda: later)
        assert prober.probe.fault() == ""


def test_an_engine_that_answers_others_is_busy(prober: Prober) -> None:
    prober.delay.clear()
    prober.probe.begin("org/m")
    prober.until_asked(1)
    prober.probe.traffic = time.monotonic() + 100
    time.sleep(3 * health.PROBE_PATIENCE)
    assert prober.probe.fault() == ""
    prober.probe.traffic = 0  # and when it answers them no more, it is not
    wait_until(prober.probe.fault)
    prober.delay.set()
    wait_until(lambda: not prober.probe.fault())


def test_errors_count_in_a_row(prober: Prober) -> None:
    prober.patient()
    prober.probe.begin("org/m")
    prober.until_asked(2)
    prober.status = 400
    wait_until(prober.probe.fault)
    words = "3 requests for one token in a row failed, the last: 400 words"
    assert prober.probe.fault() == words
    prober.status = 200
    wait_until(lambda: not prober.probe.fault())


def test_errors_do_not_count_while_others_are_answered(prober: Prober) -> None:
    prober.status, prober.busy = 500, True
    prober.probe.begin("org/m")
    prober.until_asked(8)
    assert prober.probe.misses == 0
    prober.busy = False
    wait_until(prober.probe.fault)


def test_a_server_that_answers_others_is_left_in_peace(prober: Prober) -> None:
    """A request of ours would be one more in the figures of whoever measures it."""
    prober.probe.traffic = time.monotonic() + 100
    prober.probe.begin("org/m")
    prober.until_asked(1)  # the first is not held back
    time.sleep(0.3)
    assert len(prober.requests) == 1 and prober.probe.fault() == ""
    prober.probe.end()


def test_a_server_that_refuses_the_first_one_is_not_asked_again(
    prober: Prober, capfd: pytest.CaptureFixture[str]
) -> None:
    prober.status = 404
    prober.probe.begin("org/m")
    prober.probe.join(PATIENCE)
    assert len(prober.requests) == 1 and prober.probe.fault() == ""
    assert "refuses the one-token probe (404 words); probing is off" in capfd.readouterr().err


def test_a_server_that_cuts_connections_has_failed(prober: Prober) -> None:
    prober.probe.url = "http://127.0.0.1:1"
    prober.patient()
    prober.probe.begin("org/m")
    wait_until(prober.probe.fault)
    assert prober.probe.fault().endswith("the last: no answer (Connection refused)")
