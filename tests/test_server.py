"""The server: its log, its health, and what its end means."""

from __future__ import annotations

import http.server
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from common.talk import Failure, complain, say
from launch import death, engines, health, server, slurm, timelimit, watch
from launch.death import report_death
from launch.findings import Node
from launch.log import Log
from launch.nodes import Place, Step
from launch.order import Command
from launch.progress import Progress
from launch.spread import Spread
from tests.conftest import ONE_NODE, PATIENCE, Fakes, plan, wait_until

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.mark.parametrize("code", [2, 125, 126, 127, 137, 139, 143])
def test_the_codes_that_people_meet_have_a_meaning(code: int) -> None:
    assert engines.meanings("x")[code]


# What its end means


def unasked(every: float) -> Command:
    raise NotImplementedError


@pytest.fixture
def run_plan(ready: Fakes, tmp_path: Path) -> Iterator[Callable[..., server.Server]]:
    os.environ.update(ready.environment())
    launched: list[server.Server] = []

    def run(*engine: str, place: Place | None = None) -> server.Server:
        made = plan(*engine)
        made = replace(made, place=place or made.place)
        url, log = "http://127.0.0.1:1", tmp_path / "x.log"
        nodes = [Node("n1"), Node("n2")]
        what = made, made.replicas[0], nodes, url, log, (0, 0), threading.Event()
        launched.append(server.launch(*what))
        return launched[-1]

    yield run
    for each in launched:
        each.health.end()
        each.health.join()
        each.step.stop()
        each.log.close()


WHY = "echo OSError: why; "


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (WHY + "exit 137", r"exit code 137 \(killed\) before it was ready, .* s: OSError: why$"),
        (WHY + "exit 3", r"exit code 3 before it was ready, .* s: OSError: why$"),
        ("exit 2", r"exit code 2 \(it refused its arguments\) .*: its log names no cause$"),
        ("exit 0", r"exit code 0 \(though nobody stopped it\) before it was ready"),
    ],
)
def test_an_engine_that_ends_is_told_with_its_code_meaning_and_words(
    run_plan: Callable[..., server.Server], engine: str, words: str
) -> None:
    running = run_plan("bash", "-c", engine)
    with pytest.raises(Failure, match="^n1: trtllm-serve ended with " + words):
        watch.await_ready(running, 60)


ENDED_WITH = "srun: error: n1: task 0: Exited with exit code {}"


@pytest.mark.parametrize(
    ("slurm", "script", "words"),
    [
        (True, "echo srun: error: n1: task 0: Killed; exit 137", "n1: the launcher's python3 end"),
        (
            True,
            "echo srun: error: task 7 launch failed: Slurmd could not connect IO; exit 0",
            "srun ended with exit code 0 before .*: srun: error: task 7 launch failed: Slurmd",
        ),
        (
            True,
            "echo srun: error: Unable to create step for job 77: Invalid account; exit 1",
            "srun ended with exit code 1 before .*: srun: error: Unable to create step",
        ),
        (
            True,
            f"echo OSError: why; echo {ENDED_WITH.format(137)}; exit 137",
            r"n1: trtllm-serve ended with exit code 137 \(killed\) before .*: OSError: why",
        ),
        (
            True,
            f"echo docker: its client was killed; echo {ENDED_WITH.format(125)}; exit 125",
            "n1: docker run ended with exit code 125 before .*: docker: its client was killed",
        ),
        (
            False,
            "echo 'docker: Error response from daemon: exec: \"sh\": not found'; exit 127",
            "n1: docker run ended with exit code 127 before .*: docker: Error response from",
        ),
        (False, "exit 127", r"n1: trtllm-serve ended with exit code 127 \(bash was not"),
    ],
)
def test_who_ended_is_named(
    run_plan: Callable[..., server.Server], slurm: bool, script: str, words: str
) -> None:
    """Between the launcher and its engine are srun, our program on the node, docker's client."""
    here = Place("77", 1, ONE_NODE) if slurm else None
    running = run_plan("bash", "-c", script, place=here)
    with pytest.raises(Failure, match=f"^{words}"):
        watch.await_ready(running, 60)


