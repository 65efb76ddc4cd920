"""Who is connected to the server's port, as everybody is who waits for an answer."""

from dataclasses import dataclass

from launch.node.base import ESTABLISHED, Ends, sockets, tell
from launch.node.messages import Clients


@dataclass
class WatchClients:
    """Tell who is connected to a port, again and again, until our input ends."""

    port: int
    every: float  # seconds

    def __call__(self) -> int:
        ends = Ends()
        ends.hold()
        over = False
        while not over:
            tell(Clients([row[2] for row in sockets(self.port, ESTABLISHED)]))
            over = ends.stop_within(self.every)
        return 0
