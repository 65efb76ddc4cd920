"""Put a load on an OpenAI-compatible server and measure when each token came.

One epoll loop sends requests and keeps what comes back, as bytes, with the *kernel's* arrival
times (SO_TIMESTAMPING): a client that is late to read must not look like a server that was late to
answer. Answers are understood (response.py) when they are whole and the loop has nothing to do.
Linux and the standard library only.

Closed loop: `streams` requests are in flight, a new one follows each that ends; a latency counts
from the moment its request was sent. Open loop (a finite `rate`): requests go out at their own
times, however the server does; a latency counts from when its request was *meant* to go out.

    target = Target("localhost", 8000)
    result = measure(Load(target, "/v1/completions", body=lambda i: b"{...}", count=100, streams=4))
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import select
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.ask import tls_context
from common.response import Outcome, Reply, read_reply
from common.signals import SIGNALS, Stopped
from load.connection import CONNECT_TIMEOUT, SECOND, Step, Stream

CONNECTS_AT_ONCE = 64  # a server's listen queue can be short
SPARE_CONNECTIONS = 8  # open loop: so many are kept open and free, so that no request waits for one
UNREAD_LIMIT = 48 << 20  # bytes of ended answers kept before the loop stops to read one
PREPARED_LIMIT = 16 << 20  # bytes of requests written ahead of time
STREAMS_A_SHARD, MOST_STREAMS_A_SHARD = 256, 1024
PREOPENED = 64  # open loop: how many requests will be in flight is not known
RAMP = 100_000  # ns between a closed loop's first requests; a burst would queue on the sockets
MAX_EVENTS = 64  # then look at the clock again


class LoadError(Exception):
    """The load cannot be put on the server at all."""


class CutShort(Stopped):
    """A signal ended a measurement; `result` holds what came until then."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.stopped)
        self.result = result


@dataclass(frozen=True)
class Target:
    host: str
    port: int
    tls: bool = False
    api_key: str = ""
    verify: bool = True

    def without_key(self, text: str) -> str:
        """Some servers repeat what they refuse."""
        return text.replace(self.api_key, "***") if self.api_key else text

    def request(self, path: str, body: bytes) -> bytes:
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {host}:{self.port}\r\n{key}"
            f"Accept: text/event-stream\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass(frozen=True)
class Load:
    """What to send, how much of it, and how fast."""

    target: Target
    path: str
    body: Callable[[int], bytes]
    count: int
    streams: int | None = None  # most requests in flight; None: no limit
    rate: float = math.inf  # requests a second
    burstiness: float = 1.0  # 1 is Poisson, less comes in bursts, more is evener
    timeout: float = 600.0  # seconds a request may take
    seed: int = 0
    chat: bool = False
    shards: int = 0  # processes; 0: as many as the load needs
    largest: int = 64 << 20  # bytes of an answer; a server that never ends must not fill our memory

    @property
    def open_loop(self) -> bool:
        return math.isfinite(self.rate)

    @property
    def width(self) -> int:
        return min(self.streams or self.count, self.count)


@dataclass
class Result:
    outcomes: list[Outcome]
    cut: str = ""  # why it ended before all requests had
    stopped: int = 0  # the signal that ended it
    kernel_stamps: bool = True
    shards: int = 1
    clock_step: float = 0.0  # ms that the wall clock moved against the monotonic one
    lags: Counter[int] = field(default_factory=Counter)  # reads by their lateness, in 0.1 ms
    cpu: float = 0.0  # the busiest process: share of a core
    waited: float = 0.0  # ms in which it was ready to run and others had its core


Progress = Callable[[int, int, int], None]  # requests done, requests failed, tokens received
Address = tuple[Any, Any, int, str, Any]
Pipe = Any  # multiprocessing's connection, whose class differs between Python versions


def no_progress(done: int, failed: int, tokens: int) -> None:
    """For callers that do not watch."""


# --- the loop -------------------------------------------------------------------------------------


