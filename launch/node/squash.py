"""The image of pyxis on the file system that all nodes share: imported once, or removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from dataclasses import dataclass, field

from launch.node.base import STOPPED, Ends, tell
from launch.node.images import fail, run_held
from launch.node.messages import Holds, Present, Waiting
from launch.node.squashfs import checked, release_in, why_not

OPTIONS = "-comp zstd -Xcompression-level 3 -b 1M"  # enroot's own options do not compress


@dataclass
class Import:
    """Import an image from a registry into a file that all nodes see, unless it is there already.

    Without a `reference` there is only the file. Nobody ever sees an incomplete file.
    """

    reference: str
    path: str
    packages: list[str] = field(default_factory=list)  # the engines', to tell which it holds
    ends: Ends = field(default_factory=Ends)

    def __call__(self) -> int:
        self.ends.hold()
        if self.reference and why_not(self.path):
            folder, name = os.path.split(self.path)
            if not self.has(open_to_all(f"{folder}/.{name}.lock")):
                return STOPPED
            if why_not(self.path) and (code := self.fetch()):  # still so, after the wait
                return code
        if why := why_not(self.path):
            return fail(why)
        tell(Present(self.path))
        if self.packages:
            tell(Holds(release_in(self.path, self.packages)))
        return 0

    def has(self, lock: int) -> bool:
        """Wait for our turn; False if we are to stop first. Lustre may have no locks (-o flock)."""
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if not told:
                    tell(Waiting())
                told = True
            except OSError:
                return True
            if self.ends.stop_within(0.5):
                return False

    def fetch(self) -> int:
        os.environ.setdefault("ENROOT_SQUASH_OPTIONS", OPTIONS)
        part = f"{self.path}.part"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)  # left by an import that was killed: enroot replaces no file
        try:
            code, said = run_held(self.ends, ["enroot", "import", "--output", part, self.reference])
            if code == STOPPED:
                return STOPPED
            said = said if code else checked(part)
            if said:
                return fail(f"enroot import {self.reference}: {first_error(said)}")
            os.replace(part, self.path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
        return 0


def open_to_all(path: str) -> int:
    """Open an empty file that all who may import here can lock, too, whatever our umask."""
    try:
        return os.open(path, os.O_RDWR)  # no O_CREAT: the kernel may refuse it for others' files
    except FileNotFoundError:
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
    with contextlib.suppress(OSError):
        os.fchmod(file, 0o666)
    return file


def first_error(said: str) -> str:
    """enroot's own first words on an error; the rest only follows from it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"\[ERROR\]|FATAL|curl:|.*No space left", line)]
    return (errors or lines[-1:] or ["it said nothing"])[0].replace("[ERROR] ", "")


@dataclass
class Discard:
    """Remove the file that was imported, so that it is imported anew."""

    path: str

    def __call__(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        return 0
