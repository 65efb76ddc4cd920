"""What runs on a node: docker's arguments, and the scripts that hold an engine there."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch.identity import launcher
from launch.node.base import WARNINGS
from launch.node.containers import AskOwner, way_out
from launch.node.messages import Left, Owner
from launch.order import Command, parse
from launch.plan import Plan
from launch.runtimes import docker, runtime
from launch.runtimes.docker import docker_options, mount_flag, passed_on
from launch.slurm import Allocation, Share
from tests.conftest import HOSTILE, TAG, TOKEN, Fakes, Script, plan, wait_until

pytestmark = pytest.mark.usefixtures("clean_environment")

NAME = "trtllm-local1-local"
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def go_csv(text: str) -> list[str]:
    """The first record as Go's encoding/csv reads it, without lazy quotes: Docker's --mount."""
    fields, i = [], 0
    while True:
        field = ""
        if text[i : i + 1] == '"':
            i += 1
            while True:
                end = text.index('"', i)
                field, i = field + text[i:end], end + 1
                if text[i : i + 1] != '"':
                    break
                field, i = field + '"', i + 1
        else:
            while i < len(text) and text[i] not in ",\n":
                assert text[i] != '"', 'bare " in non-quoted field'
                field, i = field + text[i], i + 1
        fields.append(field)
        if i == len(text) or text[i] == "\n":
            return fields
        assert text[i] == ",", "extraneous or missing quote"
        i += 1


@pytest.mark.parametrize("name", [*HOSTILE, "a=b", '"', '",target=/etc', " a "])
def test_docker_reads_a_mount_of_any_name_as_it_is_meant(name: str) -> None:
    path = f"/x/{name}"
    flag = mount_flag(path)
    assert flag.startswith("--mount=")
    row = ["type=bind", f"source={path}", f"target={path}"]
    assert go_csv(flag.removeprefix("--mount=")) == row
    assert next(csv.reader(io.StringIO(flag.removeprefix("--mount="), newline=""))) == row


def test_a_plain_mount_looks_as_people_write_it() -> None:
    assert mount_flag("/fsx") == "--mount=type=bind,source=/fsx,target=/fsx"


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({}, []),
        ({"HF_TOKEN": "x", "NCCL_DEBUG": "INFO", "PATH": "/"}, ["HF_TOKEN", "NCCL_DEBUG"]),
        (
            {"FI_PROVIDER": "efa", "UCX_TLS": "x", "TLLM_A": "1", "TRTLLM_B": "1"},
            ["FI_PROVIDER", "TLLM_A", "TRTLLM_B", "UCX_TLS"],
        ),
        ({"HF_TOKEN": "", "NCCL_DEBUG": ""}, []),
        ({"HF_HOME": "/x", "NCCL_SOCKET_IFNAME": "eth0"}, []),
        ({"SLURM_JOB_ID": "1", "PMI_RANK": "0", "MY_NCCL_X": "1", "NCCL": "1", "hf_x": "1"}, []),
    ],
)
def test_only_the_engines_variables_are_passed_on(
    environ: dict[str, str], names: list[str]
) -> None:
    assert passed_on(environ) == names


def test_the_docker_options_are_these() -> None:
    environ = {"HF_TOKEN": TOKEN, "NCCL_DEBUG": "WARN", "HOME": "/root"}
    full = plan("trtllm-serve", "m", "--tp_size", "8", cache="/home/a b")
    assert docker_options(full, environ) == [
        "--rm",
        "--pull=never",
        "--interactive",
        "--sig-proxy=false",
        "--init",
        "--label=tensorrt-llm-serve.job=local1",
        f"--label=tensorrt-llm-serve.launcher={launcher()}",
        "--label=tensorrt-llm-serve.user=me",
        "--uts=host",
        "--ipc=host",
        "--net=host",
        "--userns=host",
        "--ulimit=memlock=-1",
        "--ulimit=stack=67108864",
        "--mount=type=bind,source=/fsx,target=/fsx",
        "--mount=type=bind,source=/home/a b,target=/home/a b",
        "--workdir=/fsx/work",
        "--env=HF_HOME=/home/a b",
        "--env=NCCL_SOCKET_IFNAME",
        "--env=GLOO_SOCKET_IFNAME",
        "--env=TP_SOCKET_IFNAME",
        "--env=HF_TOKEN",
        "--env=NCCL_DEBUG",
    ]
    command = launch_command(full, environ)
    order = command.fields["Serve"]
    assert (order["image"], order["options"]) == (TAG, docker_options(full, environ))
    assert order["engine"] == ["trtllm-serve", "m", "--tp_size", "8"]
    assert TOKEN not in " ".join(command.argv) + command.text


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("ssh://me@gpu1", True),
        ("tcp://10.0.0.9:2375", True),
        ("tcp://127.0.0.1:2375", False),
        ("unix:///run/user/1000/docker.sock", False),
        ("", False),
    ],
)
def test_a_docker_of_another_machine_is_told(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, host: str, told: bool
) -> None:
    """srun hands the variable on to all nodes, and none of them uses its own."""
    monkeypatch.setenv("DOCKER_HOST", host)
    docker.check(plan())
    assert (f"DOCKER_HOST={host}: containers run there" in capfd.readouterr().err) == told


def test_privileges_are_given_only_when_asked_for() -> None:
    asked = Plan(**{**vars(plan()), "privileged": True})
    assert "--privileged" in docker_options(asked, {})
    assert "--privileged" not in docker_options(plan(), {})


def test_what_is_empty_is_left_out() -> None:
    bare = Plan(**{**vars(plan()), "mounts": (), "cwd": "", "caches": ()})
    assert not [w for w in docker_options(bare, {}) if w.startswith(("--mount", "--workdir"))]
    assert not [w for w in docker_options(bare, {}) if w.startswith("--env=HF_HOME")]


# The scripts that hold it


def launch_command(made: Plan, environ: dict[str, str]) -> Command:
    return runtime(made.runtime).serve(made, made.replicas[0], environ)


def remove_command(made: Plan) -> Command:
    command = docker.remove(made, made.replicas[0])
    assert command
    return command


def hold(script: Callable[..., Script], made: Plan, **env: str) -> Script:
    return script(launch_command(made, env), **env)


SLEEPER = ("bash", "-c", "trap '' TERM INT HUP; echo up; sleep 100 & wait")


def test_the_end_of_input_removes_the_container(
    ready: Fakes, script: Callable[..., Script]
) -> None:
    held = hold(script, plan(*SLEEPER))
    held.until_said("up")
    assert ready.containers() == [f"local/{NAME}"]
    held.type("more\n")
    assert held.process.poll() is None
    held.close()
    assert held.code() == 143
    ready.nothing_is_left()
    assert {call[3] for call in ready.calls("docker", "rm", "--force")} == {NAME[-12:]}


@pytest.mark.parametrize("runtime", ["docker", "bare"])
@pytest.mark.parametrize("how", ["NODE_FAIL", "unknown"])
def test_a_node_that_never_hears_of_the_end_asks_slurm(
    ready: Fakes, script: Callable[..., Script], runtime: str, how: str
) -> None:
    made = plan("sleep", "100", runtime=runtime)
    command = launch_command(made, {})
    command.order.ask_every = 0.2
    ready.set(over=how)
    held = script(command, SLURM_JOB_ID="77", SQUEUE_STATES="PENDING", SLURM_CLUSTERS="other")
    for harmless in (how, "silent", "RUNNING", "SUSPENDED", "COMPLETING", "PENDING"):
        if harmless != how:  # which counts only when Slurm has once said that the job runs
            ready.set(over=harmless)
        asked = len(ready.calls("squeue"))
        held.until(lambda: len(ready.calls("squeue")) > asked + 1)  # noqa: B023
    assert held.process.poll() is None
    ready.set(over=how)
    assert held.code() == 143
    held.close()
    ready.nothing_is_left()


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_removes_the_container(
    ready: Fakes, script: Callable[..., Script], signum: int
) -> None:
    held = hold(script, plan(*SLEEPER))
    held.until_said("up")
    held.process.send_signal(signum)
    held.process.send_signal(signum)  # impatience changes nothing
    assert held.code() == 143
    assert f"tensorrt-llm-serve: local: stopped by {signal.Signals(signum).name}" in held.output
    ready.nothing_is_left()


def test_a_signal_to_the_whole_group_removes_the_container(
    ready: Fakes, script: Callable[..., Script]
) -> None:
    """As scancel does it: everything on the node gets SIGTERM at once."""
    held = hold(script, plan(*SLEEPER))
    held.until_said("up")
    os.killpg(held.process.pid, signal.SIGTERM)
    assert held.code() == 143
    ready.nothing_is_left()


@pytest.mark.parametrize("first", ["", "trap '' TERM; "])
def test_a_container_ends_though_its_script_and_client_were_killed(
    ready: Fakes, script: Callable[..., Script], first: str
) -> None:
    """As Slurm does on a node that was lost and is back, and we where a daemon does not answer."""
    held = hold(script, plan("bash", "-c", f"{first}echo up; while :; do sleep 0.1; done"))
    held.until_said("up")
    os.killpg(held.process.pid, signal.SIGKILL)
    held.code()
    wait_until(lambda: not ready.processes(), "the engine's end")
    assert not ready.calls("docker", "rm")


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_a_container_that_is_created_late_is_removed_too(
    ready: Fakes, script: Callable[..., Script], delay: float
) -> None:
    ready.set(create_delay=delay)
    held = hold(script, plan(*SLEEPER))
    if delay:
        held.until(lambda: ready.calls("docker", "run"))
    held.close()
    assert held.code() in (143, -signal.SIGTERM)  # the latter before anything was started
    ready.nothing_is_left()


def test_a_signal_to_all_while_the_container_is_created_leaves_nothing(
    ready: Fakes, script: Callable[..., Script]
) -> None:
    """Docker's client would end at once, and the daemon complete the creation after that."""
    ready.set(create_delay=1)
    held = hold(script, plan(*SLEEPER))
    held.until(lambda: ready.calls("docker", "run"))
    os.killpg(held.process.pid, signal.SIGTERM)
    assert held.code() == 143
    ready.nothing_is_left()


