"""Who is connected to the server's port: whoever waits for an answer is."""

from dataclasses import dataclass

from launch.node.base import ESTABLISHED, Ends, sockets, tell
from launch.node.messages import Clients


@dataclass
class WatchClients:
    """Tell whose connections to a port are open, again and again, until our input ends."""

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
