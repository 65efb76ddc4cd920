"""A server: its steps on the nodes, how they are started, and how they are ended."""

import contextlib
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from common.signals import pause
from common.talk import Failure, die, say
from launch import world
from launch.findings import Node
from launch.health import Health, Probe
from launch.loading import Loading
from launch.log import Log
from launch.node.clients import WatchClients
from launch.node.messages import Left, Lingers
from launch.node.port import AwaitPort
from launch.nodes import Place, Step, ask, held
from launch.order import Command
from launch.plan import Plan, Replica
from launch.runtimes import Runtime, runtime
from launch.timelimit import is_suspended

TICK, SERVING_TICK = 0.02, 0.05  # seconds between two looks at the processes and their logs
UNREACHED = 4.0  # seconds without an answer from an engine that says that it listens
STOP_WITHIN, REMOVE_WITHIN = 11.0, 7.0  # seconds for the nodes; a dead one costs us both


@dataclass
class Server:
    """A server that was started: its steps, its logs, the threads that ask it, and times."""

    plan: Plan
    replica: Replica
    nodes: Sequence[Node]  # its own; the first one serves
    url: str
    step: Step  # the engine; of a server on several nodes, all its ranks
    log: Log  # what the step says; in a spread launch only Slurm speaks there
    health: Health
    probe: Probe
    started: float
    rank0: Log | None = None
    holders: world.Holders | None = None  # of a spread or an attended launch
    starts: Mapping[Path, int] = field(default_factory=dict)  # where this launch begins in each log
    ready_at: float | None = None
    began: float = field(default_factory=time.time)  # `started` by the wall clock
    loading: Loading = field(default_factory=Loading)
    ask_at: float = math.inf  # when to ask the node why nobody gets an answer
    looked: float = field(default_factory=time.monotonic)  # when its processes were looked at
    walled: bool = False  # we have said that only we cannot reach it
    excused: float = 0.0  # seconds in which the job was suspended, or we stood still
    over: threading.Event = field(default_factory=threading.Event)  # set when the launch is over

    @property
    def node(self) -> str:
        return self.nodes[0].name

    @property
    def runtime(self) -> Runtime:
        return runtime(self.plan.runtime)

    @property
    def age(self) -> float:
        return time.monotonic() - self.started

    @property
    def served(self) -> float:
        """Seconds since it was ready; 0 before."""
        return time.monotonic() - self.ready_at if self.ready_at else 0.0

    @property
    def when(self) -> str:
        return "while serving" if self.ready_at else "before it was ready"

    @property
    def main_log(self) -> Log:
        """The log in which the engine itself speaks."""
        return self.rank0 or self.log

    def forgive(self, seconds: float) -> None:
        """Excuse a silence of so many seconds."""
        self.excused += seconds
        self.health.misses = 0
        self.probe.forgive()
        if self.holders:
            self.holders.forgive()

    def pump(self) -> bytes:
        """Show what is new in the logs, and note what it means."""
        new = self.log.pump() + (self.rank0.pump() if self.rank0 else b"")
        if new and not self.ready_at:
            self.loading.read(new)
        if self.plan.ready_words in new:
            self.health.listening = True
            self.ask_at = time.monotonic() + UNREACHED
            self.health.hurry.set()
        if self.plan.engine.WORK_WORDS.search(new):
            self.probe.traffic = time.monotonic()
        return new


def launch(
    plan: Plan,
    replica: Replica,
    nodes: Sequence[Node],
    url: str,
    log_path: Path,
    probing: tuple[float, float],
    over: threading.Event,
) -> Server:
    """Start a server's steps. `probing`: seconds between two probes, and until one has failed.

    On a Failure in here, or when the launch is `over`, all that has been started is ended.
    """
    own = nodes[replica.first : replica.first + replica.nodes]
    if plan.engine.binds_first(plan.version):
        await_port(plan, replica, over)
    log, started = Log(log_path, replica.label), time.monotonic()
    starts = {p: p.stat().st_size for p in log_path.parent.glob(f"{log_path.stem}_rank*.log")}
    rank0: Log | None = None
    holders: world.Holders | None = None
    try:
        if replica.spread or runtime(plan.runtime).ATTENDED:
            step, rank0, holders = launch_spread(plan, replica, own, log, over)
        else:
            step = Step(runtime(plan.runtime).serve(plan, replica, os.environ), output=log.sink)
    except BaseException:
        log.close()
        raise
    key = plan.engine.key_of(replica.args, os.environ)
    health = Health(url, plan.engine.names_of(replica.model, replica.args), key)
    health.model = replica.serves
    probe = Probe(url, *probing, partial(watch_clients, plan, replica), key)
    health.start()
    steps = step, log, health, probe, started, rank0, holders, starts
    return Server(plan, replica, own, url, *steps, over=over)


