"""tune.py with the real launcher, the real benchmark and the simulator."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, free_port

SPACE = ("--set", "max_batch_size=1,8")
PATIENCE = 140  # seconds, on a machine with ten times more to do
SHORT = ("--loads", "1,4", "--input-len", "8", "--output-len", "8", "--repeat", "1",
         "--num-prompts", "8")  # fmt: skip


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """For a machine of 16 GPUs, of which the engine sees one."""
    own = {name: value for name, value in os.environ.items()
           if not name.startswith(("SLURM_", "TRTLLM_"))}  # fmt: skip
    return own | {
        "PATH": f"{ROOT}/simulator:{os.environ['PATH']}",
        "RUNTIME": "bare",
        "GPUS": "none",
        "WORKSPACE": str(tmp_path),
        "PORT": str(free_port()),
        "TRTLLM_SIM_GPUS": "1",
        "TRTLLM_SIM_LOAD_SECONDS": "0.1",
        "TRTLLM_SIM_TTFT_MS": "20",
        "TRTLLM_SIM_ITL_MS": "5",
    }


def tune(environ: Mapping[str, str], folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tune.py"), "org/m", "-o", str(folder), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=dict(environ), cwd=folder.parent, text=True, stdout=pipe, stderr=pipe
    )


def loads(document: dict[str, Any], name: str) -> list[int]:
    [found] = [each for each in document["candidates"] if each["name"] == name]
    return [each["streams"] for each in found["loads"]]


def test_what_serves_is_the_answer_and_what_does_not_start_is_a_row(
    environ: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "found"
    (tmp_path / "large.yaml").write_text("tensor_parallel_size: 16\n")
    configs = ("--config", "large.yaml", "--tp", "1")
    run = tune(environ, folder, *SPACE[:1], "max_batch_size=8", *configs, *SHORT, "--gpus", "16")
    said, talk = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, talk
    document = json.loads((folder / "tune.json").read_text())
    assert document["best"][0]["name"] == "tp1-max_batch_size8"
    assert loads(document, "tp1-max_batch_size8") == [1, 4]
    assert "serve it: .venv/bin/python run_sbatch.py org/m --runtime bare" in said
    assert "Only 1 GPUs are available" in said  # of TP 16
    assert "Only 1 GPUs" in (folder / "tune.html").read_text()
    results = folder / "tp1-max_batch_size8/concurrency-in8-out8-c4.json"
    assert json.loads(results.read_text())["completed"] == 8
    assert not left(environ)


def test_stopped_at_any_moment_it_keeps_what_it_has_and_goes_on(
    environ: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    run = tune(environ, folder, *SPACE, *SHORT)
    first = folder / "max_batch_size1/concurrency-in8-out8-c1.json"
    deadline = time.monotonic() + PATIENCE
    while not first.exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    said, talk = run.communicate(timeout=PATIENCE)
    assert run.returncode == 130, talk
    assert "not finished: stopped" in said and (folder / "tune.html").exists()
    assert "INVALID" not in talk  # what we ended ourselves is nobody's fault
    assert not left(environ)
    kept = first.read_text()

    run = tune(environ, folder, *SPACE, *SHORT, "--resume")
    talk = run.communicate(timeout=PATIENCE)[1]
    assert run.returncode == 0, talk
    assert "max_batch_size1: loads measured before: 1" in talk
    assert first.read_text() == kept
    document = json.loads((folder / "tune.json").read_text())
    assert not document["unfinished"] and loads(document, "max_batch_size8")
    measured = [load for each in document["candidates"] for load in each["loads"]]
    if all(load["valid"] for load in measured):  # as long as the machine is not too busy
        assert document["best"][0]["name"] == "max_batch_size8"


def left(environ: Mapping[str, str]) -> list[str]:
    """Processes of ours that still run: they all know the workspace."""
    ours = f"WORKSPACE={environ['WORKSPACE']}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if ours in path.read_bytes().split(b"\0"):
                found.append(path.with_name("cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--set", "x"), "--set x: write KEY=VALUE,VALUE"),
        (("--replicas", "two"), "--replicas two: neither a number nor auto"),
        (("--tp", "4", "--gpus", "2"), "no candidate is left; tp4: it needs 4 GPUs"),
        (("--config", "no.yaml"), "no.yaml: No such file"),
    ],
)
def test_wrong_usage_is_one_sentence(
    environ: dict[str, str], tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    run = tune(environ, tmp_path / "x", *words)
    talk = run.communicate(timeout=PATIENCE)[1]
    assert run.returncode in (1, 2) and sentence in talk and "Traceback" not in talk
    assert not (tmp_path / "x").exists()


def test_replicas_of_the_environment_may_be_several(
    environ: dict[str, str], tmp_path: Path
) -> None:
    environ["REPLICAS"] = "1,2"
    said, err = tune(environ, tmp_path / "x", "--tp", "1", "--gpus", "2", "--dry-run").communicate(
        timeout=PATIENCE
    )
    assert "tp1-x1: " in said and "tp1-x2: " in said and "does nothing" not in err, err


EARLY = """import os, runpy, signal, sys
class Finder:
    def find_spec(name, path, target=None):
        if name in ("common", "launch"):
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize("script", ["tune.py", "bench.py", "run_sbatch.py"])
def test_an_interrupt_while_a_script_is_imported_is_no_traceback(script: str) -> None:
    command = [sys.executable, "-c", EARLY, str(ROOT / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_to_go_on_needs_the_folder(environ: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tune.py"), "org/m", "--resume"]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "--resume needs -o" in done.stderr


def test_the_dry_run_serves_nothing_and_leaves_nothing(
    environ: dict[str, str], tmp_path: Path
) -> None:
    run = tune(environ, tmp_path / "x", *SPACE, "--tp", "1,16", "--gpus", "8", "--dry-run")
    said, talk = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, talk
    assert "tp1-max_batch_size8: one GPU, 1 GPU" in said
    assert "left out: tp16-max_batch_size1: it needs 16 GPUs, and there are 8" in said
    assert "2 servers to start, 12 to 36 runs: " in said and "a start and 26 s a run (guess" in said
    assert not list(tmp_path.iterdir())
