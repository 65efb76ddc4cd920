"""The command line of `trtllm-serve` 1.1.0, with the habits of click, which parses the real one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import NamedTuple, Union

from console import LEVELS

Value = Union[str, int, float, bool, None]  # noqa: UP007 (3.9 has no | here)
Arguments = dict[str, Value]

# The other commands exist in the real one but are not simulated.
COMMANDS = ("disaggregated", "disaggregated_mpi_worker", "mm_embedding_serve", "serve")
GROUP_USAGE = "trtllm-serve [OPTIONS] COMMAND [ARGS]..."
SERVE_USAGE = "trtllm-serve serve [OPTIONS] MODEL"


class Option(NamedTuple):
    kind: str  # integer, float, text, flag or choice
    default: Value = None
    choices: tuple[str, ...] = ()


OPTIONS = {
    "--tokenizer": Option("text"),
    "--host": Option("text", "localhost"),
    "--port": Option("integer", 8000),
    "--backend": Option("choice", "pytorch", ("pytorch", "tensorrt", "_autodeploy")),
    "--log_level": Option("choice", "info", LEVELS),
    "--max_beam_width": Option("integer", 1),
    "--max_batch_size": Option("integer", 2048),
    "--max_num_tokens": Option("integer", 8192),
    "--max_seq_len": Option("integer"),
    "--tp_size": Option("integer", 1),
    "--pp_size": Option("integer", 1),
    "--ep_size": Option("integer"),
    "--cluster_size": Option("integer"),
    "--gpus_per_node": Option("integer"),
    "--kv_cache_free_gpu_memory_fraction": Option("float", 0.9),
    "--num_postprocess_workers": Option("integer", 0),
    "--trust_remote_code": Option("flag", False),
    "--extra_llm_api_options": Option("text"),
    "--reasoning_parser": Option("choice", None, ("deepseek-r1",)),
    "--metadata_server_config_file": Option("text"),
    "--server_role": Option("text"),
    "--fail_fast_on_attention_window_too_large": Option("flag", False),
}
CHOICE_ALIASES = {("--backend", "trt"): "tensorrt"}


class UsageExit(Exception):
    """Stop before serving: help (code 0) or a mistake on the command line (code 2)."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def parse(argv: Sequence[str]) -> Arguments:
    """Return the option values by name, without the dashes, and `model`."""
    if not argv or argv[0] == "--help":
        raise UsageExit(_group_help(), 0 if argv else 2)
    if argv[0].startswith("-"):  # an option before the model belongs to the group, which has none
        raise _mistake(GROUP_USAGE, "trtllm-serve", _no_such_option(argv[0], ["--help"]))
    if argv[0] not in COMMANDS:
        return _parse_serve(argv)
    if argv[0] != "serve":
        raise UsageExit(f"Error: the simulator has no '{argv[0]}' command.", 2)
    return _parse_serve(argv[1:])


def _parse_serve(argv: Sequence[str]) -> Arguments:
    given, positionals = _split(argv)
    values = {name[2:]: option.default for name, option in OPTIONS.items()}
    values.update({name[2:]: _convert(name, text) for name, text in given.items()})
    if not positionals:
        raise _serve_mistake("Missing argument 'MODEL'.")
    if len(positionals) > 1:
        extra = positionals[1:]
        plural = "s" if len(extra) > 1 else ""
        raise _serve_mistake(f"Got unexpected extra argument{plural} ({' '.join(extra)})")
    return {**values, "model": positionals[0]}


def _split(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Separate options from positionals, which click allows in any order."""
    given: dict[str, str] = {}
    positionals: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word == "--":
            positionals.extend(rest)
        elif word == "--help":
            raise UsageExit(_serve_help(), 0)
        elif word.startswith("-") and word != "-":
            name, _, _ = word.partition("=")
            given[name] = _option_text(word, rest)
        else:
            positionals.append(word)
    return given, positionals


def _option_text(word: str, rest: Iterator[str]) -> str:
    """Return the option's value: after `=`, or the next word whatever it looks like."""
    name, equals, text = word.partition("=")
    option = OPTIONS.get(name)
    if option is None:
        raise _serve_mistake(_no_such_option(name, [*OPTIONS, "--help"]))
    if option.kind == "flag":
        if equals:
            raise _serve_mistake(f"Option '{name}' does not take a value.")
        return "true"
    following: str | None = text if equals else next(rest, None)
    if following is None:
        raise _serve_mistake(f"Option '{name}' requires an argument.")
    return following


def _convert(name: str, text: str) -> Value:
    option = OPTIONS[name]
    text = CHOICE_ALIASES.get((name, text), text)
    if option.kind == "flag":
        return True
    if option.kind == "choice" and text not in option.choices:
        raise _invalid(name, f"{text!r} is not one of {', '.join(map(repr, option.choices))}.")
    if option.kind not in ("integer", "float"):
        return text
    try:
        return int(text) if option.kind == "integer" else float(text)
    except ValueError:
        raise _invalid(name, f"{text!r} is not a valid {option.kind}.") from None


def _no_such_option(name: str, known: Sequence[str]) -> str:
    close = sorted(get_close_matches(name, known))
    if not close:
        return f"No such option: {name}"
    if len(close) == 1:
        return f"No such option: {name} Did you mean {close[0]}?"
    return f"No such option: {name} (Possible options: {', '.join(close)})"


def _invalid(name: str, message: str) -> UsageExit:
    return _serve_mistake(f"Invalid value for '{name}': {message}")


def _serve_mistake(message: str) -> UsageExit:
    return _mistake(SERVE_USAGE, "trtllm-serve serve", message)


def _mistake(usage: str, command: str, message: str) -> UsageExit:
    return UsageExit(f"Usage: {usage}\nTry '{command} --help' for help.\n\nError: {message}", 2)


def _group_help() -> str:
    commands = "\n".join(f"  {name}" for name in COMMANDS)
    options = "  --help  Show this message and exit."
    return f"Usage: {GROUP_USAGE}\n\nOptions:\n{options}\n\nCommands:\n{commands}"


def _serve_help() -> str:
    lines = [f"  {name}{_metavar(option)}" for name, option in OPTIONS.items()]
    return "\n".join([f"Usage: {SERVE_USAGE}\n", "Options:", *lines, "  --help"])


def _metavar(option: Option) -> str:
    if option.kind == "choice":
        return f" [{'|'.join(option.choices)}]"
    return "" if option.kind == "flag" else f" {option.kind.upper()}"
