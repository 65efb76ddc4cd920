"""endpoint.py and same.py: which server is measured, and whether it is the same one afterwards."""

from __future__ import annotations

import errno
import itertools
import json
import socket
import ssl
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from common.talk import Failure
from load import endpoint, same
from load.endpoint import Endpoint, base_url, choose, find_endpoint
from load.loop import resolve
from load.same import Witness
from load.target import Target
from tests.loopback import MODEL, Answer, Request, Server, model_server, obedient, serving
from tests.servers import MODELS, Kind

pytestmark = pytest.mark.usefixtures("clean_environment")


def write_record(port: int, **facts: Any) -> None:
    record = {"url": f"http://127.0.0.1:{port}", "model": MODEL, "started": "9:00", **facts}
    Path("logs").mkdir(exist_ok=True)
    Path("logs/endpoint.json").write_text(json.dumps(record))


# --- which server ---------------------------------------------------------------------------------


def found(host: str = "", port: int | None = None, model: str = "", **environ: str) -> Endpoint:
    return find_endpoint(host, port, model, environ)


def test_the_launchers_record_names_the_server() -> None:
    with serving(model_server(obedient)) as server:
        write_record(server.port)
        assert found().target.port == server.port
        assert found().record == Path("logs/endpoint.json")
        assert found(port=server.port).target.host == "127.0.0.1"


def test_a_port_of_the_environment_does_not_hide_the_record() -> None:
    with serving(model_server(obedient)) as server:
        write_record(server.port)
        assert found(PORT="1").target.port == server.port


def test_without_a_record_it_is_this_machine_and_the_port_of_the_environment() -> None:
    with serving(model_server(obedient)) as server:
        assert found(PORT=str(server.port)).url == f"http://localhost:{server.port}"
        assert found("127.0.0.1", PORT=str(server.port)).url == f"http://127.0.0.1:{server.port}"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", socket.gethostname()])
def test_a_server_that_is_named_may_be_the_one_of_the_record(host: str) -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        write_record(listener.getsockname()[1])
        url = f"http://{host}:{listener.getsockname()[1]}"
        assert endpoint.same_server(url, json.loads(Path("logs/endpoint.json").read_text())["url"])


def test_a_named_server_takes_the_record_along_only_if_it_is_about_it() -> None:
    with serving(model_server(obedient)) as server:
        write_record(server.port)
        assert found("localhost", server.port).record
        write_record(server.port + 1)
        assert found("localhost", server.port).record is None
        write_record(server.port, url=f"http://192.0.2.1:{server.port}")
        assert found("localhost", server.port).record is None


@pytest.mark.parametrize("text", ["{half", "[]", "{}"])
def test_a_record_that_names_nothing(text: str) -> None:
    Path("logs").mkdir()
    Path("logs/endpoint.json").write_text(text)
    with pytest.raises(Failure, match=r"endpoint\.json does not name a server"):
        found()
    with serving(model_server(obedient)) as server:
        assert found("localhost", server.port).record is None


def test_what_the_engine_was_given_names_the_tokenizer() -> None:
    with serving(model_server(obedient)) as server:
        write_record(server.port, model_argument=f"/models/{MODEL}")
        assert found().asked == found("localhost", server.port).asked == f"/models/{MODEL}"
        assert found().model == MODEL
        assert found(model=MODEL).asked == f"/models/{MODEL}"
        assert found(model=f"/mine/{MODEL}").asked == f"/mine/{MODEL}"


def test_no_server() -> None:
    with pytest.raises(Failure, match="no server answers at http://localhost:1"):
        found(port=1)


@pytest.mark.parametrize(
    ("host", "told"), [("127.0.0.1", "HTTP_PROXY is not used"), ("localhost", "")]
)
def test_a_proxy_that_is_not_used_is_told(
    monkeypatch: pytest.MonkeyPatch, host: str, told: str
) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "localhost")
    with pytest.raises(Failure) as failure:
        found(host, 1)
    assert told in failure.value.hint and ("PROXY" in failure.value.hint) is bool(told)


