"""The command line of run_sbatch.py; what it leaves out comes from the settings."""

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence

from common.settings import setting
from common.talk import say
from launch.arguments import from_home, is_count
from launch.engines import DEFAULT, engine, every
from launch.engines import NAMES as ENGINES
from launch.front import AFFINITY
from launch.plan import is_directory, real
from launch.runtimes import NAMES as RUNTIMES
from launch.squash import is_squash

GPU_WORDS = re.compile(
    "auto|none|(all|-1|[1-9][0-9]*)(,[\"']?\\w+=.*)?|"
    "[\"']?(driver|count|device|capabilities|options)=.+",
    re.S,
)
OF_DOCKER = "what docker's --gpus takes, such as device=0,1"
GIVEN = """image workspace container_mount engine ready_timeout restart runtime replicas
    load_at_once stop""".split()
EVERY = "*"  # a --stop without a JOB
POOL_ARGS = "--prefill-args", "--decode-args"
FOREVER = 1e9  # seconds, 30 years; no timer takes more than ten times that


def parse(
    argv: Sequence[str] | None, description: str = ""
) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and all other words in their order."""
    parser = argparse.ArgumentParser(
        prog="run_sbatch.py",
        usage="%(prog)s [options] MODEL [ENGINE_ARGS...]",
        allow_abbrev=False,
        description=description,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 28, 80),
    )
    option = parser.add_argument_group("image and paths").add_argument
    images = "tarball, .sqsh, tag or reference (the workspace's)"
    option("--image", metavar="IMAGE", help=images)
    option(
        "--workspace",
        "-w",
        metavar="DIR",
        help="directory of the default image and logs/ (.)",
    )
    option(
        "--container-mount",
        metavar="DIR",
        help="host directory mounted into the containers (/fsx)",
    )
    option(
        "--force",
        "-f",
        action="store_true",
        help="remove the image from the nodes and load it again",
    )
    option(
        "--verify",
        action="store_true",
        help="compare the tarball's sha256 with its sidecar first",
    )
    option("--verbose", "-v", action="store_true", help="show commands, and the log while loading")
    option = parser.add_argument_group("serving").add_argument
    option("--engine", choices=ENGINES, metavar="NAME", help=f"{', '.join(ENGINES)} ({DEFAULT})")
    option(
        "--runtime",
        choices=RUNTIMES,
        metavar="NAME",
        help="docker; pyxis for a .sqsh; bare: the engine in PATH",
    )
    option(
        "--ready-timeout",
        metavar="SECONDS",
        help="how long it may take to get ready (default: 3600)",
    )
    option("--restart", metavar="N", help="restart a failed server, up to N times (default: 0)")
    option = parser.add_argument_group("several servers behind one address").add_argument
    option("--replicas", metavar="N|auto", help="how many; auto: as many as fit (default: 1)")
    option("--load-at-once", metavar="N", help="how many may load at a time (default: all)")
    option("--all-or-nothing", action="store_true", help="end them all when one is lost")
    option("--no-front", action="store_true", help="no common address: each has its own")
    choices = [name for name in AFFINITY if name]
    alike = f"send requests with the same {' or '.join(choices)} to one replica"
    option("--affinity", choices=choices, metavar="HOW", default="", help=alike)
    option = parser.add_argument_group("prefill and decode on servers of their own").add_argument
    for name, what_it_does in (("prefill", "read prompts"), ("decode", "write answers")):
        option(f"--{name}", metavar="N", help=f"how many servers {what_it_does} (default: none)")
        option(f"--{name}-config", metavar="FILE", type=from_home, help="their config file")
        option(f"--{name}-args", metavar="ARGS", help="more arguments for them, quoted")
    what = parser.add_argument_group("instead of serving").add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="report on every node, start nothing")
    what.add_argument("--dry-run", action="store_true", help="print every command, run none")
    what.add_argument("--status", action="store_true", help="show what runs from this workspace")
    parser.add_argument("--json", action="store_true", help="print --status for programs")
    what.add_argument(
        "--stop", metavar="JOB", nargs="?", const=EVERY, help="stop it, or only what runs in JOB"
    )
    what.add_argument(
        "--logs",
        metavar="REPLICA",
        nargs="?",
        const="",
        help="follow the newest log, or a replica's",
    )
    what.add_argument(
        "--why",
        metavar="LOG",
        nargs="?",
        const="",
        type=from_home,
        help="say why the newest server (or LOG's) ended",
    )
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    args, rest = parser.parse_known_args(with_pool_args(words[:end]))
    rest += words[end + 1 :]
    check_usage(parser, args)
    return args, list(map(from_home, rest))


def with_pool_args(words: Sequence[str]) -> list[str]:
    """Join `--prefill-args --x`: argparse takes a value that begins with a dash for a flag."""
    found: list[str] = []
    for word in words:
        if found and found[-1] in POOL_ARGS:
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def check_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in the settings for what was not given; a usage error for what cannot be."""
    for name in GIVEN:
        if getattr(args, name) == "":  # an unset variable in somebody's script
            parser.error(f"--{name.replace('_', '-')} is empty")
    args.stop = "" if args.stop == EVERY else args.stop
    args.asked_mount = args.container_mount or os.environ.get("CONTAINER_MOUNT")
    args.container_mount = args.asked_mount or setting("CONTAINER_MOUNT")
    args.image = args.image or setting("IMAGE")
    args.called_workspace = args.workspace or setting("WORKSPACE") or "."
    args.workspace = real(args.called_workspace)
    args.engine = args.engine or setting("ENGINE")
    args.asked_runtime = args.runtime or os.environ.get("RUNTIME")
    by_image = "pyxis" if is_squash(args.image) else setting("RUNTIME")
    args.runtime = args.asked_runtime or by_image
    asked = args.ready_timeout or setting("READY_TIMEOUT")
    args.ready_timeout = seconds(parser, "--ready-timeout", asked)
    args.probe_seconds = seconds(parser, "PROBE_SECONDS", setting("PROBE_SECONDS"))
    args.probe_timeout = seconds(parser, "PROBE_TIMEOUT", setting("PROBE_TIMEOUT"))
    restart = args.restart or setting("RESTART")
    if not (restart == "0" or is_count(restart)):
        parser.error(f"--restart: {restart!r} is not a number of times")
    args.restart = int(restart)
    check_fleet(parser, args)
    for name, value, known in (
        ("ENGINE", args.engine, ENGINES),
        ("RUNTIME", args.runtime, RUNTIMES),
    ):
        if value not in known:
            parser.error(f"{name} is {value!r}, not {' or '.join(known)}")
    if (privileged := setting("PRIVILEGED")) not in ("0", "1"):
        parser.error(f"PRIVILEGED is {privileged!r}, neither 0 nor 1")
    if not GPU_WORDS.fullmatch(gpus := setting("GPUS")):
        parser.error(f"GPUS is {gpus!r}, not auto, none, or {OF_DOCKER}")
    if not is_directory(args.workspace):
        parser.error(f"--workspace: {args.workspace} is not a directory")
    if not is_of_what_runs(args):
        say_useless(args)


