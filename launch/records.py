"""Records in logs/ of who serves what, for --status and --stop; none outlives its launch."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.talk import die, say, whole_file, write_json
from launch.identity import is_alive, launcher, process_start
from launch.plan import Plan, user_name
from launch.preflight import jobs_of

GUARD = str(Path(__file__).with_name("guard.py"))
LOOK_EVERY = 1.0  # seconds between two looks of a launcher at its record


def write_record(path: Path, plan: Plan, url: str, log: Path) -> None:
    """Say that a launch is under way, for --status and --stop. Failure if its job has one already.

    Two launches of a job would share a log and a container name.
    """
    job, restarts = plan.place.job, plan.place.allocation.restarts
    record = {"job": job, "launcher": launcher(), "url": url, "restarts": restarts}
    record |= {"model": plan.replicas[0].model, "log": str(log), "name": plan.place.allocation.name}
    mine = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        write_json(mine, record)
    except OSError as error:
        hint = "give a --workspace with room for logs/ that you can write to"
        die(f"{path.parent} cannot be written to: {error.strerror}", hint=hint)
    try:
        os.link(mine, path)  # unlike a rename, a link replaces nothing
    except OSError:  # it is there, or the file system has no hard links
        if (other := read_record(path)) and may_be_under_way(other, restarts):
            what = f"another launch of job {job} is under way in {path.parent}"
            hint = f"stop that one first (make stop JOB={job}), or use another allocation"
            gone = "" if other["alive"] else f"; if it is gone, remove {path}"
            die(f"{what}: {process_of(other)}", hint=hint + gone)
        mine.replace(path)
    finally:
        mine.unlink(missing_ok=True)


def write_states(path: Path, plan: Plan, url: str, rows: list[dict[str, Any]]) -> None:
    """Write how every server of a fleet is, for --status. A full disk is no reason to end."""
    record = {"job": plan.place.job, "launcher": launcher(), "url": url}
    with contextlib.suppress(OSError):
        write_json(path, record | {"model": plan.replicas[0].model, "replicas": rows})


def states_of(record: Path) -> list[dict[str, Any]]:
    """Read what `write_states` wrote, beside a launch's record; [] if it is no fleet."""
    found = read_record(record.with_name(record.name.replace("run_", "fleet_", 1))) or {}
    rows = found.get("replicas")
    return [row for row in rows if is_row(row)] if isinstance(rows, list) else []


def is_row(row: object) -> bool:
    """Whether it is a row as `Life.row` writes them."""
    texts = ("name", "state", "url", "node", "log", "metrics")
    kinds = {**dict.fromkeys(texts, str), "nodes": list, "gpus": list, "restarts": int}
    return isinstance(row, dict) and all(isinstance(row.get(k), t) for k, t in kinds.items())


def may_be_under_way(other: dict[str, Any], restarts: int) -> bool:
    """Whether the launch of another record may live; one that Slurm has requeued since does not."""
    mine, same = other["launcher"] == launcher(), other.get("restarts", restarts) == restarts
    return not mine and other["alive"] is not False and (other["alive"] or same)


def process_of(record: dict[str, Any]) -> str:
    """The launcher, for people: `process 5 on login1`."""
    where, pid, _ = record["launcher"].rsplit(":", 2)
    return f"process {pid} on {where.partition('/')[0]}"


