"""A server that fails on the real cluster is found and started anew; a job's end is told."""

from __future__ import annotations

from pathlib import Path

from tests.cluster.cluster import Cluster, wait_until
from tests.cluster.conftest import Launcher
from tests.cluster.launches import QUICK, REPO, WHOLE, ours, serve_args, smoke
from tests.cluster.test_multinode import WORLD, kill_a_rank


def test_a_server_that_dies_is_started_anew(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    started = launch(*serve_args("--restart", "2"), env=QUICK)
    started.until("stop it with")
    cluster.nodes["n1"].docker("kill", f"trtllm-{started.job}-n1")
    started.until("exit code 137 (killed) while serving")
    started.until("restarting (1 of 2) in 2 s")
    assert ours(cluster) == [] and not (workspace / "logs/endpoint.json").exists()
    wait_until((workspace / "logs/endpoint.json").exists, "ready again")
    assert "8/8" in smoke(cluster, started.url())
    assert started.stop() == 130


def test_a_node_learns_from_slurm_that_its_job_is_over(cluster: Cluster, launch: Launcher) -> None:
    """A container's script asks this, with the real squeue."""
    started = launch(*serve_args(), env=QUICK)
    started.until("READY")

    def over(job: str, known: str) -> int:
        look = f"import sys; from launch.node.base import Job; j = Job({job!r}, bool({known!r}))"
        ask = ("python3", "-c", f"{look}; sys.exit(not j.is_over())")
        env = {"PYTHONPATH": str(REPO), "SQUEUE_STATES": "PENDING", "SLURM_CLUSTERS": "other"}
        return cluster.nodes["n1"].run(*ask, env=env, check=False).returncode

    assert over(started.job, "1") == 1
    assert over("99999", "1") == 0 and over("99999", "") == 1
    cluster.ctl.run("scancel", started.job)
    started.code()
    wait_until(lambda: over(started.job, "1") == 0, "the job's end, as its node sees it")


def test_a_world_is_started_anew_as_a_whole(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    started = launch(*WORLD, "--restart", "1", env=QUICK)
    started.until("stop it with")
    kill_a_rank(cluster, "n2", 11)
    started.until("restarting (1 of 1) in 2 s")
    assert "n2: rank 11 ended with exit code 137" in started.output
    assert ours(cluster) == []
    wait_until((workspace / "logs/endpoint.json").exists, "ready again")
    assert len(ours(cluster)) == 2
    assert "8/8" in smoke(cluster, started.url())
    assert started.stop() == 130


def test_the_end_of_the_time_limit_is_told_before_and_after(
    cluster: Cluster, launch: Launcher
) -> None:
    """With a world of two nodes; the fault matrix has one node."""
    started = launch(*WORLD, "--restart", "3", salloc=f"--time=5 {WHOLE}", env=QUICK)
    started.until("READY")
    # Slurm counts in minutes, and looks twice a minute.
    cluster.ends_now(started.job)
    assert started.code() in (1, 129, 143), started.output
    assert "the job reaches its time limit in " in started.output
    assert "has reached its time limit" in started.output, started.output
    assert "restarting" not in started.output
    assert "stopped; the log is" in started.output
    assert ours(cluster) == []
