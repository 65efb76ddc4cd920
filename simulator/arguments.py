"""The command line of `trtllm-serve` 1.1.0 and 1.2.1, for click, which parses the real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

# The other two exist in the real one but are not simulated.
COMMANDS = ("disaggregated", "disaggregated_mpi_worker", "mm_embedding_serve", "serve")
LEVELS = ("internal_error", "error", "warning", "info", "verbose", "debug", "trace")
KINDS = {"integer": int, "float": float, "text": str, "flag": bool}


class Backend(click.Choice[str]):
    def convert(self, value: Any, *rest: Any) -> str:  # noqa: ANN401 (click's own signature)
        return super().convert("tensorrt" if value == "trt" else value, *rest)


def Option(kind: str | click.Choice[str], default: object = None) -> dict[str, Any]:
    """Return what click wants to know of an option."""
    if kind == "flag":
        return {"is_flag": True, "default": False}
    return {"type": KINDS[kind] if isinstance(kind, str) else kind, "default": default}


OPTIONS = {
    "--tokenizer": Option("text"),
    "--host": Option("text", "localhost"),
    "--port": Option("integer", 8000),
    "--backend": Option(Backend(["pytorch", "tensorrt", "_autodeploy"]), "pytorch"),
    "--log_level": Option(click.Choice(LEVELS), "info"),
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
    "--trust_remote_code": Option("flag"),
    "--extra_llm_api_options": Option("text"),
    "--reasoning_parser": Option(click.Choice(["deepseek-r1"])),
    "--metadata_server_config_file": Option("text"),
    "--server_role": Option("text"),
    "--fail_fast_on_attention_window_too_large": Option("flag"),
}
NEW_OPTIONS = {  # of 1.2.1, in which nothing of 1.1.0 is missing
    "--cp_size": Option("integer", 1),
    "--reasoning_parser": Option(click.Choice(["deepseek-r1", "qwen3", "nano-v3"])),
    "--tool_parser": Option(
        click.Choice("qwen3 qwen3_coder kimi_k2 deepseek_v3 deepseek_v31 deepseek_v32".split())
    ),
    "--custom_tokenizer": Option("text"),
    "--custom_module_dirs": {
        "type": click.Path(exists=True, file_okay=False, readable=True),
        "multiple": True,
    },
    "--revision": Option("text"),
    "--enable_chunked_prefill": Option("flag"),
    "--media_io_kwargs": Option("text"),
    "--chat_template": Option("text"),
    "--otlp_traces_endpoint": Option("text"),
    "--disagg_cluster_uri": Option("text"),
}
NEW_NAMES = {  # of 1.2.1, for options that keep their old one
    "--tp_size": "--tensor_parallel_size",
    "--pp_size": "--pipeline_parallel_size",
    "--cp_size": "--context_parallel_size",
    "--ep_size": "--moe_expert_parallel_size",
    "--cluster_size": "--moe_cluster_parallel_size",
    "--kv_cache_free_gpu_memory_fraction": "--free_gpu_memory_fraction",
    "--extra_llm_api_options": "--config",
}


DISAGGREGATED = {
    ("-c", "--config_file"): Option("text"),
    ("-m", "--metadata_server_config_file"): Option("text"),
    ("-t", "--server_start_timeout"): Option("integer", 180),
    ("-r", "--request_timeout"): Option("integer", 180),
    ("-l", "--log_level"): Option(click.Choice(LEVELS), "info"),
    ("--metrics-log-interval",): Option("integer", 0),
}


class DefaultGroup(click.Group):
    """What is no command is the model of `serve`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args[0] in COMMANDS else "serve"
        if name not in self.commands:
            ctx.fail(f"the simulator has no '{name}'")
        return name, self.commands[name], args[1:] if args[0] == name else args


def command_line(
    serve: Callable[..., object], disaggregated: Callable[..., object], version: str
) -> click.Group:
    """Return the program: `serve` gets MODEL and the options by their older names, undashed."""
    new = version != "1.1.0"
    params: list[click.Parameter] = [click.Argument(["model"])]
    for name, how in (OPTIONS | (NEW_OPTIONS if new else {})).items():
        names = [NEW_NAMES[name], name] if new and name in NEW_NAMES else [name]
        params.append(click.Option([name[2:], *names], **how))
    command = click.Command("serve", params=params, callback=serve)
    others: list[click.Parameter] = [click.Option(n, **how) for n, how in DISAGGREGATED.items()]
    other = click.Command("disaggregated", params=others, callback=disaggregated)
    return DefaultGroup("trtllm-serve", commands={"serve": command, "disaggregated": other})