@pytest.mark.parametrize("runtime", ["docker", "bare"])
def test_a_signal_that_only_warns_ends_nothing(
    ready: Fakes, script: Callable[..., Script], runtime: str
) -> None:
    """As --signal=USR1@300 has it: Slurm sends it to every process of the step."""
    held = hold(script, plan("bash", "-c", "echo up; sleep 100; sleep 100", runtime=runtime))
    held.until_said("up")
    container = ready.containers()
    reached = [held.process.pid, *(ready.processes() if runtime == "bare" else [])]
    for signum in WARNINGS:
        os.killpg(held.process.pid, signum)
        for pid in reached:
            with contextlib.suppress(ProcessLookupError):  # what has only started another
                os.kill(pid, signum)
    assert ready.containers() == container
    held.close()
    assert held.code() == 143
    assert "stopped by" not in held.output


@pytest.mark.parametrize("code", [0, 1, 2, 42, 139, 143, 255])
def test_the_engines_exit_code_is_handed_through(
    ready: Fakes, script: Callable[..., Script], code: int
) -> None:
    held = hold(script, plan("bash", "-c", f"exit {code}"))
    assert held.code() == code
    ready.nothing_is_left()


def test_a_docker_that_remaps_users_shares_its_network_nevertheless(
    ready: Fakes, script: Callable[..., Script]
) -> None:
    ready.set(remaps=True)
    assert hold(script, plan("true")).code() == 0


