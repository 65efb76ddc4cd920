"""The front of a fleet, watched: a port where nobody listens, and a node that says what we want."""

from __future__ import annotations

import pytest

from common.talk import Failure
from launch import lookout
from launch.lookout import Lookout
from launch.node.messages import Owner
from launch.nodes import Place
from tests.conftest import free_port

HERE = Place("local1", 1, ())


def watched(monkeypatch: pytest.MonkeyPatch, answer: str) -> Lookout:
    """One that nobody here reaches; `answer` is what its node gets from it."""
    monkeypatch.setattr(lookout, "owner_by", lambda _: Owner(False, answer=answer))
    return Lookout(HERE, "n1", "0.0.0.0", f"http://127.0.0.1:{free_port()}")


def test_a_front_that_only_its_node_reaches_is_behind_a_wall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = watched(monkeypatch, "503")  # no replica is ready yet
    words = rf"^n1 serves on port {made.port}, but {made.url} cannot be reached from .*refused"
    with pytest.raises(Failure, match=words) as failed:
        made.die_if_walled()
    assert "firewall" in failed.value.hint


@pytest.mark.parametrize("answer", ["", "timed out"])
def test_a_front_that_its_node_does_not_reach_either_is_behind_none(
    monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    watched(monkeypatch, answer).die_if_walled()


@pytest.mark.parametrize(
    ("answer", "words"), [("503", "cannot be reached from"), ("timed out", "no longer answers")]
)
def test_a_front_that_falls_silent_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str,
    words: str,
) -> None:
    made = watched(monkeypatch, answer)
    for _ in range(lookout.MISSES - 1):
        made.look()
    assert not capsys.readouterr().err
    for _ in range(3):
        made.look()
    assert capsys.readouterr().err.count(words) == 1
    monkeypatch.setattr(lookout, "page", lambda _: "up")
    for _ in range(2):
        assert made.look() == "up"
    assert capsys.readouterr().err.count("n1: the front answers again") == 1


def test_a_front_whose_job_is_suspended_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lookout, "is_suspended", lambda _: True)
    made = watched(monkeypatch, "timed out")
    for _ in range(2 * lookout.MISSES):
        made.look()
    assert not capsys.readouterr().err
