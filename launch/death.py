"""Why a server ended: which process, how, and its own last words."""

import contextlib
import re
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

from common.talk import Failure, die, say
from launch import slurm, world
from launch.engines import FINAL, meanings
from launch.log import end_of
from launch.node.base import LABEL, STOPPED, shell_code
from launch.nodes import run
from launch.server import TICK, Server, die_of_a_node
from launch.timelimit import GOES_ON, answer, of_job

STOPPED_BY = re.compile(rf"^{LABEL}: \S+: stopped by (SIG\w+)$", re.M)  # as `Ends` says it
NO_CAUSE = "its log names no cause"
ASKED_FOR = (
    "Slurm sends signals to a step for the job's --signal (SBATCH_SIGNAL, SALLOC_SIGNAL) and for "
    "scancel --signal"
)
KILLED = {
    137: "to find out what killed it: `dmesg | grep -i oom` on its node, `docker events`; "
    "or did somebody run scancel?"
}
# How a job ends, by the state or the reason that squeue gives.
ENDS = {
    "TIMEOUT": "TIME LIMIT",
    "TimeLimit": "TIME LIMIT",
    "NODE_FAIL": "NODE FAILURE",
    "NodeDown": "NODE FAILURE",
    "PREEMPTED": "PREEMPTION",
}
OF_SRUN = re.compile(r"^srun: error: ", re.M)
KILLED_TASK = re.compile(r"^srun: error: \S+: task 0: (Killed|Terminated|Hangup)", re.M)


def report_death(server: Server, code: int) -> NoReturn:
    """Failure that says which process ended, how, and its own last words."""
    while server.pump():
        pass
    # A failed rank has its step cancelled, too; if Slurm cancelled the step, that line comes first.
    said = server.log.tail(10_000)
    cancelled = slurm.CANCELLED.search(said)
    before = said[: cancelled.start()] if cancelled else said
    death = world.first_failure(before) if server.replica.spread else None
    if not death:
        die_of_slurm(server, said, cancelled)
    await_holders(server)
    who, code, path = culprit(server, code, death)
    die_of_signal(server, who, code, path)
    if server.plan.place.slurm and cancelled and not death:
        end = f"{server.node}: Slurm ended the server {server.when}: its step was cancelled"
        die(end, hint=f"did somebody run scancel? Its log: {server.log.path}")
    other = "" if death else not_the_engine(server, code, said)
    code = shell_code(code)
    tail = "\n".join(end_since_start(server, path).splitlines()[-50:])
    say(f"the last lines of {path}:\n{tail}\n")
    known = meanings(server.plan.command(server.replica)[0])
    meaning = f" ({known[code]})" if code in known and not other else ""
    from launch.causes import cause_in, ranks_of  # late: a start does not need its patterns

    logs = (path, server.log.path, *ranks_of(server.log.path))
    cause = cause_in(logs, partial(evidence, server, death))
    end = f"ended with exit code {code}{meaning} {server.when}, after {server.age:.1f} s"
    words = slurm.last_words(said) if other else ""
    no_cause = words or NO_CAUSE, KILLED.get(code, "")
    why, advice = (cause.line, cause.advice) if cause else no_cause
    hint = f"{advice}; the whole log: {path}".lstrip("; ")
    die(f"{other or who} {end}: {why}", hint=hint, passing=code not in FINAL)


def die_of_slurm(server: Server, said: str, cancelled: re.Match[str] | None) -> None:
    """Failure if Slurm ended the step, or lost one of its nodes."""
    die_of_lost_nodes(server, said)
    if server.plan.place.slurm and cancelled:
        named = slurm.CANCEL_WORDS.get(cancelled[2], "")
        die_of_the_job(server, named or how_the_job_ends(server.plan.place.job, "was cancelled"))


def die_of_lost_nodes(server: Server, said: str) -> None:
    if lost := slurm.lost_nodes(said):
        hint = f"{slurm.SEE_NODES}; its log: {server.log.path}"
        die(f"{lost}, {server.when}", hint=hint, passing=not slurm.GIVEN_UP.search(said))


