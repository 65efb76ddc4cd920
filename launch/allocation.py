"""On a login node, outside any allocation: the commands that get one, in full, ready to paste."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

from common.settings import SECRETS, SETTINGS
from common.talk import die

BELOW = "\n" + " " * 13  # a line of its own, which no terminal folds
USUAL = 8  # GPUs of a node, where Slurm does not say
Servers = Sequence[tuple[int, int]]  # how many of a kind, and how many GPUs each of them needs


def refuse_login_node(servers: Servers) -> None:
    """Failure where there is a Slurm but no allocation, which these servers need."""
    if not (shutil.which("sinfo") or shutil.which("squeue")):
        return
    here, (count, name) = socket.gethostname().partition(".")[0], kind_of_node(ask_sinfo())
    asked = flags(servers, count, name)
    before = given(os.environ)
    by_hand = shlex.join([*before, "salloc", *asked, *sys.orig_argv])
    as_job = shlex.join([*before, "sbatch", *asked, *sys.argv])
    what = f"{here} is not in a Slurm allocation, and has no GPU of its own{uneven(servers, count)}"
    die(what, hint=f"get nodes and serve on them, or submit a job:{BELOW}{by_hand}{BELOW}{as_job}")


def given(environ: Mapping[str, str]) -> list[str]:
    """What `make` has put into the environment: a shell that the command is pasted in lacks it."""
    if not environ.get("MAKELEVEL"):
        return []
    names = [s.name for s in SETTINGS if not SECRETS.search(s.name)]
    more = [f"{n}={environ[n]}" for n in names if environ.get(n) and environ[n] not in sys.argv]
    return ["env", *more] if more else []


def ask_sinfo() -> str:
    """A line a partition, with the GPUs of its nodes; '' where it does not answer."""
    command = ["sinfo", "--noheader", "--format=%P %G"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def kind_of_node(sinfo: str) -> tuple[int, str]:
    """A node's GPUs (0: Slurm names none) and its partition: the default one where it has GPUs."""
    found = [(gpus(line), line.split(" ")[0]) for line in sinfo.splitlines()]
    have = [(count, name) for count, name in found if count]
    usual = [(count, name) for count, name in have if name.endswith("*")]
    return max(usual or have or [(0 if found else USUAL, "*")])


def flags(servers: Servers, count: int, name: str) -> Sequence[str]:
    """What to ask Slurm for: whole nodes with so many GPUs each, of that partition."""
    other = [] if name.endswith("*") else ["-p", name]
    each = [f"--gpus-per-node={count}"] if count else []
    return [*other, "-N", str(nodes(servers, count)), *each, "--exclusive"]


def nodes(servers: Servers, count: int) -> int:
    """How many nodes they need: several nodes each, or several on a node."""
    if not count:
        return 1
    large = sum(number * -(-size // count) for number, size in servers if size > count)
    small = [(number, size) for number, size in servers if size <= count]
    # No server lies half on one node and half on the next.
    alone = (-(-number // (count // size)) for number, size in small)
    together = -(-sum(number * size for number, size in small) // count)
    return large + max(together, *alone, 0)


def uneven(servers: Servers, count: int) -> str:
    """That a server will not have its GPUs, on however many such nodes; ''."""
    for _, size in servers:
        if count and size > count and size % count:
            return f"; {size} GPUs do not fill nodes of {count} GPUs evenly"
    return ""


def gpus(line: str) -> int:
    """`gpu:8`, `gpu:h100:8(S:0-1)`: how many."""
    return sum(map(int, re.findall(r"\bgpu(?::[^:,( ]+)?:(\d+)", line)))
