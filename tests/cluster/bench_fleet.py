"""Measure a fleet: what its front adds to a token, what a death costs, how it grows.

    make bench-fleet

The front stands before a server that answers on schedule (timetable_server.c) and reports when each
token went out. The server has one core; the front and the client share the other, on which the
front has priority. The client's times are the kernel's, so it does not matter when it reads. Other
work on the machine can only add to a figure, so the best of a few runs counts. A sleeping virtual
core is slow to wake, and half a millisecond would show: nothing sleeps here.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launch.front import Front
from launch.nodes import Place
from load.loadgen import measure
from load.metrics import Distribution, mean
from load.payload import RandomPrompts, Requests
from load.target import Load, Target
from tests.bench_client import PROMPT, TOKENS, TTFT_MS, admin, requests, server
from tests.cluster import bench_replicas
from tests.cluster.cluster import PATIENCE, wait_until, why_not
from tests.cluster.launches import ROOT, up_by_front
from tests.conftest import free_port
from tests.test_front import children

STREAMS = {1: 10, 16: 10, 64: 10, 256: 40}  # and their ITL in ms: a larger batch is slower
REPEATS = 5
TTFT_ALLOWED, ITL_ALLOWED = 0.5, 0.1  # ms
JSON = {"Content-Type": "application/json"}
FIRST, THEN = os.sched_param(10), os.sched_param(5)  # both before all else on the machine


def main() -> int:
    if reason := why_not():
        raise SystemExit(f"bench-fleet: {reason}")
    good = what_the_front_adds()
    a_death()
    bench_replicas.main()
    return 0 if good else 1


# --- what the front adds --------------------------------------------------------------------------
@dataclass(frozen=True)
class Added:
    """How much later the client saw a token than the server sent it, in ms."""

    ttft: float
    itl_p99: float


def what_the_front_adds() -> bool:
    print(f"A server with TTFT {TTFT_MS} ms and {TOKENS} tokens; all in ms, later than sent.\n")
    print("| streams | ITL | TTFT direct | by front | added | ITL p99 direct | by front | added |")
    print("|--:" * 8 + "|")
    good = True
    with server() as (port, pid), fronting(port) as front, awake(), shared_cores(pid, front):
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


@contextmanager
def shared_cores(server: int, front: Front) -> Iterator[None]:
    """The server gets one core, the front the other; the client gets that when the front sleeps."""
    one, other, *_ = every = sorted(os.sched_getaffinity(0))
    assert front.step
    [haproxy] = children(front.step.process.pid)
    for pid, core in ((server, one), (haproxy, other)):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})
            os.sched_setscheduler(int(thread.name), os.SCHED_FIFO, FIRST)
    os.sched_setaffinity(0, {other})
    os.sched_setscheduler(0, os.SCHED_FIFO, THEN)
    yield
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.sched_setaffinity(0, every)


@contextmanager
def awake() -> Iterator[None]:
    """Keep every core awake: a loop runs on each while there is nothing else to run."""
    loops = []
    try:
        for core in os.sched_getaffinity(0):
            loops.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            os.sched_setaffinity(loops[-1].pid, {core})
            os.sched_setscheduler(loops[-1].pid, os.SCHED_IDLE, os.sched_param(0))
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


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


# --- a death --------------------------------------------------------------------------------------
def a_death() -> None:
    """One of three servers is killed under 64 streams and 20 new requests a second."""
    ports = [free_port() for _ in range(3)]
    running = [simulator(port) for port in ports]
    try:
        for port in ports:
            wait_until(partial(answers, port, "/health"), "a server")
        with fronting(*ports) as front, ThreadPoolExecutor(128) as pool:
            streams = [pool.submit(ask, front.port, 300) for _ in range(64)]
            time.sleep(2)
            over = threading.Event()
            running[1].kill()
            new = pool.submit(keep_asking, front.port, over)
            out = seconds_until(lambda: not is_up(front.port, "r1"))
            running[1].wait()
            running[1] = simulator(ports[1])
            wait_until(lambda: answers(ports[1], "/health"), "the server again")
            back = seconds_until(lambda: is_up(front.port, "r1"))
            time.sleep(1)
            over.set()
            cut, asked = [each.result() for each in streams].count(False), new.result()
    finally:
        for each in running:
            each.kill()
            each.wait()
    print("\n| streams cut | new requests | failed | out after | in again after it was ready |")
    print("|--:" * 5 + "|")
    print(f"| {cut} of 64 | {len(asked)} | {asked.count(False)} | {out:.2f} s | {back:.2f} s |")


def simulator(port: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, str(ROOT / "simulator/trtllm-serve"), "m", "--port", str(port)]
    env = {**os.environ, "TRTLLM_SIM_LOAD_SECONDS": "1", "TRTLLM_SIM_ITL_MS": "20"}
    null = subprocess.DEVNULL
    return subprocess.Popen(words, env=env, stdin=null, stdout=null, stderr=null)


def ask(port: int, tokens: int) -> bool:
    """Ask for a stream of so many tokens; whether it came whole."""
    body = {"model": "m", "prompt": "x", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("POST", "/v1/completions", json.dumps(body), JSON)
        return b"[DONE]" in connection.getresponse().read()
    return False


def keep_asking(port: int, over: threading.Event) -> list[bool]:
    """Send a short request every 50 ms, each on a connection of its own."""
    with ThreadPoolExecutor(32) as pool:
        asked = []
        while not over.wait(0.05):
            asked.append(pool.submit(ask, port, 1))
        return [each.result() for each in asked]


def answers(port: int, path: str) -> bytes:
    url = f"http://127.0.0.1:{port}{path}"
    with contextlib.suppress(OSError), urllib.request.urlopen(url) as answer:
        return bytes(answer.read()) or b"yes"
    return b""


def is_up(port: int, name: str) -> bool:
    """Whether the front says that a replica is up."""
    return name in up_by_front(answers(port, "/router/metrics").decode())


def seconds_until(condition: Callable[[], bool]) -> float:
    begun = time.monotonic()
    wait_until(condition, "a change of the front's mind")
    return time.monotonic() - begun


if __name__ == "__main__":
    raise SystemExit(main())
