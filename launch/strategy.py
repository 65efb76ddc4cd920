"""Which parallelism a launch asks for, and what the engine would refuse, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from common.talk import die, say
from launch.parallelism import CONFIG_FLAGS, MOE_SIZES, SWITCHES, size_of, value_of

# `trtllm-serve serve --help` of 1.1.0. TRTLLM_VERSION says that the image holds another version.
KNOWN_VERSION = "1.1.0"
KNOWN_FLAGS = (
    "--tokenizer --host --port --backend --log_level --max_beam_width --max_batch_size "
    "--max_num_tokens --max_seq_len --tp_size --pp_size --ep_size --cluster_size --gpus_per_node "
    "--kv_cache_free_gpu_memory_fraction --num_postprocess_workers --trust_remote_code "
    "--extra_llm_api_options --reasoning_parser --metadata_server_config_file --server_role "
    "--fail_fast_on_attention_window_too_large --help"
).split()

# Top-level keys of the YAML that the documentation of 1.1.0 uses. There are more: one that is not
# here is an error only where it looks like a slip of one that is.
KNOWN_KEYS = (
    "tensor_parallel_size pipeline_parallel_size context_parallel_size gpus_per_node "
    "moe_cluster_parallel_size moe_tensor_parallel_size moe_expert_parallel_size "
    "enable_attention_dp enable_lm_head_tp_in_adp cp_config attention_dp_config moe_config "
    "kv_cache_config cuda_graph_config cache_transceiver_config disable_overlap_scheduler "
    "enable_iter_perf_stats enable_iter_req_stats print_iter_log return_perf_metrics "
    "perf_metrics_max_requests stream_interval guided_decoding_backend speculative_config "
    "max_batch_size max_num_tokens max_seq_len max_beam_width max_input_len backend dtype "
    "trust_remote_code tokenizer tokenizer_mode quant_config lora_config enable_lora "
    "scheduler_config peft_cache_config torch_compile_config sampler_type load_format "
    "attn_backend allreduce_strategy enable_chunked_prefill num_postprocess_workers "
    "reasoning_parser enable_autotuner garbage_collection_gen0_threshold"
).split()


def flags_of(args: Sequence[str]) -> list[str]:
    """The flags among serve arguments, without their values."""
    flags, i = [], 0
    while i < len(args):
        name, equals, _ = args[i].partition("=")
        flags.append(name)
        i += 1 if equals or name in SWITCHES or not name.startswith("--") else 2
    return [flag for flag in flags if flag.startswith("--")]


def check_flags(args: Sequence[str], version: str) -> None:
    """Failure for a flag that the engine's version does not have, with the one that was meant."""
    if version != KNOWN_VERSION:
        return
    for flag in flags_of(args):
        if flag not in KNOWN_FLAGS:
            near = nearest(flag.replace("-", "_").replace("__", "--", 1), KNOWN_FLAGS)
            die(
                f"trtllm-serve {version} has no option {flag}" + (f"; {near}?" if near else ""),
                hint="TRTLLM_VERSION=... where the image holds another version",
            )


def check_keys(config: Mapping[str, Any], path: str, version: str) -> None:
    """Failure for a key that looks like a slip of a known one; a notice for one nobody knows."""
    if version != KNOWN_VERSION:
        return
    for key in config:
        if key not in KNOWN_KEYS:
            if near := nearest(str(key), KNOWN_KEYS):
                die(
                    f"the config file {path} has the unknown key {key}; {near}?",
                    hint="the engine refuses unknown keys",
                )
            say(f"the key {key} of {path} is not one that is known here: passed on")


def nearest(word: str, known: Iterable[str]) -> str:
    return next(iter(get_close_matches(word, list(known), 1, 0.8)), "")


def check_moe(settings: Mapping[str, Any]) -> None:
    """moe_tp x moe_ep (x moe_cluster) has to be tp; where one is left out, it follows."""
    tp, cp = (size_of(settings, f"{name}_parallel_size") for name in ("tensor", "context"))
    given = [key for key in MOE_SIZES if settings.get(key) is not None]
    product = 1
    for key in given:
        product *= size_of(settings, key)
    cp_config = settings.get("cp_config")
    kind = str(cp_config.get("cp_type", "")).upper() if isinstance(cp_config, dict) else ""
    if cp > 1 and size_of(settings, "moe_expert_parallel_size") > 1 and kind != "HELIX":
        die("context parallelism with expert parallelism is only there for cp_type HELIX")
    if cp > 1 or not given:
        return
    complete = {"moe_tensor_parallel_size", "moe_expert_parallel_size"} <= set(given)
    if tp % product or (complete and product != tp):
        shown = " x ".join(f"{key} {settings[key]}" for key in given)
        die(
            f"{shown} = {product} has to {'be' if complete else 'divide'} the tensor parallel "
            f"size, {tp}",
            hint="experts are spread over the GPUs of the tensor parallelism",
        )


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


def check(args: Sequence[str], settings: Mapping[str, Any], version: str) -> str:
    """All checks of serve arguments and the settings that they amount to; the strategy's name."""
    check_flags(args, version)
    check_keys(settings, value_of(args, *CONFIG_FLAGS) or "", version)
    check_moe(settings)
    return name_of(settings)
