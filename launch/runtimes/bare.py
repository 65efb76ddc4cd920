"""No container: the engine from the node's PATH, within one node."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.talk import die
from launch.findings import Finding, Node, Wanted, named
from launch.image import NONE, Image
from launch.node.bare import Run
from launch.node.containers import AskOwner
from launch.order import Command
from launch.plan import Plan, Replica

HAS_IMAGE = False
OVER_NODES = False
ATTENDED = False
GPUS = re.compile(r"auto|none|all|\d+|(\"?)device=[\w.:,/-]+\1")


def find_image(asked: str, workspace: Path) -> Image:
    return NONE


def check(plan: Plan) -> None:
    """Failure for GPUs in words that only Docker knows."""
    for gpus in {replica.gpus for replica in plan.replicas}:
        if not GPUS.fullmatch(gpus):
            hint = "auto, none, 2 for the first two, or device=2,3 for some of them"
            die(f"GPUS={gpus} needs a container", hint=hint)


def container(plan: Plan, replica: Replica, node: str) -> str | None:
    return None


def serve(plan: Plan, replica: Replica, environ: Mapping[str, str]) -> Command:
    """The one order that is the server, for as long as its input is open."""
    gpus = 0 if replica.gpus == "none" else plan.place.gpus(replica.first)
    order = Run(list(plan.command(replica)), which(plan, replica))
    return Command(plan.place.on(1, first=replica.first, gpus=gpus), order)


def which(plan: Plan, replica: Replica) -> list[int | str]:
    """Its GPUs among those that its step sees (under Slurm, only the job's); [] for all."""
    if replica.gpus.isdecimal():
        return list(range(int(replica.gpus)))
    node = "".join(plan.place.allocation.nodes[replica.first : replica.first + 1])
    share = plan.place.allocation.shares.get(node)
    ours, wanted = share.each if share else [], replica.devices or named(replica.gpus)
    return [ours.index(gpu) if gpu in ours else gpu for gpu in wanted]


def hold(plan: Plan, replica: Replica, environ: Mapping[str, str]) -> Command:
    raise NotImplementedError("OVER_NODES is False")


def ranks(plan: Plan, replica: Replica, log: Path) -> Command:
    raise NotImplementedError("OVER_NODES is False")


def remove(plan: Plan, replica: Replica) -> Command | None:
    """Nothing outlives its order."""
    return None


def ask_owner(plan: Plan, replica: Replica) -> Command:
    order = AskOwner(replica.host, replica.port, "")
    return Command(plan.place.on(1, first=replica.first), order)


def blames(code: int, said: str) -> str:
    return ""


def left(node: str, name: str, why: str) -> str:
    raise NotImplementedError("nothing is left")


def judge(node: Node, wanted: Wanted) -> Sequence[Finding]:
    if path := node.facts.engine:
        return [node.ok("engine", path)]
    hint = "install it there, or use --runtime docker"
    return [node.bad("engine", f"{wanted.program}: not found in PATH", hint)]
