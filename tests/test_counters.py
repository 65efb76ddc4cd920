"""The server's own counters beside the client's figures, and prompts that were cached."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bench
from load import bench_place, counters
from load.endpoint import Endpoint
from tests.loopback import DONE, HEAD, LAST, MODEL, Request, chunk, event, serving, token

pytestmark = pytest.mark.usefixtures("same_signals", "any_machine")
NOWHERE = Endpoint("http://127.0.0.1:1", MODEL, MODEL)
TTFT, ITL, PROMPT, OUTPUT = 0.03, 0.004, 64, 6


@pytest.fixture(autouse=True)
def own_folder(clean_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_place, "gpu_names", lambda _: [])


@dataclass
class Engine:
    """A server that counts as a real one: after each answer, and what it took itself."""

    page: Callable[[Engine], dict[str, Any]]  # a path's answer
    usage: dict[str, Any] = field(default_factory=dict)  # more of it in each answer
    requests: int = 0
    asked: list[str] = field(default_factory=list)  # paths that were read
    events: tuple[int, ...] = (1,) * OUTPUT  # tokens in each

    def __call__(self, request: Request) -> None:
        path = request.line.split()[1]
        pages = self.page(self)
        if request.line.startswith("POST"):
            self.complete(request)
        elif path == "/v1/models":
            request.document({"object": "list", "data": [{"id": MODEL}]})
        elif path in pages:
            self.asked.append(path)
            body = pages[path]
            body = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            request.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        else:
            self.asked.append(path)
            request.document({"detail": "Not Found"}, "404 Not Found")

    def complete(self, request: Request) -> None:
        count, prompt = request.body["max_tokens"], len(request.body["prompt"])
        usage = {"prompt_tokens": prompt, "completion_tokens": count, **self.usage}
        last = event({"model": MODEL, "choices": [], "usage": usage})
        request.send(HEAD)
        for i, tokens in enumerate(self.events if count == OUTPUT else (1,) * count):
            time.sleep(ITL * tokens if i else TTFT)
            request.send(chunk(token(" word" * tokens)))
        self.requests += 1  # before the end is seen, as vLLM does
        request.send(chunk(last), chunk(DONE), LAST)


def histogram(name: str, mean: float, count: float, labels: str = "") -> str:
    return (
        f"# TYPE {name} histogram\n"
        f'{name}_bucket{{le="0.001"{labels}}} 0.0\n{name}_bucket{{le="+Inf"{labels}}} {count}\n'
        f"{name}_count{{{labels.lstrip(',')}}} {count}\n"
        f"{name}_sum{{{labels.lstrip(',')}}} {mean * count}\n"
    )


def vllm(engine: Engine, hit: float = 0.0, requests: int | None = None) -> str:
    n, labels = (
        engine.requests if requests is None else requests,
        ',model_name="a {b} c",engine="0"',
    )
    own = labels.lstrip(",")
    return "".join((
        histogram("vllm:time_to_first_token_seconds", TTFT, n, labels),
        histogram("vllm:inter_token_latency_seconds", ITL, n * (OUTPUT - 1), labels),
        histogram("vllm:e2e_request_latency_seconds", TTFT + ITL * (OUTPUT - 1), n, labels),
        histogram("vllm:request_queue_time_seconds", 0.002, n, labels),
        histogram("vllm:request_prefill_time_seconds", 0.025, n, labels),
        f"vllm:prefix_cache_queries_total{{{own}}} {n * PROMPT}\n",
        f"vllm:prefix_cache_hits_total{{{own}}} {n * PROMPT * hit}\n",
        f"vllm:prefix_cache_hits_created{{{own}}} 1.7e+09\n",
        f"vllm:num_requests_running{{{own}}} 2.0\nvllm:num_requests_waiting{{{own}}} 1.0\n",
        f"vllm:kv_cache_usage_perc{{{own}}} 0.25\n",
    ))  # fmt: skip


def sglang(engine: Engine, hit: float) -> str:
    n = engine.requests
    return "".join((
        histogram("sglang:time_to_first_token_seconds", TTFT, n),
        histogram("sglang:queue_time_seconds", 0.002, n),
        f"sglang:prompt_tokens_total {n * PROMPT}\n",
        f'sglang:cached_tokens_total{{cache_source="device"}} {n * PROMPT * hit}\n',
        'sglang:num_running_reqs{dp_rank="0"} 2.0\nsglang:num_running_reqs{dp_rank="1"} 1.0\n',
        'sglang:token_usage{dp_rank="0"} 0.2\nsglang:token_usage{dp_rank="1"} 0.4\n',
    ))  # fmt: skip


def trtllm(engine: Engine) -> str:
    n = engine.requests
    return "".join((
        histogram("trtllm_time_to_first_token_seconds", TTFT, n),
        histogram("trtllm_time_per_output_token_seconds", ITL, n),
        histogram("trtllm_e2e_request_latency_seconds", TTFT + ITL * (OUTPUT - 1), n),
        histogram("trtllm_request_queue_time_seconds", 0.002, n),
    ))  # fmt: skip


def iterations(engine: Engine, hit: float) -> list[dict[str, Any]]:
    reused = round(engine.requests * 100 * hit)
    blocks = {"usedNumBlocks": 30, "maxNumBlocks": 100, "reusedBlocks": reused,
              "missedBlocks": engine.requests * 100 - reused}  # fmt: skip
    return [{"iter": 1, "numActiveRequests": 2, "numQueuedRequests": 0, "kvCacheStats": blocks}]


@dataclass
class Run:
    record: dict[str, Any]
    last: dict[str, Any]
    said: str
    engine: Engine

    @property
    def notes(self) -> str:
        return "\n".join(self.record["notes"])


def run(
    page: Callable[[Engine], dict[str, Any]],
    types: str = "throughput",
    events: tuple[int, ...] = (1,) * OUTPUT,
    **usage: Any,
) -> Run:
    engine = Engine(page, usage, events=events)
    out, err = io.StringIO(), io.StringIO()
    with serving(engine) as server, redirect_stdout(out), redirect_stderr(err):
        code = bench.main([
            "-p", str(server.port), "-o", "out", "-t", types, "--client", "builtin",
            "--num-prompts", "12", "--concurrency", "2", "--input-len", str(PROMPT),
            "--output-len", str(OUTPUT),
        ])  # fmt: skip
    assert code == 0, out.getvalue() + err.getvalue()
    name = f"{types.split(',')[0]}-in{PROMPT}-out{OUTPUT}-c2"
    record = json.loads(Path(f"out/{name}.json").read_text())
    return Run(record, json.loads(out.getvalue().splitlines()[-1]), out.getvalue(), engine)


def test_vllms_own_figures_of_the_same_requests() -> None:
    done = run(lambda e: {"/metrics": vllm(e)})
    record = done.record
    assert record["server_requests"] == 12  # without the warm-up's
    assert record["server_mean_ttft_ms"] == pytest.approx(1e3 * TTFT)
    assert record["server_mean_itl_ms"] == pytest.approx(1e3 * ITL)
    assert record["server_mean_queue_ms"] == pytest.approx(2)
    assert record["server_mean_prefill_ms"] == pytest.approx(25)
    assert record["server_mean_running"] == pytest.approx(2)
    assert record["server_mean_waiting"] == pytest.approx(1)
    assert record["server_mean_kv_use"] == pytest.approx(0.25)
    assert record["ttft_beyond_server_ms"] == pytest.approx(record["mean_ttft_ms"] - 1e3 * TTFT)
    assert record["e2el_beyond_server_ms"] > 0
    assert record["cached_share"] == 0
    assert "cache" not in done.notes
    assert "server counted" not in done.notes
    table = done.said.partition("The server's own means")[2].splitlines()
    assert table[1].split()[:6] == ["TTFT", "ms", "TTFT", "+ms", "queue", "ms"]
    assert "30.0" in table[2]
    page = Path("out/report.html").read_text()
    assert "<h2>The server&#x27;s own means" in page
    assert "server_mean_ttft_ms" in Path("out/summary.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(
    "page",
    [
        lambda e: {"/metrics": vllm(e, 0.46)},
        lambda e: {"/metrics": sglang(e, 0.46)},
        lambda e: {"/metrics": iterations(e, 0.46)},
        lambda e: {"/metrics": iterations(e, 0.46), "/prometheus/metrics": trtllm(e)},
        lambda e: {"/prometheus/metrics": trtllm(e)
                   + f"trtllm_kv_cache_reused_blocks_total {46 * e.requests}\n"
                   + f"trtllm_kv_cache_missed_blocks_total {54 * e.requests}\n"},
    ],
)  # fmt: skip
def test_cached_prompts_by_the_servers_counters(page: Callable[[Engine], dict[str, Any]]) -> None:
    done = run(page)
    assert done.record["cached_share"] == pytest.approx(0.46)
    assert "46% of the prompt tokens came from the server's cache" in done.notes
    assert done.last["runs"][0]["cached_share"] == pytest.approx(0.46)
    assert "46.0%" in done.said
    assert "46.0%" in Path("out/report.html").read_text()


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens_details": {"cached_tokens": 16}},
        {"prompt_cache_hit_tokens": 16, "prompt_cache_miss_tokens": 48},
    ],
)
def test_cached_prompts_by_the_answers(usage: dict[str, Any]) -> None:
    done = run(lambda _: {}, **usage)
    assert done.record["cached_share"] == 0.25
    assert "25% of the prompt tokens came from the server's cache (by usage" in done.notes


@pytest.mark.parametrize(
    "details", [None, {}, {"cached_tokens": None}, {"cached_tokens": "x"}, [], 7]
)
def test_answers_that_do_not_say_what_was_cached(details: object) -> None:
    done = run(lambda _: {}, prompt_tokens_details=details)
    assert done.record["cached_share"] is None
    assert " cached" not in done.said


def test_more_cached_tokens_than_the_prompt_has_are_no_share_of_it() -> None:
    """Some gateways do not count cached tokens as the prompt's."""
    done = run(lambda _: {}, prompt_tokens_details={"cached_tokens": 10 * PROMPT})
    assert done.record["cached_share"] is None
    assert "cached 1" not in done.said


