"""How the benchmark scripts run and end, and where NVIDIA's own programs run.

Those run here, in a container, or in one on the first node of an allocation. The choice is only a
prefix to the command, never a branch.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from common.settings import load_env_files, setting
from common.signals import Stopped, obey
from common.talk import Failure, complain, die, keep_ours, print_plainly, say
from launch import nodes
from launch.nodes import Place, find_place
from launch.slurm import last_words

PYTHON = "python3"  # from PATH, as in the container: it runs NVIDIA's programs
FIND = "import importlib.util as u, sys; sys.exit(u.find_spec('tensorrt_llm') is None)"
NOT_HERE = "run it in salloc or sbatch, or give an image of Docker's; --client builtin needs none"
MAKE_FOLDER = 'mkdir -p "$1"; shift; exec "$@"'  # a --mount needs its source to exist
PASSED_ON = ("HF_", "TRTLLM_", "TLLM_", "OPENAI_API_KEY", "NO_PROXY", "no_proxy")
RESULTS = "results"
WORDS = 1 << 14  # bytes of a program's output that are kept for its last words


def exit_code(work: Callable[[], int]) -> int:
    """Do a script's work; any failure becomes one sentence and an exit code."""
    obey()
    keep_ours()
    print_plainly()
    try:
        return work()
    except Stopped as stopped:
        return 128 + int(stopped.args[0])
    except ModuleNotFoundError as error:
        return complain(Failure(f"the Python package {error.name!r} is missing: run `make setup`, "
                                "then .venv/bin/python instead of python3"))  # fmt: skip
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        return complain(Failure(f"{error}: a limit of processes or memory is reached",
                                "`ulimit -u` shows how many processes and threads a user may have"
                                ))  # fmt: skip
    except (Failure, OSError) as error:
        return complain(error)


def environment() -> dict[str, str]:
    """The environment, which takes precedence over the .env files.

    HOST counts only in .env: conda's compilers and tcsh set it to other things.
    """
    os.environ.pop("HOST", None)
    load_env_files()
    return {name: value for name, value in os.environ.items() if value}


def result_folder(asked: Path | None, resume: bool, results: str, name: str = "") -> Path:
    """Create the folder for results. If it has files that match `results`, --resume is required."""
    if not asked:
        return new_folder(Path(RESULTS) / (name + time.strftime("%Y%m%d-%H%M%S")))
    folder = asked
    if not resume and any(folder.glob(results)):
        die(f"{folder} holds results already", hint="go on with --resume, or name another with -o")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def new_folder(path: Path) -> Path:
    """Create a folder of our own, numbered if another run started in the same second."""
    folder, number = path, 1
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = path.with_name(f"{path.name}-{number}")


def is_installed() -> bool:
    """Is TensorRT-LLM here, without a container?"""
    try:
        return subprocess.run([PYTHON, "-c", FIND], capture_output=True).returncode == 0
    except OSError:
        return False


def node(environ: Mapping[str, str]) -> Place:
    """This machine; inside an allocation its first node, beside the server's own step."""
    place = find_place(environ)
    return replace(place, size=1, srun=(*place.srun, "--relative=0")) if place.slurm else place


def provide_image(asked: str, environ: Mapping[str, str]) -> str:
    """Make sure that the image is there, as run_sbatch.py does, and return its tag."""
    from launch import image, provide, squash

    asked = asked or setting("IMAGE", environ)
    of_pyxis = squash.is_squash(asked) or setting("RUNTIME", environ) == "pyxis"
    find = squash.find_image if of_pyxis else image.find_image
    found = find(asked, Path(environ.get("WORKSPACE") or "."))
    if found.squash and not node(environ).slurm:
        die(f"{asked or found.tag} is for pyxis, which runs in jobs of Slurm's", hint=NOT_HERE)
    if found.tarball or (found.registry and not image_id(found.tag, environ)):
        provide.provide(found, node(environ))
    elif not found.registry:
        find_tag(found.tag, environ)
    return found.tag


def find_tag(tag: str, environ: Mapping[str, str]) -> None:
    """Fail now if a local tag is missing, not once in every run."""
    try:
        nodes.run(inspect(tag, environ))
    except Failure as e:
        die(e.message, hint="`docker images` lists what is there; -i takes a tarball, too")


def name() -> str:
    return f"trtllm-bench-{os.getpid()}"


