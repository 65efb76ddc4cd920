"""The decisions of a launch: what is served, what is mounted, how a world lies over the nodes."""

from __future__ import annotations

import argparse
import os
import pwd
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from launch.parallelism import World

from common.talk import Failure
from launch.nodes import Place
from launch.plan import (
    Plan,
    Spread,
    check_logs,
    check_mounted,
    choose_mpi,
    describe,
    engine_arguments,
    expect_spread,
    find_mounts,
    find_spread,
    local_paths,
    pick_mpi,
    spread_over,
    user_name,
)
from launch.preflight import Node
from tests.conftest import Fakes, plan

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture(autouse=True)
def srun_offers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test has no fake srun, this is what one would offer."""
    if "fakes" not in request.fixturenames:
        monkeypatch.setattr("launch.plan.run", lambda argv: "pmix\npmix_v9\npmi2\n")


@pytest.mark.parametrize(
    ("rest", "model", "args", "port"),
    [
        (["m"], "m", ["--host", "0.0.0.0", "--port", "8000"], 8000),
        ([], "Qwen/Qwen2.5-7B-Instruct", ["--host", "0.0.0.0", "--port", "8000"], 8000),
        (["m", "--port", "1"], "m", ["--port", "1", "--host", "0.0.0.0"], 1),
        (["--port=65535", "m"], "m", ["--port=65535", "--host", "0.0.0.0"], 65535),
        (["m", "--host", "::"], "m", ["--host", "::", "--port", "8000"], 8000),
        (["m", "--host=h", "--port=5"], "m", ["--host=h", "--port=5"], 5),
        (
            ["m", "--config=c"],
            "m",
            ["--extra_llm_api_options=c", "--host", "0.0.0.0", "--port", "8000"],
            8000,
        ),
    ],
)
def test_host_and_port_are_added_unless_given(
    rest: list[str], model: str, args: list[str], port: int
) -> None:
    assert engine_arguments(rest) == (model, args, port)


def test_the_models_and_ports_settings_count() -> None:
    os.environ.update(MODEL="e", PORT="81")
    assert engine_arguments([])[::2] == ("e", 81)


def test_who_we_are_is_no_variables_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "somebody-else")
    assert user_name() == pwd.getpwuid(os.geteuid()).pw_name
    monkeypatch.setattr(os, "geteuid", lambda: 2**31 - 9)
    assert user_name() == str(2**31 - 9)


@pytest.mark.parametrize("port", ["0", "65536", "x", "-1", "80.0", " 80", "²", "9" * 5000])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(Failure, match="not a number from 1 to 65535"):
        engine_arguments(["m", f"--port={port}"])


def mounts_of(
    workspace: Path, mount: str, cache: Path, asked: str | None = None, paths: Sequence[Path] = ()
) -> list[Path]:
    args = argparse.Namespace(
        workspace=workspace.resolve(),
        called_workspace=str(workspace),
        container_mount=mount,
        asked_mount=asked,
    )
    return find_mounts(args, cache, paths)


def test_every_directory_is_mounted_once(tmp_path: Path) -> None:
    fsx, home = tmp_path / "fsx", tmp_path / "home"
    (fsx / "work").mkdir(parents=True)
    assert mounts_of(fsx / "work", str(fsx), home) == [fsx, home]
    assert mounts_of(fsx, str(fsx), fsx / "cache") == [fsx]
    assert mounts_of(home, str(fsx), home) == [fsx, home]
    assert mounts_of(fsx / "work", str(fsx / "work"), fsx / "works") == [
        fsx / "work",
        fsx / "works",
    ]


def test_a_mount_that_is_a_link_is_seen_by_both_names(tmp_path: Path) -> None:
    (tmp_path / "mnt/fsx/m").mkdir(parents=True)
    (tmp_path / "fsx").symlink_to(tmp_path / "mnt/fsx")
    mounts = mounts_of(tmp_path / "mnt/fsx", f"{tmp_path}/fsx", tmp_path / "c")
    assert mounts == [tmp_path / "mnt/fsx", tmp_path / "fsx", tmp_path / "c"]
    check_mounted([tmp_path / "fsx/m", tmp_path / "mnt/fsx/m"], mounts)


def test_a_workspace_that_is_a_link_is_seen_by_both_names(tmp_path: Path) -> None:
    (tmp_path / "real/m").mkdir(parents=True)
    (tmp_path / "called").symlink_to(tmp_path / "real")
    paths = [tmp_path / "called/m"]
    mounts = mounts_of(tmp_path / "called", f"{tmp_path}/none", tmp_path / "c", paths=paths)
    assert mounts == [tmp_path / "real", tmp_path / "called", tmp_path / "c"]
    check_mounted(paths, mounts)
    # Only where something is called by it: other nodes may not have the link.
    mounts = mounts_of(tmp_path / "called", f"{tmp_path}/none", tmp_path / "c")
    assert mounts == [tmp_path / "real", tmp_path / "c"]


def test_a_default_mount_that_is_not_there_is_left_out_with_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert mounts_of(tmp_path, "/no/such", tmp_path / "c") == [tmp_path]
    assert "there is no /no/such on this machine" in capfd.readouterr().err


@pytest.mark.parametrize("mount", ["/no/such", "~no-such-user/x", "/" + "n" * 300])
def test_a_mount_that_was_asked_for_has_to_be_there(tmp_path: Path, mount: str) -> None:
    with pytest.raises(Failure, match="is not a directory here"):
        mounts_of(tmp_path, mount, tmp_path / "c", asked=mount)


@pytest.mark.parametrize(
    ("path", "fine"),
    [
        ("fsx", True),
        ("fsx/a b/c", True),
        ("fsx/../fsx/x", True),
        ("fsxx", False),
        ("fsx/../x", False),
        ("fsx/out", False),  # a link that leads out
        ("link/m", False),  # a link that leads in: the container does not have it
    ],
)
def test_what_the_container_would_not_see_is_refused(tmp_path: Path, path: str, fine: bool) -> None:
    fsx = tmp_path / "fsx"
    fsx.mkdir()
    (fsx / "m").mkdir()
    (fsx / "out").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(fsx)
    if fine:
        check_mounted([tmp_path / path], [fsx])
        return
    with pytest.raises(Failure, match="is not mounted into the container") as failure:
        check_mounted([tmp_path / path], [fsx])
    assert "--container-mount" in failure.value.hint


def test_a_cache_behind_a_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "big/cache").mkdir(parents=True)
    (tmp_path / "home").symlink_to(tmp_path / "big")
    cache = tmp_path / "home/cache"
    check_mounted([cache / "m"], [cache])


@pytest.mark.parametrize(
    ("model", "args", "paths"),
    [
        ("org/m", [], []),
        ("m", [], []),
        ("/m", [], ["/m"]),
        ("./m", [], ["m"]),
        ("../m", [], ["../m"]),
        ("there", [], ["there"]),
        ("org/m", ["--extra_llm_api_options", "c.yaml"], ["c.yaml"]),
        ("/m", ["--extra_llm_api_options=/c"], ["/m", "/c"]),
        ("n" * 300, [], []),
    ],
)
def test_local_paths_are_the_model_and_config_that_are_files(
    model: str, args: list[str], paths: list[str]
) -> None:
    Path("there").mkdir()
    assert local_paths(model, args) == [Path.cwd() / path for path in paths]


def nodes_with(*gpus: int) -> list[Node]:
    return [Node(f"n{i}", {"gpus": str(count)}) for i, count in enumerate(gpus)]


def of(size: int) -> World:
    return World(size, 1, 1)


AUTO = replace(plan(gpus="auto"), place=Place("77", 2, ("srun",)))
BARE = replace(AUTO, runtime="bare")


@pytest.mark.parametrize(
    ("world", "gpus", "made", "words"),
    [
        (of(8), [8], AUTO, ""),
        (of(8), [8, 8], AUTO, ""),
        (of(8), [8, 8], BARE, ""),
        (of(4), [8, 2], AUTO, ""),
        (of(16), [8], AUTO, r"world size is 16 \(tp 16 .*the 1 node\(s\) have 8 GPU"),
        (of(17), [8, 8], AUTO, r"world size is 17 .*the 2 node\(s\) have 16 GPU"),
        (of(17), [8, 8], BARE, r"world size is 17 .*the 2 node\(s\) have 16 GPU"),
        (World(8, 2, 1), [8, 8], BARE, r"n0 has 8 GPU\(s\): more nodes need --runtime docker"),
        (of(4), [2, 8], AUTO, r"unequal numbers of GPUs \(2, 8\)"),
        (of(4), [2, 8], BARE, "n0 has 2 GPU"),
        (of(12), [8, 4], AUTO, r"unequal numbers of GPUs \(8, 4\)"),
        (of(9), [8, 8], AUTO, "world size is 9 .*does not fill nodes of 8 GPUs evenly"),
        (of(20), [8, 8, 8], AUTO, "world size is 20 .*does not fill nodes of 8 GPUs evenly"),
        (of(1), [0], AUTO, "have 0 GPU"),
        (of(2), [0, 0], AUTO, "have 0 GPU"),
    ],
)
def test_a_world_that_does_not_fit_is_refused_with_both_numbers(
    world: World, gpus: list[int], made: Plan, words: str
) -> None:
    os.environ["MPI"] = "pmix"
    nodes = nodes_with(*gpus)
    assert find_spread(world, nodes, replace(made, gpus="none")) is None
    if not words:
        assert find_spread(world, nodes, made) is None
        return
    with pytest.raises(Failure, match=words):
        find_spread(world, nodes, made)


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
    assert find_spread(world, nodes_with(*gpus), AUTO) == spread
    assert spread_over(world, gpus, "pmix_v9") == spread
    assert spread.nodes * spread.ranks == world.size


def test_gpus_of_the_allocation_count_and_not_all_of_the_node() -> None:
    os.environ["MPI"] = "pmix"
    nodes = [Node(f"n{i}", {"gpus": "8", "allocated": "4,5"}) for i in range(2)]
    assert find_spread(of(4), nodes, AUTO) == Spread(2, 2, "pmix")
    with pytest.raises(Failure, match="have 4 GPU"):
        find_spread(of(8), nodes, AUTO)


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
    os.environ["MPI"], environ = asked, {"SLURM_GPUS_ON_NODE": "8"}
    for refuses in (lambda: choose_mpi(asked), lambda: expect_spread(of(16), AUTO, environ)):
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
        find_spread(of(16), nodes_with(8, 8), AUTO)


def test_an_old_srun_lists_its_types_on_stderr(fakes: Fakes) -> None:
    os.environ.update(fakes.environment())
    fakes.program("srun", f"import sys; print({OFFERS[0][0]!r}, file=sys.stderr)")
    assert choose_mpi("auto") == "pmix"


@pytest.mark.parametrize(
    ("environ", "size", "nodes"),
    [
        ({}, 16, None),
        ({"SLURM_GPUS_ON_NODE": "8"}, 16, 2),
        ({"SLURM_GPUS_ON_NODE": "8"}, 8, None),
        ({"SLURM_GPUS_ON_NODE": "4"}, 8, 2),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS_PER_NODE": "8"}, 8, 2),
        ({"SLURM_GPUS_PER_NODE": "8"}, 16, 2),
        ({"SLURM_GPUS_PER_NODE": "h100:8"}, 16, 2),
        ({"SLURM_GPUS_PER_NODE": "gpu:h100:8"}, 16, 2),
        ({"SLURM_GPUS_PER_NODE": "gpu"}, 16, None),
        ({"SLURM_GPUS_ON_NODE": "0"}, 16, None),
        ({"SLURM_GPUS_ON_NODE": "²"}, 16, None),
    ],
)
def test_a_dry_run_expects_what_the_allocation_suggests(
    environ: dict[str, str], size: int, nodes: int | None
) -> None:
    ranks = size // 2
    assert expect_spread(of(size), AUTO, environ) == (
        Spread(nodes, ranks, "pmix") if nodes else None
    )
    os.environ["MPI"] = "pmix_v9"
    found = expect_spread(of(size), AUTO, environ)
    assert (found.mpi if found else None) == ("pmix_v9" if nodes else None)
    assert expect_spread(of(size), plan(gpus="auto"), environ) is None  # not in an allocation


@pytest.mark.parametrize(
    ("made", "size", "words"),
    [
        (AUTO, 24, r"world size is 24 .*the 2 node\(s\) have 16 GPU"),
        (AUTO, 12, "does not fill nodes of 8 GPUs evenly"),
        (BARE, 16, "more nodes need --runtime docker"),
        (replace(AUTO, gpus="none"), 24, ""),
    ],
)
def test_a_dry_run_refuses_what_a_launch_would(made: Plan, size: int, words: str) -> None:
    environ = {"SLURM_GPUS_ON_NODE": "8"}
    if not words:
        assert expect_spread(of(size), made, environ) is None
        return
    with pytest.raises(Failure, match=words):
        expect_spread(of(size), made, environ)


def test_a_workspace_that_srun_cannot_name_is_refused() -> None:
    spread = replace(AUTO, spread=Spread(2, 8, "pmix"))
    with pytest.raises(Failure, match="has a backslash in its name"):
        check_logs(spread, Path("/a\\b"))
    check_logs(spread, Path("/a b%t"))
    check_logs(AUTO, Path("/a\\b"))


def test_the_plan_is_one_sentence() -> None:
    nodes = [Node("n1"), Node("n2"), Node("n3")]
    assert describe(AUTO, of(8), nodes) == (
        "world size 8 (tp 8 x pp 1 x cp 1): all of it on n1, which serves"
    )
    spread = replace(AUTO, spread=Spread(2, 8, "pmix_v4"))
    assert describe(spread, World(8, 2, 1), nodes) == (
        "world size 16 (tp 8 x pp 2 x cp 1): 8 ranks on each of n1, n2 (--mpi=pmix_v4); n1 serves"
    )