def test_an_answer_with_no_cached_prompt_is_no_mark() -> None:
    done = run(lambda _: {}, prompt_tokens_details={"cached_tokens": 0})
    assert done.record["cached_share"] == 0
    assert "cache" not in done.notes


def test_the_larger_share_counts() -> None:
    """A gateway writes zeros where it knows nothing; the server behind it knows better."""
    done = run(lambda e: {"/metrics": vllm(e, 0.46)}, prompt_tokens_details={"cached_tokens": 0})
    assert done.record["cached_share"] == pytest.approx(0.46)
    assert done.record["cached_source"] == "the server's counters"


def test_a_servers_itl_is_of_tokens_where_an_event_carries_several() -> None:
    """A busy vLLM sends two tokens at once; its own mean is still that of each."""
    record = run(lambda e: {"/metrics": vllm(e)}, events=(1, 1, 2, 2)).record
    assert record["client"]["tokens_per_event"] == 1.5
    ours = record["itl_beyond_server_ms"] + 1e3 * ITL
    assert ours == pytest.approx(record["mean_tpot_ms"], abs=0.01)
    assert ours < 0.9 * record["mean_itl_ms"]


def test_tensorrt_llms_list_of_iterations_and_its_histograms() -> None:
    done = run(lambda e: {"/metrics": iterations(e, 0), "/prometheus/metrics": trtllm(e)})
    record = done.record
    assert record["server_mean_ttft_ms"] == pytest.approx(1e3 * TTFT)
    assert record["server_mean_itl_ms"] == pytest.approx(1e3 * ITL)
    assert record["server_mean_running"] == 2
    assert record["server_mean_kv_use"] == pytest.approx(0.3)
    assert record["cached_share"] == 0