@pytest.mark.parametrize(
    ("place", "who"), [(None, "n1: the launcher's python3"), (Place("77", 1, ONE_NODE), "srun")]
)
def test_what_is_killed_here_is_not_the_engine(
    run_plan: Callable[..., server.Server], place: Place | None, who: str
) -> None:
    running = run_plan("bash", "-c", "echo up; sleep 5", place=place)
    wait_until(lambda: running.log.last_line or running.pump())
    running.step.process.kill()
    with pytest.raises(Failure, match=f"^{who} ended with exit code 137 before"):
        watch.await_ready(running, 60)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("", "job 77 was cancelled"),
        ("77 COMPLETING None", "job 77 was cancelled"),
        ("77 COMPLETING NodeDown", "job 77 has lost a node"),
        ("77 RUNNING None", "its step was cancelled"),
    ],
)
def test_the_end_of_a_job_is_not_blamed_on_the_engine(
    monkeypatch: pytest.MonkeyPatch,
    run_plan: Callable[..., server.Server],
    state: str,
    words: str,
) -> None:
    asked = subprocess.CompletedProcess([], 0, state, "")
    monkeypatch.setattr(slurm, "squeue", lambda *_: asked)
    monkeypatch.setattr(death, "is_preempted", lambda _: False)
    text = "echo 'slurmstepd: error: *** STEP 77.1 ON n1 CANCELLED AT 2025 ***'; exit 1"
    running = run_plan("bash", "-c", text, place=Place("77", 1, ONE_NODE))
    with pytest.raises(Failure, match=f"Slurm ended the server .*: {words}$") as failure:
        watch.await_ready(running, 60)
    assert ("sinfo -R" in failure.value.hint) == ("lost" in words)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("76 TIMEOUT TimeLimit\n77 RUNNING None\n", ""),
        ("76 RUNNING None\n77 COMPLETING TimeLimit\n", "has reached its time limit"),
        ("77 COMPLETING None\n", "was cancelled"),
        ("77 COMPLETING NodeDown\n", "has lost a node"),
        ("77 NODE_FAIL NodeDown\n", "has lost a node"),
        ("77 PREEMPTED None\n", "was preempted"),
        ("77 SUSPENDED None\n", ""),
        ("77 SIGNALING None\n", ""),
        ("", ""),
    ],
)
def test_whether_slurm_ends_the_job_is_told_by_the_jobs_own_line(
    monkeypatch: pytest.MonkeyPatch, said: str, words: str
) -> None:
    """Of an array's last task squeue lists all tasks: they have its number in common."""
    asked = subprocess.CompletedProcess([], 0, said, "")
    monkeypatch.setattr(slurm, "squeue", lambda *_: asked)
    assert death.how_the_job_ends("77") == words
    assert death.how_the_job_ends("77", "was cancelled") == (words if said else "was cancelled")


@pytest.mark.parametrize(
    ("times", "preempted"),
    [
        ("PreemptTime=2026-11-29T22:10:11", True),
        ("PreemptEligibleTime=2026-11-29T22:09:00 PreemptTime=2026-11-29T22:10:11", True),
        ("PreemptEligibleTime=2026-11-29T22:09:00 PreemptTime=None", False),
        ("Comment=PreemptTime=2026-11-29T22:10:11", False),
    ],
)
def test_a_job_that_is_preempted_runs_through_its_time_of_grace(
    monkeypatch: pytest.MonkeyPatch, times: str, preempted: bool
) -> None:
    running = subprocess.CompletedProcess([], 0, "77 RUNNING None\n", "")
    monkeypatch.setattr(slurm, "squeue", lambda *_: running)
    record = f"JobId=77 JobName=x\n   JobState=RUNNING Reason=None\n   {times}\n"
    monkeypatch.setattr(death, "run", lambda *_, **__: record)
    assert death.how_the_job_ends("77") == ("was preempted" if preempted else "")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("SUSPENDED", "job 77 is suspended: .*`scontrol resume 77`"),
        ("RUNNING", "could not confirm that the container is gone: no answer"),
    ],
)
def test_why_a_node_could_not_be_asked_to_clean_up_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: str, words: str
) -> None:
    def ask(*_: object, **__: object) -> None:
        raise Failure("no answer", "", False)

    asked = subprocess.CompletedProcess([], 0, f"77 {state} 1:00\n", "")
    monkeypatch.setattr(timelimit, "squeue", lambda *_: asked)
    monkeypatch.setattr(server, "ask", ask)
    made = replace(plan(), place=Place("77", 1, ("srun",)))
    server.remove_once_more(made, made.replicas[0])
    assert re.search(words, capsys.readouterr().err)


