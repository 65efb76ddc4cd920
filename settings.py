"""The one list of settings: flag > environment > .env > default. env.example shows it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """A variable, its default, and a line of what it is for."""

    name: str
    default: str
    help: str


SETTINGS = (
    Setting("MODEL", "Qwen/Qwen2.5-7B-Instruct", "model to serve: Hugging Face id or path"),
    Setting("IMAGE", "", "tarball, local tag or registry reference (default: see README)"),
    Setting("WORKSPACE", "", "where the default image and logs/ are (default: current directory)"),
    Setting("CONTAINER_MOUNT", "/fsx", "host directory that the containers see, too"),
    Setting("RUNTIME", "docker", "docker, or bare: trtllm-serve from the node's PATH"),
    Setting("READY_TIMEOUT", "3600", "seconds until a server that is not ready has failed"),
    Setting("RESTART", "0", "how often a server that failed is started anew"),
    Setting("PROBE_SECONDS", "60", "pause between two one-token probes of the server; 0: none"),
    Setting("PORT", "8000", "port of the server"),
    Setting("GPUS", "auto", "auto: what Slurm gave, else all; none; or docker's --gpus words"),
    Setting("MPI", "auto", "PMIx of several nodes, as srun --mpi=list has it: pmix, pmix_v4"),
    Setting("TRTLLM_VERSION", "1.1.0", "the image's; decides which options are known"),
    Setting("PRIVILEGED", "0", "1: docker run --privileged"),
    Setting("HF_HOME", "", "Hugging Face cache, seen by the containers (~/.cache/huggingface)"),
    Setting("HF_TOKEN", "", "Hugging Face token for gated models; never printed"),
    Setting("HOST", "localhost", "server to test and benchmark; counts in .env only"),
    Setting("OPENAI_API_KEY", "", "bearer token for that server; never printed"),
    Setting("BENCH_TYPE", "all", "what bench.py measures: throughput,prefill,... or sweep"),
    Setting("BENCH_IMAGE", "", "image with NVIDIA's benchmark client"),
    Setting("SHAREGPT_PATH", "ShareGPT.json", "the data set; downloaded there when missing"),
)

# Set in the environment, these reach the engine: NCCL_DEBUG, FI_PROVIDER, TRTLLM_..., and so on.
PASSED_ON = ("NCCL_", "FI_", "HF_", "TRTLLM_", "TLLM_", "UCX_")


def load_env_files() -> list[str]:
    """Read .env of the current directory, then beside the scripts; returns the names they set.

    By explicit path: under sbatch the script that runs is a copy in a spool directory.
    """
    from dotenv import dotenv_values

    before = {name for name, value in os.environ.items() if value}
    for directory in dict.fromkeys((Path.cwd(), Path(__file__).resolve().parent)):
        try:
            found = dotenv_values(directory / ".env")
        except (OSError, ValueError) as error:
            raise SystemExit(f"cannot read {directory / '.env'}: {error}") from None
        os.environ.update({n: v for n, v in found.items() if v and not os.environ.get(n)})
    return sorted(set(os.environ) - before)


def setting(name: str, environ: Mapping[str, str] | None = None) -> str:
    """A setting's value below its flag. An empty variable counts as not set."""
    environ = os.environ if environ is None else environ
    default = next(s.default for s in SETTINGS if s.name == name)
    return environ.get(name) or default
