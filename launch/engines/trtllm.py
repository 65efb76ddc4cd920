"""TensorRT-LLM's trtllm-serve: its command, its options, its words, and its world."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.talk import die, misused, say
from launch.arguments import (
    as_flags,
    flags_of,
    is_count,
    split_models,
    value_of,
    with_address,
    without_value,
)
from launch.config_file import read_config, write_with
from launch.engines import LEVEL, World
from launch.options import Check, first_name, union, versions

TITLE, PACKAGE, PROGRAM = "TensorRT-LLM", "tensorrt_llm", "trtllm-serve"
IMAGE, VERSION = "nvcr.io/nvidia/tensorrt-llm/release:1.1.0", "TRTLLM_VERSION"
CACHES: Mapping[str, str] = {}
LEADER = "trtllm-llmapi-launch"  # wires a rank of several into one engine
LEADER_MARK = "llmapi-launch"  # by which its processes are known
METRICS = "/prometheus/metrics"  # reading /metrics empties it
WORK_WORDS = re.compile(  # it has answered somebody, or an iteration had work (print_iter_log)
    rb'"POST /v1/[^"]*" 200|\biter = \d+, .*num_scheduled_requests: [1-9]'
)
STARTS, COUNTERS = "TensorRT-LLM version: ", "trtllm"
PREFIXES: Sequence[str] = (
    r"(?P<begins>\[TRT-LLM[^\]]*\]) (?:\[RANK \d+\] )?\[(?P<level>[A-Z])\] ?"
    r"(?:\[\w+\](?=[ \[]) ?)?(?:\[RANK \d+\] ?)?",  # from 1.3 on: the part, and then the rank
    rf"\[TensorRT-LLM\]\[{LEVEL}\] ?",
)

# 1.1.0 knows only the long name; from 1.2 on `--config` is the first name, and both work.
CONFIG_FLAGS = ("--config", "--extra_llm_api_options")
FRACTION = "free_gpu_memory_fraction"  # a key of kv_cache_config, and a flag
SIZES = {
    "tensor_parallel_size": ("--tp_size", "--tensor_parallel_size"),
    "pipeline_parallel_size": ("--pp_size", "--pipeline_parallel_size"),
    "context_parallel_size": ("--cp_size", "--context_parallel_size"),
}
MOE_SIZES: dict[str, tuple[str, ...]] = {
    "moe_tensor_parallel_size": (),  # in the YAML only
    "moe_expert_parallel_size": ("--ep_size", "--moe_expert_parallel_size"),
    "moe_cluster_parallel_size": (),  # in the YAML only: it has flags, without effect
}
TP: Sequence[str] = SIZES["tensor_parallel_size"]
BACKEND = "pytorch"  # the default one, and the one whose keys are known
CLUSTER_FLAGS = ("--cluster_size", "--moe_cluster_parallel_size")
# Of every version: when a command line is read, it is not known yet which one it will be.
FLAGS, SWITCHES = union("trtllm", "flags"), union("trtllm", "switches")


# --- the command ----------------------------------------------------------------------------------
def read(words: Sequence[str], port: str) -> tuple[str | None, list[str], int]:
    """The model, if one was given, all other arguments, and the port it will serve on."""
    if flag := without_value(words, FLAGS - SWITCHES):
        misused(f"{flag} needs a value")
    models, args = split_models(words, SWITCHES)
    if models[1:]:
        number = "two" if len(models) == 2 else len(models)
        misused(f"one MODEL, not {number}: {', '.join(models[1:])}")
    return next(iter(models), None), *with_address(args, port)


def ready_words(version: str) -> bytes:
    """What its log says once it listens; asking at once saves the poll's interval.

    From 1.2 on uvicorn is given a socket, and says nothing about it.
    """
    return b"Application startup complete" if is_since_1_2(version) else b"Uvicorn running on"


def binds_first(version: str) -> bool:
    """Whether it takes its port before it loads; then it does not ask to reuse the port."""
    return is_since_1_2(version)


def is_since_1_2(version: str) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and tuple(map(int, found.groups())) >= (1, 2)


def command(model: str, args: Sequence[str]) -> tuple[str, ...]:
    return (PROGRAM, model, *args)


def names_of(model: str, args: Sequence[str]) -> tuple[str, ...]:
    """The names under which it may list the model of its command line."""
    return tuple(filter(None, (value_of(args, "--served_model_name"), model, Path(model).name)))


def config_of(args: Sequence[str]) -> str | None:
    """The configuration file, which the nodes have to see."""
    return value_of(args, *CONFIG_FLAGS)


def key_of(args: Sequence[str], environ: Mapping[str, str]) -> str:
    """It has no key."""
    return ""


def rename_config(args: Sequence[str]) -> list[str]:
    """`--config X` by the name that 1.1.0 knows, and every later version, too."""
    old, new = CONFIG_FLAGS
    renamed = (new + word[len(old) :] if word.split("=")[0] == old else word for word in args)
    return list(renamed)


def part(args: Sequence[str], index: int, nodes: int, head: str) -> list[str]:
    raise NotImplementedError("its LEADER tells each rank")


# --- the world that it needs ----------------------------------------------------------------------
def merged(args: Sequence[str]) -> dict[str, Any]:
    """The settings as the engine will see them: sizes given by flags, overridden by the YAML."""
    path = config_of(args)
    config = (read_config(path) or {}) if path is not None else {}
    given = {key: value_of(args, *flags) for key, flags in (SIZES | MOE_SIZES).items()}
    flags = {key: size for key, size in given.items() if size}
    return flags | {k: v for k, v in config.items() if v is not None or k not in flags}


def size_of(settings: Mapping[str, Any], key: str) -> int:
    """A size; 1 if it is not given. Failure if it is not a number."""
    value = settings.get(key)
    if value is None:
        return 1
    if isinstance(value, bool) or not is_count(str(value)):
        misused(f"{key} is {value!r}, not a number of GPUs")
    return int(value)


def find_world(settings: Mapping[str, Any]) -> World:
    return World(*(size_of(settings, key) for key in SIZES))


def check_moe(settings: Mapping[str, Any]) -> None:
    """moe_tp x moe_ep (x moe_cluster) has to be tp; what is left out follows from the others."""
    tp, cp = (size_of(settings, f"{name}_parallel_size") for name in ("tensor", "context"))
    given = [key for key in MOE_SIZES if settings.get(key) is not None]
    product = math.prod(size_of(settings, key) for key in given)
    cp_config = settings.get("cp_config")
    kind = str(cp_config.get("cp_type", "")).upper() if isinstance(cp_config, dict) else ""
    if cp > 1 and size_of(settings, "moe_expert_parallel_size") > 1 and kind != "HELIX":
        die("context parallelism with expert parallelism needs cp_type HELIX")
    if cp > 1 or not given:
        return
    complete = {"moe_tensor_parallel_size", "moe_expert_parallel_size"} <= set(given)
    if tp % product or (complete and product != tp):
        shown = " x ".join(f"{key} {settings[key]}" for key in given)
        must = f"has to {'be' if complete else 'divide'} the tensor parallel size, {tp}"
        hint = "experts are spread over the GPUs of the tensor parallelism"
        die(f"{shown} = {product} {must}", hint=hint)


def name_of(settings: Mapping[str, Any]) -> str:
    """The strategy in the usual words: `TP 8 x PP 2, attention DP, EP 8`."""
    words = [find_world(settings).shape]
    words += ["attention DP"] if settings.get("enable_attention_dp") else []
    ep = size_of(settings, "moe_expert_parallel_size")
    moe_tp = size_of(settings, "moe_tensor_parallel_size")
    moe = settings.get("moe_config")
    if isinstance(moe, dict) and moe.get("backend") == "WIDEEP":
        words.append(f"Wide-EP {ep}")
    elif ep > 1:
        words.append(f"ETP {moe_tp} x {ep}" if moe_tp > 1 else f"EP {ep}")
    return ", ".join(words)


def check(args: Sequence[str]) -> tuple[str, World]:
    """The strategy's name and the world that it needs, whatever the version."""
    settings = merged(args)
    check_moe(settings)
    return name_of(settings), find_world(settings)