FIRST = "srun: error: n2: task 9: Exited with exit code 3\n"
SIGNALLED = FIRST.replace("3", "143")
CANCEL = "slurmstepd: error: *** STEP 77.1 ON n1 CANCELLED AT 2025-11-24T08:14:52 ***\n"
LIMIT = CANCEL.replace(" ***\n", " DUE TO TIME LIMIT ***\n")
LOST = "srun: error: Node failure on n2\n"
REST = "srun: Terminating StepId=77.1\nsrun: error: n1: tasks 0-7: Terminated\n"


@pytest.mark.parametrize(
    ("said", "words", "path"),
    [
        (
            SIGNALLED,
            "n2: rank 9 stopped while serving: SIGTERM was sent to its step$",
            "_rank9",
        ),
        (
            FIRST + CANCEL + REST,
            r"n2: rank 9 ended with exit code 3 .*: OSError: rank 9's words$",
            "_rank9",
        ),
        (
            FIRST + REST * 500,
            r"n2: rank 9 ended with exit code 3 .*: OSError: rank 9's words$",
            "_rank9",
        ),
        (CANCEL + REST, "n1: Slurm ended the server while serving: job 77 was cancelled", ""),
        (LIMIT, "n1: Slurm ended the server while serving: job 77 has reached its time limit", ""),
        (
            REST,
            r"n1: ranks 0-7 ended with exit code 143 \(terminated\) .*: OSError: rank 0's",
            "_rank0",
        ),
        (LOST, "n2: Slurm has lost this node, while serving$", ""),
        (LOST + CANCEL, "n2: Slurm has lost this node, while serving$", ""),
        (SIGNALLED + LOST, "n2: Slurm has lost this node, while serving$", ""),
        ("", r"n1: trtllm-serve ended with exit code 1 .*: OSError: rank 0's words$", "_rank0"),
    ],
)
def test_the_end_of_a_world_is_told_by_the_rank_that_failed_first(
    tmp_path: Path, said: str, words: str, path: str
) -> None:
    log = Log(tmp_path / "x.log")
    log.sink.write(said.encode())
    log.sink.flush()
    for rank in ("0", "9"):
        (tmp_path / f"x_rank{rank}.log").write_text("OSError: earlier\n" * (rank == "0"))
    rank0 = Log(tmp_path / "x_rank0.log")
    for rank in ("0", "9"):
        with (tmp_path / f"x_rank{rank}.log").open("a") as file:
            file.write(f"OSError: rank {rank}'s words\n")
            file.write("tensorrt-llm-serve: n2: stopped by SIGTERM\n" * said.startswith(SIGNALLED))
    made = replace(plan(), place=Place("77", 2, ("srun",)))
    spread = replace(made.replicas[0], spread=Spread(2, 8, "pmix"))
    url, step, nodes = "http://127.0.0.1:1", cast(Step, None), [Node("n1"), Node("n2")]
    asked, probe = health.Health(url, ["m"]), health.Probe(url, 0, 0, unasked)
    running = server.Server(
        made, spread, nodes, url, step, log, asked, probe, time.monotonic(), rank0
    )
    running.ready_at = time.monotonic()
    with pytest.raises(Failure, match="^" + words) as failure:
        report_death(running, 1)
    assert not (failure.value.passing and "Node failure" in said)  # it has no place to start anew
    assert failure.value.hint.endswith(f"log: {tmp_path}/x{path}.log")
    for each in (log, rank0):
        each.close()


@pytest.mark.parametrize("said", [FIRST, FIRST + REST, FIRST + CANCEL + REST])
def test_a_rank_that_said_nothing_is_not_lent_the_words_of_others(
    run_plan: Callable[..., server.Server], tmp_path: Path, said: str
) -> None:
    """An earlier launch's, or Slurm's on the ranks that ended because this one did."""
    (tmp_path / "x_rank9.log").write_text("OSError: an earlier launch\n")
    (tmp_path / "said").write_text(said)
    running = run_plan("bash", "-c", f"cat {tmp_path}/said; exit 3")
    running.replica = replace(running.replica, spread=Spread(2, 8, "pmix"))
    words = r"^n2: rank 9 ended with exit code 3 .*: its log names no cause$"
    with pytest.raises(Failure, match=words):
        watch.await_ready(running, 60)


