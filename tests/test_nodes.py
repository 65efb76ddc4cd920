"""Where commands run, what nodes tell, and who is still alive; settings, too."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from common import talk
from common.settings import (
    OF_MAKE,
    SETTINGS,
    heed_older,
    load_env_files,
    say_useless,
    setting,
)
from common.talk import Failure
from launch import identity, nodes
from launch.identity import here, is_alive, launcher, process_start
from launch.node.bare import Run, kill
from launch.node.images import Load
from launch.node.messages import Error, Present, Waiting
from launch.nodes import Place, Step, find_place
from launch.order import Command, parse
from launch.slurm import Share, last_words
from tests.conftest import HOSTILE, PATIENCE, ROOT, Fakes, Script, wait_until

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.mark.parametrize(
    ("text", "lines", "words"),
    [
        ("", 1, ""),
        (" \n\n", 1, ""),
        ("one\ntwo\n", 1, "two"),
        ("one\n two \n\n", 2, "one / two"),
        ("one", 3, "one"),
        ("docker: no such image.\nSee 'docker run --help'.\n", 1, "docker: no such image."),
        ("docker: no.\n\nRun 'docker run --help' for more information\n", 1, "docker: no."),
        ("why\nsrun: error: n1: task 0: Exited with exit code 1\n", 1, "why"),
        ("why\nslurmstepd: error: *** STEP 1.0 ***\nsalloc: Relinquishing\n", 1, "why"),
        ("srun: error: Unable to create step\n", 1, "srun: error: Unable to create step"),
        ("srun: error: why\nsrun: Terminating the step\n", 1, "srun: error: why"),
        ("srun: cluster configuration lacks support for cpu binding\n", 1, ""),
    ],
)
def test_the_last_words_are_not_slurms_postscript(text: str, lines: int, words: str) -> None:
    assert last_words(text, lines) == words


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"node": "n1", "Error": {"why": "a  b"}}\n', ("n1", Error("a  b"))),
        ('{"Error": {"why": ""}, "node": "n1"}', ("n1", Error(""))),
        ("talk\n", ("", None)),
        ('{"node": "n1"}', ("", None)),
        ('{"node": "n1", "Unheard": {}}', ("", None)),
        ('{"node": "n1", "Error": {"what": ""}}', ("", None)),
        ('{"node": "n1", "Error": {"why": ""}, "Up": {}}', ("", None)),
        ('{"node": "n1", "Error": []}', ("", None)),
        ("[" * 100_000, ("", None)),
        ("7", ("", None)),
        ("", ("", None)),
    ],
)
def test_what_is_no_message_is_talk(line: str, told: tuple[str, object]) -> None:
    found = parse(line)
    assert (found.node, found.message) == told
    assert found.line == line.rstrip("\n")


@pytest.mark.parametrize("value", [*HOSTILE, "a\tb", "%s%n", "\\n", "", "\udcff"])
def test_a_node_tells_any_value_on_one_line(fakes: Fakes, value: str) -> None:
    command = Command([], Load(value, "t", [], "", "none"))  # it is told that it cannot be read
    done = run_order(command, fakes)
    told, *waited = (parse(line) for line in reversed(done.stdout.splitlines()))
    assert all(each.message == Waiting() for each in waited)  # tests beside this one load, too
    assert told.node == "local"
    assert told.message == Error(f"cannot read {value}: No such file or directory")


def run_order(command: Command, fakes: Fakes) -> subprocess.CompletedProcess[str]:
    """Its input stays open until it has answered: another load on this machine is waited for."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command.argv, stdin=pipe, stdout=pipe, stderr=pipe, env=fakes.environment(), text=True
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(command.text)
        process.stdin.flush()
        out, err = process.stdout.read(), process.stderr.read()
    return subprocess.CompletedProcess(command.argv, process.returncode, out, err)


def test_without_slurm_commands_run_here() -> None:
    place = find_place({})
    assert (place.size, place.every, place.head) == (1, [], [])
    assert place.on(2, 8, "pmix") == []
    assert place.job == f"local{os.getpid()}"
    assert not place.slurm
    assert not find_place({"SLURM_JOB_ID": ""}).slurm


@pytest.fixture
def job_of(fakes: Fakes) -> Callable[..., Place]:
    """The place that a shell's environment leads to, in a job of so many nodes."""

    def find(size: int, **environ: str) -> Place:
        os.environ.update(fakes.environment())
        fakes.set(nodes=[f"n{i + 1}" for i in range(size)])
        return find_place({"SLURM_JOB_ID": "77", **environ})

    return find


