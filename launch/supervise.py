"""One launch, supervised: its servers started, announced, and watched until it is over."""

from __future__ import annotations

import argparse
import functools
import queue
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from common.live import Live
from common.settings import setting
from common.signals import Stopped, pause, turn_deaf
from common.talk import Failure, next_line, say
from launch import disagg, records
from launch.address import url_of
from launch.announce import announce, facts, say_how_to_use, say_ready, write
from launch.findings import Node
from launch.front import PAGE, Front, has_found
from launch.life import JobOver, Life, Terms, die_with_the_job, mark
from launch.lookout import MISSES, Lookout
from launch.plan import Plan
from launch.progress import Progress
from launch.status import page
from launch.timelimit import TimeLimit

LOOK_EVERY = 0.1  # seconds between two looks of the main thread
NOTICES_WITHIN = 25.0  # seconds; one check of the front's may take ten


def serve(launch: Launch, put_image: Callable[[], Plan]) -> None:
    """Serve until somebody stops us, or a Failure is final. Whatever happens, clean up."""
    with records.guarded(launch.record, launch.endpoint, launch.fleet_record):
        supervise(launch, put_image)


def supervise(launch: Launch, put_image: Callable[[], Plan]) -> None:
    plan, limit = launch.plan, launch.limit
    try:
        records.sweep(launch.logs)
        records.write_record(launch.record, plan, launch.url, launch.log)
        launch.keeper.start()
        limit.begin()
        launch.plan = put_image()
        launch.begin()
        launch.wait()
    except Stopped:
        if limit.is_reached():
            say(f"Slurm ended the server: job {plan.place.job} has reached its time limit")
        raise
    finally:
        turn_deaf()
        limit.end()
        launch.end()
        launch.keeper.end()
        records.remove_records(launch.record, launch.fleet_record)


