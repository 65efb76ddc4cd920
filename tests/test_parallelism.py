"""World size: serve arguments merged with the engine's YAML."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
from launch.parallelism import World, find_world, merged, rename_config, split_model, value_of

from common.talk import Failure
from launch import parallelism
from tests.conftest import HOSTILE

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.mark.parametrize(
    ("args", "value"),
    [
        ([], None),
        (["--port", "1"], "1"),
        (["--port=1"], "1"),
        (["--port="], ""),
        (["--port", ""], ""),
        (["--port"], None),
        (["--port", "1", "--port=2"], "2"),
        (["--port=2", "--port", "1"], "1"),
        (["--port=a=b"], "a=b"),
        (["--portal", "1"], None),
        (["--por", "1"], None),
        (["m", "--host", "h", "--port", "1", "--x"], "1"),
    ],
)
def test_the_last_value_of_a_flag_counts(args: list[str], value: str | None) -> None:
    assert value_of(args, "--port") == value


def test_any_name_of_a_flag_counts() -> None:
    names = ("--tp_size", "--tensor_parallel_size")
    assert value_of(["--tp_size", "2", "--tensor_parallel_size=4"], *names) == "4"
    assert value_of(["--tensor_parallel_size=4", "--tp_size", "2"], *names) == "2"


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_value_arrives_as_it_is(value: str) -> None:
    assert value_of(["--x", value], "--x") == value_of([f"--x={value}"], "--x") == value


PIECES = (("m",), ("--tp_size", "2"), ("--port=1",), ("--trust_remote_code",))


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_the_model_is_found_in_every_order(order: tuple[int, ...]) -> None:
    pieces = [PIECES[i] for i in order]
    rest = [word for piece in pieces if piece != ("m",) for word in piece]
    assert split_model([word for piece in pieces for word in piece]) == ("m", rest)


@pytest.mark.parametrize(
    ("words", "model"),
    [
        ([], None),
        (["--tp_size", "2"], None),
        (["--tp_size"], None),
        (["--help"], None),
        (["--fail_fast_on_attention_window_too_large", "m"], "m"),
        (["--port", "m", "m"], "m"),
        (["a b"], "a b"),
        (["m", "n"], "m"),
        ([""], ""),
    ],
)
def test_a_word_that_is_a_flags_value_is_no_model(words: list[str], model: str | None) -> None:
    assert split_model(words)[0] == model
    if model is None:
        assert split_model(words)[1] == words


def test_the_known_switches_are_those_of_the_engine() -> None:
    """The simulator knows the engine's command line; its flags are the ones without a value."""
    text = (Path(__file__).parents[1] / "simulator/arguments.py").read_text()
    flags = {line.split('"')[1] for line in text.splitlines() if 'Option("flag"' in line}
    assert flags | {"--help", "--enable_chunked_prefill"} == set(parallelism.SWITCHES)


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
    assert rename_config(given) == renamed


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
    assert find_world(merged(args)) == world
    assert world.size == world.tp * world.pp * world.cp


SIZES = ["0", "-1", "true", "1.5", "'two'", "[8]", "{a: 1}", "2024-01-01", "²", "'٣ '"]


@pytest.mark.parametrize("size", SIZES)
def test_a_size_that_is_no_number_of_gpus_is_refused(tmp_path: Path, size: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"pipeline_parallel_size: {size}\n")
    with pytest.raises(Failure, match=r"pipeline_parallel_size is .*, not a number of GPUs"):
        find_world(merged(["--config", str(path)]))


@pytest.mark.parametrize("size", ["0", "-1", "", "8x", "eight", "1.0", " 8", "²"])
def test_a_flag_that_is_no_number_of_gpus_is_refused(size: str) -> None:
    if size == "":
        assert (
            find_world(merged([f"--tp_size={size}"])).size == 1
        )  # the engine says what it thinks of it
        return
    with pytest.raises(Failure, match=r"tensor_parallel_size is .*, not a number of GPUs"):
        find_world(merged([f"--tp_size={size}"]))


def test_a_huge_size_is_a_size_or_refused_in_a_sentence() -> None:
    assert find_world(merged(["--tp_size", "9" * 30])).size == int("9" * 30)
    with pytest.raises(Failure):
        find_world(merged(["--tp_size", "9" * 5000]))


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
        find_world(merged(["--config", str(tmp_path / "c.yaml")]))
    assert "\n" not in failure.value.message


def test_yaml_that_is_not_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(Failure, match=r"c\.yaml is not YAML"):
        find_world(merged(["--config", str(tmp_path / "c.yaml")]))


@pytest.mark.parametrize("text", ["[1]", "8", "text", "- a\n- b", "true"])
def test_yaml_that_is_no_mapping_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(Failure, match="not a mapping"):
        find_world(merged(["--config", str(tmp_path / "c.yaml")]))


@pytest.mark.parametrize("name", [*HOSTILE, "n" * 300, ""])
def test_a_config_that_cannot_be_read_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(Failure, match="cannot read the config file"):
        find_world(merged([f"--config={tmp_path}/none/{name}"]))
    with pytest.raises(Failure, match="cannot read the config file"):
        find_world(merged([f"--config={tmp_path}"]))
    with pytest.raises(Failure, match="cannot read the config file"):
        find_world(merged([f"--config={name}"] if len(name) > 250 else ["--config="]))


def test_the_world_says_its_factors() -> None:
    assert str(World(4, 2, 1)) == "8 (tp 4 x pp 2 x cp 1)"
