"""Runtime pyxis: what srun is told, what the preflight finds, and the image it is given."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.talk import Failure
from launch import squash
from launch.findings import Node, Wanted
from launch.image import Image
from launch.node.enroot import is_shared
from launch.node.messages import Facts, Holds, Present
from launch.node.pyxis import NOT_INSIDE, Attend, EndSteps, Inside, RankInside
from launch.node.squash import Import, first_error
from launch.nodes import Place
from launch.order import Command
from launch.plan import Plan
from launch.runtimes import pyxis
from launch.slurm import Allocation, Share
from launch.spread import Spread
from tests.conftest import ONE_NODE, Fakes, Script, plan, wait_until

pytestmark = pytest.mark.usefixtures("clean_environment")
SQSH = "/fsx/x.sqsh"
IMAGE = Image(SQSH, tarball=Path(SQSH), squash=True)


def made(gpus: str = "auto", spread: Spread | None = None, cache: str = "") -> Plan:
    shares = {name: Share(8, 8, "0,1,2,3,4,5,6,7") for name in ("n1", "n2")}
    place = Place("41", 2, ("srun", "--overlap", "--export=ALL"), Allocation("41", shares=shares,
                  nodes=("n1", "n2")))  # fmt: skip
    whole = plan(runtime="pyxis", gpus=gpus, cache=cache)
    server = replace(whole.replicas[0], spread=spread)
    return replace(whole, place=place, tag=SQSH, replicas=(server,))


def after(command: Command, words: str) -> list[str]:
    """The words of a command after srun's usual ones."""
    argv = list(command.argv)
    return argv[argv.index(words) + 1 :]


def test_srun_is_told_all_that_a_site_may_decide_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyxis, "step_name", lambda *_: "trtllm-41-x")
    environ = {"HF_TOKEN": "hf_x", "NCCL_DEBUG": "INFO", "HOME": "/home/me", "https_proxy": "p",
               "LD_LIBRARY_PATH": "/x", "PYTHONPATH": "/x", "LANG": "C"}  # fmt: skip
    launched = replace(made(), device_files=("/dev/infiniband",))
    command = pyxis.serve(launched, launched.replicas[0], environ)
    names = "HF_TOKEN,NCCL_DEBUG,NVIDIA_VISIBLE_DEVICES,NVIDIA_DRIVER_CAPABILITIES"
    names += ",MELLANOX_VISIBLE_DEVICES"
    mounts = "/fsx:/fsx,/home/a b:/home/a b,/dev/infiniband:/dev/infiniband"
    assert after(command, "--nodelist=n1")[:10] == [
        "--job-name=trtllm-41-x",
        f"--export=HOME,https_proxy,{names}",
        f"--container-env={names}",
        f"--container-image={SQSH}",
        f"--container-mounts={mounts},/fsx:{pyxis.PROOF}:ro",
        "--container-writable",
        "--no-container-mount-home",
        "--no-container-remap-root",
        "--no-container-entrypoint",
        "--container-workdir=/fsx/work",
    ]
    assert "hf_x" not in str(command.argv) + command.text
    assert "--gpus=8" in command.argv and command.argv[:2] == ["env", "NVIDIA_VISIBLE_DEVICES=all"]


@pytest.mark.parametrize(
    ("gpus", "devices", "visible"),
    [("none", "void", None), ("auto", "all", None), ('"device=2,3"', "all", "2,3")],
)
def test_gpus_are_said_to_enroots_hook_and_to_cuda(
    gpus: str, devices: str, visible: str | None
) -> None:
    launched = made(gpus)
    command = pyxis.serve(launched, launched.replicas[0], {})
    assert f"NVIDIA_VISIBLE_DEVICES={devices}" in command.argv
    assert command.order.environ.get("CUDA_VISIBLE_DEVICES") == visible
    assert ("--gres=none" in command.argv) == (gpus == "none")


