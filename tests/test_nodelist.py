"""NODELIST: a part of the job's nodes; and candidates of a search side by side on them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from common.talk import Failure
from launch import nodes
from launch.nodes import Place, part_of
from launch.slurm import Allocation, Share
from search.nodes import Nodes, side_by_side

SHARES = {name: Share(8, 8, "0,1,2,3,4,5,6,7") for name in ("n1", "n2", "n3", "n4")}
JOB = Place("77", 4, ("srun",), Allocation(nodes=tuple(SHARES), shares=SHARES))


@pytest.fixture(autouse=True)
def _expand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "expand", lambda text: text.split(","))


def named(place: Place, count: int, first: int = 0) -> list[str]:
    return [word for word in place.on(count, first=first) if "--nodelist" in word]


def test_a_part_of_the_job_is_a_place_of_its_own() -> None:
    part = part_of(JOB, "n3,n2")
    assert (part.size, part.allocation.nodes, list(part.allocation.shares)) == (
        2, ("n2", "n3"), ["n2", "n3"]
    )  # fmt: skip
    assert named(part, 2) == ["--nodelist=n2,n3"] and named(part, 1, 1) == ["--nodelist=n3"]
    assert part.gpus(1) == 8 and part.gpus(2) == 0
    assert part_of(JOB, "") is JOB and named(JOB, 4) == []
    assert named(part_of(JOB, "n1"), 1) == ["--nodelist=n1"]


@pytest.mark.parametrize("asked", ["n5", "n1,n3", "n2,n2,n4", "n1,x"])
def test_what_is_not_a_part_is_refused(asked: str) -> None:
    with pytest.raises(Failure, match=f"NODELIST={asked}: job 77 has n1, n2, n3, n4"):
        part_of(JOB, asked)


@pytest.mark.parametrize(
    ("gpus", "asked", "given"),
    [
        (8, [8, 8, 8], [["a"], ["b"], ["c"]]),
        (8, [16, 16, 4], [["a", "b"], None, ["c"]]),
        (8, [4, 4, 4, 4], [["a"], ["b"], ["c"], None]),
        (0, [1, 1], [["a", "b", "c"], None]),
        (8, [99], [["a", "b", "c"]]),
    ],
)
def test_never_two_candidates_on_one_node(
    gpus: int, asked: list[int], given: list[list[str] | None]
) -> None:
    there = Nodes(["a", "b", "c"], gpus)
    assert [there.take(each) for each in asked] == given


def test_a_node_that_is_given_back_is_free_again() -> None:
    there = Nodes([""], 0)
    assert there.take(1) == [""] and there.take(1) is None
    there.give_back([""])
    assert there.take(64) == [""]


def test_as_many_at_once_as_there_is_room_for() -> None:
    both, most, lock = threading.Barrier(2, timeout=20), [0, 0], threading.Lock()

    def work(task: int, names: Sequence[str]) -> None:
        with lock:
            most[0] += 1
            most[1] = max(most)
        if task < 2:
            both.wait()  # passes only if two run at the same time
        with lock:
            most[0] -= 1

    side_by_side([0, 1, 2, 3], lambda task: 8, Nodes(["a", "b"], 8), work, lambda: None)
    assert most == [0, 2]


def test_an_error_ends_the_others_and_waits_for_them() -> None:
    ended, cleaned = threading.Event(), []

    def work(task: str, names: Sequence[str]) -> None:
        if task == "bad":
            raise OSError("the disk is full")
        assert ended.wait(20)
        time.sleep(0.05)
        cleaned.append(task)

    with pytest.raises(OSError, match="disk"):
        side_by_side(["good", "bad"], lambda task: 1, Nodes(["a", "b"], 8), work, ended.set)
    assert cleaned == ["good"]
