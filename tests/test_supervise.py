"""When a server that failed is started anew, and what becomes of a fleet."""

from __future__ import annotations

import argparse
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from common import signals
from common.talk import Failure
from launch import announce, life, server, supervise, watch
from launch.findings import Node
from launch.life import JobOver, Life, Terms
from launch.server import Server
from launch.timelimit import TimeLimit
from tests.conftest import PATIENCE, plan, wait_until

Make = Callable[[int], Life]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it has paused: not at all."""
    pauses: list[float] = []
    monkeypatch.setattr(life, "pause", lambda _, seconds: pauses.append(seconds))
    return pauses


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(restart: int) -> Life:
        made, over = plan(), threading.Event()
        args = argparse.Namespace(restart=restart)
        nobody = lambda *_: None  # noqa: E731
        turns = threading.Semaphore()
        terms = Terms(args, TimeLimit(made.place), over, turns, nobody, nobody, nobody)
        return Life(made, made.replicas[0], [Node("n1")], "http://x:1", tmp_path / "log", terms)

    return make


def fail(life: Life) -> None:
    life.prepare_restart(Failure("it failed", passing=True))


def test_each_pause_is_twice_the_last_but_never_long(make: Make, pauses: list[float]) -> None:
    life = make(8)
    for _ in range(8):
        fail(life)
    assert pauses == [2, 4, 8, 16, 32, 60, 60, 60]
    with pytest.raises(Failure, match=r"^it failed \(given up after 8 restarts\)$"):
        fail(life)


def test_a_full_disk_is_no_reason_not_to_restart(make: Make, pauses: list[float]) -> None:
    life = make(1)
    life.log.symlink_to("/dev/full")
    fail(life)
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
    monkeypatch.setattr(server, "stop", lambda _: None)
    life = make(2)
    fail(life)
    life.server = cast(Server, SimpleNamespace(served=served))
    fail(life)
    assert pauses == expected and life.server is None


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = {each: signal.getsignal(each) for each in signals.SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signals.obey()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


# A fleet


class Fleet:
    """Four replicas whose engines do as they are told, in the place of real ones."""

    def __init__(self, workspace: Path, **asked: Any) -> None:
        self.workspace = workspace
        made = plan()
        replicas = tuple(
            replace(
                made.replicas[0],
                label=f"r{i}",
                port=8001 + i,
                args=("--host", "127.0.0.1", "--port", str(8001 + i)),
            )
            for i in range(4)
        )
        wanted: dict[str, Any] = {"restart": 0, "load_at_once": 0, "all_or_nothing": False}
        wanted |= {"no_front": True, "ready_timeout": 9, "probe_seconds": 0, "probe_timeout": 0}
        wanted |= {"called_workspace": ".", **asked}
        args = argparse.Namespace(workspace=workspace, **wanted)
        self.plan = replace(made, replicas=replicas)
        limit = TimeLimit(made.place)
        self.launch = supervise.Launch(self.plan, [Node("n1")], "http://n1:8000", args, limit)
        # Made before any thread asks for them: a defaultdict may make two for two who ask at once.
        self.loads = {replica.label: threading.Event() for replica in replicas}
        self.fails: dict[str, list[Failure]] = {replica.label: [] for replica in replicas}
        self.loading: set[str] = set()
        self.most_loading = 0
        self.starts: list[str] = []
        self.stopping: threading.Barrier | None = None

    # In the place of launch/server.py and launch/watch.py
    def start(self, plan: object, replica: Any, nodes: object, url: str, *_: object) -> Server:
        self.starts.append(replica.label)
        self.loading.add(replica.label)
        self.most_loading = max(self.most_loading, len(self.loading))
        log = SimpleNamespace(path=self.workspace / replica.label, last_line="")
        made = SimpleNamespace(replica=replica, plan=self.plan, ready_at=None, age=1.0, served=0.0)
        made.began, made.started = time.time(), time.monotonic()
        made.health = SimpleNamespace(model="m", misses=0)
        made.main_log, made.url = log, url
        made.loading = SimpleNamespace(said="")
        return cast(Server, made)

    def await_ready(self, server: Server, _: float) -> None:
        label = server.replica.label
        try:
            while not self.loads[label].wait(0.01):
                self.go_on(label)
        finally:
            self.loading.remove(label)

    def hold(self, server: Server) -> None:
        while True:
            time.sleep(0.01)
            self.go_on(server.replica.label)

    def go_on(self, label: str) -> None:
        signals.pause(self.launch.over, 0)
        if self.fails[label]:
            raise self.fails[label].pop()

    def stop(self, server: Server) -> None:
        if self.stopping:
            self.stopping.wait(PATIENCE)

    # What a test does and looks at
    def load(self, *labels: str) -> None:
        for label in labels:
            self.loads[label].set()

    @property
    def states(self) -> str:
        return " ".join(each.state for each in self.launch.lives)

    def listed(self) -> list[str]:
        path = self.workspace / "logs/endpoint.json"
        return [each["name"] for each in json.loads(path.read_text())["replicas"]]

    def end_of(self) -> BaseException:
        return self.launch.ends.get(timeout=PATIENCE)


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Fleet]]:
    (tmp_path / "logs").mkdir()
    made: list[Fleet] = []

    def make(**asked: Any) -> Fleet:
        made.append(Fleet(tmp_path, **asked))
        monkeypatch.setattr(server, "launch", made[-1].start)
        monkeypatch.setattr(server, "stop", made[-1].stop)
        monkeypatch.setattr(watch, "await_ready", made[-1].await_ready)
        monkeypatch.setattr(watch, "hold", made[-1].hold)
        made[-1].launch.begin()
        return made[-1]

    yield make
    for each in made:
        each.launch.end()


ALL = ("r0", "r1", "r2", "r3")


@pytest.fixture
def serving(fleet: Callable[..., Fleet]) -> Callable[..., Fleet]:
    def make(**asked: Any) -> Fleet:
        made = fleet(**asked)
        made.load(*ALL)
        wait_until(lambda: made.launch.endpoint.exists())
        return made

    return make


def test_a_fleet_is_ready_when_all_are(
    fleet: Callable[..., Fleet], capsys: pytest.CaptureFixture[str]
) -> None:
    made = fleet()
    made.load("r0", "r1", "r2")
    wait_until(lambda: made.states == "ready ready ready loading")
    with made.launch.lock:  # until the last has said so
        said = capsys.readouterr().err
    assert "r0: ready after 1.0 s: http://127.0.0.1:8001 on n1" in said and "READY" not in said
    assert not made.launch.endpoint.exists()
    made.load("r3")
    wait_until(lambda: made.launch.endpoint.exists())
    assert made.listed() == list(ALL)
    wait_until(lambda: "serves m with 4 replicas" in capsys.readouterr().err)


def test_where_it_is_can_be_read_once_it_is_said(
    fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, there = fleet(), list[bool]()
    monkeypatch.setattr(announce, "say", lambda *_: there.append(made.launch.endpoint.exists()))
    made.load(*ALL)
    wait_until(lambda: there)
    assert all(there)


def page(*up: str) -> str:
    """The front's, by which it reaches these."""
    row = 'haproxy_server_status{{proxy="replicas",server="{}",state="UP"}} {}\n'
    return "".join(row.format(name, int(name in up)) for name in ALL)


