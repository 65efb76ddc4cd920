"""Signals that ask us to stop. They become an exception, so that every `finally` runs."""

import signal
import threading
from types import FrameType

from common.talk import say

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Slurm sends one of these before the time limit if the job asks for it: --signal=B:USR1@300.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGXCPU)


class Stopped(BaseException):
    """A signal (the first argument) asked us to stop; in a thread: the main thread did."""


def pause(over: threading.Event, seconds: float) -> None:
    """Sleep in a thread; Stopped as soon as `over` is set."""
    if over.wait(seconds):
        raise Stopped


def obey() -> None:
    """From now on a signal raises Stopped, unless we were started with it ignored (nohup, `&`).

    SIGCHLD is reset: a parent that ignores it passes that on, and we would miss our children's end.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for each in SIGNALS:
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, on_signal)


def outlive_warnings() -> None:
    """From now on these signals are reported and no longer end us."""
    for each in WARNINGS:
        signal.signal(each, on_warning)


def on_warning(signum: int, _: FrameType | None) -> None:
    name = signal.Signals(signum).name
    what = "is taken as Slurm's warning before the time limit (--signal)"  # `kill` sends it, too
    # In a thread, because the interrupted code may be in the middle of printing a line.
    threading.Thread(target=say, args=(f"{name} {what}: the server goes on",)).start()


def on_signal(signum: int, _: FrameType | None) -> None:
    # A second signal must not break the clean-up that the first one began.
    turn_deaf()
    raise Stopped(signum)


def turn_deaf() -> None:
    for each in SIGNALS:
        signal.signal(each, lambda *_: None)
