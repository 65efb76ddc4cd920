"""The command line of `trtllm-serve` 1.1.0 and 1.2.1, made with click like the real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

# The other two exist in the real one but are not simulated.
COMMANDS = ("disaggregated", "disaggregated_mpi_worker", "mm_embedding_serve", "serve")


class Backend(click.Choice[str]):
    def convert(self, value: Any, *rest: Any) -> str:  # noqa: ANN401 (click's own signature)
        return super().convert("tensorrt" if value == "trt" else value, *rest)


TEXT, NUMBER, FLAG = {"type": str}, {"type": int}, {"is_flag": True, "default": False}
LEVELS = click.Choice("internal_error error warning info verbose debug trace".split())
DIRECTORY = click.Path(exists=True, file_okay=False, readable=True)
TOOL_PARSERS = click.Choice(
    "qwen3 qwen3_coder kimi_k2 deepseek_v3 deepseek_v31 deepseek_v32".split()
)
OPTIONS: dict[str, dict[str, Any]] = {  # 1.1.0 knows only the last name of each
    "--tokenizer": TEXT,
    "--host": {"default": "localhost"},
    "--port": {"default": 8000},
    "--backend": {"type": Backend("pytorch tensorrt _autodeploy".split()), "default": "pytorch"},
    "--log_level": {"type": LEVELS, "default": "info"},
    "--max_beam_width": {"default": 1},
    "--max_batch_size": {"default": 2048},
    "--max_num_tokens": {"default": 8192},
    "--max_seq_len": NUMBER,
    "--tensor_parallel_size --tp_size": {"default": 1},
    "--pipeline_parallel_size --pp_size": {"default": 1},
    "--moe_expert_parallel_size --ep_size": NUMBER,
    "--moe_cluster_parallel_size --cluster_size": NUMBER,
    "--gpus_per_node": NUMBER,
    "--free_gpu_memory_fraction --kv_cache_free_gpu_memory_fraction": {"default": 0.9},
    "--num_postprocess_workers": {"default": 0},
    "--trust_remote_code": FLAG,
    "--config --extra_llm_api_options": TEXT,
    "--reasoning_parser": {"type": click.Choice(["deepseek-r1"])},
    "--metadata_server_config_file": TEXT,
    "--server_role": TEXT,
    "--fail_fast_on_attention_window_too_large": FLAG,
}
NEW_OPTIONS: dict[str, dict[str, Any]] = {  # new in 1.2.1, which has all of 1.1.0's, too
    "--context_parallel_size --cp_size": {"default": 1},
    "--reasoning_parser": {"type": click.Choice(["deepseek-r1", "qwen3", "nano-v3"])},
    "--tool_parser": {"type": TOOL_PARSERS},
    "--custom_tokenizer": TEXT,
    "--custom_module_dirs": {"type": DIRECTORY, "multiple": True},
    "--revision": TEXT,
    "--enable_chunked_prefill": FLAG,
    "--media_io_kwargs": TEXT,
    "--chat_template": TEXT,
    "--otlp_traces_endpoint": TEXT,
    "--disagg_cluster_uri": TEXT,
}
DISAGGREGATED: list[click.Parameter] = [
    click.Option(["-c", "--config_file"], type=str),
    click.Option(["-m", "--metadata_server_config_file"], type=str),
    click.Option(["-t", "--server_start_timeout"], default=180),
    click.Option(["-r", "--request_timeout"], default=180),
    click.Option(["-l", "--log_level"], type=LEVELS, default="info"),
    click.Option(["--metrics-log-interval"], default=0),
]


class DefaultGroup(click.Group):
    """A first word that is no command is the model for `serve`."""

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
    """Return the program: `serve` gets MODEL and the options by their newer names without dashes,
    which are also the YAML's."""
    old = version == "1.1.0"
    params: list[click.Parameter] = [click.Argument(["model"])]
    for declared, how in (OPTIONS if old else OPTIONS | NEW_OPTIONS).items():
        names = declared.split()
        params.append(click.Option([names[0][2:], *names[-1 if old else 0 :]], **how))
    command = click.Command("serve", params=params, callback=serve)
    other = click.Command("disaggregated", params=DISAGGREGATED, callback=disaggregated)
    return DefaultGroup("trtllm-serve", commands={"serve": command, "disaggregated": other})
