"""What the engine is built from: flags and YAML merged, and checked as the real one does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from arguments import Arguments
from console import Fatal
from conversion import Wrong, boolean, integer, mapping
from leader_link import is_proxied
from yaml_subset import Yaml, YamlError, parse_yaml

# Flags whose YAML name differs.
FLAG_NAMES = {
    "tp_size": "tensor_parallel_size",
    "pp_size": "pipeline_parallel_size",
    "ep_size": "moe_expert_parallel_size",
    "cluster_size": "moe_cluster_parallel_size",
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


INTEGERS = _names("""
    tensor_parallel_size pipeline_parallel_size context_parallel_size gpus_per_node
    moe_cluster_parallel_size moe_tensor_parallel_size moe_expert_parallel_size
    max_batch_size max_num_tokens max_seq_len max_beam_width max_input_len stream_interval
    num_postprocess_workers perf_metrics_max_requests iter_stats_max_iterations
    request_stats_max_iterations batch_wait_timeout_iters
""")
BOOLEANS = _names("""
    enable_attention_dp enable_lm_head_tp_in_adp enable_iter_perf_stats enable_iter_req_stats
    print_iter_log disable_overlap_scheduler return_perf_metrics trust_remote_code
    enable_chunked_prefill enable_lora enable_min_latency enable_layerwise_nvtx_marker
    enable_autotuner skip_tokenizer_init
    fail_fast_on_attention_window_too_large force_dynamic_quantization
    gather_generation_logits
""")
OTHERS = _names("""
    kv_cache_config cuda_graph_config moe_config cp_config attention_dp_config
    cache_transceiver_config guided_decoding_backend speculative_config backend dtype revision
    tokenizer tokenizer_mode tokenizer_revision quant_config lora_config scheduler_config
    peft_cache_config build_config torch_compile_config sampler_type load_format attn_backend
    allreduce_strategy reasoning_parser postprocess_tokenizer_dir checkpoint_format
    checkpoint_loader batch_wait_timeout_ms garbage_collection_gen0_threshold orchestrator_type
    sparse_attention_config mm_encoder_only disagg_cluster kv_connector_config
