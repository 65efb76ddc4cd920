"""A fleet's front, watched from here: whether it answers, and whom it can reach."""

import time
from urllib.parse import urlsplit

from common.ask import ask
from common.response import Malformed
from common.talk import die, say
from launch.front import PAGE
from launch.health import why
from launch.node.containers import AskOwner
from launch.nodes import Place
from launch.order import Command
from launch.status import TIMEOUT, page
from launch.timelimit import is_suspended
from launch.watch import FIREWALL, owner_by, wall

EVERY = 10.0  # seconds between two looks at its page
MISSES = 3  # looks in a row without an answer before we say so


class Lookout:
    """Looks at the front's page. `host` is where it listens on `node`, the place's first."""

    def __init__(self, place: Place, node: str, host: str, url: str) -> None:
        self.place, self.node, self.url = place, node, url
        self.port = urlsplit(url).port or 0
        self.ask_node = Command(place.on(1, first=0), AskOwner(host, self.port, ""))
        self.misses = 0
        self.next = time.monotonic() + EVERY

    def die_if_walled(self) -> None:
        if words := self.walled():
            die(words, hint=FIREWALL)

    def walled(self) -> str:
        """Says that it answers on its node but not here; '' if that is not so."""
        if not self.silence() or not owner_by(self.ask_node).answer.isdigit():
            return ""
        silence = self.silence()  # it may only be slow, which is no wall
        return silence and wall(self.node, self.port, self.url, silence)

    def silence(self) -> str:
        """Why its page does not come; '' if it does."""
        try:
            ask(self.url + PAGE, TIMEOUT, whole=False)
        except (OSError, ValueError, Malformed) as error:
            return why(error)
        return ""

    @property
    def is_due(self) -> bool:
        return time.monotonic() > self.next

    def look(self) -> str:
        """Its page, or ''. Say once that it no longer answers, and once that it answers again."""
        found = page(self.url + PAGE)
        if found and self.misses >= MISSES:
            say(f"{self.node}: the front answers again")
        self.misses = 0 if found else self.misses + 1
        if self.misses == MISSES:
            if is_suspended(self.place):
                self.misses = 0
            else:
                say(self.walled() or f"{self.node}: the front at {self.url} no longer answers")
        self.next = time.monotonic() + EVERY
        return found
