#!/usr/bin/env python3
"""Find the best configuration for a model: serve and measure each candidate.

Every combination of the lists is a candidate. All are measured at a few loads,
then only those that may still win. Other options go to run_sbatch.py. You can
stop it at any time: it keeps what it has, and --resume goes on.
  tune.py MODEL --config configs/tp.yaml configs/ep.yaml
  tune.py MODEL --tp 1,2,4,8 --replicas auto --set max_batch_size=64,256 \\
      --goodput ttft:500 tpot:30
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until all is imported, a ^C just ends us

import argparse
import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from common.settings import setting
from common.talk import counted, die, misused, say
from launch import cli
from launch.arguments import from_home, is_count, value_of
from launch.engines import engine
from launch.findings import named, number_of
from launch.image import newest_tarball
from launch.node.facts import count_gpus
from launch.nodes import Place, find_place
from launch.plan import find_model, is_directory
from launch.runtimes import runtime
from load import bench_place
from load.arguments import count, limit, numbers, path, positive, unfit
from load.matrix import Case, too_few
from search import answer, estimate, race
from search.candidates import SIZES, Candidate, LeftOut, Space, expand, model_config
from search.nodes import Nodes
from search.tuner import PORTS_APART, TURNS, Tuner

FLAGS = ("ENGINE", "RUNTIME", "IMAGE", "CONTAINER_MOUNT")  # settings that say what is served


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the launcher's arguments."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s MODEL [options] [RUN_SBATCH_ARGS...]",
        description=(__doc__ or "").strip(),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 28, 80),
        allow_abbrev=False,
    )
    group = parser.add_argument_group("what to try").add_argument
    group(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="configurations of the engine",
    )
    for name, what in zip(SIZES, ("tensor", "pipeline", "expert"), strict=True):
        group(f"--{name}", type=numbers, default=(), metavar="N,N", help=f"{what} parallel sizes")
    group("--replicas", default="", metavar="N,N", help="servers behind one address, or auto (1)")
    group(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=V,V",
        help="settings of the engine",
    )
    group(
        "--gpus",
        type=count,
        metavar="N",
        help="how many GPUs there are (the job's, or this machine's)",
    )
    group = parser.add_argument_group("how to measure").add_argument
    group("--goodput", type=limit, nargs="+", action="extend", default=[], metavar="SLO",
          help="limits in ms for 99 %% of the requests: ttft:500 tpot:30")  # fmt: skip
    group(
        "--loads", type=numbers, default=race.LOADS, metavar="N,N", help="streams (1,2,4,...,256)"
    )
    group("--input-len", type=count, default=512, metavar="N", help="tokens (512)")
    group("--output-len", type=count, default=256, metavar="N", help="tokens (256)")
    group("--num-prompts", type=count, metavar="N", help="requests a run (5 a stream)")
    group("--repeat", type=count, default=2, metavar="N", help="runs of each load (2)")
    group(
        "--minutes",
        type=positive,
        default=math.inf,
        metavar="M",
        help="begin nothing new after M minutes",
    )
    group("-o", "--output", type=path, metavar="DIR", help="(results/tune-DATE-TIME)")
    group("--resume", action="store_true", help="go on with the search in -o")
    group("--dry-run", action="store_true", help="list the candidates, and serve none")
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    args, rest = parser.parse_known_args(words[:end])
    if args.resume and not args.output:
        parser.error("--resume needs -o, the folder to go on in")
    args.loads = sorted(set(args.loads))
    return args, [*rest, *words[end:]]


def split(values: str) -> list[str]:
    """Split at commas outside brackets and quotes: a value may be a list."""
    found, depth, quote = [""], 0, ""
    for char in values:
        if quote or char in "\"'":
            quote = "" if char == quote else quote or char
        else:
            depth += (char in "[{") - (char in "]}")
        if char == "," and not depth and not quote:
            found.append("")
        else:
            found[-1] += char
    return found


def space_of(args: argparse.Namespace) -> Space:
    settings: dict[str, tuple[str, ...]] = {}
    for word in args.set:
        key, equals, values = word.partition("=")
        if not (key and equals and values):
            misused(f"--set {word}: write KEY=VALUE,VALUE")
        settings[key] = (*settings.get(key, ()), *split(values))
    replicas = tuple(filter(None, (args.replicas or setting("REPLICAS")).split(",")))
    if wrong := [each for each in replicas if not (each == "auto" or is_count(each))]:
        misused(f"--replicas {wrong[0]}: neither a number nor auto")
    replicas = () if replicas == ("1",) else replicas  # the same as not given
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name)}
    if not args.tp and setting("TP"):
        try:
            sizes["tp"] = numbers(setting("TP"))
        except argparse.ArgumentTypeError:
            misused(f"TP is {setting('TP')!r}, neither a size nor a list like 4,8")
    return Space(tuple(args.config), sizes, replicas, settings)


def gpus_there(asked: int | None, place: Place) -> int:
    """GPUs to plan with; 0 if nobody knows."""
    gpus = setting("GPUS")
    if asked or gpus == "none":
        return asked or 0
    if each := len(named(gpus)) or number_of(gpus):
        return each * place.size
    return sum(share.count for share in place.allocation.shares.values()) or count_gpus()


def nodes_of(place: Place) -> Nodes:
    """The nodes that serve candidates. Nodes of several kinds all count as the smallest."""
    counts = [place.gpus(index) for index in range(place.size)]
    return Nodes(place.allocation.nodes or [""], min(counts, default=0))


def of_workspace(launching: argparse.Namespace) -> list[str]:
    """Options for image and model in the user's workspace, as each server has one of its own."""
    if not runtime(launching.runtime).HAS_IMAGE:
        return []
    tarball = None if launching.image else newest_tarball(launching.workspace)
    mounted = launching.asked_mount or is_directory(launching.container_mount)
    return [
        *(["--image", str(tarball)] if tarball else []),
        *([] if mounted else ["--container-mount", str(launching.workspace)]),
    ]


