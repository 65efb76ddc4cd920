"""What Slurm says about steps, jobs and nodes."""

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from launch.node.base import unfiltered
from launch.order import TOO_OLD

SEE_NODES = "ask Slurm why: `sinfo -R`, `squeue`; leave a node out with salloc --exclude"

TIMED_OUT = "Socket timed out on send/recv operation"  # a Prolog takes longer than MessageTimeout
# Slurm ends a step with: *** STEP 5.1 ON n1 CANCELLED AT 2025-11-24T08:14:52 DUE TO ... ***
# A step that was about to start on a node when its job ended leaves only REVOKED there.
REVOKED = "Job credential revoked"
CANCELLED = re.compile(
    rf"CANCELLED AT \S+( DUE TO ([A-Z ]+[A-Z]))?|{REVOKED}(?![\s\S]*CANCELLED AT)"
)
CANCEL_WORDS = {
    "TIME LIMIT": "has reached its time limit",
    "NODE FAILURE": "has lost a node",
    "PREEMPTION": "was preempted",
}
# An entry of a list such as gpu:a100:2(IDX:0-1),gpu:1g.5gb:1(IDX:4): the count, and the indices.
GPUS = re.compile(r"(?:^|,)gpu(?::[^:(),]+)??:(\d+)(?:\(([^)]*)\))?(?=,|$)")
EXITED = re.compile(r"^srun: error: (\S+): tasks? [\d,-]+: Exited with exit code (\d+)", re.M)


@dataclass(frozen=True)
class Share:
    """The job's share of a node's GPUs, if Slurm hands them out."""

    of: int  # how many Slurm hands out there; 0: it does not say
    count: int
    ids: str  # 0,1,2; fewer than `count` if Slurm does not say which

    @property
    def each(self) -> list[str]:
        return [gpu for gpu in self.ids.split(",") if gpu]

    @property
    def is_whole(self) -> bool:
        return 0 < self.of <= self.count


@dataclass(frozen=True)
class Allocation:
    """What Slurm says of a job."""

    name: str = ""  # as squeue shows it: 41_3, as 41 is a whole array, too; 41+1
    restarts: int = 0
    nodes: tuple[str, ...] = ()
    shares: Mapping[str, Share] = field(default_factory=dict)  # of nodes whose GPUs Slurm hands out
    component: tuple[str, str] | None = None  # of a heterogeneous job: its first job, and which


NONE = Allocation()


def record_of(job: str, text: str) -> str:
    """The job's own record: `scontrol show job` prints several for an array or a het job."""
    found = (each for each in re.split(r"\n\s*\n", text) if re.match(rf"\s*JobId={job}\s", each))
    return next(found, "")


def value_in(record: str, name: str) -> str:
    """A field that begins its line, where no job's name or comment can fake it."""
    found = re.search(rf"^\s*{name}=(\S+)", record, re.M)
    return found[1] if found else ""


def allocation_of(record: str, known: str, expand: Callable[[str], Iterable[str]]) -> Allocation:
    """The allocation, by the job's record and its nodes'; `expand` turns n[1-2] into n1, n2."""
    array = re.match(r"\s*JobId=(\d+)(?: ArrayJobId=(\d+) ArrayTaskId=(\d+) )?", record)
    restarts = re.search(r"^\s*Requeue=\d+ Restarts=(\d+)", record, re.M)
    name = f"{array[2]}_{array[3]}" if array and array[3] else array[1] if array else ""
    nodes = tuple(expand(value_in(record, "NodeList")))
    given = re.findall(r"^\s*Nodes=(\S+) CPU_IDs=\S* Mem=\S* GRES=(\S*)", record, re.M)
    has = {node: gres for nodes, gres in given for node in expand(nodes)}
    all_of = dict(re.findall(r"^NodeName=(\S+) .*? Gres=(\S+)", known, re.M))
    shares = {node: share_of(has.get(node, ""), all_of.get(node, "")) for node in nodes}
    silent = [node for node, share in shares.items() if node not in all_of and share.count]
    managed = {node: share for node, share in shares.items() if share.of or node in silent}
    het = re.match(r"\s*JobId=\d+ HetJobId=(\d+) HetJobOffset=(\d+) ", record)
    component = (het[1], het[2]) if het else None
    name = "+".join(component) if component else name
    return Allocation(name, int(restarts[1]) if restarts else 0, nodes, managed, component)


def share_of(ours: str, every: str) -> Share:
    """What a job has (`ours`) of a node's GPUs (`every`), as Slurm lists them; '': it does not say.

    If `every` is '', slices of GPUs (MIG) are known only by name: their numbers are not GPUs'.
    """
    of = sum(int(count) for count, _ in GPUS.findall(every))
    found = GPUS.findall(ours)
    count = sum(int(count) for count, _ in found)
    named = (ids.removeprefix("IDX:") for _, ids in found if ids.startswith("IDX:"))
    ids = [each for some in named for each in numbers(some)]
    if not every and re.search(r"\dg\.\d", ours):
        ids = []
    if not ids and count == of:
        ids = list(range(of))
    return Share(of, count, ",".join(map(str, sorted(ids))))


def numbers(text: str) -> list[int]:
    """Expand 0-2,5 to 0, 1, 2, 5."""
    ranges = (part.partition("-") for part in text.split(",") if part[:1].isdigit())
    return [i for first, _, last in ranges for i in range(int(first), int(last or first) + 1)]


def last_words(text: str, lines: int = 1) -> str:
    """The last lines that say something, without Slurm's and Docker's own postscripts."""
    noise = ("srun: ", "slurmstepd: ", "See 'docker", "Run 'docker", "salloc: ")
    remark = "srun: cluster configuration lacks support for cpu binding"  # never why
    said = [s.strip() for s in text.splitlines() if s.strip() and not s.startswith(remark)]
    own = [s for s in said if not s.startswith(noise)]
    errors = [s for s in said if "error:" in s]
    return " / ".join((own or errors or said)[-lines:])


GIVEN_UP = re.compile(r"Node failure on (\S+)")  # if the job goes on, it does so without this node


def lost_nodes(text: str) -> str:
    """Which nodes Slurm cannot reach, by what srun says; '' if it reaches all."""
    launch = rf"Task launch for \S+ failed on node (\S+): (?!{REVOKED})(.+)"
    if failed := re.findall(launch, text):
        return by_node((node, f"Slurm cannot start anything there: {why}") for node, why in failed)
    lost = GIVEN_UP.findall(text)
    return by_node((node, "Slurm has lost this node") for node in lost)


def slurms_word(text: str, meanwhile: str = "") -> str:
    """What Slurm says about a step that it could not start, or ended; '' if it did neither.

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
    """Which nodes have no usable python3, by what srun says; '' if that is not why it failed."""
    said = [(node, int(code)) for node, code in EXITED.findall(text)]
    missing = "execve(): python3: No such file or directory" in text
    old = [(node, "its python3 is older than 3.9") for node, code in said if code == TOO_OLD]
    none = [(node, "there is no python3") for node, code in said if code == 2 and missing]
    return by_node([*none, *old])


def squeue(*what: str) -> subprocess.CompletedProcess[str] | None:
    """squeue's answer; None if it cannot be asked, or does not answer within 10 s."""
    command, env = ["squeue", "--all", "--noheader", *what], unfiltered()
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=10)
    return None
