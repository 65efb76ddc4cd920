"""What a launch is: every decision, taken before anything runs."""

from __future__ import annotations

import argparse
import os
import pwd
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.settings import setting
from common.talk import die, say
from launch import parallelism
from launch.image import Image
from launch.nodes import Place, run
from launch.parallelism import World
from launch.preflight import Node, Wanted


@dataclass(frozen=True)
class Spread:
    """The shape of an MPI world: `ranks` on each of `nodes` nodes, wired up by `mpi`."""

    nodes: int
    ranks: int
    mpi: str

    def ranks_of(self, index: int) -> str:
        """The ranks of the node of that index, in words."""
        return f"ranks {index * self.ranks}-{(index + 1) * self.ranks - 1}"


@dataclass(frozen=True)
class Plan:
    """All that a launch needs to know."""

    place: Place
    runtime: str
    tag: str
    gpus: str
    mounts: tuple[str, ...]
    cache: str  # the Hugging Face cache, one of the mounts; '' with runtime bare
    cwd: str  # the container's working directory; '': the image's own
    privileged: bool
    user: str
    engine: tuple[str, ...]  # trtllm-serve and its arguments
    spread: Spread | None = None  # None: one server within the first node


def user_name(uid: int | None = None) -> str:
    """Whose the uid is; without one who we are, whatever $LOGNAME says. Nameless: its number."""
    uid = os.geteuid() if uid is None else uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def real(path: str) -> Path:
    """A path as it is, home directory and links resolved; never an error."""
    return Path(os.path.realpath(os.path.expanduser(path)))  # noqa: PTH111


def is_directory(path: Path | str) -> bool:
    """False for a name too long, too, where Path.is_dir() raises."""
    return os.path.isdir(path)  # noqa: PTH112


def engine_arguments(rest: Sequence[str]) -> tuple[str, list[str], int]:
    """The model, all arguments of trtllm-serve, and the port it will serve on."""
    model, args = parallelism.split_model(rest)
    if model is None:
        model = setting("MODEL")
        say(f"no MODEL was given: serving {model}")
    args = parallelism.rename_config(args)
    port = parallelism.value_of(args, "--port") or setting("PORT")
    if not parallelism.is_count(port) or int(port) > 65535:
        die(f"the port is {port!r}, not a number from 1 to 65535")
    if parallelism.value_of(args, "--host") is None:
        args += ["--host", "0.0.0.0"]
    if parallelism.value_of(args, "--port") is None:
        args += ["--port", port]
    return model, args, int(port)


def called_otherwise(path: str, where: Path) -> list[Path]:
    """The name of a link that leads there: the model may be called by it."""
    called = os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111
    return [Path(called)] if real(called) == where else []


def find_mounts(args: argparse.Namespace, cache: Path, paths: Sequence[Path] = ()) -> list[Path]:
    """Host directories that the containers see under the same path, each once.

    A link to the workspace is one of them where one of `paths` is called by it.
    """
    mount = real(args.container_mount)
    links = called_otherwise(args.called_workspace, args.workspace)
    called = [link for link in links if any(path.is_relative_to(link) for path in paths)]
    mounts = [args.workspace, *called, cache]
    if is_directory(mount):
        mounts[:0] = [mount, *called_otherwise(args.container_mount, mount)]
    elif args.asked_mount:
        die(f"the container mount {mount} is not a directory here", hint="--container-mount PATH")
    else:
        say(f"there is no {mount} on this machine: left out of the containers")
    unique = list(dict.fromkeys(mounts))
    return [p for p in unique if not any(p != q and p.is_relative_to(q) for q in unique)]


def local_paths(model: str, serve_args: Sequence[str]) -> list[Path]:
    """The model and config, where they are files: the nodes have to see them."""
    paths = [Path(model)] if model.startswith(("/", "./", "../")) or is_directory(model) else []
    config = parallelism.value_of(serve_args, "--extra_llm_api_options")
    return [p.absolute() for p in [*paths, *([Path(config)] if config is not None else [])]]


def check_mounted(paths: Sequence[Path], mounts: Sequence[Path]) -> None:
    for path in paths:
        # As it is called and as it is: a link that leads in from outside is unknown inside.
        called = any(path.is_relative_to(m) for m in mounts)
        if not (called and any(path.resolve().is_relative_to(m.resolve()) for m in mounts)):
            die(
                f"{path} is not mounted into the container; these are: "
                f"{', '.join(map(str, mounts))}",
                hint="move it there, or --container-mount its directory",
            )


def make_plan(
    args: argparse.Namespace,
    place: Place,
    model: str,
    serve_args: Sequence[str],
    found: Image,
) -> Plan:
    """All decisions of the launch, before anything runs."""
    engine = ("trtllm-serve", model, *serve_args)
    gpus, user = setting("GPUS"), user_name()
    if args.runtime == "bare":
        return Plan(place, "bare", "", gpus, (), "", "", False, user, engine)
    cache = Path(os.path.expanduser(setting("HF_HOME") or "~/.cache/huggingface")).absolute()  # noqa: PTH111
    paths = local_paths(model, serve_args)
    mounts = find_mounts(args, cache, paths)
    check_mounted(paths, mounts)
    cwd = Path.cwd()
    is_seen = any(cwd.is_relative_to(mount) for mount in mounts)
    return Plan(
        place,
        "docker",
        found.tag,
        gpus,
        tuple(map(str, mounts)),
        str(cache),
        str(cwd) if is_seen else "",
        setting("PRIVILEGED") == "1",
        user,
        engine,
    )