def test_loading_is_told_now_and_then_and_has_a_deadline(
    run_plan: Callable[..., server.Server], capfd: pytest.CaptureFixture[str]
) -> None:
    running = run_plan("bash", "-c", "echo Loading weightless things; sleep 100")
    wait_until(lambda: running.log.last_line or running.pump())
    running.started = time.monotonic()
    with pytest.raises(Failure, match=r"not ready within 0\.6 s: .*its log ends: Loading weight"):
        watch.await_ready(running, 0.6)
    Progress(1).tell([running], 31)
    said = "still loading after 31 s; the log's last line: Loading weightless things"
    assert said in capfd.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_what_the_engine_does_is_told_on_one_line_of_a_terminal_else_now_and_then(
    run_plan: Callable[..., server.Server],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    terminal: bool,
) -> None:
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: terminal)
    running = run_plan("bash", "-c", "printf 'Loading weights:  11%%|# | 80/723 [0]'; sleep 100")
    wait_until(lambda: running.log.last_line or running.pump())
    progress = Progress(1)
    for age in (10.0, 10.1, 10.6, 30.1, 30.2):
        progress.tell([running], age)
    say("and then")
    said = capfd.readouterr().err
    if terminal:
        assert said.count("\r\x1b[Kloading weights 80 of 723, 1") == 2
        assert "\n" not in said.rpartition("\r")[0]
    assert re.search(r"\r\x1b\[K\[[\d:]+\] and then\n$", said) if terminal else True
    lines = re.findall(r"^\[[\d:]+\] loading weights 80 of 723, 30 s$", said, re.M)
    assert len(lines) == (0 if terminal else 1)


