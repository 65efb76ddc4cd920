"""The load generator against servers of every nastiness, on the loopback."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import signal
import socket
import ssl
import statistics
import threading
import time
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import pytest

from common.response import BROKEN_OFF, NO_ANSWER
from common.signals import obey
from load import connection, loop
from load.answer import Outcome
from load.loadgen import measure, merged, shards_for
from load.loop import arrivals
from load.target import CutShort, Load, LoadError, Result, Target
from tests.conftest import PATIENCE
from tests.loopback import (
    DONE,
    HEAD,
    LAST,
    Answer,
    Request,
    Server,
    chunk,
    event,
    obedient,
    serving,
    stream,
    token,
    usage,
)

MS = 1_000_000


@dataclass(frozen=True)
class Body:
    """Asks for three tokens; picklable, for shards."""

    size: int = 4

    def __call__(self, index: int) -> bytes:
        return json.dumps({"prompt": [index] * self.size, "max_tokens": 3}).encode()


def load_on(
    server: Server, count: int = 1, streams: int | None = 1, body: Body = Body(), **more: object
) -> Result:
    load = Load(Target("127.0.0.1", server.port), "/v1/completions", body, count, streams)
    return measure(replace(load, **more))  # type: ignore[arg-type]


def put(server_does: Answer, count: int = 1, **more: object) -> list[Outcome]:
    with serving(server_does) as server:
        return load_on(server, count, **more).outcomes  # type: ignore[arg-type]


def answer_with(*pieces: bytes, pause: float = 0.0) -> Answer:
    return lambda request: request.send(*pieces, pause=pause)


def usual(request: Request) -> None:
    request.send(stream())


# --- what is measured -----------------------------------------------------------------------------


def test_times_of_a_stream() -> None:
    sent: list[int] = []

    def slow(request: Request) -> None:
        time.sleep(0.05)
        for piece in (HEAD + chunk(token()), chunk(token()), chunk(token())):
            sent.append(time.time_ns())
            request.send(piece, pause=0.02)
        request.send(chunk(usage(4, 3)) + chunk(DONE) + LAST)

    (out,) = put(slow)
    assert not out.error
    assert (out.first - out.sent) / MS >= 50
    arrived = accumulate(out.gaps, initial=out.first / MS)
    # A machine that stands still between the server's look at the clock and its sending is rare.
    assert statistics.median(a - s / MS for a, s in zip(arrived, sent, strict=True)) < 10
    assert (out.output_tokens, out.events) == (3, 3)


def test_the_clients_own_delay_is_not_the_servers() -> None:
    """It looks up four times a second, and oversleeps as the tokens come: the kernel does not."""

    sent: list[int] = []

    def answer(request: Request) -> None:
        time.sleep(0.3)
        request.send(stream())
        sent.append(time.time_ns())

    def oversleep(*_: int) -> None:
        if server.requests:
            time.sleep(0.2)

    with serving(answer) as server:
        load = Load(Target("127.0.0.1", server.port), "/v1/completions", Body(), 1, 1)
        result = measure(load, oversleep)
    (out,) = result.outcomes
    assert (out.first - out.sent) / MS >= 300
    assert (out.first - sent[0]) / MS < max(result.lags) / 10 / 2  # what it says of its lateness
    assert max(result.lags) / 10 > 100


def test_without_stamps_from_the_kernel_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "RX_SOFTWARE", 0)
    with serving(lambda r: obedient(r, 0.03)) as server:
        result = load_on(server, 2)
    assert not result.kernel_stamps
    assert all(30 <= (o.first - o.sent) / MS <= (o.last - o.sent) / MS for o in result.outcomes)


def test_a_closed_loop_keeps_its_number_of_streams() -> None:
    together = threading.Barrier(4)

    def answer(request: Request) -> None:
        if request.number <= 4:
            together.wait(PATIENCE)
        obedient(request, 0.01)

    with serving(answer) as server:
        result = load_on(server, 20, 4)
    assert server.most_in_flight == 4
    assert server.connections == 4
    assert sorted(o.index for o in result.outcomes) == list(range(20))


def test_connections_are_open_before_the_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    real = connection.Stream.open

    def slow(stream: connection.Stream) -> None:
        time.sleep(0.25)
        real(stream)

    monkeypatch.setattr(connection.Stream, "open", slow)
    with serving(usual) as server:
        result = load_on(server, 8, 8)
    assert server.connections == 8
    late = [(o.sent - o.intended) / MS for o in result.outcomes]
    assert max(late) < 1000  # it took twice that to open them


def test_it_leaves_the_process_as_it_was() -> None:
    before = os.sched_getscheduler(0)
    seen: list[bool] = []

    def answer(request: Request) -> None:
        seen.append(gc.isenabled())
        usual(request)

    with serving(answer) as server:
        load_on(server)
    assert (seen, gc.isenabled()) == ([False], True)
    assert os.sched_getscheduler(0) == before


def test_a_library_that_cannot_tell_its_scheduling(monkeypatch: pytest.MonkeyPatch) -> None:
    """As musl's: its functions are there, and answer that they are not."""

    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    for name in ("sched_getscheduler", "sched_getparam", "sched_setscheduler"):
        monkeypatch.setattr(os, name, missing)
    with serving(usual) as server:
        assert not load_on(server).outcomes[0].error


