"""The life of the server, in the real one's order: check, load the model, only then bind.

1.2.1 binds the port before it loads, but listens there only once it has loaded, too. What a mistake
in the arguments does not need is imported late: starting is most of what the simulator does.
"""

from __future__ import annotations

import gc
import os
import select
import selectors
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import libraries
from arguments import command_line
from console import Fatal, crash, log
from cost import cost_of
from environment import Settings
from faults import Faults
from leader_link import Link, is_proxied
from llm_args import LlmArgs

if TYPE_CHECKING:
    from uvicorn import Server

HTTP: Any = {"http": "h11", "ws": "none"}


class PreciseSelector(selectors.DefaultSelector):
    """Wait with the microseconds of select(2); epoll counts milliseconds, too coarse for an ITL."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0:
            select.select([self.fileno()], [], [], timeout)  # the epoll descriptor itself
            timeout = 0
        return super().select(timeout)


def main(began: float) -> None:
    """Do what the command line says; `began` is when this process started (monotonic seconds)."""
    try:
        settings = Settings(os.environ)
    except Fatal as error:
        raise SystemExit(crash(error)) from None
    commands = partial(serve, settings, began), partial(disaggregated, settings)
    command_line(*commands, settings.version).main(prog_name="trtllm-serve")


def serve(settings: Settings, began: float, **flags: Any) -> None:  # noqa: ANN401 (as click hands them over)
    with _ending_as_the_real_one(settings.version):
        args = LlmArgs(flags, settings)
        cost = cost_of(settings.cost, args)  # Fatal if it does not fit
        sockets = _bind(settings.version, args.host, args.port)
        faults = Faults(settings.faults)
        faults.begin()
        leader = _load(args, settings, faults, began)
        import uvicorn
        from api import Api

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                faults.ready()
                if leader:
                    leader.on_broken(faults.lose_engine)

        app = Api(args, settings, faults, cost)
        at = uvicorn.Config(app, args.host, args.port, **HTTP, timeout_keep_alive=5)
        _until_stopped(Server(at), sockets)


def disaggregated(settings: Settings, **flags: Any) -> None:  # noqa: ANN401
    """Serve as soon as all context and generation servers do; it needs no GPU."""
    with _ending_as_the_real_one(settings.version):
        libraries.fastapi()
        import uvicorn
        from disaggregated import Orchestrator, read_config

        it = Orchestrator(flags, settings.version, **read_config(flags, settings.version))
        sockets = _bind(settings.version, it.hostname, it.port)
        at = uvicorn.Config(it.app, it.hostname, it.port, **HTTP, timeout_keep_alive=10)
        _until_stopped(uvicorn.Server(at), sockets)


@contextmanager
def _ending_as_the_real_one(version: str) -> Iterator[None]:
    """End as the real one does: with a traceback's last line, or 130 after ^C."""
    log("I", f"This is a SIMULATOR of TensorRT-LLM {version}: no model is loaded, no GPU is used")
    try:
        yield
    except Fatal as error:
        raise SystemExit(crash(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _bind(version: str, host: str, port: int) -> list[socket.socket] | None:
    """Bind as the real 1.2.1 does: IPv4 only, and no SO_REUSEADDR. For 1.1.0 uvicorn binds."""
    if version == "1.1.0":
        return None
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.bind((host, port))
    except OSError as error:
        raise Fatal("RuntimeError", f"Failed to bind socket to {host}:{port}: {error}") from None
    return [bound]


def _load(args: LlmArgs, settings: Settings, faults: Faults, began: float) -> Link | None:
    """Take the configured time since `began`, and the ranks' time too where there are ranks."""
    log("I", f"start MpiSession with {args.world_size} workers")
    leader = Link(os.environ) if is_proxied(os.environ) else None
    if leader:
        leader.join(args.world_size, args.gpus_per_node)
        leader.send({"op": "load", "model": args.model})
    steps = 2 * max(1, round(settings.load_seconds / 2))  # even, so that one of them is half way
    for step in range(1, steps + 1):  # a sign of life about once a second
        time.sleep(max(0.0, began + step * settings.load_seconds / steps - time.monotonic()))
        log("I", f"Loading weights of {args.model}: {100 * step // steps}%")
        if step == steps // 2:
            faults.half_way()
            libraries.fastapi()
            import api  # noqa: F401 (its libraries take a quarter of a second of the load)
    if leader:
        leader.receive()
    return leader


def _until_stopped(server: Server, sockets: list[socket.socket] | None) -> None:
    """Serve until a signal comes and the running streams have ended, however long they take."""
    import asyncio

    gc.freeze()
    gc.enable()
    loop = asyncio.SelectorEventLoop(PreciseSelector())
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(server.serve(sockets))
    except KeyboardInterrupt:  # uvicorn has finished: die of the signal that ended it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
        raise
    finally:
        loop.close()
