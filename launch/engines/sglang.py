"""SGLang's launch_server: its command, its sizes, its words, and how it spreads over nodes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.arguments import as_flags, given, size_of, with_address, without_model
from launch.engines import DATE, World
from launch.engines.of_flags import binds_first as binds_first
from launch.engines.of_flags import config_of as config_of
from launch.engines.of_flags import effective as effective
from launch.engines.of_flags import key_of as key_of
from launch.engines.of_flags import names_of as names_of
from launch.engines.of_flags import settle as settle
from launch.engines.of_flags import words_of

TITLE, PACKAGE, PROGRAM = "SGLang", "sglang", "sglang.launch_server"
IMAGE, VERSION = "docker.io/lmsysorg/sglang:latest", ""
# What it compiles takes minutes of a start, so it is kept.
CACHES: Mapping[str, str] = {"SGLANG_CACHE_DIR": "~/.cache/sglang"}
LEADER = LEADER_MARK = ""
METRICS = "/metrics"
STARTS, COUNTERS = "server_args=ServerArgs", "sglang"
PREFIXES: Sequence[str] = (rf"(?P<begins>\[{DATE}(?: [A-Z]+\d+)*\]) ?",)  # NCCL's, too
WORK_WORDS = re.compile(rb'"POST /(?:v1/[^"]*|generate [^"]*)" 200|Decode batch')

TP: Sequence[str] = ("--tp-size", "--tp", "--tensor-parallel-size")
PP = ("--pp-size", "--pp", "--pipeline-parallel-size")
DP = ("--dp-size", "--dp", "--data-parallel-size")
EP = "--ep-size"
WITHIN_TP = "--enable-dp-attention"  # the data parallel groups share the tensor parallel GPUs
HEAD = ("--dist-init-addr", "--nccl-init-addr")
MEETING_PORT = 20000  # of the first node, where the processes of a server find each other


def read(words: Sequence[str], port: str) -> tuple[str | None, list[str], int]:
    """The model, if one was given, all other arguments, and the port it will serve on."""
    model, args = without_model(words, "--model-path", "--model")
    return model, *with_address(args, port)


def ready_words(version: str) -> bytes:
    """It listens earlier, but answers /health only once it has warmed up."""
    return b"The server is fired up and ready to roll"


def command(model: str, args: Sequence[str]) -> tuple[str, ...]:
    return ("python3", "-m", "sglang.launch_server", "--model-path", model, *args)


def check(args: Sequence[str]) -> tuple[str, World]:
    """The sizes in words, and the world that they make."""
    words = words_of(args)
    dp = 1 if WITHIN_TP in words else size_of(words, *DP)
    world = World(size_of(words, *TP), size_of(words, *PP), dp=dp)
    return world.shape, world


def tuned(
    config: str, sizes: Mapping[str, int], settings: Mapping[str, str], file: Path
) -> list[str]:
    return as_flags({"tp": TP[0], "pp": PP[0], "ep": EP}, sizes, config, settings)


def part(args: Sequence[str], index: int, nodes: int, head: str) -> list[str]:
    """One process a node; the first one serves."""
    where = [] if given(args, *HEAD) else [HEAD[0], f"{head}:{MEETING_PORT}"]
    return ["--nnodes", str(nodes), "--node-rank", str(index), *where]
