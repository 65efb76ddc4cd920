"""vLLM's `vllm serve`: its command, its sizes, its words, and how it spreads over nodes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.talk import die
from launch.arguments import as_flags, given, size_of, with_address, without_model
from launch.engines import LEVEL, World
from launch.engines.of_flags import binds_first as binds_first
from launch.engines.of_flags import config_of as config_of
from launch.engines.of_flags import effective as effective
from launch.engines.of_flags import key_of as key_of_flag
from launch.engines.of_flags import names_of as names_of
from launch.engines.of_flags import settle as settle
from launch.engines.of_flags import words_of

TITLE, PACKAGE, PROGRAM = "vLLM", "vllm", "vllm serve"
IMAGE, VERSION = "docker.io/vllm/vllm-openai:latest", ""
# What it compiles takes minutes of a start, so it is kept.
CACHES: Mapping[str, str] = {"VLLM_CACHE_ROOT": "~/.cache/vllm"}
LEADER = LEADER_MARK = ""
METRICS = "/metrics"
STARTS, COUNTERS = "vLLM API server version", "vllm"
PREFIXES: Sequence[str] = (
    r"(?P<speaker>\([\w.-]+(?: [\w.=-]+)* pid=\d+[^)]*\)) ?",  # Ray's, too
    rf"{LEVEL} \d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)? \[?[\w.]+(?:\.py)?:\d+\] ?",
)
WORK_WORDS = re.compile(  # it has answered somebody, or has made tokens lately
    rb'"POST /v1/[^"]*" 200|generation throughput: (?!0\.0 )\d'
)

TP: Sequence[str] = ("--tensor-parallel-size", "-tp")
OTHERS = ("--tp-size", "--tp", "--pp-size", "--pp", "--ep-size")  # other engines' names of sizes
PP = ("--pipeline-parallel-size", "-pp")
CP = ("--prefill-context-parallel-size", "-pcp")
DP = ("--data-parallel-size", "-dp")
# If the user spreads a data parallel deployment over launches, these are the groups of ours.
LOCAL = ("--data-parallel-size-local", "-dpl")


def read(words: Sequence[str], port: str) -> tuple[str | None, list[str], int]:
    """The model, if one was given, all other arguments, and the port it will serve on."""
    model, args = without_model(words, "--model")
    return model, *with_address(args, port)


def ready_words(version: str) -> bytes:
    return b"Application startup complete"


def key_of(args: Sequence[str], environ: Mapping[str, str]) -> str:
    return key_of_flag(args, environ) or environ.get("VLLM_API_KEY", "")


def command(model: str, args: Sequence[str]) -> tuple[str, ...]:
    return ("vllm", "serve", model, *args)


def check(args: Sequence[str]) -> tuple[str, World]:
    """The sizes in words, and the world that they make."""
    words = words_of(args)
    for flag in OTHERS:  # it would say so itself, after half a minute of imports
        if given(words, flag) is not None:
            die(f"vLLM has no {flag}", hint="`vllm serve --help=all`; TP= suits every engine")
    tp, pp, cp = (size_of(words, *flags) for flags in (TP, PP, CP))
    world = World(tp, pp, cp, size_of(words, *(LOCAL if given(words, *LOCAL) else DP)))
    return world.shape, world


def tuned(
    config: str, sizes: Mapping[str, int], settings: Mapping[str, str], file: Path
) -> list[str]:
    return as_flags({"tp": TP[0], "pp": PP[0]}, sizes, config, settings, no="no-")


def part(args: Sequence[str], index: int, nodes: int, head: str) -> list[str]:
    """One process a node; the first one serves, the others have no server."""
    where = [] if given(args, "--master-addr") else ["--master-addr", head]
    own = ["--nnodes", str(nodes), "--node-rank", str(index)]
    return [*own, *where, *(["--headless"] if index else [])]