def die_of_signal(server: Server, who: str, code: int, path: Path) -> None:
    """Failure if our own program on the node was told to stop: then the engine has not failed."""
    found = STOPPED_BY.search(end_since_start(server, path)) if code == STOPPED else None
    if found:
        die_of_lost_nodes(server, server.log.tail(10_000))
        die_of_the_job(server, how_the_job_ends(server.plan.place.job))
        hint = f"{ASKED_FOR}; its log: {path}"
        die(f"{who} stopped {server.when}: {found[1]} was sent to its step", hint=hint)


def die_of_the_job(server: Server, how: str) -> None:
    """Failure if Slurm ends the whole job; `how` says it in words, '' if the job goes on."""
    if how:
        advice = f"{slurm.SEE_NODES}; " if how == slurm.CANCEL_WORDS["NODE FAILURE"] else ""
        how = f"job {server.plan.place.job} {how}"
        end = f"{server.node}: Slurm ended the server {server.when}: {how}"
        die(end, hint=f"{advice}its log: {server.log.path}")


def how_the_job_ends(job: str, untold: str = "") -> str:
    """In words; '' if the job goes on, `untold` if Slurm does not say.

    What Slurm writes about a step that it ends seldom names the reason, and its signal comes first.
    """
    done = slurm.squeue(*of_job(job, "%A %T %r"))
    if not done or not (state := answer(job, done.stdout)):
        return untold
    if state.startswith(GOES_ON):
        return slurm.CANCEL_WORDS["PREEMPTION"] if is_preempted(job) else ""
    found = (slurm.CANCEL_WORDS[word] for says, word in ENDS.items() if says in state)
    return next(found, "was cancelled")


def is_preempted(job: str) -> bool:
    """Whether another job gets its nodes: in its grace time Slurm still calls it RUNNING."""
    with contextlib.suppress(Failure):
        record = slurm.record_of(job, run(["scontrol", "show", "job", "-d", job], timeout=10))
        return bool(re.search(r"^\s*(PreemptEligibleTime=\S+ )?PreemptTime=\d", record, re.M))
    return False


def culprit(server: Server, code: int, death: world.Death | None) -> tuple[str, int, Path]:
    """Who ended, with which exit code, and where its last words are."""
    if death:
        ranks = "rank" if death.ranks.isdecimal() else "ranks"
        log = world.rank_log(server.log.path, death.first)
        return f"{death.node}: {ranks} {death.ranks}", death.code, log
    return f"{server.node}: {server.plan.engine.PROGRAM}", code, server.main_log.path


def not_the_engine(server: Server, code: int, said: str) -> str:
    """Who ended instead of the engine: srun, our program on the node, or the runtime; else ''.

    srun names the node if its task failed; all else that it calls an error is srun's own.
    """
    slurms, ours = server.plan.place.slurm, f"{server.node}: the launcher's python3"
    if code < 0:
        return "srun" if slurms else ours
    if slurms and OF_SRUN.search(said) and not world.first_failure(said):
        return "srun"
    if slurms and KILLED_TASK.search(said):
        return ours
    blamed = server.runtime.blames(code, said)
    return f"{server.node}: {blamed}" if blamed else ""


def end_since_start(server: Server, path: Path, size: int = 1 << 16) -> str:
    """The end of what this launch has written to a log."""
    logs = {log.path: log for log in (server.log, server.main_log)}
    start = server.starts.get(path, 0)
    return logs[path].end(size) if path in logs else end_of(path, start, size)


def evidence(server: Server, death: world.Death | None, path: Path, size: int) -> str:
    """A log's end, without those words of Slurm's that only follow from that rank's death."""
    said = end_since_start(server, path, size)
    return world.up_to_failure(said) if death and path == server.log.path else said


def await_holders(server: Server) -> None:
    """Ranks die with their container: wait a moment so that a dead container is blamed first."""
    deadline = time.monotonic() + 1
    while server.holders and time.monotonic() < deadline:
        die_of_a_node(server)
        time.sleep(TICK)