def test_a_certificate_that_is_not_trusted_is_named_as_such(certificate: ssl.SSLContext) -> None:
    with serving(model_server(obedient), certificate) as server:
        url = f"https://localhost:{server.port}"
        with pytest.raises(Failure, match=r"TLS failed: .*certificate"):
            found(url)
        assert find_endpoint(url, None, "", {}, verify=False).model == MODEL


def test_patterns_of_names_need_a_name() -> None:
    """LiteLLM's: nothing is called `openai/*`."""
    with serving(model_server(obedient, "openai/*")) as server:
        with pytest.raises(Failure, match="only patterns of names") as failure:
            found(port=server.port)
        assert "-m" in failure.value.hint
        assert found(port=server.port, model="openai/gpt-4o").model == "openai/gpt-4o"


def test_another_model_than_asked_for() -> None:
    with serving(model_server(obedient)) as server, pytest.raises(Failure) as failure:
        found(port=server.port, model="another/model")
    assert f"serves {MODEL}, not another/model" in failure.value.message


@pytest.mark.parametrize(
    ("host", "port", "url"),
    [
        ("localhost", None, "http://localhost:8001"),
        ("10.0.0.1", 9000, "http://10.0.0.1:9000"),
        ("node:", None, "http://node:8001"),
        ("node:9001", None, "http://node:9001"),
        ("node:9001", 9001, "http://node:9001"),
        ("fe80::1", 8000, "http://[fe80::1]:8000"),
        ("https://api.example.com/base/v1/", None, "https://api.example.com/base"),
        ("https://api.example.com/v1/chat/completions", None, "https://api.example.com"),
        ("node/a/v1/completions/", None, "http://node:8001/a"),
        ("https://google/v1beta/openai/chat/completions", None, "https://google/v1beta/openai/"),
        ("https://api.z.ai/api/paas/v4", None, "https://api.z.ai/api/paas/v4/"),
        ("https://api.deepseek.com/models", None, "https://api.deepseek.com/"),
        ("https://a.com/client/v4/ai/v1", None, "https://a.com/client/v4/ai"),
        ("https://a.com/v4/models/v1", None, "https://a.com/v4/models"),
        ("http://v1", None, "http://v1"),
        ("https://api.example.com:444/", None, "https://api.example.com:444"),
        ("http://node", 81, "http://node:81"),
    ],
)
def test_urls(host: str, port: int | None, url: str) -> None:
    assert base_url(host, port, 8001) == url


@pytest.mark.parametrize(
    ("host", "port"), [("ftp://x", None), ("http://", None), ("host:port", None), ("node:1", 2)]
)
def test_what_is_no_url(host: str, port: int | None) -> None:
    with pytest.raises(Failure):
        base_url(host, port, 8000)


def test_a_directory_is_served_under_its_name() -> None:
    assert choose("/models/Qwen", ["Qwen"], "") == "Qwen"
    assert choose("", ["first", "second"], "") == "first"
    assert choose("", ["openai/*", "second"], "") == "second"  # LiteLLM's pattern is no name
    with pytest.raises(Failure):
        choose("org/Qwen", ["Qwen"], "")


@pytest.mark.parametrize("document", [[], [1], {"data": None}, {"data": 7}, {"data": [{}]}])
def test_a_list_of_models_that_is_none(document: Any) -> None:
    with (
        serving(lambda request: request.document(document)) as server,
        pytest.raises(Failure, match="/v1/models names no model"),
    ):
        found(port=server.port)


@pytest.mark.parametrize(
    ("host", "here"),
    [("localhost", True), ("127.0.0.1", True), ("192.0.2.1", False), ("no.such.invalid", False)],
)
def test_is_this_machine(host: str, here: bool) -> None:
    assert endpoint.is_this_machine(host) is here