def test_an_engine_that_is_killed_is_told_as_137(
    ready: Fakes, script: Callable[..., Script]
) -> None:
    assert hold(script, plan("bash", "-c", "kill -KILL $$")).code() == 137


@pytest.mark.parametrize("entry", [["bash", "-c"], ["trtllm-serve"], ["false"]])
def test_an_image_may_have_any_entry_point(
    fakes: Fakes, script: Callable[..., Script], entry: list[str]
) -> None:
    """NVIDIA's is called by its path; any other would get our shell as its arguments."""
    fakes.hold_image(entrypoint=entry)
    held = hold(script, plan("printf", "%s", "it's served"))
    assert (held.code(), held.output) == (0, "it's served")


def test_a_client_that_is_killed_is_not_the_engine(
    ready: Fakes, script: Callable[..., Script]
) -> None:
    held = hold(script, plan(*SLEEPER))
    held.until_said("up")
    [client] = [pid for pid, words in ready.processes().items() if "docker run" in words]
    os.kill(client, signal.SIGKILL)
    assert held.code() == 125
    assert "docker: its client was killed (signal 9)" in held.output
    ready.nothing_is_left()


def test_dockers_own_failure_is_handed_through(fakes: Fakes, script: Callable[..., Script]) -> None:
    held = hold(script, plan("true"))
    assert held.code() == 125
    assert "No such image" in held.output
    fakes.nothing_is_left()


