"""The server's log, on the terminal and in its file."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.log import Log, end_of


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/x.log").write_text("an earlier launch\n")
    log = Log(tmp_path / "logs/x.log")
    log.show(b"")
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


def test_with_a_label_whole_lines_are_shown_and_each_has_it(
    log: Log, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    log.label = b"r0"
    with open(os.dup(1), "w") as out:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", out)
        for piece in (b"one\ntw", b"o\n\n", b"three: 1%\r2%", b"\n", b"x" * (1 << 17)):
            write(log, piece)
            assert log.pump() == piece
    *lines, last = capfdbinary.readouterr().out.splitlines(keepends=True)
    assert b"".join(lines) == b"r0 | one\nr0 | two\nr0 | \nr0 | three: 1%\r2%\n"
    assert last == b"r0 | " + b"x" * (1 << 17) + b"\n"


def test_a_log_that_is_truncated_in_place_is_read_from_its_beginning(log: Log) -> None:
    """By logrotate's copytruncate, or by `: >LOG` on a full disk."""
    write(log, b"before, a long line\n")
    assert log.pump()
    os.truncate(log.path, 0)
    assert log.tail() == ""
    write(log, b"after\n")
    assert log.pump() == b"after\n"
    write(log, b"more\n")
    assert log.pump() == b"more\n"
    assert log.tail() == "after\nmore"
    assert end_of(log.path, start=1000) == "after\nmore\n"


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


def test_a_log_that_somebody_removes_stops_nothing(log: Log) -> None:
    log.path.unlink()
    write(log, b"one\n")
    assert log.pump() == b"one\n"
    assert log.tail() == "one"


def test_a_log_is_shown_from_the_ready_word_on(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(tmp_path / "x.log")
    with open(os.dup(1), "w") as out:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", out)
        write(log, b"loading\nready now\nGET\n")
        assert log.pump() == b"loading\nready now\nGET\n"
        assert log.last_line == "GET"
        assert capfdbinary.readouterr().out == b""
        log.show(b"ready")
        write(log, b"POST\n")
        log.pump()
        log.show(b"ready")
    assert capfdbinary.readouterr().out == b"ready now\nGET\nPOST\n"
    log.close()


@pytest.mark.parametrize(
    "noise",
    [
        "srun: cluster configuration lacks support for cpu binding",
        "srun: Job step aborted: Waiting up to 32 seconds for job step to finish.",
        "slurmstepd-n1: error: *** STEP 6.1 ON n1 CANCELLED AT 2026-11-28T08:14:52 ***",
        "slurmstepd: error: *** JOB 4 ON n1 CANCELLED AT 2026-11-28T08:14:52 ***",
        "srun: launch/slurm: _step_signal: Terminating StepId=77.1",
    ],
)
def test_slurms_noise_is_in_the_file_only(
    log: Log,
    capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
    noise: str,
) -> None:
    with open(os.dup(1), "w") as out:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", out)
        write(log, f"a\n{noise}\nsrun: error: n1: task 0: Exited\n".encode())
        log.pump()
    assert capfdbinary.readouterr().out == b"a\nsrun: error: n1: task 0: Exited\n"
    assert noise in log.tail()
