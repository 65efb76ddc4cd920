"""One connection of the load generator, and its current request.

When the socket is ready, the loop calls the current step: connected, handshake, idle, flush or
receive. While a request is measured only `receive` runs; it notes bytes and the kernel's stamp.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from common.response import NO_ANSWER, Malformed, Reply
from load.answer import HELD_OPEN, Outcome
from load.target import Load

SO_TIMESTAMPING = getattr(socket, "SO_TIMESTAMPING", 37)
RX_SOFTWARE = 1 << 3 | 1 << 4  # SOF_TIMESTAMPING_RX_SOFTWARE | SOF_TIMESTAMPING_SOFTWARE
read_timespec = struct.Struct("qq").unpack_from
READ_SIZE = 1 << 16
ANCILLARY_SIZE = 128
SECOND = 1_000_000_000
CONNECT_TIMEOUT = 10.0
BARE_END = b"\n0\n\n"  # of chunks; no JSON text, and no event, ends like this
TOO_LATE = "no whole answer within"
END_WITHIN = SECOND // 10  # ns to wait after [DONE]; the loop looks four times a second
RETRY_WITHIN = SECOND // 10  # a connection that breaks this soon was closed before our request came

Step = Callable[[int], None]  # what to do when the socket is ready; given the time
Address = tuple[Any, Any, int, str, Any]


class Owner(Protocol):
    """The loop, as its connections see it."""

    load: Load
    address: Address
    tls: ssl.SSLContext | None
    ready: dict[int, Step]
    unstamped: int  # reads without a kernel timestamp

    def watch(self, stream: Stream, step: Step, events: int, known: bool = False) -> None:
        """Run `step` when the socket is ready; `known` if it is watched already."""

    def forget(self, stream: Stream) -> None:
        """Stop watching it."""

    def receiver(self, stream: Stream) -> Step:
        """The step that reads, with or without TLS."""

    def opened(self, stream: Stream) -> None:
        """It is connected, and free."""

    def lost(self, stream: Stream, why: str) -> None:
        """It is gone, and carried no request."""

    def ended(self, stream: Stream, outcome: Outcome, when: int) -> None:
        """Its request has ended, successfully or not."""


class Stream:
    """A connection that stays open between requests and is reopened if the server closes it."""

    def __init__(self, loop: Owner) -> None:
        self.loop = loop
        self.sock: socket.socket | None = None
        self.fd = -1
        self.served = 0  # answers that came over this connection
        self.request = b""
        self.unsent: memoryview | None = None
        self.outcome: Outcome | None = None
        self.reply = Reply()
        self.opening = False
        self.since = 0  # when it began to open
        self.took = 0  # ns to open it: at least one round trip
        self.error = 0

    # opening

    def open(self) -> None:
        family, kind, protocol, _, address = self.loop.address
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self.loop.tls:
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, RX_SOFTWARE)
        self.sock, self.fd, self.served, self.opening = sock, sock.fileno(), 0, True
        self.since = time.time_ns()
        self.error = sock.connect_ex(address)
        self.loop.watch(self, self.connected, select.EPOLLOUT)

    def connected(self, now: int) -> None:
        assert self.sock
        error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or self.error
        if error not in (0, errno.EINPROGRESS):
            return self.broken(os.strerror(error))
        if self.loop.tls:
            self.sock = self.loop.tls.wrap_socket(
                self.sock, server_hostname=self.loop.load.target.host, do_handshake_on_connect=False
            )
            self.loop.watch(self, self.handshake, select.EPOLLIN, known=True)
            return self.handshake(now)
        self.opened()

    def handshake(self, now: int) -> None:
        assert isinstance(self.sock, ssl.SSLSocket)
        try:
            self.sock.do_handshake()
        except ssl.SSLWantReadError:
            return
        except OSError as e:
            return self.broken(f"TLS: {e}")
        self.opened()

    def opened(self) -> None:
        self.opening, self.took = False, time.time_ns() - self.since
        self.loop.watch(self, self.idle, select.EPOLLIN, known=True)
        if self.outcome:
            self.outcome.connect = self.took
            self.transmit()
        else:
            self.loop.opened(self)

    # sending

    def send(self, index: int, request: bytes, intended: int) -> None:
        self.request, self.reply = request, Reply()
        self.outcome = Outcome(index, intended, 0)
        if self.sock:
            self.transmit()
        else:
            self.open()

    def transmit(self) -> None:
        assert self.sock and self.outcome
        self.loop.ready[self.fd] = self.loop.receiver(self)
        sent = time.time_ns()
        if self.outcome.retried:  # what the broken connection cost is not the server's latency
            self.outcome.intended += sent - self.outcome.sent
        self.outcome.sent = sent
        try:
            count = self.sock.send(self.request)
        except (BlockingIOError, ssl.SSLWantWriteError):
            count = 0
        except OSError as e:
            return self.broken(e.strerror or str(e))
        if count < len(self.request):
            self.unsent = memoryview(self.request)[count:]
            self.loop.watch(self, self.flush, select.EPOLLIN | select.EPOLLOUT, known=True)

    def flush(self, now: int) -> None:
        """Send the rest of a long request, and read: an error may come before it is all sent."""
        assert self.sock and self.unsent is not None
        try:
            self.unsent = self.unsent[self.sock.send(self.unsent) :]
        except (BlockingIOError, ssl.SSLWantWriteError):
            pass
        except OSError:
            self.unsent = self.unsent[:0]  # reading will say why
        if not self.unsent:
            self.unsent = None
            self.loop.watch(self, self.loop.receiver(self), select.EPOLLIN, known=True)
        else:
            self.loop.receiver(self)(now)

    # receiving

    def receive(self, now: int) -> None:
        try:
            data, ancillary, _, _ = self.sock.recvmsg(READ_SIZE, ANCILLARY_SIZE)  # type: ignore[union-attr]
        except BlockingIOError:
            return
        except OSError as e:
            return self.broken(e.strerror or str(e))
        if ancillary:
            seconds, nanoseconds = read_timespec(ancillary[0][2])
            self.received(data, seconds * SECOND + nanoseconds, now)
        else:
            self.loop.unstamped += 1
            self.received(data, now, now)

    def receive_tls(self, now: int) -> None:
        assert isinstance(self.sock, ssl.SSLSocket)
        while self.sock:
            try:
                data = self.sock.recv(READ_SIZE)
            except ssl.SSLWantReadError:
                return
            except OSError as e:
                return self.broken(e.strerror or str(e))
            self.received(data, time.time_ns(), now)
            if self.loop.ready.get(self.fd) != self.receive_tls or not self.sock.pending():
                return

    def received(self, data: bytes, stamp: int, now: int) -> None:
        if not data:
            return self.broken("")
        try:
            if self.reply.add(data, stamp, now):
                self.done(stamp)
            elif self.reply.raw.endswith(BARE_END):
                raise Malformed("its chunks' lines end with a bare \\n, where HTTP wants \\r\\n")
            elif len(self.reply.raw) > self.loop.load.largest:
                raise Malformed(f"the answer does not end: {len(self.reply.raw):,} bytes so far")
        except Malformed as e:
            self.broken(str(e), retry=False)

    def done(self, stamp: int) -> None:
        assert self.reply.head
        self.served += 1
        if self.reply.head.close or self.unsent is not None:
            self.close()
        else:
            self.loop.ready[self.fd] = self.idle
        self.hand_over(stamp)

    def hand_over(self, when: int) -> None:
        assert self.outcome
        outcome, self.outcome = self.outcome, None
        self.loop.ended(self, outcome, when)

    # ending

    def idle(self, now: int) -> None:
        """The server closed the connection between two requests, or spoke unasked: give it up."""
        if self.only_tls_spoke():
            return
        self.close()
        self.loop.lost(self, "the server closed the connection")

    def only_tls_spoke(self) -> bool:
        """Whether only TLS session tickets came: they follow the handshake and do not matter."""
        if not isinstance(self.sock, ssl.SSLSocket):
            return False
        try:
            self.sock.recv(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            pass
        return False

    def broken(self, why: str, retry: bool = True) -> None:
        """The connection has ended; an empty `why` means that the server closed it."""
        self.close()
        outcome, began = self.outcome, bool(self.reply.raw)
        if outcome is None:
            return self.loop.lost(self, why)
        now = time.time_ns()
        if retry and not began and self.may_retry(outcome, now):
            outcome.retried = True
            return self.open()
        if why and not self.reply.said_done():
            outcome.error = why
        elif not began:
            outcome.error = NO_ANSWER
        self.hand_over(now)  # load/answer.py decides whether the answer was cut off

    def may_retry(self, outcome: Outcome, now: int) -> bool:
        """Whether the server closed a kept-alive connection just as our request went out."""
        soon = now - outcome.sent < RETRY_WITHIN + 2 * self.took
        return self.served > 0 and not outcome.retried and soon

    def is_done(self, now: int) -> bool:
        """Whether [DONE] came but the transfer does not end."""
        if self.outcome is None or not self.reply.stamps:
            return False
        return now > self.reply.stamps[-1] + END_WITHIN and self.reply.said_done()

    def leave(self, now: int) -> None:
        """Take the answer as complete, and ignore what else may come on this connection."""
        assert self.outcome
        self.outcome.quirks += (HELD_OPEN,)
        self.close()
        self.hand_over(now)

    def expired(self, now: int) -> bool:
        if self.outcome is None or self.outcome.sent == 0:
            late = now > self.since + CONNECT_TIMEOUT * SECOND
            return bool(self.sock) and self.opening and late
        return now > self.outcome.sent + self.loop.load.timeout * SECOND

    def too_late(self) -> str:
        if self.opening:
            return f"no connection within {CONNECT_TIMEOUT:g} s"
        return f"{TOO_LATE} {self.loop.load.timeout:g} s"

    def close(self) -> None:
        if self.sock:
            self.loop.forget(self)
            self.sock.close()
        self.sock, self.unsent, self.opening = None, None, False
