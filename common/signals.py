"""Signals that ask us to stop. They become an exception, so that every `finally` runs."""

import signal
import threading
from types import FrameType

from common.talk import say

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What Slurm sends before the time limit where the job asks for it: --signal=B:USR1@300.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGXCPU)


class Stopped(BaseException):
    """A signal asked us to stop, the first argument says which; or, in a thread, the main one."""


def pause(over: threading.Event, seconds: float) -> None:
    """Sleep in a thread; Stopped as soon as all is over."""
    if over.wait(seconds):
        raise Stopped


def obey() -> None:
    """From now on a signal is a Stopped, unless it is ignored, as nohup and `&` want it.

    Who ignores the end of its children hands that on to us, and we would not hear of ours.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for each in SIGNALS:
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, on_signal)


def outlive_warnings() -> None:
    """From now on they are told, and end nothing."""
    for each in WARNINGS:
        signal.signal(each, on_warning)


def on_warning(signum: int, _: FrameType | None) -> None:
    name = signal.Signals(signum).name
    words = f"{name} is Slurm's warning before the time limit (--signal): the server goes on"
    # In a thread: who is interrupted may be in the middle of a line.
    threading.Thread(target=say, args=(words,)).start()


def on_signal(signum: int, _: FrameType | None) -> None:
    # The second one must not break the clean-up that the first has begun.
    turn_deaf()
    raise Stopped(signum)


def turn_deaf() -> None:
    for each in SIGNALS:
        signal.signal(each, lambda *_: None)
