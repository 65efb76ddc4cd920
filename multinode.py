"""One model over several nodes: a container a node, a rank a GPU, one MPI world.

Slurm's PMIx wires the ranks up; each runs by `docker exec` in the one container of its node, so
that the ranks of a node share a process table (Open MPI's shared memory needs that) and there is
one thing to name and to remove. Rank 0, on the first node, serves HTTP.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from container import ATTACHED, CONTAINER, FINISH, INTERFACES, container_words
from nodes import HOLD, TELL, Step, Told, die, last_words, run, script
from plan import Plan, Spread
from preflight import Node

UP_WITHIN = 60.0  # seconds until every node's container runs
SILENCE = 8.0  # seconds without a sign of life from a node's container
SLURMD_EVERY, SLURMD_MISSES = 2.0, 3  # a slurmd that is only restarted is back by then

# PMIx's files are below slurmd's spool directory; the step that will use them does not exist yet.
SPOOL = script(r"""
    spool=$(scontrol show config 2>/dev/null | sed -n 's/^SlurmdSpoolDir *= //p' |
        sed "s/%h/$(hostname -s)/g; s/%n/$node/g");
    [ ! -d "$spool" ] || set -- --mount "type=bind,source=$spool,target=$spool" "$@";
""")

# A child that is only just there can miss its SIGTERM: it looks for its parent itself, too.
BEAT = script(r"""
    {
        until [ "$(docker inspect --format '{{.State.Running}}' "$name")" = true ]; do
            kill -0 $$ || exit; sleep 0.05;
        done;
        while kill -0 $$; do tell up "$name"; sleep 2; done;
    } 2>/dev/null &
    beat=$!;
    trap 'kill $watch $beat 2>/dev/null' EXIT;
""")

HOLDER = " ".join([TELL, HOLD, INTERFACES, CONTAINER, SPOOL, ATTACHED, BEAT, FINISH,
                   'tell ended "$code";', "exit $code;"])  # fmt: skip

# `docker exec` passes by the image's entry point, which sets up NCCL for EFA: it is put in front.
# The variables go by a pipe: no file is left when Slurm kills the task with another one's death.
# Some versions of trtllm-llmapi-launch wait for ever when trtllm-serve has failed: rank 0 looks.
RANK = TELL + " " + HOLD + " " + script(r"""
    name=trtllm-$1-$node; cwd=$2; shift 2;
    stop() {
        trap '' TERM INT HUP;
        [ -z "$client" ] || kill -KILL $client 2>/dev/null;
        exit 143;
    };
    trap '[ -n "$client" ] || [ "$!" = "$watch" ] || client=$!; stop' TERM INT HUP;
    docker exec --env-file <(env | grep -E '^(PMIX|PMI|PMI2|SLURM)[A-Za-z0-9_]*=')
        --workdir "${cwd:-/}" "$name" sh -c
        'entry=/opt/nvidia/nvidia_entrypoint.sh; [ -x $entry ] || entry=; exec $entry "$@"'
        rank trtllm-llmapi-launch "$@" &
    client=$!;
    serving() {
        processes=$(docker top "$name" -eo pid,args) || return 2;
        printf %s "$processes" | grep -v llmapi-launch | grep -q trtllm-serve;
    };
    trap 'left=1; kill -KILL $client' USR1;
    if [ "$SLURM_PROCID" = 0 ]; then
        {
            for i in $(seq 60); do ! serving || break; kill -0 $$ || exit; sleep 1; done;
            while serving; [ $? != 1 ]; do kill -0 $$ || exit; sleep 1; done;
            sleep 2; kill -USR1 $$;
        } >/dev/null 2>&1 &
        look=$!;
        trap 'kill $watch $look 2>/dev/null' EXIT;
    fi;
    wait $client; code=$?;
    [ -z "$left" ] || { wait $client; code=1; echo "trtllm-serve has ended, its leader has not"; };
    trap '' TERM INT HUP;
    exit $code;
