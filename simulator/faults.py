"""Failures on request: the ways in which a real server has been seen to go wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping

from console import log
from engine import Engine


class Faults:
    def __init__(self, wanted: Mapping[str, tuple[float, ...]]) -> None:
        self.unhealthy = False
        self.hung = False
        self.broken = False
        self._wanted = wanted
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None

    @property
    def ignores_term(self) -> bool:
        return "ignore-term" in self._wanted

    def begin(self) -> None:
        """Start what does not wait for the server to be ready."""
        if self.ignores_term:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if "log-flood" in self._wanted:
            rate = self._wanted["log-flood"][0]
            threading.Thread(target=_flood, args=(rate,), daemon=True).start()
        self._binary_log()

    def half_way(self) -> None:
        """Strike while the model loads."""
        if "exit-loading" in self._wanted:
            log("E", "RuntimeError: Executor worker died during initialization")
            raise SystemExit(int(self._wanted["exit-loading"][0]))
        while "hang-loading" in self._wanted:
            time.sleep(3600)

    def ready(self, loop: asyncio.AbstractEventLoop, engine: Engine) -> None:
        """Set the clocks of what strikes a ready server."""
        self._loop, self._engine = loop, engine
        self._binary_log()

        def after(kind: str, position: int, strike: Callable[[], None]) -> None:
            if kind in self._wanted:
                delay = self._wanted[kind][position:] or (0.0,)
                loop.call_later(delay[0], strike)

        def hang() -> None:
            self.hung = engine.dead = True

        def stick() -> None:
            engine.dead = True

        def break_engine() -> None:
            self.broken = True

        after("exit-serving", 1, self._exit)
        after("kill-serving", 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
        after("out-of-memory", 0, _take_memory)
        after("503", 0, self.lose_engine)
        after("hang", 0, hang)
        after("stuck-engine", 0, stick)
        after("broken-engine", 0, break_engine)

    def lose_engine(self) -> None:
        """The HTTP server lives on without what answers its requests."""
        self.unhealthy = True
        if self._engine:
            self._engine.dead = True
        log("E", "Executor worker died, requests will not be answered")

    def delay_health(self, answer: Callable[[], None]) -> None:
        if "slow-health" in self._wanted and self._loop:
            self._loop.call_later(self._wanted["slow-health"][0], answer)
        else:
            answer()

    def _exit(self) -> None:
        log("E", "CUDA error: an illegal memory access was encountered, exiting")
        os._exit(int(self._wanted["exit-serving"][0]))  # at once, as a crash: no clean-up

    def _binary_log(self) -> None:
        if "binary-log" in self._wanted:
            sys.stdout.buffer.write(
                b"\xff\xfe\x00\x80 not UTF-8 \xc3\x28\r" + b"#" * (1 << 20) + b"\n"
            )
            sys.stdout.buffer.flush()


def _take_memory(most: int = 1 << 30) -> None:
    """Memory, until the kernel has had enough: a container with less than a gigabyte is ended."""
    taken = bytearray()
    while len(taken) < most:
        taken += b"\xff" * (16 << 20)
    log("W", "out-of-memory: a gigabyte was taken, and nobody minded")


def _flood(megabytes_per_second: float) -> None:
    line = b"[TRT-LLM] [V] flooding the log " + b"." * 96 + b"\n"
    part = line * max(1, int(megabytes_per_second * 1e6 / 20 / len(line)))
    due = time.monotonic()
    while True:
        os.write(sys.stdout.fileno(), part)  # not print: no lock is held when the process ends
        due += 0.05
        time.sleep(max(0.0, due - time.monotonic()))