def test_a_kernel_without_ipv6_knows_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its /etc/hosts may have ::1 all the same."""

    class Socket(socket.socket):
        def __init__(self, family: int = -1, *rest: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            super().__init__(family, *rest)

    both = [(family, socket.SOCK_STREAM, 6, "", address) for family, address in (
        (socket.AF_INET6, ("::1", 9, 0, 0)), (socket.AF_INET, ("127.0.0.1", 9)))]  # fmt: skip
    monkeypatch.setattr(socket, "socket", Socket)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    assert endpoint.is_this_machine("localhost")
    assert resolve(Target("localhost", 9)) == both[0]


def test_a_long_list_of_models_is_read_to_its_end() -> None:
    """As vLLM's is with thousands of adapters."""
    cards = [{"id": f"adapter-{i}", "permission": "x" * 500} for i in range(3000)]
    with serving(lambda request: request.document({"data": cards})) as server:
        assert found(port=server.port, model="adapter-2999").model == "adapter-2999"


# --- the same one ---------------------------------------------------------------------------------

RESTARTED: tuple[list[str], list[str]] = (["the server was restarted during the run"], [])
SAME: tuple[list[str], list[str]] = ([], [])


def at(server: Server) -> Endpoint:
    return found(port=server.port)


def test_a_restart_that_the_launchers_record_tells() -> None:
    with serving(model_server(obedient)) as server:
        write_record(server.port)
        named = find_endpoint("localhost", server.port, "", {})
        before = same.identity(named)
        assert same.changes(named, before) == SAME
        write_record(server.port, started="9:05")
        assert same.changes(named, before) == RESTARTED


def test_a_restart_that_prometheus_metrics_tell() -> None:
    """As vLLM's."""
    started = 1000.5

    def answer(request: Request) -> None:
        if request.line.split()[1] == "/metrics":
            text = f"# TYPE this\nprocess_start_time_seconds {started}\n"
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n"
            request.send((head + text).encode())
        else:
            model_server(obedient)(request)

    with serving(answer) as server:
        before = same.identity(at(server))
        assert same.changes(at(server), before) == SAME
        started = 1234.5
        assert same.changes(at(server), before) == RESTARTED


def replicas(*starts: float) -> Answer:
    """One after the other behind one address, each with a page of its own."""
    turns = itertools.cycle(starts)

    def metrics(request: Request) -> None:
        text = f'process_start_time_seconds{{pid="7"}} {next(turns)}\n'
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n"
        request.send((head + text).encode())

    return Kind(paths={"/metrics": metrics})


@pytest.mark.parametrize("starts", [(1e9, 2e9), (3e9, 1e9, 2e9), range(1, 9)])
def test_replicas_behind_one_address_are_no_restart(starts: tuple[float, ...]) -> None:
    with serving(replicas(*starts)) as server:
        problems, (note,) = same.changes(at(server), same.identity(at(server)))
    assert problems == []
    assert "several processes answer at this address" in note


def test_an_older_process_is_another_replica_and_no_restart() -> None:
    with serving(replicas(1e9)) as server:
        assert same.changes(at(server), {"started": {"2e9"}})[0] == []


@pytest.mark.parametrize(
    ("models", "note"),
    [
        ({"data": [{"id": "new-adapter"}, {"id": MODEL, "created": 9}]}, ""),
        (lambda request: request.document({}, "503 Busy"), "did not list its models: "),
        ({"data": []}, "did not list its models: "),
    ],
)
def test_a_list_that_is_reordered_or_not_given_is_no_restart(models: Any, note: str) -> None:
    with serving(Kind(models=models)) as server:
        ours = Endpoint(f"http://127.0.0.1:{server.port}", MODEL, MODEL)
        problems, notes = same.changes(ours, same.identity(ours))
    assert problems == []
    assert note in "".join(notes)
    assert bool(note) == bool(notes)


def test_a_list_that_is_slow_is_no_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "TIMEOUT", 0.2)
    with serving(Kind(models=lambda _: time.sleep(1))) as server:
        ours = Endpoint(f"http://127.0.0.1:{server.port}", MODEL, MODEL)
        problems, (note,) = same.changes(ours, same.identity(ours))
    assert problems == []
    assert "no whole answer within 0.2 s" in note


