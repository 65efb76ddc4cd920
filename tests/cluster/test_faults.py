"""What goes wrong on the real cluster: one sentence, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import REGISTRY, Cluster, wait_until
from tests.cluster.conftest import Launcher
from tests.cluster.launches import (
    QUICK,
    REPO,
    TAG,
    TARBALL,
    forget_image,
    ours,
    serve_args,
)


def sentence(output: str) -> str:
    """The error that ended a launch."""
    return output.partition("] ERROR ")[2]


# --- asked for what cannot be -------------------------------------------------------------------


def truncated(workspace: Path, *, sidecar: bool) -> list[str]:
    """Two thirds of a tarball; with a sidecar of that size, only the nodes can find out."""
    path = workspace / "cut.tar.gz"
    whole = TARBALL.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    if sidecar:
        facts = json.loads(Path(f"{TARBALL}.json").read_text())
        facts["packed_bytes"] = path.stat().st_size
        Path(f"{path}.json").write_text(json.dumps(facts))
    return ["--image", str(path), "m"]


def too_big(workspace: Path) -> list[str]:
    path = workspace / "big.tar.gz"
    shutil.copy2(TARBALL, path)
    facts = json.loads(Path(f"{TARBALL}.json").read_text())
    Path(f"{path}.json").write_text(json.dumps({**facts, "unpacked_bytes": 10**15}))
    return ["--image", str(path), "m"]


BAD_REQUESTS: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "truncated tarball": (
        lambda w: truncated(w, sidecar=True),
        ["n1: ", "cut.tar.gz is truncated or corrupt"],
    ),
    "truncated tarball without sidecar": (
        lambda w: truncated(w, sidecar=False),
        ["cut.tar.gz is truncated or corrupt"],
    ),
    "missing tarball": (
        lambda w: ["--image", "/fsx/none.tar.gz", "m"],
        ["the image tarball /fsx/none.tar.gz does not exist", "make docker"],
    ),
    "local tag that is nowhere": (
        lambda w: ["--image", "never-built:1", "m"],
        ["n1: image never-built:1 is not on this node", "make load"],
    ),
    "not enough disk space": (too_big, ["n1: not enough disk space", "2000000.0 GB"]),
    "missing config file": (
        lambda w: serve_args("--config", "none.yaml"),
        ["none.yaml", "No such file"],
    ),
    "config that is no YAML": (
        lambda w: serve_args("--config", str(REPO / "LICENSE")),
        ["LICENSE is not"],
    ),
    "path that is not mounted": (
        lambda w: ["--image", str(TARBALL), "/usr/lib"],
        ["/usr/lib is not mounted into the container", "--container-mount"],
    ),
    "model path that is not there": (
        lambda w: ["--image", str(TARBALL), "/fsx/no-model"],
        ["n1: /fsx/no-model is not there"],
    ),
    "container mount that is not there": (
        lambda w: ["--container-mount", "/nowhere", *serve_args()],
        ["n1: /nowhere is not there, or not readable"],
    ),
    "world larger than the allocation": (
        lambda w: serve_args("--pp_size", "4"),
        ["32 (tp 8 x pp 4 x cp 1)", "only 16 GPUs"],
    ),
    "world that does not fill the nodes": (
        lambda w: ["--image", str(TARBALL), "m", "--tp_size", "12"],
        ["12 (tp 12 x pp 1 x cp 1)", "nodes of 8 GPUs evenly"],
    ),
    "unknown trtllm-serve flag": (
        lambda w: serve_args("--no_such_flag", "1"),
        ["trtllm-serve 1.1.0 has no option --no_such_flag"],
    ),
    "local image that --force would lose": (
        lambda w: ["--force", "--image", "stranger:1", "m"],
        ["would remove stranger:1"],
    ),
    "address that only the node itself reaches": (
        lambda w: serve_args("--host", "127.0.0.1"),
        ["--host 127.0.0.1 cannot be reached", "n1"],
    ),
    "workspace that each node has for itself": (
        lambda w: ["-w", "/tmp", "--image", str(TARBALL), "m", "--tp_size", "16"],
        ["n1, n2: the workspace /tmp is not the one of ctl"],
    ),
    "port that is no port": (lambda w: serve_args("--port", "80000"), ["'80000'"]),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_ends_in_one_sentence(
    case: str, cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    arguments, words = BAD_REQUESTS[case]
    if "tarball" in case or "disk" in case:
        forget_image(cluster)
    started = launch(*arguments(workspace), env=QUICK)
    assert started.code() == (2 if "no port" in case else 1), started.output
    for word in words:
        assert word in sentence(started.output), started.output


def test_a_taken_port_is_noticed_before_anything_heavy(cluster: Cluster, launch: Launcher) -> None:
    holder = cluster.nodes["n1"].popen("python3", "-m", "http.server", "8000", cwd="/run")
    try:
        wait_until(lambda: "8000" in cluster.nodes["n1"].run("ss", "-ltn").stdout, "holder")
        started = launch(*serve_args(), env=QUICK)
        assert started.code() == 1
        assert 'n1: port 8000 is taken by "python3"' in sentence(started.output)
        assert "SIMULATOR" not in started.output
    finally:
        cluster.nodes["n1"].run("pkill", "-f", "http.server")
        holder.wait()


# --- a registry ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registry(cluster: Cluster) -> Iterator[str]:
    """A Docker registry on the login node that holds one image."""
    config = cluster.state / "registry.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error}\nhttp: {addr: '0.0.0.0:5000'}\n"
        f"storage: {{filesystem: {{rootdirectory: {cluster.state}/registry}}}}\n"
    )
    cluster.ctl.start("registry", "docker-registry", "serve", str(config))
    node = cluster.nodes["n1"]
    wait_until(
        lambda: node.run("curl", "-fs", f"http://{REGISTRY}/v2/", check=False).returncode == 0,
        "registry",
    )
    node.docker("tag", "stranger:1", f"{REGISTRY}/serve:1")
    node.docker("push", f"{REGISTRY}/serve:1")
    node.docker("rmi", f"{REGISTRY}/serve:1")
    yield REGISTRY
    cluster.ctl.stop("registry")


def test_an_image_of_a_registry_is_pulled_on_every_node_that_serves(
    cluster: Cluster, launch: Launcher, registry: str
) -> None:
    for size, pulls in ("8", 1), ("16", 2):
        started = launch("--image", f"{registry}/serve:1", "m", "--tp_size", size, env=QUICK)
        started.until("READY")
        assert started.output.count("there after") == pulls
        assert started.stop() == 130
        for node in list(cluster.nodes.values())[:pulls]:
            node.docker("rmi", f"{registry}/serve:1")


def test_a_tag_the_registry_does_not_have_names_the_node(launch: Launcher, registry: str) -> None:
    started = launch("--image", f"{registry}/serve:none", "m", env=QUICK)
    assert started.code() == 1
    assert f"n1: docker pull {registry}/serve:none" in sentence(started.output)
    assert "manifest unknown" in sentence(started.output)


# --- the engine fails ---------------------------------------------------------------------------


def test_a_flag_that_the_engine_itself_refuses_is_its_word(launch: Launcher) -> None:
    started = launch(*serve_args("--no_such_flag", "1"), env={**QUICK, "TRTLLM_VERSION": "9.9"})
    assert started.code() == 1
    for word in ("n1: ", "exit code 2", "No such option: --no_such_flag"):
        assert word in sentence(started.output), started.output


# --- what is left, what is kept -------------------------------------------------------------------


def test_the_next_start_reaps_what_dead_launchers_left(cluster: Cluster, launch: Launcher) -> None:
    node = cluster.nodes["n1"]
    started = launch(*serve_args(), env=QUICK)
    started.until("READY")
    here = node.docker(
        "inspect",
        f"trtllm-{started.job}-n1",
        "--format",
        '{{index .Config.Labels "tensorrt-llm-serve.launcher"}}',
    )
    started.stop()
    dead = f"{here.rsplit(':', 2)[0]}:{started.process.pid}:1"
    cases = {
        "gone": ("99999", dead, "root"),
        "job-gone": ("99998", "other/x/y:1:1", "root"),
        "not-ours": ("99999", dead, "somebody"),
    }
    for name, (job, launcher, user) in cases.items():
        node.docker(
            "run",
            "-d",
            "--name",
            name,
            "--net=host",
            "--label",
            f"tensorrt-llm-serve.job={job}",
            "--label",
            f"tensorrt-llm-serve.launcher={launcher}",
            "--label",
            f"tensorrt-llm-serve.user={user}",
            "stranger:1",
            "sleep",
            "1000",
        )
    try:
        started = launch(*serve_args(), env=QUICK)
        started.until("READY")
        assert "removing 2 containers" in started.output
        names = node.docker("ps", "--format", "{{.Names}}").split()
        assert "not-ours" in names and "gone" not in names and "job-gone" not in names
        started.stop()
    finally:
        node.docker("rm", "-f", *cases, check=False)


def test_a_second_launch_in_one_allocation_is_refused(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    started = launch(*serve_args(), env=QUICK)
    started.until("READY")
    second = launch(*serve_args("--port", "8001"), salloc="", env=started.allocation)
    assert second.code() == 1
    assert f"container trtllm-{started.job}-n1 is already running" in sentence(second.output)
    assert len(ours(cluster)) == 1
    assert started.stop() == 130


def test_the_log_of_every_end_is_kept(launch: Launcher, workspace: Path) -> None:
    for fault in ("exit-loading:1", "exit-serving:1"):
        launch(*serve_args(), env={**QUICK, "TRTLLM_SIM_FAULT": fault}).code()
    assert len(list((workspace / "logs").glob("trtllm_server_*.log"))) == 2


def test_another_image_of_the_same_tag_does_not_stop_force(
    cluster: Cluster, launch: Launcher
) -> None:
    """With --force, a stranger's container of that very image keeps running."""
    node = cluster.nodes["n1"]
    node.run("sh", "-c", f"pigz -dc {TARBALL} | docker load")
    node.docker("run", "-d", "--name", "user-of-it", "--net=host", TAG, "sleep", "1000")
    try:
        started = launch(*serve_args("--force"), env=QUICK)
        started.until("READY")
        started.stop()
        assert "user-of-it" in node.docker("ps", "--format", "{{.Names}}").split()
    finally:
        node.docker("rm", "-f", "user-of-it")
