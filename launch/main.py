"""The course of run_sbatch.py: what is asked for, what every node has, the server until its end."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from common.settings import load_env_files, setting
from common.signals import SIGNALS, Stopped, obey, outlive_warnings
from common.talk import Failure, Record, complain, die, keep_ours, print_plainly, say
from launch import allocation, disagg, fleet, image, preflight, provide
from launch.address import url_of
from launch.arguments import value_of
from launch.cli import is_of_what_runs, parse
from launch.dry_run import dry_run
from launch.engines import DEFAULT, Engine, World, engine
from launch.findings import Node, Wanted
from launch.node.facts import count_gpus
from launch.nodes import find_place
from launch.plan import (
    Plan,
    Replica,
    check_links,
    find_model,
    make_plan,
    paths_of,
    release_known,
    settled,
    wanted_of,
)
from launch.runtimes import runtime
from launch.spread import check_logs, expect_spread, find_spread
from launch.spread import describe as describe_one
from launch.timelimit import TimeLimit


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    obey()
    outlive_warnings()
    keep_ours()
    print_plainly()
    try:
        load_env_files()
        code = go(*parse(argv, description))
        sys.stdout.flush()  # now, while an error can still be told
        return code
    except (Failure, OSError) as error:
        return complain(error)
    except Stopped as stopped:
        # The interpreter takes the handlers down as it ends: a late signal would then kill us.
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        say(f"stopped by {signal.Signals(stopped.args[0]).name}")
        return 128 + int(stopped.args[0])


@dataclass(frozen=True)
class Request:
    """What the command line asks for, before any node has been asked."""

    plan: Plan
    found: image.Image
    wanted: Wanted
    server: Replica  # a server with the same arguments, as the front's clients see it
    world: World
    shape: str  # its sizes, in words
    pools: list[disagg.Pool]


def go(args: argparse.Namespace, rest: Sequence[str]) -> int:
    Record.verbose = args.verbose
    if is_of_what_runs(args):
        from launch import manage  # late: a launch does not need it

        return manage.act(args)
    task = os.environ.get("SLURM_JOB_ID") and os.environ.get("SLURM_PROCID")
    if task not in (None, "", "0"):
        say(f"srun started this as task {task} of a step, of which only task 0 serves: leave srun "
            "out, or SLURM_PROCID if this is the only launcher")  # fmt: skip
        return 0
    request = read(args, rest)
    if args.dry_run:
        plan = request.plan if request.plan.release else settled(request.plan, {})
        dry_run(lay_out(plan, request, None, args), request.found, request.wanted, args)
        return 0
    if args.force:
        check_force(request.found)
    nodes = prepare_nodes(request.plan, request.wanted, args)
    if args.runtime != request.plan.runtime:  # the nodes have another one
        return go(args, rest)
    plan = fitted(request, nodes, args)
    head = plan.entrances[0] if plan.is_fleet and args.no_front else request.server
    url = url_of(nodes[head.first], plan.place, head.args)
    put = must_put(plan, nodes, request.found, args)
    if plan.release is None and not put:
        plan = settled(plan, {node.name: node.facts.release for node in nodes[: plan.nodes]})
    announce(plan, request, nodes)
    if args.check:
        return 0

    from launch import supervise  # late: see import_the_rest

    Record.open(args.workspace / f"logs/launch_{plan.place.job}.log")
    put_it = partial(put_image, plan, request.found, args) if put else lambda: plan
    supervise.serve(supervise.Launch(plan, nodes, url, args, TimeLimit(plan.place)), put_it)
    return 0


def read(args: argparse.Namespace, rest: Sequence[str]) -> Request:
    """The plan that the arguments and settings make, and what it needs of the nodes."""
    place = find_place(os.environ)
    served = engine(args.engine)
    model, serve_args, port = served.read(rest, setting("PORT"))
    serve_args = with_tp(serve_args, served)
    server = Replica(find_model(model), tuple(serve_args), port, setting("GPUS"))
    pools = disagg.pools_of(args, server, args.engine)
    shape, world = served.check(pools[0].server.args if pools else serve_args)
    if not (place.slurm or args.dry_run or server.gpus == "none" or count_gpus()):
        one = 1 if args.replicas == "auto" else int(args.replicas)
        servers = [(pool.count, pool.world.size) for pool in pools] or [(one, world.size)]
        allocation.refuse_login_node(servers)
    found = find_image(args)
    plan = make_plan(args, place, found, args.engine, *([p.server for p in pools] or [server]))
    runtime(args.runtime).check(plan)
    if release := release_known(found, args.engine):
        plan = settled(plan, {"": release})
    count = str(sum(pool.count for pool in pools) + 1) if pools else args.replicas
    needs = 0 if pools else world.size
    wanted = wanted_of(plan, found, needs, count, front=not args.no_front)
    return Request(plan, found, wanted, server, world, shape, pools)


def find_image(args: argparse.Namespace) -> image.Image:
    kind = runtime(args.runtime)
    default = engine(args.engine).IMAGE if args.engine != DEFAULT else ""
    found = kind.find_image(args.image or default, args.workspace)
    if not kind.HAS_IMAGE and (useless := of_containers(args)):
        say(f"without a container, {', '.join(useless)} does nothing")
    if args.verify:
        provide.check_verifiable(found)
    return found


def fitted(request: Request, nodes: Sequence[Node], args: argparse.Namespace) -> Plan:
    """The plan laid over these nodes, with their devices. Failure if they are not fit for it."""
    plan = lay_out(request.plan, request, nodes, args)
    plan = replace(plan, device_files=device_files(nodes[: plan.nodes]))
    if plan.tag:
        check_links(paths_of(plan), [*map(Path, plan.mounts)])
    preflight.stop_if_bad(preflight.judge_replicas(nodes, plan))
    return plan


def must_put(
    plan: Plan, nodes: Sequence[Node], found: image.Image, args: argparse.Namespace
) -> bool:
    if not runtime(plan.runtime).HAS_IMAGE:
        return False
    return args.force or preflight.must_provide(nodes[: plan.nodes], found)


def announce(plan: Plan, request: Request, nodes: Sequence[Node]) -> None:
    names = [node.name for node in nodes]
    if request.pools:
        say(f"{plan.title}, {disagg.describe(plan, request.pools, names)}")
    else:
        say(f"{plan.title}, {request.shape}: {describe(plan, request.world, names)}")
    if plan.release is None:
        tag = request.found.tag
        say(f"its version and options are checked once the nodes have {tag}")


def with_tp(args: list[str], served: Engine) -> list[str]:
    """The arguments, with the tensor parallel size of TP= if they give none."""
    tp = setting("TP")
    return [served.TP[0], tp, *args] if tp and value_of(args, *served.TP) is None else args


def device_files(nodes: Sequence[Node]) -> tuple[str, ...]:
    """The device files for EFA and GDRCopy that all these nodes have."""
    has = {
        "/dev/infiniband": all(node.facts.efa for node in nodes),
        "/dev/gdrdrv": all(node.facts.gdrdrv for node in nodes),
    }
    return tuple(path for path, there in has.items() if there)


def of_containers(args: argparse.Namespace) -> list[str]:
    """What was asked for that only containers have."""
    asked = {
        "IMAGE": args.image,
        "CONTAINER_MOUNT": args.asked_mount,
        "PRIVILEGED": setting("PRIVILEGED") == "1",
        "--force": args.force,
    }
    return [name for name, given in asked.items() if given]


def lay_out(
    plan: Plan, request: Request, nodes: Sequence[Node] | None, args: argparse.Namespace
) -> Plan:
    """The plan with its servers laid over the nodes; over the expected ones if `nodes` is None."""
    over_nodes, place, world = runtime(args.runtime).OVER_NODES, plan.place, request.world
    mpi = bool(plan.engine.LEADER)
    if request.pools:
        plan = disagg.lay_out(plan, request.pools, nodes, args, over_nodes)
    elif args.replicas != "1":
        plan = fleet.lay_out(plan, world, nodes, args.replicas, over_nodes)
    if not plan.is_fleet:
        if nodes is None:
            spread = expect_spread(world, place, over_nodes, mpi=mpi)
        else:
            spread = find_spread(world, nodes, over_nodes, place.clean, mpi=mpi)
        plan = replace(plan, replicas=(replace(plan.replicas[0], spread=spread),))
    check_logs(plan.replicas[0].spread, args.workspace)
    return plan


def describe(plan: Plan, world: World, nodes: Sequence[str]) -> str:
    if plan.is_fleet:
        return fleet.describe(plan, world, nodes)
    return describe_one(plan.replicas[0].spread, world, nodes)


def prepare_nodes(plan: Plan, wanted: Wanted, args: argparse.Namespace) -> list[Node]:
    """Ask every node, remove what dead launchers left, and check. Returns the nodes, head first."""
    preflight.refuse_gpus_of_jobs(plan.place, wanted.gpus)
    with preflight.probe(args.workspace, plan.place) as probe:
        wanted = replace(wanted, probe=probe)
        nodes = preflight.ask_nodes(wanted, plan.place, args.ready_timeout, import_the_rest)
        if not args.asked_runtime and is_for_pyxis(nodes):
            say("the nodes have no Docker, but Slurm has pyxis: using --runtime pyxis")
            args.runtime = "pyxis"
            return nodes
        if args.check:
            print(preflight.table(preflight.judge(nodes, wanted)))
        elif preflight.reap(nodes, plan.place, plan.user):
            nodes = preflight.ask_nodes(wanted, plan.place)
    findings = preflight.judge(nodes, wanted)
    preflight.stop_if_bad(findings)
    preflight.say_notes(findings)
    say(preflight.summary(nodes))
    return nodes


def import_the_rest() -> None:
    """Import what only a launch needs whose nodes are fit for it: they take longer to answer."""
    import launch.supervise  # noqa: F401


def is_for_pyxis(nodes: Sequence[Node]) -> bool:
    """Whether these nodes have pyxis and no Docker."""
    if nodes[0].facts.docker:
        return False
    from launch.runtimes import pyxis  # late: few nodes have no Docker

    return pyxis.is_instead_of_docker(nodes)


def check_force(found: image.Image) -> None:
    """Failure if --force would remove an image that cannot be loaded again."""
    if found.squash and not found.reference:
        die(f"--force imports an image again; {found.tag} is not an import", hint="leave it out")
    if found.tag and not (found.tarball or found.registry):
        hint = "give --image a tarball or a registry reference"
        nothing = "and there is nothing to reload it from"
        die(f"--force would remove {found.tag}, {nothing}", hint=hint)


def put_image(plan: Plan, found: image.Image, args: argparse.Namespace) -> Plan:
    """Put the image on every serving node that lacks it; with --force on all of them, afresh.

    Returns the plan for it: without a sidecar, its version is known only now.
    """
    if args.verify:
        provide.verify(found)
    if args.force:
        provide.forget(found, plan.place, plan.nodes)
    ask = plan.release is None
    releases = provide.provide(found, plan.place, plan.nodes, ask_release=ask)
    return settled(plan, releases) if ask else plan
