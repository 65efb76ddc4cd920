"""What `make bench-peers` stands on, without a peer: its options, its sums, its table."""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from typing import Any

import pytest

from tests import bench_client
from tests.bench_client import Point
from tests.engines.peers import Load, compared, parse, show

SAID = {"completed": 8, "mean_ttft_ms": 51.5, "p99_itl_ms": 9.75, "p99_ttft_ms": 60}
TRUTH = {"requests": 8, "requests_per_s": 3.0, "ttft_ms": {"mean": 50.25, "p99": 55},
         "itl_ms": {"mean": 10.0, "p99": 10.25}}  # fmt: skip


def test_what_a_client_says_meets_what_was_sent() -> None:
    point = compared("peer", 8, SAID, TRUTH)
    assert (point.ttft, point.itl_p99, point.rate) == ((50.25, 51.5), (10.25, 9.75), 3.0)
    assert point.error == 1.25


@pytest.mark.parametrize(
    ("said", "truth", "why"),
    [
        ({"completed": 7}, {}, "of 8 requests peer 7 counted"),
        ({}, {"requests": 9}, "of 8 requests the server 9 counted"),
    ],
)
def test_another_load_than_the_one_asked_for_is_refused(said: Any, truth: Any, why: str) -> None:
    with pytest.raises(SystemExit, match=f"^bench-peers: peer: {why}$"):
        compared("peer", 8, SAID | said, TRUTH | truth)


def test_the_table_has_the_better_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runs = {(1, 8): [1.5, 0.5], (16, 64): [-0.25, 4.0], (64, 4000): [0.0, 0.0]}
    rates = iter([1, 12, 900, 1, 12, 800])

    def measure(load: Load) -> Point:
        error = runs[load.streams, load.requests].pop(0)
        return Point((50, 50 + error), (10.5, 10.25), next(rates), 0, True)

    show({"peer 1.0": measure}, [1, 16], repeat=2)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| client | 1 | 16 streams | most requests/s |",
        "|---|--:|--:|--:|",
        "| peer 1.0 | +0.50 / -0.25 | -0.25 / -0.25 | 900 |",
    ]
    assert not any(runs.values())


def test_an_unknown_engine_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["--engine", "vllm,llama"])
    assert "llama: not one of vllm, sglang, vllm-rs" in capsys.readouterr().err
    assert parse(["--engine", "vllm,sglang", "--streams", "1,2"]).streams == [1, 2]


@pytest.mark.skipif(not shutil.which("cc") and not os.environ.get("CI"), reason="no C compiler")
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("usage", [True, False])
def test_the_timetable_server_reads_json_with_and_without_spaces(
    separators: tuple[str, str], usage: bool
) -> None:
    """As loadgen.py and Rust write it, and as aiohttp does."""
    body = {"prompt": "hello", "max_tokens": 3, "stream_options": {"include_usage": usage}}
    with bench_client.server() as (port, _):
        bench_client.admin(port, "config?ttft_ms=0&itl_ms=0")
        url = f"http://127.0.0.1:{port}/v1/completions"
        data = json.dumps(body, separators=separators).encode()
        with urllib.request.urlopen(url, data) as answer:
            events = answer.read().split(b"\n\n")
        assert bench_client.admin(port, "stats")["requests"] == 1
    assert sum(b'"text":" token"' in event for event in events) == 3
    assert sum(b'"completion_tokens":3' in event for event in events) == usage
