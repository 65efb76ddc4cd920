"""vLLM in containers of the tests' Slurm and Docker cluster: on one node, and over two.

    make check-engines ENGINE=vllm CLUSTER=1    # as root; about 20 minutes

The nodes have a GPU each, so that a tensor parallel size of two takes both of them; vLLM's CPU
build leaves the GPUs alone and joins the two by gloo. The container has Debian, the Python and the
packages that pip has installed, and an entrypoint like that of the engine's own image.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.cluster import Cluster, Machine, copy_repository, root_tarball, why_not
from tests.cluster.launches import REPO, ROOT, Launch, smoke, traces
from tests.engines import tiny_model
from tests.engines.engines import OFFLINE, PLACES, READY_SECONDS, Engine

MODEL = Path("/fsx/model")
TAG = "pip-packages:latest"
# Eager, as a container made of pip's packages has no compiler.
ARGS = ("--load-format", "dummy", "--enforce-eager")


def stop(cluster: Cluster, launch: Launch) -> None:
    launch.send(signal.SIGINT)


def kill_second_node(cluster: Cluster, launch: Launch) -> None:
    cluster.nodes["n2"].run("pkill", "-KILL", "--full", "VLLM::Worker")


@dataclass(frozen=True)
class Case:
    """A launch, what ends it, and how it then ends."""

    name: str
    nodes: str
    args: tuple[str, ...] = ()
    end: Callable[[Cluster, Launch], None] = stop
    code: int = 130
    says: str = "stopped by SIGINT"


TWO = ("--tensor-parallel-size", "2")
KILLED = "over two nodes, and the second one's worker is killed"
CASES = (
    Case("on one node", "-N1"),
    Case("over two nodes", "-N2", TWO),
    Case(KILLED, "-N2", TWO, kill_second_node, 1, "ERROR .* ended with"),
)


def check(engine: Engine, venv: Path) -> bool:
    """Play all cases; whether each ended as it should."""
    if reason := why_not():
        raise SystemExit(f"check-engines: no cluster here: {reason}")
    with Cluster(nodes=2, gpus=1) as cluster:
        copy_repository(ROOT, REPO)
        tiny_model.write(MODEL)
        for node in cluster.nodes.values():
            make_image(node, venv)
        return all([told(case, play(case, engine, venv, cluster)) for case in CASES])


def told(case: Case, wrong: str) -> bool:
    print(f"  {case.name}: {wrong or 'as it should be, and nothing is left'}", flush=True)
    return not wrong


def make_image(node: Machine, venv: Path) -> None:
    """Debian, Python and the engine, at the places that they have here."""
    files = [str(path.relative_to("/")) for path in (venv, Path(sys.base_prefix))]
    changes = [
        'ENTRYPOINT ["vllm", "serve"]',
        f"ENV PATH={venv}/bin:/usr/bin:/bin",
        "ENV TORCHDYNAMO_DISABLE=1",  # there is no compiler
    ]
    options = [word for change in changes for word in ("--change", change)]
    with tempfile.TemporaryDirectory(dir=node.state) as root:
        subprocess.run(["tar", "-C", root, "-xf", str(root_tarball())], check=True)
        whole = ["tar", "-c", "-C", root, ".", "-C", "/", *files]
        with subprocess.Popen(whole, stdout=subprocess.PIPE) as tar:
            node.run(
                "docker", "import", *options, "-", TAG, stdin=tar.stdout, timeout=READY_SECONDS
            )


def play(case: Case, engine: Engine, venv: Path, cluster: Cluster) -> str:
    """'' where all is as it should be, else what is not."""
    print(f"check-engines: {engine.name} {case.name}", file=sys.stderr, flush=True)
    workspace = Path(tempfile.mkdtemp(dir="/fsx"))
    launch = start(case, engine, venv, cluster, workspace)
    try:
        if wrong := serves(launch, cluster):
            return f"{wrong}: {launch.output[-3000:]}"
        case.end(cluster, launch)
        code = launch.code()
        if code != case.code or not re.search(case.says, launch.output):
            return f"exit code {code}: {launch.output[-3000:]}"
    finally:
        if launch.process.poll() is None:
            launch.send(signal.SIGTERM)
            launch.code()
    return "; ".join([*traces(cluster, workspace), *engines(cluster)])


def start(case: Case, engine: Engine, venv: Path, cluster: Cluster, workspace: Path) -> Launch:
    salloc = ["salloc", case.nodes, "--gpus-per-node=1", "--exclusive"]
    script = [sys.executable, str(REPO / "run_sbatch.py"), "--engine", engine.name]
    command = [*salloc, *script, "--image", TAG, str(MODEL), *ARGS, *case.args]
    env = {**OFFLINE, **engine.environ, **dict.fromkeys(PLACES, str(workspace))}
    env |= {"PATH": f"{venv}/bin:/usr/bin:/bin:/usr/sbin:/sbin", "CONTAINER_MOUNT": "/fsx"}
    return Launch(cluster, workspace, command, env=env)


def serves(launch: Launch, cluster: Cluster) -> str:
    """Wait until it is ready, then ask it; '' where all checks pass."""
    begin = time.monotonic()
    while "READY" not in launch.output:
        if launch.process.poll() is not None or time.monotonic() - begin > READY_SECONDS:
            return "not ready"
        time.sleep(0.5)
    print(f"check-engines: ready after {time.monotonic() - begin:.0f} s", file=sys.stderr)
    said = smoke(cluster, launch.url())
    return "" if "8/8" in said else f"test.py: {said}"


def engines(cluster: Cluster) -> list[str]:
    """What of an engine still runs."""
    lines = [
        f"{node.name}: {line}"
        for node in cluster.nodes.values()
        for line in node.run("ps", "-eo", "pid,args").stdout.splitlines()
    ]
    return [line for line in lines if re.search("vllm|VLLM", line)]
