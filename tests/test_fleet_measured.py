"""test.py and bench.py on a fleet: servers behind one real HAProxy, and the launcher's record."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import bench as bench_script
import test as smoke_script
from load import bench_place, same
from load.counters import of_iterations
from load.endpoint import Endpoint, find_endpoint
from tests.loopback import Request, Server
from tests.servers import Ask, Kind, Said, call, running, tokens, usual
from tests.test_front import addresses, fronting

pytestmark = pytest.mark.usefixtures("clean_environment", "same_signals", "any_machine")
BENCH = ("-t", "throughput", "--num-prompts", "12", "--concurrency", "6", "--input-len", "16",
         "--output-len", "8", "--client", "builtin")  # fmt: skip


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_place, "gpu_names", lambda _: [])


@dataclass
class Fleet:
    port: int
    replicas: list[Server]

    def record(self, **more: Any) -> None:
        """What the launcher writes."""
        replicas = [
            {"name": f"r{i}", "url": f"http://127.0.0.1:{server.port}", "node": "n1",
             "gpus": [str(2 * i), str(2 * i + 1)], "started": "9:00"}
            for i, server in enumerate(self.replicas)
        ]  # fmt: skip
        url = f"http://127.0.0.1:{self.port}"
        Path("logs").mkdir(exist_ok=True)
        record = {"url": url, "model": "", "started": "9:00", "replicas": replicas, **more}
        Path("logs/endpoint.json").write_text(json.dumps(record))

    @property
    def asked(self) -> list[int]:
        """Streams that each replica has answered."""
        return [
            sum(bool((request.body or {}).get("stream")) for request in server.requests)
            for server in self.replicas
        ]


@contextlib.contextmanager
def fleet(*kinds: Kind, count: int = 3) -> Iterator[Fleet]:
    """Replicas of a kind each, or all of one; and the record of them."""
    with contextlib.ExitStack() as stack:
        every = kinds if len(kinds) > 1 else (kinds or (Kind(),)) * count
        servers = [stack.enter_context(running(kind)) for kind in every]
        front = stack.enter_context(fronting(addresses(servers)))
        found = Fleet(front.port, servers)
        found.record()
        yield found


def smoke(*args: str) -> Said:
    return call(smoke_script.main, *args)


def bench(*args: str) -> Said:
    return call(bench_script.main, *BENCH, *args)


# --- test.py --------------------------------------------------------------------------------------
def test_all_checks_pass_through_the_front() -> None:
    with fleet():
        said = smoke()
    assert said.out.endswith("8/8 passed\n"), said.said
    assert said.code == 0


def test_each_is_a_line_a_server_and_a_sum() -> None:
    with fleet() as servers:
        said = smoke("--each")
    head, *lines, last = said.out.splitlines()
    assert head == f"Testing http://127.0.0.1:{servers.port}, from logs/endpoint.json"
    assert [line.split()[:2] for line in lines] == [["ok", n] for n in ("front", "r0", "r1", "r2")]
    assert all("8/8 passed" in line for line in lines)
    assert lines[1].endswith(f"http://127.0.0.1:{servers.replicas[0].port}")
    assert (last, said.code) == ("4/4 servers passed", 0)


def test_each_says_which_replica_fails_and_what() -> None:
    broken = Kind(document=lambda ask: {"choices": []})
    with fleet(Kind(), broken, Kind()):
        said = smoke("--each")
    lines = said.out.splitlines()
    [wrong] = [i for i, line in enumerate(lines) if line.split()[:2] == ["FAIL", "r1"]]
    assert "FAIL  completions" in lines[wrong + 1]
    assert [line.split()[1] for line in lines if line.startswith("  ok")] >= ["r0", "r2"]
    assert said.code == 1


def test_each_finds_a_replica_that_is_gone() -> None:
    with fleet() as servers:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        gone = {"name": "r9", "url": f"http://127.0.0.1:{port}"}
        servers.record(replicas=[gone])
        said = smoke("--each", "--json")
    servers_ = json.loads(said.out)["servers"]
    assert [(each["name"], each["passed"], each["ok"]) for each in servers_] == [
        ("front", 8, True),
        ("r9", 0, False),
    ]
    assert said.code == 1


def test_each_needs_a_record_with_replicas() -> None:
    with fleet() as servers:
        servers.record(replicas=None)
        said = smoke("--each")
    assert "--each: logs/endpoint.json names no replicas" in said.err
    assert said.code == 2


# --- bench.py -------------------------------------------------------------------------------------
def result() -> dict[str, Any]:
    """The one run's own file."""
    [path] = Path("results").glob("*/throughput*.json")
    return dict(json.loads(path.read_text()))


def test_a_fleet_is_measured_by_its_front() -> None:
    with fleet() as servers:
        said = bench()
        assert said.code == 0, said.said
        assert min(servers.asked) > 0
    metadata = result()["metadata"]
    assert (metadata["replicas"], metadata["world_size"]) == (3, 6)


def down(servers: Fleet, state: str = "restarting") -> None:
    record = json.loads(Path("logs/endpoint.json").read_text())
    record["replicas"][1] |= {"state": state, "started": None}
    servers.record(replicas=record["replicas"])


def test_a_replica_that_is_down_has_no_gpus_and_is_named() -> None:
    note = "1 of 3 replicas is not up: r1 (restarting)"
    with fleet() as servers:
        down(servers)
        checked, said = bench("--check"), bench()
    assert said.code == 0, said.said
    assert note in checked.last["notes"] and list(checked.last["replicas"]) == ["r0", "r2"]
    metadata = result()["metadata"]
    assert (metadata["replicas"], metadata["world_size"]) == (2, 4)
    assert note in result()["notes"]


