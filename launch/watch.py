"""A server, watched: until it is ready, and until it ends or hangs."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from typing import NoReturn

from common.signals import pause
from common.talk import HEARTBEAT, Failure, die, say
from launch.death import report_death
from launch.node.messages import Owner
from launch.nodes import ask
from launch.order import Command
from launch.server import SERVING_TICK, TICK, Server, die_of_a_node
from launch.timelimit import outlast_suspension
from launch.world import ABSENCE

HANGS = "an engine can hang like this after a rank has died: start it again, or use --restart"
FIREWALL = "is a firewall between them? Run the launcher on the node itself, with sbatch"
SLOW = "; if a first token may take longer there, raise PROBE_TIMEOUT"


def await_ready(server: Server, timeout: float) -> None:
    """Return when it answers. Failure if it ends first, or at the deadline."""
    while not server.health.ready.is_set():
        with patience(server):
            tick(server)
            die_if_strange(server)
            die_if_unreached(server)
            if server.age - server.excused > timeout:
                die_of_slowness(server, timeout)
    check_owner(server)
    check_end(server)  # if it has ended, it was not ours that answered


@contextlib.contextmanager
def patience(server: Server) -> Iterator[None]:
    """A failure while Slurm has the job suspended does not count: wait, then judge again."""
    try:
        yield
    except Failure as failure:
        if not (failure.passing and (waited := outlast_suspension(server.plan.place, server.over))):
            raise
        server.forgive(waited)


def die_of_slowness(server: Server, timeout: float) -> NoReturn:
    die_if_walled(server)
    end = server.main_log.last_line or "(empty)"
    late = f"{server.node}: the server was not ready within {timeout:g} s: {server.health.answer}"
    hint = f"give it more time with --ready-timeout; the whole log: {server.log.path}"
    die(f"{late}; its log ends: {end}", hint=hint, passing=True)


def die_if_unreached(server: Server) -> None:
    """Failure if it says that it listens and a firewall keeps us out, which will not go away."""
    if time.monotonic() > server.ask_at and not server.health.ready.is_set():
        die_if_walled(server)
        server.ask_at = time.monotonic() + HEARTBEAT


def die_if_walled(server: Server) -> None:
    words = walled(server)
    if words and not server.health.ready.wait(1):  # it may only be slow, which is no wall
        die(words, hint=f"{FIREWALL}; its log: {server.main_log.path}")


def walled(server: Server) -> str:
    """Says that our engine answers on its node but not here; '' if that is not so."""
    if server.health.reached:
        return ""
    if (owner := ask_owner(server)).answer != "200" or not (owner.own or owner.why):
        return ""
    return wall(server.node, server.replica.port, server.url, server.health.answer)


def wall(node: str, port: int, url: str, why: str) -> str:
    here = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return f"{node} serves on port {port}, but {url} cannot be reached from {here}: {why}"


def ask_owner(server: Server) -> Owner:
    return owner_by(server.runtime.ask_owner(server.plan, server.replica))


def owner_by(command: Command) -> Owner:
    """What the node says about our port; if it says nothing, that the owner is not known."""
    with contextlib.suppress(Failure):
        for told in ask(command, "asking whose the port is", timeout=10):
            if isinstance(told.message, Owner):
                return told.message
    return Owner(False, why="no answer")


def check_owner(server: Server) -> None:
    """Failure if another server has our port: it may even serve the same model."""
    deadline = time.monotonic() + 1
    while not server.health.listening and time.monotonic() < deadline:
        tick(server)
    if server.health.listening:
        return
    owner = ask_owner(server)
    if not (owner.own or owner.why):
        die_of_stranger(server, server.health.model)


def die_if_strange(server: Server) -> None:
    """The port was free when the nodes were asked; since then somebody may have taken it."""
    if server.health.is_stranger():
        die_of_stranger(server, f"{server.health.stranger}, not {server.replica.model}")


def die_of_stranger(server: Server, serves: str) -> NoReturn:
    hint = "use another --port; `ss -ltnp` on the node shows whose it is"
    taken = f"{server.node}: another server took {server.url} in the meantime"
    die(f"{taken}; it serves {serves}", hint=hint)


def hold(server: Server) -> NoReturn:
    """Watch until the launch is over. Failure if the server ends or stops answering."""
    server.probe.begin(server.health.model)
    while True:
        with patience(server):
            tick(server)
            server.walled = server.walled and server.health.misses > 0
            unwell = server.health.fault()
            if fault := unwell or server.probe.fault():
                judge(server, fault, HANGS if unwell else f"{HANGS}{SLOW}")


def judge(server: Server, fault: str, hint: str = HANGS) -> None:
    """Failure, unless only we cannot reach it: then it goes on for those who can."""
    if server.health.misses and (words := walled(server)):
        if not server.walled:
            say(f"{words}; the server goes on")
        server.forgive(0)
        server.walled, server.health.misses = True, 1
        return
    words = f"{server.node}: the server is up but no longer serves: {fault}"
    die(words, hint=f"{hint}; its log: {server.main_log.path}", passing=True)


def tick(server: Server) -> None:
    """Look once at the logs and the processes. While we stood still (^Z), we heard nobody."""
    away, server.looked = time.monotonic() - server.looked, time.monotonic()
    if away > ABSENCE:
        server.forgive(away)
    check_end(server)
    pause(server.over, SERVING_TICK if server.ready_at else TICK)


def check_end(server: Server) -> None:
    code = server.step.poll()
    server.pump()
    die_of_a_node(server)
    if code is not None:
        report_death(server, code)
