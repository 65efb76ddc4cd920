"""Prefill and decode on servers of their own, on the real cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.cluster import Cluster, wait_until
from tests.cluster.conftest import Launcher
from tests.cluster.launches import QUICK, TARBALL, Launch, ours, smoke, traces
from tests.test_disagg import CONTEXT, GENERATION


def words(folder: Path, *more: str, prefill: int = 1, decode: int = 1) -> list[str]:
    """Servers of four GPUs; the two config files are in the workspace."""
    for name, config in (("prefill", CONTEXT), ("decode", GENERATION)):
        text = yaml.safe_dump({**config, "tensor_parallel_size": 4})
        (folder / f"{name}.yaml").write_text(text)
        more = (*more, f"--{name}-config", str(folder / f"{name}.yaml"))
    return ["--image", str(TARBALL), "org/model", "--prefill", str(prefill), "--decode",
            str(decode), "--no-front", *more]  # fmt: skip


def servers(workspace: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((workspace / "logs/endpoint.json").read_text())["replicas"]
    return {each["name"]: each for each in found}


def ask(cluster: Cluster, launch: Launch, prompt: str = "one two three") -> str:
    """The text of an answer, asked from the login node; '' if there is none."""
    body = {"model": "m", "prompt": prompt, "max_tokens": 6, "temperature": 0}
    said = cluster.ctl.run(
        "curl", "-s", f"{launch.url()}/v1/completions", "-H", "Content-Type: application/json",
        "-d", json.dumps(body), check=False,
    ).stdout  # fmt: skip
    return str(json.loads(said)["choices"][0]["text"]) if '"choices"' in said else ""


def test_two_pools_on_two_nodes_answer_as_one(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    started = launch(*words(workspace, prefill=1, decode=2), env=QUICK)
    started.until("stop it with")
    assert "1 prefill (TP 4) and 2 decode (TP 4)" in started.output
    assert "prefill0, decode0, orchestrator on n1; decode1 on n2" in started.output
    assert "with 1 prefill and 2 decode servers" in started.output
    found = servers(workspace)
    assert [each["gpus"] for each in found.values()] == [list("0123"), list("4567"), list("0123")]
    assert started.url() == "http://10.77.0.11:8003"
    assert ask(cluster, started)
    seen = started.output
    orchestrator = seen.index("orchestrator: ready after")
    assert all(seen.index(f"{name}: ready after") < orchestrator for name in found)
    assert all("8/8" in smoke(cluster, each["url"]) for each in found.values())
    assert started.stop() == 130
    assert traces(cluster, workspace) == []


def test_a_server_that_dies_ends_the_launch_by_its_name(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    started = launch(*words(workspace), env=QUICK)
    started.until("stop it with")
    victim = servers(workspace)["decode0"]
    cluster.nodes[victim["node"]].docker("kill", victim["container"])
    assert started.code() == 1
    assert "ERROR decode0: " in started.output
    assert "the others are ended, too" in started.output
    assert ours(cluster) == [] and traces(cluster, workspace) == []


def test_a_server_that_dies_is_started_anew_at_its_place(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    started = launch(*words(workspace, "--restart", "1"), env=QUICK)
    started.until("stop it with")
    before = ask(cluster, started)
    victim = servers(workspace)["prefill0"]
    cluster.nodes[victim["node"]].docker("kill", victim["container"])
    started.until("restarting (1 of 1)")
    ready = "prefill0: ready after"
    wait_until(lambda: started.output.count(ready) == 2, "a second start")
    wait_until(lambda: ask(cluster, started) == before, "an answer as before")
    assert started.output.count("orchestrator: ready after") == 1
    assert started.stop() == 130
    assert traces(cluster, workspace) == []
