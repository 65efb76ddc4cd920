"""How a world of ranks lies over the nodes, and what wires it up."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from common.talk import Failure
from launch.engines import World
from launch.findings import Node
from launch.node.messages import Facts
from launch.nodes import Place
from launch.runtimes import runtime
from launch.slurm import Allocation, Share
from launch.spread import (
    Spread,
    check_logs,
    choose_mpi,
    describe,
    expect_spread,
    find_spread,
    pick_mpi,
    spread_over,
)
from tests.conftest import Fakes

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture(autouse=True)
def srun_offers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test has no fake srun, this is what one would offer."""
    if "fakes" not in request.fixturenames:
        monkeypatch.setattr("launch.spread.run", lambda argv: "pmix\npmix_v9\npmi2\n")


def nodes_with(*gpus: int) -> list[Node]:
    return [Node(f"n{i}", Facts(gpus=count)) for i, count in enumerate(gpus)]


def of(size: int) -> World:
    return World(size, 1, 1)


JOB = Place("77", 2, ("srun",))


def has(*gpus: int) -> Place:
    """A job that has so many GPUs of each of its nodes."""
    shares = {f"n{i}": Share(8, count, "") for i, count in enumerate(gpus)}
    return Place("77", len(gpus), ("srun",), Allocation(nodes=tuple(shares), shares=shares))


DOCKER, BARE = (runtime(name).OVER_NODES for name in ("docker", "bare"))


@pytest.mark.parametrize(
    ("world", "gpus", "over_nodes", "words"),
    [
        (of(8), [8], DOCKER, ""),
        (of(8), [8, 8], DOCKER, ""),
        (of(8), [8, 8], BARE, ""),
        (of(4), [8, 2], DOCKER, ""),
        (of(16), [8], DOCKER, r"world size is 16 \(tp 16 .*n0 has only 8 GPUs"),
        (of(17), [8, 8], DOCKER, r"world size is 17 .*the 2 nodes of the job have only 16 GPUs"),
        (of(17), [8, 8], BARE, r"world size is 17 .*the 2 nodes of the job have only 16 GPUs"),
        (World(8, 2, 1), [8, 8], BARE, r"n0 has only 8 GPUs; several nodes need --runtime docker"),
        (of(4), [2, 8], DOCKER, r"unequal numbers of GPUs \(2, 8\)"),
        (of(4), [2, 8], BARE, "n0 has only 2 GPUs"),
        (of(12), [8, 4], DOCKER, r"unequal numbers of GPUs \(8, 4\)"),
        (of(9), [8, 8], DOCKER, "world size is 9 .*does not fill nodes of 8 GPUs evenly"),
        (of(20), [8, 8, 8], DOCKER, "world size is 20 .*does not fill nodes of 8 GPUs evenly"),
        (of(1), [0], DOCKER, "n0 has only 0 GPUs"),
        (of(2), [0, 0], DOCKER, "have only 0 GPUs"),
    ],
)
def test_a_world_that_does_not_fit_is_refused_with_both_numbers(
    world: World, gpus: list[int], over_nodes: bool, words: str
) -> None:
    os.environ.update(MPI="pmix", GPUS="none")
    nodes = nodes_with(*gpus)
    assert find_spread(world, nodes, over_nodes) is None
    os.environ["GPUS"] = "auto"
    if not words:
        assert find_spread(world, nodes, over_nodes) is None
        return
    with pytest.raises(Failure, match=words):
        find_spread(world, nodes, over_nodes)


@pytest.mark.parametrize(
    ("world", "gpus", "nodes", "ranks"),
    [
        (of(16), [8, 8], 2, 8),
        (World(8, 2, 1), [8, 8], 2, 8),
        (World(2, 2, 4), [8, 8], 2, 8),
        (of(16), [8, 8, 8], 2, 8),  # a node that was allocated stays idle
        (of(24), [8, 8, 8], 3, 8),
        (of(4), [1, 1, 1, 1], 4, 1),
        (of(6), [3, 3], 2, 3),
    ],
)
def test_a_world_fills_the_first_nodes(
    world: World, gpus: list[int], nodes: int, ranks: int
) -> None:
    os.environ["MPI"] = "pmix_v9"
    spread = Spread(nodes, ranks, "pmix_v9")
    assert find_spread(world, nodes_with(*gpus), DOCKER) == spread
    assert spread_over(world, gpus, "pmix_v9") == spread
    assert spread.nodes * spread.ranks == world.size


