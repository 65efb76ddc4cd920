"""The server: its steps on the nodes, watched until they end."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from common.talk import Failure, die, say, write_json
from launch import multinode
from launch.container import launch_command, owner_command, remove_command
from launch.health import Health, Probe, names_of
from launch.log import Log, tail_of
from launch.nodes import (
    CANCELLED,
    SEE_NODES,
    Step,
    Told,
    how_cancelled,
    last_words,
    launcher,
    lost_nodes,
    run,
)
from launch.plan import Plan, Spread, is_directory
from launch.preflight import Node

TICK = 0.05  # seconds between two looks at the process and its log
HEARTBEAT = 30.0  # seconds between two lines while the engine loads
STOP_WITHIN, REMOVE_WITHIN = 11.0, 7.0  # seconds for the nodes; together what a dead one costs
READY_WORDS = b"Uvicorn running on"  # the engine says so; asking at once saves the poll's interval
ANSWER_WORDS = re.compile(rb'"POST /v1/[^"]*" 200')  # it has answered somebody
MEANINGS = {
    1: "it failed",
    2: "it refused its arguments",
    125: "docker itself failed",
    126: "trtllm-serve cannot be executed",
    127: "trtllm-serve was not found",
    137: "killed, most often for want of memory",
    139: "segmentation fault",
    143: "terminated",
}
FINAL = {2, 126, 127}  # would be so again


@dataclass
class Server:
    """A launched server: its steps, its logs, who asks how it is, and when it was started."""

    plan: Plan
    nodes: Sequence[Node]
    url: str
    step: Step  # the engine; of a spread launch all its ranks
    log: Log  # what the step says; of a spread launch only Slurm speaks there
    health: Health
    probe: Probe
    started: float
    rank0: Log | None = None
    holders: multinode.Holders | None = None  # of a spread launch
    starts: Mapping[Path, int] = field(default_factory=dict)  # where this launch's words begin
    ready_at: float | None = None

    @property
    def node(self) -> str:
        return self.nodes[0].name

    @property
    def age(self) -> float:
        return time.monotonic() - self.started

    @property
    def served(self) -> float:
        """Seconds since it was ready; 0 before."""
        return time.monotonic() - self.ready_at if self.ready_at else 0.0

    @property
    def main_log(self) -> Log:
        """Where the engine itself speaks."""
        return self.rank0 or self.log

    def pump(self) -> bytes:
        """Show what is new in the logs, and note what it means."""
        new = self.log.pump() + (self.rank0.pump() if self.rank0 else b"")
        if READY_WORDS in new:
            self.health.listening = True
            self.health.hurry.set()
        if ANSWER_WORDS.search(new):
            self.probe.traffic = time.monotonic()
        return new


def launch(plan: Plan, nodes: Sequence[Node], url: str, log_path: Path, every: float) -> Server:
    """Start the server's steps; `every` so many seconds it will be probed.

    What has been started by then ends with a Failure in here.
    """
    log, started = Log(log_path), time.monotonic()
    starts = {p: p.stat().st_size for p in log_path.parent.glob(f"{log_path.stem}_rank*.log")}
    rank0: Log | None = None
    holders: multinode.Holders | None = None
    try:
        if plan.spread:
            step, rank0, holders = launch_spread(plan, plan.spread, nodes, log)
        else:
            step = Step(launch_command(plan, os.environ), output=log.sink)
    except BaseException:
        log.close()
        raise
    health, probe = Health(url, names_of(plan.engine)), Probe(url, every)
    health.start()
    return Server(plan, nodes, url, step, log, health, probe, started, rank0, holders, starts)


def launch_spread(
    plan: Plan, spread: Spread, nodes: Sequence[Node], log: Log
) -> tuple[Step, Log, multinode.Holders]:
    """A container on every node first, then the ranks in them."""
    holders = multinode.Holders(Step(multinode.holder_command(plan, spread, os.environ)),
                                spread, nodes)  # fmt: skip
    holders.start()
    try:
        holders.await_up()
        rank0 = Log(multinode.rank_log(log.path, "0"))
        step = Step(multinode.ranks_command(plan, spread, log.path), output=log.sink)
    except BaseException:
        stop_world(plan, holders)
        raise
    return step, rank0, holders


def commands(plan: Plan, environ: Mapping[str, str], log: Path) -> list[tuple[str, str]]:
    """The commands of a launch as a shell takes them, each with what it is for."""
    if plan.spread:
        holder = shlex.join(multinode.holder_command(plan, plan.spread, environ))
        ranks = multinode.ranks_command(plan, plan.spread, log)
        shown = [
            ("a place for the logs", shlex.join(["mkdir", "--parents", str(log.parent)])),
            (
                "a container on every node, until its `sleep` is killed",
                f"sleep infinity | {holder} &",
            ),
            ("when every node has said `up`: the ranks; rank 0 serves", shlex.join(ranks)),
        ]
    else:
        serve = shlex.join(launch_command(plan, environ))
        shown = [("the server, until its standard input ends", serve)]
    if plan.runtime == "docker":
        remove = shlex.join(remove_command(plan))
        shown.append(("should a node not have cleaned up itself", remove))
    return shown


def await_ready(server: Server, timeout: float) -> None:
    """Return when the server answers; Failure when it ends first, or at the deadline."""
    beat = HEARTBEAT
    while not server.health.ready.is_set():
        tick(server, "before it was ready")
        die_if_strange(server)
        if server.age > timeout:
            die(
                f"{server.node}: the server was not ready within {timeout:g} s: "
                f"{server.health.answer}; its log ends: {server.main_log.last_line or '(empty)'}",
                hint=f"more time: --ready-timeout; the whole log: {server.log.path}",
                passing=True,
            )
        if server.age > beat:
            say(f"loading for {server.age:.0f} s; log: {server.main_log.last_line[:200]}")
            beat += HEARTBEAT
    check_owner(server)
    if (code := server.step.poll()) is not None:  # then it was not ours that answered
        report_death(server, code, "before it was ready")


def check_owner(server: Server) -> None:
    """While ours loads, its port may be another's, of the same model even."""
    deadline = time.monotonic() + 1
    while not server.health.listening and time.monotonic() < deadline:
        tick(server, "before it was ready")
    if server.health.listening:
        return
    port = server.url.rpartition(":")[2]
    told = map(Told, run(owner_command(server.plan, port), timeout=10).splitlines())
    if any(each.key == "port" and each.value == "not own" for each in told):
        die_of_stranger(server, server.health.model)


