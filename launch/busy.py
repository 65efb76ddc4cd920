"""Is a server that does not answer its probe busy? Its connections and its counters tell."""

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

SOON = 1.0  # seconds; an idle server has answered by then, and there is no need to look
LOOKS = 6  # looks within the time that an idle server may take
PAUSE = 10.0  # seconds until a node that could not tell is asked again
METRICS, METRICS_TIMEOUT = ("/metrics", "/prometheus/metrics"), 5.0
# Counters of tokens, which move only while the engine makes them. What HTTP servers count, and what
# gauges show, moves or stands still whatever the engine does.
NAMES = "|".join(engine.COUNTERS for engine in every())
TOKENS = re.compile(rf"^(?:{NAMES})[:_]\w*token\w*_(?:total|count|sum)\b.*".encode(), re.M)
Order = Callable[[float], Command]  # makes a WatchClients that looks every so many seconds


class Busy(threading.Thread):
    """Watches a server while a request of ours waits there.

    Clients that have been connected since the first look may be answered before us; later ones may
    not. One of those that stay connected is ourselves.
    """

    def __init__(self, url: str, order: Order, timeout: float) -> None:
        super().__init__(daemon=True)
        self.url, self.every = url, max(timeout / LOOKS, 0.05)
        self.order = order(self.every)
        self.alone = math.inf  # since when nobody is ahead of us; infinite: unknown
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
            except (Failure, OSError, ValueError):  # end() let go of the step as it began
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
        """Note whether it has made tokens since the last look. A page that fails says nothing."""
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
    """The lines of a metrics page that change only while the engine works.

    An engine's own JSON list, which reading empties, counts as a whole if it is not empty.
    """
    try:
        answer = ask(url, METRICS_TIMEOUT)
    except (OSError, Malformed):
        return []
    if answer.status != 200:
        return []
    body = answer.body.strip()
    return [body] if body[:2] == b"[{" else TOKENS.findall(body)
