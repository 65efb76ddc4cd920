"""When a server that failed is started anew."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from common import signals
from common.talk import Failure
from launch import supervise
from launch.server import Server
from launch.timelimit import TimeLimit
from tests.conftest import plan

Make = Callable[[int], supervise.Launch]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it has slept: not at all."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


@pytest.fixture
def make(tmp_path: Path) -> Make:
    (tmp_path / "logs").mkdir()

    def make(restart: int) -> supervise.Launch:
        args = argparse.Namespace(workspace=tmp_path, restart=restart)
        return supervise.Launch(plan(), [], "http://x:1", args, TimeLimit(plan().place))

    return make


def fail(launch: supervise.Launch) -> None:
    launch.prepare_restart(Failure("it failed", passing=True))


def test_each_pause_is_twice_the_last_but_never_long(make: Make, pauses: list[float]) -> None:
    launch = make(8)
    for _ in range(8):
        fail(launch)
    assert pauses == [2, 4, 8, 16, 32, 60, 60, 60]
    with pytest.raises(Failure, match=r"^it failed \(given up after 8 restarts\)$"):
        fail(launch)


def test_a_full_disk_is_no_reason_not_to_restart(make: Make, pauses: list[float]) -> None:
    launch = make(1)
    launch.log.symlink_to("/dev/full")
    fail(launch)
    assert pauses == [2]


def test_without_the_option_a_failure_is_what_it_was(make: Make, pauses: list[float]) -> None:
    with pytest.raises(Failure, match=r"^it failed$"):
        fail(make(0))
    assert pauses == []


def test_a_failure_that_is_final_is_not_repeated(make: Make, pauses: list[float]) -> None:
    with pytest.raises(Failure, match=r"^no$"):
        make(3).prepare_restart(Failure("no"))
    assert pauses == []


@pytest.mark.parametrize(("served", "expected"), [(3599.0, [2, 4]), (3601.0, [2, 2])])
def test_an_hour_of_serving_is_forgiven(
    make: Make,
    pauses: list[float],
    monkeypatch: pytest.MonkeyPatch,
    served: float,
    expected: list[float],
) -> None:
    monkeypatch.setattr("launch.server.stop", lambda _: None)
    launch = make(2)
    fail(launch)
    launch.running = [cast(Server, SimpleNamespace(served=served))]
    fail(launch)
    assert pauses == expected and launch.running == []


def test_a_signal_during_a_clean_up_is_obeyed_after_it() -> None:
    before = {each: signal.getsignal(each) for each in signals.SIGNALS}
    done = []
    try:
        signals.obey()
        with pytest.raises(signals.Stopped) as stopped, signals.postponed():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            done.append("clean")
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert (done, stopped.value.args) == (["clean"], (signal.SIGTERM,))


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = {each: signal.getsignal(each) for each in signals.SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signals.obey()
        with signals.postponed():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
