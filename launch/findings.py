"""What is wanted of the nodes, what each node told, and what is found right or wrong with it."""

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
    share: Share | None = None  # the job's GPUs there; None if Slurm does not hand out GPUs

    @property
    def gpus(self) -> int:
        """How many GPUs we may use: the job's, or without Slurm all that are visible."""
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
    """What the nodes need to have."""

    runtime: str
    image: Image
    port: int  # on the first node; 0: none is needed
    gpus: str  # the GPUS setting: auto, none, or docker's own words
    program: str  # the engine's program
    paths: tuple[str, ...]
    world: int = 0  # how many GPUs a server needs; 0: unknown, so all nodes have to serve
    replicas: str = "1"  # how many servers, or auto
    ports: tuple[int, ...] = ()  # the ports that replicas may have, on any node
    probe: str = ""  # a file that the launcher put into the workspace
    made: tuple[str, ...] = ()  # directories that are made if they are missing
    ask_release: bool = False  # whether they tell which engine and version they have


def gpus_of(node: Node, asked: str) -> list[str]:
    """The ids of the GPUs that a fleet may use there: those asked for, the job's, or all."""
    if ids := named(asked):
        return ids
    if node.share:
        return node.share.each
    return node.facts.visible or [str(gpu) for gpu in range(node.facts.gpus)]


def named(asked: str) -> list[str]:
    """The GPUs that GPUS names by their ids; [] if it names none."""
    found = re.search(r"device=([^\"']+)", asked)
    return [gpu for gpu in found[1].split(",") if "=" not in gpu] if found else []


def number_of(asked: str) -> int | None:
    """The number of GPUs per node that GPUS gives; None if it gives no number."""
    found = re.search(r"(?:^|count=)(\d+)", asked)
    return int(found[1]) if found else None


def usable(asked: str, there: int) -> int:
    """How many of a node's `there` GPUs the setting GPUS asks for."""
    if ids := named(asked):
        return len(ids)
    number = number_of(asked)
    return there if number is None else min(number, there)