class Keeper(threading.Thread):
    """Beside a launch: heeds a stop from another host, which is a word in the launch's record.

    It also writes endpoint.json again, if another launch overwrote it and removed it at its end;
    and the record, if somebody removed it: those who see no jobs of ours (on another cluster, or
    because Slurm hides them) take us to be gone, and some people empty logs/.
    """

    def __init__(self, record: Path, endpoint: Path) -> None:
        super().__init__(daemon=True)
        self.record, self.endpoint = record, endpoint
        self.announced: dict[str, object] | None = None  # what endpoint.json has to say
        self.ended = threading.Event()
        self.text = ""  # the text of the record

    def run(self) -> None:
        with contextlib.suppress(OSError):
            self.text = self.record.read_text()
        while not self.ended.wait(LOOK_EVERY):
            with contextlib.suppress(OSError):
                self.restore()
            if is_told_to_stop(self.record):
                os.kill(os.getpid(), signal.SIGTERM)
                break

    def restore(self) -> None:
        if self.text and not self.record.exists():
            with whole_file(self.record) as file:
                file.write(self.text)
        announced = self.announced
        if announced and not self.endpoint.exists():
            write_json(self.endpoint, announced)
            if self.announced is not announced:  # it was taken back at this very moment
                remove_records(self.endpoint)

    def take_back(self) -> None:
        self.announced = None
        remove_records(self.endpoint)

    def end(self) -> None:
        self.ended.set()
        if self.is_alive():
            self.join(2)  # the file system may hang


def tell_to_stop(path: Path) -> None:
    """Written in place, so that the record keeps its owner."""
    with path.open("r+") as file:
        record = json.load(file)
        file.seek(0)
        file.write(json.dumps({**record, "stop": True}))
        file.truncate()


def is_told_to_stop(path: Path) -> bool:
    record = read_record(path)
    ours = record and record["launcher"] == launcher() and record["owner"] in (os.geteuid(), 0)
    return bool(ours and record and record.get("stop"))


@contextlib.contextmanager
def guarded(*paths: Path) -> Iterator[None]:
    """While the block lasts, our records are removed if this process dies, even by SIGKILL."""
    files = [str(path.absolute()) for path in paths]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    command = [sys.executable, "-IS", GUARD, launcher(), *files]
    guard = subprocess.Popen(
        command, stdin=pipe, stdout=null, stderr=null, start_new_session=True, cwd="/"
    )
    try:
        yield
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):  # the file system may hang
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
    """A launch's record with `alive` added; None if it cannot be read."""
    try:
        record = json.loads(path.read_text())
        who = {key: str(record[key]) for key in ("job", "url", "model")}
        if record["launcher"].count(":") < 2:
            raise ValueError
        owner = path.stat().st_uid
        squashed = owner != os.geteuid() and owner == shown_as(path.parent)
        owner = os.geteuid() if squashed else owner
        hidden = owner != os.geteuid() and not process_start(1)  # hidepid: /proc shows us only ours
        alive = None if hidden else is_alive(record["launcher"], who["job"])
        return {**record, **who, "owner": owner, "squashed": squashed, "alive": alive}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


@functools.cache
def shown_as(folder: Path) -> int:
    """The uid that our files have there: NFS may map root, or everybody, to nobody."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_uid
    return os.geteuid()


def sweep(logs: Path) -> None:
    """Remove the records of launchers that were killed, and of jobs that have ended."""
    jobs_by_owner = functools.cache(jobs_of)
    for path in (*logs.glob("run_*.json"), *logs.glob("fleet_*.json"), logs / "endpoint.json"):
        if not (record := read_record(path)):
            continue
        if record["alive"] is None and record["job"].isdecimal():
            who = "" if record["squashed"] else user_name(record["owner"])  # perhaps not ours
            jobs, ours = jobs_by_owner(who), os.geteuid() in (0, record["owner"])
            # Another user's jobs may be hidden (PrivateData=jobs): an empty answer is no answer.
            if jobs is not None and (jobs or ours) and record["job"] not in jobs:
                record["alive"] = False
        if record["alive"] is False:
            with contextlib.suppress(OSError):  # only its owner may be able to remove it
                path.unlink(missing_ok=True)


def records(logs: Path) -> list[dict[str, Any]]:
    """The launches that have a record, without those that are known to be gone."""
    sweep(logs)
    found = ((path, living(path)) for path in sorted(logs.glob("run_*.json")))
    return [{**record, "path": path} for path, record in found if record]


def living(path: Path) -> dict[str, Any] | None:
    """The record of a launcher, unless it is known to be gone."""
    record = read_record(path)
    return record if record and record["alive"] is not False else None
