"""A real Slurm + Docker cluster on one machine, in network namespaces; it leaves no trace.

Every node has its own host name, address, process table, /dev, /tmp and /run, its own slurmd and
its own dockerd. One more machine, `ctl`, plays the login node: slurmctld and the tests' commands
run there. /fsx is the file system that all of them share.

    python -m tests.cluster.cluster                    # a shell on ctl; the cluster ends with it
    python -m tests.cluster.cluster -n 4 -- sinfo -N   # one command

Needs root. Debian packages that are missing are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import http.client
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import packages
from tests.waiting import comes_true

ROOT = Path(__file__).resolve().parents[2]
SUBNET = "10.77.0"
REGISTRY = f"{SUBNET}.1:5000"
CLONE_NEWNS = 0x20000
GPUS_PER_NODE = 8
CPUS_PER_NODE = 16
PATIENCE = 120.0  # seconds that anything may take on a machine that is busy with something else

# Debian's own programs only: others may be clients of another version.
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

SLURM_CONF = """\
ClusterName=test
SlurmctldHost=ctl
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge.socket
StateSaveLocation={state}/slurmctld
SlurmctldPidFile={state}/slurmctld.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdPidFile=/run/slurmd.pid
SlurmdSpoolDir=/run/slurmd
SlurmdLogFile={state}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=30
MpiDefault=none
NodeName={names} CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=DEFAULT MaxTime=INFINITE OverSubscribe=YES:4 State=UP
PartitionName=first Nodes={first} Default=YES
PartitionName=all Nodes=ALL
"""

# The real NVIDIA hook would put the driver into the container; here it only has to exist.
GPU_HOOK = """\
#!/bin/sh
cat >/dev/null
exit 0
"""

# If we may not raise limits (no CAP_SYS_RESOURCE), `--ulimit memlock=-1` fails in runc. This
# runtime lowers that limit to what the machine has, and is runc otherwise.
CLAMPED_RUNC = """\
#!/bin/sh
for word; do
  case $before in
    --bundle) sed -Ei '{clamp}' "$word/config.json" || exit 1 ;;
    --process) sed -Ei '{clamp}' "$word" || exit 1 ;;
  esac
  before=$word
done
exec /usr/sbin/runc "$@"
"""

# dockerd runs this in place of containerd, whose garbage collector waits 50 times as long as it
# works. With little to collect it would run 400 times a second on each node.
CALM_CONTAINERD = """\
#!/bin/sh
printf '\\n[plugins.scheduler]\\npause_threshold = 0.0001\\n' >>"$2"
exec /usr/bin/containerd "$@"
"""

# Parts of Debian that no test needs in an image; the last one lacks a library until configured.
LEFT_OUT = (
    "usr/share/doc usr/share/locale usr/share/man usr/share/X11 usr/share/perl* usr/lib/*/perl* "
    "usr/lib/*/gconv usr/lib/apt usr/lib/python3*/pydoc_data usr/lib/python3*/test "
    "usr/lib/python3*/lib2to3 var/cache var/lib/apt var/lib/dpkg "
    "usr/lib/*/openmpi/lib/openmpi3/mca_mtl_psm.so"
).split()

# Sets up what a node has to itself. The holder runs this, then waits: the node lives as long as it
# does, and it reaps orphans, as any machine's first process does.
NODE_SETUP = """\
set -e
hostname "$1"
mkdir -p "$2/nodes/$1/checkout"
mount --bind "$4" "$2/nodes/$1/checkout"  # it may lie below /tmp
mount -t tmpfs -o mode=1777 tmpfs /tmp
mkdir -p "$4"
mount --move "$2/nodes/$1/checkout" "$4"
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /run/slurmd
mount --bind "$2/etc/hosts" /etc/hosts
mount --bind "$2/etc/slurm" /etc/slurm
if [ "$3" -gt 0 ]; then
  mkdir /run/dev && cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty /run/dev
  mount -t tmpfs -o mode=755 tmpfs /dev
  cp -a /run/dev/. /dev && rm -r /run/dev
  mkdir /dev/pts /dev/shm /dev/mqueue /dev/infiniband
  mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts /dev/pts
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  ln -s pts/ptmx /dev/ptmx
  ln -s /proc/self/fd /dev/fd; ln -s fd/0 /dev/stdin; ln -s fd/1 /dev/stdout; ln -s fd/2 /dev/stderr
  for i in $(seq 0 $(($3 - 1))); do mknod -m 666 "/dev/nvidia$i" c 1 3; done
  for i in 0 1 2 3; do mknod -m 666 "/dev/infiniband/uverbs$i" c 1 3; done
  mknod -m 666 /dev/gdrdrv c 1 3