""")
SUB_KEYS = {  # sub-configurations are strict too; listed where their keys are known
    "attention_dp_config": {"enable_balance", "timeout_iters", "batching_wait_iters"},
    "moe_config": {
        "backend",
        "max_num_tokens",
        "load_balancer",
        "disable_finalize_fusion",
        "use_low_precision_moe_combine",
    },
}
KNOWN = {*INTEGERS, *BOOLEANS, *OTHERS}
CP_TYPES = ("ULYSSES", "STAR", "RING", "HELIX")
MPI_VARIABLE = re.compile(r"SLURM_|PMI|OMPI_COMM_WORLD_")
REPO_ID = re.compile(r"([\w.-]+/)?[\w.-]{1,96}")


class LlmArgs(NamedTuple):
    model: str
    served_name: str
    host: str
    port: int
    tp: int
    pp: int
    cp: int
    gpus_per_node: int
    max_batch_size: int
    max_seq_len: int | None
    stream_interval: int
    guided_decoding: bool

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp


def build_llm_args(arguments: Arguments, gpus: int, env: Mapping[str, str]) -> LlmArgs:
    if arguments["gpus_per_node"] is None and gpus == 0:
        raise Fatal("ValueError", "No GPU devices found on the node")
    flags = {FLAG_NAMES.get(name, name): value for name, value in arguments.items()}
    config: dict[str, Yaml] = {**flags, **_read_yaml(arguments["extra_llm_api_options"])}
    args = LlmArgs(
        model=str(arguments["model"]),
        served_name=_served_name(str(arguments["model"])),
        host=str(arguments["host"]),
        port=_integer(arguments["port"], 8000),
        tp=_positive(config, "tensor_parallel_size"),
        pp=_positive(config, "pipeline_parallel_size"),
        cp=_positive(config, "context_parallel_size"),
        gpus_per_node=max(1, _integer(config["gpus_per_node"], gpus)),
        max_batch_size=_positive(config, "max_batch_size"),
        max_seq_len=_positive(config, "max_seq_len") if config["max_seq_len"] else None,
        stream_interval=_positive(config, "stream_interval"),
        guided_decoding=config.get("guided_decoding_backend") is not None,
    )
    _check_mapping(args, config)
    if is_proxied(env):
        _check_share(args, gpus)
    else:
        _check_gpus(args.world_size, config["gpus_per_node"], gpus)
        _check_mpi(args.world_size, env)
    return args


def _read_yaml(path: object) -> dict[str, Yaml]:
    if path is None:
        return {}
    try:
        text = Path(str(path)).read_text(encoding="utf-8")
    except OSError as error:
        raise Fatal(type(error).__name__, str(error)) from None
    except UnicodeDecodeError as error:
        raise Fatal("UnicodeDecodeError", str(error)) from None
    try:
        parsed = parse_yaml(text)
    except YamlError as error:
        raise Fatal("yaml.scanner.ScannerError", f'{error}\n  in "{path}"') from None
    if not isinstance(parsed, dict):
        kind = type(parsed).__name__
        raise Fatal("TypeError", f"'{kind}' object is not a mapping: {path}")
    return _checked(parsed)


def _checked(config: dict[str, Yaml]) -> dict[str, Yaml]:
    """Convert as pydantic does and refuse what it refuses, all mistakes at once."""
    converted: dict[str, Yaml] = {}
    mistakes: list[str] = []
    for key, value in config.items():
        try:
            converted[key] = _converted(key, value)
        except Wrong as wrong:
            where = f"[type={wrong.kind}, input_value={value!r}, input_type={type(value).__name__}]"
            mistakes.append(f"{key}\n  {wrong} {where}")
    if mistakes:
        plural = "s" if len(mistakes) > 1 else ""
        headline = f"{len(mistakes)} validation error{plural} for TorchLlmArgs"
        kind = "pydantic_core._pydantic_core.ValidationError"
        raise Fatal(kind, "\n".join([headline, *mistakes]))
    return converted


def _converted(key: str, value: Yaml) -> Yaml:
    if key not in KNOWN:
        raise Wrong("extra_forbidden", "Extra inputs are not permitted")
    if value is None:
        return None
    if key in INTEGERS:
        return integer(value)
    if key in BOOLEANS:
        return boolean(value)
    return _strict_mapping(value, SUB_KEYS[key]) if key in SUB_KEYS else value


def _strict_mapping(value: Yaml, known: set[str]) -> Yaml:
    mapping(value)
    for name in value if isinstance(value, dict) else {}:
        if name not in known:
            raise Wrong("extra_forbidden", f"{name}: Extra inputs are not permitted")
    return value


def _positive(config: Mapping[str, Yaml], key: str) -> int:
    value = _integer(config.get(key), 1)
    if value < 1:
        raise Fatal("ValueError", f"{key} must be greater than 0, but got {value}")
    return value


def _integer(value: Yaml, default: int) -> int:
    return value if isinstance(value, int) else default


def _check_mapping(args: LlmArgs, config: Mapping[str, Yaml]) -> None:
    """Apply the rules of tensorrt_llm.Mapping to the MoE part of the parallelism."""
    cp_type = _cp_type(config.get("cp_config"))
    # Ulysses shards the sequence only; the other kinds lend their GPUs to the experts.
    moe_world = args.tp * (1 if cp_type in (None, "ULYSSES") else args.cp)
    cluster = _integer(config["moe_cluster_parallel_size"], 1)
    moe_tp, moe_ep = _moe_sizes(config, moe_world, cluster)
    if moe_tp * moe_ep * cluster != moe_world:
        raise Fatal(
            "ValueError",
            "moe_tp_size * moe_ep_size * moe_cluster_size must equal to moe_world_size, "
            f"but got {moe_tp} * {moe_ep} * {cluster} != {moe_world}",
        )
    if moe_ep != 1 and cluster > 1:
        raise Fatal("NotImplementedError", "moe_cluster_size > 1 needs moe_ep_size == 1")
    if moe_ep != 1 and args.cp > 1 and cp_type != "HELIX":
        raise Fatal("NotImplementedError", "CP don't support MoE tp/ep yet")


def _moe_sizes(config: Mapping[str, Yaml], moe_world: int, cluster: int) -> tuple[int, int]:
    """Derive the size that is not given from the one that is."""
    moe_tp, moe_ep = config.get("moe_tensor_parallel_size"), config["moe_expert_parallel_size"]
    for value in (moe_tp, moe_ep, cluster):
        if isinstance(value, int) and value < 1:
            raise Fatal("ValueError", f"MoE parallel sizes must be positive, but got {value}")
    if not isinstance(moe_tp, int):
        moe_ep = _integer(moe_ep, 1)
        return moe_world // (moe_ep * cluster), moe_ep
    return moe_tp, _integer(moe_ep, moe_world // (moe_tp * cluster))


def _cp_type(cp_config: Yaml) -> str | None:
    value = cp_config.get("cp_type") if isinstance(cp_config, dict) else None
    if value is None:
        return None
    name = str(value).upper()
    if name not in CP_TYPES:
        raise Fatal("ValueError", f"Invalid cp_type {value!r}, must be one of {CP_TYPES}")
    return name


def _check_share(args: LlmArgs, gpus: int) -> None:
    """Hold this node's share of ranks that exist already against its GPUs."""
    nodes = -(-args.world_size // args.gpus_per_node)
    if gpus < args.world_size // nodes:
        message = f"Only {gpus} GPUs are available, but {args.world_size} are required."
        raise Fatal("RuntimeError", message)


def _check_gpus(world: int, gpus_per_node: Yaml, gpus: int) -> None:
    """Hold this node's share of the ranks against its GPUs: all ranks, unless told otherwise."""
    per_node = min(world, _integer(gpus_per_node, world))
    if world > 1 and gpus < per_node:
        raise Fatal("RuntimeError", f"Only {gpus} GPUs are available, but {world} are required.")
    if world > per_node:
        raise Fatal(
            "mpi4py.MPI.Exception",
            f"MPI_ERR_SPAWN: not enough slots for the {world} ranks that are required: with "
            f"{per_node} a node they need several nodes, and this one was started alone",
        )


def _check_mpi(world: int, env: Mapping[str, str]) -> None:
    """Fail where MPI_Comm_spawn of the ranks would: inside somebody else's MPI or Slurm step."""
    found = sorted(name for name in env if MPI_VARIABLE.match(name))
    if world > 1 and found:
        raise Fatal(
            "mpi4py.MPI.Exception",
            "MPI_ERR_SPAWN: could not spawn processes\n"
            f"[simulator] {world} ranks are started by MPI_Comm_spawn, which does not work in an "
            f"environment prepared for another launcher: {', '.join(found)}",
        )


def _served_name(model: str) -> str:
    """Return the name in /v1/models: a directory's own name, else the repository id."""
    path = Path(model)
    if model and path.is_dir():
        return path.resolve().name if path.name in ("", "..") else path.name
    if not REPO_ID.fullmatch(model) or ".." in model or model.startswith("./"):
        raise Fatal(
            "huggingface_hub.errors.HFValidationError",
            "Repo id must be in the form 'repo_name' or 'namespace/repo_name': "
            f"'{model}'. Use `repo_type` argument if needed.",
        )
    return model
