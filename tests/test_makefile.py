"""The Makefile: every value reaches the script as it was given, and only what was given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = [
    "a b",
    "it's",
    'a "test"',
    "$(x)",
    "$HOME",
    "$$",
    "`id`",
    "a;b",
    "#no",
    "a\\b",
    "ünï",
    "*",
]
RECORDER = """#!/usr/bin/env python3
import json, sys
print(json.dumps(sys.argv[1:]))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile with a virtual environment whose Python only tells its arguments."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    for name in (".venv/bin/python", "bin/docker", "bin/enroot"):
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(RECORDER)
        program.chmod(0o755)
    (tmp_path / ".venv/.ready").touch()
    return tmp_path


def make(checkout: Path, *words: str, **environ: str) -> list[str]:
    """What the one command of a target was given."""
    env = {"PATH": f"{checkout}/bin:{os.environ['PATH']}", **environ}
    done = subprocess.run(["make", "-s", "-C", str(checkout), *words],
                          env=env, capture_output=True, text=True, check=True)  # fmt: skip
    assert "warning" not in done.stderr, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("value", HOSTILE)
def test_values_arrive_intact_from_the_command_line(checkout: Path, value: str) -> None:
    assert make(checkout, "serve", f"MODEL={value}") == ["run_sbatch.py", value]
    assert make(checkout, "test", f"HOST={value}") == ["test.py", "--host", value]
    assert make(checkout, "docker", f"IMAGE={value}") == ["build", "--tag", value, "."]
    assert make(checkout, "why", f"LOG={value}") == ["run_sbatch.py", "--why", value]
    assert make(checkout, "soak", f"HOURS={value}") == [
        "-m", "tests.cluster.soak", "--hours", value]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE)
def test_values_arrive_intact_from_the_environment(checkout: Path, value: str) -> None:
    assert make(checkout, "serve", MODEL=value) == ["run_sbatch.py", value]
    # An exported IMAGE may be the launcher's tarball: save_image.py reads it, and knows.
    assert make(checkout, "save", IMAGE=value, FILE=value) == ["save_image.py", "--output", value]


def test_a_host_is_where_the_server_listens(checkout: Path) -> None:
    """Only --host 127.0.0.1 keeps others out: it must not be lost."""
    words = make(checkout, "serve", "MODEL=m", "HOST=127.0.0.1", HOST="x86_64-conda-linux-gnu")
    assert words == ["run_sbatch.py", "m", "--host", "127.0.0.1"]


def test_of_a_fleet(checkout: Path) -> None:
    assert make(checkout, "logs", "REPLICA=r2") == ["run_sbatch.py", "--logs", "r2"]
    pools = {"PREFILL": "1", "DECODE": "2", "PREFILL_CONFIG": "a b.yaml", "DECODE_CONFIG": "c.yaml"}
    words = ["--prefill", "1", "--decode", "2"]
    words += ["--prefill-config", "a b.yaml", "--decode-config", "c.yaml"]
    given = [f"{name}={value}" for name, value in pools.items()]
    assert make(checkout, "serve", "MODEL=m", *given) == ["run_sbatch.py", "m", *words]


def test_of_a_search(checkout: Path) -> None:
    given = {"MODEL": "m", "TP": "1,2", "REPLICAS": "1,auto", "CONFIGS": "a.yaml b.yaml",
             "GOODPUT": "ttft:1 tpot:2"}  # fmt: skip
    words = make(checkout, "tune", *(f"{name}={value}" for name, value in given.items()))
    assert words == ["tune.py", "m", "--tp", "1,2", "--replicas", "1,auto",
                     "--config", "a.yaml", "b.yaml", "--goodput", "ttft:1", "tpot:2"]  # fmt: skip


def test_the_version_of_the_image_is_an_argument_of_its_build(checkout: Path) -> None:
    """Docker takes the value of a build argument that has none from the environment."""
    build = ["build", "--tag", "tensorrt-llm-serve:latest", "--build-arg", "TRTLLM_VERSION", "."]
    assert make(checkout, "docker", "TRTLLM_VERSION=1.2.1") == build
    program = checkout / "bin/docker"
    told = "[__import__('os').environ['TRTLLM_VERSION']]"
    program.write_text(RECORDER.replace("sys.argv[1:]", told))
    assert make(checkout, "docker", "TRTLLM_VERSION=1.2.1") == ["1.2.1"]


def test_several_folders_are_compared(checkout: Path) -> None:
    words = make(checkout, "compare", "BEFORE=a b", "AFTER=c $(x),d'e")
    assert words == ["-m", "report", "compare", "a b", "c $(x)", "d'e"]
    assert make(checkout, "compare", "BEFORE=a", "AFTER=b")[3:] == ["a", "b"]