def test_the_cache_is_made_and_arguments_of_any_name_arrive(
    ready: Fakes, script: Callable[..., Script], tmp_path: Path
) -> None:
    cache = tmp_path / "a b's $x/c"
    held = hold(script, plan("printf", "<%s>", *HOSTILE, cache=str(cache)))
    assert held.code() == 0
    assert held.output == "".join(f"<{name}>" for name in HOSTILE)
    assert cache.is_dir()


@pytest.mark.parametrize(
    ("gpus", "ours", "flag"),
    [
        ("none", "0,1", None),
        ("auto", None, "all"),
        ("auto", "0,1,2,3,4,5,6,7", "all"),
        ("auto", "2,5", '"device=2,5"'),
        ("auto", "", None),  # a job that has none gets none
        ("all", "0", "all"),
        ('"device=1,2"', None, '"device=1,2"'),
        ("device=1,2", None, '"device=1,2"'),  # .env takes a pair of quotes away
        ("'device=MIG-a,0:1'", None, '"device=MIG-a,0:1"'),
        ("device=MIG-GPU-a/1/0,MIG-GPU-a/2/0", None, '"device=MIG-GPU-a/1/0,MIG-GPU-a/2/0"'),
        ("device=0,driver=nvidia", None, "device=0,driver=nvidia"),
        ("2", None, "2"),
    ],
)
def test_gpus_are_those_that_slurm_names_or_docker_words(
    ready: Fakes, script: Callable[..., Script], gpus: str, ours: str | None, flag: str | None
) -> None:
    """What a shell has left in the environment decides nothing."""
    made, others = plan("true", gpus=gpus), Share(8, 1, "7")
    if ours is not None:
        share = Share(8, len(ours.split(",")) if ours else 0, ours)
        known = Allocation(nodes=("n9", "local"), shares={"n9": others, "local": share})
        made = replace(made, place=replace(made.place, allocation=known))
    assert hold(script, made, SLURM_STEP_GPUS="6,7", CUDA_VISIBLE_DEVICES="6").code() == 0
    [call] = ready.calls("docker", "run")
    assert (call[call.index("--gpus") + 1] if "--gpus" in call else None) == flag


def test_secrets_reach_the_engine_by_name_only(ready: Fakes, script: Callable[..., Script]) -> None:
    held = hold(script, plan("bash", "-c", 'echo "$HF_TOKEN"'), HF_TOKEN=TOKEN)
    assert held.code() == 0
    assert held.output == TOKEN + "\n"
    assert TOKEN not in json.dumps(ready.calls())
    assert "--env=HF_TOKEN" in ready.calls("docker", "run")[0]


def test_the_interface_is_the_one_that_leads_out_unless_named(
    ready: Fakes, script: Callable[..., Script]
) -> None:
    shown = ("bash", "-c", "echo $NCCL_SOCKET_IFNAME $GLOO_SOCKET_IFNAME $TP_SOCKET_IFNAME")
    held = hold(script, plan(*shown), GLOO_SOCKET_IFNAME="lo")
    assert (held.code(), held.output) == (0, f"{way_out()} lo {way_out()}\n")


HEAD = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
ROUTES = {
    "ens5": "\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0\n",
    "ens6": "\t00000000\t0100000A\t0003\t0\t0\t200\t00000000\t0\t0\t0\n",
    "*": "\t00000000\t00000000\t0200\t0\t0\t4294967295\t00000000\t0\t0\t0\n",  # unreachable
    "tun0": "\t00000000\t0100000A\t0003\t0\t0\t0\t00000080\t0\t0\t0\n",  # half of the internet
    "docker0": "\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n",
}


@pytest.mark.parametrize(
    ("names", "found"),
    [("ens5 ens6", "ens5"), ("tun0 ens6 docker0", "ens6"), ("*", ""), ("docker0", ""), ("", "")],
)
def test_the_default_route_is_the_kernels_first(tmp_path: Path, names: str, found: str) -> None:
    table = tmp_path / "route"
    table.write_text(HEAD + "".join(f"{name}{ROUTES[name]}" for name in names.split()))
    assert way_out(str(table)) == found
    assert way_out(str(tmp_path / "none")) == ""


def bare(*engine: str) -> Plan:
    return plan(*engine, runtime="bare")


