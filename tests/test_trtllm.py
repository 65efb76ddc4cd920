"""TensorRT-LLM's command line: what is read from it, and what the engine would refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.settings import setting
from common.talk import Failure
from launch.engines import World, trtllm
from launch.plan import find_model
from tests.conftest import HOSTILE

pytestmark = pytest.mark.usefixtures("clean_environment")

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


def read(rest: list[str]) -> tuple[str, list[str], int]:
    """The model, with its default, the other arguments, and the port."""
    model, args, port = trtllm.read(rest, setting("PORT"))
    return find_model(model), args, port


@pytest.mark.parametrize(
    ("rest", "model", "args", "port"),
    [
        (["m"], "m", ["--host", "0.0.0.0", "--port", "8000"], 8000),
        ([], "Qwen/Qwen2.5-7B-Instruct", ["--host", "0.0.0.0", "--port", "8000"], 8000),
        (["m", "--port", "1"], "m", ["--port", "1", "--host", "0.0.0.0"], 1),
        (["--port=65535", "m"], "m", ["--port=65535", "--host", "0.0.0.0"], 65535),
        (["m", "--host", "::"], "m", ["--host", "::", "--port", "8000"], 8000),
        (["m", "--host=h", "--port=5"], "m", ["--host=h", "--port=5"], 5),
        (
            ["m", "--config=c"],
            "m",
            ["--extra_llm_api_options=c", "--host", "0.0.0.0", "--port", "8000"],
            8000,
        ),
    ],
)
def test_host_and_port_are_added_unless_given(
    rest: list[str], model: str, args: list[str], port: int
) -> None:
    assert read(rest) == (model, args, port)


def test_the_models_and_ports_settings_count() -> None:
    os.environ.update(MODEL="e", PORT="81")
    assert read([])[::2] == ("e", 81)


@pytest.mark.parametrize("port", ["0", "65536", "x", "-1", "80.0", " 80", "²", "9" * 5000])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(Failure, match="not a number from 1 to 65535"):
        read(["m", f"--port={port}"])


@pytest.mark.parametrize(
    ("engine", "names"),
    [
        (["trtllm-serve", "org/m"], {"org/m", "m"}),
        (["trtllm-serve", "/fsx/a b/m/"], {"/fsx/a b/m/", "m"}),
        (["trtllm-serve", "./m", "--port", "1"], {"./m", "m"}),
        (["trtllm-serve", "."], {"."}),
        (["trtllm-serve", "org/m", "--served_model_name=x"], {"org/m", "m", "x"}),
    ],
)
def test_a_server_of_ours_goes_by_these_names(engine: list[str], names: set[str]) -> None:
    assert set(trtllm.names_of(engine)) == names


# The world size: arguments merged with the engine's YAML


def test_the_known_switches_are_those_of_the_engine() -> None:
    """The simulator knows the engine's command line; its flags are the ones without a value."""
    text = (Path(__file__).parents[1] / "simulator/arguments.py").read_text()
    flags = {line.split('"')[1] for line in text.splitlines() if 'Option("flag"' in line}
    assert flags | {"--help", "--enable_chunked_prefill"} == set(trtllm.SWITCHES)


@pytest.mark.parametrize(
    ("given", "renamed"),
    [
        (["--config", "a.yaml"], ["--extra_llm_api_options", "a.yaml"]),
        (["--config=a=b.yaml"], ["--extra_llm_api_options=a=b.yaml"]),
        (["--configs", "a"], ["--configs", "a"]),
        (["--extra_llm_api_options", "a"], ["--extra_llm_api_options", "a"]),
        (["--metadata_server_config_file", "a"], ["--metadata_server_config_file", "a"]),
        (
            ["--tp_size", "2", "--config", "b c"],
            ["--tp_size", "2", "--extra_llm_api_options", "b c"],
        ),
    ],
)
def test_config_gets_the_name_that_every_version_knows(
    given: list[str], renamed: list[str]
) -> None:
    assert trtllm.rename_config(given) == renamed


@pytest.mark.parametrize(
    ("args", "yaml", "world"),
    [
        ([], None, World(1, 1, 1)),
        (["--tp_size", "8"], None, World(8, 1, 1)),
        (["--tp_size=4", "--pp_size", "2"], None, World(4, 2, 1)),
        (["--tensor_parallel_size", "4"], None, World(4, 1, 1)),
        (["--pipeline_parallel_size=2", "--context_parallel_size=3"], None, World(1, 2, 3)),
        (["--tp_size", "2", "--tp_size", "4"], None, World(4, 1, 1)),
        ([], "", World(1, 1, 1)),
        (["--tp_size", "8"], "tensor_parallel_size:\n", World(8, 1, 1)),
        ([], "# nothing\n", World(1, 1, 1)),
        ([], "---\n", World(1, 1, 1)),
        (["--tp_size", "8"], "tensor_parallel_size: 2\n", World(2, 1, 1)),
        (["--tp_size", "8"], "pipeline_parallel_size: 2\n", World(8, 2, 1)),
        (["--tp_size", "8"], "tp_size: 2\n", World(8, 1, 1)),
        ([], "{tensor_parallel_size: 2, context_parallel_size: 2}", World(2, 1, 2)),
        ([], 'tensor_parallel_size: "8"\n', World(8, 1, 1)),
        ([], "tensor_parallel_size: 0x8\n", World(8, 1, 1)),
        ([], "kv_cache_config: {a: [1, 2]}\n", World(1, 1, 1)),
    ],
)
@pytest.mark.parametrize("flag", ["--config", "--extra_llm_api_options"])
def test_yaml_wins_over_the_flags(
    tmp_path: Path, args: list[str], yaml: str | None, world: World, flag: str
) -> None:
    if yaml is not None:
        (tmp_path / "a b.yaml").write_text(yaml)
        args = [*args, flag, str(tmp_path / "a b.yaml")]
    assert trtllm.find_world(trtllm.merged(args)) == world
    assert world.size == world.tp * world.pp * world.cp


