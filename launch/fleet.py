"""A fleet: the servers of one launch, all alike, laid over its nodes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

from common.settings import setting
from common.talk import counted, die, say
from launch.address import address_of
from launch.engines import World
from launch.findings import Node, gpus_of
from launch.node.facts import count_gpus, visible_gpus
from launch.node.messages import Facts
from launch.placement import Seat, choose, without_gpus
from launch.plan import Plan, Replica, on_port
from launch.spread import NO_MPI, choose_mpi, refuse_others, spread_over

LAST_PORT = 65535


def lay_out(
    plan: Plan, world: World, nodes: Sequence[Node] | None, wanted: str, over_nodes: bool
) -> Plan:
    """The plan with its replicas laid over the nodes. Failure if they do not fit.

    Without nodes (--dry-run), it is laid over those that are to be expected.
    """
    gpus, mpi, heads = room(plan, nodes, world.size, wanted, over_nodes)
    return lay_over(plan, world, gpus, wanted, mpi, heads)


def room(
    plan: Plan, nodes: Sequence[Node] | None, size: int, wanted: str, over_nodes: bool
) -> tuple[Sequence[Sequence[str]], Callable[[], str], Sequence[str]]:
    """The nodes' GPU ids, the function that finds an MPI type, and the nodes' addresses."""
    if nodes is None:
        gpus, mpi = expected_gpus(plan, size, wanted), expected_mpi
        heads: Sequence[str] = plan.place.allocation.nodes
    else:
        gpus = [gpus_of(node, plan.replicas[0].gpus) for node in nodes]
        mpi = partial(choose_mpi, setting("MPI"), plan.place.clean)
        heads = [address_of(node) for node in nodes]
    if not over_nodes:
        mpi = one_node_only
    elif not plan.engine.LEADER:
        mpi = lambda: NO_MPI  # noqa: E731
    return gpus, mpi, heads


def lay_over(
    plan: Plan,
    world: World,
    gpus: Sequence[Sequence[str]],
    wanted: str,
    mpi: Callable[[], str],
    heads: Sequence[str],
) -> Plan:
    """The plan with `wanted` copies of its server on nodes with these GPUs. One is no fleet.

    `mpi` finds the MPI type for a server on several nodes, `heads` are the nodes' addresses.
    """
    server = plan.replicas[0]
    if server.gpus == "none":
        seats = without_gpus(int(wanted), len(gpus))
    else:
        seats = choose(wanted, world.size, gpus)
    if len(seats) == 1:
        return plan
    return replace(plan, replicas=tuple(seat_all(server, "r", seats, world, gpus, mpi, heads)))


def seat_all(
    server: Replica,
    name: str,
    seats: Sequence[Seat],
    world: World,
    gpus: Sequence[Sequence[str]],
    mpi: Callable[[], str],
    heads: Sequence[str],
) -> list[Replica]:
    """The server in every seat, called `name`0, `name`1 and so on. The rest is as in `lay_over`."""
    check_port(server.port + 1 + max(seat.index for seat in seats))
    wired = mpi() if any(seat.nodes > 1 for seat in seats) else ""
    replicas = []
    for number, seat in enumerate(seats):
        made = replace(seated(server, seat), label=f"{name}{number}")
        if seat.nodes > 1:
            its = [len(ids) for ids in gpus[seat.first : seat.first + seat.nodes]]
            spread = replace(spread_over(world, its, wired), head=heads[seat.first])
            made = replace(made, spread=spread)
        replicas.append(made)
    return replicas


def seated(server: Replica, seat: Seat) -> Replica:
    """The server in its seat: node, GPUs, port."""
    port = server.port + 1 + seat.index
    return on_port(replace(server, port=port, first=seat.first, devices=seat.gpus))


def check_port(last: int) -> None:
    if last > LAST_PORT:
        die(f"the last replica's port would be {last}", hint="choose a lower --port")


def one_node_only() -> str:
    die("a replica is larger than a node; several nodes need --runtime docker, or pyxis")


def expected_mpi() -> str:
    refuse_others(asked := setting("MPI"))
    return "pmix" if asked == "auto" else asked


def expected_gpus(plan: Plan, size: int, wanted: str) -> list[list[str]]:
    place, shares = plan.place, plan.place.allocation.shares
    if plan.replicas[0].gpus == "none":
        return [[]] * place.size
    if place.slurm and len(shares) == place.size:
        return [shares[name].each for name in place.allocation.nodes]
    here = Node("", Facts(gpus=count_gpus(), visible=visible_gpus(plan.runtime)))
    if not place.slurm and (ids := gpus_of(here, plan.replicas[0].gpus)):
        return [ids]
    if wanted == "auto":
        unknown = "how many replicas fit is not known without asking the nodes"
        die(unknown, hint="give --replicas a number, or see --check")
    say("the number of GPUs of a node is not known without asking: shown for one node")
    return [[str(gpu) for gpu in range(size * int(wanted))]]


def describe(plan: Plan, world: World, nodes: Sequence[str]) -> str:
    """`4 replicas of world size 2 (...): r0-r1 on n1; r2-r3 on n2`"""
    where = "; ".join(
        f"{labels(list(some))} on {names}"
        for names, some in groupby(plan.replicas, lambda each: ", ".join(nodes_of(each, nodes)))
    )
    spread = plan.replicas[0].spread
    mpi = f" (--mpi={spread.mpi})" if spread and spread.mpi != NO_MPI else ""
    return f"{counted(len(plan.replicas), 'replica')} of world size {world}: {where}{mpi}"


def nodes_of(replica: Replica, nodes: Sequence[str]) -> Sequence[str]:
    return nodes[replica.first : replica.first + replica.nodes]


def labels(replicas: Sequence[Replica]) -> str:
    first, last = replicas[0].label, replicas[-1].label
    return first if first == last else f"{first}-{last}"
