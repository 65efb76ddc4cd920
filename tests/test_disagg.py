"""Disaggregated serving: what is refused before anything starts, and the orchestrator's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from common.talk import Failure
from launch.engines import trtllm_disagg
from tests.conftest import ROOT
from tests.test_simulator import eventually, free_port
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