def test_of_a_fleet_it_is_told_on_one_line(
    run_plan: Callable[..., server.Server],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    running = [run_plan("bash", "-c", "sleep 100") for _ in range(4)]
    now = time.monotonic()
    for label, each in enumerate(running):
        each.replica = replace(each.replica, label=f"r{label}")
        each.loading.phase, each.loading.far = "loading weights", f"{label} of 4"
        each.started = now - 31
    with monkeypatch.context() as still:
        still.setattr(time, "monotonic", lambda: now)
        Progress(5).tell(running, 31)
    told = "; ".join(f"r{label} loading weights {label} of 4, 31 s" for label in range(3))
    assert f"4 of 5 replicas load: {told}; 1 more\n" in capfd.readouterr().err


@pytest.mark.parametrize(("code", "passing"), [(1, True), (137, True), (2, False), (127, False)])
def test_what_would_fail_again_is_final(
    run_plan: Callable[..., server.Server], code: int, passing: bool
) -> None:
    with pytest.raises(Failure) as failure:
        watch.await_ready(run_plan("bash", "-c", f"exit {code}"), 60)
    assert failure.value.passing is passing


def test_an_answer_on_the_port_does_not_make_a_dead_server_ready(
    run_plan: Callable[..., server.Server],
) -> None:
    running = run_plan("bash", "-c", "exit 1")
    running.step.process.wait()
    running.health.ready.set()
    with pytest.raises(Failure, match="exit code 1 before it was ready"):
        watch.await_ready(running, 60)


def test_another_server_on_the_port_is_named(run_plan: Callable[..., server.Server]) -> None:
    running = run_plan("bash", "-c", "sleep 100")
    running.health.stranger, running.health.strange = "other/model", 99
    words = "^n1: another server took http://127.0.0.1:1 .*; it serves other/model, not bash$"
    with pytest.raises(Failure, match=words) as failure:
        watch.await_ready(running, 60)
    assert not failure.value.passing


@pytest.fixture
def serving() -> Iterator[int]:
    """The port of a server that is well, on the node."""

    class Well(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Well) as engine:
        threading.Thread(target=engine.serve_forever, args=(0.01,)).start()
        yield engine.server_port
        engine.shutdown()


def unreached(server: server.Server, port: int) -> None:
    """From here nothing is heard of it."""
    args = (*server.replica.args, "--host", "0.0.0.0")
    server.replica = replace(server.replica, port=port, args=args)


@pytest.mark.parametrize("says", ["Uvicorn running on", "nothing, its log was lost"])
def test_a_server_that_only_we_cannot_reach_is_told_as_that(
    run_plan: Callable[..., server.Server],
    serving: int,
    monkeypatch: pytest.MonkeyPatch,
    says: str,
) -> None:
    monkeypatch.setattr(server, "UNREACHED", 0.1)
    running = run_plan("bash", "-c", f"echo {says}; sleep 100")
    unreached(running, serving)
    wait_until(lambda: running.health.misses)
    words = (
        rf"^n1 serves on port {serving}, but http://127.0.0.1:1 cannot be reached from .*refused"
    )
    with pytest.raises(Failure, match=words) as failure:
        watch.await_ready(running, PATIENCE if says.startswith("Uvicorn") else 0.1)
    assert not failure.value.passing
    assert "firewall" in failure.value.hint and "more time" not in failure.value.hint


def test_a_server_that_answers_is_behind_no_wall(
    run_plan: Callable[..., server.Server], serving: int
) -> None:
    running = run_plan("bash", "-c", "sleep 100")
    unreached(running, serving)
    assert watch.walled(running)
    running.health.end()
    running.health.join()
    running.health.reached = True
    assert not watch.walled(running)


def test_a_server_that_is_no_longer_reached_from_here_goes_on_for_others(
    run_plan: Callable[..., server.Server],
    serving: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    running = run_plan("bash", "-c", "sleep 100")
    unreached(running, serving)
    for _ in range(2):
        running.health.misses = running.probe.misses = 6
        watch.judge(running, running.health.fault())
        assert not running.health.fault() and not running.probe.fault()
    assert capfd.readouterr().err.count("cannot be reached from") == 1
    running.replica = replace(running.replica, port=1)
    with pytest.raises(Failure, match="no longer serves"):
        watch.judge(running, "fault")


def test_a_failure_of_a_suspended_job_is_waited_out(
    fakes: Fakes,
    run_plan: Callable[..., server.Server],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(timelimit, "LOOK_EVERY", 0.1)
    running = run_plan("bash", "-c", "sleep 100", place=Place("77", 1, ONE_NODE))
    fakes.set(state="SUSPENDED")

    def when_seen() -> None:
        wait_until(lambda: len(fakes.calls("squeue")) > 1)
        fakes.set(state="RUNNING")

    resume = threading.Thread(target=when_seen)
    resume.start()
    running.health.misses = running.probe.misses = 6
    with watch.patience(running):
        raise Failure("no sign of life", passing=True)
    resume.join()
    assert not running.health.fault() and not running.probe.fault()
    assert 0 < running.excused < running.age
    said = capfd.readouterr().err
    assert said.count("job 77 is suspended") == said.count("job 77 is resumed") == 1
    with pytest.raises(Failure, match="no sign of life"), watch.patience(running):
        raise Failure("no sign of life", passing=True)


def test_who_stood_still_does_not_count_that_time(run_plan: Callable[..., server.Server]) -> None:
    running = run_plan("bash", "-c", "sleep 100")
    running.started -= 1000
    running.looked -= 1000
    running.probe.asked = running.probe.traffic = time.monotonic() - 5000
    watch.tick(running)
    assert running.age - running.excused < 900 and not running.probe.fault()


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ('INFO:     10.0.0.1:5 - "POST /v1/completions HTTP/1.1" 200 OK', True),
        ('INFO:     10.0.0.1:5 - "POST /v1/chat/completions HTTP/1.1" 200 OK', True),
        ('INFO:     10.0.0.1:5 - "POST /v1/completions HTTP/1.1" 400 Bad Request', False),
        ("[I] iter = 7, rank = 0, timestamp = 1, num_scheduled_requests: 24, states = {}", True),
        ("[I] iter = 7, rank = 0, timestamp = 1, num_scheduled_requests: 0, states = {}", False),
        ('INFO:     10.0.0.1:5 - "GET /health HTTP/1.1" 200 OK', False),
    ],
)
def test_the_log_shows_that_the_engine_works(
    run_plan: Callable[..., server.Server], line: str, seen: bool
) -> None:
    running = run_plan("bash", "-c", f"echo '{line}'; sleep 100")
    wait_until(lambda: running.log.last_line or running.pump())
    assert (running.probe.traffic > 0) is seen


def test_on_a_terminal_the_hint_begins_a_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    complain(Failure("word " * 40 + "end", "hint " * 40 + "end"))
    lines = capfd.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 120 and len(lines) > 3
    assert sum(line.startswith(f"{'':11}next: hint ") for line in lines) == 1
