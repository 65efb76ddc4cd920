"""What a launch is: every decision, made before anything runs."""

import argparse
import contextlib
import os
import pwd
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from common.settings import PASSED_ON, setting
from common.talk import die, misused, say
from launch.arguments import from_home, value_of, without
from launch.engines import NAMES, Engine, engine
from launch.findings import Wanted
from launch.image import Image
from launch.nodes import Place
from launch.spread import Spread

PREFILL, DECODE, ORCHESTRATOR = "prefill", "decode", "orchestrator"  # roles
MOST = 64  # at most so many replicas' ports are asked for on a node
CACHE = re.compile(r"HF_\w*CACHE")  # Hugging Face's caches beside HF_HOME, or instead of it
READ_BY_ENGINES = (".safetensors", ".bin", ".json", ".model", ".py", ".jinja")  # files of a model


@dataclass(frozen=True)
class Replica:
    """One server of a launch: what it serves, where it runs, its GPUs and its port."""

    model: str
    args: tuple[str, ...]  # for the engine
    port: int
    gpus: str  # auto, none, or docker's own words
    label: str = ""  # its name among the servers of the launch; '' if it is the only one
    first: int = 0  # the index of its first node, which serves
    spread: Spread | None = None  # None: all of it is on that node
    devices: tuple[str, ...] = ()  # ids of its GPUs, if other servers of the launch have the rest
    role: str = ""  # its part, if the servers of a launch are not alike
    words: tuple[str, ...] = ()  # its whole command, if it is not one of the engine's servers
    serves: str = ""  # its model's name, if it cannot tell that itself

    @property
    def host(self) -> str:
        return value_of(self.args, "--host") or ""

    @property
    def nodes(self) -> int:
        """On how many nodes it runs."""
        return self.spread.nodes if self.spread else 1


@dataclass(frozen=True)
class Plan:
    """All that a launch needs to know."""

    place: Place
    runtime: str
    engine_name: str
    tag: str  # the image's; '' if the runtime needs none
    mounts: tuple[str, ...]
    caches: tuple[tuple[str, str], ...]  # variable and directory, which is mounted
    cwd: str  # the container's working directory; '': the image's own
    privileged: bool
    user: str
    replicas: tuple[Replica, ...]  # one, or those of a fleet, which have labels
    device_files: tuple[str, ...] = ()  # that all nodes have, where not all of /dev may be seen
    # Engine and version, `package 1.2.1`; '': unknown; None: not asked yet.
    release: str | None = None

    @property
    def engine(self) -> Engine:
        return engine(self.engine_name)

    @property
    def title(self) -> str:
        """The engine for people, with its version if that is known: `TITLE 1.2.1`."""
        return f"{self.engine.TITLE} {self.version}".strip()

    @property
    def version(self) -> str:
        return (self.release or "").partition(" ")[2]

    @property
    def ready_words(self) -> bytes:
        return self.engine.ready_words(self.version)

    def command(self, replica: Replica) -> tuple[str, ...]:
        """The engine and its arguments."""
        return replica.words or self.engine.command(replica.model, replica.args)

    def name_of(self, replica: Replica) -> str:
        """The name of its containers and steps: `ENGINE-41`."""
        return "-".join(filter(None, (self.engine_name, self.place.job, replica.label)))

    def log_of(self, replica: Replica, logs: Path) -> Path:
        """Its log."""
        label = f"_{replica.label}" if replica.label else ""
        return logs / f"{self.engine_name}_server_{self.place.job}{label}.log"

    @property
    def is_fleet(self) -> bool:
        """Whether there are several servers."""
        return len(self.replicas) > 1

    @property
    def servers(self) -> Sequence[Replica]:
        """Those that have the model; the orchestrator, if there is one, only passes requests on."""
        return [each for each in self.replicas if not each.words]

    @property
    def entrances(self) -> Sequence[Replica]:
        """Those that requests go to: the orchestrator, else every server."""
        return [each for each in self.replicas if each.words] or self.replicas

    @property
    def listers(self) -> Sequence[Replica]:
        """The servers to ask for the list of models, if the entrance has none."""
        return [each for each in self.servers if each.role == DECODE]

    @property
    def nodes(self) -> int:
        """How many nodes, from the first on, have something to run."""
        return max(replica.first + replica.nodes for replica in self.replicas)


def user_name(uid: int | None = None) -> str:
    """The name of a user, by default ours, whatever $LOGNAME says; the uid if it has no name."""
    uid = os.geteuid() if uid is None else uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def real(path: str) -> Path:
    """A path with home directory and links resolved; never an error."""
    return Path(os.path.realpath(os.path.expanduser(path)))  # noqa: PTH111


def is_directory(path: Path | str) -> bool:
    """False even for a name that is too long, for which Path.is_dir() raises."""
    return os.path.isdir(path)  # noqa: PTH112


