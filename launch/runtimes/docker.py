"""Docker: a container for each server on a node, or one per node for all the ranks of a server."""

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.settings import PASSED_ON, SETTINGS
from common.talk import say
from launch.address import is_loopback
from launch.findings import Finding, Node, Wanted
from launch.identity import launcher
from launch.image import GET_ONE, Image
from launch.image import find_image as find
from launch.node.base import CLIENT_FAILED, LABEL
from launch.node.containers import AskOwner, Remove, Serve
from launch.node.world import Hold, Part, Rank
from launch.order import Command
from launch.plan import Plan, Replica
from launch.spread import step_of

HAS_IMAGE = True
ATTENDED = False
LEAVE_OUT = "leave the node out (salloc --exclude)"
OVER_NODES = True
SHARES_NETWORK = [29, 5]  # since this version, rootless Docker shares the node's network
OF_DOCKER = re.compile(r"^docker: ", re.M)
REMOTE = re.compile(r"(?:tcp|ssh|https?)://(?:[^@/]*@)?(\[[^\]]*\]|[^:/]*)")
UNSTARTED = (126, 127)  # if docker says so, it could not start anything in the container


def find_image(asked: str, workspace: Path) -> Image:
    return find(asked, workspace)


def check(plan: Plan) -> None:
    """Docker can do everything, but DOCKER_HOST may have it done elsewhere: say so."""
    given = os.environ.get("DOCKER_HOST", "")
    found = REMOTE.match(given)
    if found and not is_loopback(found[1].strip("[]")):
        say(f"DOCKER_HOST={given}: containers run there, whichever node starts them; unset it")


def container(plan: Plan, replica: Replica, node: str) -> str | None:
    return f"{plan.name_of(replica)}-{node}"


# --- its orders -----------------------------------------------------------------------------------
def serve(plan: Plan, replica: Replica, environ: Mapping[str, str]) -> Command:
    """The one order that is the server, for as long as its input is open."""
    prefix = plan.place.on(1, first=replica.first)
    return Command(prefix, order_of(Serve, plan, replica, environ))


def hold(plan: Plan, replica: Replica, environ: Mapping[str, str]) -> Command:
    """A container on each of a server's nodes that waits, for the ranks to run in."""
    prefix = plan.place.on(replica.nodes, first=replica.first)
    return Command(prefix, order_of(Hold, plan, replica, environ))


def ranks(plan: Plan, replica: Replica, log: Path) -> Command:
    """All ranks, in blocks, each with a log of its own. The death of one ends all.

    An engine that wires itself up has one process per node, and each is told its own place.
    """
    assert replica.spread
    spread, engine = replica.spread, plan.engine
    prefix = step_of(plan.place, spread, replica.first, log)
    name, command = plan.name_of(replica), list(plan.command(replica))
    if engine.LEADER:
        whole = [engine.LEADER, *command]
        return Command(prefix, Rank(name, plan.cwd, whole, engine.LEADER_MARK, engine.PROGRAM))
    numbers = range(spread.nodes)
    parts = [engine.part(replica.args, each, spread.nodes, spread.head) for each in numbers]
    return Command(prefix, Part(name, plan.cwd, command, parts=parts))


def remove(plan: Plan, replica: Replica) -> Command | None:
    """Remove this server's containers, and no others, in case a node did not do so itself."""
    where = plan.place.on(replica.nodes, first=replica.first)
    return Command(where, Remove(launcher(), replica.label))


def ask_owner(plan: Plan, replica: Replica) -> Command:
    """Whether the port is served from within this launch's container."""
    order = AskOwner(replica.host, replica.port, plan.name_of(replica))
    return Command(plan.place.on(1, first=replica.first), order)


def blames(code: int, said: str) -> str:
    """Docker's client, if that has ended itself or could not start anything; else ''."""
    unstarted = code in UNSTARTED and OF_DOCKER.search(said)
    return "docker run" if code == CLIENT_FAILED or unstarted else ""


def left(node: str, name: str, why: str) -> str:
    then = "It should end by itself once the node and its Docker answer"
    otherwise = "else your next launch there removes it, or `docker rm --force`"
    return f"{node}: the container {name} may still be there ({why}). {then}; {otherwise}"


def order_of(kind: type[Serve], plan: Plan, replica: Replica, environ: Mapping[str, str]) -> Serve:
    shares = plan.place.allocation.shares
    # Docker needs a list of GPUs in quotes, which a shell or .env may have taken away.
    alone = re.fullmatch(r"['\"]?device=([\w.:,/-]+)['\"]?", replica.gpus)
    devices = ",".join(replica.devices) or (alone[1] if alone else "")
    return kind(
        name=plan.name_of(replica),
        launcher=launcher(),
        gpus=f'"device={devices}"' if devices else replica.gpus,
        shares={node: share.ids for node, share in shares.items() if not share.is_whole},
        caches=[path for _, path in plan.caches],
        options=docker_options(plan, environ),
        image=plan.tag,
        engine=list(plan.command(replica)),
        replica=replica.label,
    )


