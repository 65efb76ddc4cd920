"""Wait for a port whose server has just ended."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field

from launch.node.base import STOPPED, Ends, listening, tell
from launch.node.messages import Lingers


@dataclass
class AwaitPort:
    """Return when the port can be bound by an engine that does not ask to reuse it.

    Connections of a server that has ended hold it for a minute (TIME-WAIT). If somebody listens
    there, it is for the engine to say so.
    """

    port: int
    seconds: float = 65  # Linux lets go after 60
    ends: Ends = field(default_factory=Ends)

    def __call__(self) -> int:
        self.ends.hold()
        deadline, told = time.monotonic() + self.seconds, False
        while not can_bind(self.port) and not listening(self.port):
            if time.monotonic() > deadline:
                break
            if not told:
                tell(Lingers())
            told = True
            if self.ends.stop_within(0.2):
                return STOPPED
        return 0


def can_bind(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
        return True
