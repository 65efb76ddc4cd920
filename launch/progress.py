"""Shows what engines do while they load: on one line of a terminal, or on a line now and then."""

from collections.abc import Sequence

from common.live import Live, at_terminal
from common.talk import HEARTBEAT, Record, note, say, visible
from launch.log_lines import clean
from launch.server import Server

LIVE = 0.5  # seconds between two updates of the line on a terminal
SHOWN = 3  # replicas that are shown at once


class Progress:
    """Tells of the servers that are not ready yet."""

    def __init__(self, of: int) -> None:
        self.of, self.age, self.beat, self.blink = of, 0.0, HEARTBEAT, 0.0
        self.live = at_terminal() and not Record.verbose  # the log would come between

    def tell(self, loading: Sequence[Server], age: float) -> None:
        """`age` is the longest that one of them has been loading, in seconds."""
        if age < self.age:  # other servers load now
            self.beat, self.blink = HEARTBEAT, 0.0
        self.age = age
        if self.live and age > self.blink:
            self.blink = age + LIVE
            Live.show(self.words(loading, age))
        if age > self.beat:
            self.beat += HEARTBEAT
            (note if self.live else say)(self.words(loading, age))

    def words(self, loading: Sequence[Server], age: float) -> str:
        if self.of == 1:
            return of_one(loading[0], age)
        each = [f"{one.replica.label} {of_one(one, one.age)}" for one in loading[:SHOWN]]
        more = [f"{len(loading) - SHOWN} more"] if loading[SHOWN:] else []
        return "; ".join(
            [f"{len(loading)} of {self.of} replicas load: {each[0]}", *each[1:], *more]
        )


def of_one(server: Server, age: float) -> str:
    if said := server.loading.said:
        return f"{said}, {age:.0f} s"
    last = visible(clean(server.main_log.last_line).text[:80]) or "(empty)"
    return f"still loading after {age:.0f} s; the log's last line: {last}"
