"""What Slurm says of steps, of jobs and of nodes."""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterable

from launch.order import TOO_OLD

SEE_NODES = "ask Slurm why: `sinfo -R`, `squeue`; leave a node out with salloc --exclude"

# The end of a step by Slurm: *** STEP 5.1 ON n1 CANCELLED AT 2025-11-24T08:14:52 DUE TO ... ***
CANCELLED = re.compile(r"CANCELLED AT \S+( DUE TO ([A-Z ]+[A-Z]))?")
CANCEL_WORDS = {
    "TIME LIMIT": "has reached its time limit",
    "NODE FAILURE": "has lost a node",
    "PREEMPTION": "was preempted",
}
EXITED = re.compile(r"^srun: error: (\S+): tasks? [\d,-]+: Exited with exit code (\d+)", re.M)


def last_words(text: str, lines: int = 1) -> str:
    """The last lines that say something; Slurm's and Docker's own postscripts do not."""
    noise = ("srun: ", "slurmstepd: ", "See 'docker", "Run 'docker", "salloc: ")
    remark = "srun: cluster configuration lacks support for cpu binding"  # never why
    said = [s.strip() for s in text.splitlines() if s.strip() and not s.startswith(remark)]
    own = [s for s in said if not s.startswith(noise)]
    errors = [s for s in said if "error:" in s]
    return " / ".join((own or errors or said)[-lines:])


def lost_nodes(text: str) -> str:
    """Which nodes Slurm cannot reach, by what srun says; '' where it reaches all."""
    if failed := re.findall(r"Task launch for \S+ failed on node (\S+): (.+)", text):
        return by_node((node, f"Slurm cannot start anything there: {why}") for node, why in failed)
    lost = re.findall(r"Node failure on (\S+)", text)
    return by_node((node, "Slurm has lost this node") for node in lost)


def slurms_word(text: str, meanwhile: str = "") -> str:
    """What Slurm says of a step that it could not start, or ended; '' where it did neither.

    `meanwhile` is what was going on: ` while the image was being loaded`.
    """
    if cancelled := CANCELLED.search(text):
        how = how_cancelled(cancelled)
    else:
        how = "was cancelled, or is out of time" if "Job step aborted" in text else ""
    if lost := lost_nodes(text):
        return lost + meanwhile
    return f"Slurm ended the job{meanwhile}: it {how}" if how else ""


def how_cancelled(found: re.Match[str]) -> str:
    return CANCEL_WORDS.get(found[2], "was cancelled")


def by_node(what: Iterable[tuple[str, str]]) -> str:
    """`n1, n2: the same; n3: another`: one sentence for all nodes that say it."""
    nodes: dict[str, list[str]] = {}
    for node, text in what:
        nodes.setdefault(text, []).append(node)
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in nodes.items())


def without_python(text: str) -> str:
    """Which nodes cannot run an order, by what srun says; '' where that is not why it failed."""
    said = [(node, int(code)) for node, code in EXITED.findall(text)]
    missing = "execve(): python3: No such file or directory" in text
    old = [(node, "its python3 is older than 3.9") for node, code in said if code == TOO_OLD]
    none = [(node, "there is no python3") for node, code in said if code == 2 and missing]
    return by_node([*none, *old])


def unfiltered() -> dict[str, str]:
    """Our environment for squeue: a filter in it must not make a job look ended."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}


def squeue(*what: str) -> subprocess.CompletedProcess[str] | None:
    """squeue's answer; None where it cannot be asked, or gives none within 10 s."""
    command, env = ["squeue", "--all", "--noheader", *what], unfiltered()
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=10)
    return None
