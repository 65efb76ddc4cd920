"""--dry-run: every command as a shell takes it, so that it can be read and pasted; none is run."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from launch import provide
from launch.findings import Wanted
from launch.image import Image
from launch.plan import Plan
from launch.preflight import survey_command
from launch.runtimes import runtime
from launch.world import pattern_of_logs

HELD = "cat; "  # an order's input is the shell's, until it ends
ALONE = "sleep infinity; "  # in the background there is none


def dry_run(
    plan: Plan, found: Image, wanted: Wanted, log: Path, *, force: bool, verify: bool
) -> None:
    print(f"# ask every node\n{survey_command(wanted, plan.place).shown()}")
    images = image_commands(plan, found, force=force, verify=verify) if found.tag else ()
    for why, command in (*images, *server_commands(plan, log)):
        print(f"# {why}\n{command}")


def image_commands(
    plan: Plan, found: Image, *, force: bool, verify: bool
) -> Iterator[tuple[str, str]]:
    if verify:
        sum_command = shlex.join(provide.sum_command(found))
        yield "the tarball's sha256, compared with its sidecar's", sum_command
    if force:
        forget = provide.forget_command(found, plan.place, plan.nodes).shown()
        yield "--force: take the image off every node that serves", forget
    if found.tarball or found.registry:
        login = provide.password_command(found)
        more = f"{shlex.join(login)}; {HELD}" if login else HELD
        why = "where a node lacks the image; stops when its standard input ends"
        yield why, provide.provide_command(found, plan.place, plan.nodes).shown(more)


def server_commands(plan: Plan, log: Path) -> Iterator[tuple[str, str]]:
    kind = runtime(plan.runtime)
    for replica in plan.replicas:
        if replica.spread:
            yield "a place for the logs", shlex.join(["mkdir", "--parents", str(log.parent)])
            holder = kind.hold(plan, replica, os.environ).shown(ALONE)
            yield "a container on every node, until its `sleep` is killed", f"({holder}\n) &"
            ranks = kind.ranks(plan, replica, pattern_of_logs(log)).shown(HELD)
            yield "when every node has said `Up`: the ranks; rank 0 serves", ranks
        else:
            serve = kind.serve(plan, replica, os.environ).shown(HELD)
            yield "the server, until its standard input ends", serve
    if command := kind.remove(plan):
        yield "should a node not have cleaned up itself", command.shown()
