"""Each engine's own file: what it reads, the command it makes, its world, its part on each node."""

from __future__ import annotations

import ast
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.settings import PASSED_ON, SETTINGS
from common.talk import Failure
from launch.engines import NAMES, World, engine, every, packages
from launch.log_lines import clean
from launch.main import with_tp
from launch.node.world import Part
from launch.plan import Plan, find_caches, settled
from launch.runtimes import docker
from launch.spread import Spread
from tests.conftest import plan

pytestmark = pytest.mark.usefixtures("clean_environment")

ROOT = Path(__file__).resolve().parents[1]
HOST = ["--host", "0.0.0.0"]
PORT = ["--port", "8000"]


def replaced(made: Plan, spread: Spread | None = None, **changes: Any) -> Plan:
    [one] = made.replicas
    return replace(made, replicas=(replace(one, spread=spread or one.spread),), **changes)


# --- the command line -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "model", "args", "port"),
    [
        (["org/m"], "org/m", [*HOST, *PORT], 8000),
        ([], None, [*HOST, *PORT], 8000),
        (["m", "--x", "y"], "m", ["--x", "y", *HOST, *PORT], 8000),
        (["m", "--port=81"], "m", ["--port=81", *HOST], 81),
        (["m", "--port", "81", "--host", "::"], "m", ["--port", "81", "--host", "::"], 81),
        # Which flags have a value is not known: a later word may be one.
        (["--x", "y"], None, ["--x", "y", *HOST, *PORT], 8000),
        (["--x", "--model", "m", "--y"], "m", ["--x", "--y", *HOST, *PORT], 8000),
        (["--model=org/m", "--y", "1"], "org/m", ["--y", "1", *HOST, *PORT], 8000),
        (["m", "--a", "1", "2", "3"], "m", ["--a", "1", "2", "3", *HOST, *PORT], 8000),
    ],
)
@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_the_model_is_the_first_word(
    name: str, words: list[str], model: str | None, args: list[str], port: int
) -> None:
    assert engine(name).read(words, "8000") == (model, args, port)


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_what_cannot_be_meant_is_refused(name: str) -> None:
    with pytest.raises(Failure, match="one MODEL, not two: b") as caught:
        engine(name).read(["a", "b"], "8000")
    assert caught.value.code == 2
    for words in (["--x", "1", "m", "--y"], ["--y=1", "m"]):
        with pytest.raises(Failure, match="m is not a flag; if it is the MODEL, give it first"):
            engine(name).read(words, "8000")
    for words in (["m", "--port", "x"], ["m", "--port=65536"]):
        with pytest.raises(Failure, match="not a number from 1 to 65535"):
            engine(name).read(words, "8000")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("trtllm", ("trtllm-serve", "org/m", "--a", "1")),
        ("vllm", ("vllm", "serve", "org/m", "--a", "1")),
        ("sglang", ("python3", "-m", "sglang.launch_server", "--model-path", "org/m", "--a", "1")),
    ],
)
def test_the_command(name: str, command: tuple[str, ...]) -> None:
    assert engine(name).command("org/m", ["--a", "1"]) == command


@pytest.mark.parametrize(
    ("name", "flag"),
    [("trtllm", "--tp_size"), ("vllm", "--tensor-parallel-size"), ("sglang", "--tp-size")],
)
def test_tp_is_each_engines_own_flag_unless_it_is_given(name: str, flag: str) -> None:
    served = engine(name)
    assert with_tp(["--a"], served) == ["--a"]
    os.environ["TP"] = "8"
    assert with_tp(["--a"], served) == [flag, "8", "--a"]
    assert served.check(with_tp([], served))[1].size == 8
    for given in served.TP:
        assert with_tp([given, "2"], served) == [given, "2"]
    os.environ["TP"] = "many"
    with pytest.raises(Failure, match="'many', not a number of GPUs"):
        served.check(with_tp([], served))


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_the_names_that_it_may_list(name: str) -> None:
    assert engine(name).names_of("org/m", []) == ("org/m",)
    assert engine(name).names_of("/m", ["--served-model-name", "s"]) == ("s", "/m")


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_the_key_of_its_api_is_known(name: str, tmp_path: Path) -> None:
    """By its flag, else by its file, else by its variable, if it has one."""
    config, environ = tmp_path / "c.yaml", {"VLLM_API_KEY": "of the variable"}
    config.write_text("api-key: of the file\n")
    own = "of the variable" if name == "vllm" else ""
    assert engine(name).key_of(["--x", "y"], environ) == own
    assert engine(name).key_of(["--config", str(config)], environ) == "of the file"
    assert engine(name).key_of(["--api_key", "mine"], environ) == "mine"


