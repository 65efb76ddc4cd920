"""The simulator as context server, generation server and orchestrator: processes that talk HTTP.

Run alone: .venv/bin/pytest tests/test_simulator_disagg.py
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.conftest import PATIENCE, free_port
from tests.test_simulator import (
    COMMAND,
    MODEL,
    Json,
    Server,
    environment,
    eventually,
    ok,
    run,
    serving,
)

CUT = (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)
TRANSCEIVER = {"cache_transceiver_config": {"backend": "UCX", "max_tokens_in_buffer": 8192}}
CONTEXT, GENERATION = {**TRANSCEIVER, "disable_overlap_scheduler": True}, TRANSCEIVER
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY: Json = {"model": "m", "prompt": "Count on: 1, 2, 3,", "max_tokens": 8, "temperature": 0}
ONLY = {"disaggregated_params": {"request_type": "context_only"}}


@contextmanager
def worker(folder: Path, name: str, config: Json, *argv: str, **options: Any) -> Iterator[Server]:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    flags = ["--extra_llm_api_options", str(folder / f"{name}.yaml")]
    with serving(folder / f"{name}.log", *(argv or (MODEL,)), *flags, **options) as server:
        yield server


def orchestrator_file(
    folder: Path, contexts: list[int], generations: list[int], **more: Any
) -> int:
    """Write it; the port it names."""
    port = free_port()

    def servers(ports: list[int]) -> Json:
        return {"num_instances": len(ports), "urls": [f"127.0.0.1:{each}" for each in ports]}

    lists = {"context_servers": servers(contexts), "generation_servers": servers(generations)}
    config = {"hostname": "127.0.0.1", "port": port, **lists, **more}
    (folder / "o.yaml").write_text(yaml.safe_dump(config))
    return port


@contextmanager
def orchestrating(folder: Path, port: int, *argv: str, **settings: str) -> Iterator[Server]:
    """The orchestrator, whether it is ready or not."""
    log = folder / "o.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*COMMAND, "disaggregated", "-c", str(folder / "o.yaml"), *argv],
            env=environment(**settings),
            stdout=output,
            stderr=output,
        )
    try:
        yield Server(process, port, log)
    finally:
        process.kill()
        process.wait()


class Whole:
    """One orchestrator before two context servers and a generation server."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        start = stack.enter_context
        self.contexts = [start(worker(folder, f"c{i}", CONTEXT)) for i in range(2)]
        self.generation = start(worker(folder, "g", GENERATION))
        port = orchestrator_file(
            folder, [each.port for each in self.contexts], [self.generation.port]
        )
        self.server = start(orchestrating(folder, port))
        self.server.wait_ready()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    with ExitStack() as stack:
        yield Whole(tmp_path_factory.mktemp("whole"), stack)


def text(answer: Json) -> str:
    return str(answer["choices"][0]["text"])


# The handshake, step by step


def test_a_context_server_answers_one_token_and_what_a_generation_server_needs(
    whole: Whole,
) -> None:
    answer = ok(whole.contexts[0].post(COMPLETIONS, {**BODY, **ONLY}))
    (choice,) = answer["choices"]
    handed_on = choice["disaggregated_params"]
    assert choice["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 1
    assert [*handed_on] == ["request_type", "first_gen_tokens", "ctx_request_id",
                            "encoded_opaque_state", "draft_tokens"]  # fmt: skip
    assert handed_on["request_type"] == "context_only" and handed_on["draft_tokens"] is None
    assert len(handed_on["first_gen_tokens"]) == 1 and isinstance(handed_on["ctx_request_id"], int)
    assert len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]

    goes_on = {**handed_on, "request_type": "generation_only"}
    body = {**BODY, "prompt": answer["prompt_token_ids"], "disaggregated_params": goes_on}
    rest = ok(whole.generation.post(COMPLETIONS, body))
    alone = whole.generation.complete(BODY["prompt"])
    assert text(rest) == text(alone) and text(rest).startswith(choice["text"])
    assert rest["usage"] == alone["usage"]
    assert rest["prompt_token_ids"] is rest["choices"][0]["disaggregated_params"] is None