def watch_clients(plan: Plan, replica: Replica, every: float) -> Command:
    return Command(plan.place.on(1, first=replica.first), WatchClients(replica.port, every))


def await_port(plan: Plan, replica: Replica, over: threading.Event) -> None:
    """Wait until the last server's connections let go of it (a minute): else the engine fails."""
    order = Command(plan.place.on(1, first=replica.first), AwaitPort(replica.port))
    with held(order) as step:
        listener = threading.Thread(target=say_lingering, args=(step, replica.port), daemon=True)
        listener.start()
        while listener.is_alive():
            listener.join(TICK)
            pause(over, 0)


def say_lingering(step: Step, port: int) -> None:
    with contextlib.suppress(ValueError):  # the step was let go of while we read
        for told in step.told():
            if isinstance(told.message, Lingers):
                lingering = f"connections of a server that has ended still hold port {port}"
                say(f"{told.node}: {lingering}; waiting, a minute at most")


def launch_spread(
    plan: Plan, replica: Replica, nodes: Sequence[Node], log: Log, over: threading.Event
) -> tuple[Step, Log | None, world.Holders]:
    """Start what holds on every node (with Docker, a container), then the ranks."""
    kind, shape = runtime(plan.runtime), replica.spread or world.ALONE
    holders = world.Holders(Step(kind.hold(plan, replica, os.environ)), shape, nodes)
    holders.start()
    try:
        holders.await_up(over)
        if not replica.spread:
            return Step(kind.serve(plan, replica, os.environ), output=log.sink), None, holders
        rank0 = Log(world.rank_log(log.path, "0"), replica.label)
        step = Step(kind.ranks(plan, replica, world.pattern_of_logs(log.path)), output=log.sink)
    except BaseException:
        stop_world(plan, replica, holders)
        raise
    return step, rank0, holders


def die_of_a_node(server: Server) -> None:
    if server.holders and (fault := server.holders.fault()):
        hint = f"{server.holders.advice()}; the logs: {server.log.path.parent}".lstrip("; ")
        die(f"{fault}, {server.when}", hint=hint, passing=True)


def stop(server: Server) -> None:
    """End it, and everything of it on the nodes."""
    server.health.end()
    server.probe.end()
    died_alone = server.step.poll() is not None
    if server.holders:
        stop_world(server.plan, server.replica, server.holders, server.step)
    elif not server.step.stop(STOP_WITHIN) or died_alone:
        remove_once_more(server.plan, server.replica)
    # What it still says is in the log; on the screen it would look like a failure.
    for log in filter(None, (server.log, server.rank0)):
        log.close()
    say(f"stopped; the log is {server.main_log.path}")


def stop_world(plan: Plan, replica: Replica, holders: world.Holders, *ranks: Step) -> None:
    """End a spread launch; a node that is out of reach does not delay the others."""
    steps = (*ranks, holders.step)
    for step in steps:
        step.let_go()
    left = holders.await_farewell()
    for step in steps:
        step.stop(1)
    if any(left.values()) and say_if_suspended(plan.place):
        return
    if "" in left.values():
        remove_once_more(plan, replica)
    for name, why in left.items():
        if why:
            say_left(plan, replica, name, why)


def say_if_suspended(place: Place) -> bool:
    """Whether the nodes are silent because the job is suspended; if so, say it."""
    if suspended := is_suspended(place):
        then = f"ends once it is resumed (`scontrol resume {place.job}`) or over"
        say(f"job {place.job} is suspended: what is left on its nodes {then}")
    return suspended


def say_left(plan: Plan, replica: Replica, node: str, why: str) -> None:
    name = runtime(plan.runtime).container(plan, replica, node)
    say(runtime(plan.runtime).left(node, name or "", why))


def remove_once_more(plan: Plan, replica: Replica) -> None:
    """Remove what is left, in case a node's own step could not, or was killed before it did."""
    if not (command := runtime(plan.runtime).remove(plan, replica)):
        return
    try:
        told = ask(command, "removing what is left", timeout=REMOVE_WITHIN)
    except Failure as failure:
        if say_if_suspended(plan.place):
            return
        if "expired" not in failure.message:  # a cancelled job's step has cleaned up itself
            then = "It should end by itself once the node answers"
            otherwise = "else your next launch there removes it"
            what = f"could not confirm that the container is gone: {failure.message}"
            say(f"{what}. {then}; {otherwise}")
        return
    for each in told:
        if isinstance(each.message, Left):
            say_left(plan, replica, each.node, each.message.why)
