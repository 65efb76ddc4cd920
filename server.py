"""The server: its steps on the nodes, watched until they end."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import multinode
from container import launch_command, remove_command
from nodes import Failure, Step, die, last_words, launcher, run, say, write_json
from plan import Plan, Spread
from preflight import Node

TICK = 0.05  # seconds between two looks at the process and its log
HEARTBEAT = 30.0  # seconds between two lines while the engine loads
HEALTH_EVERY, HEALTH_TIMEOUT, HEALTH_MISSES = 5.0, 10.0, 6
READY_WORDS = b"Uvicorn running on"  # the engine says so; asking at once saves the poll's interval
MEANINGS = {
    1: "it failed",
    2: "it refused its arguments",
    125: "docker could not run it",
    126: "trtllm-serve cannot be executed",
    127: "trtllm-serve was not found",
    137: "killed, most often for want of memory",
    139: "segmentation fault",
    143: "terminated",
}


class Log:
    """The server's log file: written by its step, followed by us, kept."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.sink = path.open("ab")
        self.reader = path.open("rb")
        self.start = self.reader.seek(0, os.SEEK_END)
        self.last_line = ""

    def pump(self, limit: int = 1 << 20) -> bytes:
        """Copy what is new to stdout and return it. A flood is skipped there, not in the file."""
        behind = os.fstat(self.reader.fileno()).st_size - self.reader.tell()
        if behind > 8 * limit:
            say(
                f"log: {behind / 1e6:.0f} MB behind, skipped on screen; all of it is in {self.path}"
            )
            self.reader.seek(-limit, os.SEEK_END)
        if new := self.reader.read(limit):
            self._show(new)
            if said := new.rstrip():
                self.last_line = said.rpartition(b"\n")[2].decode(errors="replace").strip()
        return new

    def _show(self, new: bytes) -> None:
        try:
            sys.stdout.buffer.write(new)
            sys.stdout.flush()
        except (AttributeError, OSError, ValueError):  # no stdout at all, or closed, or a pipe
            # Nobody reads any more: the file keeps it all, the server goes on.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123

    def tail(self, lines: int = 50) -> str:
        """The last lines of this launch, wherever somebody has moved the file."""
        return tail_of(Path(f"/proc/self/fd/{self.reader.fileno()}"), self.start, lines)

    def close(self) -> None:
        self.reader.close()
        self.sink.close()


def tail_of(path: Path, start: int = 0, lines: int = 50) -> str:
    """The last lines of a file, none of them from before `start`; '' where there is no file."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(start, end - (1 << 16)))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


class Health(threading.Thread):
    """Asks the server how it is, so that a slow answer holds up nothing else."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.ready = threading.Event()
        self.hurry = threading.Event()
        self.ended = threading.Event()
        self.model = ""
        self.misses = 0
        self.answer = "no answer yet"

    def run(self) -> None:
        import requests

        with requests.Session() as session:
            session.trust_env = False  # a proxy has no business between us and the node
            wait, asked = 0.0, time.monotonic()
            while not self.ended.is_set():
                self.hurry.wait(wait)
                self.hurry.clear()
                if self._ask(session) and not self.ready.is_set():
                    self.ready.set()
                # 0.25 s at first; an engine that loads for minutes is asked every 2 s.
                young = time.monotonic() - asked < 60
                wait = HEALTH_EVERY if self.ready.is_set() else 0.25 if young else 2.0

    def _ask(self, session: requests.Session) -> bool:  # type: ignore[name-defined] # noqa: F821
        try:
            reply = session.get(
                f"{self.url}/health",
                timeout=(2, HEALTH_TIMEOUT),
                allow_redirects=False,
                stream=True,
            )
            reply.close()
            self.answer = f"/health answered {reply.status_code}"
            good = reply.status_code == 200 and (bool(self.model) or self._learn_model(session))
        except OSError as error:  # requests' exceptions are OSErrors
            self.answer = f"/health did not answer ({type(error).__name__})"
            good = False
        except ValueError as error:
            self.answer, good = f"/v1/models gave no list of models ({error})", False
        self.misses = 0 if good else self.misses + 1
        return good

    def _learn_model(self, session: requests.Session) -> bool:  # type: ignore[name-defined] # noqa: F821
        reply = session.get(f"{self.url}/v1/models", timeout=(2, HEALTH_TIMEOUT))
        try:
            self.model = str(reply.json()["data"][0]["id"])
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(repr(error)) from error
        return True

    def end(self) -> None:
        self.ended.set()
        self.hurry.set()