@pytest.mark.parametrize("sampled", [{}, {"temperature": 1, "seed": 5}])
def test_an_answer_is_what_one_server_would_have_said(whole: Whole, sampled: Json) -> None:
    for fields in ({"prompt": "one two"}, {"prompt": [1, 2, 3]}, {"prompt": ["a list of one"]}):
        alone = whole.generation.complete(**fields, **sampled)
        both = whole.server.complete(**fields, **sampled)
        assert text(both) == text(alone) and both["usage"] == alone["usage"]
    alone, both = whole.generation.chat(**sampled), whole.server.chat(**sampled)
    assert alone["choices"][0]["message"] == both["choices"][0]["message"]
    assert alone["usage"] == both["usage"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_it_streams(whole: Whole, path: str) -> None:
    ask: Json = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {
        "prompt": "Hi"}  # fmt: skip
    ask |= {"max_tokens": 8, "stream_options": {"include_usage": True}}
    events, alone = (each.events(path, **ask) for each in (whole.server, whole.generation))
    assert len(events) == len(alone)
    assert events[-1]["usage"] == alone[-1]["usage"]


def test_an_answer_that_ends_with_its_first_token_needs_no_generation_server(whole: Whole) -> None:
    first = text(ok(whole.contexts[0].post(COMPLETIONS, {**BODY, **ONLY})))
    answer = whole.server.complete(BODY["prompt"], stop=first)
    assert text(answer) == "" and answer["choices"][0]["finish_reason"] == "stop"
    assert "disaggregated_params" not in answer["choices"][0]
    assert whole.server.events(COMPLETIONS, prompt=BODY["prompt"], stop=first) == []


# What the servers refuse


@pytest.mark.parametrize(
    ("config", "kind", "said"),
    [
        ({}, "context_only", "kv_cache_transceiver is disabled, please set 'cache_transceiver"),
        ({"cache_transceiver_config": {}}, "generation_only", "kv_cache_transceiver is disabled"),
        (GENERATION, "context_only", "not supported in pytorch backend when overlap is enabled"),
    ],
)
def test_a_server_that_cannot_play_its_part(
    tmp_path: Path, config: Json, kind: str, said: str
) -> None:
    with worker(tmp_path, "w", config) as server:
        params = {"disaggregated_params": {"request_type": kind}}
        refused = server.post(COMPLETIONS, {**BODY, **params})
        assert refused.status_code == 400 and said in refused.json()["message"]
        with pytest.raises(CUT):  # a worker's refusal
            server.events(COMPLETIONS, prompt="Hi", **params)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"request_type": "prefill"}, "Unknown request type: prefill. Must be context_only, gen"),
        ({"request_type": "generation_only"}, "incompatible function arguments"),
        ({"request_type": "generation_only", "first_gen_tokens": [1], "ctx_request_id": 1},
         "no state to fetch the KV cache by"),
        ({"request_type": "context_only", "disagg_request_id": 1}, "extra_forbidden"),
    ],
)  # fmt: skip
def test_parameters_of_no_context_server(whole: Whole, params: Json, said: str) -> None:
    refused = whole.generation.post(COMPLETIONS, {**BODY, "disaggregated_params": params})
    assert refused.status_code == 400 and said in refused.json()["message"]


@pytest.mark.parametrize(
    ("model", "backend", "said"),
    [("org/other", "UCX", "other by UCX is not for"), (MODEL, "NIXL", "by NIXL is not for")],
)
def test_servers_that_are_not_alike(
    whole: Whole, tmp_path: Path, model: str, backend: str, said: str
) -> None:
    """Another model, or another way to hand over."""
    config = {**CONTEXT, "cache_transceiver_config": {"backend": backend}}
    with worker(tmp_path, "other", config, model) as other:
        answer = ok(other.post(COMPLETIONS, {**BODY, **ONLY}))
    handed_on = answer["choices"][0]["disaggregated_params"]
    params = {**handed_on, "request_type": "generation_only"}
    body = {**BODY, "prompt": answer["prompt_token_ids"], "disaggregated_params": params}
    assert said in whole.generation.post(COMPLETIONS, body).json()["message"]


@pytest.mark.parametrize(
    ("version", "backend", "code"),
    [
        ("1.1.0", "MOONCAKE", 1),
        ("1.2.1", "MOONCAKE", 77),
        ("1.1.0", "ucx", 1),
        ("1.2.1", "DEFAULT", 77),
    ],
)
def test_backends(tmp_path: Path, version: str, backend: str, code: int) -> None:
    (tmp_path / "c.yaml").write_text(f"cache_transceiver_config: {{backend: {backend}}}\n")
    env = {"TRTLLM_SIM_VERSION": version}
    done = run(MODEL, "--extra_llm_api_options", str(tmp_path / "c.yaml"), "--port=0", env=env)
    assert done.returncode == code, done.stderr


def test_default_is_another_backend_in_the_next_version(tmp_path: Path) -> None:
    """A pair of the same file, one of each version, does not understand each other."""
    config = {**CONTEXT, "cache_transceiver_config": {"backend": "DEFAULT"}}
    with worker(tmp_path, "old", config) as old:
        answer = ok(old.post(COMPLETIONS, {**BODY, **ONLY}))
    with worker(tmp_path, "new", config, ready=False, VERSION="1.2.1") as new:
        eventually(lambda: "startup complete" in new.log)
        params = answer["choices"][0]["disaggregated_params"]
        params["request_type"] = "generation_only"
        body = {**BODY, "prompt": answer["prompt_token_ids"], "disaggregated_params": params}
        assert "by UCX is not for" in new.post(COMPLETIONS, body).json()["message"]


