"""Launches on the test cluster, and what they leave behind."""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

from tests.cluster.cluster import (
    PATIENCE,
    Cluster,
    ClusterError,
    Machine,
    build_image,
    copy_repository,
    processes_in_network_of,
    wait_until,
)

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
TAG = "tensorrt-llm-serve:latest"
TARBALL = Path("/fsx/images/tensorrt-llm-serve-latest.tar.gz")
SQUASH = Path("/fsx/images/tensorrt-llm-serve-latest.sqsh")
REPO = Path("/fsx/repo")
WHOLE = "-N2 --gpus-per-node=8 --exclusive"
FOUR = "-p all -N4 --gpus-per-node=2"  # with one CPU a node
QUICK = {"TRTLLM_SIM_LOAD_SECONDS": "0.3"}
SLOW = {"TRTLLM_SIM_LOAD_SECONDS": "60"}
STRANGERS = ("trtllm", "trtllm-99999-{node}")
STRANGE_PROCESS = "trtllm-serve stranger/model"


def prepare(cluster: Cluster, ballast_mb: int = 0) -> None:
    """Put the repository and an image tarball on /fsx, and strangers' containers on every node."""
    copy_repository(ROOT, REPO)
    first, *others = cluster.nodes.values()
    build_image(first, REPO / "simulator", TAG, ballast_mb=ballast_mb)
    TARBALL.parent.mkdir()
    save = (PYTHON, str(REPO / "save_image.py"), TAG, "-o", str(TARBALL))
    first.run(*save, env={"PIGZ": "-1"})  # fast, not small
    first.docker("tag", TAG, "stranger:1")
    first.run("sh", "-c", "docker save stranger:1 >/fsx/images/stranger.tar")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda node: node.docker("load", "-i", "/fsx/images/stranger.tar"), others))
    for node in cluster.nodes.values():
        start_stranger(node)
    first.docker("rmi", TAG)


def save_squash(cluster: Cluster) -> None:
    """Save the image of the Docker tests for pyxis, as a user without enroot would."""
    if not SQUASH.exists():
        save = (PYTHON, str(REPO / "save_image.py"), "stranger:1", "-o", str(SQUASH))
        cluster.nodes["n1"].run(*save)


def start_stranger(node: Machine) -> None:
    """Start somebody else's two containers and a process, named as carelessly as people do."""
    for name in STRANGERS:
        named = name.format(node=node.name)
        node.docker("run", "-d", "--name", named, "--net=host", "stranger:1", "sleep", "100000")
    node.start("stranger", "bash", "-c", f"exec -a '{STRANGE_PROCESS}' sleep 100000")


def strangers(cluster: Cluster) -> list[str]:
    """Identity and start of everything on the nodes that is not ours."""
    found = []
    for node in cluster.nodes.values():
        for name in STRANGERS:
            container = node.docker_says(f"/containers/{name.format(node=node.name)}/json")
            state = container["State"]
            found.append(f"{container['Id']} {name} {state['StartedAt']} {state['Pid']}")
        found.append(node.docker_says("/images/stranger:1/json")["Id"])
        lines = node.processes().items()
        found += [f"{pid} {line}" for pid, line in lines if line == f"{STRANGE_PROCESS} 100000"]
    return found


def ours(cluster: Cluster, job: str = "") -> list[str]:
    """Our containers on all nodes, running or not; of one job, if given."""
    label = "tensorrt-llm-serve.job" + (job and f"={job}")
    query = urlencode({"all": 1, "filters": json.dumps({"label": [label]})})
    reachable = [node for node in cluster.nodes.values() if "dockerd" in node.daemons]
    said = [node.docker_says(f"/containers/json?{query}") for node in reachable]
    return [container["Id"][:12] for containers in said for container in containers]


def forget_image(cluster: Cluster) -> None:
    for node in cluster.nodes.values():
        node.run("docker", "rmi", TAG, check=False)


def traces(cluster: Cluster, workspace: Path) -> list[str]:
    """Whatever of ours is left on a node, on the login node or in the workspace, in words."""
    found = [f"container {name}" for name in ours(cluster)] + processes(cluster)
    for node in cluster.nodes.values():
        if is_locked(node.root / "run"):
            found.append(f"{node.name}: the lock of the image's load")
        found += [f"{node.name}: {path}" for path in unpacked(node)]
    left = [
        *workspace.rglob("run_*.json"),
        *workspace.rglob("fleet_*.json"),
        *workspace.rglob("endpoint.json"),
        *workspace.rglob("*.part"),
    ]
    return found + [str(path) for path in left]


def unpacked(node: Machine) -> list[str]:
    """The images of steps that pyxis has unpacked on a node."""
    found: list[str] = []
    for of in ("pyxis", "enroot"):
        for folder, names, _ in os.walk(node.root / "run" / of):
            steps = fnmatch.filter(names, "*[0-9].[0-9]*")
            names[:] = {*names} - {*steps}  # what is in one of them is the image's
            found += [f"{folder}/{step}" for step in steps]
    return found