@pytest.mark.parametrize("size", [1, 2, 3])
def test_in_an_allocation_srun_is_the_prefix(job_of: Callable[..., Place], size: int) -> None:
    place = job_of(size)
    assert (place.job, place.size, place.slurm) == ("77", size, True)
    flags = [
        "srun",
        "--overlap",
        "--export=ALL",
        "--mpi=none",
        "--cpu-bind=none",
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--ntasks-per-node=1",
    ]
    first = ["--nodelist=n1"] if size > 1 else []  # it is the only one otherwise
    assert place.every == [*flags, f"--nodes={size}", f"--ntasks={size}", "--gres=none"]
    assert place.head == [*flags, "--nodes=1", "--ntasks=1", "--gres=none", *first]


@pytest.mark.parametrize(
    ("gpus", "shares"), [("0,1", [Share(0, 2, "0,1")] * 2), ("none", []), ("0-7", None)]
)
def test_where_slurm_shows_no_node_the_job_tells_of_its_gpus(
    fakes: Fakes, capfd: pytest.CaptureFixture[str], gpus: str, shares: list[Share] | None
) -> None:
    """PrivateData=nodes. What the nodes have in all is not known then."""
    os.environ.update(fakes.environment())
    fakes.set(nodes=["n1", "n2"], gpus=gpus, private=True)
    found = find_place({"SLURM_JOB_ID": "77"}).allocation
    assert found.nodes == ("n1", "n2")
    if shares is not None:
        assert list(found.shares.values()) == shares
    assert not any(share.is_whole for share in found.shares.values())
    assert ("Slurm does not show" in capfd.readouterr().err) == (not found.shares)


@pytest.mark.parametrize("asked", ["all", "a", "a,b", "b"])
def test_the_cluster_that_is_asked_is_the_jobs_own(fakes: Fakes, asked: str) -> None:
    """Jobs of several clusters have the same numbers, and scontrol asks only one."""
    os.environ.update(fakes.environment(SLURM_CLUSTERS=asked))
    fakes.set(cluster="b")
    job = {"SLURM_JOB_ID": "77", "SLURM_CLUSTERS": asked}
    assert find_place({**job, "SLURM_CLUSTER_NAME": "b"}).size == 2
    os.environ["SLURM_CLUSTERS"] = asked
    if asked == "b":  # salloc -M b, by an older Slurm
        assert find_place(job).size == 2
        return
    with pytest.raises(Failure, match="Only one cluster"):
        find_place(job)


@pytest.mark.parametrize(("nodes", "first"), [(1, True), (2, True), (3, False)])
def test_a_step_of_ranks_lies_on_the_first_nodes(
    job_of: Callable[..., Place], nodes: int, first: bool
) -> None:
    place = job_of(3)
    assert place.on(nodes, 8, "pmix_v4") == [
        "srun",
        "--overlap",
        "--export=ALL",
        "--mpi=pmix_v4",
        "--cpu-bind=none",
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--ntasks-per-node=8",
        f"--nodes={nodes}",
        f"--ntasks={8 * nodes}",
        "--gres=none",
        *([f"--nodelist={','.join(place.allocation.nodes[:nodes])}"] if first else []),
    ]


