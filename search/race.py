"""Decides which load of which candidate is measured next, with as few runs as possible.

First every candidate is measured at a few loads far apart. Between two of them a candidate can at
best combine the latency of the lower load with the throughput of the higher one, as both only grow
with the load. If even that would not beat what another candidate has shown, nothing is to be found
there; otherwise the load in the middle is measured.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

LOADS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # streams
APART = 4  # the first round measures one load in this many
WORTH = 1.05  # smaller improvements are not searched for
KNEE = 1.05  # each doubling of the load has to bring at least this much throughput


@dataclass(frozen=True)
class Point:
    """The result of a load. Throughputs in output tokens/s; latencies in ms, by name."""

    user: float
    gpu: float
    p99: Mapping[str, float]  # ttft, tpot, e2el; nan if there is none, which keeps no limit
    valid: bool = True

    def keeps(self, limits: Mapping[str, float]) -> bool:
        return self.valid and all(self.p99.get(n, math.nan) <= most for n, most in limits.items())


Measured = Mapping[str, Mapping[int, Point]]  # by candidate and load


def coarse(loads: Sequence[int]) -> list[int]:
    """The loads measured first: far apart, with the lowest and the highest."""
    return sorted({*loads[::APART], loads[-1]})


def is_over(found: Mapping[int, Point]) -> bool:
    """Whether more load is pointless: the last one failed, or brought too little."""
    last = sorted(found)[-2:]
    if not last:
        return False
    if not found[last[-1]].valid:
        return True
    if len(last) < 2 or not found[last[0]].valid:
        return False
    return found[last[1]].gpu < found[last[0]].gpu * KNEE


def objectives(limits: Mapping[str, float]) -> list[dict[str, float]]:
    """The limits to find a best candidate for: each by itself, and all of them together."""
    each = [{name: most} for name, most in limits.items()]
    return [*each, dict(limits)] if len(each) > 1 else each


def best(measured: Measured, limits: Mapping[str, float]) -> tuple[str, int] | None:
    """The candidate and load with the most throughput per GPU within the limits."""
    kept = [
        (point.gpu, name, load)
        for name, found in measured.items()
        for load, point in found.items()
        if point.keeps(limits)
    ]
    return max(kept)[1:] if kept else None


def front(measured: Measured) -> list[tuple[str, int]]:
    """The points that no other beats both per user and per GPU, the fastest for one user first."""
    points = [
        (point.user, point.gpu, name, load)
        for name, found in measured.items()
        for load, point in found.items()
        if point.valid
    ]
    chosen: list[tuple[str, int]] = []
    most = 0.0
    for _, gpu, name, load in sorted(points, key=lambda p: (-p[0], -p[1])):
        if gpu > most:
            most = gpu
            chosen.append((name, load))
    return chosen


def next_loads(measured: Measured, name: str, loads: Sequence[int],
               limits: Mapping[str, float]) -> list[int]:  # fmt: skip
    """The loads to measure next for a candidate, after the first round; [] if there are none."""
    found = measured[name]
    return [
        between[len(between) // 2]
        for low, high in pairs(found)
        if (between := [load for load in loads if low < load < high])
        and is_promising(measured, found[low], found[high], high / low, limits)
    ]


def pairs(found: Mapping[int, Point]) -> Iterator[tuple[int, int]]:
    return itertools.pairwise(sorted(found))


def is_promising(
    measured: Measured, low: Point, high: Point, ratio: float, limits: Mapping[str, float]
) -> bool:
    """Whether a load between these two, `ratio` apart, may be better than all seen so far."""
    if not low.valid:
        return False
    most = max(low.gpu, high.gpu) if high.valid else low.gpu * ratio
    if not limits:
        return not any(
            p.user * WORTH >= low.user and p.gpu * WORTH >= most
            for found in measured.values()
            for p in found.values()
            if p.valid
        )
    return any(
        low.keeps(these) and most > gpu_of(measured, these) * WORTH for these in objectives(limits)
    )


def gpu_of(measured: Measured, limits: Mapping[str, float]) -> float:
    """The most throughput per GPU within the limits; 0 if nothing keeps them."""
    found = best(measured, limits)
    return measured[found[0]][found[1]].gpu if found else 0.0


def order(measured: Measured, loads: Sequence[int], limits: Mapping[str, float]) -> list[str]:
    """The candidates with something left to measure, the most promising first."""
    ahead = [name for name in measured if next_loads(measured, name, loads, limits)]
    return sorted(ahead, key=lambda name: -max(p.gpu for p in measured[name].values()))
