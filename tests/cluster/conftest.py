"""The cluster for a test session, and launches that must leave nothing behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Cluster, why_not
from tests.cluster.launches import PYTHON, REPO, WHOLE, Launch, prepare, strangers, traces

Launcher = Callable[..., Launch]
# Tests on a cluster mostly wait, so there are three clusters, each busy for about as long. The
# second one has four nodes.
OF_A_CLUSTER = {
    "test_matrix.py": 1,
    **dict.fromkeys(("test_multinode.py", "test_serve.py", "test_fleet.py", "test_tune.py"), 2),
}


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests come before those that need a cluster, and each cluster's tests are a group.

    Tests that wait for a minute begin first: the other processes of a `make check` go on beside
    them. Those that measure come last: by then the other processes are done.
    """
    on_cluster = {item for item in items if Path(__file__).parent in item.path.parents}
    measures = {item for item in on_cluster if item.path.name == "test_bench.py"}
    asleep = {item for item in items if "minute" in item.keywords}
    items.sort(key=lambda item: (item not in asleep, item in on_cluster, item in measures))
    for item in on_cluster:
        item.add_marker(pytest.mark.xdist_group(f"cluster-{OF_A_CLUSTER.get(item.path.name, 3)}"))


def available_memory() -> float:
    """In bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(float(line.split()[1]) for line in lines if "MemAvailable" in line)


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Two nodes (four in the partition `all`, if its tests ask for them), with an image tarball and
    a stranger's container on each."""
    if reason := why_not():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no cluster here: {reason}")
    if (
        os.environ.get("PYTEST_XDIST_WORKER")
        and "@cluster-" not in request.session.items[-1].nodeid
    ):
        pytest.fail("pytest-xdist does not keep groups together (--dist=loadgroup; does it know "
                    "this pytest?): every process would build a cluster of its own")  # fmt: skip
    group = os.environ["PYTEST_CURRENT_TEST"].partition("@cluster-")[2][:1]  # "": all of them
    nodes = 4 if group in ("", "2") else 2
    with Cluster(nodes, default=2, in_memory=available_memory() > 8e9) as cluster:
        prepare(cluster)
        yield cluster


@pytest.fixture
def workspace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory on the shared file system."""
    path = Path("/fsx/work") / re.sub(r"\W+", "-", request.node.name)[:60]
    path.mkdir(parents=True)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def launch(cluster: Cluster, workspace: Path) -> Iterator[Launcher]:
    """Start a script of ours; afterwards nothing of it is left, nothing of others touched."""
    before = strangers(cluster)
    launches: list[Launch] = []

    def start(
        *args: str, salloc: str = WHOLE, script: str = "run_sbatch.py", **options: Any
    ) -> Launch:
        command = [PYTHON, str(REPO / script), *args]
        if salloc:
            command = ["salloc", *salloc.split(), *command]
        launches.append(Launch(cluster, workspace, command, **options))
        return launches[-1]

    yield start
    for each in launches:
        if each.process.poll() is None:
            each.send(signal.SIGTERM)
        output, code = each.output, each.code()
        assert "Traceback" not in output, output
        assert code is not None
    assert traces(cluster, workspace) == []
    assert strangers(cluster) == before
