"""The life of the server, in the real one's order: check, load the model, only then bind."""

from __future__ import annotations

import asyncio
import io
import os
import select
import selectors
import signal
import sys
import time
from collections.abc import Sequence

from api import Api
from arguments import UsageExit, parse
from console import Fatal, crash, log, say, uvicorn
from engine import Engine
from environment import Settings, read_settings
from faults import Faults
from http_server import Connection
from leader_link import Link, is_proxied
from llm_args import LlmArgs, build_llm_args


class PreciseSelector(selectors.DefaultSelector):
    """Wait with the microseconds of select(2); epoll counts milliseconds, too coarse for an ITL."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0:
            select.select([self.fileno()], [], [], timeout)  # the epoll descriptor itself
            timeout = 0
        return super().select(timeout)


def main(argv: Sequence[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a request may log what the locale cannot write
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = parse(argv)
    except UsageExit as stop:
        say(str(stop), error=stop.code != 0)
        return stop.code
    log("I", "This is a SIMULATOR of TensorRT-LLM 1.1.0: no model is loaded, no GPU is used")
    try:
        settings = read_settings(os.environ)
        args = build_llm_args(arguments, settings.gpus, os.environ)
        faults = Faults(settings.faults)
        faults.begin()
        leader = _load(args, settings, faults)
        return _run(args, settings, faults, leader)
    except Fatal as error:
        crash(error)
        return 1
    except KeyboardInterrupt:
        return 130


def _load(args: LlmArgs, settings: Settings, faults: Faults) -> Link | None:
    """Take the configured time, and the ranks' time too where there are ranks to wait for."""
    log("I", f"start MpiSession with {args.world_size} workers")
    if not is_proxied(os.environ):
        _show_loading(args, settings, faults)
        return None
    leader = Link(os.environ)
    leader.join(args.world_size, args.gpus_per_node)
    leader.start_loading(args.model)
    _show_loading(args, settings, faults)
    leader.wait_loaded()
    return leader


def _show_loading(args: LlmArgs, settings: Settings, faults: Faults) -> None:
    """Give a sign of life about once a second."""
    began = time.monotonic()
    steps = 2 * max(1, round(settings.load_seconds / 2))  # even, so that one of them is half way
    for step in range(1, steps + 1):
        time.sleep(max(0.0, began + step * settings.load_seconds / steps - time.monotonic()))
        log("I", f"Loading weights of {args.model}: {100 * step // steps}%")
        if step == steps // 2:
            faults.half_way()


def _run(args: LlmArgs, settings: Settings, faults: Faults, leader: Link | None) -> int:
    loop = asyncio.SelectorEventLoop(PreciseSelector())
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(_serve(loop, args, settings, faults, leader))
    finally:
        loop.close()


async def _serve(
    loop: asyncio.AbstractEventLoop,
    args: LlmArgs,
    settings: Settings,
    faults: Faults,
    leader: Link | None,
) -> int:
    stop = asyncio.Event()
    if not faults.ignores_term:
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, stop.set)
    engine = Engine(loop, settings, args.max_batch_size)
    api = Api(args, settings, engine, faults)
    connections: set[Connection] = set()
    uvicorn(f"Started server process [{os.getpid()}]")
    uvicorn("Waiting for application startup.")
    uvicorn("Application startup complete.")
    try:
        server = await loop.create_server(
            lambda: Connection(api, connections), args.host, args.port, backlog=2048
        )
    except (OSError, OverflowError) as error:
        text = f"[Errno {error.errno}] {error.strerror}" if isinstance(error, OSError) else error
        uvicorn(str(text), "ERROR")
        uvicorn("Application shutdown complete.")
        return 1
    faults.ready(loop, engine)
    if leader:
        leader.on_broken(loop, faults.lose_engine)
    uvicorn(f"Uvicorn running on http://{args.host}:{args.port} (Press CTRL+C to quit)")
    await stop.wait()
    uvicorn("Shutting down")
    await _close(server, connections)
    uvicorn(f"Finished server process [{os.getpid()}]")
    return 0


async def _close(server: asyncio.AbstractServer, connections: set[Connection]) -> None:
    """Cut open streams: with the process gone nobody would finish them."""
    server.close()
    for connection in list(connections):
        connection.abort()
    await asyncio.sleep(0)  # lets the aborted transports close their sockets
