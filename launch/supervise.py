"""One launch, supervised: launched, ready, announced, held; after a failure, once more."""

from __future__ import annotations

import argparse
import contextlib
import functools
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from common.settings import setting
from common.signals import Stopped, postponed, turn_deaf
from common.talk import Failure, counted, die, say
from launch import records, server, watch
from launch.announce import announce, iso, say_how_to_use
from launch.findings import Node
from launch.plan import Plan
from launch.timelimit import TimeLimit

LONGEST_PAUSE = 60  # seconds; the first is 2, each further one twice as long
FORGIVEN_AFTER = 3600.0  # seconds of serving, after which the restarts are counted anew


def serve(launch: Launch, put_image: Callable[[], Plan]) -> None:
    """Until somebody stops us, or a Failure that is final. Whatever happens, clean up."""
    with records.guarded(launch.record, launch.endpoint):
        supervise(launch, put_image)


def supervise(launch: Launch, put_image: Callable[[], Plan]) -> None:
    plan, limit = launch.plan, launch.limit
    try:
        records.sweep(launch.logs)
        records.write_record(launch.record, plan, launch.url, launch.log)
        launch.keeper.start()
        limit.begin()
        launch.plan = put_image()
        if launch.log.exists():  # of an earlier launch of this job
            mark(launch.log, "launch")
        while True:
            try:
                launch.attempt()
            except Failure as failure:
                launch.prepare_restart(failure)
    except Stopped:
        if limit.is_reached():
            say(f"Slurm ended the server: job {plan.place.job} has reached its time limit")
        raise
    finally:
        turn_deaf()
        limit.end()
        launch.clean_up()
        launch.keeper.end()
        records.remove_records(launch.record)


@dataclass
class Launch:
    """A launch, its server as long as there is one, and how often it was started anew."""

    plan: Plan
    nodes: Sequence[Node]
    url: str
    args: argparse.Namespace
    limit: TimeLimit
    running: list[server.Server] = field(default_factory=list)
    restarts: int = 0

    @property
    def logs(self) -> Path:
        return Path(self.args.workspace / "logs")

    @property
    def log(self) -> Path:
        return log_path(self.plan, self.args.workspace)

    @property
    def record(self) -> Path:
        return self.logs / f"run_{self.plan.place.job}.json"

    @property
    def endpoint(self) -> Path:
        return self.logs / "endpoint.json"

    @property
    def how_to_stop(self) -> str:
        """What ends this launch and nothing else: scancel would end all that the job does."""
        place, called = self.plan.place, self.args.called_workspace
        usual = called == (setting("WORKSPACE") or ".")
        where = "" if usual else f" WORKSPACE={shlex.quote(str(self.args.workspace))}"
        return f"stop it with ^C or make stop{where} JOB={place.allocation.name or place.job}"

    @functools.cached_property
    def keeper(self) -> records.Keeper:
        return records.Keeper(self.record, self.endpoint)

    def attempt(self) -> NoReturn:
        """Start the servers and hold them: ends only with a Failure, or by a signal."""
        probing = self.args.probe_seconds, self.args.probe_timeout
        for replica in self.plan.replicas:
            started = server.launch(self.plan, replica, self.nodes, self.url, self.log, probing)
            self.running.append(started)
        watch.await_ready(self.running, self.args.ready_timeout)
        for running in self.running:
            self.keeper.announced = announce(running, self.nodes, self.endpoint)
            say_how_to_use(self.keeper.announced, self.how_to_stop)
            running.main_log.show(self.plan.ready_words)
        watch.hold(self.running)

    def prepare_restart(self, failure: Failure) -> None:
        """Clean up and pause; the Failure again where it is final, or there were enough of them."""
        allowed = self.args.restart
        if not failure.passing:
            raise failure
        self.check_job(failure)
        if any(running.served > FORGIVEN_AFTER for running in self.running):
            self.restarts = 0
        if self.restarts >= allowed:
            after = f" (given up after {counted(allowed, 'restart')})" if allowed else ""
            raise Failure(failure.message + after, failure.hint)
        self.restarts += 1
        with postponed():
            self.clean_up()
        seconds = min(2**self.restarts, LONGEST_PAUSE)
        count = f"{self.restarts} of {allowed}"
        say(f"{failure.message}; restarting ({count}) in {seconds} s")
        time.sleep(seconds)
        mark(self.log, f"restart {count}")

    def check_job(self, failure: Failure) -> None:
        """The end of the job is not the server's fault, whoever was the first to notice."""
        if how := self.limit.how_it_ended():
            where, job = self.nodes[0].name, self.plan.place.job
            die(f"{where}: Slurm ended the server: job {job} {how}", hint=failure.hint)

    def clean_up(self) -> None:
        """No server, no container of it, and no word of an endpoint is left."""
        self.keeper.take_back()
        running, self.running = self.running, []
        for each in running:
            server.stop(each)


def mark(log: Path, what: str) -> None:
    """A line in every log of the launch: what follows is another server's."""
    for path in (log, *log.parent.glob(f"{log.stem}_rank*.log")):
        with contextlib.suppress(OSError), path.open("a") as file:  # a full disk ends nothing
            file.write(f"===== run_sbatch.py: {what}, {iso(time.time())} =====\n")


def log_path(plan: Plan, workspace: Path) -> Path:
    return workspace / f"logs/{plan.engine_name}_server_{plan.place.job}.log"