@pytest.fixture
def fronted(fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Fleet]:
    """All are ready, and the front has this page."""

    def make(text: str) -> Fleet:
        monkeypatch.setattr(supervise, "page", lambda _: text)
        monkeypatch.setattr(supervise, "NOTICES_WITHIN", 0.1)
        made = fleet()
        made.launch.front = cast(Any, SimpleNamespace(stop=lambda: None))
        made.load(*ALL)
        wait_until(lambda: made.states == "ready ready ready ready")
        with made.launch.lock:  # until the last has said so
            return made

    return make


def test_what_the_front_does_not_reach_does_not_count(
    fronted: Callable[[str], Fleet], capsys: pytest.CaptureFixture[str]
) -> None:
    made = fronted(page("r0", "r1"))
    said = capsys.readouterr().err
    assert "serves m with 2 of 4 replicas" in said
    cannot = "ready, but the front on n1 cannot reach 127.0.0.1:"
    assert f"r2: {cannot}8003: a firewall between the nodes?" in said and f"r3: {cannot}" in said
    for _ in range(2):
        made.launch.note_found(page(*ALL))
    assert capsys.readouterr().err.count("r2: the front reaches it now") == 1


def test_a_front_that_reaches_none_serves_nothing(
    fronted: Callable[[str], Fleet], capsys: pytest.CaptureFixture[str]
) -> None:
    made = fronted(page())
    assert "READY" not in capsys.readouterr().err and not made.launch.endpoint.exists()
    made.launch.note_found(page(*ALL))
    assert "with 4 replicas" in capsys.readouterr().err and made.launch.endpoint.exists()


