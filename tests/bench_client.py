#!/usr/bin/env python3
"""Measure the measuring client: what loadgen.py reports against what a server really sent.

The server (timetable_server.c, compiled here) answers by the clock and keeps its own statistics. It
gets one core, the client another. Each line is the median of a few runs; one in which the client
itself says that it could not keep up (others were using its core) is made again, as bench.py does.

    python tests/bench_client.py [--repeat 3] [--streams 1,16,64,256,1024]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from load.loadgen import measure  # noqa: E402
from load.metrics import Distribution, Wanted, client_facts, mean, summarise  # noqa: E402
from load.payload import RandomPrompts, Requests  # noqa: E402
from load.target import Load, Result, Target  # noqa: E402

TTFT_MS, ITL_MS, TOKENS, PROMPT = 50, 10, 128, 16
ROUNDS, FEWEST, ATTEMPTS = 4, 8, 3
ALLOWED_MS = 0.5
PEER = 1691  # requests/s: what a peer does; the ceiling may not be lower
CEILING_STREAMS, CEILING_REQUESTS = 64, 4000
MEMORY_STREAMS, MEMORY_REQUESTS, MEMORY_MB = 1024, 10_000, 300


@dataclass(frozen=True)
class Point:
    """One run: the server's truth, and what the client made of it."""

    ttft: tuple[float, float]
    itl_p99: tuple[float, float]
    rate: float
    cpu: float
    kept_up: bool

    @property
    def error(self) -> float:
        return max(abs(client - server) for server, client in (self.ttft, self.itl_p99))


@contextmanager
def server() -> Iterator[tuple[int, int]]:
    """The timetable server on a port that is free: the port and its process."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "timetable_server"
        source = HERE / "timetable_server.c"
        subprocess.run(["cc", "-O2", "-o", str(program), str(source)], check=True)
        with subprocess.Popen([str(program), "0"], stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout
                yield int(process.stdout.readline()), process.pid
            finally:
                process.terminate()


def separate_cores(pid: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("only one core: server and client share it", file=sys.stderr)
        return
    os.sched_setaffinity(pid, {cores[0]})
    os.sched_setaffinity(0, {cores[1]})


def admin(port: int, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/admin/{path}") as answer:
        return json.load(answer)


def run(
    port: int, streams: int, count: int, ttft: float, itl: float,
    prompt: int = PROMPT, tokens: int = TOKENS,
) -> tuple[Load, Any, Result]:  # fmt: skip
    admin(port, f"config?ttft_ms={ttft}&itl_ms={itl}")
    body = Requests("timetable", RandomPrompts(prompt, tokens, "0"))
    load = Load(Target("127.0.0.1", port), "/v1/completions", body, count, streams, shards=1)
    result = measure(load)
    if failed := [o.error for o in result.outcomes if o.error]:
        raise SystemExit(f"{len(failed)} requests failed: {failed[0]}")
    return load, admin(port, "stats"), result


def requests(streams: int) -> int:
    return max(ROUNDS * streams, FEWEST)


def once(port: int, streams: int, count: int, ttft: float, itl: float) -> tuple[Point, list[str]]:
    """One run, and what bench.py would say against it."""
    load, truth, result = run(port, streams, count, ttft, itl)
    gaps = Distribution(gap for o in result.outcomes for gap in o.gaps)
    problems = client_facts(load, result, gaps.mean())["problems"]
    return Point(
        (truth["ttft_ms"]["mean"], mean((o.first - o.sent) / 1e6 for o in result.outcomes)),
        (truth["itl_ms"]["p99"], gaps.percentile(99)),
        truth["requests_per_s"],
        result.cpu,
        not problems,
    ), problems


def point(port: int, streams: int) -> Point:
    """A run that bench.py would call valid: the client was not held up by others."""
    for _ in range(ATTEMPTS):
        found, problems = once(port, streams, requests(streams), TTFT_MS, ITL_MS)
        if found.kept_up:
            break
        print(f"{streams} streams, again: {problems[0]}", file=sys.stderr)
    return found


def middle(points: Sequence[Point]) -> Point:
    kept = [p for p in points if p.kept_up] or list(points)
    return sorted(kept, key=lambda p: p.error)[len(kept) // 2]


def ceiling(port: int) -> float:
    """Requests a second when the server takes no time at all."""
    _, truth, _ = run(port, CEILING_STREAMS, CEILING_REQUESTS, 0, 0)
    return float(truth["requests_per_s"])


def peak_memory(port: int) -> int:
    """MB, after many streams and many requests, and what bench.py makes of them."""
    lengths = {"prompt": 512, "tokens": 256}
    load, _, result = run(port, MEMORY_STREAMS, MEMORY_REQUESTS, TTFT_MS, ITL_MS, **lengths)
    summarise(load, result, Wanted("timetable", 256, 512), {})
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def row(streams: int, p: Point) -> str:
    pairs = " | ".join(f"{s:.2f} | {c:.2f} | {c - s:+.2f}" for s, c in (p.ttft, p.itl_p99))
    return f"| {streams} | {pairs} | {p.rate:.0f} | {p.cpu:.0%} |" + (
        "" if p.kept_up else " the machine was too busy"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--streams", default="1,16,64,256,1024")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    worst = 0.0
    with server() as (port, pid):
        separate_cores(pid)
        print(f"Timetable: TTFT {TTFT_MS} ms, ITL {ITL_MS} ms, {TOKENS} tokens; all in ms.\n")
        print("| streams | TTFT sent | measured | error | ITL p99 sent | measured | error "
              "| requests/s | client CPU |")  # fmt: skip
        print("|--:" * 9 + "|")
        for streams in map(int, args.streams.split(",")):
            best = middle([point(port, streams) for _ in range(args.repeat)])
            worst = max(worst, best.error)
            print(row(streams, best), flush=True)
        rate = statistics.median(ceiling(port) for _ in range(args.repeat))
        print(f"\nCeiling (no waiting, {CEILING_STREAMS} streams): {rate:.0f} requests/s, "
              f"a peer's: {PEER}")  # fmt: skip
        memory = peak_memory(port)
        print(f"Memory at {MEMORY_STREAMS} streams x {MEMORY_REQUESTS} requests of 512/256 tokens: "
              f"{memory} MB")  # fmt: skip
    good = worst <= ALLOWED_MS and memory < MEMORY_MB and rate >= PEER
    print(f"Worst error: {worst:.2f} ms (allowed: {ALLOWED_MS})" + ("" if good else ": TOO MUCH"))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
