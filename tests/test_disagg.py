"""Disaggregated serving: what is refused before anything starts, and the orchestrator's file."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from common.talk import Failure
from launch import disagg
from launch.cli import parse
from launch.engines import trtllm_disagg
from launch.main import main
from launch.placement import Seat
from tests.conftest import PATIENCE, ROOT, free_port, free_ports, wait_until
from tests.test_simulator import eventually
from tests.test_simulator_disagg import orchestrating
from tests.test_simulator_versions import can_bind

pytestmark = pytest.mark.usefixtures("clean_environment")

MODEL = "org/model"
TRANSCEIVER = {"backend": "UCX", "max_tokens_in_buffer": 8192}
CONTEXT: dict[str, Any] = {
    "disable_overlap_scheduler": True,
    "cache_transceiver_config": TRANSCEIVER,
}
GENERATION: dict[str, Any] = {"cache_transceiver_config": TRANSCEIVER}


def pool(folder: Path, name: str, config: dict[str, Any]) -> list[str]:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path)]


def check(folder: Path, context: dict[str, Any], generation: dict[str, Any], *more: str) -> None:
    prefill, decode = pool(folder, "c", context), pool(folder, "g", generation)
    trtllm_disagg.check(MODEL, [*prefill, *more], decode)


def backend(name: str | None) -> dict[str, Any]:
    return {**CONTEXT, "cache_transceiver_config": {**TRANSCEIVER, "backend": name}}


def buffer(tokens: object) -> dict[str, Any]:
    inner = {"backend": "UCX", "max_tokens_in_buffer": tokens}
    return {**CONTEXT, "cache_transceiver_config": inner}


def test_a_good_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(tmp_path, CONTEXT, GENERATION)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("context", "generation", "said"),
    [
        ({}, GENERATION, "c.yaml (--prefill-config) sets no cache_transceiver_config.backend: no"),
        (CONTEXT, {}, "g.yaml (--decode-config) sets no cache_transceiver_config.backend"),
        (backend(None), GENERATION, "sets no cache_transceiver_config.backend"),
        (backend("DEFAULT"), GENERATION, "DEFAULT, which is UCX in 1.1.0 and NIXL in 1.2.1"),
        (backend("MPI"), GENERATION, "MPI, which is not one of UCX, NIXL, MOONCAKE"),
        (backend("NIXL"), GENERATION, "backend is NIXL for prefill and UCX for decode"),
        (buffer(None), GENERATION, "max_tokens_in_buffer, the longest prompt in tokens; it has N"),
        (buffer("8k"), GENERATION, "it has '8k'"),
        (buffer(True), GENERATION, "it has True"),
        (buffer(0), GENERATION, "it has 0"),
        (GENERATION, GENERATION, "c.yaml does not set disable_overlap_scheduler: true"),
        ({**CONTEXT, "disable_overlap_scheduler": False}, GENERATION, "disable_overlap_scheduler"),
        ({**CONTEXT, "model": "org/other"}, GENERATION, "prefill servers' YAML names another"),
        (CONTEXT, {**GENERATION, "model": "x"}, "decode servers' YAML names another model, x"),
        ({**CONTEXT, "dtype": "float16"}, GENERATION, "dtype is float16 for prefill and None"),
        ({**CONTEXT, "kv_cache_config": {"tokens_per_block": 64}}, GENERATION, "tokens_per_block"),
        ({**CONTEXT, "disagg_cluster": {"cluster_uri": "x"}}, GENERATION, "service discovery"),
    ],
)  # fmt: skip
def test_what_would_start_and_serve_nobody(
    tmp_path: Path, context: dict[str, Any], generation: dict[str, Any], said: str
) -> None:
    with pytest.raises(Failure) as failure:
        check(tmp_path, context, generation)
    assert said in failure.value.message and failure.value.hint


@pytest.mark.parametrize("flag", trtllm_disagg.DISCOVERY)
def test_servers_are_not_to_look_for_each_other(tmp_path: Path, flag: str) -> None:
    with pytest.raises(Failure, match=f"{flag} of the prefill servers asks for service discovery"):
        check(tmp_path, CONTEXT, GENERATION, flag, "x")


def test_each_needs_a_config_file(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="the decode servers have no config file"):
        trtllm_disagg.check(MODEL, pool(tmp_path, "c", CONTEXT), [])


@pytest.mark.parametrize(
    ("context", "generation", "more", "said"),
    [
        (buffer(4096), GENERATION, [], "max_tokens_in_buffer is 4096: prompts may have up to 8192"),
        (CONTEXT, GENERATION, ["--max_num_tokens", "9000"], "is 8192: prompts may have up to 9000"),
        ({**CONTEXT, "pipeline_parallel_size": 2}, {**GENERATION, "tensor_parallel_size": 2}, [],
         "is known to hang"),
    ],
)  # fmt: skip
def test_what_fits_badly_is_said(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    context: dict[str, Any],
    generation: dict[str, Any],
    more: list[str],
    said: str,
) -> None:
    check(tmp_path, context, generation, *more)
    assert said in capsys.readouterr().err


def test_the_examples_are_a_good_pair(capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT / "configs/disaggregated"
    pair = [["--config", str(folder / f"{name}.yaml")] for name in ("context", "generation")]
    trtllm_disagg.check(MODEL, *pair)
    assert capsys.readouterr().err == ""


def test_the_command_lets_an_answer_take_a_day() -> None:
    command = trtllm_disagg.command("/logs/o.yaml", 3600.0)
    assert " ".join(command) == "trtllm-serve disaggregated -c /logs/o.yaml -t 3600 -r 86400"
    assert trtllm_disagg.command("f", 0.2)[5] == "1"


def test_the_orchestrators_file_is_one_that_it_takes(tmp_path: Path) -> None:
    port, *urls = free_port(), *(f"127.0.0.1:{free_port()}" for _ in range(3))
    (tmp_path / "o.yaml").write_text(trtllm_disagg.file("127.0.0.1", port, urls[:2], urls[2:]))
    with orchestrating(tmp_path, port, VERSION="1.2.1") as server:
        waited_for = f"Waiting for {[f'http://{url}' for url in urls]}"
        eventually(lambda: waited_for in server.log)
        assert not can_bind(port)


# Where the servers go


EIGHT = list("01234567")


def shown(pools: list[list[Seat]]) -> list[list[str]]:
    """`0:45#2`: on GPUs 4 and 5 of the first node, its third server; `1+2`: two whole nodes."""
    return [
        [
            f"{seat.first}:{''.join(seat.gpus)}#{seat.index}"
            if seat.gpus
            else f"{seat.first}+{seat.nodes}#{seat.index}"
            for seat in pool
        ]
        for pool in pools
    ]


@pytest.mark.parametrize(
    ("prefill", "decode", "gpus", "expected"),
    [
        ((1, 4), (1, 4), [EIGHT], [["0:0123#0"], ["0:4567#1"]]),
        ((2, 2), (1, 4), [EIGHT], [["0:01#0", "0:23#1"], ["0:4567#2"]]),
        ((1, 8), (1, 8), [EIGHT] * 2, [["0:01234567#0"], ["1:01234567#0"]]),
        ((1, 2), (2, 4), [EIGHT] * 2, [["0:01#0"], ["0:2345#1", "1:0123#0"]]),
        ((1, 1), (1, 1), [["3", "6"]], [["0:3#0"], ["0:6#1"]]),
        # A server larger than a node takes whole ones, which nobody has begun.
        ((1, 16), (2, 8), [EIGHT] * 4, [["0+2#0"], ["2:01234567#0", "3:01234567#0"]]),
        ((1, 4), (1, 16), [EIGHT] * 3, [["0:0123#0"], ["1+2#0"]]),
    ],
)
def test_prefill_first_and_decode_in_what_it_leaves(
    prefill: tuple[int, int],
    decode: tuple[int, int],
    gpus: list[list[str]],
    expected: list[list[str]],
) -> None:
    assert shown(disagg.seats([("prefill", *prefill), ("decode", *decode)], gpus)) == expected


@pytest.mark.parametrize(
    ("prefill", "decode", "gpus", "said"),
    [
        ((2, 8), (1, 1), [EIGHT], "prefill: no room for 2 replicas of 8 GPUs each"),
        (
            (1, 4),
            (2, 4),
            [EIGHT],
            "decode: no room for 2 replicas of 4 GPUs each: there is room for",
        ),
        ((1, 8), (1, 1), [EIGHT], "decode: no room for 1 replica of 1 GPU each"),
        # Two halves of nodes are no whole node.
        ((1, 4), (1, 16), [EIGHT] * 2, "decode: no room for 1 replica of 16 GPUs each"),
    ],
)
def test_what_does_not_fit(
    prefill: tuple[int, int], decode: tuple[int, int], gpus: list[list[str]], said: str
) -> None:
    with pytest.raises(Failure) as failure:
        disagg.seats([("prefill", *prefill), ("decode", *decode)], gpus)
    assert said in failure.value.message


# The launch, on this machine, with the engine of the PATH


def words(folder: Path, port: int, *more: str) -> list[str]:
    pair = pool(folder, "c", CONTEXT)[1], pool(folder, "g", GENERATION)[1]
    return ["--runtime", "bare", "-w", str(folder), MODEL, "--port", str(port),
            "--prefill", "2", "--decode", "1", "--prefill-config", pair[0],
            "--decode-config", pair[1], *more]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prefill", "1"], "--prefill and --decode go together"),
        (["--prefill-config", "x"], "--prefill and --decode go together"),
        (["--prefill", "0", "--decode", "1"], "--prefill and --decode go together"),
        (["--prefill", "all", "--decode", "1"], "--prefill: 'all' is not a number of servers"),
        (["--prefill", "1", "--decode", "1", "--replicas", "2"], "--replicas does not go with"),
    ],
)
def test_usage(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["m", *flags])
    assert said in capsys.readouterr().err


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv) == 1
    return capsys.readouterr().err


def test_what_is_refused_before_a_node_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUS", "none")
    good = words(tmp_path, 8000)
    assert "is for both prefill and decode" in fails([*good, "--config", "both.yaml"], capsys)
    quoted = ["--decode-args", "'--max_batch_size"]
    assert "is not a list of arguments" in fails([*good, *quoted], capsys)
    assert "which is not a flag" in fails([*good, "--prefill-args", "org/other"], capsys)
    (tmp_path / "c.yaml").write_text("{}")
    assert "sets no cache_transceiver_config.backend" in fails(good, capsys)


@contextmanager
def launched(folder: Path, *more: str, **env: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """With the real HAProxy in front, on this machine."""
    port = free_ports(5)
    known = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TRTLLM_"))}
    path = f"{ROOT}/simulator:{os.environ['PATH']}"
    quick = {"GPUS": "none", "PATH": path, "TRTLLM_SIM_LOAD_SECONDS": "0.1", **env}
    command = [sys.executable, str(ROOT / "run_sbatch.py"), *words(folder, port, *more)]
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(command, env=known | quick, stdout=out, stderr=out)
    try:
        yield process, port
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)


def until(process: subprocess.Popen[bytes], folder: Path, text: str) -> str:
    """What the launch has said, once this is in it."""
    wait_until(lambda: text in said_of(folder) or process.poll() is not None, text)
    assert text in said_of(folder)
    return said_of(folder)


def pids_of(port: int) -> list[int]:
    """Whose command line has this port."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if str(port).encode() in words and any(b"trtllm-serve" in word for word in words):
                found.append(int(path.parent.name))
    return found


