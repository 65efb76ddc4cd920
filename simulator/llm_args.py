"""What the engine is built from: flags and YAML merged, and checked as the real one does."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import libraries
from console import Fatal
from environment import Settings
from leader_link import is_proxied

# Keys that are new in 1.2.1 are marked with +, those that it dropped with -.
KEYS: dict[type, str] = {
    int: """
        tensor_parallel_size pipeline_parallel_size context_parallel_size gpus_per_node
        moe_cluster_parallel_size moe_tensor_parallel_size moe_expert_parallel_size max_batch_size
        max_num_tokens max_seq_len max_beam_width max_input_len stream_interval
        num_postprocess_workers perf_metrics_max_requests iter_stats_max_iterations
        request_stats_max_iterations batch_wait_timeout_iters garbage_collection_gen0_threshold""",
    bool: """
        enable_attention_dp enable_lm_head_tp_in_adp enable_iter_perf_stats enable_iter_req_stats
        print_iter_log disable_overlap_scheduler return_perf_metrics trust_remote_code
        enable_chunked_prefill enable_lora enable_min_latency enable_layerwise_nvtx_marker
        enable_autotuner skip_tokenizer_init fail_fast_on_attention_window_too_large
        force_dynamic_quantization gather_generation_logits mm_encoder_only""",
    str: "dtype revision tokenizer_revision sampler_type attn_backend reasoning_parser",
    object: """
        model tokenizer tokenizer_mode load_format lora_config guided_decoding_backend
        batched_logits_processor peft_cache_config scheduler_config cp_config speculative_config
        postprocess_tokenizer_dir decoding_config backend build_config- batch_wait_timeout_ms
        batch_wait_max_tokens_ratio allreduce_strategy checkpoint_loader checkpoint_format
        kv_connector_config custom_tokenizer+ pp_partition+ sparse_attention_config+
        otlp_traces_endpoint+ orchestrator_type+ env_overrides+ sampler_force_async_worker+
        ray_worker_extension_cls+ ray_placement_config+ enable_sleep+ max_stats_len+
        disable_flashinfer_sampling+ disagg_cluster+""",
}
SUB_KEYS = {  # sub-configurations are strict too; listed where their keys are known
    "attention_dp_config": "enable_balance timeout_iters batching_wait_iters",
    "cache_transceiver_config": """
        backend max_tokens_in_buffer kv_transfer_timeout_ms+
        kv_transfer_sender_future_timeout_ms+""",
    "cuda_graph_config": "batch_sizes max_batch_size enable_padding",
    "kv_cache_config": """
        enable_block_reuse max_tokens max_attention_window sink_token_length onboard_blocks
        free_gpu_memory_fraction host_cache_size cross_kv_cache_fraction use_uvm dtype
        secondary_offload_min_priority event_buffer_max_size attention_dp_events_gather_period_ms
        enable_partial_reuse copy_on_partial_reuse max_gpu_total_bytes mamba_ssm_cache_dtype
        tokens_per_block""",
    "moe_config": """
        backend max_num_tokens load_balancer disable_finalize_fusion
        use_low_precision_moe_combine+""",
    "nvfp4_gemm_config": "allowed_backends+",
    "torch_compile_config": """
        enable_fullgraph enable_inductor enable_piecewise_cuda_graph capture_num_tokens
        enable_userbuffers max_num_streams""",
}
BACKENDS = "DEFAULT UCX NIXL MPI MOONCAKE+"  # of the KV cache's transceiver
NEVER_NULL = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")
DEFAULT_BACKEND = {"1.1.0": "UCX", "1.2.1": "NIXL"}
CP_TYPES = ("ULYSSES", "STAR", "RING", "HELIX")
MPI_VARIABLE = re.compile(r"SLURM_|PMI|OMPI_COMM_WORLD_")
REPO_ID = re.compile(r"([\w.-]+/)?[\w.-]{1,96}")
MODEL_CONTEXT = 131072  # the simulated model's own limit, when --max_seq_len sets none


class LlmArgs:
    """The flags by their YAML names, overridden by the YAML."""

    def __init__(self, flags: Mapping[str, Any], settings: Settings) -> None:
        gpus, version = settings.gpus, settings.version
        if flags["gpus_per_node"] is None and gpus == 0:
            raise Fatal("ValueError", "No GPU devices found on the node")
        forgotten = {"moe_cluster_parallel_size": None}  # as the real one does once it is parsed
        config = {**flags, **forgotten, **_read_yaml(flags["config"], version != "1.1.0")}
        self.model: str = flags["model"]
        self.served_name = _served_name(self.model)
        self.host: str = flags["host"]
        self.port: int = flags["port"]
        self.tp = _positive(config, "tensor_parallel_size")
        self.pp = _positive(config, "pipeline_parallel_size")
        self.cp = _positive(config, "context_parallel_size")
        self.world_size = self.tp * self.pp * self.cp
        per_node: int | None = config["gpus_per_node"]
        self.gpus_per_node = max(1, gpus if per_node is None else per_node)
        self.max_batch_size = _positive(config, "max_batch_size")
        self.max_seq_len = _positive(config, "max_seq_len", MODEL_CONTEXT)
        chunked = config.get("enable_chunked_prefill")
        self.max_num_tokens = None if chunked else _positive(config, "max_num_tokens", 8192)
        self.stream_interval = _positive(config, "stream_interval")
        self.attention_dp = bool(config.get("enable_attention_dp"))
        # What carries KV caches to and from other servers: nothing, unless the YAML names it.
        backend = (config.get("cache_transceiver_config") or {}).get("backend")
        self.transceiver = DEFAULT_BACKEND[version] if backend == "DEFAULT" else backend
        self.overlaps = not config.get("disable_overlap_scheduler")  # not in a context server
        self.prometheus = bool(config.get("return_perf_metrics"))
        self.iter_stats = bool(config.get("enable_iter_perf_stats"))
        _check_moe(self, config)
        _check_gpus(self, per_node, gpus)


def read_yaml_file(path: str) -> Any:  # noqa: ANN401 (YAML)
    """Its errors are Python's own, as in the real one."""
    import yaml  # late: often there is no such file

    with Path(path).open(encoding="utf-8") as file:
        return yaml.safe_load(file)