class Loop:
    """The `shard`-th of every `shards` requests of a load, over one epoll."""

    def __init__(self, load: Load, progress: Progress, shard: int = 0, shards: int = 1) -> None:
        self.load, self.progress = load, progress
        self.shard, self.shards = shard, shards
        self.indices = range(shard, load.count, shards)
        self.width = len(range(shard, load.width, shards))
        self.arrivals: Iterator[int] = iter(())
        self.address = resolve(load.target)
        self.tls = tls_context(load.target.verify) if load.target.tls else None
        self.epoll = select.epoll()
        self.ready: dict[int, Step] = {}
        self.streams: set[Stream] = set()
        self.spare: list[Stream] = []  # connected, without a request
        self.running = False
        self.refused = False  # a spare connection was; from then on only requests open them
        self.due: int | None = None  # open loop: when the next request is meant to go out
        self.requests: deque[bytes] = deque()  # written ahead of time
        self.written = self.next = self.finished = self.failed = self.tokens = 0
        self.unread: deque[tuple[Outcome, Reply]] = deque()
        self.unread_bytes = self.tick = self.unstamped = 0
        self.hung = 0  # requests in a row that took too long
        self.cut, self.stopped = "", 0  # why it ends early, and by which signal
        self.outcomes: list[Outcome] = []
        self.lags: Counter[int] = Counter()

    # before the clock starts

    def connect(self) -> None:
        """Open the connections, and write the first requests."""
        wanted = min(self.width, PREOPENED) if self.load.open_loop else self.width
        while len(self.spare) < wanted:
            while len(self.streams) < min(wanted, len(self.spare) + CONNECTS_AT_ONCE):
                self.new_stream().open()
            self.turn(self.epoll.poll(0.25, MAX_EVENTS))
        while self.write_request():
            pass

    def new_stream(self) -> Stream:
        stream = Stream(self)
        self.streams.add(stream)
        return stream

    # what streams call

    def watch(self, stream: Stream, step: Step, events: int, known: bool = False) -> None:
        self.ready[stream.fd] = step
        (self.epoll.modify if known else self.epoll.register)(stream.fd, events)

    def forget(self, stream: Stream) -> None:
        del self.ready[stream.fd]
        self.epoll.unregister(stream.fd)

    def receiver(self, stream: Stream) -> Step:
        return stream.receive_tls if self.tls else stream.receive

    def opened(self, stream: Stream) -> None:
        self.spare.append(stream)

    def lost(self, stream: Stream, why: str) -> None:
        """A connection without a request is gone."""
        target = self.load.target
        if not self.running:
            raise LoadError(f"cannot connect to {target.host}:{target.port}: {why}")
        if self.load.open_loop:
            self.streams.discard(stream)
            if stream in self.spare:
                self.spare.remove(stream)
            else:
                self.refused = True

    def ended(self, stream: Stream, outcome: Outcome, when: int) -> None:
        self.unread.append((outcome, stream.reply))
        self.unread_bytes += len(stream.reply.raw)
        self.finished += 1
        self.hung = 0
        if not self.load.open_loop:
            if self.next < len(self.indices):
                self.dispatch(stream, when)
        elif stream.sock:
            self.spare.append(stream)
        else:
            self.streams.discard(stream)

    # sending

    def dispatch(self, stream: Stream, intended: int) -> None:
        if not self.requests:
            self.write_request()
        request = self.requests.popleft()
        self.written -= len(request)
        index = self.indices[self.next]
        self.next += 1
        stream.send(index, request, intended)

    def write_request(self) -> bool:
        """Prepare one more request; false when none is left or enough are waiting."""
        position = self.next + len(self.requests)
        if position >= len(self.indices) or self.written > PREPARED_LIMIT:
            return False
        body = self.load.body(self.indices[position])
        self.requests.append(self.load.target.request(self.load.path, body))
        self.written += len(self.requests[-1])
        return True

    def send_due(self) -> None:
        """Send what is due; at the limit of streams it waits, and its lateness says so."""
        while self.due is not None and self.due <= time.time_ns() and not self.full():
            if self.next == len(self.indices):  # the first streams were quick and took them all
                self.due = None
                return
            stream = self.spare.pop() if self.spare else self.new_stream()
            due, self.due = self.due, next(self.arrivals, None)
            self.dispatch(stream, due)
        if self.load.open_loop and self.due and not self.refused:
            self.keep_spares()

    def keep_spares(self) -> None:
        opening = sum(s.opening and s.outcome is None for s in self.streams)
        if len(self.spare) + opening < SPARE_CONNECTIONS and len(self.streams) < self.width:
            self.new_stream().open()

    def full(self) -> bool:
        return not self.spare and len(self.streams) >= self.width

    # reading

    def read_answer(self) -> bool:
        if not self.unread:
            return False
        outcome, reply = self.unread.popleft()
        self.unread_bytes -= len(reply.raw)
        self.outcomes.append(read_reply(reply, outcome, self.load.chat))
        outcome.error = self.load.target.without_key(outcome.error)
        self.failed += bool(outcome.error)
        self.tokens += outcome.output_tokens or 0
        self.lags.update([(b - a) // 100_000 for a, b in zip(reply.stamps, reply.seen)])  # noqa: B905
        return True

    # turning

    def run(self, start: int) -> None:
        """Send, receive, and read in the pauses, until every request has ended, or it is cut."""
        self.running = True
        self.arrivals = arrivals(self.load, self.shard, self.shards, start)
        self.due = next(self.arrivals)
        try:
            while self.finished < len(self.indices) and not self.cut:
                self.step()
        except Stopped as stopped:  # what has ended is worth having
            self.stopped = stopped.args[0]
            self.cut = f"stopped by {signal.Signals(self.stopped).name}"
        while self.read_answer():
            pass

    def step(self) -> None:
        self.turn(self.poll())
        if self.due is not None:
            self.send_due()
        while self.unread_bytes > UNREAD_LIMIT:
            self.read_answer()

    def turn(self, events: list[tuple[int, int]]) -> None:
        ready, now = self.ready, time.time_ns()
        for fd, _ in events:
            ready[fd](now)
        if now > self.tick:
            self.tick = now + SECOND // 4
            self.look_after(now)

    def poll(self) -> list[tuple[int, int]]:
        events = self.epoll.poll(0, MAX_EVENTS)
        if events:
            return events
        if self.read_answer() or self.write_request():
            return []
        return self.sleep()

    def sleep(self) -> list[tuple[int, int]]:
        if self.due is None or self.full():
            return self.epoll.poll(0.25, MAX_EVENTS)
        delay = (self.due - time.time_ns()) / SECOND
        if delay > 0.004:
            return self.epoll.poll(min(delay - 0.002, 0.25), MAX_EVENTS)
        if delay > 0:  # epoll's own time-out counts whole milliseconds, select's does not
            select.select((self.epoll,), (), (), delay)
        return self.epoll.poll(0, MAX_EVENTS)

    def look_after(self, now: int) -> None:
        """Four times a second: requests that take too long, and a word on how far we are."""
        for stream in [s for s in self.streams if s.expired(now)]:
            hung = self.hung + (stream.outcome is not None)
            stream.broken(stream.too_late(), retry=False)
            self.hung = hung
        self.give_up_on_a_server_that_hangs()
        self.progress(self.finished, self.failed, self.tokens)

    def give_up_on_a_server_that_hangs(self) -> None:
        """Each of its requests would take the whole timeout. One alone may just be slow."""
        rest = self.finished < len(self.indices) or self.hung == self.finished
        if rest and self.hung >= max(self.width, 2):
            self.cut = (f"the server hangs: {self.hung} requests in a row had no whole answer "
                        f"within {self.load.timeout:g} s")  # fmt: skip

    def has_stamps(self) -> bool:
        """Not with TLS, and not every kernel gives them; the first packets may go without."""
        return not self.tls and self.unstamped <= self.lags.total() / 2

    def close(self) -> None:
        for stream in self.streams:
            stream.close()
        self.epoll.close()


def arrivals(load: Load, shard: int, shards: int, start: int) -> Iterator[int]:
    """When this shard's requests are due; in a closed loop, only the first on each stream."""
    rng, at = random.Random(load.seed), float(start)
    for index in range(load.count if load.open_loop else load.width):
        if index % shards == shard:
            yield int(at)
        at += gap_of(load, rng) if load.open_loop else RAMP


def gap_of(load: Load, rng: random.Random) -> float:
    return rng.gammavariate(load.burstiness, SECOND / (load.rate * load.burstiness))


def resolve(target: Target) -> Address:
    """The first of a name's addresses where something listens: localhost often has two."""
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except OSError as e:
        raise LoadError(f"cannot resolve {target.host}: {e.strerror}") from None
    return next((a for a in found if len(found) == 1 or is_open(a)), found[0])


def is_open(address: Address) -> bool:
    with socket.socket(*address[:3]) as sock:
        sock.settimeout(CONNECT_TIMEOUT)
        return sock.connect_ex(address[4]) == 0


# --- measuring ------------------------------------------------------------------------------------


def measure(load: Load, progress: Progress = no_progress) -> Result:
    """Put the load on, from as many processes as it needs. CutShort where a signal ends it."""
    shards = shards_for(load, len(os.sched_getaffinity(0)))
    allow_files(load.width // shards + 64)
    result = (
        measure_here(load, progress) if shards == 1 else measure_sharded(load, shards, progress)
    )
    if result.stopped:
        raise CutShort(result)
    return result


def shards_for(load: Load, cores: int) -> int:
    """How many processes: at ease on half of the cores (others need theirs), else what it takes."""
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
    """Arrival stamps are wall-clock time: when that steps, they are wrong."""
    return time.time_ns() - time.monotonic_ns()


def time_without_core() -> int:
    """ns that this process was ready to run and did not; 0 where the kernel does not tell."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection while measuring, and no other work first where it may say so (root).

    It runs for microseconds at a time, but has to do so when packets come: late by a token's time,
    it finds two tokens under one stamp.
    """
    was_on, policy, priority = gc.isenabled(), os.sched_getscheduler(0), os.sched_getparam(0)
    gc.collect()
    gc.disable()
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setscheduler(0, policy, priority)
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
            worker.kill()  # it is deaf to other signals
            worker.join()


def results(pipes: list[Pipe], progress: Progress) -> list[Result]:
    """What every worker measured: after a signal, until then."""
    found: dict[Pipe, Result] = {}
    try:
        hear(pipes, "result", progress, found)
    except Stopped as stopped:
        for pipe in pipes:
            with suppress(OSError):  # one that is done has gone
                pipe.send(stopped.args[0])
        hear(pipes, "result", no_progress, found)
    return list(found.values())


def hear(pipes: list[Pipe], kind: str, progress: Progress, found: dict[Pipe, Any]) -> None:
    """One message of this kind from every worker; their progress is passed on as a sum."""
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
    for each in SIGNALS:  # they are the parent's to act on: a ^C, or Slurm's end, comes to all
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