def test_a_bare_engine_sees_nothing_of_slurm(fakes: Fakes, script: Callable[..., Script]) -> None:
    prefixes = ("SLURM", "SLURMD", "SBATCH", "SALLOC", "PMI", "PMI2", "PMIX", "OMPI")
    theirs = [f"{prefix}_X" for prefix in prefixes]
    env = {**dict.fromkeys(theirs, "x"), "NCCL_DEBUG": "INFO", "MY_SLURM_X": "1"}
    held = hold(script, bare("env"), **env)
    assert held.code() == 0
    names = {line.partition("=")[0] for line in held.output.splitlines()}
    assert not names & set(theirs)
    assert {"NCCL_DEBUG", "MY_SLURM_X", "PATH"} <= names


@pytest.mark.parametrize("code", [0, 1, 42, 137])
def test_a_bare_engines_exit_code_is_handed_through(
    fakes: Fakes, script: Callable[..., Script], code: int
) -> None:
    """And what it leaves behind goes with it."""
    held = hold(script, bare("bash", "-c", f"trap '' TERM; sleep 100 & exit {code}"))
    assert held.code() == code
    fakes.nothing_is_left()


def test_a_bare_engine_that_is_missing_is_127(fakes: Fakes, script: Callable[..., Script]) -> None:
    held = hold(script, bare("no-such-engine"))
    assert held.code() == 127
    fakes.nothing_is_left()


@pytest.mark.parametrize("signum", [None, *SIGNALS])
def test_a_bare_engine_gets_the_chance_to_end_by_itself(
    fakes: Fakes, script: Callable[..., Script], signum: int | None
) -> None:
    engine = "trap 'echo bye; kill %% 2>/dev/null; wait; exit 0' TERM; sleep 100 & echo up; wait"
    held = hold(script, bare("bash", "-c", engine))
    held.until_said("up")
    if signum is None:
        held.close()
    else:
        held.process.send_signal(signum)
    assert held.code() == 143
    assert held.output.startswith("up\n") and held.output.endswith("bye\n")
    held.close()
    fakes.nothing_is_left()


def test_a_bare_engine_whose_children_ignore_the_end_is_killed_with_them(
    fakes: Fakes, script: Callable[..., Script]
) -> None:
    held = hold(script, bare(*SLEEPER))
    held.until_said("up")
    held.close()
    assert held.code() == 143
    fakes.nothing_is_left()


@pytest.mark.parametrize("warns", [False, True])
def test_removing_takes_this_launchs_container_only(
    fakes: Fakes, script: Callable[..., Script], warns: bool
) -> None:
    fakes.set(warns=warns)  # docker's client does, where it cannot read its own file
    fakes.leave_container("trtllm")
    fakes.leave_container("trtllm-local10-local", launcher="other:1:1")
    fakes.leave_container(NAME, launcher=launcher())
    for _ in range(2):
        removing = script(remove_command(plan()))
        assert (removing.code(), removing.told) == (0, [])
    assert fakes.containers() == ["local/trtllm", "local/trtllm-local10-local"]
    assert len(fakes.calls("docker", "rm")) == 1


def test_a_container_of_another_launch_by_the_same_name_is_left_alone(
    ready: Fakes, script: Callable[..., Script]
) -> None:
    ready.leave_container(NAME, launcher="other:1:1")
    held = hold(script, plan(*SLEEPER))
    assert held.code() == 125
    assert "Conflict. The container name" in held.output
    assert script(remove_command(plan())).code() == 0
    assert ready.containers() == [f"local/{NAME}"]


def test_a_container_that_could_not_be_removed_is_told(
    fakes: Fakes, script: Callable[..., Script]
) -> None:
    fakes.set(down=True)
    removing = script(remove_command(plan()))
    assert removing.code() == 0
    why = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock."
    assert removing.told == [Left(why)]


def owner(container: str, port: int, fakes: Fakes) -> Owner:
    """What a node says of a port."""
    command = Command([], AskOwner("0.0.0.0", port, container))
    env, one = fakes.environment(), subprocess.PIPE
    done = subprocess.run(command.argv, input=command.text, env=env, text=True, stdout=one)
    message = parse(done.stdout).message
    assert isinstance(message, Owner)
    return message


@pytest.mark.parametrize("container", ["", "trtllm-local1"])
def test_a_port_belongs_to_who_listens_on_it(fakes: Fakes, container: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert owner(container, port, fakes) == Owner(True, answer="timed out")
    assert owner(container, port, fakes) == Owner(False, answer="[Errno 111] Connection refused")


def test_whose_a_port_is_may_stay_unknown(fakes: Fakes) -> None:
    fakes.set(listens="unknown")
    assert owner("trtllm-local1", 1, fakes).why
