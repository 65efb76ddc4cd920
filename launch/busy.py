"""Is a server busy that does not answer its probe? What its connections and its counters say."""

import math
import re
import threading
import time
from collections.abc import Callable

from common.ask import ask
from common.response import Malformed
from common.talk import Failure
from launch.engines import every
from launch.node.messages import Clients
from launch.nodes import Step, held
from launch.order import Command

SOON = 1.0  # seconds; an idle server has answered by then, and nobody has to look
LOOKS = 6  # in the time that an idle server may take
PAUSE = 10.0  # seconds until a node that could not tell is asked again
METRICS, METRICS_TIMEOUT = ("/metrics", "/prometheus/metrics"), 5.0
# Tokens that engines count as they are made. What HTTP servers count, and the levels that they only
# repeat, move or stand still whatever the engine does.
NAMES = "|".join(engine.COUNTERS for engine in every())
TOKENS = re.compile(rf"^(?:{NAMES})[:_]\w*token\w*_(?:total|count|sum)\b.*".encode(), re.M)
Order = Callable[[float], Command]  # WatchClients, so many seconds apart


class Busy(threading.Thread):
    """Looks at a server for as long as a request of ours waits there.

    Who was there before us and is still connected may be answered first; who came later may not.
    One of those that stay is ourselves.
    """

    def __init__(self, url: str, order: Order, timeout: float) -> None:
        super().__init__(daemon=True)
        self.url, self.every = url, max(timeout / LOOKS, 0.05)
        self.order = order(self.every)
        self.alone = math.inf  # since when nobody is ahead of us; infinite: not known
        self.progress = 0.0  # when its counters last moved
        self.over = threading.Event()
        self.step: Step | None = None
        self.counted: dict[str, list[bytes]] = {}

    def run(self) -> None:
        pause = min(SOON, self.every)
        while not self.over.wait(pause):
            try:
                with held(self.order) as self.step:
                    self._look(self.step)
            except (Failure, OSError, ValueError):  # let go of while it began
                pass
            pause = PAUSE

    def _look(self, step: Step) -> None:
        ahead: set[str] | None = None
        if self.over.is_set():
            return
        for told in step.told():
            if self.over.is_set():
                return
            if isinstance(told.message, Clients):
                now = set(told.message.connections)
                ahead = now if ahead is None else ahead & now
                self.alone = min(self.alone, time.monotonic()) if len(ahead) < 2 else math.inf
                self._count()

    def _count(self) -> None:
        """Whether it has made tokens since the last time; a page that did not come says nothing."""
        for path in METRICS:
            before, now = self.counted.get(path), tokens(f"{self.url}{path}")
            if before is not None and now and (now != before or now[0][:1] == b"["):
                self.progress = time.monotonic()
            self.counted[path] = now or before or []

    def end(self) -> None:
        self.over.set()
        if step := self.step:
            step.let_go()


def tokens(url: str) -> list[bytes]:
    """The lines of a page of counters that only an engine at work changes.

    Of an engine's own list, which a reading empties: all of it, if it says anything.
    """
    try:
        answer = ask(url, METRICS_TIMEOUT)
    except (OSError, Malformed):
        return []
    if answer.status != 200:
        return []
    body = answer.body.strip()
    return [body] if body[:2] == b"[{" else TOKENS.findall(body)