# The orchestrator


def test_its_routes(whole: Whole) -> None:
    server = whole.server
    assert server.get("/health").content == b""
    assert server.get("/version").json() == {"version": "1.1.0"}
    assert (server.get("/cluster_info").json(), server.get("/perf_metrics").json()) == ({}, [])
    for path in ("/v1/models", "/metrics", "/health_generate", "/prometheus/metrics"):
        assert server.get(path).json() == {"detail": "Not Found"}


def test_what_it_refuses(whole: Whole) -> None:
    several = whole.server.post(COMPLETIONS, {**BODY, "prompt": ["one", "two"]})
    assert several.status_code == 500
    words = "Internal server error Disaggregated server currently only supports single string"
    assert several.json()["detail"].startswith(words)
    wrong = whole.server.post(COMPLETIONS, {**BODY, "no_such_field": 1})
    assert wrong.status_code == 400 and [*wrong.json()] == ["error"]


def test_what_a_server_refuses_is_asked_once_more(whole: Whole) -> None:
    """And then it is an error of the orchestrator's, which does not say what was wrong."""
    began = time.monotonic()
    refused = whole.server.post(COMPLETIONS, {**BODY, "n": 2})
    assert refused.status_code == 500 and refused.json() == {"detail": "Internal server error"}
    assert time.monotonic() - began >= 1
    assert "retry 0 of 1" in whole.server.log
    assert "Multiple response is not supported" in whole.server.log


def test_it_waits_for_every_server_before_it_opens_its_port(tmp_path: Path) -> None:
    late = free_port()
    with worker(tmp_path, "c", CONTEXT) as context:
        port = orchestrator_file(tmp_path, [context.port], [late])
        with orchestrating(tmp_path, port) as server:
            waits = f"[0] Servers are not ready. Waiting for ['http://127.0.0.1:{late}']..."
            eventually(lambda: waits in server.log)
            with pytest.raises(requests.ConnectionError):
                server.get("/health")
            with worker(tmp_path, "g", GENERATION, port=late):
                server.wait_ready()
                assert text(server.complete())


def test_servers_that_are_too_late_end_it(tmp_path: Path) -> None:
    """By itself, with uvicorn's own words and exit code."""
    port = orchestrator_file(tmp_path, [free_port()], [free_port()])
    with orchestrating(tmp_path, port, "-t", "1") as server:
        assert server.process.wait(PATIENCE) == 0
        assert "TimeoutError" in server.log and "Application startup failed" in server.log


def test_it_gives_servers_and_requests_180_s(tmp_path: Path) -> None:
    words = subprocess.run([*COMMAND, "disaggregated", "--help"], capture_output=True, text=True)
    assert words.returncode == 0
    program = "import arguments; print([a.default for a in arguments.command_line(" \
              "print, print, '1.1.0').commands['disaggregated'].params])"  # fmt: skip
    shown = subprocess.run(
        [COMMAND[0], "-c", program], capture_output=True, text=True, cwd=Path(COMMAND[1]).parent
    )
    assert re.findall(r"\b180\b", shown.stdout) == ["180", "180"], shown.stderr


def test_a_request_that_takes_too_long_is_cut_and_an_answer_is_asked_for_twice(
    tmp_path: Path,
) -> None:
    slow = {"ITL_MS": "400"}
    with worker(tmp_path, "c", CONTEXT, **slow) as context, \
            worker(tmp_path, "g", GENERATION, **slow) as generation:  # fmt: skip
        port = orchestrator_file(tmp_path, [context.port], [generation.port])
        with orchestrating(tmp_path, port, "-r", "1") as server:
            server.wait_ready()
            with pytest.raises(CUT):
                server.events(COMPLETIONS, prompt="Hi", max_tokens=30, ignore_eos=True)
            late = server.post(COMPLETIONS, {**BODY, "max_tokens": 30})
            assert late.json() == {"detail": "Internal server error"}
            assert "retry 0 of 1" in server.log


def test_a_server_that_has_died_keeps_its_share(tmp_path: Path) -> None:
    """Its health stays good, every other request fails, and one at its old place is taken up."""
    with ExitStack() as stack:
        both = Whole(tmp_path, stack)
        dead = both.contexts[0]
        dead.process.kill()
        dead.process.wait()
        codes = [both.server.post(COMPLETIONS, BODY).status_code for _ in range(4)]
        assert sorted(codes) == [200, 200, 500, 500]
        assert both.server.get("/health").status_code == 200
        stack.enter_context(worker(tmp_path, "c0", CONTEXT, port=dead.port))
        assert all(both.server.post(COMPLETIONS, BODY).status_code == 200 for _ in range(4))