def command_of(words: Sequence[str], model: Sequence[str]) -> list[str]:
    """The launcher's arguments as they were given, and what the environment adds to them.

    The answer shows them to be pasted, perhaps where the environment is another one.
    """
    end = words.index("--") if "--" in words else len(words)
    flags = {name: f"--{name.lower().replace('_', '-')}" for name in FLAGS}
    found = [(flag, os.environ.get(name) or "") for name, flag in flags.items()]
    added = [each for each in found if each[1] and value_of(words[:end], each[0]) is None]
    return [*model, *words[:end], *itertools.chain(*added), *words[end:]]


def folder_of(args: argparse.Namespace) -> Path:
    return bench_place.result_folder(args.output, args.resume, "*", "tune-").resolve()


def check_load(args: argparse.Namespace, port: int) -> None:
    """Refuse what cannot be measured, and say which flags do less than one may think."""
    for what, hint in unfit(args.goodput, one_token=args.output_len == 1):
        misused(what, hint=hint)
    if port + PORTS_APART * TURNS > 65536:
        what = f"the port is {port}, and a search takes {PORTS_APART * TURNS} from there on"
        misused(what, hint=f"PORT={65536 - PORTS_APART * TURNS} or less")
    streams = args.loads[-1]
    if few := too_few(Case("concurrency", 1, 1, args.num_prompts or streams, streams)):
        say(few)


def bench_words(args: argparse.Namespace) -> list[str]:
    """bench.py's arguments for every load."""
    words = ["--input-len", str(args.input_len), "--output-len", str(args.output_len),
             "--repeat", str(args.repeat)]  # fmt: skip
    return words + (["--num-prompts", str(args.num_prompts)] if args.num_prompts else [])


def dry_run(
    candidates: Sequence[Candidate], left_out: Sequence[LeftOut], args: argparse.Namespace,
    nodes: Nodes, model: str,
) -> None:  # fmt: skip
    """Print what would be tried, how many runs that is, and how long they will take."""
    for each in candidates:
        servers = f", {each.replicas} servers" if each.replicas > 1 else ""
        print(f"{each.name}: {each.shape}, {counted(each.gpus, 'GPU')}{servers}")
    for left in left_out:
        print(f"left out: {left.name}: {left.why}")
    results = args.output.parent if args.output else Path(bench_place.RESULTS)
    pace = estimate.earlier(results, model, bench_words(args))
    pace = pace or estimate.guess(args.loads, args.num_prompts, args.output_len)
    print(estimate.estimate(candidates, args.loads, args.repeat, nodes, pace))


def tune(argv: Sequence[str] | None = None) -> int:
    bench_place.environment()
    args, rest = parse(argv)
    launching, words = cli.parse(["--replicas", "1", *rest], "")  # REPLICAS may be a list here
    kind, place = engine(launching.engine), find_place(os.environ)
    given, common, port = kind.read(words, setting("PORT"))
    model, nodes = find_model(given), nodes_of(place)
    command = command_of(list(map(from_home, rest)), [] if given else [model])
    span = partial(expand, space_of(args), kind, common, model_config(model),
                   gpus_there(args.gpus, place))  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:  # leaves no folder if there is nothing to do
        candidates, left_out = span(Path(scratch))
    check_load(args, port)
    if args.dry_run:
        dry_run(candidates, left_out, args, nodes, model)
        return 0
    if not candidates:
        die("; ".join(["no candidate is left", *(f"{e.name}: {e.why}" for e in left_out)]))
    folder = folder_of(args)
    candidates, left_out = span(folder)
    outcome = answer.Outcome(model, command, dict(args.goodput), candidates, left_out,
                             bench_words(args))  # fmt: skip
    deadline = time.monotonic() + args.minutes * 60
    say(f"{counted(len(candidates), 'candidate')}; results in {folder}")
    more = of_workspace(launching)
    tuner = Tuner(outcome, folder, args.loads, port, deadline, nodes, more)
    try:
        tuner.run()
    finally:
        print(answer.text(outcome))
        print(f"{folder}/tune.html")
    return 0 if any(best.name for best in answer.answers(outcome)) else 1


def main(argv: Sequence[str] | None = None) -> int:
    return bench_place.exit_code(lambda: tune(argv))


if __name__ == "__main__":
    raise SystemExit(main())