def test_whom_the_front_loses_for_longer_is_told(
    fronted: Callable[[str], Fleet], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a moment's absence, nor what we miss as well: that is the replica's own end."""
    made = fronted(page(*ALL))
    unwell = made.launch.lives[3].server
    assert unwell
    unwell.health.misses = 1
    for up in (("r0", "r1"), ("r0", "r1"), ALL, *[("r0", "r1", "r2")] * 4):
        made.launch.note_found(page(*up))
    assert "cannot reach" not in capsys.readouterr().err
    for _ in range(5):
        made.launch.note_found(page("r0", "r1"))
    said = capsys.readouterr().err
    assert said.count("cannot reach") == said.count("r2: ready, but") == 1
    made.launch.lives[2].server.health.misses = 1  # type: ignore[union-attr]
    made.launch.note_found(page("r0", "r1"))
    assert "reaches it now" not in capsys.readouterr().err


def test_one_that_is_lost_leaves_the_others(
    serving: Callable[..., Fleet], capsys: pytest.CaptureFixture[str]
) -> None:
    made = serving()
    made.fails["r1"] = [Failure("n1: it failed", "see there", passing=True)]
    wait_until(lambda: made.states == "ready lost ready ready")
    wait_until(lambda: made.listed() == ["r0", "r2", "r3"])
    with made.launch.lock:  # until all is said
        said = capsys.readouterr().err
    assert "LOST r1: n1: it failed\n           next: see there" in said
    assert "3 of 4 replicas go on" in said
    assert made.starts.count("r1") == 1 and made.launch.ends.empty()
    states = json.loads(made.launch.fleet_record.read_text())["replicas"]
    assert [each["why"] for each in states] == ["", "n1: it failed", "", ""]


def test_one_that_is_lost_while_they_load_keeps_none_waiting(
    fleet: Callable[..., Fleet], capsys: pytest.CaptureFixture[str]
) -> None:
    made = fleet()
    made.load("r0", "r1", "r2")
    made.fails["r3"] = [Failure("n1: it failed")]
    wait_until(lambda: made.launch.endpoint.exists())
    with made.launch.lock:  # until it is said
        assert "serves m with 3 of 4 replicas" in capsys.readouterr().err


def test_one_that_fails_is_started_anew_while_the_others_serve(
    serving: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "LONGEST_PAUSE", 0)
    made = serving(restart=1)
    made.loads["r1"].clear()
    made.fails["r1"] = [Failure("n1: it failed", passing=True)]

    def rows() -> list[dict[str, Any]]:
        return list(json.loads(made.launch.endpoint.read_text())["replicas"])

    wait_until(lambda: rows()[1]["restarts"] == 1 and made.states == "ready loading ready ready")
    assert rows()[1]["ready"] is None and rows()[0]["ready"]
    made.load("r1")
    wait_until(lambda: made.states == "ready ready ready ready")
    assert sorted(made.starts) == ["r0", "r1", "r1", "r2", "r3"]


def test_when_none_is_left_the_launch_ends(serving: Callable[..., Fleet]) -> None:
    made = serving()
    for label in ALL[:3]:
        made.fails[label] = [Failure(f"{label} failed")]
    wait_until(lambda: made.states.count("lost") == 3)
    assert made.launch.ends.empty()
    made.fails["r3"] = [Failure("n1: it failed", "see there")]
    end = made.end_of()
    assert isinstance(end, Failure)
    assert (end.message, end.hint) == ("r3: n1: it failed; no replica is left", "see there")


def test_all_or_nothing_ends_with_the_first(serving: Callable[..., Fleet]) -> None:
    made = serving(all_or_nothing=True)
    made.fails["r2"] = [Failure("n1: it failed")]
    assert str(made.end_of()) == "r2: n1: it failed; the others are ended, too"


def test_the_end_of_the_job_ends_all_with_one_sentence(
    serving: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TimeLimit, "how_it_ended", lambda _: "has ended (cancelled)")
    made = serving(restart=3)
    for label in ALL:
        made.fails[label] = [Failure(f"{label} failed")]
    end = made.end_of()
    assert isinstance(end, JobOver)
    assert end.message == "n1: Slurm ended the fleet: job local1 has ended (cancelled)"


def test_an_error_of_our_own_ends_the_launch(serving: Callable[..., Fleet]) -> None:
    made = serving()
    made.fails["r2"] = cast(list[Failure], [ZeroDivisionError("a bug")])
    assert isinstance(made.end_of(), ZeroDivisionError)


def test_no_more_load_at_once_than_asked_for(fleet: Callable[..., Fleet]) -> None:
    made = fleet(load_at_once=2)
    wait_until(lambda: made.states.count("loading") == 2)
    assert made.states.count("waiting") == 2
    made.load(*ALL)
    wait_until(lambda: made.states == "ready ready ready ready")
    assert made.most_loading == 2


@pytest.mark.parametrize(
    ("at_once", "loaded", "state"), [(1, (), "loading"), (0, (), "loading"), (0, ALL, "ready")]
)
def test_all_are_ended_side_by_side(
    fleet: Callable[..., Fleet], at_once: int, loaded: tuple[str, ...], state: str
) -> None:
    """The end of each waits for that of the others."""
    made, several = fleet(load_at_once=at_once), at_once or 4
    made.load(*loaded)
    wait_until(lambda: made.states.count(state) == several)
    made.stopping = threading.Barrier(several)
    made.launch.end()
    assert not any(each.is_alive() for each in made.launch.lives)
    assert not made.launch.endpoint.exists()