def find_model(given: str | None) -> str:
    if given is None:
        given = from_home(setting("MODEL"))
        whose = "the setting's" if os.environ.get("MODEL") else "the default"
        say(f"no MODEL given: serving {whose}, {given}")
    if not given.strip() or given.startswith("-"):
        wrong = f"{given}, which is not a model" if given.strip() else "empty"
        misused(f"MODEL is {wrong}", hint="give a Hugging Face id or a path")
    return given


def called_otherwise(path: str, where: Path) -> list[Path]:
    """The path as it is called, if it leads there: the model may be called by that name."""
    called = os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111
    return [Path(called)] if real(called) == where else []


def find_caches(environ: Mapping[str, str], engine: Engine) -> tuple[tuple[str, str], ...]:
    """Hugging Face's caches, HF_HOME first, and the engine's: variables and their directories."""
    names = sorted(n for n in environ if CACHE.fullmatch(n) and environ[n])
    given = {"HF_HOME": setting("HF_HOME") or "~/.cache/huggingface"}
    given |= {name: environ[name] for name in names}
    given |= {name: environ.get(name) or path for name, path in engine.CACHES.items()}
    return tuple((n, os.path.abspath(os.path.expanduser(p))) for n, p in given.items())  # noqa: PTH100, PTH111


def leading_out(caches: Sequence[Path], models: Sequence[str]) -> list[Path]:
    """Where `hub` and these models lead, if they are links in one of Hugging Face's caches."""
    names = ["hub", *(f"models--{model.replace('/', '--')}" for model in models)]
    folders = [folder for cache in caches for folder in (cache, led_to(cache / "hub"))]
    links = [folder / name for folder in folders for name in names]
    return [led_to(link) for link in links if led_to(link) != link and is_directory(link)]


def led_to(path: Path) -> Path:
    """Where a link leads, perhaps to another link; any other path itself."""
    with contextlib.suppress(OSError, ValueError):
        return Path(os.path.abspath(path.parent / os.readlink(path)))  # noqa: PTH100, PTH115
    return path


def say_unmounted(environ: Mapping[str, str], mounts: Sequence[Path]) -> None:
    """Name the variables for the engine that lead to files which it will not see."""
    for name, path in sorted(environ.items()):
        known = name.startswith(PASSED_ON) and path.startswith("/") and os.path.exists(path)  # noqa: PTH110
        if known and not any(Path(path).is_relative_to(mount) for mount in mounts):
            say(f"{name}: {path} is not mounted into the container (--container-mount)")


def find_mounts(
    args: argparse.Namespace,
    caches: Sequence[Path],
    paths: Sequence[Path] = (),
    *,
    elsewhere: bool = False,
) -> list[Path]:
    """Host directories that the containers see under the same path, each once.

    A link to the workspace is among them if one of `paths` goes through it. `elsewhere`: the
    containers run on nodes, which will be asked whether they have what was named.
    """
    mount = real(args.container_mount)
    links = called_otherwise(args.called_workspace, args.workspace)
    called = [link for link in links if any(path.is_relative_to(link) for path in paths)]
    mounts = [args.workspace, *called, *caches]
    if is_directory(mount) or (args.asked_mount and elsewhere and not os.path.exists(mount)):  # noqa: PTH110
        mounts[:0] = [mount, *called_otherwise(args.container_mount, mount)]
    elif args.asked_mount:
        die(f"the container mount {mount} is not a directory here", hint="--container-mount PATH")
    else:
        say(f"{mount} does not exist here, so it is not mounted into the containers")
    if Path("/") in mounts:
        hint = "give --workspace and --container-mount directories below it"
        die("/ cannot be mounted into the container", hint=hint)
    unique = list(dict.fromkeys(mounts))
    return [p for p in unique if not any(p != q and is_within(p, q) for q in unique)]


def is_within(path: Path, mount: Path) -> bool:
    """Whether name and target are within the mount: a link that leads out is broken inside."""
    return path.is_relative_to(mount) and real(str(path)).is_relative_to(real(str(mount)))


def local_paths(model: str, config: str | None) -> list[Path]:
    """The model and config, if they are files: the nodes have to see them."""
    paths = [Path(model)] if model.startswith(("/", "./", "../")) or is_directory(model) else []
    return [p.absolute() for p in [*paths, *([Path(config)] if config is not None else [])]]


def check_mounted(paths: Sequence[Path], mounts: Sequence[Path]) -> None:
    for path in paths:
        check_seen(path, mounts, f"{path} is")


def check_links(paths: Sequence[Path], mounts: Sequence[Path]) -> None:
    """The same for the files of a model that are links, as those of a download may be."""
    for path in paths:
        files: list[str] = []
        with contextlib.suppress(OSError), os.scandir(real(str(path))) as found:
            read = (each for each in found if each.name.endswith(READ_BY_ENGINES))
            files = [each.path for each in read if each.is_symlink() and each.is_file()]
        for file in map(Path, files):
            by_name = os.path.isabs(os.readlink(file))  # noqa: PTH115, PTH117
            what = f"{file} leads to {led_to(file)}, which is"
            check_seen(led_to(file), mounts, what, by_name=by_name)