# --- for a search ---------------------------------------------------------------------------------
def tuned(
    config: str, sizes: Mapping[str, int], settings: Mapping[str, str], file: Path
) -> list[str]:
    """The arguments of a candidate. Settings are keys of the YAML; `a.b` is the key b within a.

    They go into `file`, added to the config, if there is one.
    """
    flags = {"tp": "--tp_size", "pp": "--pp_size", "ep": "--ep_size"}
    if settings:
        write_with(config, settings, file)
        config = str(file)
    return as_flags(flags, sizes, config, {})


def effective(args: Sequence[str]) -> object:
    """What has to be equal for two configurations to be the same."""
    found = {key: str(value) for key, value in merged(args).items()}
    return {key: value for key, value in found.items() if not (key in SIZES and value == "1")}


# --- what a version makes of it -------------------------------------------------------------------
def settle(args: Sequence[str], version: str) -> list[str]:
    """The arguments for that version of the engine. Failure for what it would refuse.

    If a version's options are not known, or it is '', nothing is refused.
    """
    args = list(args) if is_since_1_2(version) else rename_config(args)
    if value_of(args, *CLUSTER_FLAGS):
        instead = "use moe_cluster_parallel_size in the YAML"
        say(f"{CLUSTER_FLAGS[0]} has no effect in {PROGRAM}; {instead}")
    if version not in versions("trtllm"):
        what = (
            f"the options of {PROGRAM} {version} are" if version else f"the version of {TITLE} is"
        )
        say(f"{what} not known here: the engine itself checks what it is given")
        return args
    check = Check("trtllm", PROGRAM, version, VERSION)
    check.flags(args)
    if (path := config_of(args)) is not None:
        config = check_config(path, version)
        backend = config.get("backend") or value_of(args, "--backend") or BACKEND
        if backend == BACKEND:
            check.keys(config, path)
        else:
            say(f"the keys of backend {backend} are not known here: {PROGRAM} itself checks {path}")
        say_who_wins(args, config, path, deep=is_since_1_2(version))
    return args


