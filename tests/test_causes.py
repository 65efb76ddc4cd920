"""Why a server ended: what is found in its logs, and what is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis.strategies import text

from launch import cause_table, causes
from tests.conftest import free_port

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/troubleshooting.md"
CASES = (Path(__file__).parent / "data/causes.txt").read_text()
SHAPE = re.compile(r"^=== (.+)\n\| (.+)\n\| ?(.*)\n", re.M)
MATCHES = list(SHAPE.finditer(CASES))
ENDS = [match.start() for match in MATCHES[1:]] + [len(CASES)]
NAMES = [match[1] for match in MATCHES]


def log_of(name: str) -> str:
    at = NAMES.index(name)
    return CASES[MATCHES[at].end() : ENDS[at]].replace("<ESC>", "\x1b").replace("<CR>", "\r")


@pytest.mark.parametrize("before", ["", log_of("nothing: a healthy start")], ids=["", "noise"])
@pytest.mark.parametrize("match", MATCHES, ids=NAMES)
def test_the_cause_of_death_is_found(match: re.Match[str], before: str) -> None:
    name, line, advice = match.groups()
    found = causes.of(before + log_of(name))
    if line == "nothing":
        assert found is None
    else:
        assert found and line in found.line and advice.lower() in found.advice.lower(), found


def test_of_several_ranks_the_one_counts_that_failed_first() -> None:
    first = "[2025-11-20 10:00:01 TP0] loading\nValueError: the ninth expert is nowhere\n"
    then = "[2025-11-20 10:00:02 TP8] loading\nValueError: a consequence\n"
    echo = "[2025-11-20 09:00:00 TP1] RuntimeError: NCCL error: remote process exited\n"
    for logs in ((first, then, echo), (echo, then, first)):
        found = causes.of(*logs)
        assert found and found.line == "ValueError: the ninth expert is nowhere"


def test_no_log_names_no_cause() -> None:
    assert causes.of() is causes.of("") is causes.of("", "\n\n") is None


def test_a_long_line_is_cut() -> None:
    found = causes.of("ValueError: " + "x" * 10_000)
    assert found and len(found.line) == causes.SHOWN and found.line.endswith("...")


@given(text(alphabet='aA:.-_[]()|"\n\r\x1b 0123Error/<>', max_size=400))
def test_any_text_is_read(log: str) -> None:
    found = causes.of(log)
    assert found is None or "\n" not in found.line


# The table


@pytest.mark.parametrize("kind", cause_table.table(), ids=lambda kind: kind.shows)
def test_what_the_page_shows_is_plain_and_said(kind: cause_table.Kind) -> None:
    if kind.weight == cause_table.Weight.REPORT and not kind.meaning:
        return
    assert not re.search(r"[\\*\[\]|?+^$]", kind.shows)
    assert kind.says.search(kind.shows) and kind.meaning and kind.next
    assert cause_table.known(kind.shows) is kind  # no row above takes it


SLOW = "FP8 requires |ibv_|NVFP4 |block a |--a|a|a_size |, use |KeyError: 'a.weight".split("|")


@pytest.mark.parametrize("words", SLOW)
def test_no_line_takes_a_row_long(words: str) -> None:
    began = time.process_time()
    cause_table.known("ValueError: " + words * (4000 // len(words)))
    causes.of(words * (4000 // len(words)))
    assert time.process_time() - began < 0.5


def test_the_page_of_troubles_has_the_table_of_today() -> None:
    page = PAGE.read_text()
    assert page.count(cause_table.MARKS[0]) == page.count(cause_table.MARKS[1]) == 1
    assert page == cause_table.renewed(page), "run `make causes`"


# The command


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/trtllm_server_7.log").write_text("srun: error: n2: task 9: Exited\n")
    (tmp_path / "logs/trtllm_server_7_rank0.log").write_text("RuntimeError: NCCL error\n")
    (tmp_path / "logs/trtllm_server_7_rank9.log").write_text("OSError: Disk quota exceeded\n")
    (tmp_path / "logs/trtllm_server_6.log").write_text("loading\r40%\n")
    os.utime(tmp_path / "logs/trtllm_server_6.log", (1, 1))
    return tmp_path / "logs"


def run(*words: str, at: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "run_sbatch.py"), *words]
    return subprocess.run(command, cwd=at, capture_output=True, text=True)


def test_the_newest_log_is_explained_with_those_of_its_ranks(logs: Path) -> None:
    done = run("--why", at=logs.parent)
    assert done.returncode == 0, done.stderr
    cause, then = done.stdout.splitlines()
    assert cause == "cause: OSError: Disk quota exceeded"
    assert then.startswith("next: A disk is full, or a quota used up: `df -h` on the node")


@pytest.mark.parametrize(
    ("log", "code", "told"),
    [
        (
            "torch.OutOfMemoryError: CUDA out of memory.",
            1,
            "out of memory.\n           next: The GPU",
        ),
        (
            "Loading",
            137,
            "its log names no cause\n           next: to find out what killed it",
        ),
        ("Loading", 0, "exit code 0 (though nobody stopped it) before it was ready"),
    ],
)
def test_a_launch_that_fails_is_told_by_its_cause(
    tmp_path: Path, log: str, code: int, told: str
) -> None:
    engine = tmp_path / "bin/trtllm-serve"
    engine.parent.mkdir()
    engine.write_text(f"#!/bin/sh\necho '{log}'\nexit {code}\n")
    engine.chmod(0o755)
    path = f"{engine.parent}:{os.environ['PATH']}"
    environ = {"PATH": path, "HOME": str(tmp_path), "GPUS": "none", "PORT": str(free_port())}
    command = [sys.executable, str(ROOT / "run_sbatch.py"), "--runtime", "bare", "org/model"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 1 and told in done.stderr, done.stderr


def test_a_log_without_a_cause_says_so(logs: Path) -> None:
    done = run("--why", "logs/trtllm_server_6.log", at=logs.parent)
    assert (done.returncode, done.stdout) == (1, "no cause in the log\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--why", "no.log"], "no.log: there is no such log"),
        (["--why", "--workspace", "/tmp"], "there is no log in /tmp/logs"),
    ],
)
def test_a_log_that_is_not_there_is_told(tmp_path: Path, words: list[str], said: str) -> None:
    words = [word.replace("/tmp", str(tmp_path)) for word in words]
    done = run(*words, at=tmp_path)
    assert done.returncode == 1 and said.replace("/tmp", str(tmp_path)) in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
