"""Several servers of one launch on the real cluster: placed, killed, started anew, ended."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from launch.front import in_flight
from tests.cluster.cluster import Cluster, wait_until
from tests.cluster.conftest import Launcher
from tests.cluster.launches import FOUR, QUICK, TARBALL, ours, smoke
from tests.cluster.test_faults import sentence
from tests.cluster.test_multinode import kill_a_rank

ONE_NODE = "-N1 --gpus-per-node=4"


def fleet(*args: str, tp: int = 4) -> list[str]:
    return ["--image", str(TARBALL), "org/model", "--tp_size", str(tp), "--no-front", *args]


def endpoint(workspace: Path) -> dict[str, Any]:
    found = json.loads((workspace / "logs/endpoint.json").read_text())
    assert isinstance(found, dict)
    return found


def replicas(workspace: Path) -> list[dict[str, Any]]:
    return list(endpoint(workspace)["replicas"])


def kill(cluster: Cluster, replica: dict[str, Any]) -> None:
    cluster.nodes[replica["node"]].docker("kill", replica["container"])


def gpus_of(cluster: Cluster, replica: dict[str, Any]) -> list[str]:
    """The GPUs that Docker was asked for."""
    seen = cluster.nodes[replica["node"]].docker("inspect", replica["container"])
    requests = json.loads(seen)[0]["HostConfig"]["DeviceRequests"]
    return list(requests[0]["DeviceIDs"])


def test_four_replicas_on_two_nodes(cluster: Cluster, launch: Launcher, workspace: Path) -> None:
    """Each has its GPUs and its port, and serves."""
    started = launch(*fleet("--replicas", "auto"), env=QUICK)
    started.until("stop it with")
    assert "4 replicas of world size 4" in started.output
    assert "r0-r1 on n1; r2-r3 on n2" in started.output
    found = replicas(workspace)
    assert [each["url"] for each in found] == [
        f"http://10.77.0.{node}:{port}" for node in (11, 12) for port in (8001, 8002)
    ]
    assert [each["container"] for each in found] == [
        f"trtllm-{started.job}-r{i}-{node}" for i, node in enumerate(("n1", "n1", "n2", "n2"))
    ]
    for each in found:
        assert gpus_of(cluster, each) == each["gpus"]
    assert [each["gpus"] for each in found] == [list("0123"), list("4567")] * 2
    assert all("8/8" in smoke(cluster, each["url"]) for each in found)
    assert started.stop() == 130
    assert ours(cluster) == []


def test_part_of_a_node_is_shared_by_its_gpus(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    """Two fleets on one node, each in a job with half of the GPUs."""
    first = launch(*fleet("--replicas", "auto", tp=2), salloc=ONE_NODE, env=QUICK)
    first.until("stop it with")
    theirs = replicas(workspace)
    args = fleet("--replicas", "2", "--port", "9000", tp=2)
    second = launch(*args, salloc=f"-w n1 {ONE_NODE}", env=QUICK)
    second.until("stop it with")
    both = [*theirs, *replicas(workspace)]
    assert {each["node"] for each in both} == {"n1"}
    gpus = [gpu for each in both for gpu in each["gpus"]]
    assert sorted(gpus) == list("01234567")
    assert second.stop() == 130
    assert all("8/8" in smoke(cluster, each["url"]) for each in theirs)
    assert first.stop() == 130


def test_worlds_of_two_nodes_side_by_side(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    """A rank's death ends its own world, and not the other."""
    env = {**QUICK, "TRTLLM_SIM_GPUS": "2"}
    args = fleet("--replicas", "auto", "--restart", "1", tp=4)
    started = launch(*args, salloc=FOUR, env=env)
    started.until("stop it with")
    assert "2 replicas of world size 4" in started.output
    assert "r0 on n1, n2; r1 on n3, n4 (--mpi=pmix)" in started.output
    before = replicas(workspace)
    assert [each["node"] for each in before] == ["n1", "n3"]
    assert all("8/8" in smoke(cluster, each["url"]) for each in before)
    kill_a_rank(cluster, "n4", 3)
    started.until("r1: n4: rank 3 ended with exit code 137")
    assert "8/8" in smoke(cluster, before[0]["url"])
    wait_until(lambda: replicas(workspace)[1]["restarts"] == 1, "r1's restart")
    wait_until(lambda: replicas(workspace)[1]["ready"], "r1 is back")
    assert replicas(workspace)[0]["started"] == before[0]["started"]
    assert "8/8" in smoke(cluster, before[1]["url"])
    assert started.stop() == 130


