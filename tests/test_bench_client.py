"""The yardstick itself: what the timetable server says it sent is what the client saw."""

from __future__ import annotations

import os
import re
import shutil
import time
from contextlib import nullcontext
from itertools import accumulate

import pytest

from common.response import Reply
from load import loop
from load.answer import Outcome, read_reply
from load.loop import Loop
from load.metrics import Distribution
from tests import bench_client
from tests.conftest import wait_until


@pytest.fixture(autouse=True)
def compiler() -> None:
    if not shutil.which("cc"):
        assert not os.environ.get("CI"), "a C compiler is needed in CI"
        pytest.skip("no C compiler is installed")


STREAMS = 64


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[float]]:
    """When the server sent each token, in ms, by request; from the answers' own bytes."""
    found: dict[int, list[float]] = {}

    def read(reply: Reply, outcome: Outcome, chat: bool) -> Outcome:
        found[outcome.index] = [int(ns) / 1e6 for ns in re.findall(rb'"sent":(\d+)', reply.raw)]
        return read_reply(reply, outcome, chat)

    monkeypatch.setattr(loop, "read_reply", read)
    return found


def arrived(outcome: Outcome) -> list[float]:
    """When the client says that each token came, in ms."""
    return list(accumulate(outcome.gaps, initial=outcome.first / 1e6))


def test_what_was_sent_when_is_what_the_client_saw(
    monkeypatch: pytest.MonkeyPatch, sent: dict[int, list[float]]
) -> None:
    """Of many streams, by a client that looks up every 5 ms only: its own delay must not count."""
    poll = Loop.poll

    def oversleep(loop: Loop) -> list[tuple[int, int]]:
        time.sleep(0.005)
        return poll(loop)

    monkeypatch.setattr(Loop, "poll", oversleep)

    def middle_error() -> float:
        with bench_client.server() as (port, _):
            count = 2 * STREAMS
            _, truth, result = bench_client.run(port, STREAMS, count, ttft=50, itl=10)
        counts = truth["requests"], truth["ttft_ms"]["count"], truth["itl_ms"]["count"]
        assert counts == (count, count, count * 127)
        said = {(o.output_tokens, o.prompt_tokens, o.events) for o in result.outcomes}
        assert said == {(128, 16, 128)}
        return Distribution(
            abs(there - here)
            for o in result.outcomes
            for there, here in zip(arrived(o), sent[o.index], strict=True)
        ).percentile(50)

    # On a busy machine some packets meet in one read, and have one time; most do not. If they do,
    # it was too busy for a moment.
    assert any(middle_error() < 0.5 for _ in range(5))


def test_a_request_counts_from_its_own_sending() -> None:
    """The quickest of many met a server that was ready for it, however busy the machine is."""

    def quickest(port: int) -> float:
        _, _, result = bench_client.run(port, 1, 100, ttft=5, itl=0)
        return min((o.first - o.sent) / 1e6 for o in result.outcomes)

    with bench_client.server() as (port, _):
        wait_until(lambda: quickest(port) == pytest.approx(5, abs=0.5), "a request on time")


@pytest.mark.parametrize(
    ("rate", "memory", "error", "code"),
    [(2000, 100, 0.1, 0), (1690, 100, 0.1, 1), (2000, 300, 0.1, 1), (2000, 100, 0.6, 1)],
)
def test_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, rate: float, memory: int, error: float, code: int
) -> None:
    point = bench_client.Point((50, 50 + error), (10, 10), 1, 0, True)
    monkeypatch.setattr(bench_client, "server", lambda: nullcontext((1, 1)))
    monkeypatch.setattr(bench_client, "separate_cores", lambda _: None)
    monkeypatch.setattr(bench_client, "point", lambda *_: point)
    monkeypatch.setattr(bench_client, "ceiling", lambda _: rate)
    monkeypatch.setattr(bench_client, "peak_memory", lambda _: memory)
    assert bench_client.main(["--repeat", "1", "--streams", "1"]) == code
