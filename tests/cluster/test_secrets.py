"""Secrets, permissions and identities on the real cluster."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import test_faults
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import Launcher
from tests.cluster.launches import QUICK, TARBALL, forget_image, serve_args
from tests.conftest import Watch

registry = test_faults.registry
SECRETS = {"HF_TOKEN": "hf_secret_7", "OPENAI_API_KEY": "sk_secret_7"}


def test_secrets_are_in_no_argument_of_16_ranks_and_files_are_ours_to_change(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    """Every process of the machine, and so of all nodes, is searched all the time."""
    mask = os.umask(0)
    try:
        with Watch(*SECRETS.values()) as watch:
            started = launch(*serve_args("--pp_size", "2"), env={**QUICK, **SECRETS})
            started.until("READY")
            [variables, *_] = [
                json.loads(cluster.nodes[n].docker("inspect", f"trtllm-{started.job}-{n}"))
                for n in ("n1", "n2")
            ]
            written = [p for p in workspace.rglob("*") if not p.name.startswith("output-")]
            open_to_all = [p for p in written if p.stat().st_mode & 0o002]
            assert started.stop() == 130
    finally:
        os.umask(mask)
    assert watch.looks > 20 and watch.seen == set()
    assert "HF_TOKEN=hf_secret_7" in variables[0]["Config"]["Env"]  # it did arrive
    assert len(written) > 16 and open_to_all == []
    for path in workspace.rglob("*"):
        assert path.is_dir() or b"_secret_7" not in path.read_bytes(), path


@pytest.fixture
def pinned(cluster: Cluster, registry: str) -> Iterator[str]:
    """The registry's image by its digest; no node has it."""
    node, tag = cluster.nodes["n1"], f"{registry}/serve:1"
    node.docker("pull", tag)
    reference = node.docker("inspect", "--format", "{{index .RepoDigests 0}}", tag).strip()
    node.docker("rmi", tag)
    assert "@sha256:" in reference
    yield reference
    for each in cluster.nodes.values():
        each.run("docker", "rmi", reference, check=False)


def test_an_image_pinned_by_its_digest_is_pulled_once_and_served(
    launch: Launcher, pinned: str
) -> None:
    for pulls in (1, 0):
        started = launch("--image", pinned, "m", env=QUICK)
        started.until("READY")
        assert started.output.count("there after") == pulls
        assert started.stop() == 130


def test_a_digest_that_nobody_has_is_told(launch: Launcher, registry: str) -> None:
    wrong = f"{registry}/serve@sha256:{'0' * 64}"
    started = launch("--image", wrong, "m", env=QUICK)
    assert started.code() == 1
    assert f"n1: docker pull {wrong}: " in test_faults.sentence(started.output)


def test_a_local_image_is_pinned_by_its_id(cluster: Cluster, launch: Launcher) -> None:
    """A registry's digest is known only after a pull from there; the id always is."""
    node = cluster.nodes["n1"]
    identity = node.docker("inspect", "--format", "{{.Id}}", "stranger:1").strip()
    started = launch("--image", identity, "m", env=QUICK)
    started.until("READY")
    seen = json.loads(node.docker("inspect", f"trtllm-{started.job}-n1"))[0]
    assert seen["Image"] == identity
    assert started.stop() == 130
    missing = launch("--image", f"sha256:{'0' * 64}", "m", env=QUICK)
    assert missing.code() == 1
    assert "n1: image sha256:0" in test_faults.sentence(missing.output)


def test_verify_stops_before_any_node_loads_what_was_not_saved(
    cluster: Cluster, launch: Launcher, workspace: Path
) -> None:
    forget_image(cluster)
    good = launch(*serve_args("--verify"), env=QUICK)
    good.until("READY")
    assert good.output.count("matches the sidecar") == 1 and good.output.count("there after") == 1
    assert good.stop() == 130
    forget_image(cluster)
    damaged = workspace / TARBALL.name
    for suffix in ("", ".json"):
        shutil.copy(f"{TARBALL}{suffix}", f"{damaged}{suffix}")
    with damaged.open("r+b") as file:
        file.seek(-9, os.SEEK_END)  # where gzip keeps its own sum and the size
        file.write(b"x")
    failed = launch("--image", str(damaged), "--verify", "m", env=QUICK)
    assert failed.code() == 1
    assert f"{damaged} has sha256 " in test_faults.sentence(failed.output)
    assert "there after" not in failed.output