def test_gpus_of_the_allocation_count_and_not_all_of_the_node() -> None:
    os.environ["MPI"] = "pmix"
    nodes = [Node(f"n{i}", Facts(gpus=8), share=Share(8, 2, "4,5")) for i in range(2)]
    assert find_spread(of(4), nodes, DOCKER) == Spread(2, 2, "pmix")
    with pytest.raises(Failure, match="have only 4 GPUs"):
        find_spread(of(8), nodes, DOCKER)


@pytest.mark.parametrize(
    ("asked", "gpus"),
    [("all", 8), ('"device=0,1"', 2), ("device=MIG-a,MIG-b,capabilities=utility", 2), ("2", 2),
     ("driver=nvidia,count=3", 3), ("16", 8)],
)  # fmt: skip
def test_only_gpus_that_are_asked_for_count(asked: str, gpus: int) -> None:
    os.environ["GPUS"] = asked
    for nodes in (nodes_with(8), [replace(nodes_with(8)[0], share=Share(8, 8, ""))]):
        assert find_spread(of(gpus), nodes, DOCKER) is None
        with pytest.raises(Failure, match=f"n0 has only {gpus} GPUs") as raised:
            find_spread(of(gpus + 1), nodes, DOCKER)
        assert (f"(GPUS={asked})" in raised.value.message) == (asked != "all")


def test_the_ranks_of_a_node_are_told_in_words() -> None:
    spread = Spread(3, 8, "pmix")
    assert [spread.ranks_of(i) for i in range(3)] == ["ranks 0-7", "ranks 8-15", "ranks 16-23"]


# What several versions of Slurm print; before 22.05 by srun's log, with its name.
OFFERS = [
    ("srun: MPI types are...\nsrun: none\nsrun: pmi2\nsrun: pmix\nsrun: pmix_v3\n", "pmix"),
    ("srun: MPI types are...\nsrun: pmix\nsrun: pmix_v2\nsrun: none\nsrun: openmpi\n", "pmix"),
    (
        "srun: MPI types are...  \nsrun: pmix_v3\nsrun: pmi2\nsrun: none\nsrun: pmix_v1\n"
        "srun: pmix\nsrun: pmix_v2\nsrun: cray_shasta\n",
        "pmix",
    ),
    ("srun: MPI types are...\nsrun: mpi/none\nsrun: mpi/pmix\nsrun: mpi/pmi2\n", "pmix"),
    ("srun: MPI types are...\nsrun: none\nsrun: pmix_v2\nsrun: pmix_v3\nsrun: pmi2\n", "pmix_v3"),
    (
        "MPI plugin types are...\n\tpmix\n\tnone\n\tcray_shasta\n\tpmi2\n"
        "specific pmix plugin versions available: pmix_v4\n",
        "pmix",
    ),
    (
        "MPI plugin types are...\n\tnone\n\tcray_shasta\n\tpmi2\n\tpmix\n"
        "specific pmix plugin versions available: pmix_v5,pmix_v4\n",
        "pmix",
    ),
    # The link mpi_pmix.so is missing: only the numbered plug-ins can be asked for.
    (
        "MPI plugin types are...\n\tnone\n\tpmi2\n"
        "specific pmix plugin versions available: pmix_v4,pmix_v5\n",
        "pmix_v5",
    ),
    ("MPI plugin types are...\n\tnone\nspecific pmix plugin versions available: pmix_v10,pmix_v9\n",
     "pmix_v10"),
]  # fmt: skip
WITHOUT = [
    "srun: MPI types are...\nsrun: cray_shasta\nsrun: none\nsrun: pmi2\n",
    "srun: MPI types are...\nsrun: none\nsrun: pmi2\nsrun: openmpi\n",
    "MPI plugin types are...\n\tnone\n\tcray_shasta\n\tpmi2\n",
    "",
]


@pytest.mark.parametrize(("offered", "picked"), OFFERS)
def test_pmix_is_picked_from_what_any_slurm_offers(offered: str, picked: str) -> None:
    assert pick_mpi(offered) == picked