def test_ranks_share_a_container_on_each_node_and_have_a_log_each() -> None:
    launched = made(spread=Spread(2, 8, "pmix"), cache="/cache")
    command = pyxis.ranks(launched, launched.replicas[0], Path("/logs/x_rank%t.log"))
    flags = ["--mpi=pmix", "--ntasks=16", "--gpus=16", "--kill-on-bad-exit=1"]
    assert set(flags) <= set(command.argv) and "--output=/logs/x_rank%t.log" in command.argv
    assert isinstance(command.order, RankInside)
    assert command.order.environ == {"PMIX_MCA_gds": "hash", "HF_HOME": "/cache"}
    beside = pyxis.hold(launched, launched.replicas[0], {})
    assert not any("--container" in word for word in beside.argv)
    assert beside.order == Attend(pyxis.step_name(launched, launched.replicas[0]), ["/cache"])


@pytest.mark.parametrize("path", ["/a,b", "/a:b", '/a"b', "/a$b", "/a`b", "/a\nb"])
def test_a_path_that_pyxis_cannot_express_is_refused(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyxis, "is_known", lambda: True)
    pyxis.check(made())
    with pytest.raises(Failure, match="pyxis cannot mount"):
        pyxis.check(replace(made(), mounts=("/fsx", path)))


def test_a_step_is_not_privileged_and_that_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pyxis, "is_known", lambda: True)
    pyxis.check(replace(made(), privileged=True))
    assert "PRIVILEGED=1 does nothing" in capsys.readouterr().err


def test_what_it_needs_of_slurm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyxis, "is_known", lambda: False)
    with pytest.raises(Failure, match="has no --container-image"):
        pyxis.check(made())
    with pytest.raises(Failure, match="needs a job of Slurm's"):
        pyxis.check(plan(runtime="pyxis"))


def found(of: Image = IMAGE, gpus: str = "auto", world: int = 8, **facts: Any) -> list[str]:
    told = replace(Facts(image=SQSH, gpus=8), **facts)
    wanted = Wanted("pyxis", of, 8000, gpus, "trtllm-serve", (), world)
    return [f"{f.state} {f.check}: {f.text}" for f in pyxis.judge(Node("n1", told), wanted)]


def test_the_preflight_says_what_a_node_lacks() -> None:
    assert found() == ["ok image: present"]
    missing: dict[str, Any] = {"image": "", "no_image": f"{SQSH}: Permission denied"}
    assert found(**missing) == [
        f"bad image: the image cannot be read there: {SQSH}: Permission denied"
    ]
    assert found(replace(IMAGE, reference="docker://r.io#x"), **missing) == ["note image: import"]
    assert found(toolkit=False)[1].startswith("bad toolkit: enroot's hook for GPUs needs nvidia")
    assert found(gpus="none", toolkit=False) == ["ok image: present"]
    assert found(gpus="2")[1] == "bad gpus: GPUS=2 does not work with pyxis"
    assert found(efa=4, memlock=8 << 20)[1].startswith("note memlock: only 8192 kB")
    assert found(efa=4, memlock=-1) == ["ok image: present"]
    large = replace(IMAGE, unpacked=20 * 10**9)
    room = "20.0 GB needed to unpack the image"
    assert found(large, data="/data", free=10**9)[1].endswith(room)
    shared: dict[str, Any] = {"data": "/home/me", "data_shared": True}
    assert found(**shared)[1].startswith("note disk: enroot unpacks into /home/me")
    assert found(world=16, **shared)[1].startswith("bad disk: ")


def test_it_is_chosen_where_no_node_has_docker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyxis, "is_known", lambda: True)
    without, silent = (Node("n", Facts(no_docker=why)) for why in (pyxis.NO_DOCKER, "no answer"))
    assert pyxis.is_instead_of_docker([without, without])
    assert not pyxis.is_instead_of_docker([without, silent])
    monkeypatch.setattr(pyxis, "is_known", lambda: False)
    assert not pyxis.is_instead_of_docker([without])


