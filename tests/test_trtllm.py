"""TensorRT-LLM's command line: what is read from it, and what the engine would refuse."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.settings import setting
from common.talk import Failure
from launch import options
from launch.engines import World, trtllm
from launch.plan import find_model
from tests.conftest import HOSTILE, free_port

pytestmark = pytest.mark.usefixtures("clean_environment")

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
VERSIONS = ("1.1.0", "1.2.1")
NAMES = {
    "tp": ("TP 8", 8),
    "tp_attention_dp": ("TP 8, attention DP", 8),
    "pp": ("TP 8 x PP 2", 16),
    "ep": ("TP 8, EP 8", 8),
    "etp": ("TP 8, ETP 4 x 2", 8),
    "cp": ("TP 8 x CP 2", 16),
    "wide_ep": ("TP 16, attention DP, Wide-EP 16", 16),
    "disaggregated/context": ("TP 4", 4),
    "disaggregated/generation": ("TP 4", 4),
}


SHOW_REFUSED = """
import json, re, sys
sys.path.insert(0, sys.argv[1])
import llm_args
for text in sys.argv[3:]:
    try:
        print(end="taken" if llm_args._checked(json.loads(text), sys.argv[2] != "1.1.0") else "")
    except llm_args.Fatal as error:
        print(*re.findall(r"^([\\w.]+)$", str(error), re.M))