def die_if_strange(server: Server) -> None:
    """The port was free when the nodes were asked; since then somebody may have taken it."""
    if server.health.is_stranger():
        die_of_stranger(server, f"{server.health.stranger}, not {server.plan.engine[1]}")


def die_of_stranger(server: Server, serves: str) -> NoReturn:
    die(
        f"{server.node}: another server has taken {server.url} meanwhile: it serves {serves}",
        hint="another --port; `ss -ltnp` on the node says whose it is",
    )


def hold(server: Server) -> NoReturn:
    """Watch until somebody stops us; Failure when the server ends or stops answering."""
    server.probe.begin(server.health.model)
    while True:
        tick(server, "while serving")
        if fault := server.health.fault() or server.probe.fault():
            die(
                f"{server.node}: the server is up but no longer serves: {fault}",
                hint="an engine whose rank died can stay so for ever; "
                f"its log: {server.main_log.path}",
                passing=True,
            )


def tick(server: Server, when: str) -> None:
    """One look at the log and the process."""
    code = server.step.poll()
    server.pump()
    die_of_a_node(server, when)
    if code is not None:
        report_death(server, code, when)
    time.sleep(TICK)


def report_death(server: Server, code: int, when: str) -> None:
    """Failure that says which process ended, how, and its own last words."""
    while server.pump():
        pass
    # A rank that fails has the step cancelled, too; where Slurm did it, it speaks first.
    said = server.log.tail(10_000)
    cancelled = CANCELLED.search(said)
    before = said[: cancelled.start()] if cancelled else said
    death = multinode.first_failure(before) if server.plan.spread else None
    if not death:
        die_of_slurm(server, said, cancelled, when)
    await_holders(server, when)
    who, code, path = culprit(server, code, death)
    tail = tail_since_start(server, path)
    say(f"the last lines of {path}:\n{tail}\n")
    meaning = f" ({MEANINGS[code]})" if code in MEANINGS else ""
    die(
        f"{who} ended with exit code {code}{meaning} {when}, after {server.age:.1f} s: "
        f"{last_words(tail) or 'it said nothing'}",
        hint=f"the whole log: {path}",
        passing=code not in FINAL,
    )