SIZES = ["0", "-1", "true", "1.5", "'two'", "[8]", "{a: 1}", "2024-01-01", "²", "'٣ '"]


@pytest.mark.parametrize("size", SIZES)
def test_a_size_that_is_no_number_of_gpus_is_refused(tmp_path: Path, size: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"pipeline_parallel_size: {size}\n")
    with pytest.raises(Failure, match=r"pipeline_parallel_size is .*, not a number of GPUs"):
        trtllm.find_world(trtllm.merged(["--config", str(path)]))


@pytest.mark.parametrize("size", ["0", "-1", "", "8x", "eight", "1.0", " 8", "²"])
def test_a_flag_that_is_no_number_of_gpus_is_refused(size: str) -> None:
    if size == "":
        assert (
            trtllm.find_world(trtllm.merged([f"--tp_size={size}"])).size == 1
        )  # the engine says what it thinks of it
        return
    with pytest.raises(Failure, match=r"tensor_parallel_size is .*, not a number of GPUs"):
        trtllm.find_world(trtllm.merged([f"--tp_size={size}"]))


def test_a_huge_size_is_a_size_or_refused_in_a_sentence() -> None:
    assert trtllm.find_world(trtllm.merged(["--tp_size", "9" * 30])).size == int("9" * 30)
    with pytest.raises(Failure):
        trtllm.find_world(trtllm.merged(["--tp_size", "9" * 5000]))


@pytest.mark.parametrize(
    "text",
    [
        "a: b: c",
        "\ta: 1",
        "{",
        "a: &x *y",
        "!!python/object/apply:os.system [id]",
        "a: 2024-13-45",
        "tensor_parallel_size: " + "9" * 5000,
        "a: !!int x",
        "? [a]\n: 1",
    ],
)
def test_bad_yaml_is_told_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(Failure, match=r"c\.yaml is not YAML: ") as failure:
        trtllm.find_world(trtllm.merged(["--config", str(tmp_path / "c.yaml")]))
    assert "\n" not in failure.value.message


def test_yaml_that_is_not_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(Failure, match=r"c\.yaml is not YAML"):
        trtllm.find_world(trtllm.merged(["--config", str(tmp_path / "c.yaml")]))


@pytest.mark.parametrize("text", ["[1]", "8", "text", "- a\n- b", "true"])
def test_yaml_that_is_no_mapping_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(Failure, match="not a mapping"):
        trtllm.find_world(trtllm.merged(["--config", str(tmp_path / "c.yaml")]))


@pytest.mark.parametrize("name", [*HOSTILE, "n" * 300, ""])
def test_a_config_that_cannot_be_read_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(Failure, match="cannot read the config file"):
        trtllm.find_world(trtllm.merged([f"--config={tmp_path}/none/{name}"]))
    with pytest.raises(Failure, match="cannot read the config file"):
        trtllm.find_world(trtllm.merged([f"--config={tmp_path}"]))
    with pytest.raises(Failure, match="cannot read the config file"):
        trtllm.find_world(trtllm.merged([f"--config={name}"] if len(name) > 250 else ["--config="]))


def test_the_world_says_its_factors() -> None:
    assert str(World(4, 2, 1)) == "8 (tp 4 x pp 2 x cp 1)"


# Strategies: their configs, their names, what the engine would refuse


def check(args: list[str]) -> str:
    return trtllm.check(args, "1.1.0")[0]


def config(path: Path, text: str) -> list[str]:
    path.write_text(text)
    return ["--extra_llm_api_options", str(path)]


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_what_it_says(name: str) -> None:
    args = ["--extra_llm_api_options", str(CONFIGS / f"{name}.yaml")]
    assert check(args) == NAMES[name][0]
    assert trtllm.check(args, "1.1.0")[1].size == NAMES[name][1]


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
    "--tp-size": "no option --tp-size; did you mean --tp_size?",
    "--config_": "no option --config_",
    "--max_batch_sizes": "--max_batch_size?",
    "--enable_chunked_prefill": "no option --enable_chunked_prefill",
    "--tensor_parallel_size": "no option --tensor_parallel_size",
}


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["m", "--port"], "--port"),
        (["--port", "--tp_size", "8", "m"], "--port"),
        (["m", "--tp_size", "--port=1"], "--tp_size"),
        (["m", "--trust_remote_code", "--tokenizer"], "--tokenizer"),
        (["m", "--config"], "--config"),
    ],
)
def test_a_flag_without_its_value_is_told(words: list[str], flag: str) -> None:
    with pytest.raises(Failure, match=f"^{flag} needs a value$"):
        read(words)


def test_what_a_flag_needs_or_takes_is_left_to_an_engine_that_knows_it() -> None:
    assert read(["m", "--new", "--trust_remote_code"])[1][:2] == ["--new", "--trust_remote_code"]


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_that_the_version_does_not_have_is_told(flag: str) -> None:
    with pytest.raises(Failure) as failure:
        trtllm.check_flags(["--port", "1", flag, "8"], "1.1.0")
    assert FLAGS[flag] in failure.value.message
    trtllm.check_flags([flag, "8"], "1.2.1")  # another version: its own affair


def test_values_that_look_like_flags_are_no_unknown_options() -> None:
    args = ["--log_level", "--x", "--trust_remote_code", "--port=1", "--host", "h"]
    trtllm.check_flags(args, "1.1.0")


def test_a_slip_in_a_key_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Failure, match="unknown key tensor_paralel_size; did you mean tensor_p"):
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
