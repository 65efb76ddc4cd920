"""Where the replicas of a fleet go: on which nodes, on which of their GPUs, on which ports."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.talk import counted, die

SMALLER = "lower --replicas or --tp_size, or allocate more"


@dataclass(frozen=True)
class Seat:
    """A place for one replica."""

    first: int  # the index of its first node, which serves
    nodes: int = 1
    gpus: tuple[str, ...] = ()  # their ids on its node; (): whole nodes, or none at all
    index: int = 0  # among the replicas that serve from that node: its port follows from it


def seats(size: int, gpus: Sequence[Sequence[str]]) -> list[Seat]:
    """Seats for as many replicas of `size` GPUs as fit on nodes with these GPUs (their ids).

    Small ones are packed into nodes. One that fits no node takes whole neighbouring nodes with
    equal numbers of GPUs, and has to use all of those.
    """
    if any(size <= len(ids) for ids in gpus):
        return [
            Seat(node, 1, tuple(ids[begin : begin + size]), begin // size)
            for node, ids in enumerate(gpus)
            for begin in range(0, len(ids) - size + 1, size)
        ]
    found: list[Seat] = []
    first = 0
    while first < len(gpus):
        nodes = whole_nodes(size, [len(ids) for ids in gpus[first:]])
        found += [Seat(first, nodes)] if nodes else []
        first += nodes or 1
    return found


def whole_nodes(size: int, gpus: Sequence[int]) -> int:
    """How many of the nodes, from the first on, a world fills exactly; 0 if it fills none."""
    nodes, rest = divmod(size, gpus[0]) if gpus[0] else (0, 0)
    return nodes if not rest and gpus[:nodes] == [gpus[0]] * nodes else 0


def without_gpus(count: int, nodes: int) -> list[Seat]:
    """Replicas that need no GPU, spread evenly over the nodes."""
    return sorted((Seat(i % nodes, index=i // nodes) for i in range(count)), key=order)


def order(seat: Seat) -> tuple[int, int]:
    return seat.first, seat.index


def choose(wanted: str, size: int, gpus: Sequence[Sequence[str]]) -> list[Seat]:
    """The seats of `wanted` replicas, a number or `auto`. Failure if they do not fit."""
    found = seats(size, gpus)
    if wanted == "auto" and found:
        return found
    if wanted == "auto" or int(wanted) > len(found):
        asked = "a replica" if wanted == "auto" else counted(int(wanted), "replica")
        have = f"{counted(len(gpus), 'node')} with {', '.join(str(len(ids)) for ids in gpus)} GPUs"
        what = f"{asked} of {counted(size, 'GPU')}{' each' * (wanted != 'auto')}"
        die(f"no room for {what}: there is room for {len(found)} on {have}", hint=SMALLER)
    return found[: int(wanted)]
