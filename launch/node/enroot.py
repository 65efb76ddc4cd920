"""What a node has and lacks for steps of pyxis: the image's file, and enroot, which unpacks it."""

from __future__ import annotations

import re
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob

from launch.node.base import ask
from launch.node.facts import Question, Survey, free_bytes
from launch.node.messages import Facts
from launch.node.squashfs import release_in, which, why_not

HOOK = "/etc/enroot/hooks.d/*nvidia*"  # if this is there, no container starts without its tool
SHARED = "nfs nfs4 lustre gpfs beegfs ceph fuse.ceph wekafs".split()  # file systems of many nodes


@dataclass
class SurveyEnroot(Survey):
    """Tell what this node has for steps of pyxis, whose image is the file `tag`."""

    def look(self, facts: Facts, _: Sequence[Question]) -> None:
        enroot = which("enroot")
        facts.enroot = ask(enroot, "version")[1] if enroot else ""
        facts.no_image = why_not(self.tag)
        facts.image = "" if facts.no_image else self.tag
        facts.toolkit = not glob(HOOK) or bool(which("nvidia-container-cli"))
        facts.memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        said = ask(enroot, "info")[1] if enroot else ""
        if found := re.search(r"^ *ENROOT_DATA_PATH +(/.*\S)", said, re.M):
            facts.data, facts.free = found[1], free_bytes(found[1])
            facts.data_shared = is_shared(found[1])
        if self.packages and facts.image:
            facts.release = release_in(self.tag, self.packages)


def is_shared(path: str, table: str = "/proc/mounts") -> bool:
    """Whether other nodes have it, too, by the deepest mount that holds the path."""
    with open(table, errors="replace") as file:
        mounts = [line.split()[1:3] for line in file]
    above = [each for each in mounts if f"{path}/".startswith(f"{each[0].rstrip('/')}/")]
    return max(above, key=lambda each: len(each[0]), default=["", ""])[1] in SHARED
