"""uvicorn, told when the faults of a ready server begin."""

from __future__ import annotations

import asyncio
import socket
from contextlib import nullcontext

import uvicorn

from api import Api
from engine import Engine
from environment import Settings
from faults import Faults
from leader_link import Link
from llm_args import LlmArgs

KEEP_ALIVE_SECONDS = 5


class Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, faults: Faults, leader: Link | None) -> None:
        super().__init__(config)
        self._faults = faults
        self._leader = leader
        if faults.ignores_term:
            self.capture_signals = nullcontext  # type: ignore[assignment,method-assign]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        self._faults.ready(loop)
        if self._leader:
            self._leader.on_broken(loop, self._faults.lose_engine)


async def serve_http(
    args: LlmArgs, settings: Settings, faults: Faults, leader: Link | None
) -> None:
    """Serve until a signal comes and the running streams have ended, however long they take."""
    engine = Engine(settings, faults, args.max_batch_size)
    config = uvicorn.Config(
        Api(args, settings, engine, faults).app(),
        host=args.host,
        port=args.port,
        http="h11",
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    await Server(config, faults, leader).serve()
