"""One epoll loop that sends requests and keeps what comes back, as bytes and arrival times.

Nothing is understood while it has anything better to do: answers are read (answer.py) when they are
whole and no socket is ready.
"""

from __future__ import annotations

import random
import select
import signal
import socket
import ssl
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress

from common.ask import tls_context
from common.response import Malformed, Reply
from common.signals import Stopped
from load.answer import Outcome, read_reply
from load.connection import CONNECT_TIMEOUT, SECOND, Address, Step, Stream
from load.target import Load, LoadError, Progress, Target

CONNECTS_AT_ONCE = 64  # a server's listen queue can be short
SPARE_CONNECTIONS = 8  # open loop: so many are kept open and free, so that no request waits for one
UNREAD_LIMIT = 48 << 20  # bytes of ended answers kept before the loop stops to read one
PREPARED_LIMIT = 16 << 20  # bytes of requests written ahead of time
PREOPENED = 64  # open loop: how many requests will be in flight is not known
RAMP = 100_000  # ns between a closed loop's first requests; a burst would queue on the sockets
MAX_EVENTS = 64  # then look at the clock again


class Loop:
    """The `shard`-th of every `shards` requests of a load, over one epoll."""

    def __init__(self, load: Load, progress: Progress, shard: int = 0, shards: int = 1) -> None:
        self.load, self.progress = load, progress
        self.shard, self.shards = shard, shards
        self.indices = range(shard, load.count, shards)
        self.width = len(range(shard, load.width, shards))
        self.arrivals: Iterator[int] = iter(())
        self.address = resolve(load.target)
        self.tls = trusted(load.target) if load.target.tls else None
        self.epoll = select.epoll()
        self.ready: dict[int, Step] = {}
        self.streams: set[Stream] = set()
        self.spare: list[Stream] = []  # connected, without a request
        self.running = False
        self.closing = False  # the server closes after each answer: it may have few workers
        self.refused = False  # a spare connection was; from then on only requests open them
        self.due: int | None = None  # open loop: when the next request is meant to go out
        self.requests: deque[bytes] = deque()  # written ahead of time
        self.written = self.next = self.finished = self.failed = self.tokens = 0
        self.unread: deque[tuple[Outcome, Reply]] = deque()
        self.unread_bytes = self.tick = self.unstamped = 0
        self.hung = 0  # requests in a row that took too long
        self.clock = time.time_ns() - time.monotonic_ns()
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
        # A server with few workers reads from those it accepted first.
        self.spare.sort(key=lambda stream: stream.since, reverse=True)
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
        if self.none_left():
            stream.close()
        else:
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
        self.closing = stream.reply.head is not None and stream.reply.head.close
        self.unread_bytes += len(stream.reply.raw)
        self.finished += 1
        self.hung = 0
        if self.none_left():
            stream.close()  # idle, it may hold the worker that another stream is waiting for
        elif not self.load.open_loop:
            self.dispatch(stream, when)
        elif stream.sock:
            self.spare.append(stream)
        else:
            self.streams.discard(stream)

    # sending

    def none_left(self) -> bool:
        return self.next == len(self.indices)

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
            if self.none_left():  # the first streams were quick and took them all
                self.due = None
                break
            stream = self.spare.pop() if self.spare else self.new_stream()
            due, self.due = self.due, next(self.arrivals, None)
            self.dispatch(stream, due)
        if self.due is None:
            while self.spare:
                self.spare.pop().close()
        elif self.load.open_loop and not (self.refused or self.closing):
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
                self.turn(self.poll())
                if self.due is not None:
                    self.send_due()
                while self.unread_bytes > UNREAD_LIMIT:
                    self.read_answer()
        except Stopped as stopped:  # what has ended is worth having
            self.stopped = stopped.args[0]
            self.cut = f"stopped by {signal.Signals(self.stopped).name}"
        while self.read_answer():
            pass

    def turn(self, events: list[tuple[int, int]]) -> None:
        ready, now = self.ready, time.time_ns()
        for fd, _ in events:
            ready[fd](now)
        if not 0 <= self.tick - now <= SECOND // 4:
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
        step = time.time_ns() - time.monotonic_ns() - self.clock
        if abs(step) > SECOND:  # no time is true any more, neither a limit nor when one is due
            self.cut = f"the clock was set by {step / SECOND:,.0f} s"
            return
        for stream in [s for s in self.streams if s.is_done(now)]:
            stream.leave(now)
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


def trusted(target: Target) -> ssl.SSLContext:
    try:
        return tls_context(target.verify)
    except Malformed as e:
        raise LoadError(str(e)) from None


def resolve(target: Target) -> Address:
    """The first of a name's addresses where something listens: localhost often has two."""
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except OSError as e:
        raise LoadError(f"cannot resolve {target.host}: {e.strerror}") from None
    return next((a for a in found if len(found) == 1 or is_open(a)), found[0])


def is_open(address: Address) -> bool:
    with suppress(OSError), socket.socket(*address[:3]) as sock:  # a kernel may have no IPv6
        sock.settimeout(CONNECT_TIMEOUT)
        return sock.connect_ex(address[4]) == 0
    return False
