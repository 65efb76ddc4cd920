#!/usr/bin/env python3
# fmt: off
#SBATCH --job-name=trtllm-serve
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# fmt: on
"""Serve a model with TensorRT-LLM, vLLM or SGLang: on this machine, in a Slurm
allocation, or as a batch job.

The image is put on every node. The server starts on the first node, or on
several if it needs their GPUs. Its log is shown until you stop it (^C,
scancel); then nothing of it is left.

Examples:
    python run_sbatch.py Qwen/Qwen2.5-7B-Instruct
    salloc -N 1 --gpus-per-node=8 --exclusive python run_sbatch.py \\
        Qwen/Qwen2.5-14B-Instruct --tp_size 8
    sbatch run_sbatch.py --image /fsx/tensorrt-llm-serve-latest.tar.gz \\
        --restart 3 nvidia/Qwen3-8B-FP8

Options that are not listed below are passed on to the engine; `--` ends our
own. More settings, such as PORT and TP, are in env.example.
"""

# The cluster's own python3, perhaps 3.6, may read this file first: keep to its syntax.
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the imports are done, ^C just ends us

import gc
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path


def become_the_original() -> None:
    """Become the original of this file: sbatch runs a copy, far from its packages.

    Slurm knows where the original is: `Command=` and `WorkDir=` of `scontrol show job`. The .venv
    beside it, if there is one, has the packages that the launcher imports.
    """
    mine = Path(__file__).resolve().parent
    here = mine if (mine / "launch").is_dir() else original_directory()
    python = here / ".venv/bin/python"
    script = str(here / "run_sbatch.py")
    if here != mine or needs_venv(python):
        command = [str(python) if python.exists() else sys.executable, script, *sys.argv[1:]]
        os.environ["TENSORRT_LLM_SERVE_ORIGINAL"] = script  # so that this happens only once
        os.execv(command[0], command)


def original_directory() -> Path:
    job = os.environ.get("SLURM_JOB_ID", "")
    try:
        ask = ["scontrol", "show", "job", job]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        here = {name: value for name, value in os.environ.items() if name != "SLURM_CLUSTERS"}
        show = os.fsdecode(subprocess.run(ask, stdout=pipe, stderr=null, env=here).stdout)
    except OSError:
        show = ""
    fields = dict(line.strip().partition("=")[::2] for line in show.splitlines())
    command, workdir = fields.get("Command", ""), fields.get("WorkDir", "")
    command = command.replace("(null)", "run_sbatch.py")  # sbatch has read it from its input
    # Command= includes the arguments. A path may hold spaces, too, so every prefix is tried.
    for path in accumulate(command.split(" "), "{} {}".format):
        script = Path(workdir, path).resolve()
        if script.is_file() and (script.parent / "launch").is_dir():
            return script.parent
    raise SystemExit(
        f"run_sbatch.py: the folder launch/ is not beside it, nor beside {command or '(unknown)'}"
        f" which job {job or '(none)'} was submitted as: submit it by its path, which the node has"
        " to see"
    )


def needs_venv(python: Path) -> bool:
    known = "TENSORRT_LLM_SERVE_ORIGINAL" in os.environ
    return bool(not known and missing() and python.exists())


def missing() -> str:
    if sys.version_info < (3, 10):  # noqa: UP036
        return "Python 3.10 or newer"
    packages = (name for name in ("sh", "dotenv", "yaml") if not find_spec(name))
    return next((f"the Python package {name!r}" for name in packages), "")


def advice() -> str:
    python = Path(__file__).resolve().parent / ".venv/bin/python"
    if not python.is_symlink() or python.exists():
        return "run `make setup`, then .venv/bin/python run_sbatch.py"
    lacks = f"{python} leads to {os.path.realpath(str(python))}, which this machine does not have"
    return f"{lacks}: install it here, or `make clean setup PYTHON=` one that all machines have"


if __name__ == "__main__":
    become_the_original()
    if missing():
        raise SystemExit(f"run_sbatch.py: {missing()} is missing: {advice()}")
    gc.disable()  # until the imports are done, of which nothing is garbage
    from launch.main import main

    gc.freeze()
    gc.enable()
    raise SystemExit(main(description=__doc__))