fi
: >"$2/nodes/$1/ready"
sleep infinity & wait
"""


class ClusterError(RuntimeError):
    """The cluster could not be brought up; the message says which part and why."""


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
    """Poll `condition` until it is true; ClusterError naming `what` after `seconds`."""
    if not comes_true(condition, seconds):
        raise ClusterError(f"{what}: not within {seconds:g} s")


def clamp() -> str:
    """The sed program that lowers a container's limit; '' if we may raise limits."""
    status = Path("/proc/self/status").read_text()
    if int(status.partition("CapBnd:")[2].split()[0], 16) >> 24 & 1:
        return ""
    if (most := resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]) == resource.RLIM_INFINITY:
        return ""
    lower = rf's/("RLIMIT_MEMLOCK","hard":)[0-9]+,"soft":[0-9]+/\1{most},"soft":{most}/'
    return f'{lower}; s/"CAP_SYS_RESOURCE",//g; s/,"CAP_SYS_RESOURCE"//g'


def why_not() -> str | None:
    """Why no cluster can be made on this machine; None if one can."""
    if os.geteuid() != 0:
        return "needs root (network namespaces, dockerd)"
    if not shutil.which("apt-get"):
        return "needs Debian (its Slurm, Docker and mmdebstrap packages)"
    return None


def root_tarball() -> Path:
    """A minimal Debian with Python, MPI and the simulator's libraries as a tarball; made once, kept
    in the user's cache."""
    include = "bash,dash,coreutils,findutils,grep,sed,hostname,curl,"
    include += "python3,python3-mpi4py,openmpi-bin,libpmix2"
    extra = (ROOT / "pyproject.toml").read_text().partition("\nsimulator = [")[2]
    libraries = ["PyYAML>=6.0", *re.findall(r'^    "([^"]+)",', extra.partition("\n]")[0], re.M)]
    key = hashlib.sha256(f"bookworm {include} {libraries} 6".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tensorrt-llm-serve"
    tarball = cache / f"rootfs-{key}.tar"
    if not tarball.exists():
        with packages.alone():  # another cluster's process may be making it
            _make_tarball(tarball, include, libraries)
    return tarball


def _make_tarball(tarball: Path, include: str, libraries: Sequence[str]) -> None:
    if tarball.exists():
        return
    tarball.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="rootfs-") as tmp:
        _unpack_debian(Path(tmp) / "root", include)
        _install_libraries(Path(tmp) / "root", libraries)
        part = tarball.with_suffix(".part")
        _slim(Path(tmp) / "root")
        _run("tar", "-C", f"{tmp}/root", "-cf", str(part), ".")
        part.rename(tarball)


def _unpack_debian(root: Path, include: str) -> None:
    """Unpack packages and what they depend on, without running their scripts, which takes minutes.
    The little that we need of those is done here."""
    _run("mmdebstrap", "--mode=root", "--variant=extract", f"--include={include}", "bookworm",
         str(root))  # fmt: skip
    _run("rm", "-r", *(str(found) for path in LEFT_OUT for found in root.glob(path)))
    Path(root, "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
    Path(root, "etc/group").write_text("root:x:0:\n")
    Path(root, "etc/nsswitch.conf").write_text("hosts: files dns\n")
    _run("ldconfig", "-r", str(root))


def _install_libraries(root: Path, libraries: Sequence[str]) -> None:
    """Install wheels for Debian's Python, compiled, as a container has nowhere to keep bytecode. Of
    openai's 20 MB only the types that the simulator reads are installed."""
    target, scratch = root / "usr/local/lib/python3.11/dist-packages", root / "tmp/openai"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile",
           "--python-version", "3.11", "--only-binary=:all:"]  # fmt: skip
    openai = [wanted for wanted in libraries if wanted.startswith("openai")]
    others = [wanted for wanted in libraries if wanted not in openai]
    _run(*pip, "--target", str(target), *others)
    (target / "openai/types").mkdir(parents=True)
    _run(*pip, "--target", str(scratch), "--no-deps", *openai)
    shutil.move(scratch / "openai/types/chat", target / "openai/types/chat")
    (target / "openai/__init__.py").touch()
    shutil.rmtree(scratch)
    compiled = (str(path).removeprefix(str(root)) for path in root.glob("usr/**/lib/python3*"))
    _run("chroot", str(root), "python3", "-m", "compileall", "-q", *compiled)