def is_of_what_runs(args: argparse.Namespace) -> bool:
    """Whether the command is about other launches and starts none."""
    return args.status or any(word is not None for word in (args.logs, args.stop, args.why))


def say_useless(args: argparse.Namespace) -> None:
    """Say which of the given options and settings do nothing in this launch."""
    alone, served = args.replicas == "1" and not args.prefill, engine(args.engine)
    of_several = {
        "--load-at-once": args.load_at_once and str(args.load_at_once) != setting("LOAD_AT_ONCE"),
        "--all-or-nothing": args.all_or_nothing,
        "--no-front": args.no_front,
        "--affinity": args.affinity,
    }
    in_slurm = os.environ.get("SLURM_JOB_ID")
    some = os.environ.get("CUDA_VISIBLE_DEVICES")
    all_of_them = some and not in_slurm and args.runtime != "bare" and setting("GPUS") == "auto"
    versions = {each.VERSION for each in every()} - {"", served.VERSION}
    in_vain = {
        "with one server": [name for name, given in of_several.items() if given and alone],
        f"without GPUS=device={some}": ["CUDA_VISIBLE_DEVICES"] if all_of_them else [],
        "without Slurm": [n for n in ("NODELIST",) if setting(n) and not in_slurm],
        f"with {served.TITLE}": [name for name in sorted(versions) if setting(name)],
    }
    for when, names in in_vain.items():
        if names:
            say(f"{when}, {', '.join(names)} {'does' if len(names) == 1 else 'do'} nothing")


def check_fleet(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    args.replicas = args.replicas or setting("REPLICAS")
    if not (args.replicas == "auto" or is_count(args.replicas)):
        parser.error(f"--replicas: {args.replicas!r} is neither a number nor auto")
    at_once = args.load_at_once or setting("LOAD_AT_ONCE")
    args.load_at_once = count_of(parser, "--load-at-once", at_once)
    check_pools(parser, args)
    if args.replicas == "1" and not args.prefill:
        return
    gpus = setting("GPUS")
    if args.replicas == "auto" and gpus == "none":
        parser.error("--replicas auto counts GPUs, and GPUS is none: give a number")
    named = "device=" in gpus and args.runtime == "docker"
    if not (named or gpus in ("auto", "none")):
        words = "auto, none" + (" or docker's device=..." if args.runtime == "docker" else "")
        parser.error(f"GPUS is {gpus!r}; with --replicas it has to be {words}")


def check_pools(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Prefill and decode servers come together, and the loss of one server ends the launch."""
    names = ("prefill", "decode")
    given = [n for n in vars(args) if n.partition("_")[0] in names and getattr(args, n) is not None]
    for name in names:
        setattr(args, name, count_of(parser, f"--{name}", getattr(args, name) or "0"))
    if given and not (args.prefill and args.decode):
        parser.error("--prefill and --decode go together: give at least one server of each kind")
    if given and args.replicas != "1":
        parser.error("--replicas does not go with --prefill and --decode")
    args.all_or_nothing = args.all_or_nothing or bool(args.prefill)


def count_of(parser: argparse.ArgumentParser, name: str, text: str) -> int:
    if not (text == "0" or is_count(text)):
        parser.error(f"{name}: {text!r} is not a number of servers")
    return int(text)


def seconds(parser: argparse.ArgumentParser, name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number >= 0:  # nan is not
        parser.error(f"{name}: {text!r} is not a number of seconds")
    return min(number, FOREVER)
