"""Is the server well? Two threads ask it; `hold` in watch.py looks at what they found.

Health asks /health: is it ready, and later, is it there? Probe asks for one token: the /health of a
hung engine can answer 200 for ever.
"""

import threading
import time
from collections.abc import Sequence

from common.ask import ask
from common.response import ERROR_LENGTH, Malformed
from common.talk import say
from launch.busy import Busy, Order

HEALTH_EVERY, HEALTH_TIMEOUT, HEALTH_MISSES = 5.0, 10.0, 6
STRANGER_ANSWERS = 4  # the log may be a moment behind the port
PROBE_MISSES = 3
CLOSED = {401, 403}  # to requests without its key
NOT_NOW = {408, 429}  # from a full queue, or a proxy
PROBE_PATIENCE = 1800.0  # seconds; one token may wait behind a long queue of long answers
ABSENCE = 5.0  # seconds between two looks; after longer ones we stood still (^Z), and know nothing
DAY = 86400.0
ONE_TOKEN = {"prompt": "Hello", "max_tokens": 1, "temperature": 0}


def why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


class Health(threading.Thread):
    """Asks the server how it is, in a thread of its own, so that a slow answer holds up nothing."""

    def __init__(self, url: str, names: Sequence[str], key: str = "") -> None:
        super().__init__(daemon=True)
        self.url, self.names, self.key = url, names, key
        self.ready = threading.Event()
        self.hurry = threading.Event()
        self.ended = threading.Event()
        self.listening = False  # set when our engine's log says so: then the port is its own
        self.model = ""
        self.stranger = ""  # what somebody else's server on our port serves
        self.strange = 0  # how often in a row it has answered
        self.misses = 0
        self.reached = False  # the last question got an answer, whatever it was
        self.answer = "no answer yet"

    def run(self) -> None:
        wait, asked = 0.0, time.monotonic()
        while not self.ended.is_set():
            self.hurry.wait(wait)
            self.hurry.clear()
            if self._ask() and not self.ready.is_set():
                self.ready.set()
            # 0.25 s at first; an engine that loads for minutes is asked every 2 s.
            young = time.monotonic() - asked < 60
            wait = HEALTH_EVERY if self.ready.is_set() else 0.25 if young else 2.0

    def _ask(self) -> bool:
        reached = True
        try:
            status = ask(f"{self.url}/health", HEALTH_TIMEOUT, whole=False).status
            self.answer = f"/health answered {status}"
            good = status == 200 and (bool(self.model) or self._learn_model())
        except OSError as error:
            reached = False
            self.answer, good = f"/health did not answer ({why(error)})", False
        except Malformed as error:
            self.answer, good = f"/health gave no answer ({error})", False
        except ValueError as error:
            words = str(error)[:ERROR_LENGTH]
            self.answer, good = f"/v1/models gave no list of models ({words})", False
        self.reached, self.misses = reached, 0 if good else self.misses + 1
        return good

    def _learn_model(self) -> bool:
        """Whether our own server answers: it serves our model, or its log says it has the port."""
        try:
            answer = ask(f"{self.url}/v1/models", HEALTH_TIMEOUT, key=self.key)
            if answer.status in CLOSED and self.listening:  # ours, with a key that we do not know
                self.model = self.names[0]
                return True
            served = [str(model["id"])[:ERROR_LENGTH] for model in answer.json()["data"]]
            self.model = next((name for name in served if name in self.names), "")
            if not self.model and self.listening:
                self.model = served[0]
            self.stranger = "" if self.model else served[0]
        except (LookupError, TypeError):
            raise ValueError("it has another shape") from None
        except Malformed as error:
            raise ValueError(str(error)) from None
        self.strange = self.strange + 1 if self.stranger else 0
        return bool(self.model)

    def fault(self) -> str:
        """Why it is no longer well, in words; '' while it is."""
        if self.misses < HEALTH_MISSES:
            return ""
        return f"{HEALTH_MISSES} health checks in a row failed, the last: {self.answer}"

    def is_stranger(self) -> bool:
        """Whether another server has the port on which ours is to listen."""
        return self.strange >= STRANGER_ANSWERS and not self.listening

    def end(self) -> None:
        self.ended.set()
        self.hurry.set()