"""


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
            ["--config=c", "--host", "0.0.0.0", "--port", "8000"],
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
        (["org/m"], {"org/m", "m"}),
        (["/fsx/a b/m/"], {"/fsx/a b/m/", "m"}),
        (["./m", "--port", "1"], {"./m", "m"}),
        (["."], {"."}),
        (["org/m", "--served_model_name=x"], {"org/m", "m", "x"}),
    ],
)
def test_a_server_of_ours_goes_by_these_names(engine: list[str], names: set[str]) -> None:
    assert set(trtllm.names_of(engine[0], engine[1:])) == names


# The world size: arguments merged with the engine's YAML


@pytest.mark.parametrize("version", VERSIONS)
def test_the_known_options_are_those_of_the_simulator(version: str) -> None:
    """Two tables, written apart: the launcher's data and the stand-in's command line."""
    env = {"PATH": os.environ["PATH"], "TRTLLM_SIM_VERSION": version, "COLUMNS": "200"}
    command = [sys.executable, str(ROOT / "simulator/trtllm-serve"), "serve", "--help"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    shown = set(re.findall(r"(?<![\w])--\w+", done.stdout))
    valued = set(re.findall(r"(--\w+) (?=[A-Z\[])", done.stdout))
    known = options.versions("trtllm")[version]
    assert shown == {*known.flags}
    assert valued | {*known.aliases.values()} == {*known.flags} - {*known.switches}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_known_keys_are_those_of_the_simulator(version: str) -> None:
    """All keys of both versions at once: what the stand-in refuses, the data lacks."""
    known, every = options.versions("trtllm")[version], options.versions("trtllm").values()
    top = dict.fromkeys({"quant_config", *options.union("trtllm", "yaml_keys")} - {*trtllm.SIZES})
    below = {key: {n: None for o in every for n in (*o.sub_keys.get(key, ()), "wrong")}
             for key in known.sub_keys}  # fmt: skip
    texts = [json.dumps(top), json.dumps(below)]
    program = [sys.executable, "-c", SHOW_REFUSED, str(ROOT / "simulator"), version]
    done = subprocess.run([*program, *texts], capture_output=True, text=True, check=True)
    refused = [set(line.split()) for line in done.stdout.splitlines()]
    assert refused[0] == {*top} - {*known.yaml_keys}
    assert refused[1] == {f"{key}.{name}" for key, names in below.items() for name in names
                          if name not in known.sub_keys[key]}  # fmt: skip


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


@pytest.mark.parametrize(("version", "words"), [("1.1.0", b"Uvicorn"), ("1.2.1", b"Application")])
def test_it_is_known_when_it_listens(version: str, words: bytes) -> None:
    assert trtllm.ready_words(version).startswith(words)


@pytest.mark.parametrize("version", ["1.2.1", "1.2.0rc1", "1.3.0rc2", "2.0", "1.10", "1.1.0", ""])
def test_config_is_passed_as_it_is_from_1_2_on(tmp_path: Path, version: str) -> None:
    (tmp_path / "c.yaml").write_text("{}")
    new = trtllm.settle(["--config", str(tmp_path / "c.yaml")], version)[0] == "--config"
    assert new is (version not in ("1.1.0", ""))


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


def check(args: list[str], version: str = "1.1.0") -> str:
    trtllm.settle(args, version)
    return trtllm.check(args)[0]


def refusal(args: list[str], version: str) -> str:
    with pytest.raises(Failure) as failure:
        trtllm.settle(args, version)
    return failure.value.message


def config(path: Path, text: str) -> list[str]:
    path.write_text(text)
    return ["--extra_llm_api_options", str(path)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_what_it_says(name: str, version: str) -> None:
    args = ["--extra_llm_api_options", str(CONFIGS / f"{name}.yaml")]
    assert check(args, version) == NAMES[name][0]
    assert trtllm.check(args)[1].size == NAMES[name][1]


def test_every_config_has_a_name_here() -> None:
    there = {str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.yaml")}
    assert there == {*NAMES, "moe_load_balancer"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_simulator_takes_every_config(name: str, version: str) -> None:
    env = {"PATH": os.environ["PATH"], "TRTLLM_SIM_FAULT": "exit-loading:7",
           "TRTLLM_SIM_LOAD_SECONDS": "0", "TRTLLM_SIM_GPUS": "16",
           "TRTLLM_SIM_VERSION": version}  # fmt: skip
    args = trtllm.settle(["--config", str(CONFIGS / f"{name}.yaml")], version)
    port = ["--port", str(free_port())]
    command = [sys.executable, str(ROOT / "simulator/trtllm-serve"), "m", *port, *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 7, done.stdout + done.stderr  # it got as far as loading


FLAGS = {  # by version: a flag, and what is said of it
    ("1.1.0", "--tp-size"): "no option --tp-size; did you mean --tp_size?",
    ("1.1.0", "--config_"): "no option --config_",
    ("1.1.0", "--max_batch_sizes"): "did you mean --max_batch_size?",
    ("1.1.0", "--enable_chunked_prefill"):
        "(1.2.1 has --enable_chunked_prefill); the YAML file has the key enable_chunked_prefill",
    ("1.1.0", "--tensor_parallel_size"):
        "(1.2.1 has --tensor_parallel_size); did you mean --tp_size?",
    ("1.1.0", "--pipeline-parallel-size"): "did you mean --pp_size?",
    ("1.1.0", "--free_gpu_memory_fraction"): "did you mean --kv_cache_free_gpu_memory_fraction?",
    ("1.1.0", "--cp_size"): "--cp_size); the YAML file has the key context_parallel_size",
    ("1.1.0", "--tool_parser"): "1.1.0 has no option --tool_parser (1.2.1 has --tool_parser)",
    ("1.2.1", "--served_model_name"): "1.2.1 has no option --served_model_name",
    ("1.2.1", "--tool_parsers"): "did you mean --tool_parser?",
    ("1.2.1", "--context-parallel-size"): "did you mean --context_parallel_size?",
    ("1.2.1", "--moe_tensor_parallel_size"): "the YAML file has the key moe_tensor_parallel_size",
    ("1.2.1", "--enable_attention_dp"): "the YAML file has the key enable_attention_dp",
}  # fmt: skip


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


@pytest.mark.parametrize(("version", "flag"), FLAGS)
def test_a_flag_that_the_version_does_not_have_is_told(version: str, flag: str) -> None:
    assert FLAGS[version, flag] in refusal(["--port", "1", flag, "8"], version)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_flag_of_a_version_is_taken_with_its_value(version: str) -> None:
    known = options.versions("trtllm")[version]
    for flag in {*known.flags} - {"--config", "--extra_llm_api_options"}:
        for value in known.choices.get(flag, ["1"]):
            assert trtllm.settle([flag] if flag in known.switches else [flag, value], version)


@pytest.mark.parametrize("version", ["", "1.2.0", "9.9", "nightly", "1.1.0rc3"])
def test_of_an_unknown_version_nothing_is_refused_and_one_line_says_so(
    tmp_path: Path, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("", "tensor_parallel_size:\n", "brand_new: {a: 1}\n"):
        args = ["--no_such", "8", *config(tmp_path / "c.yaml", text), "--backend=x"]
        assert trtllm.settle(args, version) == args
        assert trtllm.check(args)[1].size == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"{version} are not known" in said if version else said


CHOICES = {
    ("1.1.0", "--backend", "pytorh"): "did you mean pytorch?",
    ("1.1.0", "--backend", "trt"): "",
    ("1.1.0", "--log_level", "INFO"): "not 'INFO'",
    ("1.1.0", "--reasoning_parser", "qwen3"): "not 'qwen3' (1.2.1 has qwen3)",
    ("1.2.1", "--reasoning_parser", "qwen3"): "",
    ("1.2.1", "--tool_parser", "deepseek-v3"): "did you mean deepseek_v3?",
}


@pytest.mark.parametrize(("version", "flag", "value"), CHOICES)
@pytest.mark.parametrize("form", [1, 2])
def test_a_value_that_is_none_of_the_choices_is_told(
    version: str, flag: str, value: str, form: int
) -> None:
    args = [f"{flag}={value}"] if form == 1 else [flag, value]
    if words := CHOICES[version, flag, value]:
        assert words in refusal(args, version)
    else:
        assert trtllm.settle(args, version) == args


def test_a_switch_takes_no_value() -> None:
    assert "no value for --trust_remote_code" in refusal(["--trust_remote_code=true"], "1.2.1")


def test_values_that_look_like_flags_are_no_unknown_options() -> None:
    trtllm.settle(["--tokenizer", "--x", "--trust_remote_code", "--port=1", "--host", "h"], "1.1.0")


KEYS = {  # by version: a YAML, and what is said of it; '' where it is taken
    ("1.1.0", "tensor_paralel_size: 8"): "key tensor_paralel_size; did you mean tensor_parallel_",
    ("1.1.0", "brand_new: 8"): "has the unknown key brand_new",
    ("1.1.0", "quant_config: {}"): "has the unknown key quant_config",
    ("1.1.0", "env_overrides: {A: b}"): "key env_overrides (1.2.1 has env_overrides)",
    ("1.2.1", "env_overrides: {A: b}"): "",
    ("1.1.0", "build_config: {}"): "",
    ("1.2.1", "build_config: {}"): "key build_config (1.1.0 has build_config)",
    ("1.1.0", "tp_size: 8"): "did you mean tensor_parallel_size?",
    ("1.2.1", "cp_size: 8"): "did you mean context_parallel_size?",
    ("1.1.0", "free_gpu_memory_fraction: 0.5"): "it belongs below kv_cache_config",
    ("1.1.0", "moe_config: {backend: TRTLLM}"): "",
    ("1.1.0", "moe_config: {bakend: TRTLLM}"): "key bakend below moe_config; did you mean backend?",
    ("1.1.0", "moe_config: {use_low_precision_moe_combine: true}"): "(1.2.1 has use_low_pre",
    ("1.2.1", "moe_config: {use_low_precision_moe_combine: true}"): "",
    ("1.2.1", "kv_cache_config: {enable_blok_reuse: false}"): "did you mean enable_block_reuse?",
    ("1.2.1", "kv_cache_config: [1]"): "",
    ("1.2.1", "1: 2"): "has the unknown key 1",
    ("1.2.1", "cp_config: {whatever: 1}"): "",
    ("1.1.0", ""): "c.yaml is empty, which trtllm-serve 1.1.0 refuses",
    ("1.2.1", "# nothing"): "c.yaml is empty, which trtllm-serve 1.2.1 refuses",
    ("1.2.1", "{}"): "",
    ("1.1.0", "tensor_parallel_size:"): "sets tensor_parallel_size to null",
    ("1.2.1", "context_parallel_size: null"): "sets context_parallel_size to null",
    ("1.2.1", "moe_expert_parallel_size: ~\ngpus_per_node: null"): "",
}


@pytest.mark.parametrize(("version", "text"), KEYS)
def test_a_yaml_that_the_version_does_not_take_is_told(
    version: str, text: str, tmp_path: Path
) -> None:
    args = config(tmp_path / "c.yaml", text + "\n")
    if words := KEYS[version, text]:
        assert words in refusal(args, version)
    else:
        assert trtllm.settle(args, version) == args


@pytest.mark.parametrize(
    ("flag", "text", "backend"),
    [
        ("_autodeploy", "runtime: trtllm\ncompile_backend: torch-opt", "_autodeploy"),
        ("trt", "fast_build: true\nkv_cache_config: {x: 1}", "trt"),
        ("", "backend: tensorrt\ncalib_config: {}", "tensorrt"),
        ("pytorch", "backend: tensorrt\ncalib_config: {}", "tensorrt"),  # the YAML wins
        ("trt", "backend: pytorch\ncalib_config: {}", ""),
        ("pytorch", "calib_config: {}", ""),
    ],
)
def test_the_keys_of_another_backend_are_left_to_the_engine(
    flag: str, text: str, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*config(tmp_path / "c.yaml", text), *(["--backend", flag] if flag else [])]
    if not backend:
        assert "unknown key calib_config" in refusal(args, "1.2.1")
        return
    assert trtllm.settle(args, "1.2.1") == args
    assert f"the keys of backend {backend} are not known here" in capsys.readouterr().err


WINS = {  # by version: flags, a YAML, and what does not count
    ("1.1.0", "--tp_size 2", "tensor_parallel_size: 8"):
        "--tp_size 2 does not count: c.yaml has tensor_parallel_size: 8",
    ("1.2.1", "--tp_size 2", "tensor_parallel_size: 8"):
        "--tp_size 2 does not count: c.yaml has tensor_parallel_size: 8",
    ("1.2.1", "--max_batch_size 2", "max_batch_size:"):
        "--max_batch_size 2 does not count: c.yaml has max_batch_size: null",
    ("1.2.1", "--tp_size 2", "pipeline_parallel_size: 8"): "",
    ("1.2.1", "--tp_size 8", "tensor_parallel_size: 8"): "",
    ("1.1.0", "--trust_remote_code", "trust_remote_code: true"): "",
    ("1.1.0", "--trust_remote_code", "trust_remote_code: false"):
        "--trust_remote_code does not count: c.yaml has trust_remote_code: False",
    ("1.1.0", "--kv_cache_free_gpu_memory_fraction 0.5", "kv_cache_config: {dtype: fp8}"):
        "--kv_cache_free_gpu_memory_fraction 0.5 does not count: kv_cache_config in c.yaml",
    ("1.1.0", "--kv_cache_free_gpu_memory_fraction=0.5", "kv_cache_config:"): "replaces it; write",
    ("1.2.1", "--kv_cache_free_gpu_memory_fraction 0.5", "kv_cache_config: {dtype: fp8}"): "",
    ("1.2.1", "--free_gpu_memory_fraction 0.5", "kv_cache_config: {free_gpu_memory_fraction: 0.8}"):
        "--free_gpu_memory_fraction 0.5 does not count: c.yaml has free_gpu_memory_fraction: 0.8",
    ("1.1.0", "--kv_cache_free_gpu_memory_fraction 0.5", "enable_lora: false"): "",
    ("1.1.0", "--cluster_size 2", "enable_lora: false"):
        "--cluster_size has no effect in trtllm-serve; use moe_cluster_parallel_size in the YAML",
    ("1.2.1", "--moe_cluster_parallel_size 2", "moe_cluster_parallel_size: 1"):
        "--cluster_size has no effect",
}  # fmt: skip


@pytest.mark.parametrize(("version", "flags", "text"), WINS)
def test_a_flag_that_does_not_count_is_told(
    version: str, flags: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    trtllm.settle([*flags.split(), *config(Path("c.yaml"), text + "\n")], version)
    said, words = capsys.readouterr().err, WINS[version, flags, text]
    assert words in said and said.count("\n") == bool(words), said


def test_a_cluster_size_of_a_flag_divides_no_experts(tmp_path: Path) -> None:
    assert check(["--tp_size", "8", "--cluster_size", "3"]) == "TP 8"
    with pytest.raises(Failure, match="= 3 has to divide"):
        check(["--tp_size", "8", *config(tmp_path / "c.yaml", "moe_cluster_parallel_size: 3\n")])


MOE = {
    "moe_tensor_parallel_size: 4\nmoe_expert_parallel_size: 2\n": "",
    "moe_expert_parallel_size: 4\n": "",
    "moe_tensor_parallel_size: 8\n": "",
    "moe_tensor_parallel_size: 4\nmoe_expert_parallel_size: 4\n": "= 16 has to be the tensor",
    "moe_tensor_parallel_size: 2\nmoe_expert_parallel_size: 2\n": "= 4 has to be the tensor",
    "moe_expert_parallel_size: 3\n": "= 3 has to divide the tensor",
    "moe_expert_parallel_size: x\n": "'x', not a number",
    "context_parallel_size: 2\nmoe_tensor_parallel_size: 3\n": "",
    "context_parallel_size: 2\nmoe_expert_parallel_size: 2\n": "needs cp_type HELIX",
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
