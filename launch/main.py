"""run_sbatch.py's story: what is asked for, what every node has, then the server until its end."""

from __future__ import annotations

import argparse
import io
import math
import os
import shlex
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from common.settings import load_env_files, setting
from common.signals import SIGNALS, Stopped, obey
from common.talk import Failure, complain, die, keep_ours, say
from launch import image, manage, parallelism, preflight, server, strategy, supervise
from launch.nodes import Place, Told, find_place, run
from launch.plan import (
    Plan,
    check_logs,
    describe,
    engine_arguments,
    expect_spread,
    find_spread,
    is_directory,
    make_plan,
    real,
    wanted_of,
)


def parse(
    argv: Sequence[str] | None, description: str = ""
) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and all the rest in its order."""
    parser = argparse.ArgumentParser(
        prog="run_sbatch.py",
        usage="%(prog)s [options] MODEL [TRTLLM_SERVE_ARGS...]",
        allow_abbrev=False,
        description=description,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 28, 80),
    )
    option = parser.add_argument_group("image and paths").add_argument
    option("--image", metavar="IMAGE", help="tarball, local tag or registry reference")
    option("--workspace", "-w", metavar="DIR", help="has the default image and logs/ (default: .)")
    option("--container-mount", metavar="DIR", help="the containers see it, too (default: /fsx)")
    option("--force", "-f", action="store_true", help="take the image off the nodes, load it anew")
    option("--verify", action="store_true", help="a tarball to load: compare its sha256 first")
    option = parser.add_argument_group("serving").add_argument
    option("--runtime", choices=("docker", "bare"), help="bare: trtllm-serve from PATH")
    option("--ready-timeout", metavar="SECONDS", help="for it to get ready (default: 3600)")
    option("--restart", metavar="N", help="start a failed server anew, N times (default: 0)")
    what = parser.add_argument_group("instead of serving").add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="report every node, start nothing")
    what.add_argument("--dry-run", action="store_true", help="print every command, run none")
    what.add_argument("--status", action="store_true", help="what runs from this workspace")
    what.add_argument("--stop", action="store_true", help="stop it")
    what.add_argument("--logs", action="store_true", help="follow the newest log")
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    args, rest = parser.parse_known_args(words[:end])
    rest += words[end + 1 :]
    check_usage(parser, args)
    return args, rest


def check_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in settings for what was not given; usage error for what cannot be."""
    args.asked_mount = args.container_mount or os.environ.get("CONTAINER_MOUNT")
    args.container_mount = args.asked_mount or setting("CONTAINER_MOUNT")
    args.image = args.image or setting("IMAGE")
    args.called_workspace = args.workspace or setting("WORKSPACE") or "."
    args.workspace = real(args.called_workspace)
    args.runtime = args.runtime or setting("RUNTIME")
    asked = args.ready_timeout or setting("READY_TIMEOUT")
    args.ready_timeout = seconds(parser, "--ready-timeout", asked)
    args.probe_seconds = seconds(parser, "PROBE_SECONDS", setting("PROBE_SECONDS"))
    restart = args.restart or setting("RESTART")
    if not (restart == "0" or parallelism.is_count(restart)):
        parser.error(f"--restart: {restart!r} is not a number of times")
    args.restart = int(restart)
    if args.runtime not in ("docker", "bare"):
        parser.error(f"RUNTIME is {args.runtime!r}, not docker or bare")
    if not is_directory(args.workspace):
        parser.error(f"--workspace: {args.workspace} is not a directory")