def test_a_replica_that_is_a_moment_behind_is_asked_again() -> None:
    lists = itertools.chain([{"data": [{"id": "old"}]}], itertools.repeat(MODELS))
    with serving(Kind(models=lambda request: request.document(next(lists)))) as server:
        ours = Endpoint(f"http://127.0.0.1:{server.port}", MODEL, MODEL)
        assert same.changes(ours, same.identity(ours)) == SAME


def test_a_server_that_is_gone_after_the_run() -> None:
    ours = Endpoint("http://127.0.0.1:1", MODEL, MODEL)
    ((problem,), _) = same.changes(ours, {})
    assert problem == "the server is gone: no server answers at http://127.0.0.1:1"


def test_a_page_that_cannot_be_read_once_is_no_restart() -> None:
    with serving(model_server(obedient)) as server:  # it has no /metrics
        before = {**same.identity(at(server)), "started": {"1000.5"}}
        assert same.changes(at(server), before) == SAME


def test_the_launchers_model_is_not_the_one_to_ask_for() -> None:
    """MODEL of .env is what is to be served; what is served stands in the record."""
    with serving(model_server(obedient)) as server:
        write_record(server.port)
        assert found(MODEL="another/model").model == MODEL
        Path("logs/endpoint.json").unlink()
        with pytest.raises(Failure, match="not another/model"):
            found(port=server.port, MODEL="another/model")


def test_a_model_directory_is_named_by_its_whole_path() -> None:
    """In NVIDIA's container the current directory is another."""
    Path(MODEL).mkdir(parents=True)
    with serving(model_server(obedient, Path(MODEL).name)) as server:
        asked = found(port=server.port, model=MODEL).asked
    assert asked == str(Path(MODEL).absolute())


def test_metrics_that_reading_empties_are_left_alone() -> None:
    def answer(request: Request) -> None:
        assert request.line.split()[1] == "/v1/models"
        request.document({"data": [{"id": MODEL, "owned_by": "tensorrt_llm"}]})

    with serving(answer) as server:
        assert same.changes(at(server), same.identity(at(server))) == SAME


def test_a_server_with_another_model_after_the_run() -> None:
    with serving(model_server(obedient, "another")) as server:
        ours = Endpoint(f"http://127.0.0.1:{server.port}", MODEL, MODEL)
        ((problem,), _) = same.changes(ours, {})
    assert problem == f"the server now serves another, not {MODEL}"


def other_end(server: Server, sock: socket.socket) -> socket.socket:
    """The server's side of a connection, once it has been accepted."""
    while True:
        for each in server.sockets:
            with suppress(OSError):  # one that has ended
                if each.getpeername() == sock.getsockname():
                    return each
        time.sleep(0.01)


def test_an_idle_connection_that_is_closed_is_told() -> None:
    with serving(model_server(obedient)) as server:
        lasting, broken = Witness(at(server)), Witness(at(server))
        assert broken.sock
        other_end(server, broken.sock).shutdown(socket.SHUT_RDWR)
        assert lasting.notes() == []
        assert "closed during the run" in broken.notes()[0]


def test_where_nothing_listens_there_is_no_witness() -> None:
    assert Witness(Endpoint("http://127.0.0.1:1", MODEL, MODEL)).notes() == []


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
def test_a_server_that_wants_a_key(status: str) -> None:
    with serving(lambda request: request.document({"error": "no key"}, status)) as server:
        with pytest.raises(Failure, match=f"/v1/models: {status[:3]}") as raised:
            found(port=server.port)
        assert raised.value.hint == "set OPENAI_API_KEY"
        with pytest.raises(Failure) as raised:
            found(port=server.port, OPENAI_API_KEY="wrong")
        assert raised.value.hint == "set another OPENAI_API_KEY"
