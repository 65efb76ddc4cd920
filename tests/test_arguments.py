"""Words of a command line: a flag's value, the model among them, the flags alone."""

from __future__ import annotations

from itertools import permutations

import pytest

from launch.arguments import flags_of, from_home, split_models, value_of, without_value
from launch.engines.trtllm import SWITCHES
from tests.conftest import HOSTILE


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
    assert split_models([word for piece in pieces for word in piece], SWITCHES) == (["m"], rest)


@pytest.mark.parametrize(
    ("words", "models"),
    [
        ([], []),
        (["--tp_size", "2"], []),
        (["--tp_size"], []),
        (["--help"], []),
        (["--fail_fast_on_attention_window_too_large", "m"], ["m"]),
        (["--port", "m", "m"], ["m"]),
        (["a b"], ["a b"]),
        (["m", "--port", "1", "n"], ["m", "n"]),
        ([""], [""]),
    ],
)
def test_a_word_that_is_a_flags_value_is_no_model(words: list[str], models: list[str]) -> None:
    assert split_models(words, SWITCHES)[0] == models
    if not models:
        assert split_models(words, SWITCHES)[1] == words


@pytest.mark.parametrize(
    ("args", "flag"),
    [
        (["--a"], "--a"),
        (["--a", "--b"], "--a"),
        (["--a", "-b"], "--a"),
        (["--a", ""], "--a"),
        (["--a="], "--a"),
        (["--a", "-1", "--b", "-.5"], ""),
        (["--a=-b"], ""),
        (["--new", "--b", "1"], ""),
    ],
)
def test_a_flag_or_nothing_is_no_value(args: list[str], flag: str) -> None:
    assert without_value(args, {"--a", "--b"}) == flag


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("~/m", "/h/m"),
        ("--config=~/c.yaml", "--config=/h/c.yaml"),
        ("~", "~"),
        ("~me/x", "~me/x"),
        ("a~/b", "a~/b"),
        ("--x=a=~/b", "--x=a=~/b"),
    ],
)
def test_a_tilde_is_the_home_directory(
    word: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell puts it in for `~/m`, but not for `--config=~/c.yaml`, and nobody does in .env."""
    monkeypatch.setenv("HOME", "/h")
    assert from_home(word) == meant


def test_values_that_look_like_flags_are_values() -> None:
    args = ["--log_level", "--x", "--trust_remote_code", "--port=1", "--host", "h"]
    flags = flags_of(args, SWITCHES)
    assert flags == ["--log_level", "--trust_remote_code", "--port", "--host"]