def prefix(
    tag: str, mounts: Sequence[Path], environ: Mapping[str, str], gpus: str = ""
) -> list[str]:
    """The prefix that runs a command in a container with these mounts; [] without a tag."""
    if not tag:
        return []
    from launch.runtimes.docker import mount_flag
    from launch.squash import is_squash

    cache = environ.get("HF_HOME") or str(Path("~/.cache/huggingface").expanduser())
    names = sorted(n for n in environ if n.startswith(PASSED_ON) and n != "HF_HOME")
    if is_squash(tag):
        return step_of_pyxis(tag, [*map(str, mounts), cache], names, environ, gpus)
    return [
        *node(environ).head,
        "bash", "-c", MAKE_FOLDER, "bench", cache,
        "docker", "run", "--rm", "--init", "--pull=never",
        f"--name={name()}",
        "--net=host", "--ipc=host", "--userns=host",
        *([f"--gpus={gpus}", "--ulimit=memlock=-1", "--ulimit=stack=67108864"] if gpus else []),
        *map(mount_flag, dict.fromkeys([*map(str, mounts), cache])),
        f"--env=HF_HOME={cache}",
        *(f"--env={n}" for n in names),  # names only: anybody can read a command line
        tag,
    ]  # fmt: skip


def step_of_pyxis(
    tag: str, mounts: list[str], names: list[str], environ: Mapping[str, str], gpus: str
) -> list[str]:
    """The same prefix for pyxis: a step of Slurm in a container that ends with it."""
    from launch.runtimes import pyxis

    place, cache = node(environ), mounts[-1]
    pyxis.check_place(place, mounts)
    nodes.run([*place.head, "mkdir", "-p", "--", cache])  # pyxis mounts only what exists
    return [
        *pyxis.hooks(bool(gpus), environ),
        f"HF_HOME={cache}",
        *place.on(1, gpus=place.gpus(0) if gpus else 0),
        *pyxis.contained(tag, list(dict.fromkeys(mounts)), ["HF_HOME", *names], environ),
        "sh", "-c", pyxis.PROVEN, "bench",
    ]  # fmt: skip


@contextmanager
def removed_afterwards(command: Sequence[str], environ: Mapping[str, str]) -> Iterator[None]:
    """Remove our container if the block fails: a killed `docker run` leaves it running."""
    try:
        yield
    except BaseException:
        if "docker" in command:
            remove = [*node(environ).head, "docker", "rm", "--force", name()]
            with suppress(subprocess.TimeoutExpired):  # the first error matters more
                subprocess.run(remove, capture_output=True, timeout=30, check=False)
        raise


def run(
    command: Sequence[str],
    environ: Mapping[str, str],
    hint: str = "",
    timeout: float | None = None,
    stdout: IO[bytes] | None = None,
) -> tuple[int, str]:
    """Show and run a command, its output on stderr; returns its exit status and last words.

    With `stdout`, its output goes there and its last words come from stderr only.
    """
    say(f"$ {shlex.join(command)}")  # its output follows
    program = "docker" if "docker" in command and command[0] == "bash" else command[0]
    if not shutil.which(program):
        die(f"{program}: not found in PATH", hint=hint)
    words = bytearray()
    with removed_afterwards(command, environ):
        source, sink = os.pipe()
        copier = threading.Thread(target=copy, args=(source, words), daemon=True)
        copier.start()
        try:
            env = {**os.environ, **environ}
            status = subprocess.run(
                command, stdout=stdout or sink, stderr=sink, env=env, timeout=timeout
            ).returncode
        finally:
            os.close(sink)
        copier.join(1)  # a child of the program may hold the pipe for longer
    return status, last_words(words.decode(errors="replace"))


def copy(source: int, words: bytearray) -> None:
    """Copy a pipe to stderr, keeping the last WORDS bytes in `words`."""
    with open(source, "rb", buffering=0) as pipe:
        while piece := pipe.read(WORDS):
            with suppress(OSError, ValueError):  # nobody reads stderr any more: the program goes on
                sys.stderr.buffer.write(piece)
                sys.stderr.flush()
            words += piece
            del words[:-WORDS]


def inspect(tag: str, environ: Mapping[str, str]) -> list[str]:
    return [*node(environ).head, "docker", "image", "inspect", "--format={{.Id}}", tag]


def image_id(tag: str, environ: Mapping[str, str]) -> str | None:
    if not tag:
        return None
    from launch import squash

    if squash.is_squash(tag):  # a file, with its sum in its sidecar
        return squash.read_squash(Path(tag)).sha256 or None
    return output(inspect(tag, environ))


def gpu_names(environ: Mapping[str, str]) -> list[str]:
    """GPU names on the first node of the environment's allocation; without one, on this machine."""
    ask = [*node(environ).head, "nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return (output(ask) or "").splitlines()


def output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