def docker_options(plan: Plan, environ: Mapping[str, str]) -> list[str]:
    """What follows `docker run --name NAME` and the devices that the node itself finds."""
    names = ["NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", *passed_on(environ)]
    return [
        "--rm",
        "--pull=never",                             # a tag nobody has is an error, not a download
        "--interactive",                            # its standard input ends with its launcher
        "--sig-proxy=false",                        # Slurm's warnings (SIGUSR1) are not for it
        "--init",                                   # forwards signals, whatever the engine ignores
        f"--label={LABEL}.job={plan.place.job}",
        f"--label={LABEL}.launcher={launcher()}",
        f"--label={LABEL}.user={plan.user}",
        # No capability beyond Docker's own, no device but those of the node. What else is shared:
        "--uts=host",                               # MPI and logs know a rank by its node's name
        "--ipc=host",                               # NCCL and MPI need more than 64 MB of shm
        "--net=host",                               # NCCL, EFA and MPI bind the node's interfaces
        "--userns=host",                            # else Docker that remaps users refuses that
        "--ulimit=memlock=-1",                      # EFA and GPUDirect register (pin) memory
        "--ulimit=stack=67108864",                  # as NVIDIA's documentation starts its images
        *(["--privileged"] if plan.privileged else []),  # only where PRIVILEGED=1 asks for it
        *map(mount_flag, plan.mounts),
        *([f"--workdir={plan.cwd}"] if plan.cwd else []),
        *(f"--env={name}={path}" for name, path in plan.caches),
        *(f"--env={name}" for name in names if name not in dict(plan.caches)),
    ]  # fmt: skip


def mount_flag(path: str) -> str:
    """`--mount`'s value is a CSV row: a comma or quote in a path is written as CSV writes it."""
    row = io.StringIO()
    csv.writer(row, lineterminator="\n").writerow(["type=bind", f"source={path}", f"target={path}"])
    return f"--mount={row.getvalue()[:-1]}"


def passed_on(environ: Mapping[str, str]) -> list[str]:
    """Names of variables for the engine, without values: everybody could read those in an argv."""
    ours = {each.name for each in SETTINGS} - {"HF_TOKEN"} | {"NCCL_SOCKET_IFNAME"}
    return sorted(n for n in environ if n.startswith(PASSED_ON) and n not in ours and environ[n])


# --- its part of the preflight --------------------------------------------------------------------
def judge(node: Node, wanted: Wanted) -> Sequence[Finding]:
    if node.facts.podman:
        hint = f"install Docker's own engine there, or {LEAVE_OUT}"
        return [node.bad("docker", f"`docker` is podman there ({node.facts.podman})", hint)]
    if why := node.facts.no_docker:
        start = f"start it there (systemctl start docker), or {LEAVE_OUT}"
        hint = f'{start}; for "permission denied", join the group docker there'
        return [node.bad("docker", f"Docker does not answer: {why}", hint)]
    version = [int(number) for number in re.findall(r"\d+", node.facts.docker)]
    if node.facts.rootless and version < SHARES_NETWORK:
        its_own = "its --net=host is a network of its own, where nobody reaches the server"
        hint = f"update it to 29.5, or use the system's Docker (docker context use), or {LEAVE_OUT}"
        return [node.bad("docker", f"Docker {node.facts.docker} is rootless: {its_own}", hint)]
    found = [node.ok("docker", node.facts.docker)]
    if not (node.facts.toolkit or wanted.gpus == "none"):
        install = "install it there (nvidia-ctk runtime configure, then restart Docker)"
        lacks = "Docker has no NVIDIA container toolkit"
        found.append(node.bad("toolkit", lacks, f"{install}, or {LEAVE_OUT}"))
    return [*found, *judge_image(node, wanted.image)]


def judge_image(node: Node, image: Image) -> list[Finding]:
    if node.holds(image):
        return [node.ok("image", "present")]
    if not image.tarball and not image.registry:
        hub = f"; --image docker.io/{image.tag} pulls it from Docker Hub" * ("/" in image.tag)
        return [node.bad("image", f"image {image.tag} is not on this node", GET_ONE + hub)]
    free, how = node.facts.free, "pull" if image.registry else "load"
    text = f"{how} (another {image.tag} is there)" if node.facts.image else how
    if str(image.tarball) in node.facts.unseen:
        hint = "put it on a file system that the nodes share, or at this same path there"
        return [
            node.bad("image", f"the tarball {image.tarball} is not there, or not readable", hint)
        ]
    row = Finding(node.name, "image", "note", text)
    if free < image.room:
        text = f"{giga(free)} free for Docker, {giga(image.room)} needed to load {image.tag}"
        where = "containerd's root" if "containerd" in node.facts.store else "Docker's data-root"
        hint = f"run docker image prune there, or move {where}"
        return [row, node.bad("disk", f"not enough disk space: {text}", hint)]
    return [row, node.ok("disk", f"{giga(free)} free")]


def giga(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