# The image
@pytest.mark.parametrize(
    ("asked", "reference"),
    [
        ("nvcr.io/nvidia/x:1", "docker://nvcr.io#nvidia/x:1"),
        ("docker://h:5000/x:1", "docker://h:5000#x:1"),
        ("h#team/x@sha256:ab", "docker://h#team/x@sha256:ab"),
        ("localhost/x", "docker://localhost#x"),
        ("vllm/vllm-openai:v0.11.0", "docker://vllm/vllm-openai:v0.11.0"),
        ("docker.io/vllm/vllm-openai:latest", "docker://vllm/vllm-openai:latest"),
    ],
)
def test_a_reference_is_imported_into_the_workspace(
    asked: str, reference: str, tmp_path: Path
) -> None:
    image = squash.find_image(asked, tmp_path)
    assert image.reference == reference and image.squash and not image.registry
    assert Path(image.tag).parent == tmp_path and image.tag.endswith(".sqsh")


@pytest.mark.parametrize("asked", ["", "/none.sqsh", "x:1", "/x.tar.gz", "--x/y", "a b/c"])
def test_what_is_no_image_is_told(asked: str, tmp_path: Path) -> None:
    with pytest.raises(Failure) as raised:
        squash.find_image(asked, tmp_path)
    assert "make sqsh" in raised.value.hint


def test_the_default_is_the_workspaces_file(tmp_path: Path) -> None:
    file = tmp_path / squash.DEFAULT
    file.write_bytes(b"hsqs")
    image = squash.find_image("", tmp_path)
    assert (image.tag, image.packed, image.ids) == (str(file), 4, ())


ENROOT = """
import os, sys, time
from pathlib import Path
assert sys.argv[1:3] == ["import", "--output"] and "zstd" in os.environ["ENROOT_SQUASH_OPTIONS"]
if sys.argv[4].endswith("absent"):
    sys.exit("[INFO] Querying registry\\n[ERROR] URL https://r.io/v2/ returned error code: 404\\nx")
with open(os.environ["FAKE_HOME"] + "/imports", "a") as file:
    file.write("x")
time.sleep(0.3)
Path(sys.argv[3]).write_bytes(b"hsqs")
"""
UNSQUASHFS = """
import sys
if "-l" in sys.argv:
    print("squashfs-root/usr/lib/tensorrt_llm-1.2.1.dist-info\\nsquashfs-root/tensorrt_llm-9")
"""


@pytest.fixture
def importing(fakes: Fakes) -> Fakes:
    fakes.program("enroot", ENROOT)
    fakes.program("unsquashfs", UNSQUASHFS)
    return fakes


def test_an_image_is_imported_once_however_many_want_it(
    importing: Fakes, script: Callable[..., Script], tmp_path: Path
) -> None:
    order = Import("docker://r.io#x:1", str(tmp_path / "x.sqsh"), ["tensorrt_llm"])
    both = [script(Command(ONE_NODE, order)) for _ in range(2)]
    for each in both:
        assert each.code() == 0, each.output
        assert each.told[-2:] == [Present(order.path), Holds("tensorrt_llm 1.2.1")]
    assert (importing.home / "imports").read_text() == "x"
    assert not (tmp_path / "x.sqsh.part").exists()


def test_a_colleague_may_take_the_lock_of_an_import_whatever_our_umask(
    importing: Fakes, script: Callable[..., Script], tmp_path: Path
) -> None:
    order = Import("docker://r.io#x:1", str(tmp_path / "x.sqsh"))
    before = os.umask(0o077)
    try:
        ours = script(Command(ONE_NODE, order))
    finally:
        os.umask(before)
    assert ours.code() == 0, ours.output
    assert (tmp_path / ".x.sqsh.lock").stat().st_mode & 0o777 == 0o666