def _read_yaml(path: str | None, new: bool) -> dict[str, Any]:
    if path is None:
        return {}
    if not isinstance(parsed := read_yaml_file(path), dict):
        raise Fatal("TypeError", f"'{type(parsed).__name__}' object is not a mapping: {path}")
    return _checked(parsed, new)


def _checked(config: dict[str, Any], new: bool) -> dict[str, Any]:
    """Convert as pydantic does and refuse what it refuses, all mistakes at once."""
    pydantic = libraries.pydantic()
    strict = {"extra": "forbid", "protected_namespaces": (), "arbitrary_types_allowed": True}

    def model(name: str, kinds: dict[str, Any]) -> Any:  # noqa: ANN401 (a class made here)
        fields = {key: (kind if key in NEVER_NULL else kind | None, None)
                  for key, kind in kinds.items()}  # fmt: skip
        return pydantic.create_model(name, __config__=strict, **fields)

    kinds: dict[str, Any] = {k: kind for kind, keys in KEYS.items() for k in _names(keys, new)}
    for key, keys in SUB_KEYS.items():
        if names := _names(keys, new):
            sub_kinds: dict[str, Any] = dict.fromkeys(names, object)
            if key == "cache_transceiver_config":
                backends: Any = _names(BACKENDS, new)
                sub_kinds |= {"backend": Literal[backends], "max_tokens_in_buffer": int}
            kinds[key] = model(key.title().replace("_", ""), sub_kinds)
    try:
        checked = model("TorchLlmArgs", kinds).model_validate(config)
    except pydantic.ValidationError as error:
        raise Fatal("pydantic_core._pydantic_core.ValidationError", str(error)) from None
    return dict(checked.model_dump(exclude_unset=True))


def _names(text: str, new: bool) -> tuple[str, ...]:
    """The names that the version has."""
    return tuple(name.rstrip("+-") for name in text.split() if name[-1] != "+-"[new])