def test_variables_that_bend_a_step_are_taken_from_srun_alone(job_of: Callable[..., Place]) -> None:
    """Of the allocation, and of whatever job the shell was in before."""
    bend = ["SLURM_HOSTFILE", "SLURM_NTASKS_PER_GPU", "SLURM_GPUS", "SLURM_JOB_NODELIST",
            "SLURM_JOB_NUM_NODES", "SLURM_EXCLUSIVE", "SLURM_MEM_PER_NODE",
            "SRUN_CPUS_PER_TASK"]  # fmt: skip
    kept = ["SLURM_CONF", "SLURM_SUBMIT_DIR", "SLURM_WORKING_CLUSTER", "PMIX_X", "HF_TOKEN"]
    place = job_of(2, **dict.fromkeys([*bend, *kept], "x"))
    for prefix in (place.every, place.head, [*place.clean, "srun"]):
        before = prefix[: prefix.index("srun")]
        assert before == ["env", *(word for name in sorted(bend) for word in ("-u", name))]
    assert job_of(1, SLURM_HINT="x").every[:4] == ["env", "-u", "SLURM_HINT", "srun"]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("slurmstepd-n1: error: *** STEP 6.1 ON n1 CANCELLED AT 2026 ***", "cancelled"),
        ("srun: Job step aborted: Waiting up to 32 seconds for job step to finish.", "cancelled"),
        ("*** STEP 6.1 ON n1 CANCELLED AT 2026 DUE TO TIME LIMIT", "has reached its time limit"),
        ("*** STEP 6.1 ON n1 CANCELLED AT 2026 DUE TO NODE FAILURE, SEE", "has lost a node"),
        (
            "srun: error: Task launch for StepId=17.0 failed on node n2: Connection failure",
            "n2: Slurm cannot start anything there: Connection failure",
        ),
        (
            "srun: error: Task launch for StepId=17.0 failed on node n2: Job credential revoked",
            "Slurm ended the job: it was cancelled",
        ),
        (
            "srun: error: Task launch for StepId=7.0 failed on node n2: Job credential revoked; "
            "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026 DUE TO TIME LIMIT ***",
            "Slurm ended the job: it has reached its time limit",
        ),
        ("srun: error: Node failure on n2", "n2: Slurm has lost this node"),
        ("srun: error: n2: task 1: Exited with exit code 1", ""),
    ],
)  # fmt: skip
def test_what_slurm_has_ended_is_told_by_what_slurm_says(said: str, why: str) -> None:
    with pytest.raises(Failure) as failure:
        nodes.run(["sh", "-c", f"echo 'srun: noise' >&2; echo '{said}' >&2; exit 143"])
    assert ("Slurm" in failure.value.message) == bool(why)
    assert why in failure.value.message


def test_run_returns_what_a_command_printed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert nodes.run(["sh", "-c", "cat; echo out; echo err >&2"]) == "out\n"
    assert capfd.readouterr().err == ""  # a command is for the log, or -v
    monkeypatch.setattr(talk.Record, "verbose", True)
    nodes.run(["sh", "-c", "cat; echo out; echo err >&2"])
    assert "] $ sh -c 'cat; echo out" in capfd.readouterr().err


def test_a_failed_command_is_told_with_its_code_and_words() -> None:
    with pytest.raises(Failure, match=r"exit code 3: why$"):
        nodes.run(["sh", "-c", "echo why >&2; exit 3"])
    with pytest.raises(Failure, match=r"exit code 3: no message$"):
        nodes.run(["sh", "-c", "exit 3"])
    with pytest.raises(Failure, match="no-such-program: not found in PATH"):
        nodes.run(["no-such-program"])


def test_output_that_is_not_utf8_breaks_nothing() -> None:
    assert nodes.run(["sh", "-c", r"printf 'a\377b'"]) == "a\ufffdb"
    with pytest.raises(Failure, match="exit code 1: a\ufffdb"):
        nodes.run(["sh", "-c", r"printf 'a\377b' >&2; exit 1"])


def test_a_command_that_does_not_end_is_ended(fakes: Fakes) -> None:
    os.environ.update(fakes.environment())
    with pytest.raises(Failure, match=r"did not end within 0\.2 s"):
        nodes.run(["sleep", "60"], timeout=0.2)
    fakes.nothing_is_left()


def test_a_stop_in_the_middle_ends_the_command_too(fakes: Fakes) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    os.environ.update(fakes.environment())
    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            # Once it runs: to start it takes a busy machine a while.
            nodes.run(["sleep", "60"], begun=lambda _: signal.setitimer(signal.ITIMER_REAL, 0.5))
    finally:
        signal.signal(signal.SIGALRM, before)
    fakes.nothing_is_left()


def test_a_stop_in_what_is_done_meanwhile_ends_the_command_too(fakes: Fakes) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    os.environ.update(fakes.environment())
    with pytest.raises(KeyboardInterrupt):
        nodes.run(["sleep", "60"], begun=stop)
    fakes.nothing_is_left()


