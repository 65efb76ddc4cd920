"""What `make check-engines` stands on, without an engine: its model, its sums, its clean-up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from load.payload import LAST_ID
from tests.conftest import wait_until
from tests.engines import tiny_model
from tests.engines.check import agrees, counters, main, serving
from tests.engines.engines import VLLM, run
from tests.loopback import Request
from tests.loopback import serving as answering

METRICS = b"""\
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1"} 3.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="a b"} 0.5
sglang:time_to_first_token_seconds_sum{is_streaming="true"} 1.5
sglang:time_to_first_token_seconds_count{is_streaming="true"} 4.0
"""


def test_the_model_knows_every_token_that_bench_sends(tmp_path: Path) -> None:
    size = tiny_model.write(tmp_path / "model")
    assert size > LAST_ID
    read = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "model").iterdir()}
    words, merges = (read["tokenizer"]["model"][key] for key in ("vocab", "merges"))
    assert sorted(words.values()) == list(range(size)) == list(range(read["config"]["vocab_size"]))
    assert all({a, b, a + b} <= words.keys() for a, b in merges)


def test_counters_that_differ_in_a_label_are_added_up() -> None:
    def metrics(request: Request) -> None:
        request.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(METRICS), METRICS)

    with answering(metrics) as server:
        found = counters(f"http://127.0.0.1:{server.port}")
    assert found == {"time_to_first_token_seconds_sum": 2, "time_to_first_token_seconds_count": 4}


@pytest.mark.parametrize(("ours", "good"), [(10.9, True), (9.1, True), (11.1, False), (8.9, False)])
def test_a_client_that_is_off_by_more_than_a_tenth_fails(ours: float, good: bool) -> None:
    assert agrees({"mean_tpot_ms": ours}, {"mean_tpot_ms": 10.0}) is good


def test_an_engine_that_dies_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    script = tmp_path / "engine"
    script.write_text(f"#!/bin/sh\nsleep 300 &\necho $! >{tmp_path}/pid\necho no memory\nexit 3\n")
    script.chmod(0o755)
    dying = replace(VLLM, serve=str(script), inner="")
    with (
        pytest.raises(SystemExit, match="exit code 3:\nno memory"),
        serving(dying, tmp_path, tmp_path),
    ):
        pass
    child = Path("/proc", (tmp_path / "pid").read_text().strip())
    wait_until(lambda: not child.exists() or not (child / "cmdline").read_bytes())  # a zombie


def test_an_unknown_engine_and_a_failed_install_are_sentences(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--engine", "vllm,llama"])
    assert "llama: not one of vllm, sglang" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--engine", "sglang", "--cluster"])
    assert "serves vLLM only" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"^sh -c .* failed:\nno such package"):
        run(["sh", "-c", "echo no such package >&2; exit 1"])
