"""All servers of a launch, watched: until they are ready, and until one of them ends or hangs."""

import time
from collections.abc import Sequence
from typing import NoReturn

from common.live import Live, at_terminal
from common.talk import die, note, say, visible
from launch.death import report_death
from launch.log_lines import clean
from launch.node.messages import Owner
from launch.nodes import ask
from launch.server import TICK, Server, die_of_a_node

HEARTBEAT = 30.0  # seconds between two lines while the engine loads
LIVE = 0.5  # the same where one line of the terminal is written over
HANGS = "an engine can hang like this after a rank has died: start it again, or use --restart"
SLOW = "; if a first token may take longer there, raise PROBE_TIMEOUT"


def await_ready(servers: Sequence[Server], timeout: float) -> None:
    """Return when all answer; Failure when one ends first, or at the deadline."""
    told = Told(servers[0])
    while not all(server.health.ready.is_set() for server in servers):
        tick(servers)
        for server in servers:
            die_if_strange(server)
            if server.age > timeout:
                die_of_slowness(server, timeout)
        told.now_and_then()
    Live.clear()
    for server in servers:
        check_owner(server)
        check_end(server)  # then it was not ours that answered


class Told:
    """What the engine does while it loads: on one line of a terminal, else a line now and then."""

    def __init__(self, server: Server) -> None:
        self.server, self.beat, self.blink = server, HEARTBEAT, 0.0
        self.live = at_terminal() and not server.main_log.shown  # the log would be between

    def now_and_then(self) -> None:
        age = self.server.age
        if self.live and age > self.blink:
            self.blink = age + LIVE
            Live.show(self.words(age))
        if age > self.beat:
            self.beat += HEARTBEAT
            (note if self.live else say)(self.words(age))

    def words(self, age: float) -> str:
        if said := self.server.loading.said:
            return f"{said}, {age:.0f} s"
        last = visible(clean(self.server.main_log.last_line).text[:80]) or "(empty)"
        return f"still loading after {age:.0f} s; the log's last line: {last}"


def die_of_slowness(server: Server, timeout: float) -> NoReturn:
    end = server.main_log.last_line or "(empty)"
    late = f"{server.node}: the server was not ready within {timeout:g} s: {server.health.answer}"
    hint = f"give it more time with --ready-timeout; the whole log: {server.log.path}"
    die(f"{late}; its log ends: {end}", hint=hint, passing=True)


def check_owner(server: Server) -> None:
    """While ours loads, its port may be another's, of the same model even."""
    deadline = time.monotonic() + 1
    while not server.health.listening and time.monotonic() < deadline:
        tick([server])
    if server.health.listening:
        return
    command = server.runtime.ask_owner(server.plan, server.replica)
    for told in ask(command, "asking whose the port is", timeout=10):
        if isinstance(told.message, Owner) and not (told.message.own or told.message.why):
            die_of_stranger(server, server.health.model)


def die_if_strange(server: Server) -> None:
    """The port was free when the nodes were asked; since then somebody may have taken it."""
    if server.health.is_stranger():
        die_of_stranger(server, f"{server.health.stranger}, not {server.replica.model}")


def die_of_stranger(server: Server, serves: str) -> NoReturn:
    hint = "use another --port; `ss -ltnp` on the node shows whose it is"
    taken = f"{server.node}: another server took {server.url} in the meantime"
    die(f"{taken}; it serves {serves}", hint=hint)


def hold(servers: Sequence[Server]) -> NoReturn:
    """Watch until somebody stops us; Failure when a server ends or stops answering."""
    for server in servers:
        server.probe.begin(server.health.model)
    while True:
        tick(servers)
        for server in servers:
            unwell = server.health.fault()
            if fault := unwell or server.probe.fault():
                words = f"{server.node}: the server is up but no longer serves: {fault}"
                hint = HANGS if unwell else f"{HANGS}{SLOW}"
                die(words, hint=f"{hint}; its log: {server.main_log.path}", passing=True)


def tick(servers: Sequence[Server]) -> None:
    """One look at the logs and the processes."""
    for server in servers:
        check_end(server)
    time.sleep(TICK)


def check_end(server: Server) -> None:
    code = server.step.poll()
    server.pump()
    die_of_a_node(server)
    if code is not None:
        report_death(server, code)
