"""Records in logs/ of who serves what, for --status and --stop; none outlives its launch."""

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.talk import die, say, write_json
from launch.identity import is_alive, launcher
from launch.plan import Plan, user_name
from launch.preflight import jobs_of

GUARD = str(Path(__file__).with_name("guard.py"))


def write_record(path: Path, plan: Plan, url: str, log: Path) -> None:
    """Say that a launch is under way, for --status and --stop. Failure if its job has one already.

    Two launches of a job would have one log and one container name between them.
    """
    record = {"job": plan.place.job, "launcher": launcher(), "url": url}
    record |= {"model": plan.replicas[0].model, "log": str(log)}
    mine = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        write_json(mine, record)
    except OSError as error:
        hint = "--workspace with a directory for logs/ that has room"
        die(f"{path.parent} cannot be written to: {error.strerror}", hint=hint)
    try:
        os.link(mine, path)  # unlike a rename it replaces nothing
    except FileExistsError:
        if (other := read_record(path)) and other["alive"] and other["launcher"] != launcher():
            where, pid, _ = other["launcher"].rsplit(":", 2)
            who = f"process {pid} on {where.partition('/')[0]}"
            what = f"another launch of job {plan.place.job} is under way in {path.parent}"
            hint = "stop that one first (make stop), or use another allocation"
            die(f"{what}: {who}", hint=hint)
        mine.replace(path)
    finally:
        mine.unlink(missing_ok=True)


@contextlib.contextmanager
def guarded(*paths: Path) -> Iterator[None]:
    """While the block lasts, the death of this process removes its records, SIGKILL included."""
    files = [str(path.absolute()) for path in paths]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    command = [sys.executable, "-IS", GUARD, launcher(), *files]
    guard = subprocess.Popen(
        command, stdin=pipe, stdout=null, stderr=null, start_new_session=True, cwd="/"
    )
    try:
        yield
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):  # a file system that hangs
            guard.communicate(timeout=2)


def remove_records(*paths: Path) -> None:
    """Remove our own records; another launch of the workspace keeps its own."""
    for path in paths:
        if (record := read_record(path)) and record["launcher"] == launcher():
            try:
                path.unlink(missing_ok=True)
            except OSError as error:  # no reason to leave a server behind
                say(f"{path} could not be removed: {error.strerror}")


def read_record(path: Path) -> dict[str, Any] | None:
    """A launch's record with `alive` added; None where it cannot be read."""
    try:
        record = json.loads(path.read_text())
        who = {key: str(record[key]) for key in ("job", "url", "model")}
        if record["launcher"].count(":") < 2:
            raise ValueError
        owner, alive = path.stat().st_uid, is_alive(record["launcher"])
        return {**record, **who, "owner": owner, "alive": alive}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def sweep(logs: Path) -> None:
    """Remove the records of launchers that were killed, and of jobs that have ended."""
    jobs_by_owner = functools.cache(lambda owner: jobs_of(user_name(owner)))
    for path in (*logs.glob("run_*.json"), logs / "endpoint.json"):
        if not (record := read_record(path)):
            continue
        if record["alive"] is None and record["job"].isdecimal():
            jobs = jobs_by_owner(record["owner"])
            if jobs is not None and record["job"] not in jobs:
                record["alive"] = False
        if record["alive"] is False:
            with contextlib.suppress(OSError):  # it may be somebody else's to remove
                path.unlink(missing_ok=True)


def records(logs: Path) -> list[dict[str, Any]]:
    """The launches that have a record, without those that are known to be gone."""
    sweep(logs)
    return [record for path in sorted(logs.glob("run_*.json")) if (record := living(path))]


def living(path: Path) -> dict[str, Any] | None:
    """The record of a launcher that is not known to be gone."""
    record = read_record(path)
    return record if record and record["alive"] is not False else None
