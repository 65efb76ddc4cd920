"""Where NVIDIA's own benchmark programs run: here, in a container, or in one on the first node.

The place is a prefix to put before a command, never a branch.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

import image
from container import mount_flag
from nodes import Place, die, find_place, say

MAKE_FOLDER = 'mkdir -p "$1"; shift; exec "$@"'  # a --mount wants its source to be there
PASSED_ON = ("HF_", "TRTLLM_", "TLLM_", "OPENAI_API_KEY")


def on_signal(signum: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def end_on_signals() -> None:
    """TERM and HUP end as ^C does: what is finished is kept, no container stays."""
    for each in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(each, on_signal)


def is_installed() -> bool:
    """Is TensorRT-LLM here, without a container?"""
    return importlib.util.find_spec("tensorrt_llm") is not None


def node(environ: Mapping[str, str]) -> Place:
    """This machine; inside an allocation its first node, beside the server's own step."""
    place = find_place(environ)
    return replace(place, size=1, srun=(*place.srun, "--relative=0")) if place.slurm else place


def provide_image(asked: str, environ: Mapping[str, str]) -> str:
    """Bring the image there if it is not, as run_sbatch.py does; its tag."""
    found = image.find_image(asked, Path(environ.get("WORKSPACE") or "."))
    if found.tarball or (found.registry and not image_id(found.tag, environ)):
        image.provide(found, node(environ))
    return found.tag


def name() -> str:
    return f"trtllm-bench-{os.getpid()}"


def prefix(
    tag: str, mounts: Sequence[Path], environ: Mapping[str, str], gpus: str = ""
) -> list[str]:
    """Puts a command into a container that sees the mounts; [] for no tag: it runs as it is."""
    if not tag:
        return []
    cache = environ.get("HF_HOME") or str(Path("~/.cache/huggingface").expanduser())
    names = sorted(n for n in environ if n.startswith(PASSED_ON) and n != "HF_HOME")
    return [
        *node(environ).head,
        "bash", "-c", MAKE_FOLDER, "bench", cache,
        "docker", "run", "--rm", "--init", "--pull=never",
        f"--name={name()}",
        "--net=host", "--ipc=host",
        *([f"--gpus={gpus}", "--ulimit=memlock=-1", "--ulimit=stack=67108864"] if gpus else []),
        *map(mount_flag, dict.fromkeys([*map(str, mounts), cache])),
        f"--env=HF_HOME={cache}",
        *(f"--env={n}" for n in names),  # names only: an argv is there for all to read
        tag,
    ]  # fmt: skip


@contextmanager
def removed_afterwards(command: Sequence[str], environ: Mapping[str, str]) -> Iterator[None]:
    """However this ends, no container of ours stays: a killed `docker run` leaves it running."""
    try:
        yield
    except BaseException:
        if "docker" in command:
            remove = [*node(environ).head, "docker", "rm", "--force", name()]
            with suppress(subprocess.TimeoutExpired):  # what happened is worth more
                subprocess.run(remove, capture_output=True, timeout=30, check=False)
        raise


def run(
    command: Sequence[str],
    environ: Mapping[str, str],
    hint: str = "",
    timeout: float | None = None,
) -> int:
    """Show a command and run it, its output on stderr; its exit status."""
    say(f"$ {shlex.join(command)}")
    program = "docker" if "docker" in command and command[0] == "bash" else command[0]
    if not shutil.which(program):
        die(f"{program}: not found in PATH", hint=hint)
    with removed_afterwards(command, environ):
        return subprocess.run(
            command, stdout=sys.stderr, env={**os.environ, **environ}, timeout=timeout
        ).returncode


def image_id(tag: str, environ: Mapping[str, str]) -> str | None:
    if not tag:
        return None
    ask = [*node(environ).head, "docker", "image", "inspect", "--format={{.Id}}", tag]
    return output(ask)


def gpu_names(environ: Mapping[str, str]) -> list[str]:
    """Of this machine or the allocation's first node; a server elsewhere keeps its own secret."""
    ask = [*node(environ).head, "nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return (output(ask) or "").splitlines()


def output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