@dataclass
class Server:
    """A launched server: its steps, its logs, its health, and when it was started."""

    plan: Plan
    nodes: Sequence[Node]
    url: str
    step: Step  # the engine; of a spread launch all its ranks
    log: Log  # what the step says; of a spread launch only Slurm speaks there
    health: Health
    started: float
    rank0: Log | None = None
    guards: Sequence[multinode.Holders | multinode.Slurmds] = ()

    @property
    def node(self) -> str:
        return self.nodes[0].name

    @property
    def age(self) -> float:
        return time.monotonic() - self.started

    @property
    def main_log(self) -> Log:
        """Where the engine itself speaks."""
        return self.rank0 or self.log

    def pump(self) -> bytes:
        return self.log.pump() + (self.rank0.pump() if self.rank0 else b"")


def launch(plan: Plan, nodes: Sequence[Node], url: str, log_path: Path) -> Server:
    """Start the server's steps. What has been started by then ends with a Failure in here."""
    log, health, started = Log(log_path), Health(url), time.monotonic()
    if plan.spread:
        server = launch_spread(plan, plan.spread, nodes, url, log, health)
    else:
        step = Step(launch_command(plan, os.environ), output=log.sink)
        server = Server(plan, nodes, url, step, log, health, started)
    health.start()
    return server


def launch_spread(plan: Plan, spread: Spread, nodes: Sequence[Node], url: str, log: Log,
                  health: Health) -> Server:  # fmt: skip
    """A container on every node first, then the ranks in them."""
    started = time.monotonic()
    port = multinode.slurmd_port()
    holders = multinode.Holders(Step(multinode.holder_command(plan, spread, os.environ)),
                                spread, nodes)  # fmt: skip
    holders.start()
    try:
        holders.await_up()
        rank0 = Log(multinode.rank_log(log.path, "0"))
        step = Step(multinode.ranks_command(plan, spread, log.path), output=log.sink)
    except BaseException:
        holders.step.stop()
        raise
    slurmds = multinode.Slurmds(holders, port)
    slurmds.start()
    return Server(plan, nodes, url, step, log, health, started, rank0, (holders, slurmds))


def commands(plan: Plan, environ: Mapping[str, str], log: Path) -> list[tuple[str, list[str]]]:
    """The commands of a launch, each with what it is for."""
    if plan.spread:
        holder = multinode.holder_command(plan, plan.spread, environ)
        ranks = multinode.ranks_command(plan, plan.spread, log)
        shown = [
            ("a container on every node, until its standard input ends", holder),
            ("the ranks in them; rank 0 serves", ranks),
        ]
    else:
        shown = [("the server, until its standard input ends", launch_command(plan, environ))]
    if plan.runtime == "docker":
        shown.append(("should a node not have cleaned up itself", remove_command(plan)))
    return shown


def await_ready(server: Server, timeout: float) -> None:
    """Return when the server answers; Failure when it ends first, or at the deadline."""
    beat = HEARTBEAT
    while not server.health.ready.is_set():
        tick(server, "before it was ready")
        if server.age > timeout:
            die(
                f"{server.node}: the server was not ready within {timeout:g} s: "
                f"{server.health.answer}; its log ends: {server.main_log.last_line or '(empty)'}",
                hint=f"more time: --ready-timeout; the whole log: {server.log.path}",
            )
        if server.age > beat:
            say(f"loading for {server.age:.0f} s; log: {server.main_log.last_line[:200]}")
            beat += HEARTBEAT


def hold(server: Server) -> None:
    """Watch until somebody stops us; Failure when the server ends or stops answering."""
    while True:
        tick(server, "while serving")
        if server.health.misses >= HEALTH_MISSES:
            die(
                f"{server.node}: the server is up but no longer serves: {HEALTH_MISSES} health "
                f"checks in a row failed, the last: {server.health.answer}",
                hint=f"an engine whose rank died can stay so for ever; its log: {server.log.path}",
            )