def test_replicas_running_requests_are_added_and_their_use_is_averaged() -> None:
    record = run(lambda e: {"/metrics": sglang(e, 0)}).record
    assert record["server_mean_running"] == pytest.approx(3)
    assert record["server_mean_kv_use"] == pytest.approx(0.3)


def test_requests_of_others_are_told_and_nothing_is_compared() -> None:
    done = run(lambda e: {"/metrics": vllm(e, requests=2 * e.requests)})
    assert "the server counted 24 requests, the client 12" in done.notes
    assert "ttft_beyond_server_ms" not in done.record


def test_counters_that_go_back_are_left_out() -> None:
    done = run(lambda e: {"/metrics": vllm(e, requests=max(5 - e.requests // 4, 0))})
    assert "the server's counters went back" in done.notes
    assert "server_mean_ttft_ms" not in done.record


@pytest.mark.parametrize(
    "body",
    ["", "[]", "<html>login</html>", "process_start_time_seconds 7\n", "\x00\xff", "[[[", "{}"],
)
def test_a_server_that_tells_nothing_is_asked_once(body: str) -> None:
    done = run(lambda _: {"/metrics": body}, "throughput,latency")
    assert done.engine.asked.count("/prometheus/metrics") == 1
    assert not [key for key in done.record if key.startswith("server_m")]


def test_a_run_that_was_stopped_waits_for_no_counters() -> None:
    own = counters.Counters(NOWHERE)  # would fail if it asked
    record: dict[str, Any] = {"stopped": 15, "notes": []}
    own.add_to(record, "n")
    assert record == {"stopped": 15, "notes": []}


TEXT = st.one_of(st.binary(max_size=60), st.sampled_from([
    b"vllm:kv_cache_usage_perc NaN\n", b"vllm:time_to_first_token_seconds_count{a=\"} 9\"} 3 17\n",
    b'[{"kvCacheStats": {"usedNumBlocks": "x", "maxNumBlocks": 0}}, 7]', b"[" * 10_000,
    b"vllm:prefix_cache_hits_total 1e999\n",
]))  # fmt: skip


@given(st.lists(TEXT, max_size=3), st.lists(TEXT, max_size=3))
def test_pages_of_any_kind(before: list[bytes], after: list[bytes]) -> None:
    own = counters.Counters(NOWHERE)
    own.before, own.during = before, [(1.0, after)]
    facts, notes = own.told({"completed": 3, "num_prompts": 3}, after)
    json.dumps([facts, notes], allow_nan=False)
