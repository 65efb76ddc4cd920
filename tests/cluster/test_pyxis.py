"""Slurm's own steps in containers: the plug-in's rules, and what a launch by it leaves behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, wait_until
from tests.cluster.conftest import Launcher
from tests.cluster.launches import QUICK, SLOW, SQUASH, save_squash, traces
from tests.cluster.test_faults import sentence
from tests.cluster.test_multinode import kill_a_rank
from tests.cluster.test_serve import smoke

ONE = "-N1 --gpus-per-node=8 --exclusive"


@pytest.fixture(scope="module")
def image(cluster: Cluster) -> Path:
    save_squash(cluster)
    return SQUASH


@pytest.fixture
def args(image: Path) -> list[str]:
    return ["--image", str(image), "org/model", "--tp_size", "8"]


# The plug-in: what the launcher relies on, held against whichever is loaded
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
    script = "ls /run/pyxis /run/enroot 2>/dev/null | grep '[0-9]'; grep enroot /proc/mounts"
    return [
        node.run("sh", "-c", script, check=False).stdout
        for node in cluster.nodes.values()
        if node.run("sh", "-c", script, check=False).stdout
    ]


# Launches
def test_sixteen_ranks_are_one_world_that_serves(
    cluster: Cluster, launch: Launcher, args: list[str], workspace: Path
) -> None:
    """Whatever a shell exports of the plug-in's bends no step of the launcher's."""
    env = {**QUICK, "PYXIS_CONTAINER_IMAGE": "/none", "PYTHONPATH": "/none", "HF_TOKEN": "hf_x"}
    started = launch(*args, "--pp_size", "2", env=env)
    started.until("READY")
    assert "8 ranks on each of n1, n2 (--mpi=pmix); n1 serves" in started.output
    assert "8/8" in smoke(cluster, started.url())
    logs = sorted((workspace / "logs").glob(f"*_{started.job}_rank*.log"))
    assert len(logs) == 16 and not any("PMIX ERROR" in log.read_text() for log in logs)
    seen = [node.run("ps", "-eo", "args").stdout for node in cluster.nodes.values()]
    assert not any("hf_x" in each for each in seen)
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


def test_a_rank_that_dies_ends_all_and_is_named(
    cluster: Cluster, launch: Launcher, args: list[str]
) -> None:
    started = launch(*args, "--pp_size", "2", env=QUICK)
    started.until("READY")
    kill_a_rank(cluster, "n2", 11)
    assert started.code() == 1
    assert "n2: rank 11 ended with exit code 137 (killed" in sentence(started.output)


@pytest.mark.parametrize("how", ["scancel", "time limit"])
def test_the_end_of_the_job_is_told(
    how: str, cluster: Cluster, launch: Launcher, args: list[str]
) -> None:
    started = launch(*args, salloc=ONE, env=QUICK)
    started.until("READY")
    if how == "scancel":
        cluster.ctl.run("scancel", started.job)
    else:
        cluster.ctl.run("scontrol", "update", f"jobid={started.job}", "timelimit=0")
    assert started.code() != 0


@pytest.fixture
def slow_unpacking(cluster: Cluster) -> Iterator[None]:
    script = cluster.state / "bin/unsquashfs"
    script.write_text('#!/bin/sh\nsleep 60\nexec /usr/bin/unsquashfs "$@"\n')
    script.chmod(0o755)
    yield
    script.unlink()


@pytest.mark.usefixtures("slow_unpacking")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_end_while_a_container_is_unpacked_leaves_nothing(
    how: int, cluster: Cluster, launch: Launcher, args: list[str], workspace: Path
) -> None:
    started = launch(*args, "--pp_size", "2", env=SLOW)
    wait_until(lambda: len(left_of_containers(cluster)) == 2, "two nodes unpack")
    started.send(how)
    started.code()
    wait_until(lambda: traces(cluster, workspace) == [], "nothing left", 30)


@pytest.fixture
def without_pyxis(cluster: Cluster) -> Iterator[None]:
    """n2 runs steps without the plug-in, and tells nobody."""
    empty, there = cluster.state / "plugstack.none", "/etc/slurm/plugstack.conf"
    empty.touch()
    cluster.nodes["n2"].run("mount", "--bind", str(empty), there)
    yield
    cluster.nodes["n2"].run("umount", there)


@pytest.mark.usefixtures("without_pyxis")
def test_a_node_that_does_not_load_it_is_named(launch: Launcher, args: list[str]) -> None:
    started = launch(*args, "--pp_size", "2", env=QUICK)
    assert started.code() == 1
    assert "n2 does not load the plug-in" in sentence(started.output)


def test_an_image_that_is_damaged_is_told(
    cluster: Cluster, launch: Launcher, args: list[str], workspace: Path
) -> None:
    cut = workspace / "cut.sqsh"
    cut.write_bytes(SQUASH.read_bytes()[:1_000_000])
    started = launch("--image", str(cut), *args[2:], salloc=ONE, env=QUICK)
    assert started.code() == 1
    assert "The image is damaged or cut off" in started.output


@pytest.fixture
def without_docker(cluster: Cluster, launch: Launcher) -> Iterator[None]:
    """`launch` looks for Docker's containers at its end: this ends first."""
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
    assert "the nodes have no Docker, and Slurm has pyxis: --runtime pyxis" in started.output
    started.send(signal.SIGINT)
    assert started.code() == 130
