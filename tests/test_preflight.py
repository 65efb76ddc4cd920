"""What nodes tell about themselves, and what is made of it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import time
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from common.talk import Failure
from launch import preflight
from launch.findings import Finding, Node, Wanted
from launch.identity import here, launcher
from launch.image import NONE, Image
from launch.node import facts as survey
from launch.node.facts import network
from launch.node.messages import Container, Facts
from launch.nodes import Place
from launch.order import read
from launch.preflight import gather, judge, must_provide, orphans, ours_already
from launch.slurm import Allocation, Share
from tests.conftest import HOSTILE, ONE_NODE, TAG, Fakes, free_port, wait_until

pytestmark = pytest.mark.usefixtures("clean_environment")

HERE = Place("local1", 1, ())
TARBALL = Image(TAG, Path("/x.tar"), "gz", ("sha256:c",), "", 3_000_000_000, 20_000_000_000)
GOOD = Facts(
    gpus=8,
    docker="27.0.1",
    image="sha256:c",
    layers="[]",
    free=100_000_000_000,
    store="overlay2",
)


def wanted(image: Image = TARBALL, runtime: str = "docker", gpus: str = "auto") -> Wanted:
    return Wanted(runtime, image, 8000, gpus, "trtllm-serve", ())


def told(text: str) -> list[Node]:
    return gather(read(text.splitlines()))


def node(called: str = "n1", /, **changes: Any) -> Node:
    return Node(called, replace(GOOD, **changes))


def share(ids: str, of: int = 8) -> Share:
    return Share(of, len(ids.split(",")) if ids else 0, ids)


def states(findings: list[Finding]) -> dict[str, tuple[str, str]]:
    return {f.check: (f.state, f.text) for f in findings}


def a_container(called: str) -> dict[str, str]:
    return vars(Container(called, "x", "66", "l:1:2", "me"))


def test_nodes_are_gathered_head_first() -> None:
    messages = [
        {"node": "n2", "Facts": {"rank": 1}},
        {"node": "n10", "Facts": {"rank": 2}},
        {"node": "n2", "Container": a_container("a b")},
        {"node": "n1", "Facts": {"rank": 0, "gpus": 8, "unseen": ["/a b", "/c"]}},
        {"node": "n2", "Container": a_container("c d")},
    ]
    nodes = told("some talk\n" + "\n".join(map(json.dumps, messages)))
    assert [n.name for n in nodes] == ["n1", "n2", "n10"]
    assert nodes[0].facts == Facts(rank=0, gpus=8, unseen=["/a b", "/c"])
    assert [each.id for each in nodes[1].containers] == ["a b", "c d"]


@pytest.mark.parametrize("text", ["", "talk\n", "a\tgpus\t8\n", '{"node": "n1"}\n', "{}\n"])
def test_talk_makes_no_node(text: str) -> None:
    assert told(text) == []


@pytest.mark.parametrize(
    ("gpus", "share", "count"),
    [(8, None, 8), (8, share("0,1,2"), 3), (0, None, 0), (0, share("0,1"), 2), (8, share(""), 0)],
)
def test_the_gpus_of_the_job_count(gpus: int, share: Share | None, count: int) -> None:
    assert replace(node(gpus=gpus), share=share).gpus == count


@pytest.mark.parametrize(
    ("asked", "there", "share", "state", "text"),
    [
        ("auto", 8, share("0,1"), "ok", "2"),
        ("auto", 0, share("0,1"), "ok", "2"),  # a machine that shows no devices
        ("auto", 8, share(""), "bad", "the job has no GPU there"),
        ("none", 8, share(""), "ok", "not asked for"),
        # Slices of GPUs, and GPUs that Slurm knows nothing of: its numbers are not Docker's.
        ("auto", 1, share("0,1", of=7), "bad", "Slurm hands out 7 GPUs, but there are 1 devices"),
        ("auto", 8, share("0,1", of=4), "bad", "Slurm hands out 4 GPUs, but there are 8 devices"),
        ("auto", 8, Share(8, 2, ""), "bad", "Slurm does not say which GPUs"),
        ("auto", 8, Share(8, 1, ""), "bad", "Slurm does not say which GPUs"),
        ('"device=MIG-1,0:1"', 1, share("0,1", of=7), "ok", "2"),
        ('"device=0,1"', 8, share("0,1"), "ok", "2"),
        ('"device=GPU-abc"', 8, share("0,1"), "ok", "2"),
        ('"device=1,2"', 8, share("0,1"), "bad", 'GPUS="device=1,2" takes GPUs that the job'),
        ("device=2", 8, share("0,1"), "bad", "GPUS=device=2 takes GPUs that the job does not"),
        ("all", 8, share("0,1"), "bad", "GPUS=all takes GPUs that the job does not have"),
        ("all", 1, share("0,1", of=7), "bad", "GPUS=all takes GPUs that the job does not have"),
        ("2", 8, share("0,1"), "bad", "GPUS=2 takes GPUs that the job does not have"),
        ("all", 8, share("0,1,2,3,4,5,6,7"), "ok", "8"),
        (
            "device=7,8",
            8,
            share("0,1,2,3,4,5,6,7"),
            "note",
            "GPUS=device=7,8 names GPU 8, and there",
        ),
        ("device=8", 8, None, "note", "GPUS=device=8 names GPU 8, and there are 8 devices"),
        ("device=0", 0, share("0,1,2,3,4,5,6,7"), "ok", "8"),  # a machine that shows no devices
        ("device=MIG-8,7:1,7", 8, None, "ok", "8"),
    ],
)
def test_no_gpu_of_somebody_else_is_taken(
    asked: str, there: int, share: Share | None, state: str, text: str
) -> None:
    found = judge([replace(node(gpus=there), share=share)], wanted(gpus=asked))
    assert states(found)["gpus"][0] == state
    assert states(found)["gpus"][1].startswith(text)


@pytest.mark.parametrize(
    ("changes", "check", "state", "text"),
    [
        ({}, "docker", "ok", "27.0.1"),
        ({}, "image", "ok", "present"),
        ({}, "gpus", "ok", "8"),
        ({}, "port", "ok", "8000 free"),
        ({}, "devices", "ok", "0 EFA"),
        ({"efa": 4, "gdrdrv": True}, "devices", "ok", "4 EFA, gdrdrv"),
        ({"no_docker": "no socket"}, "docker", "bad", "Docker does not answer: no socket"),
        ({"image": ""}, "image", "note", "load"),
        ({"image": "sha256:x"}, "image", "note", f"load (another {TAG} is there)"),
        ({"image": ""}, "disk", "ok", "100.0 GB free"),
        (
            {"image": "", "free": 39_999_999_999},
            "disk",
            "bad",
            f"not enough disk space: 40.0 GB free for Docker, 40.0 GB needed to load {TAG}",
        ),
        ({"image": "", "free": 40_000_000_000}, "disk", "ok", "40.0 GB free"),
        ({"image": "", "free": 0}, "disk", "bad", "not enough disk space: 0.0 GB free"),
        ({"gpus": 0}, "gpus", "bad", "no GPU found"),
        ({"taken": {"8000": ""}}, "port", "bad", "port 8000 is taken"),
        (
            {"taken": {"8000": '"nginx",pid=1'}},
            "port",
            "bad",
            'port 8000 is taken by "nginx",pid=1',
        ),
    ],
)
def test_every_check_of_the_head_node(
    changes: dict[str, Any], check: str, state: str, text: str
) -> None:
    found = states(judge([node(**changes)], wanted()))[check]
    assert found[0] == state
    assert found[1].startswith(text)


def test_a_full_disk_does_not_matter_where_the_image_is() -> None:
    assert "disk" not in states(judge([node(free=0)], wanted()))


def test_the_port_and_gpus_of_other_nodes_do_not_matter() -> None:
    findings = judge([node(), node("n2", gpus=0, taken={"8000": ""})], wanted())
    assert [f for f in findings if f.state == "bad"] == []


def test_nothing_is_said_of_an_image_where_docker_does_not_answer() -> None:
    found = states(judge([node(no_docker="x", image="")], wanted()))
    assert "image" not in found and "disk" not in found


def test_gpus_that_nobody_asked_for_are_not_missed() -> None:
    found = states(judge([node(gpus=0)], wanted(gpus="none")))
    assert found["gpus"] == ("ok", "not asked for")


def test_a_local_tag_that_is_missing_cannot_be_helped() -> None:
    [bad] = [f for f in judge([node(image="")], wanted(Image("mine:1"))) if f.state == "bad"]
    assert bad.text == "image mine:1 is not on this node"
    assert "make docker" in bad.hint and "docker.io" not in bad.hint


def test_a_name_that_may_be_of_docker_hub_is_shown_as_one() -> None:
    [bad] = [f for f in judge([node(image="")], wanted(Image("v/m:1"))) if f.state == "bad"]
    assert "--image docker.io/v/m:1 pulls it" in bad.hint


@pytest.mark.parametrize(
    ("gpus", "world", "serves"), [("auto", 16, 2), ("auto", 8, 1), ("none", 99, 1), ("auto", 0, 3)]
)
def test_what_a_node_lacks_that_will_not_serve_does_not_matter(
    gpus: str, world: int, serves: int
) -> None:
    """Its Docker is told of nevertheless: it may be a fault of the node's."""
    lacks = {"image": "", "free": 1, "toolkit": False, "unseen": ["/fsx/m"]}
    nodes = [node(), *(node(f"n{i}", **lacks) for i in (2, 3)), node("n4", no_docker="x")]
    findings = judge(nodes[:3], replace(wanted(gpus=gpus), world=world))
    assert {f.node for f in findings if f.state == "bad"} == {"n2", "n3"} & {
        f"n{i + 1}" for i in range(serves)
    }
    idle = [f.text for f in findings if f.node == "n3" and f.check in ("image", "disk", "toolkit")]
    assert serves == 3 or set(idle) == {"not needed"}
    findings = judge(nodes, replace(wanted(), world=8))
    assert [f.node for f in findings if f.state == "bad"] == ["n4"]