@dataclass
class Launch:
    """A launch: the lives of its servers, and what people and programs are told of them."""

    plan: Plan
    nodes: Sequence[Node]
    url: str
    args: argparse.Namespace
    limit: TimeLimit
    lives: list[Life] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    # Lives report from their own threads, one at a time.
    lock: threading.RLock = field(default_factory=threading.RLock)
    ends: queue.SimpleQueue[BaseException] = field(default_factory=queue.SimpleQueue)
    begun: float = field(default_factory=time.monotonic)
    announced: dict[str, object] | None = None  # of a fleet: what does not change
    front: Front | None = None
    lookout: Lookout | None = None

    @property
    def logs(self) -> Path:
        return Path(self.args.workspace / "logs")

    @property
    def log(self) -> Path:
        return self.plan.log_of(self.plan.replicas[0], self.logs)

    @property
    def record(self) -> Path:
        return self.logs / f"run_{self.plan.place.job}.json"

    @property
    def fleet_record(self) -> Path:
        """The file that says how each server of a fleet is."""
        return self.logs / f"fleet_{self.plan.place.job}.json"

    @property
    def endpoint(self) -> Path:
        return self.logs / "endpoint.json"

    @property
    def how_to_stop(self) -> str:
        """How to end this launch and nothing else: scancel would end all that the job does."""
        place, called = self.plan.place, self.args.called_workspace
        usual = called == (setting("WORKSPACE") or ".")
        where = "" if usual else f" WORKSPACE={shlex.quote(str(self.args.workspace))}"
        return f"stop it with ^C or make stop{where} JOB={place.allocation.name or place.job}"

    @functools.cached_property
    def keeper(self) -> records.Keeper:
        return records.Keeper(self.record, self.endpoint)

    @property
    def left(self) -> list[Life]:
        """The lives whose servers serve, or will."""
        return [life for life in self.lives if not life.why]

    @property
    def servers(self) -> list[Life]:
        """All but the orchestrator, if there is one."""
        return [life for life in self.lives if not life.replica.words]

    @property
    def addresses(self) -> dict[str, str]:
        """Each server's `host:port`, by its label."""
        return {life.replica.label: urlsplit(life.url).netloc for life in self.lives}

    @property
    def orchestrator(self) -> Life | None:
        return next((life for life in self.lives if life.replica.words), None)

    def begin(self) -> None:
        """Start every server, in a thread of its own."""
        self.begun, plan = time.monotonic(), self.plan
        at_once = self.args.load_at_once or len(plan.replicas)
        turns = threading.BoundedSemaphore(at_once)
        terms = Terms(self.args, self.limit, self.over, turns, self.ready, self.changed, self.lost)
        for replica in plan.replicas:
            node, colons = self.nodes[replica.first], not replica.role
            url = url_of(node, plan.place, replica.args, colons=colons)
            log = plan.log_of(replica, self.logs)
            if log.exists():  # of an earlier launch of this job
                mark(log, "launch")
            self.lives.append(Life(plan, replica, self.nodes, url, log, terms))
        self.note_states()
        if plan.is_fleet and not self.args.no_front:
            self.begin_front()
        for life in self.servers:
            life.start()

    def begin_front(self) -> None:
        """Start the front before the servers load, to notice early if it cannot run."""
        host, port = self.plan.replicas[0].host, urlsplit(self.url).port or 0
        where = self.plan.place, self.nodes[0].name, host, port
        servers, models = (
            {each.label: self.addresses[each.label] for each in some}
            for some in (self.plan.entrances, self.plan.listers)
        )
        self.front = Front(*where, servers, self.args.affinity, models)
        self.front.start()
        self.lookout = Lookout(self.plan.place, self.nodes[0].name, host, self.url)
        self.lookout.die_if_walled()

    def tend_front(self) -> None:
        """Restart the front if it has ended, unless the job has, too; see whether it answers."""
        if self.front and self.front.step and self.front.step.poll() is not None:
            die_with_the_job(self.plan, self.limit, self.nodes[0].name)
            self.front.tick()
        if self.lookout and self.lookout.is_due and (found := self.lookout.look()):
            with self.lock:
                self.note_found(found)

    def await_front(self, name: str) -> bool:
        """Wait until the front finds that this one is ready; False if it does not."""
        found, deadline = "", time.monotonic() + NOTICES_WITHIN
        while self.front and time.monotonic() < deadline:
            if has_found(found := page(self.url + PAGE), name):
                return True
            pause(self.over, LOOK_EVERY)
        return not found  # without a page nobody can tell

    def note_found(self, found: str) -> None:
        """Note whom the front reaches, by its page. It may notice a failure sooner than we do."""
        ready = [life for life in self.left if life.is_ready]
        before = [life.reached for life in ready]
        for life in ready:
            is_found = has_found(found, life.replica.label)
            life.unfound = 0 if is_found or not life.is_well else life.unfound + 1
            if is_found or life.unfound == MISSES:
                self.note_reached(life, is_found)
        if before != [life.reached for life in ready]:
            self.go_on()

    def note_reached(self, life: Life, reached: bool) -> None:
        """Note whether the front reaches it; say so when that changes."""
        if reached != life.reached and reached:
            life.say("the front reaches it now")
        elif reached != life.reached:
            what = f"the front on {self.nodes[0].name} cannot reach {urlsplit(life.url).netloc}"
            life.say(f"ready, but {what}: a firewall between the nodes?")
        life.reached, life.unfound = reached, 0

    def wait(self) -> NoReturn:
        """Wait for a signal, or for what ends the launch."""
        progress = Progress(len(self.lives))
        while True:
            try:
                raise self.ends.get(timeout=LOOK_EVERY)
            except queue.Empty:
                self.tend_front()
            with self.lock:
                self.spare_orchestrator()
                servers = [life.server for life in self.left]
                if loading := [one for one in servers if one and not one.ready_at]:
                    progress.tell(loading, max(one.age for one in loading))

    def end(self) -> None:
        """Leave no server, no container of one, and no endpoint.json."""
        with self.lock:
            self.over.set()
            self.keeper.take_back()
        for life in self.lives:
            if life.ident:
                life.join()
        if self.front:
            self.front.stop()

    # --- what lives tell, in their own threads ----------------------------------------------------

    def ready(self, life: Life) -> None:
        reached = self.await_front(life.replica.label)
        with self.lock:
            if self.over.is_set() or not life.server:
                return
            life.server.ready_at = time.monotonic()
            Live.clear()
            if self.plan.is_fleet:
                where = f"{life.url} on {', '.join(node.name for node in life.own_nodes)}"
                gpus = f", GPUs {','.join(life.replica.devices)}" if life.replica.devices else ""
                life.say(f"ready after {life.server.age:.1f} s: {where}{gpus}")
                self.note_reached(life, reached)
                self.go_on()
                return
            self.keeper.announced = announce(life.server, self.nodes, self.endpoint)
            say_how_to_use(self.keeper.announced, self.how_to_stop)
            life.server.main_log.show(self.plan.ready_words)

    def changed(self, life: Life) -> None:
        with self.lock:
            if self.over.is_set():
                return
            if self.plan.is_fleet:
                self.go_on()
            else:
                self.keeper.take_back()

    def lost(self, life: Life, error: BaseException) -> None:
        """End the launch if no other server goes on, or if that is not enough."""
        with self.lock:
            if self.over.is_set():
                return
            life.why = str(error) or type(error).__name__
            ends_all = not self.plan.is_fleet or not isinstance(error, Failure)
            if ends_all or isinstance(error, JobOver):
                self.ends.put(error)
                return
            assert isinstance(error, Failure)
            message = f"{life.replica.label}: {error.message}"
            if self.args.all_or_nothing or not self.left:
                last = "the others are ended, too" if self.left else "no replica is left"
                self.ends.put(Failure(f"{message}; {last}", error.hint))
                return
            say(f"LOST {message}" + next_line(error.hint))
            self.go_on()
            say(f"{len(self.left)} of {len(self.lives)} replicas go on")

    # --- of a disaggregated launch ----------------------------------------------------------------

    def start_orchestrator(self) -> None:
        """Start it once every server is ready and has said what it serves."""
        life, servers = self.orchestrator, self.servers
        if not life or life.ident or not all(each.is_ready for each in servers):
            return
        assert servers[0].server
        text = disagg.text_of(self.plan, self.addresses)
        disagg.file_of(self.plan, self.logs).write_text(text)
        life.replica = replace(life.replica, serves=servers[0].server.health.model)
        life.start()

    def spare_orchestrator(self) -> None:
        """Do not blame the orchestrator for what fails while a server is being restarted."""
        life = self.orchestrator
        if life and life.server and not all(each.is_ready for each in self.servers):
            life.server.probe.forgive()

    # --- what a fleet tells -----------------------------------------------------------------------

    def go_on(self) -> None:
        """Write the fleet's records; announce READY once all that have not failed meanwhile are."""
        self.note_states()
        self.start_orchestrator()
        ready = [life for life in self.left if life.is_ready and life.reached]
        if not ready:
            self.keeper.take_back()
        elif self.announced:
            self.write_endpoint(ready)
        elif not any(self.is_waited_for(life) for life in self.left):
            self.announce_all(ready)

    def is_waited_for(self, life: Life) -> bool:
        """Whether READY waits for it. A restarted replica joins later; no pool serves alone."""
        return not life.is_ready and (not life.restarts or self.orchestrator is not None)

    def announce_all(self, ready: Sequence[Life]) -> None:
        server = ready[0].server
        assert server
        nodes, took = self.nodes[: self.plan.nodes], time.monotonic() - self.begun
        url = self.url if self.front else self.entrance(ready).url
        self.announced = facts(server, nodes, url, self.log, took)
        endpoint = self.write_endpoint(ready)
        who = self.who_serves(ready)
        say_ready(took, url, f"{server.health.model} with {who}, {self.plan.title}")
        say_how_to_use(endpoint, self.how_to_stop)

    def entrance(self, ready: Sequence[Life]) -> Life:
        """Where requests go in, without a front."""
        return self.orchestrator or ready[0]

    def who_serves(self, ready: Sequence[Life]) -> str:
        """`4 replicas`, `3 of 4 replicas`, `2 prefill and 1 decode servers`."""
        if self.orchestrator:
            return disagg.count(self.plan)
        every = len(self.lives)
        return f"{every if len(ready) == every else f'{len(ready)} of {every}'} replicas"

    def write_endpoint(self, ready: Sequence[Life]) -> dict[str, object]:
        assert self.announced
        servers = [life for life in self.left if life is not self.orchestrator]
        found = self.announced | {"replicas": [life.row for life in servers]}
        if not self.front:
            found["url"] = self.entrance(ready).url
        self.keeper.announced = write(self.endpoint, found)
        return found

    def note_states(self) -> None:
        if self.plan.is_fleet:
            rows = [life.row for life in self.lives]
            records.write_states(self.fleet_record, self.plan, self.url, rows)