""")  # fmt: skip


def holder_command(plan: Plan, spread: Spread, environ: Mapping[str, str]) -> list[str]:
    """A container on each node that sleeps, for the ranks to run in."""
    words = container_words(plan, environ)
    return [*plan.place.on(spread.nodes), "bash", "-c", HOLDER, "holder", *words]


def ranks_command(plan: Plan, spread: Spread, logs: Path) -> list[str]:
    """All ranks, in blocks, each with a log of its own. The death of one ends all."""
    step = plan.place.on(spread.nodes, spread.ranks, spread.mpi)
    return [
        *step,
        "--distribution=block",
        "--kill-on-bad-exit=1",
        "--open-mode=append",
        f"--output={rank_log(logs, '%t')}",
        "bash",
        "-c",
        RANK,
        "rank",
        plan.place.job,
        plan.cwd,
        *plan.engine,
    ]


class Holders(threading.Thread):
    """The nodes' containers, and signs of life from each."""

    def __init__(self, step: Step, spread: Spread, nodes: Sequence[Node]) -> None:
        super().__init__(daemon=True)
        self.step, self.spread = step, spread
        self.names = [node.name for node in nodes[: spread.nodes]]
        self.seen: dict[str, float] = {}
        self.ended: dict[str, str] = {}
        self.talk: list[str] = []

    def run(self) -> None:
        with contextlib.suppress(ValueError):  # the step is let go of while we read
            for told in self.step.told():
                self.note(told)

    def note(self, told: Told) -> None:
        if told.key == "up":
            self.seen[told.node] = time.monotonic()
        elif told.key == "ended":
            self.ended[told.node] = told.value
        else:
            self.talk = [*self.talk[-50:], told.line]

    def fault(self) -> str:
        """What is wrong with a node's container, or ''."""
        now = time.monotonic()
        for index, name in enumerate(self.names):
            where = f"{name} ({self.spread.ranks_of(index)})"
            if code := self.ended.get(name):
                words = last_words("\n".join(self.talk))
                return f"{where}: its container ended with exit code {code}: {words}".rstrip(": ")
            if name in self.seen and now - self.seen[name] > SILENCE:
                return f"{where}: no sign of life from its container for {SILENCE:g} s"
        return ""

    def await_up(self) -> None:
        """Return when every node's container runs."""
        deadline = time.monotonic() + UP_WITHIN
        while len(self.seen) < self.spread.nodes:
            if ended := self.step.poll() is not None:
                self.join(1)  # until all that it said has been read
            if fault := self.fault():
                die(fault, passing=True)
            missing = [name for name in self.names if name not in self.seen]
            if missing and (ended or time.monotonic() > deadline):
                late = "" if ended else f" within {UP_WITHIN:g} s"
                die(
                    f"{', '.join(missing)}: no container{late}: "
                    f"{last_words(chr(10).join(self.talk)) or 'no word from there'}",
                    passing=True,
                )
            time.sleep(0.02)


class Slurmds(threading.Thread):
    """Whether every node's slurmd listens: a step outlives its slurmd, so that nobody else says.

    A node whose slurmd never answered here (another port or address) is not judged by it.
    """

    def __init__(self, holders: Holders, port: int) -> None:
        super().__init__(daemon=True)
        self.holders, self.port = holders, port
        self.known: set[str] = set()
        self.misses = dict.fromkeys(holders.names, 0)

    def run(self) -> None:
        while self.holders.step.poll() is None:
            for name in self.misses:
                self.look(name)
            time.sleep(SLURMD_EVERY)

    def look(self, name: str) -> None:
        if self.listens(name):
            self.known.add(name)
            self.misses[name] = 0
        elif name in self.known:
            self.misses[name] += 1

    def listens(self, name: str) -> bool:
        try:
            socket.create_connection((name, self.port), 2).close()
        except OSError:
            return False
        return True

    def fault(self) -> str:
        for index, (name, misses) in enumerate(self.misses.items()):
            if misses >= SLURMD_MISSES:
                ranks = self.holders.spread.ranks_of(index)
                return f"{name} ({ranks}): its slurmd does not answer on port {self.port}"
        return ""


def slurmd_port() -> int:
    config = run(["scontrol", "show", "config"])
    found = re.search(r"^SlurmdPort\s*=\s*(\d+)", config, re.M)
    return int(found[1]) if found else 6818


RANK_ENDED = re.compile(r"^srun: error: (\S+): tasks? ([\d,-]+): (.*)$", re.M)
# srun says a signal in strsignal()'s words.
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
    """The first rank that failed, as srun tells it; those that it took along come later."""
    if not (found := RANK_ENDED.search(log)):
        return None
    code = re.search(r"exit code (\d+)", found[3])
    word = next((code for word, code in ENDS.items() if found[3].startswith(word)), 1)
    return Death(found[1], found[2], int(code[1]) if code else word)


def rank_log(main_log: Path, rank: str) -> Path:
    """A rank's own log, beside the launch's; `%t` is Slurm's word for every rank."""
    return main_log.with_name(f"{main_log.stem}_rank{rank}.log")