def test_a_tarball_that_a_node_lacks_is_told_where_it_needs_it() -> None:
    without = node("n2", image="", unseen=["/x.tar"])
    [bad] = [f for f in judge([node(unseen=["/x.tar"]), without], wanted()) if f.state == "bad"]
    assert (bad.node, bad.text) == ("n2", "the tarball /x.tar is not there, or not readable")
    assert "file system that the nodes share" in bad.hint


@pytest.mark.parametrize(("world", "bad"), [(16, ["n1", "n2"]), (8, [])])
def test_several_nodes_need_the_launchers_own_workspace(world: int, bad: list[str]) -> None:
    """One node does not: its logs come through the pipe."""
    mark = "/tmp/w/.probe"
    nodes = [node(unseen=[mark]), node("n2", unseen=[mark])]
    found = judge(nodes, replace(wanted(), world=world, probe=mark))
    assert [f.node for f in found if f.state == "bad"] == bad
    here = socket.gethostname().partition(".")[0]
    words = {f.text for f in found if f.check == "paths"}
    assert words == ({f"the workspace /tmp/w is not the one of {here}"} if bad else set())


def test_a_mark_in_the_workspace_is_there_while_it_is_asked_for() -> None:
    with preflight.probe(Path.cwd(), Place("1", 2, ("srun",))) as mark:
        assert Path(mark).parent == Path.cwd() and Path(mark).exists()
        command = preflight.survey_command(replace(wanted(), probe=mark), HERE)
        assert {mark, "/x.tar"} <= set(command.order.paths)
    assert list(Path.cwd().iterdir()) == []
    for workspace, place in ((Path.cwd(), HERE), (Path("/no/such"), Place("1", 2, ("srun",)))):
        with preflight.probe(workspace, place) as mark:
            assert mark == ""


