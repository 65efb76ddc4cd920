"""TensorRT-LLM's trtllm-serve: its command, its options, its words, and what its exits mean."""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from common.talk import die, misused, say
from launch.arguments import flags_of, is_count, split_models, value_of, without_value
from launch.engines import World

PROGRAM = "trtllm-serve"
LEADER = "trtllm-llmapi-launch"  # wires a rank of several into one engine
LEADER_MARK = "llmapi-launch"  # by which its processes are known
READY_WORDS = b"Uvicorn running on"  # the engine says so; asking at once saves the poll's interval
WORK_WORDS = re.compile(  # it has answered somebody, or an iteration had work (print_iter_log)
    rb'"POST /v1/[^"]*" 200|\biter = \d+, .*num_scheduled_requests: [1-9]'
)
MEANINGS: Mapping[int, str] = {
    0: "though nobody stopped it",
    2: "it refused its arguments",
    125: "docker itself failed",
    126: f"{PROGRAM} cannot be executed",
    127: f"{PROGRAM} was not found",
    137: "killed",
    139: "segmentation fault",
    143: "terminated",
}
FINAL: Collection[int] = {2, 126, 127}  # would be so again

# Options are checked for this version; TRTLLM_VERSION says that the image holds another one. YAML
# keys: those that the documentation uses. There are more, so one that is not here is an error only
# where it looks like a slip of one that is.
KNOWN_VERSION = "1.1.0"
# `--config` is what later versions call it; 1.1.0 knows only the long name, later ones know both.
CONFIG_FLAGS = ("--config", "--extra_llm_api_options")
SIZES = {
    "tensor_parallel_size": ("--tp_size", "--tensor_parallel_size"),
    "pipeline_parallel_size": ("--pp_size", "--pipeline_parallel_size"),
    "context_parallel_size": ("--cp_size", "--context_parallel_size"),
}
MOE_SIZES: dict[str, tuple[str, ...]] = {
    "moe_tensor_parallel_size": (),  # in the YAML only
    "moe_expert_parallel_size": ("--ep_size", "--moe_expert_parallel_size"),
    "moe_cluster_parallel_size": ("--cluster_size", "--moe_cluster_parallel_size"),
}
# Options that take no value, of any version; after any other one comes its value.
SWITCHES = (
    "--trust_remote_code",
    "--fail_fast_on_attention_window_too_large",
    "--enable_chunked_prefill",  # of 1.2.1
    "--help",
)


@cache
def options() -> dict[str, list[str]]:
    path = Path(__file__).with_name(f"trtllm-{KNOWN_VERSION}.json")
    return dict(json.loads(path.read_text()))


# --- the command ----------------------------------------------------------------------------------
def read(words: Sequence[str], port: str) -> tuple[str | None, list[str], int]:
    """The model, if one was given, all other arguments, and the port it will serve on."""
    if flag := without_value(words, {*options()["flags"], *CONFIG_FLAGS} - {*SWITCHES}):
        misused(f"{flag} needs a value")
    models, args = split_models(words, SWITCHES)
    if models[1:]:
        number = "two" if len(models) == 2 else len(models)
        misused(f"one MODEL, not {number}: {', '.join(models[1:])}")
    args = rename_config(args)
    port = value_of(args, "--port") or port
    if not is_count(port) or int(port) > 65535:
        die(f"the port is {port!r}, not a number from 1 to 65535")
    if value_of(args, "--host") is None:
        args += ["--host", "0.0.0.0"]
    if value_of(args, "--port") is None:
        args += ["--port", port]
    return next(iter(models), None), args, int(port)


def command(model: str, args: Sequence[str]) -> tuple[str, ...]:
    return (PROGRAM, model, *args)


def names_of(command: Sequence[str]) -> tuple[str, ...]:
    """The names under which it may list the model of its command line."""
    model, named = command[1], value_of(command[2:], "--served_model_name")
    return tuple(filter(None, (named, model, Path(model).name)))


def config_of(args: Sequence[str]) -> str | None:
    """The configuration file, which the nodes have to see."""
    return value_of(args, *CONFIG_FLAGS)


def rename_config(args: Sequence[str]) -> list[str]:
    """`--config X` as 1.1.0 calls it."""
    old, new = CONFIG_FLAGS
    renamed = (new + word[len(old) :] if word.split("=")[0] == old else word for word in args)
    return list(renamed)


def read_config(path: str) -> dict[str, Any]:
    """The engine's YAML. Failure with the parser's words where it is not a mapping."""
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        die(f"cannot read the config file {path}: {error.strerror}")
    except RecursionError:
        die(f"the config file {path} is not YAML: nested too deeply")
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
    ) as error:  # a date that is none
        die(f"the config file {path} is not YAML: {' '.join(str(error).split())[:300]}")
    if not isinstance(config, dict | None):
        die(f"the config file {path} is not a mapping of settings")
    return config or {}


