"""static_bench.py against executables that refuse what TensorRT-LLM 1.1.0 does not have."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from load import bench_place, static_bench
from tests.conftest import PATIENCE

PREPARE = """
import sys
want = ["--tokenizer", "a model", "--stdout", "token-norm-dist", "--num-requests=5",
        "--input-mean=128", "--output-mean=128", "--input-stdev=0", "--output-stdev=0"]
assert sys.argv[1:] == want, sys.argv
for i in range(5):
    print('{"task_id": %d, "input_ids": [1], "output_tokens": 128}' % i)
"""
TRTLLM_BENCH = """#!/usr/bin/env python3
import argparse, json, os
p = argparse.ArgumentParser(allow_abbrev=False)
p.add_argument("--model", required=True)
sub = p.add_subparsers(required=True).add_parser("throughput", allow_abbrev=False)
for flag in ("dataset", "backend", "tp", "num_requests", "report_json", "concurrency"):
    sub.add_argument("--" + flag)
args = p.parse_args()
assert len(open(args.dataset).readlines()) == int(args.num_requests)
if not os.environ.get("BROKEN"):
    json.dump({"tp": args.tp, "concurrency": args.concurrency}, open(args.report_json, "w"))
"""


pytestmark = pytest.mark.usefixtures("clean_environment", "same_signals")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_place, "is_installed", lambda: True)
    program = tmp_path / "bin" / "trtllm-bench"
    program.parent.mkdir()
    program.write_text(TRTLLM_BENCH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    prepare = tmp_path / "prepare.py"
    prepare.write_text(PREPARE)
    common = ["-m", "a model", "--num-requests", "5", "-o", str(tmp_path / "the out")]
    return [*common, "--prepare-dataset", str(prepare)]


def test_the_report_is_what_it_prints(
    installed: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert static_bench.main([*installed, "--tp", "2", "--concurrency", "64"]) == 0
    assert json.loads(capfd.readouterr().out) == {"tp": "2", "concurrency": "64"}


def test_no_report_is_a_failure(
    installed: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BROKEN", "1")
    assert static_bench.main(installed) == 1
    assert "no report" in capfd.readouterr().err


def test_its_own_failure_is_one(installed: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert static_bench.main([*installed, "--dataset-type", "synthetic"]) == 1
    assert "exit code 2: trtllm-bench: error: unrecognized" in capfd.readouterr().err


def test_a_data_set_that_cannot_be_made_ends_it(
    installed: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prepare.py").write_text("import sys; sys.exit('no such tokenizer')")
    assert static_bench.main(installed) == 1
    assert "prepare.py ended with exit code 1: no such tokenizer" in capfd.readouterr().err


def test_in_the_container_it_gets_the_gpus() -> None:
    prefix = bench_place.prefix("image:1", [Path("/out")], {}, gpus="all")
    mount = "--mount=type=bind,source=/out,target=/out"
    assert {"--gpus=all", "--ulimit=memlock=-1", mount} <= set(prefix)
    assert prefix[-1] == "image:1"


@pytest.mark.parametrize(
    ("setting", "flags"),
    [
        (None, ["--gpus=all"]),
        ("auto", ["--gpus=all"]),
        ("none", []),
        ("device=1", ["--gpus=device=1"]),
    ],
)
def test_the_gpus_are_those_of_the_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str | None, flags: list[str]
) -> None:
    seen: list[str] = []

    def run(command: Sequence[str], *_: object, **__: object) -> tuple[int, str]:
        seen.extend(command)
        return 1, "no GPU"

    monkeypatch.setattr(bench_place, "run", run)
    monkeypatch.setattr(bench_place, "provide_image", lambda *_: "image:1")
    monkeypatch.delenv("GPUS", raising=False)
    if setting:
        monkeypatch.setenv("GPUS", setting)
    assert static_bench.main(["-i", "image:1", "-o", str(tmp_path / "out")]) == 1
    assert [word for word in seen if word.startswith("--gpus")] == flags


def test_when_it_is_stopped_its_container_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(
        '#!/bin/sh\n[ "$1" = rm ] && { echo "$@" > "$REMOVED"; exit; }\nkill "$PARENT"; sleep 100\n'
    )
    docker.chmod(0o755)
    removed = tmp_path / "removed"
    for name, value in {
        "PATH": f"{docker.parent}:{os.environ['PATH']}",
        "PARENT": str(os.getpid()),
        "REMOVED": str(removed),
        "HF_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bench_place, "provide_image", lambda *_: "image:1")
    # Were the handler missing, this one would be called, and the test live on to fail.
    signal.signal(signal.SIGTERM, lambda *_: None)
    began = time.monotonic()
    assert static_bench.main(["-i", "image:1", "-o", str(tmp_path / "out")]) == 143
    assert time.monotonic() - began < PATIENCE
    assert removed.read_text().split() == ["rm", "--force", bench_place.name()]


def test_an_earlier_report_is_not_taken_for_this_runs(
    installed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert static_bench.main(installed) == 0
    monkeypatch.setenv("BROKEN", "1")
    assert static_bench.main(installed) == 1


def test_tp_that_is_no_number_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        static_bench.main(["--tp", "x"])
    assert stop.value.code == 2
    assert "--tp" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(
    installed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "the out").write_text("a file")
    assert static_bench.main(installed) == 1
    assert "ERROR File exists" in capsys.readouterr().err