def seconds(parser: argparse.ArgumentParser, name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number >= 0:  # nan is not
        parser.error(f"{name}: {text!r} is not a number of seconds")
    return number


def dry_run(
    plan: Plan, found: image.Image, wanted: preflight.Wanted, args: argparse.Namespace
) -> None:
    """Every command, one a line, as a shell takes it."""

    def show(why: str, line: str) -> None:
        print(f"# {why}\n{line}")

    show("ask every node", shlex.join(preflight.preflight_command(wanted, plan.place)))
    if args.verify:
        line = shlex.join(image.sum_command(found))
        show("the tarball's sha256, compared with its sidecar's", line)
    if plan.runtime == "docker" and args.force:
        forget = shlex.join(image.forget_command(found, plan.place))
        show("--force: take the image off every node", forget)
    if plan.runtime == "docker" and (found.tarball or found.registry):
        command = shlex.join(image.provide_command(found, plan.place))
        if password := image.password_command(found):
            command = f"{{ {shlex.join(password)}; cat; }} | {command}"
        show("where a node lacks the image; stops when its standard input ends", command)
    for why, line in server.commands(plan, os.environ, supervise.log_path(plan, args.workspace)):
        show(why, line)


def prepare_nodes(
    plan: Plan, wanted: preflight.Wanted, args: argparse.Namespace
) -> list[preflight.Node]:
    """Ask every node, reap what dead launchers left, and check. Returns them, head first."""
    nodes = preflight.ask_nodes(wanted, plan.place)
    if args.check:
        print(preflight.table(preflight.judge(nodes, wanted)))
    elif preflight.reap(nodes, plan.place, plan.user):
        nodes = preflight.ask_nodes(wanted, plan.place)
    preflight.stop_if_bad(preflight.judge(nodes, wanted))
    say(preflight.summary(nodes))
    return nodes


def check_force(found: image.Image) -> None:
    """--force takes an image away; there has to be something to load it from again."""
    if found.tag and not (found.tarball or found.registry):
        die(
            f"--force would remove {found.tag} with nothing to load it from again",
            hint="--image with a tarball or a registry reference",
        )


def put_image(
    plan: Plan, found: image.Image, nodes: Sequence[preflight.Node], force: bool, verify: bool
) -> None:
    """The image on every node that lacks it; with --force on all of them, afresh."""
    if not (force or preflight.must_provide(nodes, found)):
        return
    if verify:
        image.verify(found)
    if force:
        for told in map(Told, run(image.forget_command(found, plan.place)).splitlines()):
            say(f"image: {told.node}: not removed: {told.value}")
    if force or preflight.must_provide(nodes, found):
        image.provide(found, plan.place)


def url_of(head: preflight.Node, place: Place, serve_args: Sequence[str]) -> str:
    """Where the server will be: the address that was asked for, else the head node's IPv4."""
    host = parallelism.value_of(serve_args, "--host") or ""
    port = parallelism.value_of(serve_args, "--port")
    if host in ("0.0.0.0", "::"):
        host = address_of(head) if place.slurm else "127.0.0.1"
    elif place.slurm and is_loopback(host) and head.name != socket.gethostname().split(".")[0]:
        die(f"--host {host} cannot be reached from here: the server runs on {head.name}")
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def address_of(head: preflight.Node) -> str:
    """The node's IPv4 address as its name resolves here; its own first address where that fails."""
    try:
        address = socket.gethostbyname(head.name)
    except OSError:
        address = "127."
    own = [a for a in head.facts.get("addresses", "").split() if "." in a]
    return address if not address.startswith("127.") else (own or ["127.0.0.1"])[0]


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    obey()
    keep_ours()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names that are not UTF-8, as they are
    try:
        load_env_files()
        return go(*parse(argv, description))
    except (Failure, OSError) as error:
        return complain(error)
    except Stopped as stopped:
        # From here the interpreter takes handlers down: a late signal would be death by signal.
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        say(f"stopped by {signal.Signals(stopped.args[0]).name}")
        return 128 + int(stopped.args[0])


def go(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """The steps."""
    if args.status or args.stop or args.logs:
        return manage.act(args)
    place = find_place(os.environ)
    model, serve_args, port = engine_arguments(rest)
    settings = parallelism.merged(serve_args)
    shape = strategy.check(serve_args, settings, setting("TRTLLM_VERSION"))
    world = parallelism.find_world(settings)
    found = image.find_image(args.image, args.workspace) if args.runtime == "docker" else image.NONE
    if args.verify:
        image.check_verifiable(found)
    plan = make_plan(args, place, model, serve_args, found)
    wanted = wanted_of(plan, found, port)
    if args.dry_run:
        plan = replace(plan, spread=expect_spread(world, plan, os.environ))
        check_logs(plan, args.workspace)
        dry_run(plan, found, wanted, args)
        return 0
    if args.force:
        check_force(found)
    nodes = prepare_nodes(plan, wanted, args)
    url = url_of(nodes[0], place, serve_args)
    plan = replace(plan, spread=find_spread(world, nodes, plan))
    check_logs(plan, args.workspace)
    say(f"{shape}: {describe(plan, world, nodes)}")
    if args.check:
        return 0

    put = partial(put_image, plan, found, nodes, args.force, args.verify)
    supervise.serve(plan, nodes, url, args, put)
    return 0
