"""One model over several nodes: commands, guards, and the scripts of a container and its ranks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest

from common.talk import Failure
from launch import world
from launch.findings import Node
from launch.identity import launcher
from launch.node.inside import UP
from launch.node.messages import Beat, Ended, Left, Up
from launch.nodes import Place, Step
from launch.order import Command, parse
from launch.plan import Plan
from launch.runtimes import docker
from launch.spread import Spread
from launch.world import Death, Holders, first_failure, pattern_of_logs, rank_log
from tests.conftest import (
    HOSTILE,
    ONE_NODE,
    PATIENCE,
    TAG,
    TOKEN,
    Fakes,
    plan,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("clean_environment")

SPREAD = Spread(2, 8, "pmix_v4")
NODES = [Node("n1"), Node("n2"), Node("n3")]
NAME = "trtllm-77-local"
HOST = os.uname().nodename.partition(".")[0]


def spread_plan(*arguments: str, srun: tuple[str, ...] = ONE_NODE, **changes: Any) -> Plan:
    made = plan("trtllm-serve", *(arguments or ("m",)), gpus=changes.pop("gpus", "none"))
    [one] = made.replicas
    replicas = (replace(one, spread=SPREAD),)
    return replace(made, place=Place("77", 3, srun), replicas=replicas, **changes)


def holder_command(made: Plan, environ: dict[str, str]) -> Command:
    return docker.hold(made, made.replicas[0], environ)


def ranks_command(made: Plan, log: Path) -> Command:
    return docker.ranks(made, made.replicas[0], pattern_of_logs(log))


# The commands


def test_the_command_of_the_containers_is_this() -> None:
    environ = {"HF_TOKEN": TOKEN, "NCCL_DEBUG": "WARN", "HOME": "/root"}
    made = spread_plan("m", "--tp_size", "16", srun=("srun",), gpus="auto")
    made = replace(made, caches=(("HF_HOME", "/home/a b"),))
    command = holder_command(made, environ)
    assert list(command.prefix) == [
        "srun",
        "--mpi=none",
        "--cpu-bind=none",
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--ntasks-per-node=1",
        "--nodes=2",
        "--ntasks=2",
    ]
    order = command.fields["Hold"]
    assert (order["name"], order["launcher"]) == ("trtllm-77", launcher())
    assert (order["gpus"], order["caches"], order["image"]) == ("auto", ["/home/a b"], TAG)
    assert order["options"] == [
        "--rm",
        "--pull=never",
        "--interactive",
        "--sig-proxy=false",
        "--init",
        "--label=tensorrt-llm-serve.job=77",
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
    assert TOKEN not in " ".join(command.argv) + command.text


def test_the_command_of_the_ranks_is_this(tmp_path: Path) -> None:
    made = spread_plan("it's", "--tp_size", "16", srun=("env", "-u", "SLURM_HINT", "srun"))
    command = ranks_command(made, tmp_path / "logs/trtllm_server_77.log")
    assert list(command.prefix) == [
        "env",
        "-u",
        "SLURM_HINT",
        "srun",
        "--mpi=pmix_v4",
        "--cpu-bind=none",
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--ntasks-per-node=8",
        "--nodes=2",
        "--ntasks=16",
        "--overcommit",
        "--distribution=block",
        "--kill-on-bad-exit=1",
        "--open-mode=append",
        f"--output={tmp_path}/logs/trtllm_server_77_rank%t.log",
    ]
    order = command.fields["Rank"]
    assert (order["name"], order["cwd"]) == ("trtllm-77", "/fsx/work")
    engine = ["trtllm-serve", "it's", "--tp_size", "16"]
    assert order["command"] == ["trtllm-llmapi-launch", *engine]


def test_a_percent_sign_in_a_path_is_not_sruns(tmp_path: Path) -> None:
    command = ranks_command(spread_plan(), tmp_path / "50%t/x.log")
    assert f"--output={tmp_path}/50%%t/x_rank%t.log" in command.prefix


def test_each_rank_has_a_log_beside_the_launchs() -> None:
    assert rank_log(Path("/a b/trtllm_server_77.log"), "13") == Path(
        "/a b/trtllm_server_77_rank13.log"
    )


# Whose end it is


@pytest.mark.parametrize(
    ("log", "death"),
    [
        ("", None),
        ("srun: Job step's node list exceeds job's\n", None),
        ("srun: error: Unable to create step for job 77: Invalid MPI plugin name\n", None),
        ("srun: error: task 9 launch failed: Slurmd could not execve job\n", None),
        ("srun: error: n2: task 9: Exited with exit code 3\n", Death("n2", "9", 3)),
        ("srun: error: n2: task 11: Exited with exit code 137\n", Death("n2", "11", 137)),
        ("srun: error: n2: tasks 8-15: Killed\n", Death("n2", "8-15", 137)),
        ("srun: error: n1: tasks 0,2-7: Terminated\n", Death("n1", "0,2-7", 143)),
        ("srun: error: n[1-2]: tasks 0-15: Exited with exit code 1\n", Death("n[1-2]", "0-15", 1)),
        ("srun: error: csl41: task 0: Out Of Memory\n", Death("csl41", "0", 137)),
        ("srun: error: n1: task 1: Segmentation fault\n", Death("n1", "1", 139)),
        ("srun: error: n1: task 1: Segmentation fault (core dumped)\n", Death("n1", "1", 139)),
        ("srun: error: n1: task 1: Aborted (core dumped)\n", Death("n1", "1", 134)),
        ("srun: error: n1: task 1: Bus error (core dumped)\n", Death("n1", "1", 135)),
        ("srun: error: n1: task 1: Floating point exception\n", Death("n1", "1", 136)),
        ("srun: error: n1: task 1: something new\n", Death("n1", "1", 1)),
        ("srun: error: ip-10-0-0-1.ec2: task 1: Killed\n", Death("ip-10-0-0-1.ec2", "1", 137)),
        (
            "slurmstepd: error: Detected 1 oom_kill event in StepId=77.1. Some of the step tasks "
            "have been OOM Killed.\n"
            "srun: error: n2: task 12: Out Of Memory\n"
            "srun: Terminating StepId=77.1\n"
            "srun: error: n1: tasks 0-7: Killed\n"
            "srun: error: n2: tasks 8-11,13-15: Killed\n",
            Death("n2", "12", 137),
        ),
        (
            "srun: error: n2: task 9: Exited with exit code 3\n"
            "srun: launch/slurm: _step_signal: Terminating StepId=77.1\n"
            "slurmstepd: error: *** STEP 77.1 ON n1 CANCELLED AT 2025-11-24T08:14:52 ***\n"
            "srun: error: n1: tasks 0-7: Terminated\n",
            Death("n2", "9", 3),
        ),
    ],
)
def test_the_first_rank_that_failed_is_found_in_what_srun_says(
    log: str, death: Death | None
) -> None:
    assert first_failure(log) == death


@pytest.mark.parametrize(
    ("ranks", "first"), [("9", "9"), ("8-15", "8"), ("3,5-7", "3"), ("10,12", "10")]
)
def test_of_ranks_that_ended_alike_the_first_one_is_looked_at(ranks: str, first: str) -> None:
    assert Death("n1", ranks, 1).first == first


# Signs of life


class Over(Exception):
    pass


class Clock:
    """Time as the test has it; a sleeping thread ends when the test has."""

    def __init__(self) -> None:
        self.now = 100.0
        self.over = False

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        if self.over:
            raise Over
        time.sleep(min(seconds, 0.01))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(world, "time", clock)
    return clock


class Silent:
    """A step that runs and tells nothing."""

    def poll(self) -> None:
        return None


def holders(step: Step | None = None) -> Holders:
    return Holders(step or cast(Step, Silent()), SPREAD, NODES)


def note(guard: Holders, *lines: str) -> None:
    for line in lines:
        guard.note(parse(line + "\n"))


def watch(guard: Holders, clock: Clock, seconds: float) -> None:
    """So many seconds, in which nothing is wrong."""
    for _ in range(8):
        clock.now += seconds / 8
        assert guard.fault() == ""


def test_only_the_nodes_of_the_spread_are_watched() -> None:
    assert holders().names == ["n1", "n2"]


def beat(node: str, slurmd: bool = True) -> str:
    return json.dumps({"node": node, "Beat": {"slurmd": slurmd}})


BEATS = (beat("n1"), beat("n2"))


def test_a_beat_is_a_sign_of_life(clock: Clock) -> None:
    guard = holders()
    assert guard.fault() == ""  # nobody has been seen, nobody is missed
    clock.now += 1000
    assert guard.fault() == ""
    note(guard, *BEATS)
    for _ in range(10):
        watch(guard, clock, world.SILENCE - 0.1)
        note(guard, *BEATS)
    watch(guard, clock, world.SILENCE - 0.1)
    note(guard, BEATS[0])
    clock.now += 0.2
    assert guard.fault() == "n2 (ranks 8-15): no sign of life for 8 s"
    note(guard, BEATS[1])
    assert guard.fault() == ""


def test_who_stood_still_himself_does_not_blame_the_nodes(clock: Clock) -> None:
    guard = holders()
    note(guard, *BEATS)
    watch(guard, clock, world.SILENCE - 0.1)
    clock.now += 1000  # ^Z and fg: what was said meanwhile has not been read yet
    assert guard.fault() == ""
    note(guard, beat("n1", False), beat("n2", False))
    watch(guard, clock, world.SILENCE - 0.1)
    clock.now += 0.2
    assert guard.fault() == "n1 (ranks 0-7): no sign of life for 8 s"


def test_a_slurmd_that_is_gone_for_a_while_is_named_with_its_ranks(clock: Clock) -> None:
    guard = holders()
    note(guard, *BEATS)
    for _ in range(2):  # a restart
        clock.now += 2
        note(guard, BEATS[0], beat("n2", False))
        assert guard.fault() == ""
    note(guard, *BEATS)
    for _ in range(3):
        assert guard.fault() == ""
        clock.now += 2
        note(guard, BEATS[0], beat("n2", False))
    assert guard.fault() == "n2 (ranks 8-15): its slurmd has been gone for 5 s"
    note(guard, BEATS[1])  # and it comes back
    assert guard.fault() == ""


def test_a_slurmd_that_was_never_seen_is_not_judged(clock: Clock) -> None:
    """It listens on a port that the configuration does not name."""
    guard = holders()
    for _ in range(9):
        note(guard, beat("n1", False), beat("n2", False))
        assert guard.fault() == ""
        clock.now += 2


@pytest.mark.parametrize(
    ("talk", "words"),
    [
        ([], ""),
        (["docker: Error response from daemon: No such image: x."], ": docker: Error response "),
        (["why", "srun: error: n2: task 1: Exited with exit code 125"], ": why"),
    ],
)
def test_a_container_that_ended_is_told_with_its_code_and_words(
    clock: Clock, talk: list[str], words: str
) -> None:
    guard = holders()
    note(guard, *BEATS, *talk, '{"node": "n2", "Ended": {"code": 125}}')
    message = f"n2 (ranks 8-15): its container ended with exit code 125{words}"
    assert guard.fault().startswith(message)
    assert guard.fault() == message or words.endswith(" ")
    clock.now += 1000  # the end is the reason, not the silence after it
    note(guard, BEATS[0])
    assert guard.fault().startswith(message)


def test_a_flood_of_talk_is_not_kept(clock: Clock) -> None:
    guard = holders()
    note(guard, *map(str, range(1000)))
    assert len(guard.talk) <= 51
    assert guard.talk[-1] == "999"


@dataclass
class Shell:
    """What a node would tell, by a shell."""

    argv: list[str]
    text: str = ""

    def shown(self, more: str = "") -> str:
        return ""


@pytest.fixture
def step() -> Iterator[Callable[[str], Step]]:
    started: list[Step] = []

    def start(text: str) -> Step:
        script = Shell(["sh", "-c", f"{TELL} {text}"])
        started.append(Step(cast(Command, script)))
        return started[-1]

    yield start
    for each in started:
        each.stop(0.1)


TELL = r"""
tell() { printf '{"node": "%s", "%s": {%s}}\n' "$1" "$2" "$3"; };
up() { for n; do tell "$n" Up; done; };
left() { tell "$1" Left "\"why\": \"$2\""; };
"""


def test_all_nodes_are_waited_for(step: Callable[[str], Step]) -> None:
    guard = holders(step("{ up n1; cat; } & sleep 0.2; up n2; wait"))
    guard.start()
    guard.await_up(threading.Event())
    assert guard.up == {"n1", "n2"}
    assert guard.fault() == ""
    guard.step.stop()
    guard.join(PATIENCE)
    assert not guard.is_alive()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo why; tell n2 Ended '\"code\": 125'", r"n2 \(ranks 8-15\): .* exit code 125: why$"),
        ("echo 'srun: error: Unable to create step'; exit 1", "n1, n2: no container: srun: error"),
        ("up n1; exit 1", "n2: no container: no word from there$"),
        (
            "echo 'srun: error: Task launch for StepId=1.2 failed on node n2: Connection failure'; "
            "echo 'slurmstepd-n1: error: *** STEP 1.2 ON n1 CANCELLED AT 2026 ***'; exit 1",
            "n2: Slurm cannot start anything there: Connection failure$",
        ),
        ("exit 0", "n1, n2: no container: no word from there$"),
    ],
)
def test_containers_that_cannot_start_are_told_at_once(
    step: Callable[[str], Step], text: str, words: str
) -> None:
    for _ in range(5):  # what it says and that it ends come in either order
        guard = holders(step(text))
        guard.start()
        with pytest.raises(Failure, match="^" + words):
            guard.await_up(threading.Event())


def test_a_node_without_a_container_is_not_waited_for_for_ever(
    step: Callable[[str], Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "UP_WITHIN", 0.3)
    guard = holders(step("up n1; cat"))
    guard.start()
    wait_until(lambda: guard.up)
    with pytest.raises(Failure, match=r"^n2: no container within 0\.3 s: no word from there$"):
        guard.await_up(threading.Event())


def test_letting_go_while_it_talks_is_no_error(
    step: Callable[[str], Step], capfd: pytest.CaptureFixture[str]
) -> None:
    guards = [holders(step("while :; do echo talk; done")) for _ in range(5)]
    for guard in guards:
        guard.start()
    wait_until(lambda: all(guard.talk for guard in guards))
    for guard in guards:
        guard.step.stop(0.01)
        guard.join(PATIENCE)
        assert not guard.is_alive()
    assert "Traceback" not in capfd.readouterr().err


# The end


SLOWLY = "cat; sleep 0.2; left n1; left n2 '{}'; exec sleep 100"


@pytest.mark.parametrize("why", ["", "Cannot connect"])
def test_the_nodes_word_on_their_containers_is_waited_for(
    step: Callable[[str], Step], why: str
) -> None:
    guard = holders(step(SLOWLY.format(why)))
    guard.start()
    guard.step.let_go()
    assert guard.await_farewell() == ({"n2": why} if why else {})
    assert guard.silent() == []


def test_a_node_in_trouble_is_not_waited_for_for_long(
    step: Callable[[str], Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "SHORT_FAREWELL", 0.3)
    guard = holders(step("left n1; exec sleep 1000"))
    guard.start()
    wait_until(lambda: guard.left)
    guard.seen["n2"] = time.monotonic() - 20
    begun = time.monotonic()
    assert guard.await_farewell() == {"n2": "no sign of life for 8 s"}
    assert time.monotonic() - begun > 0.2


def test_a_node_that_ends_without_a_word_is_told_apart(step: Callable[[str], Step]) -> None:
    guard = holders(step("left n1"))
    guard.start()
    assert guard.await_farewell() == {"n2": ""}


# The script that holds a container


def told(script: Any, kind: type) -> list[Any]:
    return [message for message in script.told if isinstance(message, kind)]


Start = Callable[..., Any]


def until_up(fakes: Fakes, held: Any) -> None:
    """The fake docker writes a container down when it runs already."""
    held.until(lambda: told(held, Up) and fakes.containers())


@pytest.fixture
def hold(ready: Fakes, script: Start) -> Iterator[Start]:
    """Start a holder; nothing of it may be left."""
    started: list[Any] = []

    def start(**env: str) -> Any:
        command = holder_command(spread_plan(), env)
        command.order.beat_every = 0.1
        started.append(script(command, **env))
        return started[-1]

    yield start
    for each in started:
        each.close()
        each.code()
    ready.nothing_is_left()


def test_a_container_waits_and_beats_are_told(ready: Fakes, hold: Start) -> None:
    held = hold(HF_TOKEN=TOKEN)
    held.until(lambda: len(told(held, Beat)) > 2 and told(held, Up))
    assert len(told(held, Up)) == 1
    assert ready.containers() == [f"local/{NAME}"]
    [call] = ready.calls("docker", "run")
    assert call[:4] == ["docker", "run", "--name", NAME]
    assert call[-5:] == [TAG, "-c", UP, "up", "local"] and "--entrypoint=sh" in call
    assert ready.container()["environment"]["HF_TOKEN"] == TOKEN
    held.close()
    assert held.code() == 143
    assert told(held, Ended) == []
    assert told(held, Left) == [Left("")]
    ready.nothing_is_left()


def test_a_node_is_up_when_its_container_runs(ready: Fakes, hold: Start) -> None:
    ready.set(create_delay=1)
    held = hold()
    until_up(ready, held)
    kinds = [type(message) for message in held.told]
    assert kinds[: kinds.index(Up)].count(Beat) > 1
    assert ready.containers() == [f"local/{NAME}"]


def test_a_beat_tells_whether_slurmd_listens(ready: Fakes, hold: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ready.set(config=f"X\nSlurmdPort              = {listener.getsockname()[1]}\n")
        held = hold()
        held.until(lambda: told(held, Beat))
        assert {beat.slurmd for beat in told(held, Beat)} == {True}
    held.until(lambda: not told(held, Beat)[-1].slurmd)


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"down": True}, "Cannot connect to the Docker daemon"),
        ({"rm_delay": 6}, "Docker does not answer"),
    ],
)
def test_a_container_that_cannot_be_removed_is_told(
    ready: Fakes, hold: Start, faults: dict[str, Any], words: str
) -> None:
    held = hold()
    until_up(ready, held)
    container = ready.container()["pid"]
    ready.set(**faults)
    for client in [p for p, c in ready.processes().items() if "docker run --name" in c]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(client, signal.SIGKILL)
    held.until(lambda: told(held, Left))
    assert told(held, Ended) == [Ended(137)]
    assert told(held, Left)[0].why.startswith(words)
    ready.set()
    with contextlib.suppress(ProcessLookupError):  # its input has ended with its client
        os.killpg(container, signal.SIGKILL)
    for path in ready.home.glob("*/container-*.json"):
        path.unlink()


@pytest.mark.parametrize(
    ("signum", "group"),
    [
        (None, False),
        (signal.SIGTERM, False),
        (signal.SIGINT, False),
        (signal.SIGHUP, False),
        (signal.SIGTERM, True),  # as scancel does it
    ],
)
def test_the_end_of_a_holder_removes_its_container(
    ready: Fakes, hold: Start, signum: int | None, group: bool
) -> None:
    held = hold()
    until_up(ready, held)
    if signum is None:
        held.close()
    elif group:
        os.killpg(held.process.pid, signum)
    else:
        held.process.send_signal(signum)
    assert held.code() == 143
    held.close()
    ready.nothing_is_left()


def test_a_holder_may_be_ended_at_any_moment(ready: Fakes, hold: Start) -> None:
    moments = random.Random(7)
    for _ in range(12):
        held = hold()
        time.sleep(moments.uniform(0, 0.15))
        held.process.send_signal(signal.SIGTERM)
        assert held.code() in (143, -signal.SIGTERM)  # the latter before anything was started
        held.close()
        ready.nothing_is_left()


def test_a_container_that_dies_is_told(ready: Fakes, hold: Start) -> None:
    held = hold()
    until_up(ready, held)
    os.kill(ready.container()["pid"], signal.SIGKILL)
    assert held.code() == 137
    assert told(held, Ended) == [Ended(137)]
    assert told(held, Left) == [Left("")]
    ready.nothing_is_left()


def test_a_container_that_cannot_start_is_told(fakes: Fakes, script: Start) -> None:
    held = script(holder_command(spread_plan(), {}))
    assert held.code() == 125
    assert told(held, Up) == []
    assert told(held, Ended) == [Ended(125)]
    assert "No such image" in held.output
    fakes.nothing_is_left()


@pytest.mark.parametrize(("pattern", "there"), [("%n", "n7"), ("%h", HOST), ("", "spool")])
def test_slurms_spool_directory_is_mounted(
    ready: Fakes, hold: Start, tmp_path: Path, pattern: str, there: str
) -> None:
    ready.hold_image(node="n7")
    (tmp_path / "a b" / there).mkdir(parents=True)
    directory = f"{tmp_path}/a b/{pattern or there}"
    ready.set(config=f"SlurmUser = x\nSlurmdSpoolDir          = {directory}\nSlurmUser = x\n")
    held = hold(SLURMD_NODENAME="n7")
    until_up(ready, held)
    [call] = ready.calls("docker", "run")
    path = f"{tmp_path}/a b/{there}"
    assert call[5:7] == ["--mount", f"type=bind,source={path},target={path}"]


@pytest.mark.parametrize("missing", ["directory", "scontrol"])
def test_without_a_spool_directory_nothing_is_mounted(
    ready: Fakes, hold: Start, missing: str
) -> None:
    if missing == "scontrol":
        ready.without("scontrol")
    held = hold()
    until_up(ready, held)
    [call] = ready.calls("docker", "run")
    assert "--mount" not in call


# The script of a rank


RANK_ZERO = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_NAME": "a b='c'"}
PMIX = {"PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm.pmix.77.1", "PMIX_SERVER_URI4": "x;tcp4://y"}
PMI = {"PMI_RANK": "0", "PMI2_X": "1", "PMI_FD": "9"}
OTHERS = {"HF_TOKEN": TOKEN, "MY_SLURM_X": "1", "SALLOC_X": "1", "LD_PRELOAD_X": "1"}


@pytest.fixture
def container(ready: Fakes, hold: Start) -> Iterator[Any]:
    """A container to run ranks in."""
    held = hold(HF_TOKEN="inside")
    until_up(ready, held)
    yield held
    assert list(ready.temporary.iterdir()) == []


@pytest.fixture
def rank(ready: Fakes, container: Any, script: Start, tmp_path: Path) -> Start:
    """Start a rank whose trtllm-llmapi-launch is the given shell script."""

    def start(text: str, *arguments: str, cwd: str = "/fsx/work", **env: str) -> Any:
        path = ready.bin / "new"
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
        path.replace(ready.bin / "trtllm-llmapi-launch")  # one that runs keeps its own
        made = spread_plan(*arguments, cwd=cwd)
        command = ranks_command(made, tmp_path / "x.log")
        command.order.look_every = 0.1
        return script(command, **{**RANK_ZERO, **env})

    return start


def test_a_rank_sees_slurm_and_mpi_as_its_task_does_and_nothing_else_of_it(
    ready: Fakes, rank: Start
) -> None:
    started = rank("env -0 >env; exec /bin/sleep 100", **PMIX, **PMI, **OTHERS)
    started.until(lambda: "variables" in ready.container())
    [variables] = ready.container()["variables"]
    assert variables == {**RANK_ZERO, **PMIX, **PMI, "SLURMD_NODENAME": "local"}
    [call] = ready.calls("docker", "exec")
    assert call[4:7] == ["--workdir", "/fsx/work", NAME]
    assert TOKEN not in json.dumps(ready.calls())
    started.close()
    assert started.code() == 143
    assert list(ready.temporary.iterdir()) == []


@pytest.mark.parametrize("code", [0, 7, 255])
def test_a_ranks_exit_code_and_words_are_handed_through(
    ready: Fakes, rank: Start, code: int
) -> None:
    started = rank(f'echo "$HF_TOKEN $SLURM_PROCID"; echo err >&2; exit {code}')
    assert started.code() == code
    assert started.output == "inside 0\nerr\n"
    assert list(ready.temporary.iterdir()) == []


def test_arguments_of_any_name_reach_a_rank(ready: Fakes, rank: Start) -> None:
    started = rank('printf "<%s>" "$@"', *HOSTILE, cwd="")
    assert started.code() == 0
    assert started.output == "".join(f"<{name}>" for name in ("trtllm-serve", *HOSTILE))
    [call] = ready.calls("docker", "exec")
    assert call[5] == "/"


def test_a_rank_without_a_container_says_so(ready: Fakes, script: Start, tmp_path: Path) -> None:
    command = ranks_command(spread_plan(), tmp_path / "x.log")
    started = script(command, **RANK_ZERO)
    assert started.code() == 1
    assert f"No such container: {NAME}" in started.output
    assert list(ready.temporary.iterdir()) == []
    started.close()
    ready.nothing_is_left()


@pytest.mark.parametrize("signum", [None, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_end_of_a_rank_leaves_nothing_but_what_runs_in_the_container(
    ready: Fakes, rank: Start, signum: int | None
) -> None:
    started = rank("trap '' TERM INT HUP; echo up; /bin/sleep 100 & wait")
    started.until_said("up")
    if signum is None:
        started.close()
    else:
        started.process.send_signal(signum)
    assert started.code() == 143
    assert list(ready.temporary.iterdir()) == []


def test_a_rank_may_be_ended_at_any_moment(ready: Fakes, rank: Start) -> None:
    moments = random.Random(7)
    for i in range(16):
        started = rank("exec /bin/sleep 100")
        time.sleep(moments.uniform(0, 0.12))
        if i % 2:
            started.close()
        else:
            started.process.send_signal(signal.SIGTERM)
        assert started.code() in (143, -signal.SIGTERM)  # the latter before anything was started
        assert list(ready.temporary.iterdir()) == []


def test_the_end_of_the_container_ends_its_ranks(ready: Fakes, rank: Start, container: Any) -> None:
    started = rank("echo up; exec /bin/sleep 100")
    started.until_said("up")
    os.kill(ready.container()["pid"], signal.SIGKILL)
    assert started.code() == 137
    assert container.code() == 137


SERVE = "(exec -a trtllm-serve /bin/sleep {})"


def test_rank_0_ends_when_the_server_has_and_its_leader_has_not(ready: Fakes, rank: Start) -> None:
    started = rank(f"echo up; {SERVE.format(100)}; echo down; /bin/sleep 100")
    started.until_said("up")
    asked = len(ready.calls("docker", "top"))
    started.until(lambda: len(ready.calls("docker", "top")) > asked + 2)  # it has been seen
    [engine] = [pid for pid, line in ready.processes().items() if line == "trtllm-serve 100 "]
    os.kill(engine, signal.SIGTERM)
    started.until_said("down")
    assert started.code() == 1
    assert started.output.endswith("\ntrtllm-serve has ended, its leader has not\n")
    assert list(ready.temporary.iterdir()) == []


def test_a_leader_that_ends_with_its_server_hands_on_its_code(ready: Fakes, rank: Start) -> None:
    started = rank(f"{SERVE.format(0.5)}; exit 7")
    assert started.code() == 7
    assert started.output == ""


def test_a_docker_that_does_not_answer_is_no_reason_to_end_rank_0(
    ready: Fakes, rank: Start
) -> None:
    started = rank(SERVE.format(100))
    started.until(lambda: len(ready.calls("docker", "top")) > 1)
    ready.set(no_top=True)
    asked = len(ready.calls("docker", "top"))
    started.until(lambda: len(ready.calls("docker", "top")) > asked + 3)
    ready.set()
    asked = len(ready.calls("docker", "top"))
    started.until(lambda: len(ready.calls("docker", "top")) > asked + 1)
    assert started.process.poll() is None
    started.close()
    assert started.code() == 143


def test_no_other_rank_looks(ready: Fakes, rank: Start) -> None:
    started = rank("echo up; exec /bin/sleep 100", SLURM_PROCID="1")
    started.until_said("up")
    time.sleep(0.4)
    assert ready.calls("docker", "top") == []
    started.close()
    assert started.code() == 143