def _slim(root: Path) -> None:
    """Shrink the image, as every test that loads it unpacks all of it: no debugging symbols, and an
    empty table in place of 31 MB of Unicode data, which libxml2 links and nobody uses."""
    _run("strip", *map(str, root.glob("usr/local/lib/python3*/dist-packages/**/*.so")))
    for library in root.glob("usr/lib/*/libicudata.so.*.*"):
        name, version = library.name.rpartition(".")[0], library.name.split(".")[2]
        table = Path(root, "tmp/table.c")
        table.write_text(f"const char icudt{version}_dat[64];\n")
        _run("gcc", "-shared", "-nostdlib", f"-Wl,-soname={name}", "-o", str(library), str(table))
        table.unlink()


def _run(*command: str) -> None:
    # Bytecode goes beside its source, wherever our own Python keeps it.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, text=True, capture_output=True, env=env)
    if done.returncode:
        raise ClusterError(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")


@dataclass
class Machine:
    """One host of the cluster: namespaces held open by a sleeping process."""

    name: str
    address: str
    holder: subprocess.Popen[bytes]
    namespaces: tuple[str, ...]
    state: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def argv(self, command: Sequence[str], cwd: str = "/fsx") -> list[str]:
        """The command line that runs `command` on this machine."""
        enter = ["nsenter", f"--target={self.pid}", *self.namespaces, f"--wdns={cwd}"]
        return [*enter, "--", *command]

    @property
    def pid(self) -> int:
        """The sleeping process, inside the namespaces (the child of a forking unshare)."""
        if "--pid" not in self.namespaces:
            return self.holder.pid
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children")
        return int(children.read_text().split()[0])

    def environment(self) -> dict[str, str]:
        return {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb"}

    def popen(
        self, *command: str, cwd: str = "/fsx", env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        return subprocess.Popen(
            self.argv(command, cwd), env={**self.environment(), **(env or {})}, **options
        )

    def run(
        self,
        *command: str,
        cwd: str = "/fsx",
        env: dict[str, str] | None = None,
        check: bool = True,
        timeout: float = PATIENCE,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command here to its end; its output is captured as text."""
        options.setdefault("stdin", subprocess.DEVNULL)
        done = subprocess.run(
            self.argv(command, cwd),
            env={**self.environment(), **(env or {})},
            text=True,
            capture_output=True,
            timeout=timeout,
            **options,
        )
        if check and done.returncode:
            raise ClusterError(f"{self.name}: {command} -> {done.returncode}\n{done.stderr}")
        return done

    def start(self, name: str, *command: str, env: dict[str, str] | None = None) -> None:
        """Start a daemon; its output goes to a file of the state directory."""
        log = (self.state / f"{name}-{self.name}.out").open("ab")
        with log:
            self.daemons[name] = self.popen(
                "setpriv",
                "--pdeathsig=KILL",
                *command,
                cwd="/",
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def stop(self, name: str, signum: int = signal.SIGTERM) -> None:
        """Signal a daemon of ours through its pid in our namespace, and wait for it."""
        daemon = self.daemons.pop(name)
        children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
        for pid in map(int, children if "--pid" in self.namespaces else [daemon.pid]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        # If it was stopped (SIGSTOP), its nsenter was stopped with it and has to be woken, too.
        daemon.send_signal(signal.SIGCONT)
        try:
            daemon.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    @property
    def root(self) -> Path:
        """Its files, as a process there sees them."""
        return Path(f"/proc/{self.pid}/root")

    def processes(self) -> dict[int, str]:
        """The command line of each process by its number there; the dead are left out."""
        found = {}
        for path in self.root.glob("proc/[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if line := path.read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                    found[int(path.parent.name)] = line.strip()
        return found

    def docker_says(self, path: str) -> Any:
        """Its Docker's answer to a GET; starting a client for that takes ten times as long."""
        connection = http.client.HTTPConnection("docker")
        connection.sock = socket.socket(socket.AF_UNIX)
        try:
            connection.sock.settimeout(PATIENCE)
            connection.sock.connect(str(self.root / "run/docker.sock"))
            connection.request("GET", path)
            return json.load(connection.getresponse())
        except OSError as error:
            raise ClusterError(f"{self.name}: Docker does not answer: {error}") from None
        finally:
            connection.close()

    def docker(self, *command: str, **options: Any) -> str:
        return self.run("docker", *command, **options).stdout.strip()

    def start_dockerd(self, data_root: str | None = None) -> None:
        """Start this node's Docker daemon and wait until it answers."""
        self.begin_dockerd(data_root)
        self.await_dockerd()

    def begin_dockerd(self, data_root: str | None = None) -> None:
        data_root = data_root or str(self.state / "nodes" / self.name / "docker")
        self.start(
            "dockerd",
            "dockerd",
            "--iptables=false",
            "--bridge=none",
            "--live-restore",
            f"--data-root={data_root}",
            "--exec-root=/run/docker",
            "--pidfile=/run/docker.pid",
            "--host=unix:///run/docker.sock",
            f"--insecure-registry={REGISTRY}",
            f"--add-runtime=clamped={self.state}/bin/clamped-runc",
            "--default-runtime=clamped",
            env={"PATH": f"{self.state}/bin:{PATH}"},
        )

    def await_dockerd(self) -> None:
        wait_until(
            lambda: self.run("docker", "version", check=False).returncode == 0,
            f"dockerd on {self.name}",
        )

    @property
    def slurmd_log(self) -> Path:
        return self.state / f"slurmd-{self.name}.log"

    def start_slurmd(self) -> None:
        env = {"PATH": f"{self.state}/bin:{PATH}"}
        self.start("slurmd", "slurmd", "-D", "-N", self.name, env=env)


class Cluster:
    """`with Cluster(2) as cluster:`; `cluster.ctl` is the login node, `cluster.nodes` the rest.

    Jobs that name no partition get the first `default` nodes (None: all); the partition `all` has
    every node. `in_memory` puts all files on a tmpfs: no slow disk, and nothing to tidy up.
    """

    def __init__(
        self,
        nodes: int = 2,
        gpus: int = GPUS_PER_NODE,
        default: int | None = None,
        in_memory: bool = False,
    ) -> None:
        self.gpus, self.default, self.in_memory = gpus, default, in_memory
        self.names = [f"n{i}" for i in range(1, nodes + 1)]
        self.nodes: dict[str, Machine] = {}
        self.made_fsx = False
        self.lock = -1

    def __enter__(self) -> Cluster:
        # If a script starts us in the background, SIGINT is ignored, and launches inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        packages.install(packages.CLUSTER)
        with packages.alone():
            sweep()
            self.state = Path(tempfile.mkdtemp(prefix="trtllm-cluster-", dir="/var/tmp"))
            self.lock = take_lock(self.state)
        try:
            self._share()
            self._files()
            self._pyxis()
            self._machines()
            self._daemons()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _files(self) -> None:
        for name in ("bin", "etc/slurm", "slurmctld"):
            (self.state / name).mkdir(parents=True)
        addresses = {"ctl": 1} | {name: 10 + i for i, name in enumerate(self.names, 1)}
        self.addresses = {name: f"{SUBNET}.{last}" for name, last in addresses.items()}
        hosts = [f"{ip} {name}\n" for name, ip in self.addresses.items()]
        (self.state / "etc/hosts").write_text("127.0.0.1 localhost\n" + "".join(hosts))
        slurm_conf = SLURM_CONF.format(
            state=self.state,
            names=",".join(self.names),
            first=",".join(self.names[: self.default]),
            cpus=CPUS_PER_NODE,
            gpus=self.gpus,
        )
        (self.state / "etc/slurm/slurm.conf").write_text(slurm_conf)
        devices = ",".join(f"/dev/nvidia{i}" for i in range(self.gpus))
        gres = f"NodeName={','.join(self.names)} Name=gpu File={devices}\n"
        (self.state / "etc/slurm/gres.conf").write_text(gres)
        (self.state / "munge.key").write_bytes(os.urandom(128))
        (self.state / "munge.key").chmod(0o400)
        for name, text in {
            "nvidia-container-runtime-hook": GPU_HOOK,
            "nvidia-container-cli": GPU_HOOK,
            "clamped-runc": CLAMPED_RUNC,
            "containerd": CALM_CONTAINERD,
        }.items():
            (self.state / "bin" / name).write_text(text.replace("{clamp}", clamp()))
            (self.state / "bin" / name).chmod(0o755)

    def _pyxis(self) -> None:
        """Slurm's plug-in for steps in containers: a stand-in, or the one that PYXIS_SO names."""
        library = os.environ.get("PYXIS_SO") or str(self.state / "spank_pyxis.so")
        if not os.environ.get("PYXIS_SO"):
            source = Path(__file__).with_name("spank_pyxis.c")
            _run("gcc", "-shared", "-fPIC", "-O1", "-Wall", "-o", library, str(source))
        (self.state / "etc/slurm/plugstack.conf").write_text(f"required {library}\n")

    def _share(self) -> None:
        """/fsx, in a mount namespace of this process; the machines inherit it."""
        with contextlib.suppress(FileExistsError):  # another cluster may make it at the same time
            Path("/fsx").mkdir()
            self.made_fsx = True
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
            raise ClusterError(f"unshare: {os.strerror(ctypes.get_errno())}")
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        if self.in_memory:
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(self.state)], check=True)
        (self.state / "fsx").mkdir()
        subprocess.run(["mount", "--bind", f"{self.state}/fsx", "/fsx"], check=True)

    def _machines(self) -> None:
        self.ctl = self._machine("ctl", ("--net", "--mount", "--uts"), gpus=0)
        switch = ["ip", "link", "add", "br0", "type", "bridge"]
        self.ctl.run(*switch)
        self.ctl.run("ip", "addr", "add", f"{self.ctl.address}/24", "dev", "br0")
        self.ctl.run("ip", "link", "set", "br0", "up")
        self.ctl.run("ip", "link", "set", "lo", "up")
        for name in self.names:
            node = self._machine(name, ("--net", "--mount", "--uts", "--pid"), self.gpus)
            self.nodes[name] = node
            self._plug_in(node)

    def _machine(self, name: str, namespaces: tuple[str, ...], gpus: int) -> Machine:
        # A node is a process tree of its own: killing its first process ends all of it. The login
        # node is not, so that a signal sent to a command there reaches the command itself.
        forked = ["--fork", "--kill-child", "--mount-proc"] if "--pid" in namespaces else []
        holder = subprocess.Popen(
            [
                "setpriv",
                "--pdeathsig=KILL",
                "unshare",
                *namespaces,
                *forked,
                "--propagation=private",
                "bash",
                "-c",
                NODE_SETUP,
                "setup",
                name,
                str(self.state),
                str(gpus),
                str(ROOT),
            ],
            stdin=subprocess.DEVNULL,
        )
        machine = Machine(name, self.addresses[name], holder, namespaces, self.state)
        ready = self.state / "nodes" / name / "ready"
        wait_until(lambda: ready.exists() or holder.poll() is not None, f"machine {name}")
        if holder.poll() is not None:
            raise ClusterError(f"machine {name} could not be set up")
        return machine

    def _plug_in(self, node: Machine) -> None:
        peer = ["peer", "name", "eth0", "netns", str(node.pid)]
        self.ctl.run("ip", "link", "add", f"to-{node.name}", "type", "veth", *peer)
        self.ctl.run("ip", "link", "set", f"to-{node.name}", "master", "br0", "up")
        node.run("ip", "addr", "add", f"{node.address}/24", "dev", "eth0")
        node.run("ip", "link", "set", "eth0", "up")
        node.run("ip", "link", "set", "lo", "up")
        node.run("ip", "route", "add", "default", "via", self.ctl.address)

    def _daemons(self) -> None:
        self.ctl.start(
            "munged",
            "munged",
            "--foreground",
            "--force",
            f"--key-file={self.state}/munge.key",
            f"--socket={self.state}/munge.socket",
            f"--pid-file={self.state}/munge.pid",
            f"--log-file={self.state}/munge.log",
            f"--seed-file={self.state}/munge.seed",
        )
        wait_until((self.state / "munge.socket").exists, "munged")
        self.ctl.start("slurmctld", "slurmctld", "-D")
        for node in self.nodes.values():
            node.start_slurmd()
            node.begin_dockerd()
        for node in self.nodes.values():
            node.await_dockerd()
        wait_until(self.idle, "all nodes idle")

    def idle(self) -> bool:
        """Whether all nodes are idle."""
        states = self.ctl.run("sinfo", "-hN", "-o", "%t", check=False).stdout.split()
        return set(states) == {"idle"}

    def ends_now(self, job: str) -> None:
        """End a job's time now; tried again, as Slurm refuses a second that is over by then."""
        update = ["scontrol", "update", f"JobId={job}", "EndTime=now"]
        wait_until(lambda: self.ctl.run(*update, check=False).returncode == 0, f"end of job {job}")

    def close(self) -> None:
        """End every process, then remove every file. Mounts and links end with their namespaces."""
        with ThreadPoolExecutor() as pool, contextlib.suppress(Exception):  # the rest has to go on
            list(pool.map(remove_containers, self.nodes.values()))
        machines = [*self.nodes.values(), *([self.ctl] if hasattr(self, "ctl") else [])]
        for pid in processes_in_network_of([m.holder.pid for m in machines]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for machine in machines:
            machine.holder.kill()
            machine.holder.wait()
            for daemon in machine.daemons.values():
                daemon.wait()
        subprocess.run(["umount", "--lazy", "/fsx", str(self.state)], capture_output=True)
        shutil.rmtree(self.state, ignore_errors=True)
        os.close(self.lock)
        # If another cluster has its own mounted there, that needs the directory.
        if self.made_fsx and not list(self.state.parent.glob("trtllm-cluster-*")):
            with contextlib.suppress(OSError):
                Path("/fsx").rmdir()


def remove_containers(node: Machine) -> None:
    """Remove a node's containers, so that their mounts are released, then end its dockerd."""
    if node.holder.poll() is None and "dockerd" in node.daemons:
        containers = node.run("docker", "ps", "-aq", check=False).stdout.split()
        if containers:
            node.run("docker", "rm", "-f", *containers, check=False)
        node.stop("dockerd", signal.SIGKILL)


def take_lock(state: Path) -> int:
    """Lock a state directory while we use it; the kernel drops the lock when we die."""
    descriptor = os.open(state / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def sweep() -> None:
    """Remove what clusters have left whose process was killed."""
    for state in Path("/var/tmp").glob("trtllm-cluster-*"):
        with contextlib.suppress(OSError):
            os.close(take_lock(state))
            shutil.rmtree(state, ignore_errors=True)


def copy_repository(source: Path, target: Path) -> None:
    """Copy what git knows of a checkout, as a clone would, and link our virtual environment."""
    names = subprocess.run(
        ["git", "-C", str(source), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, names.split("\0")):
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)
    (target / ".venv").symlink_to(sys.prefix)


def build_image(
    node: Machine,
    simulator: Path,
    tag: str,
    version: str = "1",
    ballast_mb: int = 0,
    engine: str = "1.1.0",
) -> None:
    """Build an image with the simulator in place of the engine; `version` makes it a new one."""
    if not node.run("docker", "image", "inspect", "base:1", check=False).stdout.strip("[]\n"):
        path = f"ENV PATH=/opt/simulator:{PATH}"
        node.docker("import", "--change", path, str(root_tarball()), "base:1")
    with tempfile.TemporaryDirectory(dir=node.state) as context:
        shutil.copytree(simulator, Path(context, "simulator"))
        # NVIDIA's benchmark client, in name and flags, beside the engine.
        shutil.copytree(simulator.parent / "tests/stand_in", Path(context, "simulator/stand_in"))
        _run("/usr/bin/python3", "-m", "compileall", "-q", context)  # Debian's, as in the image
        # Python's record of an installed package.
        package = Path(context, f"simulator/stand_in/tensorrt_llm-{engine}.dist-info")
        package.mkdir()
        (package / "METADATA").write_text(f"Name: tensorrt_llm\nVersion: {engine}\n")
        Path(context, "Dockerfile").write_text(
            f"FROM base:1\nCOPY simulator ballast* /opt/simulator/\nENV IMAGE_VERSION={version}\n"
            f"ENV PYTHONPATH=/opt/simulator/stand_in TRTLLM_SIM_VERSION={engine}\n"
        )
        if ballast_mb:
            Path(context, "ballast").write_bytes(os.urandom(ballast_mb * 1_000_000))
        node.docker("build", "--quiet", "--tag", tag, context)


def processes_in_network_of(pids: Sequence[int]) -> Iterator[int]:
    """Every process that shares a network namespace with one of `pids`, but not with us."""
    networks = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            networks.add(Path(f"/proc/{pid}/ns/net").readlink())
    networks.discard(Path("/proc/self/ns/net").readlink())
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "ns/net").readlink() in networks:
                yield int(entry.name)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="A Slurm + Docker cluster for as long as a command runs."
    )
    parser.add_argument("-n", "--nodes", type=int, default=2)
    parser.add_argument("command", nargs="*", default=["bash"], help="runs on the login node")
    args = parser.parse_args(argv)
    if reason := why_not():
        raise SystemExit(f"cluster: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    with Cluster(args.nodes) as cluster:
        print(
            f"cluster: {args.nodes} nodes up in {time.monotonic() - started:.1f} s, "
            f"login node is process {cluster.ctl.holder.pid}",
            file=sys.stderr,
        )
        return cluster.ctl.popen(*args.command).wait()


if __name__ == "__main__":
    raise SystemExit(main())