def test_an_import_that_fails_leaves_nothing_and_says_enroots_first_error(
    importing: Fakes, script: Callable[..., Script], tmp_path: Path
) -> None:
    failed = script(Command(ONE_NODE, Import("docker://r.io#absent", str(tmp_path / "x.sqsh"))))
    assert failed.code() == 1
    assert failed.told[-1].why.endswith("URL https://r.io/v2/ returned error code: 404")
    assert [path.name for path in tmp_path.glob("x.sqsh*")] == []


def test_without_an_error_the_last_word_counts() -> None:
    assert first_error("a\nb\n") == "b" and first_error("") == "it said nothing"


# On the node
OF_STEPS = """
import os, sys
from pathlib import Path
words = sorted(name for name in os.environ if name.startswith(("SQUEUE_", "SCANCEL_")))
if words or "SLURM_CLUSTERS" in os.environ:
    sys.exit(0)  # it does not see the step
ended = Path(os.environ["FAKE_HOME"], "ended")
if "scancel" in sys.argv[0]:
    ended.write_text(sys.argv[1])
elif "--all" in sys.argv and not ended.exists():  # a partition may be hidden
    print("77.1 other\\n77.2 mine")
"""


def test_a_step_is_found_and_ended_whatever_the_users_environment_filters(
    fakes: Fakes, script: Callable[..., Script]
) -> None:
    fakes.program("squeue", OF_STEPS)
    fakes.program("scancel", OF_STEPS)
    names = ("SQUEUE_STATES", "SQUEUE_PARTITION", "SCANCEL_STATE", "SLURM_CLUSTERS")
    order = script(Command((), EndSteps(["mine"])), SLURM_JOB_ID="77", **dict.fromkeys(names, "x"))
    assert order.code() == 0 and order.told == []
    assert (fakes.home / "ended").read_text() == "77.2"


def test_what_is_not_in_the_container_starts_nothing(script: Callable[..., Script]) -> None:
    for order in (
        Inside(["touch", "/x"], [], 0, "/nowhere/proof"),
        RankInside("x", "", ["touch", "/x"], "leader", "engine", proof="/nowhere/proof"),
    ):
        outside = script(Command(ONE_NODE, order))
        assert outside.code() == NOT_INSIDE
        assert "does not load the plug-in: this step runs on the bare node" in outside.output


def test_a_rank_ends_with_its_input_and_takes_its_session_along(
    script: Callable[..., Script], tmp_path: Path
) -> None:
    words = ["sh", "-c", 'sleep 1000 & echo "$X"; wait']
    order = RankInside("x", "", words, "leader", "sleep", proof=str(tmp_path), environ={"X": "it"})
    rank = script(Command(ONE_NODE, order))
    rank.until_said("it")
    begun = time.monotonic()
    rank.close()
    assert rank.code() == 143 and time.monotonic() - begun < 10


def test_sigkill_of_a_ranks_order_ends_its_session(
    script: Callable[..., Script], tmp_path: Path
) -> None:
    """Also where Slurm does not find what is no longer a child of it."""
    words = ["sh", "-c", f"sh -c 'echo $$ >{tmp_path}/pid; sleep 1000' & wait"]
    order = RankInside("x", "", words, "leader", "sleep", proof=str(tmp_path))
    rank = script(Command((), order))
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
    pid = int((tmp_path / "pid").read_text())
    rank.process.kill()
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_a_file_system_that_nodes_share_is_known(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/x / ext4 rw 0 0\ns:/h /home nfs4 rw 0 0\n/dev/y /home/me/own xfs rw 0 0\n"
    )
    shared = [is_shared(path, str(mounts)) for path in ("/home/me", "/home/me/own/x", "/homes")]
    assert shared == [True, False, False]


def test_the_words_after_which_pyxis_is_blamed() -> None:
    assert pyxis.blames(1, "slurmstepd: error: pyxis: couldn't chdir to /x") != ""
    assert pyxis.blames(NOT_INSIDE, "") != "" == pyxis.blames(1, "ValueError: x")
