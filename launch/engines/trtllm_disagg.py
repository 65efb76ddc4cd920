"""TensorRT-LLM's disaggregated serving: its two kinds of server, and the orchestrator before them.

A context server reads the prompt (prefill) and hands its KV cache to a generation server (decode).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from common.talk import die, say
from launch.arguments import value_of
from launch.engines import trtllm

TRANSCEIVER, BUFFER = "cache_transceiver_config", "max_tokens_in_buffer"
WRITE = f"write {TRANSCEIVER}: {{backend: UCX, {BUFFER}: 8192}}"
BACKENDS = ("UCX", "NIXL", "MOONCAKE")  # MPI works only within one MPI world, and these are several
# These ask for the engine's own service discovery; here the orchestrator gets a list.
DISCOVERY = ("--server_role", "--disagg_cluster_uri", "--metadata_server_config_file")
ALIKE = ("dtype", "speculative_config", "kv_cache_config.dtype", "kv_cache_config.tokens_per_block")
MOST_TOKENS = 8192  # tokens of a prompt, unless max_num_tokens says otherwise
REQUEST_SECONDS = 86400  # for a whole request; the engine's default cuts every answer after 180


def check(model: str, prefill: Sequence[str], decode: Sequence[str]) -> None:
    """Failure for what would start well and then serve nobody. `prefill` and `decode` are the
    arguments of the two kinds of server."""
    pools = {"prefill": prefill, "decode": decode}
    settings = {name: settings_of(name, args, model) for name, args in pools.items()}
    for name, args in pools.items():
        check_transceiver(
            settings[name], f"the config file {trtllm.config_of(args)} (--{name}-config)"
        )
    if settings["prefill"].get("disable_overlap_scheduler") is not True:
        lacks = f"{trtllm.config_of(prefill)} does not set disable_overlap_scheduler: true"
        why = "with the overlap scheduler, a prefill server starts and then refuses every request"
        die(f"the config file {lacks}", hint=f"write it there: {why}")
    check_alike(settings)
    say_what_fits_badly(settings, prefill)


def settings_of(name: str, args: Sequence[str], model: str) -> dict[str, Any]:
    """The settings that a pool's servers will see. Failure if they ask for service discovery."""
    if trtllm.config_of(args) is None:
        hint = f"--{name}-config FILE: configs/disaggregated/ has an example of each"
        die(f"the {name} servers have no config file, which has to set {TRANSCEIVER}", hint=hint)
    settings = trtllm.merged(args)
    flag = next((flag for flag in DISCOVERY if value_of(args, flag)), "")
    if flag or settings.get("disagg_cluster"):
        found = flag or "disagg_cluster in the YAML"
        hint = "leave it out: the orchestrator is told where its servers are"
        die(f"{found} of the {name} servers asks for service discovery", hint=hint)
    if settings.get("model", model) != model:
        what = f"the {name} servers' YAML names another model, {settings['model']}"
        die(f"{what}, which would win over {model}", hint="leave `model` out of it")
    return settings


def check_transceiver(settings: Mapping[str, Any], where: str) -> None:
    found = settings.get(TRANSCEIVER)
    inner = found if isinstance(found, dict) else {}
    backend, tokens = inner.get("backend"), inner.get(BUFFER)
    if backend is None:
        die(f"{where} sets no {TRANSCEIVER}.backend: no KV cache would be handed over", hint=WRITE)
    if backend == "DEFAULT":
        which = "UCX in 1.1.0 and NIXL in 1.2.1"
        die(
            f"{where} has {TRANSCEIVER}.backend: DEFAULT, which is {which}",
            hint="write UCX or NIXL",
        )
    if backend not in BACKENDS:
        these = f"one of {', '.join(BACKENDS)}"
        die(f"{where} has {TRANSCEIVER}.backend: {backend}, which is not {these}", hint=WRITE)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        needs = f"{TRANSCEIVER}.{BUFFER}, the longest prompt in tokens"
        die(f"{where} needs {needs}; it has {tokens!r}", hint=WRITE)


def check_alike(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """A KV cache has to be read as it was written, so both kinds of server must agree on it."""
    for key in (f"{TRANSCEIVER}.backend", *ALIKE):
        values = {name: below(found, key) for name, found in settings.items()}
        if values["prefill"] != values["decode"]:
            each = " and ".join(f"{value} for {name}" for name, value in values.items())
            die(
                f"{key} is {each}: the KV cache is handed over", hint="write the same in both files"
            )


def below(settings: Mapping[str, Any], key: str) -> object:
    """The value of `key`, or of `key.inner`."""
    outer, _, inner = key.partition(".")
    found = settings.get(outer)
    return (found.get(inner) if isinstance(found, dict) else None) if inner else found


def say_what_fits_badly(settings: Mapping[str, Mapping[str, Any]], prefill: Sequence[str]) -> None:
    context, generation = settings["prefill"], settings["decode"]
    given = context.get("max_num_tokens") or value_of(prefill, "--max_num_tokens") or MOST_TOKENS
    room = min(int(found[TRANSCEIVER][BUFFER]) for found in settings.values())
    if not context.get("enable_chunked_prefill") and room < int(given):
        say(f"{BUFFER} is {room}: prompts may have up to {given} tokens (max_num_tokens)")
    pp = trtllm.size_of(context, "pipeline_parallel_size")
    if pp > 1 and trtllm.size_of(generation, "tensor_parallel_size") > 1:
        say("pipeline parallelism for prefill with tensor parallelism for decode is known to hang")


# --- the orchestrator -----------------------------------------------------------------------------
def command(file: str, seconds: float) -> tuple[str, ...]:
    """The orchestrator's command; it gives its servers so many seconds to be ready."""
    within = str(max(1, round(seconds)))
    return (trtllm.PROGRAM, "disaggregated", "-c", file, "-t", within, "-r", str(REQUEST_SECONDS))


def file(host: str, port: int, prefill: Sequence[str], decode: Sequence[str]) -> str:
    """The orchestrator's file: where it listens, and where its servers are (`host:port`, each).

    It is JSON, which is also YAML.
    """

    def servers(urls: Sequence[str]) -> dict[str, Any]:
        router = {"type": "load_balancing"}  # to the one with the fewest open requests
        return {"num_instances": len(urls), "urls": list(urls), "router": router}

    lists = {"context_servers": servers(prefill), "generation_servers": servers(decode)}
    return json.dumps({"hostname": host, "port": port, **lists}, indent=1) + "\n"