@pytest.mark.parametrize("name", ["vllm", "sglang"])
@pytest.mark.parametrize("words", [["--ssl-certfile", "c.pem"], ["--ssl_keyfile=k.pem"]])
def test_tls_which_the_launcher_does_not_speak_is_refused_at_once(
    name: str, words: list[str]
) -> None:
    with pytest.raises(Failure, match=r"^--ssl-.*file: the launcher asks .* over plain HTTP$"):
        engine(name).check(words)


def test_the_size_that_another_engine_calls_so_is_refused_at_once() -> None:
    for words in (["--tp_size", "4"], ["--tp=4"], ["--pp_size=2"]):
        with pytest.raises(Failure, match=r"^vLLM has no --[tp]p(-size)?$"):
            engine("vllm").check(words)
    assert engine("sglang").check(["--tp-size", "4"])[1] == World(4, 1)


# --- the world ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "args", "yaml", "shape", "world"),
    [
        ("vllm", "", None, "one GPU", World(1, 1)),
        ("vllm", "--tensor-parallel-size 8", None, "TP 8", World(8, 1)),
        ("vllm", "--tensor_parallel_size=4 -pp 2", None, "TP 4 x PP 2", World(4, 2)),
        ("vllm", "-tp 2 -tp 4", None, "TP 4", World(4, 1)),
        ("vllm", "-tp 2 -pcp 2 -dp 2", None, "TP 2 x CP 2 x DP 2", World(2, 1, 2, 2)),
        ("vllm", "-dp 16 --data-parallel-size-local 4", None, "DP 4", World(1, 1, 1, 4)),
        ("vllm", "", "tensor-parallel-size: 8", "TP 8", World(8, 1)),
        ("vllm", "-pp 2", "tensor_parallel_size: 8", "TP 8 x PP 2", World(8, 2)),
        ("vllm", "--tensor-parallel-size 2", "tensor-parallel-size: 8", "TP 2", World(2, 1)),
        ("vllm", "", "# nothing", "one GPU", World(1, 1)),
        ("sglang", "", None, "one GPU", World(1, 1)),
        ("sglang", "--tp 8", None, "TP 8", World(8, 1)),
        ("sglang", "--tp-size 8 --pp-size=2", None, "TP 8 x PP 2", World(8, 2)),
        ("sglang", "--tp-size 2 --dp-size 4", None, "TP 2 x DP 4", World(2, 1, 1, 4)),
        ("sglang", "--tp-size 8 --dp-size 8 --enable-dp-attention", None, "TP 8", World(8, 1)),
        ("sglang", "--tp-size 8 --attn-dp-size 8", None, "TP 8", World(8, 1)),
        ("sglang", "--dp 8", "tp-size: 8\nenable-dp-attention: true", "TP 8", World(8, 1)),
        ("sglang", "", "dp_size: 8\nenable_dp_attention: false", "DP 8", World(1, 1, 1, 8)),
    ],
)
def test_the_world_that_its_arguments_make(
    tmp_path: Path, name: str, args: str, yaml: str | None, shape: str, world: World
) -> None:
    words = args.split()
    if yaml is not None:
        (tmp_path / "c.yaml").write_text(yaml)
        words = [f"--config={tmp_path}/c.yaml", *words]
    assert engine(name).check(words) == (shape, world)


