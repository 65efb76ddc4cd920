"""Where NVIDIA's own benchmark programs run: here, in a container, or in one on the first node.

The place is a prefix to put before a command, never a branch.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from console import die, say

DEFAULT_IMAGE = "tensorrt-llm-serve:latest"
PASSED_ON = ("HF_", "TRTLLM_", "TLLM_", "OPENAI_API_KEY")


def is_installed(environ: Mapping[str, str] = os.environ) -> bool:
    """Is TensorRT-LLM here, without a container?"""
    return importlib.util.find_spec("tensorrt_llm") is not None


def node(environ: Mapping[str, str]) -> list[str]:
    """Nothing here; inside an allocation its first node, beside the server's own step."""
    if not environ.get("SLURM_JOB_ID"):
        return []
    return [
        "srun", "--overlap", "--export=ALL", "--mpi=none", "--cpu-bind=none",
        "--nodes=1", "--ntasks=1", "--relative=0",
    ]  # fmt: skip


def name() -> str:
    return f"trtllm-bench-{os.getpid()}"


def prefix(
    image: str, mounts: Sequence[Path], environ: Mapping[str, str], gpus: str = ""
) -> list[str]:
    """Puts a command into a container that sees the mounts; [] where TensorRT-LLM is installed."""
    if not image and is_installed():
        return []
    cache = environ.get("HF_HOME") or str(Path("~/.cache/huggingface").expanduser())
    paths = dict.fromkeys([*map(str, mounts), cache])
    names = sorted(n for n in environ if n.startswith(PASSED_ON) and n != "HF_HOME")
    return [
        *node(environ),
        "docker", "run", "--rm", "--init",
        f"--name={name()}",
        "--net=host", "--ipc=host",
        *([f"--gpus={gpus}", "--ulimit=memlock=-1", "--ulimit=stack=67108864"] if gpus else []),
        *(f"--volume={path}:{path}" for path in paths),
        f"--env=HF_HOME={cache}",
        *(f"--env={n}" for n in names),  # names only: an argv is there for all to read
        image or DEFAULT_IMAGE,
    ]  # fmt: skip


@contextmanager
def removed_afterwards(command: Sequence[str], environ: Mapping[str, str]) -> Iterator[None]:
    """However this ends, no container of ours stays: a killed `docker run` leaves it running."""
    try:
        yield
    except BaseException:
        if "docker" in command:
            remove = [*node(environ), "docker", "rm", "--force", name()]
            subprocess.run(remove, capture_output=True, timeout=30, check=False)
        raise


def run(command: Sequence[str], environ: Mapping[str, str], hint: str = "") -> int:
    """Show a command and run it, its output on stderr; its exit status."""
    say(f"$ {shlex.join(command)}")
    if not shutil.which(command[0]):
        die(f"{command[0]}: not found in PATH", hint=hint)
    with removed_afterwards(command, environ):
        return subprocess.run(command, stdout=sys.stderr, env={**os.environ, **environ}).returncode


def image_id(image: str, environ: Mapping[str, str]) -> str | None:
    if not image:
        return None
    ask = [*node(environ), "docker", "image", "inspect", "--format={{.Id}}", image]
    return output(ask)


def gpu_names(environ: Mapping[str, str]) -> list[str]:
    """Of this machine or the allocation's first node; a server elsewhere keeps its own secret."""
    ask = [*node(environ), "nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return (output(ask) or "").splitlines()


def output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
