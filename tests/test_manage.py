"""Status, stop and log of what runs from a workspace."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.talk import Failure, write_json
from launch import manage, records, timelimit
from launch.identity import here, launcher, process_start
from launch.nodes import Place
from launch.slurm import Allocation
from launch.status import status
from tests.conftest import PATIENCE, plan, wait_until

pytestmark = pytest.mark.usefixtures("clean_environment")
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")

DEAD = f"{here()}:999999999:1"
ELSEWHERE = "login1/id/boot/1:5:6"
URL = "http://127.0.0.1:1"


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    path = tmp_path / "work/logs"
    path.mkdir()
    return path


def record(logs: Path, name: str, who: str, /, **changes: Any) -> Path:
    path = logs / f"run_{name}.json"
    data = {"job": name, "launcher": who, "url": URL, "model": "m", "log": "l", **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    return path


@pytest.fixture
def child(logs: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher that removes its record when it is told to stop."""
    code = (
        "import pathlib, signal, sys, time\n"
        "def stop(*_): pathlib.Path(sys.argv[1]).unlink(); sys.exit(143)\n"
        "signal.signal(15, stop); print('up', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-SEc", code, str(logs / "run_local5.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def name_of(process: subprocess.Popen[bytes]) -> str:
    return f"{here()}:{process.pid}:{process_start(process.pid)}"


def test_a_launch_says_what_it_is_and_takes_it_back(logs: Path) -> None:
    path = logs / "run_local1.json"
    records.write_record(path, plan("trtllm-serve", "it's"), URL, logs / "x.log")
    assert records.read_record(path) == {
        "job": "local1",
        "launcher": launcher(),
        "url": URL,
        "model": "it's",
        "log": str(logs / "x.log"),
        "restarts": 0,
        "name": "",
        "owner": os.geteuid(),
        "squashed": False,
        "alive": True,
    }
    records.remove_records(path, logs / "none.json")
    assert list(logs.iterdir()) == []


def test_of_two_launches_of_a_job_the_second_is_refused(
    logs: Path, child: subprocess.Popen[bytes]
) -> None:
    path = record(logs, "local1", name_of(child))
    before = path.read_text()
    with pytest.raises(Failure, match=rf"job local1 .* process {child.pid} on "):
        records.write_record(path, plan(), URL, logs / "x.log")
    assert path.read_text() == before
    assert list(logs.iterdir()) == [path]


def test_nor_may_a_job_be_served_from_two_hosts(logs: Path) -> None:
    """Only the other host could tell whether that launch lives; a requeued job is another."""
    path = record(logs, "77", ELSEWHERE, restarts=0)
    made = replace(plan(), place=Place("77", 1, ("srun",)))
    with pytest.raises(Failure, match=r"of job 77 .* process 5 on login1") as failure:
        records.write_record(path, made, URL, logs / "x.log")
    assert "make stop JOB=77" in failure.value.hint and str(path) in failure.value.hint
    requeued = replace(made, place=Place("77", 1, ("srun",), Allocation(restarts=1)))
    records.write_record(path, requeued, URL, logs / "x.log")
    assert json.loads(path.read_text())["launcher"] == launcher()


def test_logs_that_cannot_be_written_to_are_told(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.write_text("a file")
    with pytest.raises(Failure, match=f"{logs} cannot be written to: ") as failure:
        records.write_record(logs / "run_local1.json", plan(), URL, logs / "x.log")
    assert "--workspace" in failure.value.hint


def test_the_record_of_a_launch_that_was_killed_is_replaced(logs: Path) -> None:
    path = record(logs, "local1", DEAD)
    records.write_record(path, plan(), URL, logs / "x.log")
    assert json.loads(path.read_text())["launcher"] == launcher()
    assert list(logs.iterdir()) == [path]


def test_a_file_system_without_hard_links_has_records_too(
    logs: Path, monkeypatch: pytest.MonkeyPatch, child: subprocess.Popen[bytes]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = logs / "run_local1.json"
    records.write_record(path, plan(), URL, logs / "x.log")
    assert [*logs.iterdir()] == [path]
    record(logs, "local1", name_of(child))
    with pytest.raises(Failure, match="job local1 is under way"):
        records.write_record(path, plan(), URL, logs / "x.log")


@pytest.mark.parametrize("who", [DEAD, ELSEWHERE])
def test_the_records_of_others_are_not_taken_back(logs: Path, who: str) -> None:
    (logs / "endpoint.json").write_text("{")
    paths = [record(logs, "77", who), logs / "endpoint.json"]
    records.remove_records(*paths)
    assert all(path.exists() for path in paths)


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file can be removed."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)


@pytest.mark.usefixtures("read_only")
def test_a_record_that_cannot_be_removed_is_said(
    logs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A server is stopped all the same, whose clean-up goes on after it."""
    path = record(logs, "local1", launcher())
    records.remove_records(path)
    assert f"{path} could not be removed: Read-only file system" in capfd.readouterr().err


@only_root
def test_a_record_is_judged_by_the_jobs_of_its_owner(
    logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks: root has no jobs, and the server of a colleague runs on."""
    asked: list[str] = []

    def jobs_of(user: str) -> set[str]:
        asked.append(user)
        return {"7"} if user == "12345" else set()

    monkeypatch.setattr(records, "jobs_of", jobs_of)
    for job in ("7", "8"):
        os.chown(record(logs, job, ELSEWHERE), 12345, -1)
    assert [found["job"] for found in records.records(logs)] == ["7"]
    assert asked == ["12345"]


@only_root
@pytest.mark.parametrize(("whose", "left"), [(12345, ["7"]), (54321, [])])
def test_who_sees_no_job_of_another_cannot_tell(
    logs: Path, monkeypatch: pytest.MonkeyPatch, whose: int, left: list[str]
) -> None:
    """Slurm hides them with PrivateData=jobs; our own it does not."""
    monkeypatch.setattr(records, "jobs_of", lambda _: set())
    os.chown(record(logs, "7", ELSEWHERE), whose, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    assert [found["job"] for found in records.records(logs)] == left


@only_root
@pytest.mark.parametrize(("whose", "left"), [(12345, ["local5"]), (0, [])])
def test_who_does_not_see_the_processes_of_others_cannot_tell(
    logs: Path, monkeypatch: pytest.MonkeyPatch, whose: int, left: list[str]
) -> None:
    """/proc is often mounted with hidepid where many log in."""
    os.chown(record(logs, "local5", DEAD), whose, -1)
    monkeypatch.setattr(records, "process_start", lambda _: "")
    assert [found["job"] for found in records.records(logs)] == left


@pytest.mark.usefixtures("read_only")
def test_a_dead_record_that_stays_keeps_nobody_waiting(
    logs: Path, child: subprocess.Popen[bytes]
) -> None:
    """On a file system that is read-only, say."""
    record(logs, "1", DEAD)
    record(logs, "local5", name_of(child))
    assert manage.stop(logs) == 0
    assert child.wait(PATIENCE) == 143


def test_nothing_runs_from_an_empty_workspace(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert status(tmp_path / "logs") == 1
    assert manage.stop(tmp_path / "logs") == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count(f"nothing runs from {tmp_path}") == 2


def test_a_line_a_launch(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record(logs, "local5", launcher(), model="a b")
    record(logs, "77", ELSEWHERE)
    assert status(logs) == 0
    assert capfd.readouterr().out == f"77\tnot ready\t{URL}\tm\nlocal5\tnot ready\t{URL}\ta b\n"


def test_the_record_of_a_dead_launcher_is_swept_away(logs: Path) -> None:
    path = record(logs, "local5", DEAD)
    assert status(logs) == 1
    assert not path.exists()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "5", "null", '"x"', "{}", '{"launcher": 5}', '{"launcher": null}', "\udcff"],
)
def test_a_garbage_record_is_left_out(
    logs: Path, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (logs / "run_1.json").write_bytes(text.encode(errors="surrogateescape"))
    record(logs, "local5", launcher())
    assert status(logs) == 0
    assert status(logs) == 0
    assert capfd.readouterr().out.count("local5\t") == 2


@pytest.mark.parametrize("key", ["job", "url", "model"])
@pytest.mark.parametrize("who", [launcher(), ELSEWHERE], ids=["here", "elsewhere"])
def test_an_incomplete_record_is_left_out(logs: Path, key: str, who: str) -> None:
    record(logs, "77", who, **{key: ...})
    assert status(logs) == 1


def test_a_launcher_that_lives_here_is_told_and_waited_for(
    logs: Path, child: subprocess.Popen[bytes]
) -> None:
    record(logs, "local5", name_of(child))
    assert manage.stop(logs) == 0
    assert child.wait(PATIENCE) == 143


@only_root
@pytest.mark.parametrize("we_are_root", [True, False])
def test_a_record_of_somebody_else_stops_nothing_of_ours(
    logs: Path, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, we_are_root: bool
) -> None:
    """In a shared workspace anybody may write one that names any process or job."""
    told: list[object] = []
    monkeypatch.setattr(manage, "tell_to_stop", told.append)
    named = record(logs, "local5", name_of(child))
    os.chown(named, 12345, -1)
    if not we_are_root:
        monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(Failure, match="belongs to another user"):
        manage.stop(logs)
    named.unlink()
    if not we_are_root:
        os.chown(record(logs, "7", "elsewhere/id/boot/1:5:6"), 12345, -1)
        with pytest.raises(Failure, match="belongs to another user"):
            manage.stop(logs)
    assert child.poll() is None and told == []


def test_a_launch_that_we_may_not_stop_keeps_no_other_from_it(
    logs: Path, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    record(logs, "1", launcher())
    record(logs, "local5", name_of(child))
    tell = manage.tell

    def refuse_first(found: dict[str, Any]) -> None:
        if found["job"] == "1":
            raise Failure("1 is theirs")
        tell(found)

    monkeypatch.setattr(manage, "tell", refuse_first)
    with pytest.raises(Failure, match=r"^1 is theirs$"):
        manage.stop(logs)
    assert child.wait(PATIENCE) == 143


def test_a_launcher_that_ends_in_that_very_moment_is_no_error(
    logs: Path, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = record(logs, "local5", name_of(child))

    def kill(pid: int, signum: int) -> None:
        assert (pid, signum) == (child.pid, signal.SIGTERM)
        path.unlink()
        raise ProcessLookupError

    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", kill)
        assert manage.stop(logs) == 0


def test_somebody_elses_launcher_is_named(
    logs: Path, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    record(logs, "local5", name_of(child))

    def kill(pid: int, signum: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", kill)
        with pytest.raises(Failure, match=r"launcher|local5"):
            manage.stop(logs)


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Those that would be sent."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *args: sent.append(args))
    monkeypatch.setattr(records, "LOOK_EVERY", 0.01)
    return sent


@pytest.mark.parametrize("job", ["77", "41_3"])
def test_a_launcher_elsewhere_finds_the_word_in_its_record(
    logs: Path, signals: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    """It stops the one that is meant: not the other tasks of its array, not the other launch."""
    path = record(logs, "77", ELSEWHERE, name="41_3")
    other = record(logs, "78", ELSEWHERE, name="41_2")
    before = path.stat()
    monkeypatch.setattr(manage, "PATIENCE", 0.2)
    with pytest.raises(Failure, match=r"of 77, process 5 on login1, did not stop") as failure:
        manage.stop(logs, job)
    assert "`kill -KILL 5`" in failure.value.hint and "scancel" not in failure.value.hint
    assert (path.stat().st_ino, path.stat().st_uid) == (before.st_ino, before.st_uid)
    assert "stop" not in other.read_text()
    monkeypatch.setattr(records, "launcher", lambda: ELSEWHERE)
    assert records.is_told_to_stop(path) and not records.is_told_to_stop(other)
    keeper = records.Keeper(path, logs / "endpoint.json")
    keeper.start()
    keeper.join(PATIENCE)
    assert signals == [(os.getpid(), signal.SIGTERM)]


@pytest.mark.parametrize(("job", "state"), [("38", "SUSPENDED"), ("38", "STOPPED")])
def test_a_launcher_of_a_suspended_job_is_resumed_and_not_killed(
    logs: Path, monkeypatch: pytest.MonkeyPatch, job: str, state: str
) -> None:
    """Slurm stops its process, too, where it runs on a node of the job."""
    record(logs, job, ELSEWHERE)
    said = subprocess.CompletedProcess([], 0, f"37 RUNNING 1:00\n{job} {state} 1:00\n", "")
    monkeypatch.setattr(timelimit, "squeue", lambda *_: said)
    monkeypatch.setattr(manage, "PATIENCE", 0.1)
    with pytest.raises(Failure, match="job 38 is suspended") as failure:
        manage.stop(logs)
    assert "`scontrol resume 38`" in failure.value.hint and "KILL" not in failure.value.hint


@pytest.mark.parametrize("text", ["", "{", '{"stop": true}'])
def test_half_a_word_stops_nobody(logs: Path, text: str) -> None:
    path = logs / "run_77.json"
    path.write_text(text)
    assert not records.is_told_to_stop(path)
    path.unlink()
    assert not records.is_told_to_stop(path)


@only_root
def test_on_a_file_system_that_calls_us_nobody_our_launches_are_ours(
    logs: Path, child: subprocess.Popen[bytes], signals: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """NFS does so with root (root_squash); without a mapping of users, with everybody.

    A record may be anybody's there: it is the launcher who looks whether it names itself.
    """
    nobody = 65534
    monkeypatch.setattr(records, "shown_as", lambda _: nobody)
    monkeypatch.setattr(records, "jobs_of", lambda user: set() if user else {"77"})
    monkeypatch.setattr(manage, "PATIENCE", 0.1)
    paths = record(logs, "77", ELSEWHERE), record(logs, "local5", name_of(child))
    for path in paths:
        os.chown(path, nobody, -1)
    with pytest.raises(Failure, match="did not stop"):
        manage.stop(logs)
    assert signals == [] and all('"stop": true' in path.read_text() for path in paths)
    monkeypatch.setattr(records, "launcher", lambda: ELSEWHERE)
    assert records.is_told_to_stop(paths[0])
    monkeypatch.setattr(records, "shown_as", lambda _: 0)
    assert not records.is_told_to_stop(paths[0])


def test_what_a_file_system_calls_us_is_seen_by_a_file(logs: Path) -> None:
    assert records.shown_as(logs) == records.shown_as(logs / "none") == os.geteuid()
    assert list(logs.iterdir()) == []


@only_root
def test_somebody_elses_word_stops_nobody(logs: Path) -> None:
    path = record(logs, "77", launcher(), stop=True)
    assert records.is_told_to_stop(path)
    os.chown(path, 12345, -1)
    assert not records.is_told_to_stop(path)


def test_what_is_not_there_to_be_stopped_is_said(
    logs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = record(logs, "local5", launcher())
    assert manage.stop(logs, "local6") == 0
    assert f"nothing of job local6 runs from {logs.parent}" in capfd.readouterr().err
    assert path.exists()


def test_a_record_that_cannot_be_written_leads_to_its_host(
    logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    record(logs, "local5", ELSEWHERE)
    monkeypatch.setattr(manage, "tell_to_stop", refuse)
    words = (
        r"^process 5 on login1: its record cannot be written \(Permission denied\); stop it there"
    )
    with pytest.raises(Failure, match=words):
        manage.stop(logs)


def test_endpoint_json_names_a_launch_for_as_long_as_it_serves(
    logs: Path, signals: list[tuple[int, int]]
) -> None:
    """Whichever of two has written it last and takes it along."""
    path, word = (
        logs / "endpoint.json",
        {"launcher": launcher(), "job": "1", "url": "", "model": ""},
    )
    keeper = records.Keeper(record(logs, "1", launcher()), path)
    keeper.start()
    keeper.announced = dict(word)
    wait_until(path.exists)
    path.write_text("another's")
    path.unlink()
    wait_until(path.exists)
    assert json.loads(path.read_text()) == word
    keeper.take_back()
    keeper.end()
    assert not keeper.is_alive() and not path.exists() and signals == []


def test_a_record_that_somebody_removes_comes_back(
    logs: Path, signals: list[tuple[int, int]]
) -> None:
    """By `rm logs/*`, or from a cluster that does not know the job."""
    path = record(logs, "77", launcher())
    text = path.read_text()
    keeper = records.Keeper(path, logs / "endpoint.json")
    keeper.start()
    wait_until(lambda: keeper.text)
    path.unlink()
    logs.rmdir()
    wait_until(path.exists)
    assert path.read_text() == text
    keeper.end()
    assert [*logs.iterdir()] == [path] and signals == []


def test_a_word_taken_back_while_it_is_written_does_not_stay(
    logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, word = (
        logs / "endpoint.json",
        {"launcher": launcher(), "job": "1", "url": "", "model": ""},
    )
    keeper = records.Keeper(record(logs, "1", launcher()), path)
    keeper.announced = dict(word)

    def late(where: Path, what: object) -> None:
        keeper.take_back()
        write_json(where, what)

    monkeypatch.setattr(records, "write_json", late)
    keeper.restore()
    assert not path.exists()


def test_the_newest_log_is_followed(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate(["trtllm_server_2.log", "trtllm_server_1.log"]):
        (logs / name).write_text("x")
        os.utime(logs / name, (1e9 - age, 1e9 - age))
    called: list[list[str]] = []
    monkeypatch.setattr(os, "execvp", lambda _, argv: called.append(argv))
    manage.act(argparse.Namespace(workspace=logs.parent, logs="", stop=None))
    assert called == [["tail", "-n", "100", "-F", str(logs / "trtllm_server_2.log")]]


def test_without_a_log_there_is_nothing_to_follow(logs: Path) -> None:
    with pytest.raises(Failure, match="there is no log in"):
        manage.follow_log(logs, "")