def test_a_stream_begins_before_a_dead_generation_server_is_noticed(tmp_path: Path) -> None:
    with ExitStack() as stack:
        both = Whole(tmp_path, stack)
        both.generation.process.kill()
        both.generation.process.wait()
        with pytest.raises(CUT):
            both.server.events(COMPLETIONS, prompt="Hi", max_tokens=4)


def test_routers(tmp_path: Path) -> None:
    """Balancing by load, two requests at once are never at one server; the servers' logs tell."""
    slow = {"TTFT_MS": "500"}
    balanced = {"router": {"type": "load_balancing"}}
    with ExitStack() as stack:
        contexts = [stack.enter_context(worker(tmp_path, f"c{i}", CONTEXT, **slow)) for i in "01"]
        generation = stack.enter_context(worker(tmp_path, "g", GENERATION))
        port = orchestrator_file(
            tmp_path, [c.port for c in contexts], [generation.port], **balanced
        )
        server = stack.enter_context(orchestrating(tmp_path, port))
        server.wait_ready()
        with ThreadPoolExecutor(2) as pool:
            for _ in range(2):
                asked = [pool.submit(server.post, COMPLETIONS, BODY) for _ in "12"]
                assert all(each.result().status_code == 200 for each in asked)
        assert [each.log.count("POST") for each in contexts] == [2, 2]


def test_a_router_by_tokens_cannot_work(whole: Whole, tmp_path: Path) -> None:
    by_tokens: Any = {"router": {"type": "load_balancing", "use_tokens": True}}
    ports = [each.port for each in whole.contexts], [whole.generation.port]
    port = orchestrator_file(tmp_path, *ports, **by_tokens)
    with orchestrating(tmp_path, port) as server:
        server.wait_ready()
        assert "support generation_only" in server.post(COMPLETIONS, BODY).json()["detail"]
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
        assert "ChatCompletionRequest yet" in server.post(CHAT, body).json()["detail"]


ONE: Json = {"num_instances": 1, "urls": ["127.0.0.1:1"]}
LISTS: Json = {"context_servers": ONE, "generation_servers": ONE}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ([1], "TypeError"),
        ({**LISTS, "context_servers": {**ONE, "num_instances": 2}},
         "ValueError: Number of hostnames (1) should be equal to the number of instances (2)"),
        ({**LISTS, "context_servers": {"num_instances": 0}},
         "ValueError: At least one context server must be provided"),
        ({**LISTS, "generation_servers": {"num_instances": 0}},
         "ValueError: At least one generation server must be provided"),
        ({**LISTS, "context_servers": {**ONE, "urls": ["http://a:1"]}}, "ValueError: too many val"),
        ({**LISTS, "max_retries": -1}, "ValueError: Max retries -1 must be greater than or equal"),
        ({**LISTS, "router": {"type": "fastest"}}, "ValueError: Unsupported router type: fastest"),
        ({**LISTS, "generation_servers": {**ONE, "backend": "a"}, "backend": "b"},
         "ValueError: Parameter backend is specified both in the top-level and in the generation"),
        ({**LISTS, "conditional_disagg_config": {"max_local_prefill_length": 1}},
         "ValueError: Generation router must be a KvCacheAwareRouter"),
    ],
)  # fmt: skip
def test_a_file_that_it_refuses(tmp_path: Path, config: Any, said: str) -> None:
    (tmp_path / "o.yaml").write_text(json.dumps(config))
    with orchestrating(tmp_path, 0) as server:
        assert server.process.wait(PATIENCE) == 1
        assert said in server.log.splitlines()[-1]


def test_it_takes_keys_that_it_does_not_know(tmp_path: Path) -> None:
    """They belong to both lists of servers, and mean nothing to servers that run already."""
    orchestrator_file(tmp_path, [free_port()], [free_port()], backend="pytorch", no_such_key=1)
    with orchestrating(tmp_path, 0) as server:
        eventually(lambda: "Servers are not ready" in server.log)


def test_1_2_1_has_its_port_before_its_servers_are_ready(tmp_path: Path) -> None:
    port = orchestrator_file(tmp_path, [free_port()], [free_port()])
    with orchestrating(tmp_path, port, VERSION="1.2.1") as first:
        eventually(lambda: "Servers are not ready" in first.log)
        with orchestrating(tmp_path, port, VERSION="1.2.1") as second:
            assert second.process.wait(PATIENCE) == 1
            assert f"Failed to bind socket to 127.0.0.1:{port}" in second.log
