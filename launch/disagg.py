"""Prefill and decode on servers of their own: two pools, and the orchestrator that joins them.

A fleet of two kinds. Once they are ready, the orchestrator is started: it has a prefill server read
each prompt, and then a decode server write the answer.
"""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, cast

from common.talk import Failure, die
from launch import fleet
from launch.arguments import from_home
from launch.engines import Engine, World, engine
from launch.findings import Node
from launch.placement import Seat, choose, without_gpus
from launch.plan import DECODE, ORCHESTRATOR, PREFILL, Plan, Replica, on_port

Gpus = Sequence[Sequence[str]]  # the GPU ids of each node


class Joint(Protocol):
    """What an engine knows of its servers that work together."""

    def check(self, model: str, prefill: Sequence[str], decode: Sequence[str]) -> None: ...
    def command(self, file: str, seconds: float) -> tuple[str, ...]: ...
    def file(self, host: str, port: int, prefill: Sequence[str], decode: Sequence[str]) -> str: ...


@dataclass(frozen=True)
class Pool:
    """Servers of one kind."""

    name: str
    count: int
    server: Replica  # what each of them is like
    shape: str
    world: World

    def __str__(self) -> str:
        return f"{self.count} {self.name} ({self.shape})"


def joint_of(engine_name: str) -> Joint:
    name = f"launch.engines.{engine_name}_disagg"
    if not find_spec(name):
        hint = "--replicas N serves with several servers of one kind"
        die(f"--prefill and --decode are not there for {engine(engine_name).TITLE}", hint=hint)
    return cast(Joint, import_module(name))


def pools_of(args: argparse.Namespace, server: Replica, engine_name: str) -> list[Pool]:
    """The pools that are asked for, checked as far as possible without a node; [] if none are.

    A pool has the arguments that are for both, then its own.
    """
    if not args.prefill:
        return []
    joint, kind = joint_of(engine_name), engine(engine_name)
    if (both := kind.config_of(server.args)) is not None:
        hint = "give each kind its own: --prefill-config and --decode-config"
        die(f"the config file {both} is for both prefill and decode servers", hint=hint)
    pools = [pool_of(name, args, server, kind) for name in (PREFILL, DECODE)]
    joint.check(server.model, *(pool.server.args for pool in pools))
    return pools


def pool_of(name: str, args: argparse.Namespace, server: Replica, kind: Engine) -> Pool:
    own = words_of(f"--{name}-args", getattr(args, f"{name}_args") or "")
    config = getattr(args, f"{name}_config")
    given = (*server.args, *own, *(("--config", config) if config else ()))
    made = replace(server, label=name, role=name, args=given)
    return Pool(name, getattr(args, name), made, *kind.check(given))


def words_of(flag: str, text: str) -> list[str]:
    """Split as a shell does. Only flags and their values: the model is the same for all."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        die(f"{flag} {text!r} is not a list of arguments: {error}")
    if words and not words[0].startswith("-"):
        die(
            f"{flag} begins with {words[0]}, which is not a flag",
            hint="give MODEL once, outside these arguments",
        )
    return list(map(from_home, words))


# --- where they go --------------------------------------------------------------------------------
def seats(sizes: Sequence[tuple[str, int, int]], gpus: Gpus) -> list[list[Seat]]:
    """Seats for pools (name, how many servers, GPUs of each), one pool after the other.

    A pool gets what the one before it left on a node, unless its servers take whole nodes.
    """
    free, found = [list(ids) for ids in gpus], []
    for name, count, size in sizes:
        whole = not any(size <= len(ids) for ids in gpus)
        left = zip(free, gpus, strict=True)
        room = [ids if not whole or len(ids) == len(every) else [] for ids, every in left]
        try:
            taken = choose(str(count), size, room)
        except Failure as failure:
            raise Failure(f"{name}: {failure.message}", failure.hint) from None
        free = [left_over(ids, node, taken) for node, ids in enumerate(free)]
        found.append(taken)
    return counted_on(found)


def left_over(ids: Sequence[str], node: int, taken: Sequence[Seat]) -> list[str]:
    mine = [seat for seat in taken if seat.first <= node < seat.first + seat.nodes]
    if any(seat.nodes > 1 for seat in mine):
        return []
    return [gpu for gpu in ids if not any(gpu in seat.gpus for seat in mine)]


def counted_on(pools: Sequence[Sequence[Seat]]) -> list[list[Seat]]:
    """The same seats, with each node's servers numbered across the pools, for their ports."""
    number: dict[int, int] = {}
    found: list[list[Seat]] = []
    for pool in pools:
        found.append([])
        for seat in pool:
            found[-1].append(replace(seat, index=number.get(seat.first, 0)))
            number[seat.first] = number.get(seat.first, 0) + 1
    return found


