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
from tests.cluster.launches import (
    FOUR,
    PYTHON,
    QUICK,
    REPO,
    TARBALL,
    WHOLE,
    Launch,
    ours,
    serve_args,
    smoke,
    traces,
)
from tests.cluster.test_bench import measure
from tests.cluster.test_faults import sentence

WORLD = serve_args("--pp_size", "2")
FOUR_WORLD = ["--image", str(TARBALL), "org/model", "--tp_size", "4", "--pp_size", "2"]
TWO_GPUS = {**QUICK, "TRTLLM_SIM_GPUS": "2"}
# Four ranks on two nodes are enough to see how a world ends.
SMALL_WORLD = ["--image", str(TARBALL), "org/model", "--tp_size", "2", "--pp_size", "2"]
TWO = "-N2 --gpus-per-node=2"


def test_sixteen_ranks_are_one_world_that_serves(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    started = launch(*WORLD, env=QUICK)
    started.until("READY")
    assert "8 ranks on each of n1, n2 (--mpi=pmix); n1 serves" in started.output
    assert len(ours(cluster)) == 2
    logs = sorted((workspace / "logs").glob(f"*_{started.job}_rank*.log"))
    assert len(logs) == 16
    assert (
        "rank 13 on n2" in (logs[0].parent / f"trtllm_server_{started.job}_rank13.log").read_text()
    )
    endpoint = json.loads((workspace / "logs/endpoint.json").read_text())
    assert "Uvicorn running" in Path(endpoint["log"]).read_text()
    quiet = cluster.nodes["n2"].slurmd_log.stat().st_size
    assert "8/8" in smoke(cluster, endpoint["url"])
    measure(cluster, workspace, *SHORT)
    assert cluster.nodes["n2"].slurmd_log.stat().st_size == quiet
    assert started.stop() == 130


SHORT = "-t latency --num-prompts 3 --input-len 16 --output-len 8".split()


def test_four_nodes_are_one_world_that_serves(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    started = launch(*FOUR_WORLD, salloc=FOUR, env=TWO_GPUS)
    started.until("READY")
    assert "2 ranks on each of n1, n2, n3, n4 (--mpi=pmix); n1 serves" in started.output
    assert len(ours(cluster)) == 4
    log = workspace / f"logs/trtllm_server_{started.job}_rank7.log"
    assert "rank 7 on n4: loading part 8 of 8" in log.read_text()
    assert "8/8" in smoke(cluster, started.url())
    measure(cluster, workspace, *SHORT)
    assert started.stop() == 130


def test_a_rank_that_dies_on_the_fourth_node_ends_all(cluster: Cluster, launch: Launcher) -> None:
    started = launch(*FOUR_WORLD, salloc=FOUR, env={**TWO_GPUS, "MPI": "pmix_v4"})
    started.until("READY")
    assert "(--mpi=pmix_v4)" in started.output
    kill_a_rank(cluster, "n4", 7)
    assert started.code() == 1
    assert "n4: rank 7 ended with exit code 137 (killed" in sentence(started.output)
    assert ours(cluster) == []


PASTE = """
set -m
"$@" --dry-run >shown || exit
mapfile -d '' -t blocks < <(awk '/^# /{printf "%c", 0; next} {print}' shown)
eval "${blocks[1]}"; (eval "${blocks[2]}") < <(exec sleep 20 2>&-); eval "${blocks[3]}"
eval "${blocks[4]}" >talk 2>&1
until [ $(grep -c '"Up"' talk) = 2 ]; do sleep 0.1; done
(eval "${blocks[5]}") < <(exec sleep 60 2>&-) &
until [ -e enough ]; do sleep 0.1; done
kill %1 %2
wait %1 %2
eval "${blocks[6]}"
"""


def test_the_lines_of_a_dry_run_bring_a_world_up(cluster: Cluster, workspace: Path) -> None:
    command = ["salloc", *WHOLE.split(), "bash", "-c", PASTE, "paste"]
    command += [PYTHON, str(REPO / "run_sbatch.py"), *WORLD]
    pasted = Launch(cluster, workspace, command, env=QUICK)
    url = "http://10.77.0.11:8000"
    wait_until(lambda: pasted.process.poll() is not None or "8/8" in smoke(cluster, url), "up")
    assert pasted.process.poll() is None, pasted.output
    assert len(list((workspace / "logs").glob("*_rank*.log"))) == 16
    (workspace / "enough").touch()
    pasted.code()
    assert traces(cluster, workspace) == []


def test_the_yaml_decides_the_world(cluster: Cluster, launch: Launcher, workspace: Path) -> None:
    """A slurmd that is restarted meanwhile does not end it, either."""
    node = cluster.nodes["n2"]
    (workspace / "parallel_config.yaml").write_text("tensor_parallel_size: 16\n")
    started = launch("--image", str(TARBALL), "m", "--tp_size", "1", "--config",
                     "parallel_config.yaml", env=QUICK)  # fmt: skip
    started.until("READY")
    assert "world size 16 (tp 16 x pp 1 x cp 1)" in started.output
    node.stop("slurmd", signal.SIGKILL)
    time.sleep(2.5)  # longer than between two signs of life
    node.start_slurmd()
    assert "8/8" in smoke(cluster, started.url())
    assert started.stop() == 130
    wait_until(cluster.idle, "n2 back")


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


def stop_dockerd(cluster: Cluster, started: Launch) -> None:
    cluster.nodes["n2"].stop("dockerd")


def stop_slurmd(cluster: Cluster, started: Launch) -> None:
    cluster.nodes["n2"].stop("slurmd", signal.SIGKILL)


FAULTS: dict[str, tuple[Callable[[Cluster, Launch], None], list[str]]] = {
    "rank": (
        lambda c, _: kill_a_rank(c, "n2", 3),
        ["n2: rank 3 ended with exit code 137 (killed"],
    ),
    "rank of the head": (
        lambda c, _: kill_a_rank(c, "n1", 1),
        ["n1: rank 1 ended with exit code 137"],
    ),
    "dockerd": (stop_dockerd, ["n2 (ranks 2-3)"]),
    "slurmd": (stop_slurmd, ["n2 (ranks 2-3): its slurmd has been gone for 5 s"]),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_death_on_one_node_ends_all_and_is_named(
    what: str, cluster: Cluster, launch: Launcher
) -> None:
    break_it, words = FAULTS[what]
    node = cluster.nodes["n2"]
    started = launch(*SMALL_WORLD, salloc=TWO, env=TWO_GPUS)
    started.until("READY")
    try:
        break_it(cluster, started)
        assert started.code() == 1, started.output
        assert all(word in sentence(started.output) for word in words), started.output
        assert ours(cluster) == []
    finally:
        if "dockerd" not in node.daemons:
            node.start_dockerd()
        if "slurmd" not in node.daemons:
            node.start_slurmd()
            wait_until(cluster.idle, "n2 back")
    wait_until(lambda: ours(cluster) == [], "no container left")


@pytest.mark.parametrize("variant", ["stuck", "propagate"])
def test_a_server_that_fails_under_its_leader_is_noticed(variant: str, launch: Launcher) -> None:
    env = {**TWO_GPUS, "TRTLLM_SIM_LAUNCH": variant, "TRTLLM_SIM_FAULT": "exit-serving:3:1"}
    started = launch(*SMALL_WORLD, salloc=TWO, env=env)
    started.until("READY")
    assert started.code() == 1
    assert "n1: rank 0 ended" in sentence(started.output), started.output


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL", "scancel"])
def test_however_a_world_is_stopped_nothing_is_left(
    how: str, cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    started = launch(*SMALL_WORLD, salloc=TWO, env=TWO_GPUS)
    started.until("READY")
    if how == "scancel":
        cluster.ctl.run("scancel", started.job)
    else:
        started.send(getattr(signal, how))
    started.code()
    nothing = f"nothing left\n{started.output}"
    wait_until(lambda: traces(cluster, workspace) == [], nothing)


def test_a_warning_of_slurm_and_a_suspended_job_end_no_world(
    cluster: Cluster, launch: Launcher
) -> None:
    started = launch(*SMALL_WORLD, salloc=TWO, env=TWO_GPUS)
    started.until("stop it with")
    for name in ("USR1", "USR2"):
        cluster.ctl.run("scancel", f"--signal={name}", started.job)
    cluster.ctl.run("scontrol", "suspend", started.job)
    started.until(f"job {started.job} is suspended")
    cluster.ctl.run("scontrol", "resume", started.job)
    started.until(f"job {started.job} is resumed")
    assert "8/8" in smoke(cluster, started.url())
    assert started.stop() == 130


def test_slurm_without_pmix_is_told(launch: Launcher) -> None:
    started = launch(*WORLD, env={**QUICK, "MPI": "pmix_v9"})
    assert started.code() == 1
    assert "no MPI type pmix_v9" in sentence(started.output)
