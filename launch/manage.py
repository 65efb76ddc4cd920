"""Commands for what runs from a workspace: status, stop, logs, why. Records are in logs/."""

import argparse
import os
import re
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

from common.talk import Failure, counted, die, say
from launch.log import end_of
from launch.records import living, process_of, records, tell_to_stop
from launch.status import status
from launch.timelimit import ASLEEP, state_of

REPLICA = re.compile(r"(r|prefill|decode)\d+|orchestrator")
PATIENCE = 30.0  # seconds until a launcher that was told to stop has cleaned up


def act(args: argparse.Namespace) -> int:
    logs = args.workspace / "logs"
    if args.logs is not None:
        return follow_log(logs, args.logs)
    if args.why is not None:
        return why(logs, args.why)
    return status(logs, args.json) if args.stop is None else stop(logs, args.stop)


def stop(logs: Path, job: str = "") -> int:
    """Tell every launcher of this workspace, or a job's, to stop; wait until it has cleaned up."""
    found = [r for r in records(logs) if job in ("", r["job"], r.get("name"))]
    told, refused = [], []
    for record in found:
        try:
            tell(record)
            told.append(record)
        except Failure as failure:  # somebody else's must not keep us from stopping ours
            refused.append(failure.message)
    deadline = time.monotonic() + PATIENCE
    while left := [record for record in told if living(record["path"])]:
        if time.monotonic() > deadline:
            die_of_a_deaf_one(left[0])
        time.sleep(0.1)
    nothing = f"nothing {f'of job {job} ' if job else ''}runs from {logs.parent}"
    say(f"stopped {counted(len(told), 'server')}" if found else nothing)
    if refused:
        die("; ".join(refused))
    return 0


def die_of_a_deaf_one(record: dict[str, Any]) -> NoReturn:
    who, pid = process_of(record), record["launcher"].split(":")[1]
    if state_of(record["job"]) in ASLEEP:  # and so is a launcher that runs on its nodes
        hint = f"resume it (`scontrol resume {record['job']}`); then it stops by itself"
        die(f"job {record['job']} is suspended and cannot stop now", hint=hint)
    what = f"the launcher of {record['job']}, {who}, did not stop within {PATIENCE:g} s"
    end = f"`kill -KILL {pid}` there ends it and all that it started"
    die(what, hint=f"{end}; if it is gone, remove {record['path']}")


def tell(record: dict[str, Any]) -> None:
    """Send SIGTERM to a launcher that lives here. Any other reads a word that we put in its record.

    A record that others wrote may name any process of ours: so the process must be its owner's.
    """
    pid = record["launcher"].split(":")[1]
    if os.geteuid() not in (record["owner"], 0):
        die(f"job {record['job']} belongs to another user; only they can stop it")
    if record["alive"] and not record["squashed"]:
        try:
            if Path(f"/proc/{pid}").stat().st_uid != record["owner"]:
                raise PermissionError
            os.kill(int(pid), signal.SIGTERM)
        except (ProcessLookupError, FileNotFoundError):
            pass  # it ended at this very moment
        except PermissionError:
            die(f"the launcher of {record['job']}, process {pid}, belongs to another user")
        return
    try:
        tell_to_stop(record["path"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        why = f"its record cannot be written ({getattr(error, 'strerror', error)})"
        die(f"{process_of(record)}: {why}; stop it there")


def follow_log(logs: Path, replica: str) -> int:
    """Become `tail -F` of the newest log, or of the newest of that replica."""
    os.execvp("tail", ["tail", "-n", "100", "-F", str(newest(logs, replica))])


def why(logs: Path, name: str) -> int:
    """Print the cause and what to do next; exit code 1 if the logs name none."""
    if REPLICA.fullmatch(name) or not name:
        # If the newest is a rank's log, take its server's.
        name = re.sub(r"_rank\d+(?=\.log$)", "", str(newest(logs, name)))
    log = Path(name)
    if not log.is_file():
        die(f"{log}: there is no such log", hint=f"`ls {logs}` shows those of this workspace")
    from launch.causes import cause_in, ranks_of  # late: few commands need its patterns

    found = cause_in([log, *ranks_of(log)], lambda path, size: end_of(path, 0, size))
    print(f"cause: {found.line}\nnext: {found.advice}" if found else "no cause in the log")
    return 0 if found else 1


def newest(logs: Path, replica: str = "") -> Path:
    """The log in `logs` that was written last, of all servers or of one replica."""
    names = (f"*_server_*_{replica}.log", f"*_server_*_{replica}_rank0.log") if replica else ()
    found = [log for name in names or ("*_server_*.log",) for log in logs.glob(name)]
    log = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return log or die(f"there is no log {f'of {replica} ' if replica else ''}in {logs}")