def test_a_data_parallel_size_is_a_factor_that_is_shown() -> None:
    assert str(World(8, 2)) == "16 (tp 8 x pp 2 x cp 1)"
    assert str(World(2, 1, 1, 4)) == "8 (tp 2 x pp 1 x cp 1 x dp 4)"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("-tp none", "--tensor-parallel-size is 'none', not a number of GPUs"),
        ("--data-parallel-size=0", "--data-parallel-size is '0', not a number"),
        ("--config /none.yaml", "cannot read the config file /none.yaml"),
    ],
)
def test_a_size_that_is_none_is_refused(args: str, words: str) -> None:
    with pytest.raises(Failure, match=re.escape(words)):
        engine("vllm").check(args.split())


def test_of_other_options_nothing_is_refused_and_nothing_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("vllm", "sglang"):
        assert engine(name).settle(["--no-such", "1"], "9.9") == ["--no-such", "1"]
    assert capsys.readouterr() == ("", "")


# --- over several nodes ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "args", "first", "second"),
    [
        ("vllm", [], "--nnodes 2 --node-rank 0 --master-addr 10.0.0.1",
         "--nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --headless"),
        ("vllm", ["--master-addr", "ib0"], "--nnodes 2 --node-rank 0",
         "--nnodes 2 --node-rank 1 --headless"),
        ("sglang", [], "--nnodes 2 --node-rank 0 --dist-init-addr 10.0.0.1:20000",
         "--nnodes 2 --node-rank 1 --dist-init-addr 10.0.0.1:20000"),
        ("sglang", ["--dist-init-addr=x:1"], "--nnodes 2 --node-rank 0",
         "--nnodes 2 --node-rank 1"),
    ],
)  # fmt: skip
def test_what_each_node_is_told(name: str, args: list[str], first: str, second: str) -> None:
    served = engine(name)
    assert [" ".join(served.part(args, i, 2, "10.0.0.1")) for i in (0, 1)] == [first, second]


def test_one_process_a_node_is_told_its_own_place(tmp_path: Path) -> None:
    spread = Spread(2, 1, "none", "10.0.0.1")
    made = replaced(plan("trtllm-serve", "org/m", "-tp", "16"), spread, engine_name="vllm")
    command = docker.ranks(made, made.replicas[0], tmp_path / "x_%t.log")
    order = command.order
    assert isinstance(order, Part)
    assert order.command == ["vllm", "serve", "org/m", "-tp", "16"]
    assert [part[-1] for part in order.parts] == ["10.0.0.1", "--headless"]
    assert not order.leader


# --- images ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("asked", "holds", "hint"),
    [
        ("trtllm", "vllm 0.32.0", "--engine vllm, or give another --image"),
        ("trtllm", "sglang 0.5.23", "--engine sglang, or give another --image"),
        ("vllm", "tensorrt_llm 1.2.1", "--engine trtllm, or give another --image"),
        ("sglang", "vllm 0.32.0", "--engine vllm, or give another --image"),
        ("sglang", "other 1", "give another --image"),
    ],
)
def test_an_image_of_another_engine_is_refused_with_its_name(
    asked: str, holds: str, hint: str
) -> None:
    made = replaced(plan(), engine_name=asked)
    with pytest.raises(Failure) as caught:
        settled(made, {"n1": holds})
    assert caught.value.message == f"the image holds {holds}, not {engine(asked).TITLE}"
    assert caught.value.hint == hint


def test_a_node_whose_path_has_another_engine_is_no_image() -> None:
    made = replaced(plan(), engine_name="vllm", tag="")
    with pytest.raises(Failure, match=r"^the nodes have sglang 0.5.23, not vLLM"):
        settled(made, {"n1": "sglang 0.5.23"})


def test_our_own_images_engine_is_the_first_and_sglangs_before_vllms() -> None:
    assert packages() == ["tensorrt_llm", "sglang", "vllm"]


