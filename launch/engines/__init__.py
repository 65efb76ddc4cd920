"""Engines: a file each, with the names of `Engine`. `ls` says which there are.

Imports common/, launch/arguments.py and launch/options.py.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from re import Pattern
from typing import Protocol, cast


@dataclass(frozen=True)
class World:
    """Tensor, pipeline and context parallel size; their product is the number of ranks."""

    tp: int
    pp: int
    cp: int

    @property
    def size(self) -> int:
        return self.tp * self.pp * self.cp

    def __str__(self) -> str:
        return f"{self.size} (tp {self.tp} x pp {self.pp} x cp {self.cp})"


class Engine(Protocol):
    """What the launcher knows of an engine."""

    TITLE: str  # its name for people
    PACKAGE: str  # and among Python's packages, by which an image is known to have it
    PROGRAM: str  # what serves
    LEADER: str  # what a rank of several is started by
    LEADER_MARK: str  # and known by among the processes
    WORK_WORDS: Pattern[bytes]  # the log, when it has answered somebody or generates
    MEANINGS: Mapping[int, str]  # of its exit codes
    FINAL: Collection[int]  # exit codes that another start would end with, too

    def read(self, words: Sequence[str], port: str) -> tuple[str | None, list[str], int]: ...
    def binds_first(self, version: str) -> bool: ...  # whether it has the port before it loads
    def ready_words(self, version: str) -> bytes: ...  # the log, once it listens
    def command(self, model: str, args: Sequence[str]) -> tuple[str, ...]: ...
    def names_of(self, model: str, args: Sequence[str]) -> tuple[str, ...]: ...
    def config_of(self, args: Sequence[str]) -> str | None: ...
    def check(self, args: Sequence[str]) -> tuple[str, World]: ...
    def settle(self, args: Sequence[str], version: str) -> list[str]: ...


def engine(name: str) -> Engine:
    return cast(Engine, import_module(f"{__name__}.{name}"))
