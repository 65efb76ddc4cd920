"""The server: one attached container (or process) on the head node, watched until it ends."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nodes import HOLD, TELL, Place, Step, die, last_words, launcher, say, script
from preflight import LABEL
from settings import PASSED_ON

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

# NCCL and Gloo: the interface that leads out of the node, unless the user names one.
INTERFACES = script(r"""
    interface=$(ip -o -4 route show to default 2>/dev/null | sed -n '1s/.* dev \([^ ]*\).*/\1/p');
    if [ -n "$interface" ]; then
        export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}";
        export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}";
        export TP_SOCKET_IFNAME="${TP_SOCKET_IFNAME:-$interface}";
    fi;
""")

# The container ends with this script, whoever asks: we, scancel, the death of the launcher.
# `docker rm` is repeated until the client has gone: before that a container may yet be created.
DOCKER = (
    TELL
    + " "
    + HOLD
    + " "
    + INTERFACES
    + " "
    + script(r"""
    name=trtllm-$1-$node; gpus=$2; cache=$3; shift 3;
    [ -z "$cache" ] || mkdir -p "$cache";
    for device in /dev/infiniband/uverbs* /dev/gdrdrv; do
        [ ! -e "$device" ] || set -- --device "$device" "$@";
    done;
    present=$(ls -d /dev/nvidia[0-9]* 2>/dev/null | wc -l);
    given=$(printf %s "$SLURM_STEP_GPUS" | tr ',' '\n' | grep -c .);
    if [ "$gpus" = auto ]; then
        gpus=all;
        [ "$given" = 0 ] || [ "$given" -ge "$present" ] || gpus="\"device=$SLURM_STEP_GPUS\"";
    fi;
    [ "$gpus" = none ] || set -- --gpus "$gpus" "$@";
    stop() {
        trap '' TERM INT HUP; SECONDS=0;
        while [ -n "$client" ] && kill -0 $client 2>/dev/null && [ $SECONDS -lt 12 ]; do
            timeout 5 docker rm --force "$name" >/dev/null 2>&1; sleep 0.1;
        done;
        [ -z "$client" ] || kill -KILL $client 2>/dev/null;
        timeout 5 docker rm --force "$name" >/dev/null 2>&1;
        exit 143;
    };
    trap '[ "$!" = "$watch" ] || client=$!; stop' TERM INT HUP;
    docker run --name "$name" "$@" &
    client=$!;
    wait $client; code=$?;
    trap '' TERM INT HUP;
    exit $code;
""")
)

# Without a container: the engine is a session of its own, to be signalled as one. MPI must not see
# Slurm's variables, or its spawning of workers inside a step fails.
BARE = (
    TELL
    + " "
    + HOLD
    + " "
    + INTERFACES
    + " "
    + script(r"""
    unset $(compgen -e | grep -E '^(SLURM|SLURMD|SBATCH|SALLOC|PMI|PMI2|PMIX|OMPI)_');
    stop() {
        trap '' TERM INT HUP;
        [ -n "$engine" ] || exit 143;
        kill -TERM $engine; kill -TERM -- -$engine 2>/dev/null;
        for i in $(seq 30); do kill -0 -- -$engine 2>/dev/null || exit 143; sleep 0.1; done;
        kill -KILL -- -$engine;
        exit 143;
    };
    trap '[ "$!" = "$watch" ] || engine=$!; stop' TERM INT HUP;
    setsid "$@" &
    engine=$!;
    wait $engine; code=$?;
    trap '' TERM INT HUP;
    kill -KILL -- -$engine 2>/dev/null;
    exit $code;
""")
)

REMOVE_BY_NAME = (
    TELL
    + " "
    + script(r"""
    docker inspect "trtllm-$1-$node" >/dev/null 2>&1 || exit 0;
    timeout 10 docker rm --force "trtllm-$1-$node";
""")
)


@dataclass(frozen=True)
class Plan:
    """All that a launch needs to know."""

    place: Place
    runtime: str
    tag: str
    gpus: str
    mounts: tuple[str, ...]
    cache: str  # the Hugging Face cache, one of the mounts; '' with runtime bare
    cwd: str  # the container's working directory; '': the image's own
    privileged: bool
    user: str
    engine: tuple[str, ...]  # trtllm-serve and its arguments


def mount_flag(path: str) -> str:
    """`--mount`'s value is a CSV row: a comma or quote in a path is written as CSV writes it."""
    row = io.StringIO()
    csv.writer(row, lineterminator="").writerow(["type=bind", f"source={path}", f"target={path}"])
    return f"--mount={row.getvalue()}"


def passed_on(environ: Mapping[str, str]) -> list[str]:
    """Names of variables for the engine; a value in an argv would be there for all to read."""
    ours = {"HF_HOME", "NCCL_SOCKET_IFNAME"}
    return sorted(n for n in environ if n.startswith(PASSED_ON) and n not in ours and environ[n])