@pytest.mark.parametrize("offered", WITHOUT)
def test_a_slurm_without_pmix_is_told_with_what_it_offers(offered: str) -> None:
    with pytest.raises(Failure, match="has no PMIx plug-in") as failure:
        pick_mpi(offered)
    assert " ".join(offered.split()) in failure.value.message


@pytest.mark.parametrize("asked", ["pmi2", "none", "openmpi"])
def test_mpi_that_cannot_reach_into_a_container_is_refused(asked: str) -> None:
    os.environ["MPI"] = asked
    for refuses in (lambda: choose_mpi(asked), lambda: expect_spread(of(16), has(8, 8), DOCKER)):
        with pytest.raises(Failure, match=f"^MPI={asked}: only PMIx reaches ranks in containers"):
            refuses()


def test_srun_is_asked_whether_it_has_the_type(fakes: Fakes) -> None:
    os.environ.update(fakes.environment())
    assert choose_mpi("auto") == "pmix"
    assert choose_mpi("pmix_v4") == "pmix_v4"
    assert fakes.calls() == [["srun", "--mpi=list"]] * 2
    with pytest.raises(Failure, match=r"no MPI type pmix_v9 .srun --mpi=list says: .*pmi2"):
        choose_mpi("pmix_v9")
    fakes.set(mpi="MPI plugin types are...\n\tnone")
    with pytest.raises(Failure, match="no PMIx"):
        find_spread(of(16), nodes_with(8, 8), DOCKER)


def test_an_old_srun_lists_its_types_on_stderr(fakes: Fakes) -> None:
    os.environ.update(fakes.environment())
    fakes.program("srun", f"import sys; print({OFFERS[0][0]!r}, file=sys.stderr)")
    assert choose_mpi("auto") == "pmix"


@pytest.mark.parametrize(
    ("place", "size", "nodes"),
    [
        (JOB, 16, None),  # Slurm hands out no GPUs there
        (has(8, 8), 16, 2),
        (has(8, 8), 8, None),
        (has(4, 4), 8, 2),
        (has(8, 4), 8, None),
        (replace(has(8), size=2), 16, None),  # of one node Slurm does not know
        (Place("local1", 1, ()), 16, None),  # not in an allocation
    ],
)
def test_a_dry_run_expects_what_slurm_says_of_the_job(
    place: Place, size: int, nodes: int | None
) -> None:
    ranks = size // 2
    os.environ["SLURM_GPUS_ON_NODE"] = "1"  # of whatever shell this was
    assert expect_spread(of(size), place, DOCKER) == (
        Spread(nodes, ranks, "pmix") if nodes else None
    )
    os.environ["MPI"] = "pmix_v9"
    found = expect_spread(of(size), place, DOCKER)
    assert (found.mpi if found else None) == ("pmix_v9" if nodes else None)


@pytest.mark.parametrize(
    ("over_nodes", "gpus", "size", "words"),
    [
        (DOCKER, "auto", 24, r"world size is 24 .*the 2 nodes of the job have only 16 GPUs"),
        (DOCKER, "auto", 12, "does not fill nodes of 8 GPUs evenly"),
        (BARE, "auto", 16, "several nodes need --runtime docker"),
        (DOCKER, "none", 24, ""),
    ],
)
def test_a_dry_run_refuses_what_a_launch_would(
    over_nodes: bool, gpus: str, size: int, words: str
) -> None:
    os.environ["GPUS"] = gpus
    if not words:
        assert expect_spread(of(size), has(8, 8), over_nodes) is None
        return
    with pytest.raises(Failure, match=words):
        expect_spread(of(size), has(8, 8), over_nodes)


def test_a_workspace_that_srun_cannot_name_is_refused() -> None:
    spread = Spread(2, 8, "pmix")
    with pytest.raises(Failure, match="has a backslash in its name"):
        check_logs(spread, Path("/a\\b"))
    check_logs(spread, Path("/a b%t"))
    check_logs(None, Path("/a\\b"))


def test_the_plan_is_one_sentence() -> None:
    nodes = ["n1", "n2", "n3"]
    assert describe(None, of(8), nodes) == ("world size 8 (tp 8 x pp 1 x cp 1): all ranks on n1")
    spread = Spread(2, 8, "pmix_v4")
    assert describe(spread, World(8, 2, 1), nodes) == (
        "world size 16 (tp 8 x pp 2 x cp 1): 8 ranks on each of n1, n2 (--mpi=pmix_v4); n1 serves"
    )