def test_caches_of_the_engine_are_mounted_beside_hugging_faces() -> None:
    os.environ.update(HOME="/h", SGLANG_CACHE_DIR="/c")
    assert find_caches(os.environ, engine("trtllm")) == (("HF_HOME", "/h/.cache/huggingface"),)
    found = dict(find_caches(os.environ, engine("vllm")))
    assert found.keys() == {"HF_HOME", "VLLM_CACHE_ROOT"}
    assert found["VLLM_CACHE_ROOT"] == "/h/.cache/vllm"
    assert dict(find_caches(os.environ, engine("sglang")))["SGLANG_CACHE_DIR"] == "/c"


# --- the log --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "speaker", "text"),
    [
        ("(EngineCore pid=7) ERROR 11-29 04:41:07 [core.py:1] it broke", "(EngineCore pid=7)",
         "it broke"),
        ("[2026-11-29 04:41:07 TP0] Scheduler hit an exception", "",
         "Scheduler hit an exception"),
        ("[TRT-LLM] [RANK 0] [E] it broke", "", "it broke"),
    ],
)  # fmt: skip
def test_what_loggers_put_before_a_line(line: str, speaker: str, text: str) -> None:
    assert (clean(line).speaker, clean(line).text) == (speaker, text)


@pytest.mark.parametrize(
    ("name", "line", "works"),
    [
        ("vllm", b'INFO: 1.2.3.4:5 - "POST /v1/completions HTTP/1.1" 200 OK', True),
        ("vllm", b"Avg generation throughput: 12.3 tokens/s, Running: 1 reqs", True),
        ("vllm", b"Avg generation throughput: 0.0 tokens/s, Running: 1 reqs", False),
        ("vllm", b'INFO: 1.2.3.4:5 - "GET /health HTTP/1.1" 200 OK', False),
        ("sglang", b'INFO: 1.2.3.4:5 - "POST /generate HTTP/1.1" 200 OK', True),
        ("sglang", b"Decode batch, #running-req: 1, gen throughput (token/s): 9.1", True),
        ("sglang", b"Prefill batch, #new-seq: 1, #new-token: 1", False),  # its own /health
    ],
)
def test_signs_of_work(name: str, line: bytes, works: bool) -> None:
    assert bool(engine(name).WORK_WORDS.search(line)) is works


# --- nobody else names one ------------------------------------------------------------------------
NAMED = re.compile("trt-?llm|tensorrt|tllm|vllm|sglang|sgl_", re.IGNORECASE)
OURS = re.compile("tensorrt[-_]llm[-_]serve", re.IGNORECASE)
# Where a name is right: the list of settings, and NVIDIA's measuring client.
ALLOWED = {
    "common/settings.py": {"trtllm", "tensorrt", "tllm", "vllm", "sglang", "sgl_"},
    "bench.py": {"trtllm"},
}


def named(path: Path, *, code_only: bool) -> set[str]:
    text = path.read_text()
    if code_only:  # comments go by themselves
        tree = ast.parse(text)
        for node in ast.walk(tree):
            kinds = ast.Module | ast.FunctionDef | ast.ClassDef
            if isinstance(node, kinds) and ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
        text = ast.unparse(tree)
    return {found.lower() for found in NAMED.findall(OURS.sub("", text))}


def test_no_engine_is_named_outside_engines() -> None:
    rooms = [p for room in ("launch", "common") for p in (ROOT / room).rglob("*.py")]
    scripts = [p for p in ROOT.glob("*.py") if p.name not in ("test.py", "save_image.py")]
    found = {p: named(p, code_only=False) for p in rooms if p.parent.name != "engines"}
    found |= {p: named(p, code_only=True) for p in scripts}
    told = {str(path.relative_to(ROOT)): names for path, names in found.items() if names}
    assert told == ALLOWED


def test_the_settings_know_every_engine() -> None:
    [row] = (each for each in SETTINGS if each.name == "ENGINE")
    assert sorted(re.findall(r"\w+", row.help.partition(":")[2].replace(" or", ""))) == NAMES
    own = [name for each in every() for name in (*each.CACHES, each.VERSION) if name]
    assert [name for name in own if not name.startswith(PASSED_ON)] == []
