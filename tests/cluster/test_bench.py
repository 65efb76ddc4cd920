"""Benchmarks on the real cluster: both clients see the speeds that the simulator was given."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from report.results import COLUMNS
from tests.cluster.cluster import Cluster, wait_until
from tests.cluster.conftest import Launcher
from tests.cluster.launches import PYTHON, QUICK, REPO, TAG, Launch, serve_args

TTFT_MS, ITL_MS = 60.0, 12.0  # of the simulator, for 128 prompt tokens
SPEEDS = {"TRTLLM_SIM_TTFT_MS": "57.44", "TRTLLM_SIM_ITL_MS": "12"}  # and 20 us a prompt token
E2EL_MS = TTFT_MS + 31 * ITL_MS
LOAD = ["-t", "latency", "--input-len", "128", "--output-len", "32", "--num-prompts", "6"]


@pytest.fixture
def served(launch: Launcher) -> Iterator[Launch]:
    started = launch(*serve_args(), env={**QUICK, **SPEEDS})
    started.until("READY")
    yield started
    started.stop()


def measure(
    cluster: Cluster, workspace: Path, *words: str, env: dict[str, str] | None = None
) -> dict[str, Any]:
    """A run of bench.py that has no problem, unless the machine was busy."""
    command = [PYTHON, str(REPO / "bench.py"), *words, "-o", "results"]
    done = cluster.ctl.run(*command, cwd=str(workspace), env=env, check=False)
    assert json.loads(done.stdout.splitlines()[-1])["stopped"] is False, done.stdout + done.stderr
    (path,) = (p for p in (workspace / "results").glob("*.json") if p.name != "summary.json")
    run: dict[str, Any] = json.loads(path.read_text())
    assert run["completed"] == run["num_prompts"]
    assert run["problems"] == run.get("client", {}).get("problems", []), done.stdout
    return run


CLIENTS = {"builtin": [], "trtllm": ["--client", "trtllm", "-i", TAG]}


@pytest.mark.parametrize("client", CLIENTS)
def test_a_benchmark_agrees_with_the_servers_speeds(
    client: str, cluster: Cluster, served: Launch, workspace: Path
) -> None:
    """The server is never early. On a busy machine both are late, but for the quickest request."""
    env = {**served.allocation, "TRTLLM_STAND_IN": "measure"}
    words = [*LOAD, *CLIENTS[client], "--save-detailed"]
    run = measure(cluster, workspace, *words, env=env)
    results = workspace / "results"
    firsts = [1000 * ttft for ttft in run["ttfts"]]
    lasts = [
        1000 * (ttft + sum(gaps)) for ttft, gaps in zip(run["ttfts"], run["itls"], strict=True)
    ]
    assert TTFT_MS - 1 < min(firsts) < TTFT_MS + 15
    assert E2EL_MS - 1 < min(lasts) < E2EL_MS + 50
    assert run["mean_ttft_ms"] == pytest.approx(statistics.fmean(firsts))
    assert run["mean_itl_ms"] == pytest.approx(1000 * statistics.fmean(chain(*run["itls"])), 1e-4)
    (row,) = csv.DictReader((results / "summary.csv").read_text().splitlines())
    page = (results / "report.html").read_text()
    for column in COLUMNS:
        assert float(row[column.key]) == run[column.key]
        assert f">{run[column.key]:,.{column.digits}f}" in page
    assert "trtllm-bench" not in cluster.nodes["n1"].docker("ps", "-a", "--format", "{{.Names}}")


def test_a_server_that_dies_makes_the_run_invalid(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    started = launch(*serve_args(), env={**QUICK, **SPEEDS})
    started.until("READY")
    command = [PYTHON, str(REPO / "bench.py"), *LOAD[:-1], "200", "-o", "results"]
    with ThreadPoolExecutor() as pool:
        bench = pool.submit(cluster.ctl.run, *command, cwd=str(workspace), check=False)
        (log,) = (workspace / "logs").glob("trtllm_server_*.log")
        wait_until(lambda: log.read_bytes().count(b"POST /v1/completions") > 20, "requests")
        cluster.nodes["n1"].docker("kill", f"trtllm-{started.job}-n1")
        done = bench.result()
    assert done.returncode == 1
    assert "INVALID" in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert started.code() == 1
