"""Benchmarks on the real cluster: both clients see the speeds that the simulator was given."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from report.results import COLUMNS
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import Launcher
from tests.cluster.launches import PYTHON, QUICK, REPO, TAG, Launch, serve_args

TTFT_MS, ITL_MS = 60.0, 12.0  # of the simulator, for 128 prompt tokens
SPEEDS = {"TRTLLM_SIM_TTFT_MS": "57.44", "TRTLLM_SIM_ITL_MS": "12"}  # and 20 us a prompt token
LOAD = ["-t", "latency", "--input-len", "128", "--output-len", "32", "--num-prompts", "6"]


@pytest.fixture
def served(launch: Launcher) -> Iterator[Launch]:
    started = launch(*serve_args(), env={**QUICK, **SPEEDS})
    started.until("READY", 60)
    yield started
    started.stop()


CLIENTS = {"builtin": [], "trtllm": ["--client", "trtllm", "-i", TAG]}


@pytest.mark.parametrize("client", CLIENTS)
def test_a_benchmark_agrees_with_the_servers_speeds(
    client: str, cluster: Cluster, served: Launch, workspace: Path
) -> None:
    env = {**served.allocation, "TRTLLM_STAND_IN": "measure"}
    command = [PYTHON, str(REPO / "bench.py"), *LOAD, *CLIENTS[client], "-o", "results"]
    done = cluster.ctl.run(*command, cwd=str(workspace), env=env, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    json.loads(done.stdout.splitlines()[-1])
    results = workspace / "results"
    (run,) = json.loads((results / "summary.json").read_text())
    assert run["completed"] == run["num_prompts"] == 6
    for kind in ("median", "mean"):
        assert TTFT_MS - 1 < run[f"{kind}_ttft_ms"] < TTFT_MS + 15
        assert ITL_MS - 1 < run[f"{kind}_itl_ms"] < ITL_MS + 4
    (row,) = csv.DictReader((results / "summary.csv").read_text().splitlines())
    page = (results / "report.html").read_text()
    (cells,) = re.findall(r"<tr><td>latency-in128-out32-c1<td>(.*)", page)
    for column, cell in zip(COLUMNS, cells.split("<td>"), strict=True):
        assert float(row[column.key]) == run[column.key]
        assert cell == f"{run[column.key]:,.{column.digits}f}"
    assert "trtllm-bench" not in cluster.nodes["n1"].docker("ps", "-a", "--format", "{{.Names}}")


def test_a_server_that_dies_makes_the_run_invalid(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    fault = {"TRTLLM_SIM_FAULT": "kill-serving:4"}
    started = launch(*serve_args(), env={**QUICK, **SPEEDS, **fault})
    started.until("READY", 60)
    command = [PYTHON, str(REPO / "bench.py"), *LOAD[:-1], "200", "-o", "results"]
    done = cluster.ctl.run(*command, cwd=str(workspace), check=False, timeout=120)
    assert done.returncode == 1
    assert "INVALID" in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert started.code() == 1
