"""--status of a fleet: what its replicas say of themselves, or its front of them."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.ask import ask
from launch import status
from tests.conftest import wait_until
from tests.loopback import MODEL, Request
from tests.servers import Kind, running
from tests.test_fleet_measured import fleet

pytestmark = pytest.mark.usefixtures("clean_environment")

ROW = {"name": "r0", "state": "ready", "node": "n1", "nodes": ["n1"], "gpus": ["0", "1"],
       "log": "r0.log", "restarts": 0, "ready": "2026-01-01T00:00:00Z"}  # fmt: skip


def row(port: int, **more: Any) -> dict[str, Any]:
    url = f"http://127.0.0.1:{port}"
    return {**ROW, "url": url, "metrics": f"{url}/metrics", **more}


def page(text: Callable[[], str]) -> Callable[[Request], None]:
    def answer(request: Request) -> None:
        body = text().encode()
        request.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    return answer


VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="m"}} 3.0
vllm:num_requests_waiting{{engine="0",model_name="m"}} 2.0
vllm:generation_tokens_total{{engine="0",model_name="m"}} {}
vllm:generation_tokens_created{{engine="0",model_name="m"}} 1.7e+09
"""
SGLANG = """\
sglang:num_running_reqs{{model_name="m",tp_rank="0"}} 3.0
sglang:num_queue_reqs{{model_name="m",tp_rank="0"}} 2.0
sglang:generation_tokens_total{{model_name="m"}} {}
"""
LATER_TRTLLM = """\
trtllm_num_requests_running{{engine_type="trtllm",model_name="m"}} 3.0
trtllm_num_requests_waiting{{engine_type="trtllm",model_name="m"}} 2.0
trtllm_generation_tokens_total{{engine_type="trtllm",model_name="m"}} {}
"""
TRTLLM = """\
trtllm_request_success_total{{engine_type="trtllm",finished_reason="length"}} {}
trtllm_time_to_first_token_seconds_sum{{engine_type="trtllm"}} 0.5
"""
OF_R0 = 'proxy="replicas",server="r0"'
UP = f'haproxy_server_status{{{OF_R0},state="UP"}} 1\n'
DOWN = f'haproxy_server_status{{{OF_R0},state="UP"}} 0\n'
SESSIONS = f"haproxy_server_current_sessions{{{OF_R0}}} 9\n"


@pytest.mark.parametrize(
    ("front", "state"), [(UP, "ready"), (DOWN, "not reached by the front"), ("", "ready")]
)
def test_one_that_the_front_does_not_reach_is_not_ready(front: str, state: str) -> None:
    with running(Kind()) as server:
        assert status.measured(row(server.port), front)["state"] == state
    assert status.measured(row(server.port), front)["state"] == "not ready"


@pytest.mark.parametrize(
    ("text", "running_", "waiting"),
    [(VLLM, 3, 2), (SGLANG, 3, 2), (LATER_TRTLLM, 3, 2), (TRTLLM, 9, None)],
)
def test_an_engine_says_what_it_does(
    text: str, running_: float, waiting: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-LLM 1.1 and 1.2 count no requests on their page: then the front does."""
    monkeypatch.setattr(status, "LOOK", 0.01)
    made = itertools.count(1000, 500)
    with running(Kind(paths={"/metrics": page(lambda: text.format(next(made)))})) as server:
        found = status.measured(row(server.port), UP + SESSIONS)
    assert (found["running"], found["waiting"]) == (running_, waiting)
    assert found["state"] == "ready"
    assert (found["tokens_per_second"] is None) == (waiting is None)
    assert waiting is None or found["tokens_per_second"] > 0


def test_what_nobody_tells_is_no_column() -> None:
    none = {"running": None, "waiting": None, "tokens_per_second": None}
    ready, other = {**row(8001), **none, "running": 12.0}, {**row(8002), **none, "name": "r1"}
    first, second = status.lines([ready, {**other, "state": "restarting", "ready": None}])
    assert first.endswith("0 restarts  12 running") and second.endswith("0 restarts  - running")
    assert "waiting" not in first + second
    assert status.lines([]) == []


def test_the_front_says_how_many_requests_each_has(tmp_path: Path) -> None:
    held = threading.Event()

    def waits(request: Request) -> None:
        held.wait(60)
        request.document({})

    with fleet(Kind(answers=waits), count=2) as servers:
        url, body = f"http://127.0.0.1:{servers.port}", {"model": MODEL, "prompt": "x"}
        asking = [
            threading.Thread(target=ask, args=(f"{url}/v1/completions", 30), kwargs={"body": body})
            for _ in range(4)
        ]
        for each in asking:
            each.start()
        try:
            rows = [row(each.port, name=f"r{i}") for i, each in enumerate(servers.replicas)]
            record = {"job": "7", "url": url, "model": "m", "path": tmp_path / "run_7.json"}
            known = {**record, "path": "", "launcher": "a:1:1", "replicas": rows}
            (tmp_path / "fleet_7.json").write_text(json.dumps(known))

            def seen() -> list[float]:
                return [each["running"] for each in status.described(record)["replicas"]]

            wait_until(lambda: sum(seen()) == 4 and min(seen()) > 0, "all four, at both")
        finally:
            held.set()
            for each in asking:
                each.join()