class Probe(threading.Thread):
    """Asks for one token when the log has shown no answer to anybody for a while.

    A hung engine is told from a busy one by these rules:

    * There is one probe at a time, never cut short, so that it keeps its place in a queue.
    * A server is idle if nobody waits who came before the probe (`Busy`), and neither the log nor
      the engine's counters show progress. It has failed if it does not answer within `timeout`.
    * A busy server has failed if it shows no progress for PROBE_PATIENCE.
    * An error counts, unless the log shows an answer to somebody meanwhile; PROBE_MISSES in a row
      are a failure.
    * A server that refuses a probe (4xx) before it has answered any will refuse all: it is not
      asked again. The first probe is sent as soon as the server is ready.

    The log shows an answer as it begins. An engine that hangs while clients go on opening streams
    therefore looks busy, and is left alone: no engine at work may be ended for its long queue.
    """

    def __init__(self, url: str, every: float, timeout: float, order: Order, key: str = "") -> None:
        """Times in seconds; `every` 0 asks nothing. `order` has the node tell who is connected."""
        super().__init__(daemon=True)
        self.url, self.every, self.key, self.model = url, every, key, ""
        self.timeout, self.order = timeout or PROBE_PATIENCE, order
        self.busy: Busy | None = None
        self.ended = threading.Event()
        self.looked = 0.0  # when fault() was last called
        self.back = 0.0  # when we last came back after an absence
        self.asked = 0.0  # when the probe that now waits was sent; 0: none waits
        self.traffic = 0.0  # when the log last showed an answer to anybody
        self.answered = False
        self.misses = 0
        self.answer = ""

    def begin(self, model: str) -> None:
        """Start, once the server is ready."""
        self.model = model
        if self.every > 0:
            self.start()

    def run(self) -> None:
        while not self.ended.is_set():
            self.busy = Busy(self.url, self.order, self.timeout)
            self.asked = time.monotonic()
            self.busy.start()
            self._judge(self._ask())
            self.asked = 0.0
            self.busy.end()
            self._wait(time.monotonic())

    def _wait(self, since: float) -> None:
        """Wait until nobody was answered for `every` seconds, to keep out of measurements."""
        while (left := max(since, self.traffic) + self.every - time.monotonic()) > 0:
            if self.ended.wait(min(left, threading.TIMEOUT_MAX)):
                return

    def _ask(self) -> int:
        """The answer's status; 0 if there was none."""
        body = {"model": self.model, **ONE_TOKEN}
        try:
            answer = ask(f"{self.url}/v1/completions", DAY, body=body, key=self.key)
        except (OSError, Malformed) as error:
            self.answer = f"no answer ({why(error)})"
            return 0
        words = answer.body[:200].decode(errors="replace").strip()
        self.answer = f"{answer.status} {words}".strip()
        return answer.status

    def _judge(self, status: int) -> None:
        if status == 200:
            self.answered, self.misses = True, 0
        elif 400 <= status < 500 and status not in NOT_NOW and not self.answered:
            say(f"the server refuses the one-token probe ({self.answer}); probing is off")
            self.ended.set()
        elif self.traffic < self.asked:
            self.misses += 1

    def forgive(self) -> None:
        """Forget what has gone wrong so far: it was not the engine's fault."""
        self.misses, self.traffic = 0, time.monotonic()

    def fault(self) -> str:
        """Why we think that the engine hangs, in words; '' while we do not."""
        now, asked, busy = time.monotonic(), self.asked, self.busy  # they change at any moment
        if now - self.looked > ABSENCE:
            self.back = now
        self.looked = now
        if asked and busy:
            since = max(asked, self.traffic, self.back, busy.progress)
            if (waited := now - max(since, busy.alone)) > self.timeout:
                asked_for = "the one token that it was asked for"
                return f"it is idle, and in {waited:.0f} s has not generated {asked_for}"
            if (waited := now - since) > max(PROBE_PATIENCE, self.timeout):
                return f"for {waited:.0f} s no request was answered, not even one for one token"
        if self.misses >= PROBE_MISSES:
            return f"{PROBE_MISSES} requests for one token in a row failed, the last: {self.answer}"
        return ""

    def end(self) -> None:
        self.ended.set()
        if busy := self.busy:
            busy.end()
