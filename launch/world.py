"""One model over several nodes: a container per node, a rank per GPU, one MPI world.

Slurm's PMIx wires up the ranks. Each runs by `docker exec` in the one container of its node, so
that a node's ranks share a process table (Open MPI's shared memory needs that) and there is one
thing to name and to remove. Rank 0, on the first node, serves HTTP.
"""

import contextlib
import re
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.signals import pause
from common.talk import die
from launch.findings import Node
from launch.node.messages import Beat, Ended, Left, Up
from launch.nodes import Step
from launch.order import Told
from launch.slurm import SEE_NODES, last_words, lost_nodes, slurms_word
from launch.spread import Spread

ALONE = Spread(1, 1, "none")  # a server on one node
UP_WITHIN = 60.0  # seconds until every node's container runs
SILENCE = 8.0  # seconds without a sign of life from a node
SLURMD_AWAY = 5.0  # seconds without a slurmd on a node; one that is only restarted is back by then
ABSENCE = 2.0  # seconds; if we look less often than this, the silence is our own fault
# Seconds that a node has to clean up. One that is in trouble gives up after two, and we listen a
# little longer: else we would not hear why its container is left.
FAREWELL, SHORT_FAREWELL = 10.0, 3.0


class Holders(threading.Thread):
    """The containers that are held on the nodes, and a sign of life from each."""

    def __init__(self, step: Step, spread: Spread, nodes: Sequence[Node]) -> None:
        super().__init__(daemon=True)
        self.step, self.spread = step, spread
        self.names = [node.name for node in nodes[: spread.nodes]]
        self.up: set[str] = set()
        self.seen: dict[str, float] = {}  # when a node gave its last sign of life
        self.slurmd: dict[str, float] = {}  # when it last saw its slurmd; never: it is not judged
        self.ended: dict[str, int] = {}  # exit codes of containers
        self.left: dict[str, str] = {}  # why a node's container may be there still; '': it is gone
        self.talk: list[str] = []
        self.looked = time.monotonic()  # when somebody last asked for a fault

    def run(self) -> None:
        with contextlib.suppress(ValueError):  # the step was let go of while we read
            for told in self.step.told():
                self.note(told)

    def note(self, told: Told) -> None:
        now, message = time.monotonic(), told.message
        if isinstance(message, Up):
            self.up.add(told.node)
        elif isinstance(message, Beat):
            self.seen[told.node] = now
            if message.slurmd:
                self.slurmd[told.node] = now
        elif isinstance(message, Ended):
            self.ended[told.node] = message.code
        elif isinstance(message, Left):
            self.left[told.node] = message.why
        else:
            self.talk = [*self.talk[-50:], told.line]

    def fault(self) -> str:
        """What is wrong with the first node that is in trouble, or ''."""
        self.forgive_absence()
        for index, name in enumerate(self.names):
            if trouble := self.trouble(name):
                ranks = f" ({self.spread.ranks_of(index)})" if self.spread != ALONE else ""
                return f"{name}{ranks}: {trouble}"
        return ""

    def advice(self) -> str:
        """What to do about the cause that a container's client has named; '' if it is unknown."""
        from launch import causes  # late: a start does not need its patterns

        cause = causes.of("\n".join(self.talk))
        return cause.advice if cause and cause.meaning else ""

    def forgive_absence(self) -> None:
        """While we stood still (^Z, a laptop's lid), nobody noted the nodes' signs of life."""
        now = time.monotonic()
        if now - self.looked > ABSENCE:
            self.forgive()
        self.looked = now

    def forgive(self) -> None:
        """Act as if every node had just given a sign of life."""
        now = time.monotonic()
        self.seen = dict.fromkeys(self.seen, now)
        self.slurmd = dict.fromkeys(self.slurmd, now)

    def trouble(self, name: str) -> str:
        if name in self.ended:
            words = last_words("\n".join(self.talk))
            return f"its container ended with exit code {self.ended[name]}: {words}".rstrip(": ")
        now = time.monotonic()
        seen = self.seen.get(name, now)
        if now - seen > SILENCE:
            return f"no sign of life for {SILENCE:g} s"
        if seen - self.slurmd.get(name, seen) > SLURMD_AWAY:
            return f"its slurmd has been gone for {SLURMD_AWAY:g} s"
        return ""

    def await_up(self, over: threading.Event) -> None:
        """Return when every node's container runs; Stopped when the launch is over first."""
        deadline = time.monotonic() + UP_WITHIN
        while len(self.up) < self.spread.nodes:
            if ended := self.step.poll() is not None:
                self.join(1)  # until all that it said has been read
            if fault := self.fault():
                die(fault, hint=self.advice(), passing=True)
            missing = [name for name in self.names if name not in self.up]
            if missing and (ended or time.monotonic() > deadline):
                talk = "\n".join(self.talk)
                if word := slurms_word(talk):
                    lost = bool(lost_nodes(talk))
                    die(word, hint=SEE_NODES if lost else "", passing=lost)
                late = "" if ended else f" within {UP_WITHIN:g} s"
                words = last_words("\n".join(self.talk)) or "no word from there"
                die(f"{', '.join(missing)}: no container{late}: {words}", passing=True)
            pause(over, 0.02)

    def await_farewell(self) -> dict[str, str]:
        """Wait for the nodes' word on their containers. Returns why one may be left, by node.

        A node in trouble is not waited for long. '' means that a node ended without a word.
        """
        begun = time.monotonic()
        patience = {name: SHORT_FAREWELL if self.trouble(name) else FAREWELL for name in self.names}
        while any(time.monotonic() - begun < patience[name] for name in self.silent()):
            if self.step.poll() is not None:
                self.join(1)
                break
            time.sleep(0.02)
        silent = {name: self.trouble(name) for name in self.silent()}
        return silent | {name: why for name, why in self.left.items() if why}

    def silent(self) -> list[str]:
        return [name for name in self.names if name not in self.left]


RANK_ENDED = re.compile(r"^srun: error: (\S+): tasks? ([\d,-]+): (.*)$", re.M)
# srun names a signal in strsignal()'s words.
SIGNALS = {str(signal.strsignal(each)): 128 + each for each in signal.Signals}
ENDS = SIGNALS | {"Out Of Memory": 137}


@dataclass(frozen=True)
class Death:
    """The end of a rank, or of several that ended alike."""

    node: str
    ranks: str  # as Slurm writes them: 9 or 8-15
    code: int

    @property
    def first(self) -> str:
        return re.split(r"[,-]", self.ranks)[0]


def first_failure(log: str) -> Death | None:
    """The first rank that failed, as srun tells it; later ones only follow from that."""
    if not (found := RANK_ENDED.search(log)):
        return None
    code = re.search(r"exit code (\d+)", found[3])
    word = next((code for word, code in ENDS.items() if found[3].startswith(word)), 1)
    return Death(found[1], found[2], int(code[1]) if code else word)


def up_to_failure(log: str) -> str:
    """What srun says up to its first word on a rank that failed."""
    found = RANK_ENDED.search(log)
    return log[: found.end()] if found else log


def rank_log(main_log: Path, rank: str) -> Path:
    """A rank's own log, beside the launch's; `%t` is Slurm's word for every rank."""
    return main_log.with_name(f"{main_log.stem}_rank{rank}.log")


def pattern_of_logs(main_log: Path) -> Path:
    """The logs of all ranks as a pattern for srun, which takes a % only if it is doubled."""
    return rank_log(Path(str(main_log).replace("%", "%%")), "%t")