def test_talk_to_a_terminal_that_is_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115
    closed = Path(os.devnull).open("w")  # noqa: SIM115
    closed.close()
    for stream in (full, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        talk.say("lost")
        talk.say("lost")
        if sys.stderr is not stream:
            sys.stderr.close()
    with contextlib.suppress(OSError):
        full.close()


def test_what_cannot_be_written_is_named_and_leaves_no_part(tmp_path: Path) -> None:
    path = tmp_path / "logs/endpoint.json"
    path.mkdir(parents=True)
    with pytest.raises(OSError, match=re.escape(str(path))):
        talk.write_json(path, {"a": 1})
    assert list(path.parent.iterdir()) == [path]


def test_a_dead_process_has_no_start_and_a_living_one_keeps_its() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        start = process_start(child.pid)
        assert start.isdigit()
        who = f"{here()}:{child.pid}:{start}"
        assert is_alive(who) is True
        assert is_alive(f"{here()}:{child.pid}:{int(start) + 1}") is False  # the number was reused
    finally:
        child.kill()
        child.wait()
    assert process_start(child.pid) == ""
    assert is_alive(who) is False


def test_a_name_with_brackets_and_spaces_does_not_hide_the_start(tmp_path: Path) -> None:
    odd = tmp_path / "a) (b 1 2"
    odd.symlink_to("/bin/sleep")
    child = subprocess.Popen([odd, "60"])
    try:
        wait_until(lambda: "a)" in Path(f"/proc/{child.pid}/comm").read_text())
        start = process_start(child.pid)
        ticks = int(Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19])
        assert int(start) >= ticks
    finally:
        child.kill()
        child.wait()


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen(["true"])
    who = f"{here()}:{child.pid}:{process_start(child.pid)}"
    wait_until(lambda: ") Z" in Path(f"/proc/{child.pid}/stat").read_text())
    assert is_alive(who) is False
    child.wait()


def test_this_process_is_its_own_living_launcher() -> None:
    assert is_alive(launcher()) is True


@pytest.mark.parametrize(
    "who", ["", ":", "elsewhere/boot/1:1:1", "::", "x", "HERE", "HERE:", "HERE:x:1"]
)
def test_nobody_is_called_dead_on_thin_evidence(who: str) -> None:
    assert is_alive(who.replace("HERE", here())) is None


@pytest.mark.parametrize(
    ("job", "ours", "theirs", "alive"),
    [
        ("local5", "id-1", "id-1", False),  # this machine has been booted since
        ("local5", "id-1", "id-2", None),  # another machine of the same name
        ("local5", "", "", None),
        ("66", "id-1", "id-1", None),  # Slurm knows; an image may have been installed twice
    ],
)
def test_another_boot_under_our_name_proves_only_so_much(
    monkeypatch: pytest.MonkeyPatch, job: str, ours: str, theirs: str, alive: bool | None
) -> None:
    monkeypatch.setattr(identity, "machine", lambda: theirs)
    host, machine, _, table = here().split("/")
    assert machine == theirs
    monkeypatch.setattr(identity, "machine", lambda: ours)
    assert is_alive(f"{host}/{theirs}/another-boot/{table}:5:6", job) is alive


@dataclass
class Plain:
    """A command that is no order, for a Step."""

    argv: list[str]
    text: str = ""

    def shown(self, more: str = "") -> str:
        return more


def step_of(*argv: str, secret: str = "") -> Step:
    return Step(cast(Command, Plain([*argv])), secret=secret)


BARE = Run(["bash", "-c", "trap 'exit 0' TERM; echo up; sleep 60 & wait"])


@pytest.mark.parametrize("signum", [None, signal.SIGTERM])
def test_a_held_order_ends_with_its_standard_input(
    script: Callable[..., Script], fakes: Fakes, signum: int | None
) -> None:
    held = script(Command([], BARE))
    held.until_said("up")
    held.type("not the end\n")
    if signum is None:
        held.close()
    else:
        held.process.send_signal(signum)
    assert held.code() == 143
    assert held.output.startswith("up\n")
    if signum is not None:
        held.close()
    fakes.nothing_is_left()


def test_a_held_order_that_ends_by_itself_leaves_nothing(
    script: Callable[..., Script], fakes: Fakes
) -> None:
    assert script(Command([], Run(["sh", "-c", "exit 5"]))).code() == 5
    fakes.nothing_is_left()


def test_a_step_gives_its_secret_after_its_order_and_ends_when_let_go(fakes: Fakes) -> None:
    os.environ.update(fakes.environment())
    told = """read -r x; printf '{"node": "n", "Present": {"id": "%s"}}\\n' "$x"; cat"""
    step = step_of("sh", "-c", told, secret="a b\n")
    first = next(step.told())
    assert (first.node, first.message) == ("n", Present("a b"))
    assert step.poll() is None
    assert step.stop() is True
    assert step.poll() == 0
    assert step.stop() is True  # twice is no more than once


