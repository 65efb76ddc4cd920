"""pyxis: Slurm's own steps in enroot's containers; one step is the server with all its ranks.

Apptainer would be a sibling of this file, with words before the engine's where pyxis has flags for
srun.
"""

import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.talk import Failure, die, say
from launch import squash
from launch.findings import Finding, Node, Wanted, named
from launch.identity import launcher
from launch.image import Image
from launch.node.containers import AskOwner
from launch.node.pyxis import NOT_INSIDE, Attend, EndSteps, Inside, PartInside, RankInside
from launch.nodes import Place, run
from launch.order import Command
from launch.plan import Plan, Replica
from launch.runtimes.bare import which
from launch.runtimes.docker import giga, passed_on
from launch.spread import Spread, step_of

HAS_IMAGE = True
OVER_NODES = True
ATTENDED = True
OPTION = "--container-image"
NO_DOCKER = "docker: not found in PATH"
PROOF = "/.tensorrt-llm-serve"  # a directory that no node has
PROVEN = f'[ -d {PROOF} ] || {{ echo "pyxis: not loaded here"; exit {NOT_INSIDE}; }}; exec "$@"'
UNSAID = re.compile(r"[,:\"$`\n]")  # not in a path: pyxis has no quotes, or lets a shell read it
# PATH is for a step that runs on the bare host: in the container, the image's own counts.
OF_HOST = re.compile("HOME|PATH|(?i:(https?|all|no|ftp)_proxy)")
HOOKS = ("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "MELLANOX_VISIBLE_DEVICES")
LOW = 1 << 30  # bytes; EFA cannot work with less memory to lock
MEMLOCK = "PropagateResourceLimitsExcept=MEMLOCK in slurm.conf and LimitMEMLOCK=infinity for slurmd"


def find_image(asked: str, workspace: Path) -> Image:
    return squash.find_image(asked, workspace)


def is_known() -> bool:
    """Whether this machine's srun has the plug-in."""
    try:
        return OPTION in run(["srun", "--help"], timeout=10)
    except Failure:
        return False


def is_instead_of_docker(nodes: Sequence[Node]) -> bool:
    """Whether these nodes have pyxis and no Docker."""
    return all(node.facts.no_docker == NO_DOCKER for node in nodes) and is_known()


def check(plan: Plan) -> None:
    """Failure for what pyxis cannot do, before anything starts."""
    check_place(plan.place, plan.mounts)
    if plan.privileged:
        say("PRIVILEGED=1 does nothing: a step of Slurm has its user's own rights")


def check_place(place: Place, mounts: Sequence[str]) -> None:
    if not place.slurm:
        die("--runtime pyxis needs a job of Slurm's", hint="use salloc, sbatch or --runtime docker")
    if not is_known():
        hint = "ask for pyxis on this machine (plugstack.conf), or run it where srun has it"
        die(f"the srun of this machine has no {OPTION}: pyxis is not there", hint=hint)
    for path in mounts:
        if found := UNSAID.search(path):
            hint = "give it another name, or use a link to it"
            die(f"pyxis cannot mount {path}: it has {found[0]!r} in its name", hint=hint)


def container(plan: Plan, replica: Replica, node: str) -> str | None:
    return step_name(plan, replica)


def step_name(plan: Plan, replica: Replica) -> str:
    """The name by which the step is found among the job's; no other launch has it."""
    return f"{plan.name_of(replica)}-{zlib.crc32(launcher().encode()):08x}"


# --- its steps ------------------------------------------------------------------------------------
def serve(plan: Plan, replica: Replica, environ: Mapping[str, str]) -> Command:
    """The one task that is the server, for as long as its input is open."""
    prefix = plan.place.on(1, first=replica.first, gpus=gpus_of(plan, replica))
    gpus = which(plan, replica)
    order = Inside(list(plan.command(replica)), gpus, 0, PROOF, variables(plan, replica))
    hook = hooks(replica.gpus != "none", environ)
    return Command([*hook, *prefix, *flags(plan, replica, environ)], order)


def hold(plan: Plan, replica: Replica, environ: Mapping[str, str]) -> Command:
    """A plain step beside the server, on each of its nodes."""
    prefix = plan.place.on(replica.nodes, first=replica.first)
    caches = [path for _, path in plan.caches]
    return Command(prefix, Attend(step_name(plan, replica), caches))


def ranks(plan: Plan, replica: Replica, log: Path) -> Command:
    """All ranks, those of a node in one container, each with a log of its own."""
    assert replica.spread
    spread = replica.spread
    step = step_of(plan.place, spread, replica.first, log, gpus_of(plan, replica))
    hook = hooks(replica.gpus != "none", os.environ)
    prefix = [*hook, *step, *flags(plan, replica, os.environ)]
    return Command(prefix, rank(plan, replica, spread))


def rank(plan: Plan, replica: Replica, spread: Spread) -> RankInside:
    """What each of the step's tasks does."""
    engine, name, command = plan.engine, plan.name_of(replica), list(plan.command(replica))
    # The container lacks the files by which Slurm otherwise hands data to ranks.
    environ = {"PMIX_MCA_gds": "hash", **variables(plan, replica)}
    if engine.LEADER:
        known = [engine.LEADER, *command], engine.LEADER_MARK, engine.PROGRAM
        return RankInside(name, plan.cwd, *known, proof=PROOF, environ=environ)
    numbers = range(spread.nodes)
    parts = [engine.part(replica.args, each, spread.nodes, spread.head) for each in numbers]
    return PartInside(name, plan.cwd, command, parts=parts, proof=PROOF, environ=environ)


def remove(plan: Plan, replica: Replica) -> Command | None:
    return Command(plan.place.on(1, first=replica.first), EndSteps([step_name(plan, replica)]))


def ask_owner(plan: Plan, replica: Replica) -> Command:
    """Ask on the node itself: a container shares its network and its processes."""
    return Command(plan.place.on(1, first=replica.first), AskOwner(replica.host, replica.port, ""))


def gpus_of(plan: Plan, replica: Replica) -> int:
    """How many GPUs the step asks Slurm for: the job's on its nodes; 0: none, or uncounted."""
    mine = range(replica.first, replica.first + replica.nodes)
    return 0 if replica.gpus == "none" else sum(map(plan.place.gpus, mine))


def flags(plan: Plan, replica: Replica, environ: Mapping[str, str]) -> list[str]:
    """What srun is told of the server's container."""
    return [
        f"--job-name={step_name(plan, replica)}",
        *contained(plan.tag, (*plan.mounts, *plan.device_files), passed_on(environ), environ),
        *([f"--container-workdir={plan.cwd}"] if plan.cwd else []),
    ]


def contained(
    image: str, mounts: Sequence[str], names: Sequence[str], environ: Mapping[str, str]
) -> list[str]:
    """srun's flags for a step in a container. What a site may set otherwise is given each time.

    Of the environment only named variables get in, and they override the image's. Others would
    break the image's own, LD_LIBRARY_PATH and PYTHONPATH above all.
    """
    names = [*names, *HOOKS]
    host = sorted(name for name in environ if OF_HOST.fullmatch(name))
    pairs = [f"{path}:{path}" for path in mounts]
    return [
        f"--export={','.join([*host, *names])}",
        f"--container-env={','.join(names)}",
        f"{OPTION}={image}",
        f"--container-mounts={','.join([*pairs, f'{mounts[0]}:{PROOF}:ro'])}",
        "--container-writable",                     # for caches below $HOME; it goes with the step
        "--no-container-mount-home",
        "--no-container-remap-root",
        "--no-container-entrypoint",
    ]  # fmt: skip


def variables(plan: Plan, replica: Replica) -> dict[str, str]:
    """Further variables for the engine; no secrets, since they are part of the order."""
    asked = "" if replica.devices else ",".join(named(replica.gpus))
    return {**dict(plan.caches), **({"CUDA_VISIBLE_DEVICES": asked} if asked else {})}


def hooks(gpus: bool, environ: Mapping[str, str]) -> list[str]:
    """What comes before srun, for enroot's hooks: they prefer the job's values to the image's."""
    # The hook for Mellanox hides the devices that EFA needs.
    mellanox = environ.get("MELLANOX_VISIBLE_DEVICES") or "void"
    values = "all" if gpus else "void", "compute,utility", mellanox
    return ["env", *(f"{name}={value}" for name, value in zip(HOOKS, values, strict=True))]


def blames(code: int, said: str) -> str:
    """The part of the runtime that has ended, not the engine; else ''."""
    return "the container of pyxis" if code == NOT_INSIDE or "error: pyxis: " in said else ""


def left(node: str, name: str, why: str) -> str:
    then = "It should end by itself once the node answers, at the latest with the job"
    return f"{node}: the step {name} may still be there ({why}). {then}"


# --- its part of the preflight --------------------------------------------------------------------
def judge(node: Node, wanted: Wanted) -> Sequence[Finding]:
    facts, found = node.facts, judge_image(node, wanted)
    if not (facts.toolkit or wanted.gpus == "none"):
        hint = "install libnvidia-container-tools there, or leave the node out (salloc --exclude)"
        lacks = "enroot's hook for GPUs needs nvidia-container-cli, which is not there"
        found.append(node.bad("toolkit", lacks, hint))
    if wanted.gpus not in ("auto", "none", "all") and "device=" not in wanted.gpus:
        hint = "auto, none, or device=0,1 for some of them"
        found.append(node.bad("gpus", f"GPUS={wanted.gpus} does not work with pyxis", hint))
    if facts.efa and 0 <= facts.memlock < LOW:
        text = f"only {facts.memlock >> 10} kB of memory may be locked, and EFA needs more"
        found.append(Finding(node.name, "memlock", "note", text, MEMLOCK))
    return found


def judge_image(node: Node, wanted: Wanted) -> list[Finding]:
    image, facts = wanted.image, node.facts
    if facts.no_image and image.reference:
        found = [Finding(node.name, "image", "note", "import")]
    elif facts.no_image:
        hint = "put it on a file system that the nodes share, and check that you may read it"
        return [node.bad("image", f"the image cannot be read there: {facts.no_image}", hint)]
    else:
        found = [node.ok("image", "present")]
    if facts.data_shared:
        text = f"enroot unpacks into {facts.data}, which other nodes share: they collide there"
        hint = "ask for an ENROOT_DATA_PATH of the node's own (enroot.conf)"
        found.append(node.bad("disk", text, hint) if wanted.world > node.gpus
                     else Finding(node.name, "disk", "note", text, hint))  # fmt: skip
    elif facts.data and facts.free < image.unpacked:
        text = f"{giga(facts.free)} free in {facts.data}, {giga(image.unpacked)} needed to unpack"
        hint = "remove what is there (enroot list, enroot remove), or ask for more room"
        found.append(node.bad("disk", f"not enough disk space: {text} the image", hint))
    return found