def lay_out(
    plan: Plan,
    pools: Sequence[Pool],
    nodes: Sequence[Node] | None,
    args: argparse.Namespace,
    over_nodes: bool,
) -> Plan:
    """The plan with both pools laid over the nodes, and the orchestrator on the first.

    Without nodes (--dry-run), it is laid over those that are to be expected.
    """
    whole = sum(pool.count * pool.world.size for pool in pools)
    room = fleet.room(plan, nodes, whole, "1", over_nodes)
    if plan.replicas[0].gpus == "none":
        placed = counted_on([without_gpus(pool.count, len(room[0])) for pool in pools])
    else:
        placed = seats([(p.name, p.count, p.world.size) for p in pools], room[0])
    servers = [
        each
        for pool, server, some in zip(pools, plan.replicas, placed, strict=True)
        for each in fleet.seat_all(server, pool.name, some, pool.world, *room)
    ]
    last = orchestrator(plan, servers, args)
    fleet.check_port(last.port)
    return replace(plan, replicas=(*servers, last))


def orchestrator(plan: Plan, servers: Sequence[Replica], args: argparse.Namespace) -> Replica:
    """The orchestrator, on the first node; its port comes after those of the servers there.

    It is given GPUs like its neighbours, since its program needs the driver to load. It uses none
    of their memory.
    """
    port = max(server.port for server in servers if server.first == 0) + 1
    words = joint_of(plan.engine_name).command(
        str(file_of(plan, args.workspace / "logs")), args.ready_timeout
    )
    made = replace(servers[0], label=ORCHESTRATOR, role=ORCHESTRATOR, port=port, words=words)
    return on_port(replace(made, first=0, spread=None, devices=()))


def file_of(plan: Plan, logs: Path) -> Path:
    """The orchestrator's file, in the workspace, which its container sees."""
    return logs / f"orchestrator_{plan.place.job}.yaml"


def text_of(plan: Plan, addresses: Mapping[str, str]) -> str:
    """The orchestrator's file: where its servers are. `addresses` has `host:port` by label."""
    for label, address in addresses.items():
        if address.count(":") > 1:
            what = f"the orchestrator takes no IPv6 address, and {label} has {address}"
            die(what, hint="give --host a name or an IPv4 address")
    prefill, decode = (
        [addresses[each.label] for each in plan.servers if each.role == role]
        for role in (PREFILL, DECODE)
    )
    last = plan.replicas[-1]
    return joint_of(plan.engine_name).file(last.host, last.port, prefill, decode)


def count(plan: Plan) -> str:
    """`2 prefill and 1 decode servers`"""
    roles = [each.role for each in plan.servers]
    return f"{roles.count(PREFILL)} prefill and {roles.count(DECODE)} decode servers"


def describe(plan: Plan, pools: Sequence[Pool], nodes: Sequence[str]) -> str:
    """`1 prefill (TP 4) and 1 decode (TP 4): prefill0, decode0, orchestrator on n1`"""
    where = [
        f"{', '.join(each.label for each in plan.replicas if each.first == index)} on {node}"
        for index, node in enumerate(nodes[: plan.nodes])
        if any(each.first == index for each in plan.replicas)
    ]
    return f"{' and '.join(map(str, pools))}: {'; '.join(where)}"