def die_of_slurm(server: Server, said: str, cancelled: re.Match[str] | None, when: str) -> None:
    """Failure where Slurm ended the step, or has lost a node of it."""
    if server.plan.place.slurm and cancelled:
        die(
            f"{server.node}: Slurm ended the server {when}: job {server.plan.place.job} "
            f"{how_cancelled(cancelled)}",
            hint=f"its log: {server.log.path}",
        )
    if lost := lost_nodes(said):
        die(f"{lost}, {when}", hint=f"{SEE_NODES}; its log: {server.log.path}", passing=True)


def culprit(server: Server, code: int, death: multinode.Death | None) -> tuple[str, int, Path]:
    """Who ended, with which exit code, and where its last words are."""
    if death:
        ranks = "rank" if death.ranks.isdecimal() else "ranks"
        log = multinode.rank_log(server.log.path, death.first)
        return f"{death.node}: {ranks} {death.ranks}", death.code, log
    code = 128 - code if code < 0 else code
    if server.plan.spread and server.log.tail():
        return "srun", code, server.log.path
    return f"{server.node}: trtllm-serve", code, server.main_log.path


def tail_since_start(server: Server, path: Path) -> str:
    """The end of a log, of what this launch has written."""
    logs = {log.path: log for log in (server.log, server.main_log)}
    return logs[path].tail() if path in logs else tail_of(path, server.starts.get(path, 0))


def await_holders(server: Server, when: str) -> None:
    """Ranks die with their container; give it a moment to be the one that is named."""
    deadline = time.monotonic() + 1
    while server.holders and time.monotonic() < deadline:
        die_of_a_node(server, when)
        time.sleep(TICK)


def die_of_a_node(server: Server, when: str) -> None:
    if server.holders and (fault := server.holders.fault()):
        die(f"{fault}, {when}", hint=f"the logs: {server.log.path.parent}", passing=True)


def stop(server: Server) -> None:
    """End it and everything of it on the nodes."""
    server.health.end()
    server.probe.end()
    died_alone = server.step.poll() is not None
    if server.holders:
        stop_world(server.plan, server.holders, server.step)
    elif (not server.step.stop(STOP_WITHIN) or died_alone) and server.plan.runtime == "docker":
        remove_once_more(server.plan)
    # What it still said is in the log; on the screen it would look like a failure.
    for log in filter(None, (server.log, server.rank0)):
        log.close()
    say(f"stopped; the log is {server.main_log.path}")


def stop_world(plan: Plan, holders: multinode.Holders, *ranks: Step) -> None:
    """End a spread launch; a node that is out of reach does not hold up the end of the others."""
    steps = (*ranks, holders.step)
    for step in steps:
        step.let_go()
    left = holders.await_farewell()
    for step in steps:
        step.stop(1)
    if "" in left.values():
        remove_once_more(plan)
    for name, why in left.items():
        if why:
            say_left(plan, name, why)


def say_left(plan: Plan, node: str, why: str) -> None:
    say(
        f"{node}: the container trtllm-{plan.place.job}-{node} may be there still ({why}). "
        "It should end by itself once the node and its Docker answer; else your next launch there "
        "removes it, or `docker rm --force`"
    )


def remove_once_more(plan: Plan) -> None:
    """Where a node's own step could not clean up, or was killed before it did."""
    try:
        told = list(map(Told, run(remove_command(plan), timeout=REMOVE_WITHIN).splitlines()))
    except Failure as failure:
        if "expired" not in failure.message:  # a cancelled job's step has cleaned up itself
            say(
                f"could not confirm that the container is gone: {failure.message}. It should end "
                "by itself once the node answers; else your next launch there removes it"
            )
        return
    for each in told:
        if each.key == "left":
            say_left(plan, each.node, each.value)


def announce(server: Server, path: Path) -> dict[str, object]:
    """Say where the server is, on screen and in the file at `path`."""
    server.ready_at = time.monotonic()
    endpoint: dict[str, object] = {
        "url": server.url,
        "model": server.health.model,
        "model_argument": model_argument(server.plan),
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
    try:
        write_json(path, endpoint)
    except OSError as error:  # a full disk is no reason to throw away what took so long to load
        say(f"{error.filename} could not be written: {error.strerror}; test and bench need HOST=")
    say(f"READY after {server.age:.1f} s: {server.url} serves {server.health.model}")
    return endpoint


def model_argument(plan: Plan) -> str:
    """What the engine was given: the served name may be no more than a directory's last part."""
    model = plan.engine[1]
    return str(Path(model).absolute()) if is_directory(model) else model


def iso(when: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))
