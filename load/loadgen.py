"""Put a load on an OpenAI-compatible server and measure when each token came.

One epoll loop sends requests and keeps what comes back, as bytes, with the *kernel's* arrival
times (SO_TIMESTAMPING): a client that reads late must not look like a server that answers late.
Answers are parsed (answer.py) once they are complete and the loop has nothing to do. Linux and the
standard library only.

Closed loop: `streams` requests are in flight, and each that ends is followed by a new one; latency
counts from the moment a request was sent. Open loop (a finite `rate`): requests go out at their own
times, however the server does; latency counts from when a request was *meant* to go out.

    target = Target("localhost", 8000)
    result = measure(Load(target, "/v1/completions", body=lambda i: b"{...}", count=100, streams=4))
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.signals import SIGNALS, Stopped
from load.connection import SECOND
from load.loop import Loop
from load.target import CutShort, Load, LoadError, Progress, Result, no_progress

STREAMS_A_SHARD, MOST_STREAMS_A_SHARD = 256, 1024

Pipe = Any  # multiprocessing's connection, whose class differs between Python versions

# --- measuring ------------------------------------------------------------------------------------


def measure(load: Load, progress: Progress = no_progress) -> Result:
    """Put the load on, from as many processes as needed. CutShort if a signal ends it."""
    shards = shards_for(load, len(os.sched_getaffinity(0)))
    allow_files(load.width // shards + 64)
    one = shards == 1
    result = measure_here(load, progress) if one else measure_sharded(load, shards, progress)
    if result.stopped:
        raise CutShort(result)
    return result


def shards_for(load: Load, cores: int) -> int:
    """How many processes: as many as half of the cores hold at ease, and more only if needed."""
    known = 0 if load.open_loop and load.streams is None else load.width  # streams in flight
    at_ease = min(cores // 2, math.ceil(known / STREAMS_A_SHARD))
    needed = min(cores, math.ceil(load.width / MOST_STREAMS_A_SHARD))
    return max(1, min(load.shards or max(at_ease, needed), load.width))


def measure_here(
    load: Load,
    progress: Progress,
    shard: int = 0,
    shards: int = 1,
    go: Callable[[], int] = time.time_ns,
) -> Result:
    loop = Loop(load, progress, shard, shards)
    try:
        loop.connect()
        with undisturbed():
            start = go()
            offset, cpu, waited = clock_offset(), time.process_time(), time_without_core()
            time.sleep(max(0.0, (start - time.time_ns()) / SECOND))
            loop.run(start)
        return Result(
            outcomes=loop.outcomes,
            cut=loop.cut,
            stopped=loop.stopped,
            kernel_stamps=loop.has_stamps(),
            clock_step=(clock_offset() - offset) / 1e6,
            lags=loop.lags,
            cpu=(time.process_time() - cpu) * SECOND / max(time.time_ns() - start, 1),
            waited=(time_without_core() - waited) / 1e6,
        )
    finally:
        loop.close()


def clock_offset() -> int:
    """Wall clock less monotonic clock, in ns. If it changes, arrival stamps are wrong."""
    return time.time_ns() - time.monotonic_ns()


def time_without_core() -> int:
    """ns that this process was ready but waited for a core; 0 if the kernel does not tell."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0


@contextmanager
def undisturbed() -> Iterator[None]:
    """While measuring: no garbage collection, and real-time priority where that is allowed (root).

    We run for microseconds at a time, but must do so when packets come: if we are late by the time
    of a token, two tokens share one stamp.
    """
    was_on, before = gc.isenabled(), None
    gc.collect()
    gc.disable()
    with suppress(OSError):  # musl, Alpine's C library, does not have these calls
        before = os.sched_getscheduler(0), os.sched_getparam(0)
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        with suppress(OSError):
            if before:
                os.sched_setscheduler(0, *before)
        if was_on:
            gc.enable()


def allow_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    elif wanted > hard:
        raise LoadError(f"{wanted} open files are needed, and `ulimit -n` allows {hard}")


# --- several processes ----------------------------------------------------------------------------


def measure_sharded(load: Load, shards: int, progress: Progress) -> Result:
    """Each process takes every `shards`-th request; all start together once all have connected."""
    context = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for shard in range(shards):
        ours, theirs = context.Pipe()
        workers.append(
            context.Process(target=work, args=(load, shard, shards, theirs), daemon=True)
        )
        workers[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        hear(pipes, "connected", no_progress, {})
        start = time.time_ns() + SECOND // 50
        for pipe in pipes:
            pipe.send(start)
        return merged(results(pipes, progress))
    finally:
        for worker in workers:
            worker.kill()  # it ignores other signals
            worker.join()


def results(pipes: list[Pipe], progress: Progress) -> list[Result]:
    """What every worker measured; after a signal, what it had measured until then."""
    found: dict[Pipe, Result] = {}
    try:
        hear(pipes, "result", progress, found)
    except Stopped as stopped:
        for pipe in pipes:
            with suppress(OSError):  # a worker that is done has gone
                pipe.send(stopped.args[0])
        hear(pipes, "result", no_progress, found)
    return list(found.values())


def hear(pipes: list[Pipe], kind: str, progress: Progress, found: dict[Pipe, Any]) -> None:
    """Wait for a message of this kind from every worker; their progress is passed on as a sum."""
    counts: dict[Any, tuple[int, int, int]] = {}
    while len(found) < len(pipes):
        for pipe in multiprocessing.connection.wait([p for p in pipes if p not in found]):
            what, value = receive(pipe)
            if what == kind:
                found[pipe] = value
            elif what == "progress":
                counts[pipe] = value
                done, failed, tokens = (
                    sum(column) for column in zip(*counts.values(), strict=True)
                )
                progress(done, failed, tokens)
            else:
                raise LoadError(value)


def receive(pipe: Pipe) -> tuple[str, Any]:
    try:
        what, value = pipe.recv()
    except EOFError:
        return "error", "a process of the load generator died"
    return what, value


def work(load: Load, shard: int, shards: int, pipe: Pipe) -> None:
    for each in SIGNALS:  # the parent handles them: a ^C, or Slurm's end, reaches all processes
        signal.signal(each, signal.SIG_IGN)

    def connected() -> int:
        pipe.send(("connected", None))
        return int(pipe.recv())

    def progress(*counts: int) -> None:
        pipe.send(("progress", counts))
        if pipe.poll():
            raise Stopped(pipe.recv())

    try:
        pipe.send(("result", measure_here(load, progress, shard, shards, connected)))
    except LoadError as e:
        pipe.send(("error", str(e)))


def merged(results: list[Result]) -> Result:
    return Result(
        outcomes=sorted((o for r in results for o in r.outcomes), key=lambda o: o.index),
        cut=next((r.cut for r in results if r.cut), ""),
        stopped=max(r.stopped for r in results),
        kernel_stamps=all(r.kernel_stamps for r in results),
        shards=len(results),
        clock_step=max((r.clock_step for r in results), key=abs),
        lags=sum((r.lags for r in results), Counter()),
        cpu=max(r.cpu for r in results),
        waited=max(r.waited for r in results),
    )