def tick(server: Server, when: str) -> None:
    """One look at the log and the process."""
    code = server.step.poll()
    if READY_WORDS in server.pump():
        server.health.hurry.set()
    die_if_unguarded(server, when)
    if code is not None:
        report_death(server, code, when)
    time.sleep(TICK)


def report_death(server: Server, code: int, when: str) -> None:
    """Failure that says which process ended, how, and its own last words."""
    while server.pump():
        pass
    # A rank that fails has the step cancelled, too; where Slurm did it, it speaks first.
    before, cancelled, _ = server.log.tail(10_000).partition("CANCELLED AT")
    death = multinode.first_failure(before) if server.plan.spread else None
    if server.plan.place.slurm and cancelled and not death:
        die(
            f"{server.node}: Slurm ended the server {when}: job {server.plan.place.job} was "
            f"cancelled or out of time",
            hint=f"its log: {server.log.path}",
        )
    await_guards(server, when)
    who, path = f"{server.node}: trtllm-serve", server.main_log.path
    if server.plan.spread and not death and server.log.tail():
        who, path = "srun", server.log.path
    elif death:
        who = f"{death.node}: rank {death.ranks}"
        code, path = death.code, multinode.rank_log(server.log.path, death.first)
    code = 128 - code if code < 0 else code
    logs = {log.path: log for log in (server.log, server.main_log)}
    tail = logs[path].tail() if path in logs else tail_of(path)
    say(f"the last lines of {path}:\n{tail}\n")
    meaning = f" ({MEANINGS[code]})" if code in MEANINGS else ""
    die(
        f"{who} ended with exit code {code}{meaning} {when}, after {server.age:.1f} s: "
        f"{last_words(tail) or 'it said nothing'}",
        hint=f"the whole log: {path}",
    )


def await_guards(server: Server, when: str) -> None:
    """Ranks die with their container; give it a moment to be the one that is named."""
    deadline = time.monotonic() + 1
    while server.guards and time.monotonic() < deadline:
        die_if_unguarded(server, when)
        time.sleep(TICK)


def die_if_unguarded(server: Server, when: str) -> None:
    if fault := next(filter(None, (guard.fault() for guard in server.guards)), ""):
        die(f"{fault}, {when}", hint=f"the logs: {server.log.path.parent}")


def stop(server: Server) -> None:
    """End it and everything of it on the nodes."""
    server.health.end()
    died_alone = server.step.poll() is not None
    steps = [guard.step for guard in server.guards if isinstance(guard, multinode.Holders)]
    steps.append(server.step)
    for step in steps:
        step.let_go()
    deadline = time.monotonic() + 15  # one for all: they stop at the same time
    ended = all([step.stop(max(0.1, deadline - time.monotonic())) for step in steps])
    server.pump()
    for log in filter(None, (server.log, server.rank0)):
        log.close()
    if server.plan.runtime == "docker" and (not ended or died_alone):
        remove_once_more(server.plan)
    say(f"stopped; the log is {server.main_log.path}")


def remove_once_more(plan: Plan) -> None:
    """Where a node's own step could not clean up, or was killed before it did."""
    try:
        run(remove_command(plan), timeout=20)
    except Failure as failure:
        if "expired" not in failure.message:  # a cancelled job's step has cleaned up itself
            say(f"could not confirm that the container is gone: {failure.message}")


def announce(server: Server, logs: Path) -> dict[str, object]:
    """Say where the server is, on screen and in logs/endpoint.json."""
    endpoint: dict[str, object] = {
        "url": server.url,
        "model": server.health.model,
        "job": server.plan.place.job,
        "nodes": [node.name for node in server.nodes],
        "container": f"trtllm-{server.plan.place.job}-{server.node}"
        if server.plan.runtime == "docker"
        else None,
        "log": str(server.main_log.path),
        "ready_seconds": round(server.age, 2),
        "started": iso(time.time() - server.age),
        "ready": iso(time.time()),
        "launcher": launcher(),
    }
    write_json(logs / "endpoint.json", endpoint)
    say(f"READY after {server.age:.1f} s: {server.url} serves {server.health.model}")
    return endpoint


def iso(when: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))
