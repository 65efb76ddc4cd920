"""What a node has and lacks: GPUs, devices, the port, paths, Docker and the image."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import glob

from launch.node.base import LABEL, LISTENING, ask, read, tables_of_sockets, tell
from launch.node.messages import Container, Facts
from launch.node.release import release_here, release_of

DOCKER = ("docker", "info", "--format",
          "{{println .ServerVersion}}{{println .DriverStatus}}{{println .DockerRootDir}}"
          "{{json .Runtimes}}{{json .SecurityOptions}}")  # fmt: skip
HOOKS = ("nvidia-container-runtime-hook", "nvidia-cdi-hook")  # of the toolkit, as dockerd finds it
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
IMAGE = ("docker", "image", "inspect", "--format", "{{.Id}} {{json .RootFS.Layers}}")
LABELS = " ".join('{{.Label "%s.%s"}}' % (LABEL, name) for name in ("job", "launcher", "user"))  # noqa: UP031
OURS = ("docker", "ps", "--all", "--filter", f"label={LABEL}.job", "--format",
        "{{.ID}} {{.Names}} " + LABELS)  # fmt: skip

Question = subprocess.Popen[str]
ELSEWHERE = "198.51.100.1"  # in a network that does not exist (TEST-NET-2), to find the way out
ELSEWHERE_6 = "2001:db8::1"


@dataclass
class Survey:
    """Tell what this node has of what a launch wants."""

    runtime: str
    ports: list[int]
    tag: str
    program: str  # the engine's, for runtime bare
    paths: list[str] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)  # the engines': which is there, which version
    made: list[str] = field(default_factory=list)  # directories to be made if they are missing

    def __call__(self) -> int:
        questions = self.begin()
        facts = Facts(
            rank=int(os.environ.get("SLURM_NODEID", "0")),
            addresses=addresses(),
            network=network(),
            gpus=count_gpus(),
            visible=visible_gpus(self.runtime),
            efa=len(glob("/dev/infiniband/uverbs*")),
            gdrdrv=os.path.exists("/dev/gdrdrv"),
            taken=who_listen(self.ports),
            unseen=[path for path in self.paths if not os.access(path, os.R_OK)],
            unmade=[path for path in self.made if not can_be_made(path)],
        )
        self.look(facts, questions)
        tell(facts)
        return 0

    def begin(self) -> Sequence[Question]:
        """Start what takes longest; the rest is looked at meanwhile."""
        return ask_docker(self.tag) if self.runtime == "docker" else ()

    def look(self, facts: Facts, questions: Sequence[Question]) -> None:
        """Add what the runtime needs."""
        if self.runtime == "bare":
            facts.engine = shutil.which(self.program) or ""
        else:
            note_docker(facts, questions)
        if self.packages and facts.engine:
            facts.release = release_here(facts.engine, self.packages)
        elif self.packages and facts.image:
            facts.release = release_of(facts.image, self.packages)


def can_be_made(path: str) -> bool:
    """Whether a directory is there, or we may make it; a broken link would be in the way."""
    above = path
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    return os.path.isdir(above) and (above == path or os.access(above, os.W_OK | os.X_OK))


def addresses() -> list[str]:
    """Our addresses: towards the launcher, then towards the outside, then all others."""
    launcher = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    routed = (source_towards(there) for there in (launcher, ELSEWHERE, ELSEWHERE_6) if there)
    code, said = ask("hostname", "-I", stderr=subprocess.DEVNULL)  # small systems have none
    return list(dict.fromkeys([*filter(None, routed), *([] if code else said.split())]))


def source_towards(address: str) -> str:
    """Our address on the way to that one; '' if there is no way. Nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return str(probe.getsockname()[0])
    return ""


def network() -> str:
    """An id of the network that we are in: only from within it can its loopback be reached."""
    boot = read("/proc/sys/kernel/random/boot_id").strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"


def count_gpus() -> int:
    """Count the device files; if there are none, as in some virtual machines, ask nvidia-smi."""
    if devices := glob("/dev/nvidia[0-9]*"):
        return len(devices)
    return sum(line.startswith("GPU") for line in ask("nvidia-smi", "-L")[1].splitlines())


