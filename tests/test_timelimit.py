"""The end of the job, told before it comes."""

from __future__ import annotations

import os
import re
import time

import pytest

from launch import timelimit
from launch.nodes import Place
from tests.conftest import PATIENCE, Fakes, wait_until

pytestmark = pytest.mark.usefixtures("clean_environment")
SLURM = Place("77", 1, ("srun",))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("9:59\n", 599),
        ("0:00", 0),
        ("1:00:01", 3601),
        ("2-03:04:05", 183845),
        ("UNLIMITED\n", None),
        ("NOT_SET", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_squeue_says_how_long_is_left(text: str, seconds: float | None) -> None:
    assert timelimit.seconds(text) == seconds


@pytest.fixture
def limit(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> timelimit.TimeLimit:
    os.environ.update(fakes.environment(SQUEUE_STATES="PENDING"))
    monkeypatch.setattr(timelimit, "ASK_EVERY", 0.05)
    return timelimit.TimeLimit(SLURM)


def told(limit: timelimit.TimeLimit, fakes: Fakes, times: int) -> None:
    """Let it ask so many times, then end it."""
    already = len(fakes.calls("squeue"))
    if not limit.ident:
        limit.begin()
    wait_until(lambda: len(fakes.calls("squeue")) >= already + times)


@pytest.mark.parametrize(
    ("left", "words"),
    [("9:59", r"in 10 min \(\d\d:\d\d:\d\d UTC\)"), ("2:00", "in 2 min "), ("0:45", "in 4[45] s ")],
)
def test_the_end_is_told_once(
    fakes: Fakes,
    limit: timelimit.TimeLimit,
    capfd: pytest.CaptureFixture[str],
    left: str,
    words: str,
) -> None:
    fakes.set(left=left)
    told(limit, fakes, 3)
    limit.end()
    limit.join()
    seen = capfd.readouterr().err
    assert seen.count("\n") == 1
    assert re.search(
        f"the job reaches its time limit {words}.*; Slurm will then end the server", seen
    )
    assert not limit.is_reached()


@pytest.mark.parametrize("left", ["UNLIMITED", "1-00:00:00", "15:00", "rubbish"])
def test_nothing_is_told_of_an_end_that_is_far(
    fakes: Fakes, limit: timelimit.TimeLimit, capfd: pytest.CaptureFixture[str], left: str
) -> None:
    fakes.set(left=left)
    told(limit, fakes, 2)
    limit.end()
    limit.join()
    assert capfd.readouterr().err == ""


def test_a_limit_that_is_changed_is_told_again(
    fakes: Fakes, limit: timelimit.TimeLimit, capfd: pytest.CaptureFixture[str]
) -> None:
    for left in ("5:00", "UNLIMITED", "8:00"):
        fakes.set(left=left)
        told(limit, fakes, 3)
    limit.end()
    limit.join()
    assert re.findall(r"in (\d+) min", capfd.readouterr().err) == ["5", "8"]


def test_the_end_is_told_ten_minutes_before(
    fakes: Fakes,
    limit: timelimit.TimeLimit,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It is not the pause between two questions that decides when."""
    monkeypatch.setattr(timelimit, "ASK_EVERY", 1000)
    fakes.set(left="10:01")
    begun = time.monotonic()
    limit.begin()
    wait_until(lambda: fakes.calls("squeue"))
    fakes.set(left="9:59")
    wait_until(lambda: limit.told)
    assert time.monotonic() - begun > 0.5
    limit.end()
    limit.join()


def test_the_end_is_known_when_it_comes(fakes: Fakes, limit: timelimit.TimeLimit) -> None:
    fakes.set(left="0:01")
    told(limit, fakes, 1)
    wait_until(limit.is_reached)
    limit.end()
    limit.join()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("RUNNING", ""),
        ("SUSPENDED", ""),
        ("CONFIGURING", ""),
        ("POWER_UP_NODE", ""),
        ("SIGNALING", ""),
        ("COMPLETING", "has ended"),
        ("TIMEOUT", "has reached its time limit"),
        ("CANCELLED", "has ended (cancelled)"),
        ("GONE", "has ended (gone)"),
    ],
)
def test_slurm_says_whether_the_job_has_ended(
    fakes: Fakes,
    limit: timelimit.TimeLimit,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    words: str,
) -> None:
    monkeypatch.setattr(timelimit, "COMPLETES_WITHIN", 0.5)
    if state == "GONE":  # of a job that Slurm never knew, it says nothing of ours
        fakes.set(state=state)
        assert limit.how_it_ended() == ""
    fakes.set()
    assert limit.how_it_ended() == ""
    fakes.set(state=state)
    assert limit.how_it_ended() == words
    fakes.program("squeue", "raise SystemExit('Unable to contact slurm controller')")
    assert limit.how_it_ended() == ""
    fakes.without("squeue")
    assert limit.how_it_ended() == ""
    limit.end_at = time.monotonic() + 1
    assert limit.how_it_ended() == "has reached its time limit"


@pytest.mark.parametrize(("left", "over"), [("UNLIMITED", False), ("5:00", False), ("0:00", True)])
def test_a_limit_that_was_raised_since_it_was_asked_for_is_not_reached(
    fakes: Fakes, limit: timelimit.TimeLimit, left: str, over: bool
) -> None:
    limit.end_at = time.monotonic() - 100
    fakes.set(left=left)
    assert limit.how_it_ended() == ("has reached its time limit" if over else "")


def test_without_slurm_nobody_is_asked(fakes: Fakes, limit: timelimit.TimeLimit) -> None:
    here = timelimit.TimeLimit(Place("local1", 1, ()))
    here.begin()
    assert here.ident is None and not here.is_reached()
    here.end()
    fakes.without("squeue")
    limit.begin()
    time.sleep(0.1)
    assert limit.is_alive()
    limit.end()
    limit.join()


def test_a_slurm_that_does_not_answer_holds_nothing_up(
    fakes: Fakes, limit: timelimit.TimeLimit
) -> None:
    fakes.program("squeue", "import time; time.sleep(600)")
    limit.begin()
    wait_until(lambda: limit.asking)
    limit.end()
    limit.join(PATIENCE)
    assert not limit.is_alive()
