"""One model over both nodes: real MPI ranks in real containers, and their deaths."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, wait_until
from tests.cluster.conftest import Launcher
from tests.cluster.launches import PYTHON, QUICK, REPO, TARBALL, Launch, ours, serve_args
from tests.cluster.test_faults import sentence
from tests.cluster.test_serve import smoke

WORLD = serve_args("--pp_size", "2")


def test_sixteen_ranks_are_one_world_that_serves(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    started = launch(*WORLD, env=QUICK)
    started.until("READY", 60)
    assert "8 ranks on each of n1, n2 (--mpi=pmix); n1 serves" in started.output
    assert len(ours(cluster)) == 2
    logs = sorted((workspace / "logs").glob(f"*_{started.job}_rank*.log"))
    assert len(logs) == 16
    assert (
        "rank 13 on n2" in (logs[0].parent / f"trtllm_server_{started.job}_rank13.log").read_text()
    )
    endpoint = json.loads((workspace / "logs/endpoint.json").read_text())
    assert "Uvicorn running" in Path(endpoint["log"]).read_text()
    assert "8/8" in smoke(cluster, endpoint["url"])
    bench = [
        PYTHON,
        str(REPO / "bench.py"),
        "-t",
        "latency",
        "--num-prompts",
        "3",
        "-o",
        "results",
        "--input-len",
        "16",
        "--output-len",
        "8",
    ]
    assert cluster.ctl.run(*bench, cwd=str(workspace), timeout=120).returncode == 0
    assert started.stop() == 130


def test_the_yaml_decides_the_world(cluster: Cluster, launch: Launcher, workspace: Path) -> None:
    (workspace / "parallel_config.yaml").write_text("tensor_parallel_size: 16\n")
    started = launch("--image", str(TARBALL), "m", "--tp_size", "1", "--config",
                     "parallel_config.yaml", env=QUICK)  # fmt: skip
    started.until("READY", 60)
    assert "world size 16 (tp 16 x pp 1 x cp 1)" in started.output
    assert started.stop() == 130


def test_check_shows_the_plan(launch: Launcher) -> None:
    started = launch(*WORLD, "--check")
    assert started.code() == 0
    assert "8 ranks on each of n1, n2" in started.output


def kill_a_rank(cluster: Cluster, name: str, rank: int) -> None:
    """SIGKILL to the rank's own process in the container, not to what started it outside."""
    node = cluster.nodes[name]
    for pid in node.run("pgrep", "python3").stdout.split():
        environ = node.run("cat", f"/proc/{pid}/environ", check=False).stdout.split("\0")
        if f"SLURM_PROCID={rank}" in environ:
            node.run("kill", "-KILL", pid)
            return
    raise AssertionError(f"no rank {rank} on {name}")


def kill_a_container(cluster: Cluster, started: Launch) -> None:
    cluster.nodes["n2"].docker("kill", f"trtllm-{started.job}-n2")


def stop_dockerd(cluster: Cluster, started: Launch) -> None:
    cluster.nodes["n2"].stop("dockerd")


def stop_slurmd(cluster: Cluster, started: Launch) -> None:
    cluster.nodes["n2"].stop("slurmd", signal.SIGKILL)


FAULTS: dict[str, tuple[Callable[[Cluster, Launch], None], list[str]]] = {
    "rank": (
        lambda c, _: kill_a_rank(c, "n2", 11),
        ["n2: rank 11 ended with exit code 137 (killed"],
    ),
    "rank of the head": (
        lambda c, _: kill_a_rank(c, "n1", 3),
        ["n1: rank 3 ended with exit code 137"],
    ),
    "container": (kill_a_container, ["n2 (ranks 8-15): its container ended with exit code 137"]),
    "dockerd": (stop_dockerd, ["n2 (ranks 8-15)"]),
    "slurmd": (stop_slurmd, ["n2 (ranks 8-15): its slurmd does not answer"]),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_death_on_one_node_ends_all_and_is_named(
    what: str, cluster: Cluster, launch: Launcher
) -> None:
    break_it, words = FAULTS[what]
    node = cluster.nodes["n2"]
    started = launch(*WORLD, env=QUICK)
    started.until("READY", 60)
    try:
        break_it(cluster, started)
        broken = time.monotonic()
        wait_until(lambda: sentence(started.output), 10, f"a report\n{started.output}")
        took = time.monotonic() - broken
        assert all(word in sentence(started.output) for word in words), started.output
        assert took < 10
        assert started.code(30) == 1, started.output
    finally:
        if "dockerd" not in node.daemons:
            node.start_dockerd()
        if "slurmd" not in node.daemons:
            node.start_slurmd()
            wait_until(lambda: cluster.idle() == 2, 60, "n2 back")
    wait_until(lambda: ours(cluster) == [], 10, "no container left")


@pytest.mark.parametrize("variant", ["stuck", "propagate"])
def test_a_server_that_fails_under_its_leader_is_noticed(variant: str, launch: Launcher) -> None:
    env = {**QUICK, "TRTLLM_SIM_LAUNCH": variant, "TRTLLM_SIM_FAULT": "exit-serving:3:1"}
    started = launch(*WORLD, env=env)
    started.until("READY", 60)
    assert started.code(20) == 1
    assert "n1: rank 0 ended" in sentence(started.output), started.output


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL", "scancel"])
def test_however_a_world_is_stopped_nothing_is_left(
    how: str, cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    started = launch(*WORLD, env=QUICK)
    started.until("READY", 60)
    if how == "scancel":
        cluster.ctl.run("scancel", started.job)
    else:
        started.send(getattr(signal, how))
    started.code(20)
    wait_until(lambda: ours(cluster) == [], 5, f"no container left\n{started.output}")
    status = (PYTHON, str(REPO / "run_sbatch.py"), "--status")
    cluster.ctl.run(*status, cwd=str(workspace), check=False)


def test_slurm_without_pmix_is_told(launch: Launcher) -> None:
    started = launch(*WORLD, env={**QUICK, "MPI": "pmix_v9"})
    assert started.code(30) == 1
    assert "no MPI type pmix_v9" in sentence(started.output)
