"""How a world of ranks lies over the nodes of a job, and what wires it up."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.settings import setting
from common.talk import counted, die, say
from launch.address import address_of
from launch.engines import World
from launch.findings import Node, usable
from launch.nodes import Place, run

NO_MPI = "none"  # srun's word


@dataclass(frozen=True)
class Spread:
    """`ranks` processes on each of `nodes` nodes, wired up by `mpi`; none: by the engine itself."""

    nodes: int
    ranks: int
    mpi: str
    head: str = field(default="", compare=False)  # the first node's address, for the others

    def ranks_of(self, index: int) -> str:
        first, last = index * self.ranks, (index + 1) * self.ranks - 1
        return f"ranks {first}-{last}" if first < last else f"rank {first}"


def is_spread(world: World, gpus: Sequence[int], head: str, over_nodes: bool) -> bool:
    """Whether the world needs more than the first node. Failure if it does not fit at all."""
    if (asked := setting("GPUS")) == "none":
        return False
    by = "" if asked in ("auto", "all") else f" (GPUS={asked})"
    wants = f"the world size is {world}, but"
    if world.size > sum(gpus):
        hint = "allocate more, or lower the tensor or pipeline parallel size (also in the YAML)"
        whole = f"the {len(gpus)} nodes of the job have" if gpus[1:] else f"{head} has"
        die(f"{wants} {whole} only {counted(sum(gpus), 'GPU')}{by}", hint=hint)
    if world.size <= gpus[0]:
        return False
    if not over_nodes:
        only = f"has only {counted(gpus[0], 'GPU')}{by}"
        die(f"{wants} {head} {only}; several nodes need --runtime docker, or pyxis")
    return True


def find_spread(
    world: World,
    nodes: Sequence[Node],
    over_nodes: bool,
    prefix: Sequence[str] = (),
    *,
    mpi: bool = True,
) -> Spread | None:
    """How the world lies over the nodes; None if the first node holds it all."""
    gpus = [usable(setting("GPUS"), node.gpus) for node in nodes]
    if not is_spread(world, gpus, nodes[0].name, over_nodes):
        return None
    kind = choose_mpi(setting("MPI"), prefix) if mpi else NO_MPI
    return replace(spread_over(world, gpus, kind), head=address_of(nodes[0]))


def step_of(place: Place, spread: Spread, first: int, log: Path, gpus: int = 0) -> list[str]:
    """The prefix for all ranks, in blocks, with a log for each. The death of one ends all."""
    return [
        *place.on(spread.nodes, spread.ranks, spread.mpi, first, gpus),
        "--overcommit",  # an allocation may have one CPU a node, which containers do not heed
        "--distribution=block",
        "--kill-on-bad-exit=1",
        "--open-mode=append",
        f"--output={log}",
    ]


def check_logs(spread: Spread | None, workspace: Path) -> None:
    """Failure for a path that srun's --output cannot name: a backslash has no escape there."""
    if spread and "\\" in str(workspace):
        why = "has a backslash in its name, and srun cannot write a log for each rank there"
        die(f"the workspace {workspace} {why}", hint="use another --workspace")


def spread_over(world: World, gpus: Sequence[int], mpi: str) -> Spread:
    """The world over nodes with `gpus` GPUs each. Failure if it does not fill them evenly."""
    if len(set(gpus)) > 1:
        found = f"the nodes have unequal numbers of GPUs ({', '.join(map(str, gpus))})"
        why = "and the engine maps ranks to GPUs by one number"
        die(f"{found}, {why}", hint="allocate nodes of one kind, with --gpus-per-node")
    each, why = gpus[0], f"which does not fill nodes of {gpus[0]} GPUs evenly"
    if world.size % each:
        die(f"the world size is {world}, {why}", hint=f"choose a multiple of {each}")
    return Spread(world.size // each, 1 if mpi == NO_MPI else each, mpi)


def choose_mpi(asked: str, prefix: Sequence[str] = ()) -> str:
    """The MPI type: what was asked for, else what srun offers. Failure if that is no PMIx."""
    refuse_others(asked)
    offered = run([*prefix, "sh", "-c", "exec srun --mpi=list 2>&1"])
    if asked == "auto":
        return pick_mpi(offered)
    if not re.search(rf"\b{re.escape(asked)}(\s|$)", offered):
        found = f"this Slurm has no MPI type {asked} {quoted(offered)}"
        die(found, hint="MPI=auto takes what there is")
    return asked


def quoted(offered: str) -> str:
    return f"(srun --mpi=list says: {' '.join(offered.split())})"


def refuse_others(asked: str) -> None:
    """Failure for anything but `auto` and PMIx."""
    if asked != "auto" and not asked.startswith("pmix"):
        why = "pmi2 hands each rank an open file, which no container inherits"
        hint = "MPI=auto takes the PMIx that srun offers"
        die(f"MPI={asked}: only PMIx reaches ranks in containers ({why})", hint=hint)


def pick_mpi(offered: str) -> str:
    """pmix, else its newest version."""
    if re.search(r"^(srun:)?\s*(mpi/)?pmix\s*$", offered, re.M):
        return "pmix"
    if versions := re.findall(r"\bpmix_v(\d+)\b", offered):
        return f"pmix_v{max(map(int, versions))}"
    hint = "ask for Slurm's PMIx plug-in, or serve within one node"
    die(f"this Slurm has no PMIx plug-in {quoted(offered)}", hint=hint)


def expect_spread(
    world: World, place: Place, over_nodes: bool, *, mpi: bool = True
) -> Spread | None:
    """The spread by what Slurm says of the job, for --dry-run, which asks no node."""
    shares = place.allocation.shares
    if not place.slurm:
        return None
    if len(shares) < place.size:
        if world.size > 1:
            say("the number of GPUs of a node is not known without asking: shown for one node")
        return None
    gpus = [usable(setting("GPUS"), share.count) for share in shares.values()]
    if not is_spread(world, gpus, "each node", over_nodes):
        return None
    kind = setting("MPI") if mpi else NO_MPI
    if mpi:
        refuse_others(kind)
    spread = spread_over(world, gpus, "pmix" if kind == "auto" else kind)
    return replace(spread, head=place.allocation.nodes[0])


def describe(spread: Spread | None, world: World, nodes: Sequence[str]) -> str:
    """`world size 16 (...): 8 ranks on each of n1, n2 (--mpi=pmix); n1 serves`"""
    if not spread:
        return f"world size {world}: all ranks on {nodes[0]}"
    names = ", ".join(nodes[: spread.nodes])
    ranks = f"{spread.ranks} ranks on each of {names} (--mpi={spread.mpi})"
    where = f"a process on each of {names}" if spread.mpi == NO_MPI else ranks
    return f"world size {world}: {where}; {nodes[0]} serves"
