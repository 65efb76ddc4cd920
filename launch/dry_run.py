"""--dry-run: print every command as a shell takes it, to be read and pasted; run none."""

import argparse
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from launch import disagg, provide
from launch.findings import Wanted
from launch.front import Front
from launch.image import Image
from launch.plan import Plan, Replica
from launch.preflight import survey_command
from launch.runtimes import runtime
from launch.world import pattern_of_logs

HELD = "cat; "  # an order's input is the shell's until that ends
ALONE = "sleep infinity; "  # in the background there is no input


def dry_run(plan: Plan, found: Image, wanted: Wanted, args: argparse.Namespace) -> None:
    print(f"# ask every node\n{survey_command(wanted, plan.place).shown()}")
    if plan.is_fleet and wanted.port:
        front = front_of(plan, wanted.port, args.affinity)
        print(f"# the front, until its standard input ends\n{front}")
    ask = {"force": args.force, "verify": args.verify}
    images = image_commands(plan, found, **ask) if found.tag else ()
    for why, command in (*images, *server_commands(plan, args.workspace / "logs")):
        print(f"# {why}\n{command}")


def image_commands(
    plan: Plan, found: Image, *, force: bool, verify: bool
) -> Iterator[tuple[str, str]]:
    if verify:
        sum_command = shlex.join(provide.sum_command(found))
        yield "the tarball's sha256, compared with its sidecar's", sum_command
    if force:
        forget = provide.forget_command(found, plan.place, plan.nodes).shown()
        yield "--force: remove the image from every node that serves", forget
    if found.tarball or found.registry:
        login = provide.password_command(found)
        more = f"{shlex.join(login)}; {HELD}" if login else HELD
        why = "where a node lacks the image; stops when its standard input ends"
        yield why, provide.provide_command(found, plan.place, plan.nodes).shown(more)


def front_of(plan: Plan, port: int, affinity: str) -> str:
    """The order for the front, as a shell takes it."""
    at = addresses(plan)
    servers, models = (
        {each.label: at[each.label] for each in some} for some in (plan.entrances, plan.listers)
    )
    where = plan.place, "", plan.replicas[0].host, port
    return Front(*where, servers, affinity, models).command.shown(HELD)


def addresses(plan: Plan) -> dict[str, str]:
    """Each replica's `host:port`, with its node's name: the node's address is not known yet."""
    names = plan.place.allocation.nodes or ["127.0.0.1"]
    return {each.label: f"{names[each.first]}:{each.port}" for each in plan.replicas}


def server_commands(plan: Plan, logs: Path) -> Iterator[tuple[str, str]]:
    for replica in plan.replicas:
        if replica.words:
            file, text = disagg.file_of(plan, logs), disagg.text_of(plan, addresses(plan))
            yield (
                f"the {replica.label}'s file",
                f"cat > {shlex.quote(str(file))} <<'YAML'\n{text}YAML",
            )
        name = f"{replica.label}: " if replica.label else ""
        for why, command in commands_of(plan, replica, logs):
            yield f"{name}{why}", command


def commands_of(plan: Plan, replica: Replica, logs: Path) -> Iterator[tuple[str, str]]:
    kind, log = runtime(plan.runtime), plan.log_of(replica, logs)
    if replica.spread or kind.ATTENDED:
        yield "a place for the logs", shlex.join(["mkdir", "--parents", str(logs)])
        holder = kind.hold(plan, replica, os.environ).shown(ALONE)
        what = "what waits beside the server" if kind.ATTENDED else "a container"
        yield f"{what} on every node, until its `sleep` is killed", f"({holder}\n) &"
    if replica.spread:
        ranks = kind.ranks(plan, replica, pattern_of_logs(log)).shown(HELD)
        yield "when every node has said `Up`: the ranks; rank 0 serves", ranks
    else:
        serve = kind.serve(plan, replica, os.environ).shown(HELD)
        yield "the server, until its standard input ends", serve
    if command := kind.remove(plan, replica):
        yield "in case a node has not cleaned up by itself", command.shown()
