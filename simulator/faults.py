"""Failures on request: the ways in which a real server has been seen to go wrong."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping

from console import log


class Faults:
    def __init__(self, wanted: Mapping[str, tuple[float, ...]]) -> None:
        self.unhealthy = self.hung = self.broken = False
        self.dead_engine = False  # it keeps every request waiting for ever
        self.health_delay = wanted.get("slow-health", (0.0,))[0]
        self._wanted = wanted

    def begin(self) -> None:
        """Start the faults that do not wait for the server to be ready."""
        if "ignore-term" in self._wanted:  # whatever handlers uvicorn sets
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        if "log-flood" in self._wanted:
            threading.Thread(target=_flood, args=self._wanted["log-flood"], daemon=True).start()
        self._binary_log()

    def half_way(self) -> None:
        """Strike while the model loads."""
        if "exit-loading" in self._wanted:
            log("E", "RuntimeError: Executor worker died during initialization")
            raise SystemExit(int(self._wanted["exit-loading"][0]))
        while "hang-loading" in self._wanted:
            time.sleep(3600)

    def ready(self) -> None:
        """Schedule the faults that strike a ready server."""
        from asyncio import get_running_loop  # by now it is imported, so it costs nothing

        loop = get_running_loop()
        self._binary_log()
        if "stuck-on-signal" in self._wanted:  # picks one of several servers with one environment
            loop.add_signal_handler(signal.SIGUSR2, self._turn, "dead_engine")
        strikes: dict[str, Callable[[], None]] = {
            "exit-serving": self._exit,
            "kill-serving": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "out-of-memory": _take_memory,
            "503": self.lose_engine,
            "hang": lambda: self._turn("hung", "dead_engine"),
            "stuck-engine": lambda: self._turn("dead_engine"),
            "broken-engine": lambda: self._turn("broken"),
        }
        for kind in strikes.keys() & self._wanted.keys():
            delay = self._wanted[kind][kind == "exit-serving" :] or (0.0,)
            loop.call_later(delay[0], strikes[kind])

    def lose_engine(self) -> None:
        """The HTTP server lives on, but its engine is gone."""
        self._turn("unhealthy", "dead_engine")
        log("E", "Executor worker died, requests will not be answered")

    def _turn(self, *names: str) -> None:
        for name in names:
            setattr(self, name, True)

    def _exit(self) -> None:
        log("E", "CUDA error: an illegal memory access was encountered, exiting")
        os._exit(int(self._wanted["exit-serving"][0]))  # at once, as a crash: no clean-up

    def _binary_log(self) -> None:
        if "binary-log" in self._wanted:
            line = b"\xff\xfe\x00\x80 not UTF-8 \xc3\x28\r" + b"#" * (1 << 20) + b"\n"
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()


def _take_memory(most: int = 1 << 30) -> None:
    """Take a gigabyte: the kernel kills a container that may not have that much."""
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