def _positive(config: Mapping[str, Any], key: str, default: int = 1) -> int:
    value = config.get(key)
    value = default if value is None else int(value)
    if value < 1:
        raise Fatal("ValueError", f"{key} must be greater than 0, but got {value}")
    return value


def _check_moe(args: LlmArgs, config: Mapping[str, Any]) -> None:
    """Apply the rules of tensorrt_llm.Mapping to the MoE part of the parallelism."""
    cp_type = _cp_type(config.get("cp_config"))
    # Ulysses shards the sequence only; the other kinds lend their GPUs to the experts.
    world = args.tp * (1 if cp_type in (None, "ULYSSES") else args.cp)
    names = ("moe_tensor", "moe_expert", "moe_cluster")
    tp, ep, cluster = (config.get(f"{name}_parallel_size") for name in names)
    if any(size is not None and size < 1 for size in (tp, ep, cluster)):
        raise Fatal("ValueError", f"MoE parallel sizes must be positive, got {tp, ep, cluster}")
    cluster = cluster or 1
    if tp is None:  # the size that is not given follows from the one that is
        tp = world // ((ep := ep or 1) * cluster)
    ep = ep or world // (tp * cluster)
    if tp * ep * cluster != world:
        words = "moe_tp_size * moe_ep_size * moe_cluster_size must equal to moe_world_size, but got"
        raise Fatal("ValueError", f"{words} {tp} * {ep} * {cluster} != {world}")
    if ep != 1 and cluster > 1:
        raise Fatal("NotImplementedError", "moe_cluster_size > 1 needs moe_ep_size == 1")
    if ep != 1 and args.cp > 1 and cp_type != "HELIX":
        raise Fatal("NotImplementedError", "CP don't support MoE tp/ep yet")


def _cp_type(cp_config: object) -> str | None:
    value = cp_config.get("cp_type") if isinstance(cp_config, dict) else None
    if value is None or str(value).upper() in CP_TYPES:
        return None if value is None else str(value).upper()
    raise Fatal("ValueError", f"Invalid cp_type {value!r}, must be one of {CP_TYPES}")


def _check_gpus(args: LlmArgs, asked: int | None, gpus: int) -> None:
    """Compare this node's share of the ranks (all, unless told otherwise) with its GPUs. Fail where
    MPI_Comm_spawn would, which cannot start them inside somebody else's MPI or Slurm step."""
    world, spawned = args.world_size, not is_proxied(os.environ)
    per_node = world if spawned and asked is None else args.gpus_per_node
    nodes = -(-world // per_node)
    if gpus < (min(world, per_node) if spawned else world // nodes):
        words = f"Only {gpus} GPUs are available, but {world} are required."
        raise Fatal("RuntimeError", words)
    if spawned and nodes > 1:
        words = f"not enough slots for the {world} ranks that are required: with {per_node} a node "
        words += "they need several nodes, and this one was started alone"
        raise Fatal("mpi4py.MPI.Exception", f"MPI_ERR_SPAWN: {words}")
    found = ", ".join(sorted(filter(MPI_VARIABLE.match, os.environ)))
    if spawned and world > 1 and found:
        words = f"[simulator] {world} ranks are started by MPI_Comm_spawn, which does not work in "
        words += f"an environment prepared for another launcher: {found}"
        raise Fatal("mpi4py.MPI.Exception", f"MPI_ERR_SPAWN: could not spawn processes\n{words}")


def _served_name(model: str) -> str:
    """Return the name in /v1/models: a directory's own name, else the repository id."""
    path = Path(model)
    if model and path.is_dir():
        return path.resolve().name if path.name in ("", "..") else path.name
    if not REPO_ID.fullmatch(model) or ".." in model or model.startswith("./"):
        words = f"Repo id must be in the form 'repo_name' or 'namespace/repo_name': '{model}'. "
        words += "Use `repo_type` argument if needed."
        raise Fatal("huggingface_hub.errors.HFValidationError", words)
    return model
