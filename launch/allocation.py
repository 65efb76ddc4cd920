"""On a login node without an allocation: the commands that get one, in full, ready to paste."""

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

BELOW = "\n" + " " * 13  # each command has a line of its own, to be pasted
USUAL = 8  # GPUs of a node, if Slurm does not say
Servers = Sequence[tuple[int, int]]  # how many of a kind, and how many GPUs each of them needs


def refuse_login_node(servers: Servers) -> None:
    """Failure on a machine with Slurm but without an allocation, which these servers need."""
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
    """The settings that `make` put into the environment: another shell does not have them."""
    if not environ.get("MAKELEVEL"):
        return []
    names = [s.name for s in SETTINGS if not SECRETS.search(s.name)]
    more = [f"{n}={environ[n]}" for n in names if environ.get(n) and environ[n] not in sys.argv]
    return ["env", *more] if more else []


def ask_sinfo() -> str:
    """A line for each partition, with its nodes' GPUs; '' if sinfo does not answer."""
    command = ["sinfo", "--noheader", "--format=%P %G"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def kind_of_node(sinfo: str) -> tuple[int, str]:
    """A node's GPUs (0: Slurm names none), and its partition: the default one if that has GPUs."""
    found = [(gpus(line), line.split(" ")[0]) for line in sinfo.splitlines()]
    have = [(count, name) for count, name in found if count]
    usual = [(count, name) for count, name in have if name.endswith("*")]
    return max(usual or have or [(0 if found else USUAL, "*")])


def flags(servers: Servers, count: int, name: str) -> Sequence[str]:
    """What to ask Slurm for: whole nodes of that partition, with `count` GPUs each."""
    other = [] if name.endswith("*") else ["-p", name]
    each = [f"--gpus-per-node={count}"] if count else []
    return [*other, "-N", str(nodes(servers, count)), *each, "--exclusive"]


def nodes(servers: Servers, count: int) -> int:
    """How many nodes the servers need: a large one takes several, small ones share one."""
    if not count:
        return 1
    large = sum(number * -(-size // count) for number, size in servers if size > count)
    small = [(number, size) for number, size in servers if size <= count]
    # No server may lie half on one node and half on the next.
    alone = (-(-number // (count // size)) for number, size in small)
    together = -(-sum(number * size for number, size in small) // count)
    return large + max(together, *alone, 0)


def uneven(servers: Servers, count: int) -> str:
    """Says that a server cannot fill such nodes evenly, however many there are; else ''."""
    for _, size in servers:
        if count and size > count and size % count:
            return f"; {size} GPUs do not fill nodes of {count} GPUs evenly"
    return ""


def gpus(line: str) -> int:
    """The number of GPUs in `gpu:8` or `gpu:h100:8(S:0-1)`."""
    return sum(map(int, re.findall(r"\bgpu(?::[^:,( ]+)?:(\d+)", line)))
