"""A server's life, in a thread of its own: started, ready, watched; after a failure, again."""

from __future__ import annotations

import argparse
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from common.signals import Stopped, pause
from common.talk import Failure, counted, say
from launch import server, watch
from launch.announce import iso
from launch.findings import Node, gpus_of
from launch.plan import Plan, Replica
from launch.runtimes import runtime
from launch.timelimit import TimeLimit

LONGEST_PAUSE = 60  # seconds; the first is 2, each further one twice as long
FORGIVEN_AFTER = 3600.0  # seconds of serving, after which restarts are counted from 0 again


class JobOver(Failure):
    """The job has ended, and with it everything in it."""


@dataclass
class Terms:
    """What the lives of a launch have in common, and whom they tell."""

    args: argparse.Namespace
    limit: TimeLimit
    over: threading.Event  # set when they are to end
    turns: threading.Semaphore  # how many may load at once
    ready: Callable[[Life], None]
    changed: Callable[[Life], None]  # it was started, or it ended
    lost: Callable[[Life, BaseException], None]  # it will not be started again


class Life(threading.Thread):
    """One server of a launch, however often it is started."""

    def __init__(
        self, plan: Plan, replica: Replica, nodes: Sequence[Node], url: str, log: Path, terms: Terms
    ) -> None:
        """`nodes` are all nodes of the launch."""
        super().__init__(daemon=True)
        self.plan, self.replica, self.nodes, self.url = plan, replica, nodes, url
        self.log, self.terms = log, terms
        self.server: server.Server | None = None
        self.restarts = 0  # those that still count
        self.starts = 0
        self.why = ""  # why it is lost; '' while it is not
        self.reached = True  # whether the front reaches it, if there is one
        self.unfound = 0  # looks in a row at which the front did not

    @property
    def own_nodes(self) -> Sequence[Node]:
        return self.nodes[self.replica.first : self.replica.first + self.replica.nodes]

    @property
    def is_ready(self) -> bool:
        running = self.server
        return running is not None and running.ready_at is not None

    @property
    def is_well(self) -> bool:
        running = self.server
        return running is not None and not running.health.misses

    @property
    def state(self) -> str:
        if self.why:
            return "lost"
        if self.is_ready:
            return "ready"
        return "loading" if self.server else "restarting" if self.starts else "waiting"

    @property
    def row(self) -> dict[str, Any]:
        """What others are told of it. Times are ISO 8601, or `null` while they do not apply."""
        running = self.server
        ready_at = running.ready_at if running else None
        head, *_ = names = [node.name for node in self.own_nodes]
        return {
            "name": self.replica.label,
            "state": self.state,
            "url": self.url,
            "node": head,
            "nodes": names,
            "gpus": self.gpus,
            "log": str(running.main_log.path if running else self.log),
            "metrics": f"{self.url}{self.plan.engine.METRICS}",
            "container": runtime(self.plan.runtime).container(self.plan, self.replica, head),
            "started": iso(running.began) if running else None,
            "ready": iso(running.began + ready_at - running.started)
            if running and ready_at
            else None,
            "restarts": max(self.starts - 1, 0),
            "why": self.why,
        }

    @property
    def gpus(self) -> list[str]:
        """The ids of its GPUs, node by node."""
        if self.replica.gpus == "none":
            return []
        if self.replica.devices:
            return list(self.replica.devices)
        return [gpu for node in self.own_nodes for gpu in gpus_of(node, self.replica.gpus)]

    def say(self, message: str) -> None:
        """Say it with the server's name, if there are several."""
        say(f"{self.replica.label}: {message}" if self.replica.label else message)

    def run(self) -> None:
        try:
            while True:
                try:
                    self.attempt()
                except Failure as failure:
                    self.prepare_restart(failure)
        except Stopped:
            pass
        except BaseException as error:  # for the main thread to raise
            self.terms.lost(self, error)
        finally:
            self.clean_up()

    def attempt(self) -> NoReturn:
        """Start and watch it. This ends only with a Failure, or when the launch is over."""
        args, over = self.terms.args, self.terms.over
        probing = args.probe_seconds, args.probe_timeout
        with self.turn():
            self.starts += 1
            what = self.plan, self.replica, self.nodes, self.url, self.log, probing, over
            self.server = server.launch(*what)
            self.terms.changed(self)
            watch.await_ready(self.server, args.ready_timeout)
        self.terms.ready(self)
        watch.hold(self.server)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn to load, and hold it while loading: not all may be allowed to at once."""
        while not self.terms.turns.acquire(timeout=server.TICK):
            pause(self.terms.over, 0)
        try:
            yield
        finally:
            self.terms.turns.release()

    def prepare_restart(self, failure: Failure) -> None:
        """Clean up and pause. Raise the Failure again if it is final or no restart is left."""
        allowed = self.terms.args.restart
        if failure.passing or self.plan.is_fleet:
            self.check_job(failure)
        if not failure.passing:
            raise failure
        if self.server and self.server.served > FORGIVEN_AFTER:
            self.restarts = 0
        if self.restarts >= allowed:
            after = f" (given up after {counted(allowed, 'restart')})" if allowed else ""
            raise Failure(failure.message + after, failure.hint)
        self.restarts += 1
        self.clean_up()
        seconds = min(2**self.restarts, LONGEST_PAUSE)
        count = f"{self.restarts} of {allowed}"
        self.say(f"{failure.message}; restarting ({count}) in {seconds} s")
        pause(self.terms.over, seconds)
        mark(self.log, f"restart {count}")

    def check_job(self, failure: Failure) -> None:
        """JobOver if the job has ended: then the server is not to blame, whoever noticed first."""
        die_with_the_job(self.plan, self.terms.limit, self.own_nodes[0].name, failure.hint)

    def clean_up(self) -> None:
        """End the server and all its containers."""
        running, self.server = self.server, None
        self.terms.changed(self)
        if running:
            server.stop(running)


def die_with_the_job(plan: Plan, limit: TimeLimit, where: str, hint: str = "") -> None:
    """JobOver if the job has ended."""
    if how := limit.how_it_ended():
        what = "fleet" if plan.is_fleet else "server"
        raise JobOver(f"{where}: Slurm ended the {what}: job {plan.place.job} {how}", hint)


def mark(log: Path, what: str) -> None:
    """Write a line into every log of the server: what follows is from another start."""
    for path in (log, *log.parent.glob(f"{log.stem}_rank*.log")):
        with contextlib.suppress(OSError), path.open("a") as file:  # a full disk ends nothing
            file.write(f"===== run_sbatch.py: {what}, {iso(time.time())} =====\n")
