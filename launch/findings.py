"""What the nodes have to offer, what each told, and what is found wrong or right with it."""

import re
from dataclasses import dataclass, field

from launch.image import Image
from launch.node.messages import Container, Facts
from launch.slurm import Share


@dataclass(frozen=True)
class Finding:
    """One cell of the report. `state` is ok, note or bad; a bad one stops the launch."""

    node: str
    check: str
    state: str
    text: str
    hint: str = ""


@dataclass
class Node:
    """What one node told."""

    name: str
    facts: Facts = field(default_factory=Facts)
    containers: list[Container] = field(default_factory=list)
    share: Share | None = None  # of its GPUs; None where Slurm does not hand them out

    @property
    def gpus(self) -> int:
        """GPUs that we may use: those of the job, without Slurm all there are."""
        if self.share:
            return self.share.count
        there, visible = self.facts.gpus, len(self.facts.visible)
        return visible if there and visible else there

    def holds(self, image: Image) -> bool:
        return image.is_held(self.facts.image, self.facts.layers, self.facts.store)

    def ok(self, check: str, text: str) -> Finding:
        return Finding(self.name, check, "ok", text)

    def bad(self, check: str, text: str, hint: str) -> Finding:
        return Finding(self.name, check, "bad", text, hint)


@dataclass(frozen=True)
class Wanted:
    """What the nodes have to offer."""

    runtime: str
    image: Image
    port: int  # on the first node; 0: none there
    gpus: str  # the GPUS setting: auto, none, or docker's own words
    program: str  # the engine's
    paths: tuple[str, ...]
    world: int = 0  # the GPUs that a server needs; 0: not known, all nodes have to serve
    replicas: str = "1"  # how many servers, or auto
    ports: tuple[int, ...] = ()  # those that they may have, on any node
    probe: str = ""  # a file of the launcher's in the workspace
    made: tuple[str, ...] = ()  # directories that are made where they are missing
    ask_release: bool = False  # whether they have to tell which engine and version they have


def gpus_of(node: Node, asked: str) -> list[str]:
    """The ids of the GPUs that a fleet may use there: those asked for, the job's, or all."""
    if ids := named(asked):
        return ids
    if node.share:
        return node.share.each
    return node.facts.visible or [str(gpu) for gpu in range(node.facts.gpus)]


def named(asked: str) -> list[str]:
    """The GPUs that GPUS names by their ids; [] where it names none."""
    found = re.search(r"device=([^\"']+)", asked)
    return [gpu for gpu in found[1].split(",") if "=" not in gpu] if found else []


def number_of(asked: str) -> int | None:
    """How many GPUs of a node GPUS gives as a number; None where it gives none."""
    found = re.search(r"(?:^|count=)(\d+)", asked)
    return int(found[1]) if found else None


def usable(asked: str, there: int) -> int:
    """How many GPUs of a node's GPUS asks for."""
    if ids := named(asked):
        return len(ids)
    number = number_of(asked)
    return there if number is None else min(number, there)
