"""The image on this node: loaded from a tarball, pulled from a registry, or removed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field

from launch.node.base import STOPPED, TYPE_CHECKING, Ends, ask, read, shell_code, tell
from launch.node.messages import Error, Holds, Kept, Present, Progress, Waiting
from launch.node.release import release_of

if TYPE_CHECKING:
    from typing import Any

PIPE_BROKE = 128 + signal.SIGPIPE  # the unpacker's, if docker load has stopped reading
LOCK = "/run"  # a directory that every user may lock and nobody has to make
UNPACKERS = {"gz": ("pigz", "gzip"), "zst": ("zstd",), "xz": ("xz",), "bz2": ("bzip2",)}


@dataclass
class Load:
    """Load a tarball, unless its image is there already; one at a time on a node."""

    tarball: str
    tag: str
    ids: list[str]  # that `docker image inspect` may show for it
    layers: str  # its diff ids, if a containerd store's id is not known
    codec: str
    size: int = 0  # of the tarball, as the launcher saw it; 0: it did not
    diff_ids: str = ""  # these, too, identify what has just been loaded
    packages: list[str] = field(default_factory=list)  # the engines', to tell which it holds
    ends: Ends = field(default_factory=Ends)

    def __call__(self) -> int:
        self.ends.hold()
        if not self.get_lock():
            return STOPPED
        if identity := self.known(self.layers):
            return present(identity, self.packages)
        try:
            source = os.open(self.tarball, os.O_RDONLY)
        except OSError as error:
            return fail(f"cannot read {self.tarball}: {error.strerror}")
        if self.size and (size := os.fstat(source).st_size) != self.size:
            theirs = f"the launcher's has {self.size} bytes, this one {size}"
            return fail(f"{self.tarball} is another file on this node: {theirs}")
        if not (unpack := unpacker(self.codec)):
            program = UNPACKERS[self.codec][-1]
            return fail(f"{program}: not found in PATH, and {self.tarball} needs it")
        return self.load(source, unpack)

    def get_lock(self) -> bool:
        """Wait for our turn; False when we are to stop first."""
        lock = os.open(LOCK, os.O_RDONLY)
        told = False
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            if not told:
                tell(Waiting())
            told = True
            if self.ends.stop_within(0.1):
                return False

    def known(self, layers: str) -> str:
        """The image's id, if the node has it; '' if it has none, or another by our tag.

        A containerd store may call it by an id that nobody told us: then its layers tell.
        """
        form = "{{.Id}} {{json .RootFS.Layers}}"
        code, said = ask("docker", "image", "inspect", "--format", form, self.tag)
        identity, _, theirs = said.partition(" ")
        if code or identity in self.ids:
            return "" if code else identity
        if not layers or theirs != layers:
            return ""
        store = ask("docker", "info", "--format", "{{.DriverStatus}}")[1]
        return identity if "containerd" in store else ""

    def load(self, source: int, unpack: list[str]) -> int:
        """Unpack into docker load, tell the progress, and check that the image came out of it.

        The unpacker shares our open file: the offset of that file is the progress.
        """
        with tempfile.TemporaryFile() as words:
            first = begin(unpack, stdin=source, stdout=subprocess.PIPE, stderr=words)
            second = begin(["docker", "load"], stdin=first.stdout, stdout=words, stderr=words)
            assert first.stdout
            first.stdout.close()
            self.ends.after(second)
            if not self.wait(source):
                kill(first, second)
                return STOPPED
            unpacked, loaded = shell_code(first.wait()), shell_code(second.wait())
            words.seek(0)
            said = words.read().decode(errors="replace").strip()
        if unpacked not in (0, PIPE_BROKE):
            return fail(f"{self.tarball} is truncated or corrupt: {said}")
        if loaded:
            return fail(f"docker load: {said}")
        if identity := self.known(self.diff_ids or self.layers):
            return present(identity, self.packages)
        return fail(f"the tarball was loaded, but {self.tag} is not the image that it should hold")

    def wait(self, source: int) -> bool:
        """Tell the progress once a second until docker load ends; False when we are to stop."""
        while True:
            try:
                return bool(self.ends.events.get(timeout=1) != Ends.STOP)
            except queue.Empty:
                tell(Progress(os.lseek(source, 0, os.SEEK_CUR)))


def present(identity: str, packages: list[str]) -> int:
    tell(Present(identity))
    if packages:
        tell(Holds(release_of(identity, packages)))
    return 0


def fail(why: str) -> int:
    tell(Error(why))
    return 1


def unpacker(codec: str) -> list[str]:
    """The command that unpacks from its input to its output; [] if the node has none."""
    if codec not in UNPACKERS:
        return ["cat"]
    found = next((name for name in UNPACKERS[codec] if shutil.which(name)), None)
    return [found, "-dc"] if found else []


def begin(command: list[str], **options: Any) -> subprocess.Popen[bytes]:  # noqa: ANN401
    """Start a process in a session of its own, to be killed with all that it has started."""
    return subprocess.Popen(command, start_new_session=True, **options)


def kill(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@dataclass
class Pull:
    """Pull from a registry. With a `login`, the password follows the order, on a line of its own.

    The login is kept in a temporary directory, which is removed when we end.
    """

    reference: str
    login: str = ""  # the registry to log in to, as AWS
    packages: list[str] = field(default_factory=list)

    def __call__(self) -> int:
        password = sys.stdin.buffer.readline().rstrip(b"\n") if self.login else b""
        ends = Ends()
        ends.hold()
        with tempfile.TemporaryDirectory() as config:
            return self.pull(ends, config, password)

    def pull(self, ends: Ends, config: str, password: bytes) -> int:
        if self.login:
            borrow(config)
            os.environ["DOCKER_CONFIG"] = config
            command = ["docker", "login", "--username", "AWS", "--password-stdin", self.login]
            code, said = run_held(ends, command, password)
            if code:
                return stopped_or(code, f"docker login {self.login}: {said}")
        code, said = run_held(ends, ["docker", "pull", "--quiet", self.reference])
        if code:
            return stopped_or(code, f"docker pull {self.reference}: {said}")
        inspect = ["docker", "image", "inspect", "--format", "{{.Id}}", self.reference]
        return present(ask(*inspect)[1], self.packages)


def borrow(config: str) -> None:
    """Link what leads to the daemon (contexts, certificates) from the user's Docker directory."""
    theirs = os.path.abspath(os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker"))
    with contextlib.suppress(OSError):
        for name in {*os.listdir(theirs)} - {"config.json"}:
            os.symlink(f"{theirs}/{name}", f"{config}/{name}")
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        current = json.loads(read(f"{theirs}/config.json"))["currentContext"]
        with open(f"{config}/config.json", "w") as file:
            json.dump({"currentContext": current}, file)


def stopped_or(code: int, why: str) -> int:
    return STOPPED if code == STOPPED else fail(why)


def run_held(ends: Ends, command: list[str], text: bytes = b"") -> tuple[int, str]:
    """Exit code and output of a command; it is killed when we are to stop, with code STOPPED."""
    with tempfile.TemporaryFile() as words:
        process = begin(command, stdin=subprocess.PIPE, stdout=words, stderr=words)
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(text)
            process.stdin.close()
        code = ends.code_of(process)
        if code is None:
            kill(process)
            return STOPPED, ""
        words.seek(0)
        return code, words.read().decode(errors="replace").strip()


@dataclass
class Forget:
    """Take the tag off this node, so that it is loaded afresh; tell if that cannot be done."""

    tag: str

    def __call__(self) -> int:
        if ask("docker", "image", "inspect", self.tag)[0]:
            return 0
        code, said = ask("docker", "image", "rm", self.tag, timeout=60)
        if code:
            tell(Kept(said))
        return 0