def docker_arguments(plan: Plan, environ: Mapping[str, str]) -> list[str]:
    """What follows `docker run --name NAME` and the devices that the node itself finds."""
    names = ["NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", *passed_on(environ)]
    return [
        "--rm",
        "--pull=never",                             # a tag nobody has is an error, not a download
        "--init",                                   # forwards signals, whatever the engine ignores
        f"--label={LABEL}.job={plan.place.job}",
        f"--label={LABEL}.launcher={launcher()}",
        f"--label={LABEL}.user={plan.user}",
        "--uts=host",
        "--ipc=host",                               # NCCL and MPI need more than 64 MB of shm
        "--net=host",
        "--ulimit=memlock=-1",                      # EFA and GPUDirect register memory
        "--ulimit=stack=67108864",
        *(["--privileged"] if plan.privileged else []),
        *map(mount_flag, plan.mounts),
        *([f"--workdir={plan.cwd}"] if plan.cwd else []),
        *([f"--env=HF_HOME={plan.cache}"] if plan.cache else []),
        *(f"--env={name}" for name in names),
        plan.tag,
        *plan.engine,
    ]  # fmt: skip


def launch_command(plan: Plan, environ: Mapping[str, str]) -> list[str]:
    """The one command that is the server, for as long as its standard input is open."""
    if plan.runtime == "bare":
        return [*plan.place.head, "bash", "-c", BARE, "launch", *plan.engine]
    return [
        *plan.place.head,
        "bash",
        "-c",
        DOCKER,
        "launch",
        plan.place.job,
        plan.gpus,
        plan.cache,
        *docker_arguments(plan, environ),
    ]


def remove_command(plan: Plan) -> list[str]:
    """Removes this job's containers, and no others, should a node not have done so itself."""
    return [*plan.place.every, "bash", "-c", REMOVE_BY_NAME, "remove", plan.place.job]


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
        behind = self.path.stat().st_size - self.reader.tell()
        if behind > 8 * limit:
            say(
                f"log: {behind / 1e6:.0f} MB behind, skipped on screen; all of it is in {self.path}"
            )
            self.reader.seek(-limit, os.SEEK_END)
        if new := self.reader.read(limit):
            self._show(new)
            if lines := new.decode(errors="replace").split("\n")[-2:]:
                self.last_line = next((s.strip() for s in lines[::-1] if s.strip()), self.last_line)
        return new

    def _show(self, new: bytes) -> None:
        try:
            sys.stdout.buffer.write(new)
            sys.stdout.flush()
        except (OSError, ValueError):
            # Nobody reads any more: the file keeps it all, the server goes on.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123

    def tail(self, lines: int = 50) -> str:
        """The last lines of this launch."""
        with self.path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self.start, end - (1 << 16)))
            text = file.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def close(self) -> None:
        self.reader.close()
        self.sink.close()


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
        except (LookupError, TypeError) as error:
            raise ValueError(repr(error)) from error
        return True

    def end(self) -> None:
        self.ended.set()
        self.hurry.set()


@dataclass
class Server:
    """A launched server: its step, its log, its health, and when it was started."""

    plan: Plan
    node: str
    url: str
    step: Step
    log: Log
    health: Health
    started: float

    @property
    def age(self) -> float:
        return time.monotonic() - self.started


def launch(plan: Plan, node: str, url: str, log_path: Path) -> Server:
    log = Log(log_path)
    step = Step(launch_command(plan, os.environ), output=log.sink)
    health = Health(url)
    health.start()
    return Server(plan, node, url, step, log, health, time.monotonic())


def await_ready(server: Server, timeout: float) -> None:
    """Return when the server answers; Failure when it ends first, or at the deadline."""
    beat = HEARTBEAT
    while not server.health.ready.is_set():
        tick(server, "before it was ready")
        if server.age > timeout:
            die(
                f"{server.node}: the server was not ready within {timeout:g} s: "
                f"{server.health.answer}; its log's last line: {server.log.last_line or '(empty)'}",
                hint=f"more time: --ready-timeout; the whole log: {server.log.path}",
            )
        if server.age > beat:
            say(f"loading for {server.age:.0f} s; log: {server.log.last_line[:200]}")
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
    if READY_WORDS in server.log.pump():
        server.health.hurry.set()
    if code is not None:
        report_death(server, code, when)
    time.sleep(TICK)


def report_death(server: Server, code: int, when: str) -> None:
    while server.log.pump():
        pass
    tail = server.log.tail()
    if server.plan.place.slurm and "CANCELLED AT" in tail:
        die(
            f"{server.node}: Slurm ended the server {when}: job {server.plan.place.job} was "
            f"cancelled or out of time",
            hint=f"its log: {server.log.path}",
        )
    if code < 0:
        code = 128 - code
    say(f"the last lines of {server.log.path}:\n{tail}\n")
    meaning = f" ({MEANINGS[code]})" if code in MEANINGS else ""
    die(
        f"{server.node}: trtllm-serve ended with exit code {code}{meaning} {when}, after "
        f"{server.age:.1f} s: {last_words(tail) or 'it said nothing'}",
        hint=f"the whole log: {server.log.path}",
    )


def write_json(path: Path, data: Mapping[str, object]) -> None:
    """All of it or nothing, for readers that look at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(data, indent=2) + "\n")
    part.replace(path)


def announce(server: Server, logs: Path, nodes: Sequence[str]) -> dict[str, object]:
    """Say where the server is, on screen and in logs/endpoint.json."""
    endpoint: dict[str, object] = {
        "url": server.url,
        "model": server.health.model,
        "job": server.plan.place.job,
        "nodes": list(nodes),
        "container": f"trtllm-{server.plan.place.job}-{server.node}"
        if server.plan.runtime == "docker"
        else None,
        "log": str(server.log.path),
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
