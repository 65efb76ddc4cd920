"""What runs from a workspace: its status, its end, its log. Read from the records in logs/."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.ask import ask
from common.response import Malformed
from common.talk import Failure, die, say, write_json
from launch.nodes import is_alive, launcher, run, script
from launch.plan import Plan, user_name
from launch.preflight import jobs_of

HEALTH_TIMEOUT = 5.0
PATIENCE = 30.0  # seconds until a launcher that was told to stop has cleaned up


# Removes our records, known by our name in them, when its standard input ends: when we do. For ten
# minutes it tries, should the file system be read-only just then.
GUARD = script(r"""
    trap '' TERM INT HUP; launcher=$1; shift;
    while read -r _; do :; done;
    for file; do
        for ((i = 0; i < 600; i++)); do
            grep -qsF "$launcher" "$file" || break;
            rm -f "$file" || sleep 1;
        done;
    done;
""")


def act(args: argparse.Namespace) -> int:
    logs = args.workspace / "logs"
    if args.logs:
        return follow_log(logs)
    return stop(logs) if args.stop else status(logs)


def write_record(path: Path, plan: Plan, url: str, log: Path) -> None:
    """Say that a launch is under way, for --status and --stop. Failure if its job has one already.

    Two launches of a job would have one log and one container name between them.
    """
    record = {
        "job": plan.place.job,
        "launcher": launcher(),
        "url": url,
        "model": plan.engine[1],
        "log": str(log),
    }
    mine = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        write_json(mine, record)
    except OSError as error:
        die(
            f"{path.parent} cannot be written to: {error.strerror}",
            hint="--workspace with a directory for logs/ that has room",
        )
    try:
        os.link(mine, path)  # unlike a rename it replaces nothing
    except FileExistsError:
        if (other := read_record(path)) and other["alive"] and other["launcher"] != launcher():
            where, pid, _ = other["launcher"].rsplit(":", 2)
            die(
                f"another launch of job {plan.place.job} is under way in {path.parent}: "
                f"process {pid} on {where.partition('/')[0]}",
                hint="stop that one first (make stop), or use another allocation",
            )
        mine.replace(path)
    finally:
        mine.unlink(missing_ok=True)


@contextlib.contextmanager
def guarded(*paths: Path) -> Iterator[None]:
    """While the block lasts, the death of this process removes its records, SIGKILL included."""
    files = [str(path.absolute()) for path in paths]
    guard = subprocess.Popen(
        ["bash", "-c", GUARD, "guard", launcher(), *files],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
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
    return [r for path in sorted(logs.glob("run_*.json")) if (r := living(path))]


def living(path: Path) -> dict[str, Any] | None:
    """The record of a launcher that is not known to be gone."""
    record = read_record(path)
    return record if record and record["alive"] is not False else None


def status(logs: Path) -> int:
    """A line a launch on stdout: job, state, url, model. Exit code 1 when there is none."""
    found = records(logs)
    for record in found:
        print(f"{record['job']}\t{health(record['url'])}\t{record['url']}\t{record['model']}")
    if not found:
        say(f"nothing runs from {logs.parent}")
    return 0 if found else 1


def health(url: str) -> str:
    try:
        code = ask(f"{url}/health", HEALTH_TIMEOUT, whole=False).status
    except (OSError, ValueError, Malformed):
        return "not ready"
    return "ready" if code == 200 else f"unwell ({code})"


def stop(logs: Path) -> int:
    """Tell every launcher of this workspace to stop, and wait until it has cleaned up."""
    found, told, refused = records(logs), [], []
    for record in found:
        try:
            tell(record)
            told.append(record)
        except Failure as failure:  # one that is somebody else's does not keep ours
            refused.append(failure.message)
    deadline = time.monotonic() + PATIENCE
    while any(living(logs / f"run_{record['job']}.json") for record in told):
        if time.monotonic() > deadline:
            die(f"not stopped within {PATIENCE:g} s", hint="scancel the job")
        time.sleep(0.1)
    say(f"stopped {len(told)} server(s)" if found else f"nothing runs from {logs.parent}")
    if refused:
        die("; ".join(refused))
    return 0


def tell(record: dict[str, Any]) -> None:
    """SIGTERM to the launcher: directly where it lives here, else by Slurm to a batch job.

    What others have written may name any process or job of ours: it must be their own.
    """
    where, pid, _ = record["launcher"].rsplit(":", 2)
    if os.geteuid() not in (record["owner"], 0):
        die(f"the record of {record['job']} is somebody else's: they have to stop it")
    if record["alive"]:
        try:
            if Path(f"/proc/{pid}").stat().st_uid != record["owner"]:
                raise PermissionError
            os.kill(int(pid), signal.SIGTERM)
        except (ProcessLookupError, FileNotFoundError):
            pass  # it ended in this very moment
        except PermissionError:
            die(f"the launcher of {record['job']}, process {pid}, is somebody else's")
    elif (job := record["job"]).isascii() and job.isdigit():
        run(["scancel", "--batch", "--signal=TERM", str(record["job"])])
    else:
        die(f"the launcher runs on {where.partition('/')[0]}: stop it there")


def follow_log(logs: Path) -> int:
    """Become `tail -F` of the newest log."""
    newest = max(logs.glob("trtllm_server_*.log"), key=lambda p: p.stat().st_mtime, default=None)
    if newest is None:
        die(f"there is no log in {logs}")
    os.execvp("tail", ["tail", "-n", "100", "-F", str(newest)])
