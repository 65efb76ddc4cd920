"""The server: its log, its health, and what its end means."""

from __future__ import annotations

import contextlib
import http.server
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

import health
import server
from log import Log
from nodes import Failure, Place, Step
from plan import Spread
from preflight import Node
from tests.conftest import ONE_NODE, Fakes, plan, wait_until

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.mark.parametrize("code", [1, 2, 125, 126, 127, 137, 139, 143])
def test_the_codes_that_people_meet_have_a_meaning(code: int) -> None:
    assert server.MEANINGS[code]


# The log


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/x.log").write_text("an earlier launch\n")
    log = Log(tmp_path / "logs/x.log")
    yield log
    log.close()


def write(log: Log, data: bytes) -> None:
    log.sink.write(data)
    log.sink.flush()


def test_the_log_is_copied_to_stdout_byte_by_byte(
    log: Log, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(os.dup(1), "w") as out:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", out)
        for piece in (b"one\ntw", b"o\n", b"\xff\x00\xfe\n", "ü".encode()[:1], "ü".encode()[1:]):
            write(log, piece)
            assert log.pump() == piece
        assert log.pump() == b""
    assert capfdbinary.readouterr().out == b"one\ntwo\n\xff\x00\xfe\n\xc3\xbc"


@pytest.mark.parametrize(
    ("data", "last"),
    [
        (b"one\ntwo\n", "two"),
        (b"one\ntwo", "two"),
        (b"one\n\n", "one"),
        (b"one\n  \n", "one"),
        (b"", ""),
        (b"\n", ""),
        (b"\xff\n", "\ufffd"),
    ],
)
def test_the_last_line_is_known(log: Log, data: bytes, last: str) -> None:
    write(log, data)
    log.pump()
    assert log.last_line == last


def test_a_silent_moment_keeps_the_last_line(log: Log) -> None:
    write(log, b"one\n")
    log.pump()
    write(log, b"\n")
    log.pump()
    assert log.last_line == "one"


def test_an_earlier_log_is_kept_and_not_told_again(log: Log) -> None:
    write(log, b"new\n")
    assert log.pump() == b"new\n"
    assert log.tail() == "new"
    assert log.path.read_text() == "an earlier launch\nnew\n"


def test_the_tail_is_the_last_lines_of_this_launch(log: Log) -> None:
    assert log.tail() == ""
    write(log, "".join(f"{i}\n" for i in range(100)).encode())
    assert log.tail().splitlines() == [str(i) for i in range(50, 100)]
    write(log, b"x" * 1_000_000 + b"\xff\nend")
    assert log.tail(2).endswith("\ufffd\nend")
    assert len(log.tail(2).splitlines()) == 2
    assert len(log.tail()) < 70_000


def test_a_flood_is_skipped_on_screen_but_kept_in_the_file(
    log: Log, capfd: pytest.CaptureFixture[str]
) -> None:
    write(log, b"0123456789" * 1000)
    assert log.pump(100) == b"0123456789" * 10
    assert log.pump(100) == b""
    assert "skipped on screen" in capfd.readouterr().err
    assert log.path.stat().st_size == 10_000 + len("an earlier launch\n")


def test_less_than_a_flood_is_told_in_full(log: Log) -> None:
    data = os.urandom(750)
    write(log, data)
    assert b"".join(iter(lambda: log.pump(100), b"")) == data


def test_a_reader_that_is_gone_stops_nothing(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write_end = os.pipe()
    os.close(read)
    gone = open(write_end, "w")  # noqa: PTH123, SIM115
    monkeypatch.setattr(sys, "stdout", gone)
    for piece in (b"one\n", b"two\n"):
        write(log, piece)
        assert log.pump() == piece
    opened = sys.stdout
    if opened is not gone:
        opened.close()
    with contextlib.suppress(BrokenPipeError):
        gone.close()


def test_a_log_without_stdout_stops_nothing(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """`>&-`: Python has no sys.stdout then."""
    monkeypatch.setattr(sys, "stdout", None)
    write(log, b"one\n")
    assert log.pump() == b"one\n"
    if sys.stdout:
        sys.stdout.close()


def test_a_log_that_somebody_removes_stops_nothing(log: Log) -> None:
    log.path.unlink()
    write(log, b"one\n")
    assert log.pump() == b"one\n"
    assert log.tail() == "one"


# Health


class Engine(http.server.BaseHTTPRequestHandler):
    replies: dict[str, tuple[int, bytes]] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        code, body = self.replies[self.path]
        self.send_response(code)
        if code == 302:
            self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    engine = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    thread = threading.Thread(target=engine.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{engine.server_port}"
    engine.shutdown()
    engine.server_close()
    thread.join()


GOOD_MODELS = b'{"data": [{"id": "org/m"}]}'


@pytest.mark.parametrize(
    ("healthy", "models", "good", "answer"),
    [
        ((200, b""), (200, GOOD_MODELS), True, "/health answered 200"),
        ((200, b"x" * 100_000), (200, GOOD_MODELS), True, "/health answered 200"),
        ((503, b""), (200, GOOD_MODELS), False, "/health answered 503"),
        ((302, b""), (200, GOOD_MODELS), False, "/health answered 302"),
        ((404, b""), (200, GOOD_MODELS), False, "/health answered 404"),
        ((200, b""), (404, b"<html>"), False, "/v1/models gave no list of models"),
        ((200, b""), (200, b"{}"), False, "/v1/models gave no list of models"),
        ((200, b""), (200, b'{"data": []}'), False, "/v1/models gave no list of models"),
        ((200, b""), (200, b"[1]"), False, "/v1/models gave no list of models"),
        ((200, b""), (200, b'{"data": null}'), False, "/v1/models gave no list of models"),
    ],
)
def test_ready_means_healthy_and_a_known_model(
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    healthy: tuple[int, bytes],
    models: tuple[int, bytes],
    good: bool,
    answer: str,
) -> None:
    Engine.replies = {"/health": healthy, "/v1/models": models}
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    asked = health.Health(url, ["org/m"])
    asked.start()
    wait_until(lambda: asked.ready.is_set() or asked.misses)
    asked.end()
    asked.join()
    assert asked.ready.is_set() is good
    assert asked.answer.startswith(answer)
    assert (asked.model, asked.misses > 0) == ("org/m" if good else "", not good)


def test_no_answer_is_told_as_that() -> None:
    asked = health.Health("http://127.0.0.1:1", ["m"])
    asked.start()
    wait_until(lambda: asked.misses)
    asked.end()
    asked.join()
    assert asked.answer == "/health did not answer (ConnectionError)"


def test_misses_count_in_a_row(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "HEALTH_EVERY", 0.01)
    Engine.replies = {"/health": (200, b""), "/v1/models": (200, GOOD_MODELS)}
    asked = health.Health(url, ["org/m"])
    asked.start()
    wait_until(asked.ready.is_set)
    Engine.replies["/health"] = (503, b"")
    wait_until(lambda: asked.misses > 2)
    Engine.replies["/health"] = (200, b"")
    wait_until(lambda: asked.misses == 0)
    asked.end()
    asked.join()


# What its end means


@pytest.fixture
def run_plan(ready: Fakes, tmp_path: Path) -> Iterator[Callable[..., server.Server]]:
    os.environ.update(ready.environment())
    launched: list[server.Server] = []

    def run(*engine: str, place: Place | None = None) -> server.Server:
        made = plan(*engine)
        made = replace(made, place=place or made.place)
        url, log = "http://127.0.0.1:1", tmp_path / "x.log"
        launched.append(server.launch(made, [Node("n1"), Node("n2")], url, log, 0))
        return launched[-1]

    yield run
    for each in launched:
        each.health.end()
        each.health.join()
        each.step.stop()
        each.log.close()


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("echo why; exit 137", r"exit code 137 \(killed, .*\) before it was ready, .* s: why$"),
        ("echo why; exit 3", r"exit code 3 before it was ready, .* s: why$"),
        ("exit 2", r"exit code 2 \(it refused its arguments\) .*: it said nothing$"),
        ("exit 0", r"exit code 0 before it was ready"),
    ],
)
def test_an_engine_that_ends_is_told_with_its_code_meaning_and_words(
    run_plan: Callable[..., server.Server], engine: str, words: str
) -> None:
    running = run_plan("bash", "-c", engine)
    with pytest.raises(Failure, match="^n1: trtllm-serve ended with " + words):
        server.await_ready(running, 60)


def test_the_end_of_a_job_is_not_blamed_on_the_engine(
    run_plan: Callable[..., server.Server],
) -> None:
    text = "echo 'slurmstepd: error: *** STEP 77.1 ON n1 CANCELLED AT 2025 ***'; exit 1"
    running = run_plan("bash", "-c", text, place=Place("77", 1, ONE_NODE))
    with pytest.raises(Failure, match=r"Slurm ended the server .*job 77 was cancelled"):
        server.await_ready(running, 60)


FIRST = "srun: error: n2: task 9: Exited with exit code 3\n"
CANCEL = "slurmstepd: error: *** STEP 77.1 ON n1 CANCELLED AT 2025-11-24T08:14:52 ***\n"
REST = "srun: Terminating StepId=77.1\nsrun: error: n1: tasks 0-7: Terminated\n"


@pytest.mark.parametrize(
    ("said", "words", "path"),
    [
        (FIRST + CANCEL + REST, r"n2: rank 9 ended with exit code 3 .*: rank 9's words$", "_rank9"),
        (FIRST + REST * 500, r"n2: rank 9 ended with exit code 3 .*: rank 9's words$", "_rank9"),
        (CANCEL + REST, "n1: Slurm ended the server while serving: job 77 was cancelled", ""),
        (REST, r"n1: rank 0-7 ended with exit code 143 \(terminated\) .*: rank 0's", "_rank0"),
        ("srun: error: Node failure on n2\n", r"srun ended with .*: srun: error: Node fail", ""),
        ("", r"n1: trtllm-serve ended with exit code 1 .*: rank 0's words$", "_rank0"),
    ],
)
def test_the_end_of_a_world_is_told_by_the_rank_that_failed_first(
    tmp_path: Path, said: str, words: str, path: str
) -> None:
    log = Log(tmp_path / "x.log")
    write(log, said.encode())
    for rank in ("0", "9"):
        (tmp_path / f"x_rank{rank}.log").write_text("an earlier launch\n" * (rank == "0"))
    rank0 = Log(tmp_path / "x_rank0.log")
    for rank in ("0", "9"):
        with (tmp_path / f"x_rank{rank}.log").open("a") as file:
            file.write(f"rank {rank}'s words\n")
    made = replace(plan(), place=Place("77", 2, ("srun",)), spread=Spread(2, 8, "pmix"))
    url, step, nodes = "http://127.0.0.1:1", cast(Step, None), [Node("n1"), Node("n2")]
    asked, probe = health.Health(url, ["m"]), health.Probe(url, 0)
    running = server.Server(made, nodes, url, step, log, asked, probe, time.monotonic(), rank0)
    with pytest.raises(Failure, match="^" + words) as failure:
        server.report_death(running, 1, "while serving")
    assert failure.value.hint.endswith(f"log: {tmp_path}/x{path}.log")
    for each in (log, rank0):
        each.close()


def test_loading_is_told_now_and_then_and_has_a_deadline(
    run_plan: Callable[..., server.Server],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(server, "HEARTBEAT", 0.2)
    running = run_plan("bash", "-c", "echo Loading weights; sleep 100")
    with pytest.raises(Failure, match=r"not ready within 0\.6 s: .*its log ends: Loading weights"):
        server.await_ready(running, 0.6)
    assert "loading for 0 s; log: Loading weights" in capfd.readouterr().err