def check_config(path: str, version: str) -> dict[str, Any]:
    """The YAML. Failure for what the engine would end with a traceback for."""
    config = read_config(path)
    if config is None:
        hint = "leave --config out, or write {} for no settings"
        die(f"the config file {path} is empty, which {PROGRAM} {version} refuses", hint=hint)
    for key in SIZES:
        if config.get(key, 1) is None:
            what = f"the config file {path} sets {key} to null, which {PROGRAM} {version} refuses"
            die(what, hint="leave that line out, or give a number")
    return config


def say_who_wins(args: Sequence[str], config: Mapping[str, Any], path: str, deep: bool) -> None:
    """Say which flags do not count, as the YAML has the last word.

    A `deep` engine merges kv_cache_config with the flag for one of its keys; others replace it.
    """
    cache = config.get("kv_cache_config")
    inner = cache if isinstance(cache, dict) else {}
    settings = {**config, **{key: inner[key] for key in (FRACTION,) if key in inner}}
    given = {f: value_of(args, f) for f in flags_of(args, SWITCHES) if f not in CLUSTER_FLAGS}
    for flag, value in given.items():
        key = first_name("trtllm", flag).removeprefix("--")
        wanted = "True" if flag in SWITCHES else value
        if key in settings and str(settings[key]) != wanted:
            words = flag if flag in SWITCHES else f"{flag} {value}"
            shown = "null" if settings[key] is None else settings[key]
            say(f"{words} does not count: {path} has {key}: {shown}")
        elif key == FRACTION and "kv_cache_config" in config and key not in inner and not deep:
            lost = f"kv_cache_config in {path} replaces it"
            say(f"{flag} {value} does not count: {lost}; write {FRACTION} there")
