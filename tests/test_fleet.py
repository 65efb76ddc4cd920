"""Several servers of one launch: the real launcher, simulated engines, fakes at the boundary."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.ask import ask
from common.talk import Failure
from launch import cli, fleet, front
from launch.engines import World
from launch.findings import Node
from launch.node.bare import some
from launch.node.messages import Facts
from launch.nodes import Place
from launch.runtimes import bare, docker
from launch.slurm import Allocation, Share
from tests.cluster.launches import up_by_front
from tests.conftest import Fakes, free_ports, plan, shown_orders, wait_until
from tests.test_run_sbatch import Launch, Launcher, error, launch, toolset  # noqa: F401

pytestmark = pytest.mark.usefixtures("clean_environment")

TWO = ("m", "--replicas", "2", "--no-front")


@pytest.fixture
def fleet_of(launch: Launcher) -> Callable[..., Launch]:  # noqa: F811
    def start(*args: str, **env: str) -> Launch:
        return launch(*args, **{"PORT": str(free_ports(5)), **env})

    return start


def replicas() -> list[dict[str, Any]]:
    found = json.loads(Path("logs/endpoint.json").read_text())["replicas"]
    assert isinstance(found, list)
    return found


# Where they go


def test_a_replica_is_the_server_in_its_seat() -> None:
    """Its own port, GPUs and label; whatever else was asked for is the same."""
    made = plan("m", "--tp_size=2", "--port", "8000", gpus="auto")
    node = Node("n1", Facts(gpus=5))
    found = fleet.lay_out(made, World(2, 1, 1), [node, Node("n2", Facts(gpus=2))], "auto", True)
    assert [(r.label, r.first, r.port, r.devices) for r in found.replicas] == [
        ("r0", 0, 8001, ("0", "1")),
        ("r1", 0, 8002, ("2", "3")),
        ("r2", 1, 8001, ("0", "1")),
    ]
    assert found.replicas[2].args == ("--tp_size=2", "--port", "8001")
    words = fleet.describe(found, World(2, 1, 1), ["n1", "n2"])
    size = "2 (tp 2 x pp 1 x cp 1)"
    assert words == f"3 replicas of world size {size}: r0-r1 on n1; r2 on n2"


def test_worlds_larger_than_a_node_lie_side_by_side() -> None:
    place = Place("7", 4, ("srun",), Allocation(nodes=("n0", "n1", "n2", "n3")))
    made = replace(plan("m", gpus="auto"), place=place)
    world, nodes = World(8, 2, 1), [Node(f"n{i}", Facts(gpus=8)) for i in range(4)]
    found = fleet.lay_over(
        made, world, [list("01234567")] * 4, "auto", lambda: "pmix_v4", list("abcd")
    )
    assert [(r.first, r.port, r.devices) for r in found.replicas] == [(0, 8001, ()), (2, 8001, ())]
    assert [r.spread and (r.spread.nodes, r.spread.ranks) for r in found.replicas] == [(2, 8)] * 2
    names = [node.name for node in nodes]
    words = fleet.describe(found, world, names)
    assert words.endswith("r0 on n0, n1; r1 on n2, n3 (--mpi=pmix_v4)")
    holder = docker.hold(found, found.replicas[1], {})
    assert "--nodes=2" in holder.argv and "--nodelist=n2,n3" in holder.argv


def test_of_one_it_is_no_fleet() -> None:
    made = plan("m", gpus="auto")
    found = fleet.lay_out(made, World(8, 1, 1), [Node("n1", Facts(gpus=8))], "auto", True)
    assert found == made


def test_a_container_gets_the_gpus_of_its_replica() -> None:
    made = plan("m", gpus="auto")
    found = fleet.lay_out(made, World(2, 1, 1), [Node("n1", Facts(gpus=4))], "2", True)
    order = docker.serve(found, found.replicas[1], {}).fields["Serve"]
    assert (order["gpus"], order["replica"]) == ('"device=2,3"', "r1")
    assert order["name"] == "trtllm-local1-r1"
    remove = docker.remove(found, found.replicas[1])
    assert remove and remove.fields["Remove"]["replica"] == "r1"


def test_without_a_container_they_are_counted_as_its_step_sees_them() -> None:
    made = plan("m", runtime="bare", gpus="auto")
    share = Share(8, 4, "1,3,4,6")
    allocation = Allocation(nodes=("n1",), shares={"n1": share})
    made = replace(made, place=Place("7", 1, ("srun",), allocation))
    found = fleet.lay_out(made, World(2, 1, 1), [Node("n1", share=share)], "auto", False)
    assert [r.devices for r in found.replicas] == [("1", "3"), ("4", "6")]
    assert [bare.which(found, r) for r in found.replicas] == [[0, 1], [2, 3]]
    assert some([2, 3], "0,1,2,3") == some([2, 3], "") == some(["2", "3"], "0") == "2,3"
    assert some([0, 2], "GPU-a,GPU-b,GPU-c") == "GPU-a,GPU-c"
    with pytest.raises(OSError, match=r"CUDA_VISIBLE_DEVICES=5 has too few GPUs \(wanted: 0, 1\)"):
        some([0, 1], "5")


@pytest.mark.parametrize("visible", [[], ["4", "5", "GPU-6", "7"]])
def test_without_a_container_replicas_share_what_cuda_visible_devices_leaves(
    visible: list[str],
) -> None:
    made = plan("m", runtime="bare", gpus="auto")
    node = Node("n1", Facts(gpus=8, visible=visible))
    found = fleet.lay_out(made, World(2, 1, 1), [node], "auto", False)
    assert len(found.replicas) == node.gpus / 2 == (2 if visible else 4)
    chosen = [some(bare.which(found, each), "") for each in found.replicas[:2]]
    assert chosen == (["4,5", "GPU-6,7"] if visible else ["0,1", "2,3"])


@pytest.mark.parametrize(
    ("asked", "share", "visible", "chosen"),
    [
        ("device=2,3", None, "", "2,3"),
        ('"device=GPU-a"', None, "0,1", "GPU-a"),
        ("device=4,6", Share(8, 3, "1,4,6"), "0,1,2", "1,2"),  # of the job's, as CUDA counts them
        ("2", None, "5,6,7", "5,6"),
        ("auto", None, "5,6", ""),
        ("all", None, "", ""),
    ],
)
def test_without_a_container_gpus_are_named_to_cuda(
    asked: str, share: Share | None, visible: str, chosen: str
) -> None:
    made = plan("m", runtime="bare", gpus=asked)
    if share:
        allocation = Allocation(nodes=("n1",), shares={"n1": share})
        made = replace(made, place=Place("7", 1, ("srun",), allocation))
    bare.check(made)
    assert some(bare.serve(made, made.replicas[0], {}).order.gpus, visible) == chosen


@pytest.mark.parametrize("asked", ["driver=nvidia", "all,capabilities=utility", "count=2", "-1"])
def test_what_only_docker_can_give_is_refused_without_a_container(asked: str) -> None:
    with pytest.raises(Failure, match=f"GPUS={asked} needs a container"):
        bare.check(plan("m", runtime="bare", gpus=asked))


@pytest.mark.parametrize(
    ("argv", "env", "words"),
    [
        (["--replicas", "0"], {}, "--replicas: '0' is neither a number nor auto"),
        ([], {"REPLICAS": "all"}, "--replicas: 'all' is neither"),
        (["--replicas", ""], {}, "--replicas is empty"),
        (["--load-at-once", "-1"], {}, "--load-at-once: '-1' is not a number of servers"),
        (["--replicas", "auto"], {"GPUS": "none"}, "--replicas auto counts GPUs, and GPUS is none"),
        (["--replicas", "2"], {"GPUS": "all"}, "GPUS is 'all'; with --replicas it has to be auto"),
        (
            ["--replicas", "2", "--runtime", "bare"],
            {"GPUS": "device=0,1"},
            "GPUS is 'device=0,1'; with --replicas it has to be auto, none",
        ),
    ],
)
def test_what_no_fleet_can_be_is_wrong_usage(
    argv: list[str], env: dict[str, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ.update(env)
    with pytest.raises(SystemExit):
        cli.parse(argv)
    assert words in " ".join(capsys.readouterr().err.split())


def test_the_last_port_is_a_port() -> None:
    made = plan("m")
    made = replace(made, replicas=(replace(made.replicas[0], port=65_530),))
    with pytest.raises(Failure, match="the last replica's port would be 65540"):
        fleet.lay_out(made, World(1, 1, 1), [Node("n1")], "10", True)


# A fleet that runs


def test_two_replicas_serve_side_by_side(fakes: Fakes, fleet_of: Callable[..., Launch]) -> None:
    started = fleet_of(*TWO)
    started.until("stop it with")
    assert "READY after" in started.output and "with 2 replicas" in started.output
    job = json.loads(Path("logs/endpoint.json").read_text())["job"]
    assert [each["container"] for each in replicas()] == [
        f"trtllm-{job}-r{i}-local" for i in range(2)
    ]
    for each in replicas():
        assert ask(f"{each['url']}/v1/models", 5).json()["data"][0]["id"] == "m"
        assert "Uvicorn running" in Path(each["log"]).read_text()
    assert json.loads(Path("logs/endpoint.json").read_text())["url"] == replicas()[0]["url"]
    assert started.stop() == 130
    assert len(list(Path("logs").glob("trtllm_server_*_r?.log"))) == 2
    assert not list(Path("logs").glob("*.json"))


def kill(fakes: Fakes, name: str) -> None:
    known = json.loads((fakes.home / f"local/container-{name}.json").read_text())
    os.killpg(known["pid"], signal.SIGKILL)


def test_one_that_is_killed_is_lost_and_the_other_serves_on(
    fakes: Fakes, fleet_of: Callable[..., Launch]
) -> None:
    started = fleet_of(*TWO)
    started.until("stop it with")
    kill(fakes, replicas()[0]["container"])
    started.until("1 of 2 replicas go on")
    assert "LOST r0: local: trtllm-serve ended with exit code 137" in started.output
    [left] = replicas()
    assert left["name"] == "r1" and ask(f"{left['url']}/health", 5).status == 200
    assert json.loads(Path("logs/endpoint.json").read_text())["url"] == left["url"]
    kill(fakes, left["container"])
    assert started.code() == 1
    assert "r1: local: trtllm-serve ended" in error(started)
    assert "no replica is left" in error(started)


def test_one_that_is_killed_is_started_anew_on_its_port(
    fakes: Fakes, fleet_of: Callable[..., Launch]
) -> None:
    started = fleet_of(*TWO, "--restart", "1")
    started.until("stop it with")
    before = replicas()
    kill(fakes, before[1]["container"])
    started.until("restarting (1 of 1) in 2 s")
    assert ask(f"{before[0]['url']}/health", 5).status == 200
    wait_until(lambda: replicas()[1]["restarts"] == 1 and replicas()[1]["ready"], "r1 is back")
    assert replicas()[1]["url"] == before[1]["url"]
    assert replicas()[0]["started"] == before[0]["started"]
    assert "restart 1 of 1" in Path(before[1]["log"]).read_text()
    assert "restart" not in Path(before[0]["log"]).read_text()
    assert started.stop(signal.SIGTERM) == 143


def test_the_fleet_is_ready_without_one_that_failed_while_it_loaded(
    fakes: Fakes, fleet_of: Callable[..., Launch]
) -> None:
    """It joins when it is ready, however often that takes; whoever waits for READY does not."""
    started = fleet_of("-v", *TWO, "--restart", "1", TRTLLM_SIM_LOAD_SECONDS="3")
    wait_until(lambda: len(fakes.containers()) == 2 and "r1 | " in started.output, "two engines")
    kill(fakes, next(name for name in fakes.containers() if "-r1" in name).partition("/")[2])
    started.until("stop it with")
    assert "m with 1 of 2 replicas" in started.output
    wait_until(lambda: len(replicas()) == 2 and replicas()[1]["ready"], "r1 joins")
    assert started.stop() == 130


def test_each_line_of_an_engine_says_whose_it_is(
    fakes: Fakes, fleet_of: Callable[..., Launch]
) -> None:
    started = fleet_of("-v", *TWO)
    started.until("stop it with")
    for name in ("r0", "r1"):
        wait_until(lambda name=name: f"\n{name} | INFO:     Uvicorn running on" in started.output)  # type: ignore[misc]
    assert started.stop() == 130


def test_a_port_that_is_taken_is_told_before_anything_starts(
    fakes: Fakes, fleet_of: Callable[..., Launch]
) -> None:
    first = free_ports(3)
    with socket.create_server(("127.0.0.1", first + 2)):
        started = fleet_of(*TWO, PORT=str(first))
        assert started.code() == 1
    assert f"local: port {first + 2}, r1's, is taken" in error(started)
    assert not fakes.calls("docker", "run")


def test_all_or_nothing(fakes: Fakes, fleet_of: Callable[..., Launch]) -> None:
    started = fleet_of(*TWO, "--all-or-nothing")
    started.until("stop it with")
    kill(fakes, replicas()[0]["container"])
    assert started.code() == 1
    assert "the others are ended, too" in error(started)


def test_the_status_has_a_row_a_replica(fakes: Fakes, fleet_of: Callable[..., Launch]) -> None:
    started = fleet_of(*TWO)
    started.until("stop it with")
    shown = fleet_of("--status")
    assert shown.code() == 0
    first, *rows = shown.output.splitlines()
    assert "\tready\t" in first
    assert [row.split()[:5] for row in rows] == [
        [each["name"], "ready", "local", "no", "GPU"] for each in replicas()
    ]
    asked = fleet_of("--status", "--json")
    assert asked.code() == 0
    [found] = json.loads(asked.output)
    assert [each["name"] for each in found["replicas"]] == ["r0", "r1"]
    assert found["replicas"][0]["state"] == found["state"] == "ready"
    assert fleet_of("--stop").code() == 0
    assert started.code() == 143


def test_a_dry_run_shows_every_replica(fleet_of: Callable[..., Launch]) -> None:
    shown = fleet_of(*TWO, "--dry-run")
    assert shown.code() == 0
    orders = shown_orders(shown.output)
    serve = {why: order for why, (_, order) in orders.items() if "Serve" in order}
    assert list(serve) == [f"r{i}: the server, until its standard input ends" for i in range(2)]
    engines = [order["Serve"]["engine"] for order in serve.values()]
    assert [engine[-2] for engine in engines] == ["--port", "--port"]
    assert int(engines[1][-1]) - int(engines[0][-1]) == 1


# With a front


def test_the_front_is_one_address_for_all(fakes: Fakes, fleet_of: Callable[..., Launch]) -> None:
    """It outlives a replica, is started anew where it ends, and goes with the launch."""
    first = free_ports(3)
    started = fleet_of("m", "--replicas", "2", "--restart", "1", PORT=str(first))
    started.until("stop it with")
    url, up_since = f"http://127.0.0.1:{first}", time.monotonic()
    assert f"{url} serves m with 2 replicas" in started.output
    assert json.loads(Path("logs/endpoint.json").read_text())["url"] == url
    kill(fakes, replicas()[0]["container"])
    started.until("restarting (1 of 1)")
    wait_until(lambda: replica_of(url) == "r1")
    wait_until(lambda: started.output.count("r0: ready after") == 2, "r0 is back")
    with urllib.request.urlopen(f"{url}/router/metrics") as answer:
        assert up_by_front(answer.read().decode()) == {"r0", "r1"}
    wait_until(lambda: replicas()[0]["ready"] and replica_of(url) == "r0", "its turn")
    wait_until(lambda: time.monotonic() > up_since + front.STEADY, "a front that is no mistake")
    [haproxy] = [pid for pid, line in fakes.processes().items() if "haproxy -db" in line]
    os.kill(haproxy, signal.SIGKILL)
    started.until("the front was ended by signal 9; it was restarted")
    wait_until(lambda: ask_health(url) == 200)
    assert started.stop() == 130


def ask_health(url: str) -> int:
    try:
        return ask(f"{url}/health", 5).status
    except OSError:
        return 0


def replica_of(url: str) -> str:
    """Which one has answered; '' where none did."""
    try:
        with urllib.request.urlopen(f"{url}/v1/models") as answer:
            return str(answer.headers["x-replica"])
    except OSError:
        return ""


def test_a_port_of_the_front_that_is_taken_is_told(fleet_of: Callable[..., Launch]) -> None:
    first = free_ports(3)
    with socket.create_server(("127.0.0.1", first)):
        started = fleet_of("m", "--replicas", "2", PORT=str(first))
        assert started.code() == 1
    assert f"local: port {first} is taken" in error(started)