def test_the_newest_tarball_is_loaded(checkout: Path) -> None:
    for time, codec in enumerate(("gz", "zst")):
        tarball = checkout / f"tensorrt-llm-serve-latest.tar.{codec}"
        tarball.touch()
        os.utime(tarball, (time, time))
    assert make(checkout, "load") == ["save_image.py", "--load", tarball.name]
    assert make(checkout, "load", "FILE=$(x)") == ["save_image.py", "--load", "$(x)"]


TARGETS = {
    "serve": ["run_sbatch.py"],
    "stop": ["run_sbatch.py", "--stop"],
    "status": ["run_sbatch.py", "--status"],
    "logs": ["run_sbatch.py", "--logs"],
    "why": ["run_sbatch.py", "--why"],
    "causes": ["-m", "launch.cause_table", "docs/troubleshooting.md"],
    "test": ["test.py"],
    "save": ["save_image.py"],
    "load": ["save_image.py", "--load", "tensorrt-llm-serve-latest.tar.gz"],
    "docker": ["build", "--tag", "tensorrt-llm-serve:latest", "."],
    "sqsh": ["save_image.py", "--compress", "sqsh"],
    "demo": ["simulator/demo.py"],
    "bench": ["bench.py"],
    "static-bench": ["-m", "load.static_bench"],
    "bench-client": ["tests/bench_client.py"],
    "bench-peers": ["-m", "tests.engines.peers"],
    "bench-nodes": ["-m", "tests.cluster.bench_nodes"],
    "bench-launch": ["-m", "tests.cluster.bench_launch"],
    "check-engines": ["-m", "tests.engines.check"],
    "soak": ["-m", "tests.cluster.soak"],
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_not_given_is_left_to_the_script(checkout: Path, target: str) -> None:
    assert make(checkout, target, HOST="x86_64-conda-linux-gnu") == TARGETS[target]
    assert make(checkout, target, "MODEL=", "TP=", "PORT=", "IMAGE=") == TARGETS[target]


def test_settings_without_a_flag_reach_the_script_through_the_environment(checkout: Path) -> None:
    (checkout / ".venv/bin/python").write_text(
        '#!/bin/sh\nprintf \'["%s","%s","%s","%s"]\' "$GPUS" "$TP" "$ENGINE" "$IMAGE"\n'
    )
    assert make(checkout, "serve", "GPUS=none", "TP=8", "ENGINE=b c", "IMAGE=$(x)") == [
        "none", "8", "b c", "$(x)"]  # fmt: skip


def test_only_an_image_on_the_command_line_asks_for_the_other_benchmark_client(
    checkout: Path,
) -> None:
    assert make(checkout, "bench", "HOST=h", IMAGE="the-servers:1") == ["bench.py", "--host", "h"]
    given = make(checkout, "bench", "BENCH_TYPE=throughput,prefill", "IMAGE=$(x):1")
    assert given == ["bench.py", "--type", "throughput,prefill", "--image", "$(x):1"]


@pytest.mark.parametrize(("target", "script"), [("bench", "bench.py"), ("test", "test.py")])
def test_only_a_port_on_the_command_line_names_a_server(
    checkout: Path, target: str, script: str
) -> None:
    assert make(checkout, target, PORT="81") == [script]
    assert make(checkout, target, "PORT=$(x)") == [script, "--port", "$(x)"]


def test_only_a_job_on_the_command_line_is_stopped_alone(checkout: Path) -> None:
    assert make(checkout, "stop", JOB="7") == ["run_sbatch.py", "--stop"]
    assert make(checkout, "stop", "JOB=$(x)") == ["run_sbatch.py", "--stop=$(x)"]
    assert make(checkout, "stop", "JOB=") == ["run_sbatch.py", "--stop="]


@pytest.mark.parametrize(
    ("target", "words"), [("report", "RESULTS= names"), ("compare", "BEFORE= and AFTER= name")]
)
def test_a_folder_that_is_missing_is_asked_for(checkout: Path, target: str, words: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        make(checkout, target)
    assert words in failed.value.stderr


def test_extra_args_are_words_of_the_shell(checkout: Path) -> None:
    words = make(checkout, "serve", "MODEL=m", "EXTRA_ARGS=--a 1 --b 'c d'")
    assert words == ["run_sbatch.py", "m", "--a", "1", "--b", "c d"]


def test_help_lists_every_target(checkout: Path) -> None:
    done = subprocess.run(["make", "-C", str(checkout)], capture_output=True, text=True, check=True)
    text = (ROOT / "Makefile").read_text()
    for line in text.splitlines():
        if line.startswith(".PHONY: "):
            assert f"  {line.split()[1]} " in done.stdout


def test_the_environment_is_made_anew_when_its_list_changes(checkout: Path) -> None:
    os.utime(checkout / ".venv/.ready", (1, 1))
    dry = subprocess.run(["make", "-n", "-C", str(checkout), "serve"],
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert "-m venv .venv" in dry.stdout
