"""The decisions of a launch: who we are, what is mounted, which paths the nodes have to see."""

from __future__ import annotations

import argparse
import os
import pwd
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.talk import Failure
from launch.engines import engine
from launch.engines.trtllm import config_of
from launch.plan import (
    check_links,
    check_mounted,
    find_caches,
    find_mounts,
    leading_out,
    local_paths,
    say_unmounted,
    user_name,
)

pytestmark = pytest.mark.usefixtures("clean_environment")


def test_who_we_are_is_no_variables_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "somebody-else")
    assert user_name() == pwd.getpwuid(os.geteuid()).pw_name
    monkeypatch.setattr(os, "geteuid", lambda: 2**31 - 9)
    assert user_name() == str(2**31 - 9)


def mounts_of(
    workspace: Path, mount: str, cache: Path, asked: str | None = None, paths: Sequence[Path] = ()
) -> list[Path]:
    args = argparse.Namespace(
        workspace=workspace.resolve(),
        called_workspace=str(workspace),
        container_mount=mount,
        asked_mount=asked,
    )
    return find_mounts(args, [cache], paths)


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


@pytest.mark.parametrize(("workspace", "mount"), [("/", "/no/such"), ("w", "/"), ("w", "root")])
def test_the_root_cannot_be_mounted(tmp_path: Path, workspace: str, mount: str) -> None:
    """Docker says so only once the image has been loaded. A job may have begun in /."""
    (tmp_path / "w").mkdir()
    (tmp_path / "root").symlink_to("/")
    with pytest.raises(Failure, match="/ cannot be mounted into the container") as failure:
        mounts_of(tmp_path / workspace, str(tmp_path / mount), tmp_path / "c")
    assert "--workspace" in failure.value.hint


def test_a_mount_that_is_a_link_is_seen_by_both_names(tmp_path: Path) -> None:
    (tmp_path / "mnt/fsx/m").mkdir(parents=True)
    (tmp_path / "fsx").symlink_to(tmp_path / "mnt/fsx")
    mounts = mounts_of(tmp_path / "mnt/fsx", f"{tmp_path}/fsx", tmp_path / "c")
    assert mounts == [tmp_path / "mnt/fsx", tmp_path / "fsx", tmp_path / "c"]
    check_mounted([tmp_path / "fsx/m", tmp_path / "mnt/fsx/m"], mounts)


def test_a_cache_that_a_link_leads_out_of_a_mount_is_mounted_itself(tmp_path: Path) -> None:
    """As where a home is small, and ~/.cache/huggingface leads to /scratch."""
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    for made in (home, scratch / "hf"):
        made.mkdir(parents=True)
    (home / "hf").symlink_to(scratch / "hf")
    assert mounts_of(home, f"{tmp_path}/none", home / "hf") == [home, home / "hf"]
    assert mounts_of(tmp_path, f"{tmp_path}/none", home / "hf") == [tmp_path]


def test_what_links_within_a_cache_lead_to_is_mounted_by_the_name_they_give_it(
    tmp_path: Path,
) -> None:
    """As where hub/ has been moved to a larger disk, or a model has been downloaded elsewhere."""
    cache, disk = tmp_path / "hf", tmp_path / "disk"
    for made in (cache, disk / "hub", disk / "m", disk / "other"):
        made.mkdir(parents=True)
    (tmp_path / "scratch").symlink_to(disk)  # what a link names need not be what is there
    (cache / "hub").symlink_to(tmp_path / "scratch/hub")
    (disk / "hub/models--org--m").symlink_to("../m")
    (disk / "hub/models--org--n").symlink_to("../other")
    (cache / "models--org--m").symlink_to("/no/such")
    found = leading_out([cache], ["org/m", "x" * 5000, "/a/path", "\0"])
    assert found == [tmp_path / "scratch/hub", tmp_path / "scratch/m"]


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
    assert "/no/such does not exist here" in capfd.readouterr().err


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


def test_a_file_of_a_model_that_leads_out_of_the_mounts_is_refused(tmp_path: Path) -> None:
    """As in a folder that a colleague has downloaded to, whose files are in their own cache."""
    fsx, model, theirs = tmp_path / "fsx", tmp_path / "fsx/real/m", tmp_path / "theirs"
    for made in (fsx / "real/blobs", model, theirs):
        made.mkdir(parents=True)
    for blob in (fsx / "real/blobs/1", theirs / "2"):
        blob.touch()
    (fsx / "m").symlink_to("real/m")
    (model / "config.json").symlink_to("../blobs/1")  # as in a cache's snapshots
    (model / "folder").symlink_to(theirs)
    (model / "gone").symlink_to("/no/such")
    (model / "README.md").symlink_to(theirs / "2")  # no engine reads it
    check_links([fsx / "m", fsx / "c.yaml", Path("/no/such")], [fsx])
    (model / "model.safetensors").symlink_to(theirs / "2")
    words = f"{model}/model.safetensors leads to {theirs}/2, which is not mounted into the"
    with pytest.raises(Failure, match=re.escape(words)) as failure:
        check_links([fsx / "m"], [fsx])
    assert "--container-mount" in failure.value.hint
    check_links([fsx / "m"], [fsx, theirs])
    (tmp_path / "scratch").symlink_to(fsx)  # what is mounted by another name
    check_links([fsx / "m"], [tmp_path / "scratch", theirs])


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
    assert local_paths(model, config_of(args)) == [Path.cwd() / path for path in paths]


def test_a_mount_that_only_the_nodes_have_is_theirs_to_judge(tmp_path: Path) -> None:
    args = argparse.Namespace(
        workspace=tmp_path,
        called_workspace=str(tmp_path),
        container_mount="/no/such",
        asked_mount="/no/such",
    )
    assert find_mounts(args, [tmp_path], elsewhere=True) == [Path("/no/such"), tmp_path]
    with pytest.raises(Failure, match="/no/such is not a directory here"):
        find_mounts(args, [tmp_path])
    args.container_mount = args.asked_mount = str(tmp_path / "file")
    (tmp_path / "file").touch()
    with pytest.raises(Failure, match="is not a directory here"):
        find_mounts(args, [tmp_path], elsewhere=True)


def test_every_cache_of_hugging_face_is_a_directory_to_mount(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("HF_HOME", raising=False)
    environ = {"HF_HUB_CACHE": "/scratch/hub", "HF_XET_CACHE": "~/x", "HF_DATASETS_CACHE": ""}
    environ |= {"HF_TOKEN": "x", "HF_HUB_OFFLINE": "1"}
    assert find_caches(environ, engine("trtllm")) == (
        ("HF_HOME", "/h/.cache/huggingface"),
        ("HF_HUB_CACHE", "/scratch/hub"),
        ("HF_XET_CACHE", "/h/x"),
    )


def test_a_file_that_the_container_will_not_see_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "topo.xml").touch()
    named = f"{tmp_path}/topo.xml"
    environ = {"NCCL_TOPO_FILE": named, "FI_X": "/no/such", "OTHER": named, "NCCL_DEBUG": "WARN"}
    say_unmounted(environ, [tmp_path])
    assert capsys.readouterr().err == ""
    say_unmounted(environ, [Path("/fsx")])
    words = f"NCCL_TOPO_FILE: {named} is not mounted into the container (--container-mount)\n"
    assert capsys.readouterr().err.endswith(words)
    say_unmounted({"NCCL_X": "/" + "n" * 5000}, [])  # no name of a file
