"""The soak's own arithmetic: what it would call a leak, and what it would not."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.soak import BOUND, LOG_BYTES, Use, show_load, show_use, use, watch
from tests.conftest import PATIENCE

STEADY = Use(30, 12, 2, 1)


@pytest.mark.parametrize("what", ["rss_mb", "files", "threads", "children"])
def test_what_grows_steadily_is_a_leak(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    step = getattr(BOUND, what) / 50  # twice the bound over all samples
    grows = [replace(STEADY, **{what: 30 + i * step}) for i in range(100)]
    assert show_use({"launcher": [STEADY] * 100, "bench.py": grows}) == [f"bench.py {what}"]
    assert capsys.readouterr().out.count("LEAK") == 1


def test_peaks_that_come_and_go_are_none() -> None:
    waves = [replace(STEADY, rss_mb=30 + i % 7 * 20) for i in range(100)]
    assert show_use({"bench.py": waves}) == []


def test_what_a_process_holds_is_counted() -> None:
    held = "import threading, time; f = open('/dev/null'); threading.Thread(target=time.sleep, " \
           "args=(100,), daemon=True).start(); b = bytearray(50 << 20); print(flush=True); " \
           "time.sleep(100)"  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        found = use(process.pid)
        process.kill()
    assert 50 < found.rss_mb < 100 and found.files == 4 and found.threads == 2


def test_a_process_that_ends_early_ends_the_soak() -> None:
    with subprocess.Popen(["sleep", "2"]) as process:
        begin = time.monotonic()
        (used,) = watch({"bench.py": process.pid}, 100).values()
    assert time.monotonic() - begin < PATIENCE and 0 < len(used) < 50


def record(**changes: Any) -> str:
    run = {"num_prompts": 10, "completed": 10, "total_output_tokens": 640, "problems": [],
           "client": {"problems": []}}  # fmt: skip
    return json.dumps(run | changes)


@pytest.mark.parametrize(
    ("changes", "bytes_logged", "wrong"),
    [
        ({}, 10, []),
        ({"problems": ["late"], "client": {"problems": ["late"]}}, 10, []),
        (
            {"completed": 9, "problems": ["1 of 10 requests failed"]},
            10,
            ["1 of 10 requests failed"],
        ),
        ({}, 10 * LOG_BYTES + 10, ["the log has 1001 bytes a request"]),
    ],
)
def test_what_went_wrong_in_a_run_is_found(
    tmp_path: Path, changes: dict[str, Any], bytes_logged: int, wrong: list[str]
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results/run.json").write_text(record(**changes))
    log = tmp_path / "server.log"
    log.write_bytes(b"x" * bytes_logged)
    assert show_load(tmp_path / "results", log) == wrong


def test_no_run_at_all_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "server.log").touch()
    assert show_load(tmp_path, tmp_path / "server.log") == ["no run"]