def test_a_cache_that_cannot_be_made_is_told_before_anything_heavy(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Root's home on NFS with root_squash; a home that the node does not mount."""
    asked: list[str] = []
    monkeypatch.setattr(os, "access", lambda path, _: asked.append(str(path)))
    assert survey.can_be_made(str(tmp_path)) and asked == []
    assert not survey.can_be_made(f"{tmp_path}/a/b") and asked == [str(tmp_path)]
    monkeypatch.undo()
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to("/no/such/scratch")
    made = [str(tmp_path / name) for name in ("new/hf", ".", "file/hf", "file", "broken")]
    found = ask(fakes, replace(bare(), made=tuple(made)))
    assert found.facts.unmade == made[2:]
    [bad] = [f for f in judge([node(unmade=["/h/hf"])], wanted()) if f.state == "bad"]
    assert bad.text == "/h/hf is not a directory, and you cannot make it one"
    assert "HF_HOME" in bad.hint


def test_a_node_without_the_container_toolkit_is_told() -> None:
    [bad] = [f for f in judge([node(toolkit=False)], wanted()) if f.state == "bad"]
    assert bad.text == "Docker has no NVIDIA container toolkit"
    assert "nvidia-ctk runtime configure" in bad.hint and "--exclude" in bad.hint
    found = states(judge([node(toolkit=False)], wanted(gpus="none")))
    assert "toolkit" not in found


def test_podman_in_dockers_place_is_told() -> None:
    found = states(judge([node(podman="podman version 4.3.1", no_docker="x")], wanted()))
    assert found["docker"] == ("bad", "`docker` is podman there (podman version 4.3.1)")


@pytest.mark.parametrize(
    ("version", "state"), [("27.0.1", "bad"), ("29.4.9", "bad"), ("29.5.0", "ok"), ("30.0", "ok")]
)
def test_a_rootless_docker_whose_network_is_its_own_is_told(version: str, state: str) -> None:
    """Before 29.5 --net=host is that network: nobody reached the server."""
    [finding] = [
        f for f in judge([node(docker=version, rootless=True)], wanted()) if f.check == "docker"
    ]
    assert finding.state == state
    assert (f"Docker {version} is rootless" in finding.text) == (state == "bad")
    assert judge([node(docker=version)], wanted())[0].state == "ok"


def test_a_registry_image_that_is_missing_is_pulled() -> None:
    found = states(judge([node(image="")], wanted(Image("r.io/x:1", registry="r.io"))))
    assert found["image"] == ("note", "pull")
    assert found["disk"][0] == "ok"


def test_runtime_bare_wants_the_engine_and_no_docker() -> None:
    found = states(judge([node(engine="/bin/trtllm-serve")], wanted(NONE, "bare")))
    assert found["engine"] == ("ok", "/bin/trtllm-serve")
    assert not {"docker", "image", "disk"} & set(found)
    found = states(judge([node(engine="")], wanted(NONE, "bare")))
    assert found["engine"] == ("bad", "trtllm-serve: not found in PATH")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_path_that_a_node_does_not_see_is_bad(name: str) -> None:
    found = states(judge([node(unseen=[f"/{name}"])], wanted()))
    assert found["paths"] == ("bad", f"/{name} is not there, or not readable")


def test_all_that_is_bad_is_said_at_once_and_each_hint_once() -> None:
    findings = judge(
        [node(image="", free=1), node("n2", image="", free=1, taken={"8000": ""})], wanted()
    )
    with pytest.raises(Failure) as failure:
        preflight.stop_if_bad(findings)
    assert failure.value.message.startswith("n1, n2: not enough disk space")
    assert failure.value.hint.count("docker image prune") == 1
    preflight.stop_if_bad([f for f in findings if f.state != "bad"])
    preflight.stop_if_bad([])


def test_the_table_has_a_row_a_node_and_a_column_a_check() -> None:
    findings = [
        Finding("n1", "docker", "ok", "27.0"),
        Finding("n1", "image", "note", "load"),
        Finding("n2", "docker", "bad", "Docker does not answer"),
        Finding("n2", "paths", "bad", "/a is not there"),
        Finding("n2", "paths", "bad", "/b is not there"),
    ]
    assert preflight.table(findings).splitlines() == [
        "node  docker                    image   paths",
        "n1    27.0                      * load  -",
        "n2    ! Docker does not answer  -       ! /a is not there ! /b is not there",
    ]
    assert preflight.table([]) == "node"


@pytest.mark.parametrize(
    ("image", "identities", "must"),
    [
        (TARBALL, ["sha256:c", "sha256:c"], False),
        (TARBALL, ["sha256:c", ""], True),
        (TARBALL, ["sha256:c", "sha256:x"], True),
        (Image("mine:1"), ["sha256:a", "sha256:b"], False),
        (Image("r.io/x:1", registry="r.io"), ["a", "a"], False),
        (Image("r.io/x:1", registry="r.io"), ["a", "b"], True),
        (Image("r.io/x:latest", registry="r.io"), ["a", "a"], True),
    ],
)
def test_an_image_is_brought_where_one_node_lacks_it(
    image: Image, identities: list[str], must: bool
) -> None:
    assert must_provide([node(f"n{i}", image=x) for i, x in enumerate(identities)], image) is must


DEAD = f"{here()}:999999999:1"
BEFORE = "/".join([*here().split("/")[:2], "another-boot", "1:5:6"])


@pytest.mark.parametrize(
    ("job", "who", "user", "jobs", "gone"),
    [
        ("66", "elsewhere/b/1:1:1", "me", {"77"}, True),
        ("66", "elsewhere/b/1:1:1", "me", {"66"}, False),
        ("66", "elsewhere/b/1:1:1", "me", None, False),
        ("66", "elsewhere/b/1:1:1", "me", set(), True),
        ("66", "elsewhere/b/1:1:1", "other", {"77"}, False),
        ("local5", DEAD, "me", None, True),
        ("local5", DEAD, "other", None, False),
        ("66", DEAD, "me", {"66"}, True),
        # Another boot: of this machine, or of another that is called the same.
        ("local5", BEFORE, "me", None, True),
        ("66", BEFORE, "me", {"66"}, False),
        ("66", BEFORE, "me", None, False),
        ("66", BEFORE, "me", {"77"}, True),
        ("local5", "LAUNCHER", "me", set(), False),
        ("local5", "elsewhere/b/1:1:1", "me", set(), False),
        ("", "", "me", set(), False),
        ("66", "", "me", {"77"}, True),
        ("66", "LAUNCHER", "me", {"77"}, False),  # whatever squeue hides: it is here and lives
        ("", "", "", {"77"}, False),
    ],
)
def test_only_my_containers_whose_launcher_is_gone_are_orphans(
    job: str, who: str, user: str, jobs: set[str] | None, gone: bool
) -> None:
    who = who.replace("LAUNCHER", launcher())
    found = Node("n1", GOOD, [Container("id", "name", job, who, user)])
    assert orphans([found], "me", jobs) == (["id"] if gone else [])


def test_a_container_of_this_very_job_is_named_unless_it_goes_anyway() -> None:
    one = Node("n1", GOOD, [Container("a", "trtllm-66-n1", "66", "x", "me")])
    one.containers.append(Container("b", "", "", "", ""))
    two = Node("n2", GOOD, [Container("c", "trtllm-local1-n2", "local1", "x", "me")])
    assert ours_already([one, two], HERE, []) == "trtllm-local1-n2"
    assert ours_already([one, two], HERE, ["c"]) == ""
    assert ours_already([one], HERE, []) == ""


def test_slurm_is_asked_for_my_jobs(fakes: Fakes) -> None:
    os.environ.update(fakes.environment())
    os.environ["SQUEUE_PARTITION"] = "debug"
    fakes.set(jobs=["66", "77"])
    assert preflight.jobs_of("me") == {"66", "77"}
    assert fakes.calls("squeue") == [["squeue", "--all", "--noheader", "--user=me", "--format=%A"]]
    fakes.set(jobs=[])
    assert preflight.jobs_of("me") == preflight.jobs_of("") == set()
    assert fakes.calls("squeue")[-1] == ["squeue", "--all", "--noheader", "--format=%A"]


def test_a_silent_slurm_means_that_nobody_can_say(fakes: Fakes) -> None:
    os.environ.update(fakes.environment())
    fakes.program("squeue", "raise SystemExit('Unable to contact slurm controller')")
    assert preflight.jobs_of("me") is None
    fakes.without("squeue")
    assert preflight.jobs_of("me") is None


# The order that a node is given


def ask(fakes: Fakes, want: Wanted, **env: str) -> Node:
    command = preflight.survey_command(want, HERE)
    done = subprocess.run(
        command.argv,
        input=command.text,
        env=fakes.environment(**env),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    [found] = told(done.stdout)
    return found


def bare(port: int = 8000, paths: tuple[str, ...] = ()) -> Wanted:
    return Wanted("bare", NONE, port, "auto", "trtllm-serve", paths)


def test_a_node_tells_what_it_has(fakes: Fakes) -> None:
    fakes.hold_image(identity="sha256:c", layers=["sha256:1", "sha256:2"])
    fakes.leave_container("x", job="66", launcher="l:1:2", user="me")
    fakes.leave_container("strangers")
    found = ask(fakes, wanted(), SLURM_NODEID="3")
    facts = found.facts
    assert found.name == "local"
    assert (facts.image, facts.layers) == ("sha256:c", '["sha256:1","sha256:2"]')
    assert (facts.docker, facts.no_docker) == ("27.0.1", "")
    assert facts.addresses[-2:] == ["127.0.0.1", "fe80::1"]
    assert facts.network == network()
    assert facts.rank == 3
    assert facts.free > 0
    assert found.containers == [
        Container("er-strangers", "strangers", "", "", ""),
        Container("container-x", "x", "66", "l:1:2", "me"),
    ]


def test_a_node_without_hostname_tells_the_addresses_of_its_routes_alone(fakes: Fakes) -> None:
    fakes.without("hostname")
    for each in ask(fakes, wanted()).facts.addresses:
        assert ip_address(each)


@pytest.mark.parametrize(
    ("store", "config", "where"),
    [
        ("overlay2", "", "docker"),
        ("io.containerd.snapshotter.v1", "", "containerd"),
        ("io.containerd.snapshotter.v1", "version = 3\nroot = '{}'\n", "moved"),
        ("io.containerd.snapshotter.v1", "root = '/no/such'\n", "docker"),
    ],
)
def test_the_room_for_images_is_where_dockers_store_keeps_them(
    tmp_path: Path, store: str, config: str, where: str
) -> None:
    for name in ("docker", "containerd", "moved"):
        (tmp_path / name).mkdir()
    (tmp_path / "config.toml").write_text(config.format(tmp_path / "moved"))
    system = str(tmp_path / "config.toml"), str(tmp_path / "containerd")
    assert survey.place_of_images(str(tmp_path / "docker"), store, *system) == str(tmp_path / where)


def test_where_the_room_is_not_known_there_is_none() -> None:
    assert survey.free_bytes("/no/such") == 0


def test_a_node_tells_that_docker_is_down(fakes: Fakes) -> None:
    fakes.set(down=True)
    assert "Cannot connect to the Docker daemon" in ask(fakes, wanted()).facts.no_docker
    fakes.without("docker")
    facts = ask(fakes, wanted()).facts
    assert facts.no_docker == "docker: not found in PATH"
    assert facts.image == ""


def test_a_node_tells_that_its_docker_is_rootless(fakes: Fakes) -> None:
    assert not ask(fakes, wanted()).facts.rootless
    fakes.set(security=["name=rootless", "name=cgroupns"])
    facts = ask(fakes, wanted()).facts
    assert facts.rootless and facts.toolkit


PODMAN = """import sys
if sys.argv[1:] == ["--version"]:
    print("podman version 4.3.1")
elif sys.argv[1] == "version":
    print("4.3.1")
else:
    sys.exit("Error: template: info: can't evaluate field ServerVersion in type interface {}")
"""


def test_a_node_tells_that_its_docker_is_podman(fakes: Fakes) -> None:
    fakes.program("docker", PODMAN)
    assert ask(fakes, wanted()).facts.podman == "podman version 4.3.1"


@pytest.mark.parametrize(
    ("runtimes", "paths", "there"),
    [
        ('{"nvidia":{"path":"x"},"runc":{}}', ["/no"], True),
        ('{"runc":{}}', ["/no"], False),
        ('{"runc":{}}', ["/no", "HOOK"], True),
        ('{"runc":{}}', [], True),  # no dockerd to be seen: nobody can say
    ],
)
def test_the_toolkit_is_missed_only_where_nothing_speaks_for_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    runtimes: str,
    paths: list[str],
    there: bool,
) -> None:
    hook = tmp_path / survey.HOOKS[0]
    hook.touch(0o755)
    found = [path.replace("HOOK", str(tmp_path)) for path in paths]
    monkeypatch.setattr(survey, "paths_of_dockerd", lambda: found)
    monkeypatch.setattr(survey, "glob", lambda _: [])
    assert survey.has_toolkit(runtimes) is there


def test_where_a_dockerd_looks_is_its_own_word(tmp_path: Path) -> None:
    """Of one in our own network; of another's we know nothing."""
    (tmp_path / "dockerd").symlink_to("/bin/sleep")
    process = subprocess.Popen([tmp_path / "dockerd", "60"], env={"PATH": "/here:/there"})
    try:
        wait_until(lambda: "/here:/there" in survey.paths_of_dockerd())  # the kernel begins it
    finally:
        process.kill()
        process.wait()
    assert "/here:/there" not in survey.paths_of_dockerd()


def test_a_docker_that_hangs_costs_the_time_of_one_question(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was asked of it does not stay."""
    os.environ.update(fakes.environment())
    fakes.program("docker", "import time; time.sleep(600)")
    waits: list[float | None] = []
    real = subprocess.Popen.communicate

    def communicate(self: Any, input: Any = None, timeout: float | None = None) -> Any:
        waits.append(timeout)
        return real(self, input, timeout and 0.3)

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
    found = Facts()
    survey.note_docker(found, survey.ask_docker(TAG))
    assert found.no_docker == "no answer within 10 s"
    assert [each for each in waits if each] == [10]
    wait_until(lambda: not fakes.processes(), "the end of what was asked")


def test_a_node_without_the_image_says_so(fakes: Fakes) -> None:
    assert ask(fakes, wanted()).facts.image == ""


def test_gpus_are_counted_by_nvidia_smi_where_there_are_no_devices(fakes: Fakes) -> None:
    if list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has GPUs")
    assert ask(fakes, bare()).gpus == 0
    fakes.program("nvidia-smi", "print('GPU 0: H100\\n  MIG\\nGPU 1: H100')")
    assert ask(fakes, bare()).gpus == 2
    only = {"CUDA_VISIBLE_DEVICES": "1, GPU-a,7"}  # which no container sees
    assert ask(fakes, bare(), **only).facts.visible == ["1", "GPU-a", "7"]
    assert ask(fakes, bare(), **only).gpus == 3
    assert ask(fakes, wanted(), **only).gpus == 2


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "0.0.0.0"])
def test_a_port_that_somebody_listens_on_is_taken(fakes: Fakes, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        listener = socket.create_server((address, 0), family=family)
    except OSError:
        pytest.skip(f"no {address} here")
    with listener:
        port = listener.getsockname()[1]
        assert f"pid={os.getpid()}" in ask(fakes, bare(port)).facts.taken[str(port)]
        with socket.create_connection((address, port)):
            assert ask(fakes, bare(free_port())).facts.taken == {}
    assert ask(fakes, bare(port)).facts.taken == {}


def test_a_taken_port_is_seen_without_ss(fakes: Fakes) -> None:
    (fakes.home / "tools/ss").unlink()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert ask(fakes, bare(port)).facts.taken == {str(port): ""}


@pytest.mark.parametrize("name", HOSTILE)
def test_paths_of_any_name_are_looked_for(fakes: Fakes, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    paths = (str(tmp_path / name), str(tmp_path / f"no {name}"))
    assert ask(fakes, bare(paths=paths)).facts.unseen == [paths[1]]


def test_runtime_bare_does_not_ask_docker(fakes: Fakes) -> None:
    assert ask(fakes, bare()).facts.engine == ""
    fakes.program("trtllm-serve", "")
    assert ask(fakes, bare()).facts.engine == str(fakes.bin / "trtllm-serve")
    assert fakes.calls("docker") == []


def test_a_node_that_does_not_answer_is_a_failure_that_names_the_others(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.environ.update(fakes.environment(SLURM_JOB_ID="77"))
    place = Place("77", 2, ())
    with pytest.raises(Failure, match="1 of 2 nodes did not answer; these did: local"):
        preflight.ask_nodes(wanted(), place)
    monkeypatch.setattr(preflight, "PATIENCE", 0.3)
    with pytest.raises(Failure, match=r"^asking the nodes did not end within 0\.3 s"):
        preflight.ask_nodes(wanted(), slow())


@pytest.mark.parametrize(("devices", "of"), [(8, 8), (0, 2), (1, 2)])
def test_of_a_node_that_slurm_does_not_show_the_devices_count(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, devices: int, of: int
) -> None:
    os.environ.update(fakes.environment())
    allocation = Allocation("77", nodes=("local",), shares={"local": Share(0, 2, "0,1")})
    there = [Node("local", replace(GOOD, gpus=devices))]
    monkeypatch.setattr(preflight, "gather", lambda _: there)
    [node] = preflight.ask_nodes(wanted(), Place("77", 1, (), allocation))
    assert node.share == Share(of, 2, "0,1")


def test_nodes_that_boot_or_run_a_prolog_are_waited_for(
    fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """For as long as a server may take to be ready; srun itself may give up before that."""
    gives_up = "srun: error: Task launch for StepId=77.0 failed on node n2: Socket timed out on"
    first = f"mkdir {tmp_path}/once && echo '{gives_up} send/recv operation' >&2 && exit 1"
    monkeypatch.setattr(preflight, "PATIENCE", 0.1)
    monkeypatch.setattr("common.talk.HEARTBEAT", 0.1)
    os.environ.update(fakes.environment(SLURM_JOB_ID="77", SLURM_JOB_NODELIST="another-job's"))
    script = f'{first}; sleep 1; exec "$@"'
    allocation = Allocation("77", nodes=("n1", "n2", "n3", "n4", "n5", "n6"))
    [node] = preflight.ask_nodes(
        wanted(), Place("77", 1, ("bash", "-c", WITHOUT + script, "srun"), allocation), 60
    )
    assert node.name == "local"
    line = r"no answer yet from n1, n2, n3, n4 and 2 more after \d+ s of at most 60 "
    assert len(re.findall(line, capfd.readouterr().err)) > 1
    with pytest.raises(Failure, match="asking the nodes did not end within") as failure:
        preflight.ask_nodes(wanted(), slow(), 0.3)
    assert "sinfo -R" in failure.value.hint


@pytest.mark.parametrize("state", ["SUSPENDED", "CANCELLED"])
def test_a_job_that_is_suspended_or_over_is_not_taken_for_nodes_that_boot(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], state: str
) -> None:
    fakes.set(state=state)
    monkeypatch.setattr("common.talk.HEARTBEAT", 0.1)
    os.environ.update(fakes.environment(SLURM_JOB_ID="77"))
    said = ""
    for patience in (0.5, 2.0, 8.0):  # on a busy machine Slurm takes its time to answer
        monkeypatch.setattr(preflight, "PATIENCE", patience)
        with pytest.raises(Failure):
            preflight.ask_nodes(wanted(), slow())
        said += capfd.readouterr().err
        if f"Slurm calls job 77 {state}" in said:
            break
    assert f"Slurm calls job 77 {state}" in said and "Prolog" not in said


@pytest.mark.parametrize(
    ("state", "how"), [("CANCELLED", "has ended"), ("TIMEOUT", "its time limit")]
)
def test_the_end_of_the_job_is_the_end_of_waiting_for_its_nodes(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, state: str, how: str
) -> None:
    """srun may try for minutes."""
    monkeypatch.setattr(preflight, "LOOK_EVERY", 0.1)
    os.environ.update(fakes.environment(SLURM_JOB_ID="77"))
    begun = time.monotonic()
    threading.Timer(1, lambda: fakes.set(state=state)).start()
    with pytest.raises(Failure, match=f"job 77 .*{how}.* before its nodes answered"):
        preflight.ask_nodes(wanted(), slow(), 600)
    assert 1 < time.monotonic() - begun < 50
    fakes.nothing_is_left()


WITHOUT = "while [[ $1 = --* ]]; do shift; done; "  # srun's flags


def slow() -> Place:
    """A node that never answers."""
    return Place("77", 1, ("sh", "-c", "exec sleep 60", "srun"))


def test_reaping_removes_orphans_and_no_others(fakes: Fakes) -> None:
    os.environ.update(fakes.environment())
    fakes.leave_container("gone", job="66", launcher=DEAD, user="me")
    fakes.leave_container("alive", job="local9", launcher=launcher(), user="me")
    fakes.leave_container("theirs", job="66", launcher=DEAD, user="them")
    nodes = preflight.ask_nodes(wanted(), HERE)
    assert preflight.reap(nodes, HERE, "me") is True
    assert fakes.containers() == ["local/alive", "local/theirs"]
    assert preflight.reap(preflight.ask_nodes(wanted(), HERE), HERE, "me") is False


@pytest.mark.parametrize(("jobs", "reaped"), [(["77"], True), (["5"], False), ([], False)])
def test_a_list_without_our_own_job_says_nothing_of_others(
    fakes: Fakes, jobs: list[str], reaped: bool
) -> None:
    """It is another cluster's, as SLURM_CLUSTERS or a federation may have it."""
    os.environ.update(fakes.environment(SLURM_JOB_ID="77"))
    fakes.set(jobs=jobs)
    place = Place("77", 1, ONE_NODE)
    fakes.leave_container("other", job="66", launcher="elsewhere/b/1:1:1", user="me")
    assert preflight.reap(preflight.ask_nodes(wanted(), place), place, "me") is reaped
    assert (fakes.containers() == []) is reaped


def test_a_second_launch_in_the_same_job_is_refused(fakes: Fakes) -> None:
    os.environ.update(fakes.environment())
    fakes.leave_container("trtllm-local1-x", job="local1", launcher=launcher(), user="me")
    with pytest.raises(Failure, match="container trtllm-local1-x is already running"):
        preflight.reap(preflight.ask_nodes(wanted(), HERE), HERE, "me")


def test_where_nothing_runs_slurm_is_not_asked(fakes: Fakes) -> None:
    os.environ.update(fakes.environment())
    assert preflight.reap([node()], HERE, "me") is False
    assert fakes.calls("squeue") == []


@pytest.mark.parametrize(("gpus", "words"), [(8, "8 GPUs each"), (4, "8 and 4 GPUs each")])
def test_the_summary_is_of_all_nodes(gpus: int, words: str) -> None:
    said = preflight.summary([node(), node("n2", gpus=gpus)])
    assert said == f"preflight: 2 nodes ready (n1, n2): Docker 27.0.1, {words}"
