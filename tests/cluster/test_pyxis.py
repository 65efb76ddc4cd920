"""Slurm's own steps in containers: the plug-in's rules, and launches that rely on them."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, wait_until
from tests.cluster.conftest import Launcher
from tests.cluster.launches import QUICK, SQUASH, save_squash, smoke, traces, unpacked
from tests.cluster.pyxis_faults import CELLS, kill_engine
from tests.cluster.scene import Cell, play
from tests.cluster.test_bench import measure

ONE = "-N1 --gpus-per-node=8 --exclusive"


@pytest.fixture(scope="module")
def image(cluster: Cluster) -> Path:
    save_squash(cluster)
    return SQUASH


@pytest.fixture
def args(image: Path) -> list[str]:
    return ["--image", str(image), "org/model", "--tp_size", "8"]


# The plug-in: what the launcher relies on, checked with whichever is loaded
CONTAINED = ["--container-image", str(SQUASH), "--container-writable"]
RULES = {
    "is inside": ([*CONTAINED, "--container-mounts=/fsx:/proof"], "test -d /proof", 0, ""),
    "sees no /fsx": (CONTAINED, "test -d /fsx/images", 1, ""),
    "writable": (CONTAINED, "touch /x /root/x /tmp/x", 0, ""),
    "read-only": (["--container-image", str(SQUASH)], "touch /x", 1, "Read-only file system"),
    "the image's variable wins": (CONTAINED, "echo $IMAGE_VERSION", 0, "1"),
    "unless it is named": (
        [*CONTAINED, "--container-env=IMAGE_VERSION"],
        "echo $IMAGE_VERSION",
        0,
        "ours",
    ),
    "no file": (
        ["--container-image=/none.sqsh"],
        "true",
        1,
        "[ERROR] No such file or directory: /none",
    ),
    "no image": (
        ["--container-image=/etc/passwd"],
        "true",
        1,
        "[ERROR] Invalid image format: /etc/pa",
    ),
    "no mount": (
        [*CONTAINED, "--container-mounts=/none"],
        "true",
        1,
        "source path does not exist: /no",
    ),
    "no folder": (
        [*CONTAINED, "--container-workdir=/none"],
        "true",
        1,
        "couldn't chdir to /none: No",
    ),
    "no path": (
        [*CONTAINED, "--container-mounts=none"],
        "true",
        255,
        "Invalid --container-mounts arg",
    ),
    "twice": ([*CONTAINED, "--container-image=/x"], "true", 255, "--container-image"),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_plug_in_keeps_to_its_rules(rule: str, cluster: Cluster, image: Path) -> None:
    flags, script, code, words = RULES[rule]
    command = ["srun", "-N1", "--no-container-mount-home", *flags, "sh", "-c", script]
    done = cluster.ctl.run(*command, env={"IMAGE_VERSION": "ours"}, check=False)
    assert (done.returncode, words in done.stdout + done.stderr) == (code, True), done
    wait_until(lambda: left_of_containers(cluster) == [], "nothing left")


def left_of_containers(cluster: Cluster) -> list[str]:
    return [
        line
        for node in cluster.nodes.values()
        for line in (
            *unpacked(node),
            *node.run("grep", "enroot", "/proc/mounts", check=False).stdout.splitlines(),
        )
    ]


# Launches
def test_sixteen_ranks_are_one_world_that_serves(
    cluster: Cluster, launch: Launcher, args: list[str], workspace: Path
) -> None:
    """The plug-in's variables in a shell change nothing about the launcher's steps."""
    env = {**QUICK, "PYXIS_CONTAINER_IMAGE": "/none", "PYTHONPATH": "/none", "HF_TOKEN": "hf_x"}
    started = launch(*args, "--pp_size", "2", env=env)
    started.until("READY")
    assert "8 ranks on each of n1, n2 (--mpi=pmix); n1 serves" in started.output
    assert "8/8" in smoke(cluster, started.url())
    logs = sorted((workspace / "logs").glob(f"*_{started.job}_rank*.log"))
    assert len(logs) == 16 and not any("PMIX ERROR" in log.read_text() for log in logs)
    lines = [line for node in cluster.nodes.values() for line in node.processes().values()]
    assert lines and not any("hf_x" in line for line in lines)
    assert started.stop() == 130


def test_one_node_serves_and_sigkill_of_the_launcher_ends_it(
    cluster: Cluster, launch: Launcher, args: list[str], workspace: Path
) -> None:
    started = launch(*args, salloc=ONE, env=QUICK)
    started.until("READY")
    assert "all ranks on n1" in started.output
    assert "8/8" in smoke(cluster, started.url())
    started.send(signal.SIGKILL)
    started.code()
    wait_until(lambda: traces(cluster, workspace) == [], "nothing left")


def test_a_fleet_of_two_serves_and_outlives_one(
    cluster: Cluster, launch: Launcher, args: list[str], workspace: Path
) -> None:
    started = launch(*args, "--replicas", "2", "--no-front", env=QUICK)
    started.until("stop it with")
    assert "r0 on n1; r1 on n2" in started.output
    found = json.loads((workspace / "logs/endpoint.json").read_text())["replicas"]
    assert all("8/8" in smoke(cluster, each["url"]) for each in found)
    kill_engine(cluster.nodes["n1"])
    started.until("1 of 2 replicas")
    assert "8/8" in smoke(cluster, found[1]["url"])
    assert started.stop() == 130


def test_nvidias_client_measures_from_the_same_image(
    cluster: Cluster, launch: Launcher, args: list[str], workspace: Path
) -> None:
    started = launch(*args, salloc=ONE, env=QUICK)
    started.until("READY")
    words = ["-t", "latency", "--input-len", "128", "--output-len", "8", "--num-prompts", "4"]
    env = {**started.allocation, "TRTLLM_STAND_IN": "measure"}
    run = measure(cluster, workspace, *words, "-i", str(SQUASH), env=env)
    assert run["metadata"]["client"] == "trtllm" and len(run["metadata"]["image_id"]) == 64
    assert started.stop() == 130


FAULTS = [
    "SIGINT to the launcher:unpacking",
    "SIGKILL to the launcher:unpacking",
    "SIGKILL to the launcher:serving",
    "scancel:serving",
    "time limit:serving",
    "rank killed on the 2nd node:serving on 2 nodes",
    "slurmd stopped:serving",
    "slurmd stopped on the 2nd node:serving on 2 nodes",
    "node does not load the plug-in:before the launch",
    "image cut off:before the launch",
]


@pytest.mark.usefixtures("image")
@pytest.mark.parametrize("cell", [c for c in CELLS if c.name in FAULTS], ids=lambda c: c.name)
def test_what_the_user_sees_of_a_fault(cell: Cell, cluster: Cluster) -> None:
    play(cell, cluster, slack=10)


@pytest.fixture
def without_docker(cluster: Cluster, launch: Launcher) -> Iterator[None]:
    """n1 has no Docker, until just before `launch` looks for containers at its end."""
    node = cluster.nodes["n1"]
    node.run("mount", "--bind", "/dev/null", "/usr/bin/docker")
    yield
    node.run("umount", "/usr/bin/docker")


@pytest.mark.usefixtures("without_docker")
def test_where_nodes_have_no_docker_it_is_chosen(
    cluster: Cluster, launch: Launcher, image: Path, workspace: Path
) -> None:
    (workspace / "tensorrt-llm-serve-latest.sqsh").symlink_to(image)
    started = launch("org/model", "--tp_size", "8", salloc=ONE, env=QUICK)
    started.until("READY")
    assert "the nodes have no Docker, but Slurm has pyxis: using --runtime pyxis" in started.output
    started.send(signal.SIGINT)
    assert started.code() == 130
