"""tune.py in an allocation: candidates side by side, each on its own node, all ended with it."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

from tests.cluster.cluster import Cluster, wait_until
from tests.cluster.conftest import Launcher
from tests.cluster.launches import QUICK, Launch, serve_args

SHORT = ("--loads", "1", "--input-len", "8", "--output-len", "8", "--repeat", "1",
         "--num-prompts", "2", "-o", "found")  # fmt: skip


def tune(launch: Launcher, sizes: str) -> Launch:
    """Each candidate takes all 8 GPUs of a node."""
    args = serve_args("--set", f"max_batch_size={sizes}", *SHORT)
    return launch(*args, script="tune.py", env=QUICK)


def served(cluster: Cluster) -> list[int]:
    """How many containers of ours run on each of the job's two nodes."""
    ask = ("ps", "-q", "--filter", "label=tensorrt-llm-serve.job")
    return [len(cluster.nodes[name].docker(*ask).split()) for name in ("n1", "n2")]


def test_two_candidates_are_measured_at_once_and_never_two_on_a_node(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    started = tune(launch, "1,8,32")
    seen: list[list[int]] = []
    while started.process.poll() is None:
        seen.append(served(cluster))
        time.sleep(0.5)
    assert started.code() == 0, started.output
    assert [1, 1] in seen and max(map(max, seen)) == 1
    for node in ("n1", "n2"):
        assert f"TP 8, 8 GPUs: starting on {node}" in started.output
    document = json.loads((workspace / "found/tune.json").read_text())
    assert len(document["candidates"]) == 3 and not document["unfinished"]
    assert all(each["loads"] and not each["failed"] for each in document["candidates"])


def test_an_interrupt_ends_all_of_them(cluster: Cluster, launch: Launcher, workspace: Path) -> None:
    """The fixture looks for what they leave: two launchers share one job."""
    started = tune(launch, "1,8")
    wait_until(lambda: served(cluster) == [1, 1], "a server on each node")
    assert started.stop(signal.SIGINT) == 130
    assert "not finished: stopped" in started.output
    assert (workspace / "found/tune.html").exists()