def check_seen(path: Path, mounts: Sequence[Path], what: str, *, by_name: bool = True) -> None:
    # Both name and target have to be: a link from outside does not exist inside.
    called = not by_name or any(path.is_relative_to(m) for m in mounts)
    if not (called and any(path.resolve().is_relative_to(m.resolve()) for m in mounts)):
        these = ", ".join(map(str, mounts)) + (" are" if mounts[1:] else " is")
        hint = "move it into one of them, or mount its directory with --container-mount"
        die(f"{what} not mounted into the container; only {these}", hint=hint)


def make_plan(
    args: argparse.Namespace, place: Place, found: Image, engine_name: str, *replicas: Replica
) -> Plan:
    user = user_name()
    none = Plan(place, args.runtime, engine_name, "", (), (), "", False, user, replicas)
    if not found.tag:  # the runtime has no image
        return none
    caches = find_caches(os.environ, engine(engine_name))
    paths = paths_of(none)
    elsewhere = place.slurm  # the nodes may have what the launcher's machine lacks
    cached = [Path(path) for _, path in caches]
    cached += leading_out(cached, [replica.model for replica in replicas])
    mounts = find_mounts(args, cached, paths, elsewhere=elsewhere)
    check_mounted(paths, mounts)
    cwd = Path.cwd()
    seen = str(cwd) if any(cwd.is_relative_to(mount) for mount in mounts) else ""
    privileged, names = setting("PRIVILEGED") == "1", tuple(map(str, mounts))
    say_unmounted(os.environ, mounts)
    whole = replace(none, tag=found.tag, mounts=names, caches=caches, cwd=seen)
    return replace(whole, privileged=privileged)


def release_known(found: Image, engine_name: str) -> str:
    """Engine and version without asking a node: the engine's setting, else the sidecar's word."""
    served = engine(engine_name)
    given = setting(served.VERSION) if served.VERSION else ""
    return f"{served.PACKAGE} {given}" if given else found.release


def settled(plan: Plan, releases: Mapping[str, str]) -> Plan:
    """The plan for the engine that each node holds; Failure if that engine would refuse it."""
    held = {release: node for node, release in releases.items() if release}
    if len(held) > 1:
        each = ", ".join(f"{node} {release}" for release, node in held.items())
        die(f"the nodes hold different engines: {each}", hint="--force, with a tarball or registry")
    release = next(iter(held), "")
    name, _, version = release.partition(" ")
    if release and name != plan.engine.PACKAGE:
        where = "the image holds" if plan.tag else "the nodes have"
        other = "give another --image" if plan.tag else "put another one into their PATH"
        named = [f"--engine {each}, or" for each in NAMES if name == engine(each).PACKAGE]
        what = f"{where} {release}, not {plan.engine.TITLE}"
        die(what, hint=" ".join([*named, other]))
    settle = cache(lambda args: plan.engine.settle(args, version))  # it has things to say, once
    return replace(
        plan, release=release, replicas=tuple(settle_one(each, settle) for each in plan.replicas)
    )


def settle_one(replica: Replica, settle: Callable[[tuple[str, ...]], list[str]]) -> Replica:
    """Settle what the replicas of a fleet have in common: all but their ports."""
    if not replica.label:
        return replace(replica, args=tuple(settle(replica.args)))
    return on_port(replace(replica, args=tuple(settle(tuple(without(replica.args, "--port"))))))


def on_port(replica: Replica) -> Replica:
    """The replica with the arguments that give it its port."""
    args = (*without(replica.args, "--port"), "--port", str(replica.port))
    return replace(replica, args=args)


def paths_of(plan: Plan) -> list[Path]:
    """The files that its servers read."""
    each = (local_paths(one.model, plan.engine.config_of(one.args)) for one in plan.replicas)
    return list(dict.fromkeys(path for paths in each for path in paths))


def wanted_of(
    plan: Plan, found: Image, world: int = 0, replicas: str = "1", *, front: bool = True
) -> Wanted:
    """What the nodes need to have; `plan` has yet to be laid over them."""
    head = plan.replicas[0]
    program = plan.command(head)[0]
    made = tuple(path for _, path in plan.caches)  # if they are missing
    seen = [mount for mount in plan.mounts if mount not in made]
    paths = (*seen, *map(str, paths_of(plan)))
    ask = plan.release is None
    what = plan.runtime, found, head.port, head.gpus, program, paths, world
    whole = Wanted(*what, made=made, ask_release=ask)
    if replicas == "1":
        return whole
    count = MOST if replicas == "auto" else min(int(replicas), MOST)
    ports = range(head.port + 1, head.port + 1 + count)
    return replace(whole, port=head.port if front else 0, replicas=replicas, ports=tuple(ports))