def is_locked(path: Path) -> bool:
    with contextlib.ExitStack() as at_the_end:
        descriptor = os.open(path, os.O_RDONLY)
        at_the_end.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def smoke(cluster: Cluster, url: str) -> str:
    """What test.py says of a server, asked from the login node."""
    command = (PYTHON, str(REPO / "test.py"), "-H", url)
    return cluster.ctl.run(*command, check=False).stdout


def up_by_front(page: str) -> set[str]:
    """The replicas that are ready by the front's own word, its page of metrics."""
    up = r'^haproxy_server_status\{proxy="replicas",server="(\w+)",state="UP"\} 1$'
    return set(re.findall(up, page, re.M))


def processes(cluster: Cluster) -> list[str]:
    """Our processes, by what only our command lines say: an order runs under python3 -IS."""
    docker, unpackers = "docker (run|load|pull|exec|rm)", "(pigz|zstd|gzip) -dc|unsquashfs"
    words = f"{docker}|{unpackers}|trtllm-serve|python3 -IS"
    found = []
    for node in cluster.nodes.values():
        lines = node.processes().items()
        found += [f"{node.name}: {pid} {line}" for pid, line in lines if re.search(words, line)]
    for pid in processes_in_network_of([cluster.ctl.holder.pid]):
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if re.search(r"run_sbatch\.py|^srun |/guard\.py ", line):
                found.append(f"ctl: {pid} {line}")
    return [line for line in found if STRANGE_PROCESS not in line]


class Launch:
    """One run of run_sbatch.py on the login node, its output in a file."""

    def __init__(
        self,
        cluster: Cluster,
        workspace: Path,
        command: list[str],
        env: dict[str, str] | None = None,
        cwd: str | None = None,
    ) -> None:
        self.cluster, self.workspace = cluster, workspace
        self.in_salloc = command[0] == "salloc"
        self.path = workspace / f"output-{time.monotonic_ns()}"
        self._start(command, env, cwd)

    def _start(self, command: list[str], env: dict[str, str] | None, cwd: str | None) -> None:
        cluster, workspace = self.cluster, self.workspace
        with self.path.open("wb") as sink:
            self.process = cluster.ctl.popen(
                *command,
                cwd=cwd or str(workspace),
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.path.read_text(errors="replace")

    def until(self, text: str, after: int = 0) -> float:
        """Wait for a text in the output after so many characters; returns the time it was seen."""

        def seen() -> bool:
            return text in self.output[after:]

        with contextlib.suppress(RuntimeError):
            wait_until(lambda: seen() or self.process.poll() is not None, text)
        assert seen(), f"{text!r} is not said\n{self.output}"
        return time.monotonic()

    @property
    def pid(self) -> int:
        """The launcher's own process: salloc's child, or the process itself."""
        if not self.in_salloc:
            return self.process.pid
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int((children.split() or [str(self.process.pid)])[0])

    @property
    def job(self) -> str:
        found = re.search(r"allocation (\d+)", self.output)
        return found[1] if found else ""

    @property
    def allocation(self) -> dict[str, str]:
        """The environment that a shell inside its allocation has."""
        variables = Path(f"/proc/{self.pid}/environ").read_bytes().split(b"\0")
        pairs = (v.decode().partition("=")[::2] for v in variables if v.startswith(b"SLURM_"))
        return dict(pairs)

    def send(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def code(self) -> int:
        """The exit code, once it has ended."""
        try:
            return int(self.process.wait(PATIENCE))
        except subprocess.TimeoutExpired:
            raise ClusterError(f"no end within {PATIENCE:g} s:\n{self.output}") from None

    def stop(self, signum: int = signal.SIGINT) -> int:
        """Stop it as a user would; when it has ended, its containers are gone from the nodes."""
        self.send(signum)
        code = self.code()
        assert ours(self.cluster, self.job) == []
        return code

    def url(self) -> str:
        return str(json.loads((self.workspace / "logs/endpoint.json").read_text())["url"])


class TerminalLaunch(Launch):
    """A launch at a terminal of its own, which can be typed at and closed."""

    def _start(self, command: list[str], env: dict[str, str] | None, cwd: str | None) -> None:
        self.terminal, theirs = pty.openpty()
        self.process = self.cluster.ctl.popen(
            "setsid", "--ctty", *command, cwd=cwd or str(self.workspace), env=env,
            stdin=theirs, stdout=theirs, stderr=theirs,
        )  # fmt: skip
        os.close(theirs)
        self.path.touch()
        self.closed = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with self.path.open("ab", buffering=0) as sink, contextlib.suppress(OSError):
            while not self.closed.is_set():
                if select.select([self.terminal], [], [], 0.05)[0]:
                    sink.write(os.read(self.terminal, 1 << 16))

    def type(self, keys: bytes) -> None:
        os.write(self.terminal, keys)

    def hang_up(self) -> None:
        """Close the window, as when a connection is lost."""
        self.closed.set()
        self.reader.join()
        os.close(self.terminal)


def serve_args(*extra: str) -> list[str]:
    return ["--image", str(TARBALL), "org/model", "--tp_size", "8", *extra]
