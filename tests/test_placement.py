"""Where the replicas of a fleet go."""

from __future__ import annotations

import pytest

from common.talk import Failure
from launch.placement import Seat, choose, seats, without_gpus

EIGHT = tuple("01234567")


def shown(found: list[Seat]) -> list[str]:
    """`0:45#2` is the third replica of the first node, on its GPUs 4, 5; `2+2` two whole nodes."""
    return [
        f"{s.first}:{''.join(s.gpus)}#{s.index}" if s.gpus else f"{s.first}+{s.nodes}"
        for s in found
    ]


@pytest.mark.parametrize(
    ("size", "gpus", "expected"),
    [
        (1, ["0"], ["0:0#0"]),
        (1, ["012"], ["0:0#0", "0:1#1", "0:2#2"]),
        (2, [EIGHT], ["0:01#0", "0:23#1", "0:45#2", "0:67#3"]),
        (4, [EIGHT], ["0:0123#0", "0:4567#1"]),
        (8, [EIGHT], ["0:01234567#0"]),
        (3, [EIGHT], ["0:012#0", "0:345#1"]),  # two GPUs are left over
        (2, ["01", "01"], ["0:01#0", "1:01#0"]),
        (4, [EIGHT, EIGHT], ["0:0123#0", "0:4567#1", "1:0123#0", "1:4567#1"]),
        (8, [EIGHT] * 3, ["0:01234567#0", "1:01234567#0", "2:01234567#0"]),
        # GPUs that are not contiguous, as Slurm hands out what others have left
        (2, ["1367"], ["0:13#0", "0:67#1"]),
        (2, ["05", "247"], ["0:05#0", "1:24#0"]),
        # Unequal nodes
        (4, [EIGHT, "01"], ["0:0123#0", "0:4567#1"]),
        (2, ["0", "0123"], ["1:01#0", "1:23#1"]),
        (1, ["01", "", "0"], ["0:0#0", "0:1#1", "2:0#0"]),
        # A world larger than a node takes whole ones
        (16, [EIGHT] * 2, ["0+2"]),
        (16, [EIGHT] * 3, ["0+2"]),
        (16, [EIGHT] * 16, [f"{first}+2" for first in range(0, 16, 2)]),
        (32, [EIGHT] * 16, ["0+4", "4+4", "8+4", "12+4"]),
        (2, ["0"] * 4, ["0+2", "2+2"]),
        (16, [EIGHT, EIGHT, "0123", EIGHT, EIGHT], ["0+2", "3+2"]),
        (16, [EIGHT, "0123", EIGHT], []),
        (12, [EIGHT] * 2, []),  # it does not fill them evenly
        (2, [""], []),
        (24, [EIGHT] * 2, []),
    ],
)
def test_as_many_as_fit(size: int, gpus: list[str], expected: list[str]) -> None:
    assert shown(seats(size, gpus)) == expected


@pytest.mark.parametrize("nodes", [1, 2, 3, 16])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_no_gpu_and_no_port_is_given_twice(size: int, nodes: int) -> None:
    found = seats(size, [EIGHT] * nodes)
    assert len(found) == 8 * nodes // size
    small = [(s.first, gpu) for s in found for gpu in s.gpus]
    whole = [node for s in found if not s.gpus for node in range(s.first, s.first + s.nodes)]
    ports = [(s.first, s.index) for s in found]
    assert all(len(set(each)) == len(each) for each in (small, whole, ports))
    assert all(len(s.gpus or EIGHT * s.nodes) == size for s in found)


def test_fewer_than_fit_take_the_first_nodes() -> None:
    assert shown(choose("3", 4, [EIGHT] * 2)) == ["0:0123#0", "0:4567#1", "1:0123#0"]
    assert shown(choose("auto", 8, [EIGHT] * 2)) == ["0:01234567#0", "1:01234567#0"]


@pytest.mark.parametrize(
    ("wanted", "size", "gpus", "words"),
    [
        (
            "3",
            4,
            [EIGHT],
            "no room for 3 replicas of 4 GPUs each: there is room for 2 on 1 node with 8 GPUs",
        ),
        ("3", 16, [EIGHT] * 4, "there is room for 2 on 4 nodes with 8, 8, 8, 8 GPUs"),
        (
            "auto",
            4,
            ["012"],
            "no room for a replica of 4 GPUs: there is room for 0 on 1 node with 3 GPUs",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_both_numbers(
    wanted: str, size: int, gpus: list[str], words: str
) -> None:
    with pytest.raises(Failure, match=words):
        choose(wanted, size, gpus)


def test_without_gpus_the_nodes_share_evenly() -> None:
    found = without_gpus(5, 2)
    assert [(s.first, s.index) for s in found] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert [s.first for s in without_gpus(2, 4)] == [0, 1]