def visible_gpus(runtime: str) -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to an engine here; [] if it says nothing.

    A container does not see the variable.
    """
    words = os.environ.get("CUDA_VISIBLE_DEVICES", "") if runtime == "bare" else ""
    return [word.strip() for word in words.split(",") if word.strip()]


def who_listen(ports: list[int]) -> dict[str, str]:
    """The programs that listen on these ports, by port."""
    return {str(port): who_listens(port) for port in set(ports) & ports_in_use()}


def ports_in_use() -> set[int]:
    """The ports on which somebody listens."""
    rows = [line.split() for line in tables_of_sockets()]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == LISTENING}


def who_listens(port: int) -> str:
    """The program that listens on the port; '' if we may not see its name."""
    said = ask("ss", "-Hltnp", f"sport = :{port}", stderr=subprocess.DEVNULL)[1]
    return said.partition("users:((")[2].partition(")")[0]


def ask_docker(tag: str) -> Sequence[Question]:
    """Ask three questions at once: a daemon that hangs then costs the time of one."""
    if not shutil.which("docker"):
        return ()
    return [begin(command) for command in (DOCKER, (*IMAGE, tag), OURS)]


def note_docker(facts: Facts, questions: Sequence[Question]) -> None:
    if not questions:
        facts.no_docker = "docker: not found in PATH"
        return
    info, image, ours = questions
    version, *rest = [line.strip() for line in (answer(info) or "").splitlines()] or [""]
    if info.returncode or len(rest) < 2:
        said = ask("docker", "--version")[1] if info.returncode > 0 else ""
        facts.podman = said if "podman" in said.lower() else ""
        facts.no_docker = facts.podman or why_silent(info.returncode)
        end(image)
        end(ours)
        return
    facts.docker, facts.store, root = version, *rest[:2]
    facts.toolkit = has_toolkit("".join(rest[2:]))
    facts.rootless = "name=rootless" in "".join(rest[2:])
    facts.image, _, facts.layers = (answer(image) or "").strip().partition(" ")
    facts.free = free_bytes(root if facts.rootless else place_of_images(root, facts.store))
    for line in (answer(ours) or "").splitlines():
        tell(Container(*([*line.split(" ", 4), "", "", "", ""][:5])))


def has_toolkit(runtimes: str) -> bool:
    """Whether `docker run --gpus` can work; False only if nothing at all suggests it."""
    if "nvidia" in runtimes or glob("/etc/cdi/*nvidia*") + glob("/var/run/cdi/*nvidia*"):
        return True
    paths = paths_of_dockerd()
    return not paths or any(shutil.which(hook, path=path) for hook in HOOKS for path in paths)


def paths_of_dockerd() -> list[str]:
    """The PATH of each dockerd of this node; [] if we see none.

    One in another network namespace is another machine's, as in the test cluster. If we may not
    look at one, we suppose that it has what systemd gives it, or what we have.
    """
    found = []
    for name in glob("/proc/[0-9]*/comm"):
        process = os.path.dirname(name)
        try:
            if read(name).strip() != "dockerd":
                continue
            if os.readlink(f"{process}/ns/net") == os.readlink("/proc/self/ns/net"):
                pairs = read(f"{process}/environ").split("\0")
                found += [pair[5:] for pair in pairs if pair.startswith("PATH=")]
        except PermissionError:
            found.append(f"{SYSTEM_PATH}:{os.environ.get('PATH', '')}")
        except OSError:  # it has ended
            continue
    return found


def begin(command: tuple[str, ...]) -> Question:
    null = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=null, stdout=subprocess.PIPE, stderr=null, text=True)


def answer(process: Question) -> str | None:
    """What it printed; None if it failed, or did not answer within 10 s."""
    try:
        said = process.communicate(timeout=10)[0]
    except subprocess.TimeoutExpired:
        end(process)
        return None
    return said if process.returncode == 0 else None


def end(process: Question) -> None:
    process.kill()
    process.communicate()


def why_silent(code: int) -> str:
    if code < 0:
        return "no answer within 10 s"
    code, said = ask("docker", "version", "--format", "{{.Server.Version}}")
    return said or "no answer within 10 s"


def place_of_images(
    root: str,
    store: str,
    config: str = "/etc/containerd/config.toml",
    usual: str = "/var/lib/containerd",
) -> str:
    """Where images are kept: below Docker's data-root, or in containerd's, if that has the store.

    A containerd that dockerd has started itself is below the data-root, too.
    """
    if "containerd" not in store or os.path.isdir(f"{root}/containerd/daemon"):
        return root
    with contextlib.suppress(OSError):
        if found := re.search(r"^root *= *[\"']([^\"']+)", read(config), re.M):
            usual = found[1]
    return usual if os.path.isdir(usual) else root


def free_bytes(path: str) -> int:
    try:
        room = os.statvfs(path)
    except OSError:
        return 0
    return room.f_bavail * room.f_frsize