# --- what it would refuse -------------------------------------------------------------------------
def merged(args: Sequence[str]) -> dict[str, Any]:
    """The settings as the engine will see them: sizes given by flags, and over them the YAML."""
    path = config_of(args)
    config = read_config(path) if path is not None else {}
    given = {key: value_of(args, *flags) for key, flags in (SIZES | MOE_SIZES).items()}
    flags = {key: size for key, size in given.items() if size}
    return flags | {k: v for k, v in config.items() if v is not None or k not in flags}


def size_of(settings: Mapping[str, Any], key: str) -> int:
    """A size; 1 where it is not given. Failure where it is no number."""
    value = settings.get(key)
    if value is None:
        return 1
    if isinstance(value, bool) or not is_count(str(value)):
        die(f"{key} is {value!r}, not a number of GPUs")
    return int(value)


def find_world(settings: Mapping[str, Any]) -> World:
    return World(*(size_of(settings, key) for key in SIZES))


def check_flags(args: Sequence[str], version: str) -> None:
    """Failure for a flag that the engine's version does not have, with the one that was meant."""
    if version != KNOWN_VERSION:
        return
    known = options()["flags"]
    for flag in flags_of(args, SWITCHES):
        if flag not in known:
            near = nearest(flag.replace("-", "_").replace("__", "--", 1), known)
            meant = f"; did you mean {near}?" if near else ""
            hint = "if the image has another version, set TRTLLM_VERSION"
            die(f"{PROGRAM} {version} has no option {flag}{meant}", hint=hint)


def check_keys(config: Mapping[str, Any], path: str, version: str) -> None:
    """Failure for a key that looks like a slip of a known one; a notice for one nobody knows."""
    if version != KNOWN_VERSION:
        return
    known = options()["yaml_keys"]
    for key in config:
        if key not in known:
            if near := nearest(str(key), known):
                hint = "the engine refuses unknown keys"
                unknown = f"the config file {path} has the unknown key {key}"
                die(f"{unknown}; did you mean {near}?", hint=hint)
            say(f"{path}: unknown key {key}, passed on to the engine")


def nearest(word: str, known: Iterable[str]) -> str:
    return next(iter(get_close_matches(word, list(known), 1, 0.8)), "")


def check_moe(settings: Mapping[str, Any]) -> None:
    """moe_tp x moe_ep (x moe_cluster) has to be tp; where one is left out, it follows."""
    tp, cp = (size_of(settings, f"{name}_parallel_size") for name in ("tensor", "context"))
    given = [key for key in MOE_SIZES if settings.get(key) is not None]
    product = math.prod(size_of(settings, key) for key in given)
    cp_config = settings.get("cp_config")
    kind = str(cp_config.get("cp_type", "")).upper() if isinstance(cp_config, dict) else ""
    if cp > 1 and size_of(settings, "moe_expert_parallel_size") > 1 and kind != "HELIX":
        die("context parallelism with expert parallelism is only there for cp_type HELIX")
    if cp > 1 or not given:
        return
    complete = {"moe_tensor_parallel_size", "moe_expert_parallel_size"} <= set(given)
    if tp % product or (complete and product != tp):
        shown = " x ".join(f"{key} {settings[key]}" for key in given)
        must = f"has to {'be' if complete else 'divide'} the tensor parallel size, {tp}"
        hint = "experts are spread over the GPUs of the tensor parallelism"
        die(f"{shown} = {product} {must}", hint=hint)


def name_of(settings: Mapping[str, Any]) -> str:
    """The strategy in the words of the field: `TP 8 x PP 2, attention DP, EP 8`."""
    shape = {
        short: size_of(settings, f"{long}_parallel_size")
        for short, long in (("TP", "tensor"), ("PP", "pipeline"), ("CP", "context"))
    }
    words = [" x ".join(f"{k} {v}" for k, v in shape.items() if v > 1) or "one GPU"]
    words += ["attention DP"] if settings.get("enable_attention_dp") else []
    ep = size_of(settings, "moe_expert_parallel_size")
    moe_tp = size_of(settings, "moe_tensor_parallel_size")
    moe = settings.get("moe_config")
    if isinstance(moe, dict) and moe.get("backend") == "WIDEEP":
        words.append(f"Wide-EP {ep}")
    elif ep > 1:
        words.append(f"ETP {moe_tp} x {ep}" if moe_tp > 1 else f"EP {ep}")
    return ", ".join(words)


def check(args: Sequence[str], version: str) -> tuple[str, World]:
    """All that would be refused is refused here; the strategy's name and the world it needs."""
    settings = merged(args)
    check_flags(args, version)
    check_keys(settings, config_of(args) or "", version)
    check_moe(settings)
    return name_of(settings), find_world(settings)