def test_one_that_is_killed_is_started_anew_and_the_others_serve_on(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    args = fleet("--replicas", "4", "--restart", "1", tp=2)
    started = launch(*args, salloc="-N1 --gpus-per-node=8", env=QUICK)
    started.until("stop it with")
    before = replicas(workspace)
    others = ours(cluster)
    kill(cluster, before[2])
    started.until("r2: n1: trtllm-serve ended with exit code 137 (killed) while serving")
    assert set(others) > set(ours(cluster)) and len(ours(cluster)) == 3
    assert all("8/8" in smoke(cluster, before[i]["url"]) for i in (0, 1, 3))
    wait_until(lambda: replicas(workspace)[2]["ready"], "r2 is back")
    assert "8/8" in smoke(cluster, before[2]["url"])
    assert gpus_of(cluster, replicas(workspace)[2]) == before[2]["gpus"]
    kill(cluster, before[2])
    started.until("3 of 4 replicas go on")
    assert "(given up after 1 restart)" in started.output
    assert [each["name"] for each in replicas(workspace)] == ["r0", "r1", "r3"]
    assert started.stop() == 130


def test_all_or_nothing_and_the_last_one(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    for extra, word in (
        (("--all-or-nothing",), "the others are ended"),
        ((), "no replica is left"),
    ):
        started = launch(*fleet("--replicas", "2", *extra), env=QUICK)
        started.until("stop it with")
        found = replicas(workspace)
        kill(cluster, found[0])
        if not extra:
            started.until("1 of 2 replicas go on")
            kill(cluster, found[1])
        assert started.code() == 1
        assert word in sentence(started.output)
        assert ours(cluster) == []


def test_a_port_that_is_taken_is_told_by_replica_and_node(
    cluster: Cluster, launch: Launcher
) -> None:
    node = cluster.nodes["n2"]
    node.start("squatter", "python3", "-m", "http.server", "8002")
    try:
        wait_until(lambda: ":8002" in node.run("ss", "-ltn").stdout, "the squatter")
        started = launch(*fleet("--replicas", "auto"), env=QUICK)
        assert started.code() == 1
        assert "n2: port 8002, r3's, is taken by" in sentence(started.output)
        assert "docker run" not in started.output
    finally:
        node.stop("squatter")


def test_what_does_not_fit_is_told(launch: Launcher) -> None:
    started = launch(*fleet("--replicas", "5"), env=QUICK)
    assert started.code() == 1
    words = "no room for 5 replicas of 4 GPUs each: there is room for 4 on 2 nodes with 8, 8 GPUs"
    assert words in sentence(started.output)


@pytest.mark.parametrize("how", ["session", "prefix"])
def test_requests_that_belong_together_go_to_one_replica(
    how: str, cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    args = ["--image", str(TARBALL), "org/model", "--tp_size", "4", "--replicas", "auto"]
    started = launch(*args, "--affinity", how, env=QUICK)
    started.until("stop it with")
    url = endpoint(workspace)["url"]
    asked = [{who_answers(cluster, url, name) for _ in range(4)} for name in "abcdefghijkl"]
    assert all(len(replicas) == 1 for replicas in asked), asked
    assert len(set.union(*asked)) > 1, asked
    assert started.stop() == 130


def who_answers(cluster: Cluster, url: str, name: str) -> str:
    """The replica that answers in this session, to a prompt that begins with its name.

    We wait until the last request is over: a replica with two of them would not get a third.
    """
    metrics = ("curl", "-s", f"{url}/router/metrics")
    wait_until(lambda: not any(in_flight(cluster.ctl.run(*metrics).stdout).values()), "no request")
    prompt = f"{name * 1024} {time.monotonic()}"
    body = {"model": "org/model", "prompt": prompt, "max_tokens": 1}
    said = cluster.ctl.run(
        "curl", "-s", "-D", "-", "-o", "/dev/null", f"{url}/v1/completions", "-d", json.dumps(body),
        "-H", "Content-Type: application/json", "-H", f"x-session-id: {name}",
    ).stdout  # fmt: skip
    [found] = re.findall(r"^x-replica: (\w+)", said, re.M | re.I)
    return str(found)
