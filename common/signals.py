"""Signals that ask us to stop. They become an exception, so that every `finally` runs."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked us to stop, the first argument says which."""


def obey() -> None:
    """From now on a signal is a Stopped, unless it is ignored, as nohup and `&` want it."""
    for each in SIGNALS:
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, on_signal)


def on_signal(signum: int, _: FrameType | None) -> None:
    # The second one must not break the clean-up that the first has begun.
    turn_deaf()
    raise Stopped(signum)


def turn_deaf() -> None:
    for each in SIGNALS:
        signal.signal(each, lambda *_: None)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """A signal that comes meanwhile is obeyed at the end: it must not break a clean-up."""
    came: list[int] = []
    obeyed = [each for each in SIGNALS if signal.getsignal(each) == on_signal]
    for each in obeyed:
        signal.signal(each, lambda signum, _: came.append(signum))
    try:
        yield
    finally:
        for each in obeyed:
            signal.signal(each, on_signal)
        if came:
            on_signal(came[0], None)
