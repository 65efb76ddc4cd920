"""Engines: a file each, with the names of `Engine`. `ls` says which there are.

Imports common/ and launch's arguments.py, config_file.py and options.py. A file with a _ in its
name is no engine: it belongs to one, or to several.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from re import Pattern
from typing import Protocol, cast

from common.settings import default_of

NAMES = sorted(each.name for each in iter_modules(__path__) if "_" not in each.name)
DEFAULT = default_of("ENGINE")
FINAL = frozenset({2, 126, 127})  # exit codes with which another start would end, too
# Parts of what loggers put before a line.
LEVEL = r"(?P<level>DEBUG|INFO|WARN(?:ING)?|ERROR|CRITICAL|FATAL|TRACE|SUCCESS)"
DATE = r"\d{4}[-/]\d\d[-/]\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?"


@dataclass(frozen=True)
class World:
    """Tensor, pipeline, context and data parallel sizes; their product is the number of GPUs."""

    tp: int
    pp: int
    cp: int = 1
    dp: int = 1

    @property
    def size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def shape(self) -> str:
        """In the usual words: `TP 8 x PP 2`."""
        sizes = {"TP": self.tp, "PP": self.pp, "CP": self.cp, "DP": self.dp}
        return " x ".join(f"{k} {v}" for k, v in sizes.items() if v > 1) or "one GPU"

    def __str__(self) -> str:
        dp = f" x dp {self.dp}" if self.dp > 1 else ""
        return f"{self.size} (tp {self.tp} x pp {self.pp} x cp {self.cp}{dp})"


class Engine(Protocol):
    """What the launcher knows of an engine."""

    TITLE: str  # its name for people
    PACKAGE: str  # its Python package, by which an image is known to have it
    PROGRAM: str  # the program that serves, for people
    IMAGE: str  # its makers' image: the default for engines that we build no image for
    VERSION: str  # the setting that says which version it is; '': there is none
    CACHES: Mapping[str, str]  # variables for its caches, which are mounted, and their defaults
    TP: Sequence[str]  # the flags for the tensor parallel size
    LEADER: str  # what starts each rank of an MPI world; '': it is one process a node
    LEADER_MARK: str  # what the leader is known by among the processes
    STARTS: str  # a line of its log with which a server begins
    PREFIXES: Sequence[str]  # what its loggers put before a line
    COUNTERS: str  # what the names of its counters on /metrics begin with
    METRICS: str  # its page of counters for Prometheus, which a reading does not empty
    WORK_WORDS: Pattern[bytes]  # what its log says when it has answered somebody or generates

    def read(self, words: Sequence[str], port: str) -> tuple[str | None, list[str], int]: ...
    def binds_first(self, version: str) -> bool: ...  # whether a port still in use ends it at once
    def ready_words(self, version: str) -> bytes: ...  # what its log says once it listens
    def command(self, model: str, args: Sequence[str]) -> tuple[str, ...]: ...
    def names_of(self, model: str, args: Sequence[str]) -> tuple[str, ...]: ...
    def config_of(self, args: Sequence[str]) -> str | None: ...
    def key_of(self, args: Sequence[str], environ: Mapping[str, str]) -> str: ...  # its API key; ''
    def check(self, args: Sequence[str]) -> tuple[str, World]: ...
    def settle(self, args: Sequence[str], version: str) -> list[str]: ...
    # For a search (tune.py): arguments for sizes (tp, pp, ep) and settings, which may need a file;
    # and what makes two configurations the same.
    def tuned(
        self, config: str, sizes: Mapping[str, int], settings: Mapping[str, str], file: Path
    ) -> list[str]: ...
    def effective(self, args: Sequence[str]) -> object: ...

    # What one of `nodes` processes is given besides, if there is no LEADER.
    def part(self, args: Sequence[str], index: int, nodes: int, head: str) -> list[str]: ...


def engine(name: str) -> Engine:
    return cast(Engine, import_module(f"{__name__}.{name}"))


@cache
def every() -> Sequence[Engine]:
    """All engines, the default one first."""
    return [engine(name) for name in sorted(NAMES, key=lambda name: (name != DEFAULT, name))]


def packages() -> list[str]:
    """The packages by which a node knows what an image holds: the first one that it finds.

    Our own image's comes first, and SGLang's before vLLM's, as SGLang's image may have both.
    """
    return [each.PACKAGE for each in every()]


def meanings(program: str) -> dict[int, str]:
    """What exit codes mean; most of them are a shell's or a container runtime's."""
    return {
        0: "though nobody stopped it",
        2: "it refused its arguments",
        125: "docker itself failed",
        126: f"{program} cannot be executed",
        127: f"{program} was not found",
        137: "killed",
        139: "segmentation fault",
        143: "terminated",
    }