def test_a_replica_that_comes_or_goes_makes_the_run_invalid() -> None:
    with fleet() as servers:
        named, before = here(), same.identity(here())
        assert same.changes(named, before) == ([], [])
        down(servers)
        problem = ["r1 ended, or was restarted, during the run"]
        assert same.changes(named, before) == (problem, [])
        problem = ["r1 came up or went down after bench.py began: its GPU count is wrong"]
        assert same.changes(named, same.identity(named)) == (problem, [])  # in the next run
        fewer, before = here(), same.identity(here())
        assert same.changes(fewer, before) == ([], [])
        servers.record()
        assert same.changes(fewer, before) == (problem, [])


def here() -> Endpoint:
    return find_endpoint("", None, "", {})


def test_check_names_the_replicas() -> None:
    with fleet() as servers:
        said = bench("--check")
        where = [f"r{i} http://127.0.0.1:{each.port}" for i, each in enumerate(servers.replicas)]
    assert f"a fleet of 3 behind one address: {', '.join(where)}" in said.out
    assert said.last["processes"] == 3


def test_a_replica_that_is_asked_itself_is_a_server_like_any() -> None:
    with fleet() as servers:
        one = find_endpoint(f"127.0.0.1:{servers.replicas[0].port}", None, "", {})
        same = find_endpoint(f"127.0.0.1:{servers.port}", None, "", {})
    assert (one.replicas, one.each) == ((), (one,))
    assert [each.name for each in same.each] == ["r0", "r1", "r2"]


def counting() -> Kind:
    """A server with vLLM's counters of the streams that it has answered."""
    served = [0]

    def metrics(request: Request) -> None:
        name = "vllm:time_to_first_token_seconds"
        text = (f"{name}_sum {served[0] * 0.02}\n{name}_count {served[0]}\n"
                f"vllm:num_requests_running 1.0\nvllm:kv_cache_usage_perc 0.5\n")  # fmt: skip
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n"
        request.send((head + text).encode())

    def pieces(ask: Ask) -> Iterator[tuple[float, bytes]]:
        yield from usual(ask)
        served[0] += 1

    return Kind(pieces=pieces, paths={"/metrics": metrics})


def test_every_replica_counts_its_own() -> None:
    with fleet(counting(), counting(), counting()) as servers:
        said = bench()
        assert said.code == 0, said.said
        assert min(servers.asked) > 0
    found = result()
    assert found["server_requests"] == 12
    assert found["server_mean_ttft_ms"] == pytest.approx(20)
    assert found.get("server_mean_kv_use", 0.5) == 0.5


def test_iterations_of_several_servers_are_taken_together() -> None:
    def steps(active: int, reused: int, missed: int) -> list[dict[str, Any]]:
        blocks = {"usedNumBlocks": 30, "maxNumBlocks": 100, "reusedBlocks": reused,
                  "missedBlocks": missed}  # fmt: skip
        return [{"numActiveRequests": active, "numQueuedRequests": 1, "kvCacheStats": blocks}]

    one, other = (steps(0, 10, 10), steps(4, 20, 40)), (steps(0, 1000, 0), steps(2, 1020, 40))
    assert of_iterations([one, other]) == {
        "server_mean_running": 6,
        "server_mean_waiting": 2,
        "server_mean_kv_use": 0.3,
        "cached_share": 0.3,
        "cached_source": "the server's counters",
    }


def ends_after(count: int, then: Callable[[], None]) -> Kind:
    """A server to which something happens after so many streams."""
    left = [count]

    def pieces(ask: Ask) -> Iterator[tuple[float, bytes]]:
        yield from tokens(ask)
        yield from list(usual(ask))[-2:]
        left[0] -= 1
        if left[0] == 0:
            then()

    return Kind(pieces=pieces)


@pytest.mark.parametrize("told", ["by the record", "by its connection"])
def test_a_restart_of_any_replica_makes_the_run_invalid(told: str) -> None:
    found: list[Fleet] = []

    def restart() -> None:
        [servers] = found
        if told == "by the record":
            record = json.loads(Path("logs/endpoint.json").read_text())
            record["replicas"][1]["started"] = "9:05"
            servers.record(replicas=record["replicas"])
        else:
            for idle in (sock for sock in servers.replicas[1].sockets if is_idle(sock, servers)):
                idle.shutdown(socket.SHUT_RDWR)

    listed = {"object": "list", "data": [{"id": "test-model"}]}
    uvicorn = lambda request: request.document(listed, fields="Server: uvicorn\r\n")  # noqa: E731
    plain, odd = Kind(models=uvicorn), ends_after(3, restart)
    with fleet(plain, Kind(pieces=odd.pieces, models=uvicorn), plain) as servers:
        found.append(servers)
        said = bench()
    assert said.code == 1
    assert result()["problems"] == ["r1 ended, or was restarted, during the run"]


def is_idle(sock: socket.socket, servers: Fleet) -> bool:
    """A connection on which nothing was ever asked."""
    with contextlib.suppress(OSError):
        return sock.getpeername() not in {r.socket.getpeername() for r in asked(servers)}
    return False


def asked(servers: Fleet) -> Iterator[Request]:
    for request in servers.replicas[1].requests:
        with contextlib.suppress(OSError):
            request.socket.getpeername()
            yield request