def test_the_whole_passes_the_api_checks_and_is_measured(tmp_path: Path) -> None:
    with launched(tmp_path) as (process, port):
        said = until(process, tmp_path, "stop it with")
        assert said.index("prefill1: ready") < said.index("orchestrator: ready after")
        assert "serves org/model with 2 prefill and 1 decode servers" in said
        at = ["-H", "127.0.0.1", "-p", str(port)]
        checked = run_script("test.py", *at)
        assert "8/8 passed" in checked.stdout, checked.stdout + checked.stderr
        assert "one prompt per request" in checked.stdout
        load = [
            "-t",
            "concurrency",
            "--concurrency",
            "2",
            "--num-prompts",
            "4",
            "--output-len",
            "8",
        ]
        measured = run_script("bench.py", *at, *load, "-o", str(tmp_path / "results"))
        (result,) = (tmp_path / "results").glob("concurrency-*.json")
        assert json.loads(result.read_text())["completed"] == 4, measured.stderr
    assert process.returncode == 130
    assert not list((tmp_path / "logs").glob("*_local*.json")) and not pids_of(port + 1)


def run_script(name: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / name), *args]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=4 * PATIENCE, check=False
    )


def test_the_end_of_a_server_is_the_end_of_all(tmp_path: Path) -> None:
    with launched(tmp_path) as (process, port):
        until(process, tmp_path, "stop it with")
        (decode,) = pids_of(port + 3)
        os.kill(decode, signal.SIGKILL)
        assert process.wait(PATIENCE) == 1
    said = (tmp_path / "out").read_text()
    assert "ERROR decode0: " in said and "the others are ended, too" in said
    assert not (tmp_path / "logs/endpoint.json").exists()
    assert not any(pids_of(each) for each in range(port, port + 5))


def test_a_server_is_started_anew_while_the_orchestrator_goes_on(tmp_path: Path) -> None:
    with launched(tmp_path, "--restart", "1") as (process, port):
        until(process, tmp_path, "stop it with")
        (decode,) = pids_of(port + 3)
        os.kill(decode, signal.SIGKILL)
        until(process, tmp_path, "decode0: ")
        wait_until(lambda: said_of(tmp_path).count("decode0: ready after") == 2, "decode0 again")
        body = {"model": "m", "prompt": "Hi", "max_tokens": 4}
        answer = requests.post(
            f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=PATIENCE
        )
        assert answer.status_code == 200, answer.text
        assert said_of(tmp_path).count("orchestrator: ready after") == 1


def said_of(folder: Path) -> str:
    return (folder / "out").read_text()