def test_a_step_that_does_not_end_is_killed(fakes: Fakes) -> None:
    os.environ.update(fakes.environment())
    step = step_of("sh", "-c", "exec sleep 60")
    assert step.stop(0.1) is False
    assert step.poll() == -signal.SIGKILL


def test_a_step_that_cannot_be_run_is_told() -> None:
    with pytest.raises(Failure, match="no-such-program cannot be run"):
        step_of("no-such-program")


def test_a_step_that_ends_at_once_does_not_choke_on_its_secret() -> None:
    for _ in range(5):
        step = step_of("true", secret="x" * 100_000)
        step.stop()


def test_the_killed_launcher_takes_the_held_order_with_it(fakes: Fakes, tmp_path: Path) -> None:
    """The kernel closes the pipe, whatever ended us."""
    code = (
        "import sys, time; from launch.nodes import Step\n"
        "from launch.node.bare import Run; from launch.order import Command\n"
        "step = Step(Command([], Run(['sh', '-c', 'echo up; exec sleep 60'])))\n"
        "assert step.process.stdout.readline() == 'up\\n'\n"
        "print('up', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=fakes.environment(PYTHONPATH=str(Path(nodes.__file__).parents[1])),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout and process.stdout.readline() == b"up\n"
    process.stdout.close()
    process.kill()
    process.wait()
    fakes.nothing_is_left()


def test_a_session_that_is_killed_is_waited_for() -> None:
    """One whose threads still end keeps its port: SGLang's did, after the launcher had gone."""
    engine = subprocess.Popen(["sleep", "60"], start_new_session=True)
    buried = threading.Timer(0.3, engine.wait)  # until then it is there, for whoever asks
    buried.start()
    kill(engine.pid)
    assert engine.returncode == -signal.SIGKILL
    buried.join()


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new/x.json"
    talk.write_json(path, {"a": "ü\n"})
    assert json.loads(path.read_text()) == {"a": "ü\n"}
    talk.write_json(path, {"b": 1})
    assert json.loads(path.read_text()) == {"b": 1}
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(TypeError):
        talk.write_json(path, {"b": object()})
    assert list(path.parent.iterdir()) == [path]
    assert json.loads(path.read_text()) == {"b": 1}


# Settings


def test_flag_beats_environment_beats_dotenv_here_beats_dotenv_there(tmp_path: Path) -> None:
    there, cwd = tmp_path / "scripts/.env", tmp_path / "work/.env"
    there.write_text("MODEL=there\nPORT=1\nIMAGE=there\nHF_HOME=there\n")
    cwd.write_text("MODEL=cwd\nPORT=2\n")
    os.environ["MODEL"] = "environment"
    load_env_files()
    assert [setting(n) for n in ("MODEL", "PORT", "IMAGE", "GPUS")] == [
        "environment",
        "2",
        "there",
        "auto",
    ]


@pytest.mark.parametrize("name", [each.name for each in SETTINGS])
def test_an_empty_variable_counts_as_not_set(name: str) -> None:
    default = next(each.default for each in SETTINGS if each.name == name)
    assert setting(name, {}) == setting(name, {name: ""}) == default
    assert setting(name, {name: "x y"}) == "x y"


def test_an_empty_variable_does_not_hide_the_env_file(tmp_path: Path) -> None:
    (tmp_path / "work/.env").write_text("MODEL=cwd\nPORT=\n")
    (tmp_path / "scripts/.env").write_text("PORT=8123\n")
    os.environ["MODEL"] = ""
    load_env_files()
    assert (setting("MODEL"), setting("PORT")) == ("cwd", "8123")


@pytest.mark.parametrize("value", ["a b", "it's", 'a"b', "$HOME", "a;b|c", "*", "-x", "ünï", "#"])
def test_a_hostile_value_in_an_env_file_stays_as_it_is(tmp_path: Path, value: str) -> None:
    quoted = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    (tmp_path / "work/.env").write_text(f"# a comment\nexport MODEL={quoted}\n")
    load_env_files()
    assert setting("MODEL") == value


@pytest.mark.parametrize(
    ("text", "line", "name"),
    [
        ("MODEL: org/x\n", 1, "MODEL"),
        ("# a\n\nPORT=1\nHF_TOKEN: hf_secret\n", 4, "HF_TOKEN"),
        ("\n\nexport MODEL\n", 3, "export"),
        ("MODEL\n", 1, "MODEL"),
        ("MODEL org/x", 1, "MODEL"),
        ('MODEL="org/x\n', 1, "MODEL"),
        ("=x\n", 1, "x"),
    ],
)
def test_a_line_of_an_env_file_that_sets_nothing_is_wrong_usage(
    tmp_path: Path, text: str, line: int, name: str
) -> None:
    path = tmp_path / "work/.env"
    path.write_text(text)
    with pytest.raises(Failure) as failure:
        load_env_files()
    what = f"{name} is not set there; a line is NAME=VALUE"
    assert (failure.value.message, failure.value.code) == (f"{path}, line {line}: {what}", 2)


@pytest.mark.parametrize("head", ["", "\ufeff"])
def test_a_windows_editors_env_file_is_read(tmp_path: Path, head: str) -> None:
    (tmp_path / "work/.env").write_bytes(f"{head}MODEL=a b\r\nPORT=81\r\n".encode())
    load_env_files()
    assert (setting("MODEL"), setting("PORT")) == ("a b", "81")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("FOLDER", "it is for make's command line (make ... FOLDER=)"),
        ("READYTIMEOUT", "did you mean READY_TIMEOUT?"),
        ("model", "did you mean MODEL?"),
        ("CUDA_VISIBLE_DEVICES", "the engine's container does not see it"),
        ("WHATEVER", "the engine's container does not see it"),
        ("PORT", ""),
        ("NCCL_DEBUG", ""),
        ("GLOO_SOCKET_IFNAME", ""),
        ("https_proxy", ""),
        ("DOCKER_HOST", ""),
    ],
)
def test_a_variable_that_does_nothing_says_so(
    tmp_path: Path, name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "work/.env"
    path.write_text(f"{name}=8\n")
    load_env_files()
    what = f"{path}: {name} is not a setting, so it does nothing; {said}\n"
    assert capsys.readouterr().err.endswith(what) if said else not capsys.readouterr().err


def test_what_is_for_make_alone_is_what_the_makefile_takes() -> None:
    text = (ROOT / "Makefile").read_text()
    given = set(" ".join(re.findall(r"^GIVEN \W?= (.*)", text, re.M)).split())
    ours = {each.name for each in SETTINGS}
    assert given - ours | {"EXTRA_ARGS", "BENCH_ARGS"} == set(OF_MAKE)


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({"HUGGINGFACE_HUB_CACHE": "/hub"}, {"HF_HUB_CACHE": "/hub"}),
        ({"HUGGINGFACE_HUB_CACHE": "/hub", "HF_HUB_CACHE": "/new"}, {}),
        ({"HUGGING_FACE_HUB_TOKEN": "t", "HF_TOKEN": ""}, {"HF_TOKEN": "t"}),
        ({"XDG_CACHE_HOME": "/no/such"}, {}),
        ({"XDG_CACHE_HOME": "/no/such", "HF_HOME": "/home"}, {}),
    ],
)
def test_hugging_faces_older_names_count_as_the_newer_ones(
    given: dict[str, str], then: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    environ = dict(given)
    heed_older(environ)
    assert environ == {**given, **then}
    say_useless(Path(".env"), given)
    assert not capsys.readouterr().err


def test_a_cache_of_ones_own_counts_where_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "huggingface").mkdir()
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    heed_older(environ)
    assert environ["HF_HOME"] == f"{tmp_path}/huggingface"


def test_a_token_of_an_older_name_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "work/.env").write_text("HUGGING_FACE_HUB_TOKEN=x\n")
    (tmp_path / "work/.env").chmod(0o600)
    load_env_files()
    assert setting("HF_TOKEN") == "x"


def test_without_env_files_nothing_changes() -> None:
    os.environ.pop("XDG_CACHE_HOME", None)
    before = json.dumps(dict(os.environ))
    load_env_files()
    assert json.dumps(dict(os.environ)) == before


def test_what_a_step_that_does_not_end_has_started_ends_with_it() -> None:
    """Its children hold the pipe that we read: closing it would wait for them."""
    step = step_of("sh", "-c", "sleep 100; :")
    reader = threading.Thread(target=lambda: list(step.told()), daemon=True)
    reader.start()
    begun = time.monotonic()
    assert not step.stop(0.1)
    assert time.monotonic() - begun < PATIENCE
