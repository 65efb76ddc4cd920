"""The parallelism strategies: their configs, their names, and what the engine would refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.talk import Failure
from launch import parallelism, strategy

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
NAMES = {
    "tp": ("TP 8", 8),
    "tp_attention_dp": ("TP 8, attention DP", 8),
    "pp": ("TP 8 x PP 2", 16),
    "ep": ("TP 8, EP 8", 8),
    "etp": ("TP 8, ETP 4 x 2", 8),
    "cp": ("TP 8 x CP 2", 16),
    "wide_ep": ("TP 16, attention DP, Wide-EP 16", 16),
}


def check(args: list[str]) -> str:
    return strategy.check(args, parallelism.merged(args), "1.1.0")


def config(path: Path, text: str) -> list[str]:
    path.write_text(text)
    return ["--extra_llm_api_options", str(path)]


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_what_it_says(name: str) -> None:
    args = ["--extra_llm_api_options", str(CONFIGS / f"{name}.yaml")]
    assert check(args) == NAMES[name][0]
    assert parallelism.find_world(parallelism.merged(args)).size == NAMES[name][1]


def test_every_config_has_a_name_here() -> None:
    assert {p.stem for p in CONFIGS.glob("*.yaml")} == {*NAMES, "moe_load_balancer"}


@pytest.mark.parametrize("name", [n for n, (_, world) in NAMES.items() if world == 8])
def test_the_simulator_takes_the_configs_of_one_node(name: str) -> None:
    env = {"PATH": os.environ["PATH"], "TRTLLM_SIM_FAULT": "exit-loading:7",
           "TRTLLM_SIM_LOAD_SECONDS": "0"}  # fmt: skip
    command = [sys.executable, str(ROOT / "simulator/trtllm-serve"), "m",
               "--extra_llm_api_options", str(CONFIGS / f"{name}.yaml")]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 7, done.stdout + done.stderr  # it got as far as loading


FLAGS = {
    "--tp-size": "no option --tp-size; --tp_size?",
    "--config_": "no option --config_",
    "--max_batch_sizes": "--max_batch_size?",
    "--enable_chunked_prefill": "no option --enable_chunked_prefill",
    "--tensor_parallel_size": "no option --tensor_parallel_size",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_that_the_version_does_not_have_is_told(flag: str) -> None:
    with pytest.raises(Failure) as failure:
        strategy.check_flags(["--port", "1", flag, "8"], "1.1.0")
    assert FLAGS[flag] in failure.value.message
    strategy.check_flags([flag, "8"], "1.2.1")  # another version: its own affair


def test_values_that_look_like_flags_are_values() -> None:
    args = ["--log_level", "--x", "--trust_remote_code", "--port=1", "--host", "h"]
    assert strategy.flags_of(args) == ["--log_level", "--trust_remote_code", "--port", "--host"]
    strategy.check_flags(args, "1.1.0")


def test_a_slip_in_a_key_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Failure, match="unknown key tensor_paralel_size; tensor_parallel_size"):
        check(config(tmp_path / "c.yaml", "tensor_paralel_size: 8\n"))
    check(config(tmp_path / "c.yaml", "brand_new: 8\n"))
    assert "brand_new" in capsys.readouterr().err


MOE = {
    "moe_tensor_parallel_size: 4\nmoe_expert_parallel_size: 2\n": "",
    "moe_expert_parallel_size: 4\n": "",
    "moe_tensor_parallel_size: 8\n": "",
    "moe_tensor_parallel_size: 4\nmoe_expert_parallel_size: 4\n": "= 16 has to be the tensor",
    "moe_tensor_parallel_size: 2\nmoe_expert_parallel_size: 2\n": "= 4 has to be the tensor",
    "moe_expert_parallel_size: 3\n": "= 3 has to divide the tensor",
    "moe_expert_parallel_size: x\n": "'x', not a number",
    "context_parallel_size: 2\nmoe_tensor_parallel_size: 3\n": "",
    "context_parallel_size: 2\nmoe_expert_parallel_size: 2\n": "only there for cp_type HELIX",
    "context_parallel_size: 2\nmoe_expert_parallel_size: 2\ncp_config: {cp_type: helix}\n": "",
}


@pytest.mark.parametrize("text", MOE)
def test_experts_have_to_fit_the_tensor_parallelism(text: str, tmp_path: Path) -> None:
    args = ["--tp_size", "8", *config(tmp_path / "c.yaml", text)]
    if not MOE[text]:
        check(args)
        return
    with pytest.raises(Failure) as failure:
        check(args)
    assert MOE[text] in failure.value.message


def test_the_yaml_wins_over_the_flags(tmp_path: Path) -> None:
    args = ["--tp_size", "2", "--ep_size", "2",
            *config(tmp_path / "c.yaml", "tensor_parallel_size: 8\n")]  # fmt: skip
    assert check(args) == "TP 8, EP 2"
    assert check([]) == "one GPU"