# --- bodies and connections -----------------------------------------------------------------------


def test_a_body_that_ends_with_its_connection() -> None:
    def answer(request: Request) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
        request.send(head + token() + usage(1, 1) + DONE)
        request.socket.shutdown(socket.SHUT_RDWR)

    assert [(o.error, o.output_tokens) for o in put(answer, 2)] == [("", 1)] * 2


def test_a_server_that_says_it_closes_is_connected_to_again() -> None:
    def answer(request: Request) -> None:
        request.send(
            HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + stream()[len(HEAD) :]
        )
        request.socket.shutdown(socket.SHUT_RDWR)

    with serving(answer) as server:
        outcomes = load_on(server, 3).outcomes
    assert [(o.error, o.retried) for o in outcomes] == [("", False)] * 3
    assert server.connections == 3


@pytest.mark.parametrize(
    ("count", "streams", "rate"), [(4, 2, math.inf), (4, None, 1000.0), (8, None, 50.0)]
)
def test_idle_connections_leave_a_servers_workers_to_the_others(
    count: int, streams: int | None, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with one worker, which stays with a connection until that is closed."""
    monkeypatch.setattr(loop, "PREOPENED", 1)
    with serving(lambda r: obedient(r, 0.03)) as server:
        server.workers = threading.Semaphore(1)
        result = load_on(server, count, streams, rate=rate, timeout=PATIENCE)
    assert [o.error for o in result.outcomes] == [""] * count


@pytest.fixture
def closes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes its time to close a connection; it was closed before, all the same."""
    monkeypatch.setattr(connection, "RETRY_WITHIN", 1000 * PATIENCE * MS)


@pytest.mark.usefixtures("closes_late")
def test_a_keep_alive_closed_under_a_request_costs_the_server_nothing() -> None:
    def answer(request: Request) -> None:
        if request.on_connection == 2:  # the request had been on its way when the server closed
            closed.append(time.time_ns())
            request.socket.shutdown(socket.SHUT_RDWR)
        else:
            time.sleep(0.02)
            request.send(stream())

    closed: list[int] = []
    outcomes = put(answer, 3)
    assert [(o.error, o.output_tokens) for o in outcomes] == [("", 3)] * 3
    assert [o.retried for o in outcomes] == [False, True, True]
    assert all(o.sent > at for o, at in zip(outcomes[1:], closed, strict=True))


def test_a_server_far_away_closes_later() -> None:
    """The farther it is, the longer it takes until we hear that it had closed."""
    stream = connection.Stream(None)  # type: ignore[arg-type]
    stream.served, sent = 1, Outcome(0, 0, 0)
    assert stream.may_retry(sent, 99 * MS) and not stream.may_retry(sent, 300 * MS)
    stream.took = 150 * MS
    assert stream.may_retry(sent, 300 * MS) and not stream.may_retry(sent, 500 * MS)


def test_a_fresh_connection_that_breaks_is_not_tried_again() -> None:
    outcomes = put(lambda r: r.socket.shutdown(socket.SHUT_RDWR), 2)
    assert [(o.error, o.retried) for o in outcomes] == [(NO_ANSWER, False)] * 2


def test_a_request_larger_than_the_socket_takes() -> None:
    (out,) = put(lambda r: obedient(r, 0), body=Body(2_000_000))
    assert (out.error, out.prompt_tokens) == ("", 2_000_000)


def test_an_answer_may_come_before_the_request_is_read() -> None:
    """As a server's that refuses a long prompt by its header."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
                done.wait(PATIENCE)

        done = threading.Event()
        threading.Thread(target=refuse, daemon=True).start()
        target = Target("127.0.0.1", listener.getsockname()[1])
        (out,) = measure(Load(target, "/", Body(3_000_000), 1, timeout=PATIENCE)).outcomes
        done.set()
    assert out.error == "HTTP 413: (empty body)"


def test_of_a_names_addresses_the_one_that_answers_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(usual) as server:
        refusing, right = ((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
                           for port in (1, server.port))  # fmt: skip
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [refusing, right])
        (out,) = measure(Load(Target("localhost", server.port), "/", Body(), 1)).outcomes
    assert not out.error


# --- failures -------------------------------------------------------------------------------------


def test_one_failure_leaves_the_others() -> None:
    def answer(request: Request) -> None:
        if request.number == 2:
            request.document({"object": "error", "message": "no room"}, "400 Bad Request")
        else:
            request.send(stream())

    outcomes = put(answer, 4)
    assert [o.error for o in outcomes] == ["", "HTTP 400: no room", "", ""]


def test_an_error_in_the_stream() -> None:
    (out,) = put(answer_with(HEAD + chunk(token()) + chunk(event({"error": "engine died"})) + LAST))
    assert "engine died" in out.error


def test_a_stream_that_breaks_off() -> None:
    def answer(request: Request) -> None:
        request.send(HEAD + chunk(token()))
        request.socket.shutdown(socket.SHUT_RDWR)

    assert [o.error for o in put(answer, 2)] == [BROKEN_OFF] * 2


def test_a_connection_reset_in_the_stream() -> None:
    def answer(request: Request) -> None:
        request.send(HEAD + chunk(token()))
        time.sleep(0.02)
        request.reset()

    (out,) = put(answer)
    assert "reset" in out.error or out.error == BROKEN_OFF


def test_what_is_not_http() -> None:
    (out,) = put(answer_with(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"))
    assert "not an HTTP response" in out.error


def test_a_request_that_takes_too_long_fails_and_the_rest_goes_on() -> None:
    def answer(request: Request) -> None:
        if request.number == 1:
            over.wait(PATIENCE)
        request.send(stream())

    over = threading.Event()
    outcomes = put(answer, 3, timeout=1.5)
    over.set()
    assert [bool(o.error) for o in outcomes] == [True, False, False]
    assert "within 1.5 s" in outcomes[0].error


@pytest.mark.usefixtures("closes_late")
def test_a_server_that_is_gone_between_two_requests() -> None:
    def answer(request: Request) -> None:
        server.listener.shutdown(socket.SHUT_RDWR)
        request.send(stream())
        request.socket.shutdown(socket.SHUT_RDWR)

    with serving(answer) as server:
        first, second = load_on(server, 2).outcomes
    assert (first.error, first.output_tokens) == ("", 3)
    assert ("refused" in second.error, second.output_tokens) == (True, None)


def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(LoadError, match="refused"):
        measure(Load(Target("127.0.0.1", port), "/", Body(), 1))


def test_no_such_host() -> None:
    with pytest.raises(LoadError, match="resolve"):
        measure(Load(Target("no-such-host.invalid", 1), "/", Body(), 1))


# --- open loop ------------------------------------------------------------------------------------


def open_load(count: int, rate: float, **more: float) -> Load:
    return Load(Target("127.0.0.1", 1), "/", Body(), count, rate=rate, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (4.0, 0.5), (0.25, 2.0)])
def test_arrivals_are_gamma_distributed(burstiness: float, variation: float) -> None:
    due = list(arrivals(open_load(20_000, 100, burstiness=burstiness), 0, 1, 0))
    gaps = [(b - a) / 1e9 for a, b in pairwise(due)]
    middle = statistics.fmean(gaps)
    assert middle == pytest.approx(0.01, rel=0.06)
    assert statistics.stdev(gaps) / middle == pytest.approx(variation, rel=0.06)


def test_shards_share_one_schedule() -> None:
    load = open_load(10, 50)
    whole = list(arrivals(load, 0, 1, 7))
    assert (
        sorted([*arrivals(load, 0, 3, 7), *arrivals(load, 1, 3, 7), *arrivals(load, 2, 3, 7)])
        == whole
    )
    assert whole[0] == 7


def test_an_open_loop_sends_at_its_own_times() -> None:
    with serving(lambda r: obedient(r, 1.0)) as server:
        result = load_on(server, 30, None, rate=200.0)
    late = [(o.sent - o.intended) / MS for o in result.outcomes]
    assert not any(o.error for o in result.outcomes)
    assert server.most_in_flight > 15  # it did not wait for answers
    assert statistics.median(late) < 1000  # nor for a single one: 30 would take 30 s


def test_at_its_limit_of_streams_an_open_loop_is_late_and_says_so() -> None:
    with serving(lambda r: obedient(r, 0.05)) as server:
        result = load_on(server, 6, 1, rate=1000.0)
    assert server.most_in_flight == 1
    last = max(result.outcomes, key=lambda o: o.index)
    assert (last.sent - last.intended) / MS > 150


@pytest.mark.usefixtures("closes_late")
def test_an_open_loop_outlives_idle_connections_that_close() -> None:
    def answer(request: Request) -> None:
        request.send(stream())
        request.socket.shutdown(socket.SHUT_RDWR)

    with serving(answer) as server:
        result = load_on(server, 20, None, rate=100.0)
    assert [o.error for o in result.outcomes] == [""] * 20


# --- processes, TLS -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("streams", "cores", "asked", "shards"),
    [(1, 16, 0, 1), (256, 16, 0, 1), (257, 16, 0, 2), (1024, 16, 0, 4), (1024, 2, 0, 1),
     (4096, 16, 0, 8), (2048, 2, 0, 2), (1024, 1, 0, 1), (4, 16, 8, 4), (1024, 2, 3, 3)],
)  # fmt: skip
def test_a_process_has_so_many_streams(streams: int, cores: int, asked: int, shards: int) -> None:
    load = Load(Target("h", 1), "/", Body(), 10_000, streams, shards=asked)
    assert shards_for(load, cores) == shards


def test_shards_add_up() -> None:
    with serving(lambda r: obedient(r, 0.01)) as server:
        result = load_on(server, 10, 4, shards=2)
    assert result.shards == 2
    assert [o.index for o in result.outcomes] == list(range(10))
    assert not any(o.error for o in result.outcomes)
    assert server.connections == 4


def test_one_shard_without_kernel_stamps_is_told() -> None:
    assert not merged([Result([]), Result([], kernel_stamps=False)]).kernel_stamps


def test_a_shard_that_cannot_connect_is_an_error_here() -> None:
    with pytest.raises(LoadError, match="refused"):
        measure(Load(Target("127.0.0.1", 1), "/", Body(), 2, 2, shards=2))


def test_https_works_and_says_whose_times_it_has(certificate: ssl.SSLContext) -> None:
    with serving(lambda r: obedient(r, 0.03), certificate) as server:
        target = Target("127.0.0.1", server.port, tls=True, verify=False)
        result = measure(Load(target, "/v1/completions", Body(), 4, 2))
    assert [o.error for o in result.outcomes] == [""] * 4
    assert not result.kernel_stamps
    assert all(30 <= (o.first - o.sent) / MS <= (o.last - o.sent) / MS for o in result.outcomes)


def test_an_untrusted_certificate_is_refused(certificate: ssl.SSLContext) -> None:
    with serving(usual, certificate) as server, pytest.raises(LoadError, match="TLS"):
        measure(Load(Target("127.0.0.1", server.port, tls=True), "/", Body(), 1))


def test_the_key_is_sent_and_no_more_than_needed() -> None:
    with serving(usual) as server:
        target = Target("127.0.0.1", server.port, api_key="secret")
        measure(Load(target, "/v1/completions", Body(), 1))
    fields = server.requests[0].fields
    assert fields["authorization"] == "Bearer secret"
    assert set(fields) == {"host", "user-agent", "authorization", "accept", "accept-encoding",
                           "content-type", "content-length"}  # fmt: skip


@pytest.mark.parametrize(("streams", "shards"), [(1, 1), (3, 1), (4, 2)])
def test_a_server_that_hangs_is_given_up(streams: int, shards: int) -> None:
    with serving(lambda _: time.sleep(PATIENCE)) as server:
        result = load_on(server, 40, streams, timeout=0.2, shards=shards)
    assert result.cut.startswith("the server hangs")
    assert len(result.outcomes) < 40


def six_then_nothing(request: Request) -> None:
    if request.number > 6:
        time.sleep(PATIENCE)
    request.send(stream())


@pytest.mark.parametrize("shards", [1, 2])
def test_what_was_measured_before_the_server_hung_is_kept(shards: int) -> None:
    with serving(six_then_nothing) as server:
        result = load_on(server, 40, streams=4, timeout=2, shards=shards)
    assert sum(not o.error for o in result.outcomes) == 6
    assert result.cut.startswith("the server hangs")


@pytest.mark.parametrize("shards", [1, 2])
def test_what_was_measured_before_a_signal_is_kept(shards: int, same_signals: None) -> None:
    def answer(request: Request) -> None:
        if request.number == 6 + 4:  # each stream has its answers, and waits
            os.kill(os.getpid(), signal.SIGTERM)
        six_then_nothing(request)

    obey()
    with serving(answer) as server, pytest.raises(CutShort) as cut:
        load_on(server, 40, streams=4, shards=shards)
    assert cut.value.args == (signal.SIGTERM,)
    assert len(cut.value.result.outcomes) == 6
    assert cut.value.result.cut == "stopped by SIGTERM"


def test_a_run_whose_last_requests_take_too_long_has_results() -> None:
    def answer(request: Request) -> None:
        if request.number > 2:
            over.wait(PATIENCE)
        request.send(stream())

    over = threading.Event()
    outcomes = put(answer, 4, streams=2, timeout=1.5)
    over.set()
    assert [bool(o.error) for o in outcomes] == [False] * 2 + [True] * 2


@pytest.mark.parametrize("hours", [1, -1])
def test_a_clock_that_is_set_ends_the_run_and_is_not_the_servers_fault(
    monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """Ahead, every request seems to be too late; back, the next is not due for an hour."""
    true, step = time.time_ns, [0]
    monkeypatch.setattr(time, "time_ns", lambda: true() + step[0])

    def answer(request: Request) -> None:
        if request.number == 3:
            step[0] = hours * 3600 * 1000 * MS
        request.send(stream())

    with serving(answer) as server:
        result = load_on(server, 9, streams=None, rate=20.0)
    assert result.cut.startswith(f"the clock was set by {hours * 3600:,} s") and result.outcomes