def wanted_of(plan: Plan, found: Image, port: int) -> Wanted:
    seen = [m for m in plan.mounts if m != plan.cache]  # the cache is made where it is missing
    paths = local_paths(plan.engine[1], plan.engine[2:])
    return Wanted(plan.runtime, found, port, plan.gpus, (*seen, *map(str, paths)))


def is_spread(world: World, gpus: Sequence[int], head: str, plan: Plan) -> bool:
    """Whether the world is more than the first node holds. Failure where it cannot be had."""
    if plan.gpus == "none":
        return False
    if world.size > sum(gpus):
        die(
            f"the world size is {world}, but the {len(gpus)} node(s) have {sum(gpus)} GPU(s) in "
            "all",
            hint="allocate more, or lower --tp_size/--pp_size (the YAML of --config wins)",
        )
    if world.size <= gpus[0]:
        return False
    if plan.runtime == "bare":
        die(
            f"the world size is {world}, but {head} has {gpus[0]} GPU(s): more nodes need "
            "--runtime docker"
        )
    return True


def find_spread(world: World, nodes: Sequence[Node], plan: Plan) -> Spread | None:
    """How the world lies over the nodes; None where the first node holds it all."""
    gpus = [node.gpus for node in nodes]
    if not is_spread(world, gpus, nodes[0].name, plan):
        return None
    return spread_over(world, gpus, choose_mpi(setting("MPI")))


def check_logs(plan: Plan, workspace: Path) -> None:
    """Failure for a path that srun's --output cannot name: a backslash has no escape there."""
    if plan.spread and "\\" in str(workspace):
        die(
            f"the workspace {workspace} has a backslash in its name, and srun cannot write a log "
            "for each rank there",
            hint="use another --workspace",
        )


def spread_over(world: World, gpus: Sequence[int], mpi: str) -> Spread:
    """The world over nodes with `gpus` GPUs each. Failure where it does not fill them evenly."""
    if len(set(gpus)) > 1:
        die(
            f"the nodes have unequal numbers of GPUs ({', '.join(map(str, gpus))}), and the engine "
            "maps ranks to GPUs by one number",
            hint="allocate nodes of one kind",
        )
    per_node = gpus[0]
    if world.size % per_node:
        die(
            f"the world size is {world}, which does not fill nodes of {per_node} GPUs evenly",
            hint=f"choose a multiple of {per_node}",
        )
    return Spread(world.size // per_node, per_node, mpi)


def choose_mpi(asked: str) -> str:
    """The MPI type: what was asked for, else what srun offers. Failure where it offers no PMIx."""
    refuse_others(asked)
    offered = run(["sh", "-c", "exec srun --mpi=list 2>&1"])
    if asked == "auto":
        return pick_mpi(offered)
    if not re.search(rf"\b{re.escape(asked)}(\s|$)", offered):
        die(
            f"this Slurm has no MPI type {asked} "
            f"(srun --mpi=list says: {' '.join(offered.split())})",
            hint="MPI=auto takes what there is",
        )
    return asked


def refuse_others(asked: str) -> None:
    """Failure for what is neither `auto` nor PMIx."""
    if asked != "auto" and not asked.startswith("pmix"):
        die(
            f"MPI={asked}: only PMIx reaches ranks in containers (pmi2 hands each rank an open "
            "file, which no container inherits)",
            hint="MPI=auto takes the PMIx that srun offers",
        )


def pick_mpi(offered: str) -> str:
    """pmix, else its newest version."""
    if re.search(r"^(srun:)?\s*(mpi/)?pmix\s*$", offered, re.M):
        return "pmix"
    if versions := re.findall(r"\bpmix_v(\d+)\b", offered):
        return f"pmix_v{max(map(int, versions))}"
    die(
        f"this Slurm has no PMIx plug-in (srun --mpi=list says: {' '.join(offered.split())})",
        hint="ask for Slurm's PMIx plug-in, or serve within one node",
    )


def expect_spread(world: World, plan: Plan, environ: Mapping[str, str]) -> Spread | None:
    """The spread as the allocation's own variables suggest it, for --dry-run, which asks nobody."""
    words = environ.get("SLURM_GPUS_ON_NODE") or environ.get("SLURM_GPUS_PER_NODE") or ""
    per_node = words.rpartition(":")[2]
    if not plan.place.slurm:
        return None
    if not parallelism.is_count(per_node):
        if world.size > 1:
            say("how many GPUs a node has is not known without asking: shown for one node")
        return None
    gpus = [int(per_node)] * plan.place.size
    if not is_spread(world, gpus, "each node", plan):
        return None
    mpi = setting("MPI")
    refuse_others(mpi)
    return spread_over(world, gpus, "pmix" if mpi == "auto" else mpi)


def describe(plan: Plan, world: World, nodes: Sequence[Node]) -> str:
    """`world size 16 (...): 8 ranks on each of n1, n2 (--mpi=pmix); n1 serves`"""
    if not plan.spread:
        return f"world size {world}: all of it on {nodes[0].name}, which serves"
    names = ", ".join(node.name for node in nodes[: plan.spread.nodes])
    return (
        f"world size {world}: {plan.spread.ranks} ranks on each of {names} "
        f"(--mpi={plan.spread.mpi}); {nodes[0].name} serves"
    )
