"""Measure a fleet: what its front adds to each token, and what a death costs. For docs/figures.md.

    make bench-fleet

The front stands before a server that answers by the clock (timetable_server.c) and says itself when
each token went out. The server has one core; the front and the client share the other, on which the
front comes first. The client's times are the kernel's, so it does not matter when it reads. What
else the machine does can only add to a figure: the best of a few runs counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.front import Front
from launch.nodes import Place
from load.loadgen import measure
from load.metrics import Distribution, mean
from load.payload import RandomPrompts, Requests
from load.target import Load, Target
from tests.bench_client import PROMPT, TOKENS, TTFT_MS, admin, requests, server
from tests.cluster.cluster import why_not
from tests.test_front import children, free_port

STREAMS = {1: 10, 16: 10, 64: 10, 256: 40}  # and their ITL in ms: a larger batch is slower
REPEATS = 3
TTFT_ALLOWED, ITL_ALLOWED = 0.5, 0.1  # ms
FIRST, THEN = os.sched_param(10), os.sched_param(5)  # both before what else the machine does


def main() -> int:
    if reason := why_not():
        raise SystemExit(f"bench-fleet: {reason}")
    return 0 if what_the_front_adds() else 1


# --- what the front adds --------------------------------------------------------------------------
@dataclass(frozen=True)
class Added:
    """By how much the client saw a token later than the server sent it, in ms."""

    ttft: float
    itl_p99: float


def what_the_front_adds() -> bool:
    print(f"A server with TTFT {TTFT_MS} ms and {TOKENS} tokens; all in ms, later than sent.\n")
    print("| streams | ITL | TTFT direct | by front | added | ITL p99 direct | by front | added |")
    print("|--:" * 8 + "|")
    good = True
    with server() as (port, pid), fronting(port) as front:
        share_cores(pid, front)
        for streams, itl_ms in STREAMS.items():
            direct, through = (best(port, at, streams, itl_ms) for at in (port, front.port))
            ttft, itl = through.ttft - direct.ttft, through.itl_p99 - direct.itl_p99
            good = good and ttft <= TTFT_ALLOWED and itl <= ITL_ALLOWED
            print(f"| {streams} | {itl_ms} | {direct.ttft:+.2f} | {through.ttft:+.2f} | {ttft:.2f} "
                  f"| {direct.itl_p99:+.2f} | {through.itl_p99:+.2f} | {itl:.2f} |",
                  flush=True)  # fmt: skip
    print(f"\nAllowed: {TTFT_ALLOWED} and {ITL_ALLOWED} ms" + ("" if good else ": TOO MUCH"))
    return good


@contextmanager
def fronting(*ports: int) -> Iterator[Front]:
    servers = {f"r{i}": f"127.0.0.1:{port}" for i, port in enumerate(ports)}
    front = Front(Place("local1", 1, ()), "here", "127.0.0.1", free_port(), servers)
    front.start()
    try:
        yield front
    finally:
        front.stop()


def share_cores(server: int, front: Front) -> None:
    """The server on one; on the other the front, and when that sleeps the client."""
    one, other, *_ = sorted(os.sched_getaffinity(0))
    assert front.step
    [haproxy] = children(front.step.process.pid)
    for pid, core in ((server, one), (haproxy, other)):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})
            os.sched_setscheduler(int(thread.name), os.SCHED_FIFO, FIRST)
    os.sched_setaffinity(0, {other})
    os.sched_setscheduler(0, os.SCHED_FIFO, THEN)


def best(port: int, at: int, streams: int, itl_ms: float) -> Added:
    found = [added(port, at, streams, itl_ms) for _ in range(REPEATS)]
    return Added(min(each.ttft for each in found), min(each.itl_p99 for each in found))


def added(port: int, at: int, streams: int, itl_ms: float) -> Added:
    """One run: `port` is the server's, `at` where it is asked."""
    admin(port, f"config?ttft_ms={TTFT_MS}&itl_ms={itl_ms}")
    body = Requests("timetable", RandomPrompts(PROMPT, TOKENS, "0"))
    count = requests(streams)
    load = Load(Target("127.0.0.1", at), "/v1/completions", body, count, streams, shards=1)
    result, truth = measure(load), admin(port, "stats")
    if failed := [o.error for o in result.outcomes if o.error]:
        raise SystemExit(f"{len(failed)} requests failed: {failed[0]}")
    gaps = Distribution(gap for o in result.outcomes for gap in o.gaps)
    ttft = mean((o.first - o.sent) / 1e6 for o in result.outcomes)
    sent = truth["ttft_ms"]["mean"], truth["itl_ms"]["p99"]
    return Added(ttft - sent[0], gaps.percentile(99) - sent[1])


if __name__ == "__main__":
    raise SystemExit(main())
