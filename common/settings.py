"""The one list of settings: flag > environment > .env > default. env.example shows it."""

import io
import os
import re
import stat
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from common.talk import die, misused, say


@dataclass(frozen=True)
class Setting:
    """A variable, its default, and one line on what it is for."""

    name: str
    default: str
    help: str


ROWS = (
    ("MODEL", "Qwen/Qwen2.5-7B-Instruct", "model to serve: a Hugging Face id or a path"),
    ("IMAGE", "", "tarball, .sqsh, tag or registry reference (default: what make save wrote)"),
    ("WORKSPACE", "", "directory with the default image and logs/ (default: this one)"),
    ("CONTAINER_MOUNT", "/fsx", "host directory that the containers see, too"),
    ("ENGINE", "trtllm", "what serves the model: trtllm, vllm or sglang"),
    ("TP", "", "tensor parallel size, passed in the engine's own flag for it"),
    ("RUNTIME", "docker", "docker; pyxis; or bare, for the engine in the node's PATH"),
    ("READY_TIMEOUT", "3600", "seconds a server may take to be ready, and its nodes to answer"),
    ("REPLICAS", "1", "how many servers behind one address; auto: as many as the GPUs hold"),
    ("LOAD_AT_ONCE", "0", "how many of them may load at a time; 0: all"),
    ("RESTART", "0", "how many times a server that fails is restarted"),
    ("PROBE_SECONDS", "60", "seconds without an answer until the server is probed; 0: never"),
    ("PROBE_TIMEOUT", "60", "seconds an idle server may take for one token; 0: half an hour"),
    ("PORT", "8000", "port of the server"),
    ("GPUS", "auto", "auto (the job's, or all without Slurm), none, or as docker's --gpus"),
    ("NODELIST", "", "which of the job's nodes to use: n2 or n2,n3 (default: all)"),
    ("MPI", "auto", "PMIx plug-in for several nodes, from srun --mpi=list: pmix, pmix_v4"),
    ("TRTLLM_VERSION", "", "version of TensorRT-LLM to check options for (default: the image's)"),
    ("HAPROXY", "", "the front of --replicas: HAProxy's path on the head node (default: .venv's)"),
    ("PRIVILEGED", "0", "1 runs the container with docker's --privileged"),
    ("HF_HOME", "", "Hugging Face cache, which the containers see (~/.cache/huggingface)"),
    ("HF_TOKEN", "", "Hugging Face token for gated models; never printed"),
    (
        "HOST",
        "localhost",
        "server to test and benchmark, only in .env; else logs/endpoint.json's",
    ),
    ("OPENAI_API_KEY", "", "API key that is sent to that server; never printed"),
    ("BENCH_TYPE", "all", "what bench.py measures: throughput,prefill,... or sweep"),
    ("BENCH_IMAGE", "", "image with NVIDIA's benchmark client"),
    ("SHAREGPT_PATH", "ShareGPT.json", "ShareGPT data set; downloaded there if missing"),
)
SETTINGS = tuple(Setting(*row) for row in ROWS)

# Variables with these prefixes are passed on from the environment to the engine.
PASSED_ON = ("NCCL_", "FI_", "HF_", "UCX_", "TRTLLM_", "TLLM_", "VLLM_", "SGLANG_", "SGL_")

# Older names that Hugging Face's libraries still accept.
OLDER = {
    "HUGGING_FACE_HUB_TOKEN": "HF_TOKEN",
    "HUGGINGFACE_HUB_CACHE": "HF_HUB_CACHE",
}

# Variables for make only, which turns them into flags.
OF_MAKE = (
    "CONFIGS GOODPUT FILE COMPRESS RESULTS BEFORE AFTER FOLDER CLUSTER HOURS JOB LOG EXTRA_ARGS "
    "BENCH_ARGS REPLICA PREFILL DECODE PREFILL_CONFIG DECODE_CONFIG"
).split()
# Variables read by the programs that we call, and by an engine without a container.
OTHERS = re.compile(
    "(?i:(https?|all|no|ftp)_proxy)|(GLOO|TP)_SOCKET_IFNAME|"
    "(DOCKER|AWS|SLURM|SALLOC|SBATCH|SRUN|SQUEUE|SINFO|SSL|XDG|LC|REQUESTS|CURL)_\\w+|PYTHON\\w+|"
    "PATH|HOME|LANG|TZ|TMPDIR|TERM|COLUMNS|NO_COLOR|MAKEFLAGS|LD_LIBRARY_PATH|KRB5CCNAME"
)

# The kernel's limit in bytes for one variable or argument; only .env could exceed it.
LONGEST = 128 * 1024 - 1
SECRETS = re.compile("TOKEN|SECRET|PASSWORD|_KEY$")


def trust(path: Path, state: os.stat_result, otherwise: str) -> None:
    """Failure if anybody else may have written the file: its contents can make us run their code.

    We trust files that belong to us, to root, or to the owner of these scripts, whose code we run
    anyway. Who owns the directory does not matter: a file that others put there is theirs.
    """
    friends = {os.geteuid(), 0, Path(__file__).stat().st_uid}
    if state.st_uid not in friends:
        who = f"user {state.st_uid}, neither you, nor root, nor the owner of the scripts"
        die(f"{path} belongs to {who}: {otherwise}")
    if state.st_mode & stat.S_IWOTH:
        die(f"everybody may write to {path}: {otherwise}")


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of a .env file; {} if there is none. Failure if it is unreadable or unsafe."""
    try:
        if not (path.is_file() or path.is_fifo()):
            return {}
        with path.open(encoding="utf-8-sig") as file:  # Windows editors put a BOM in front
            state = os.fstat(file.fileno())
            trust(path, state, "it is not read; make it your own (chown, chmod o-w) or remove it")
            text = file.read()
    except (OSError, ValueError) as error:
        die(f"cannot read {path}: {error}")
    from dotenv import dotenv_values  # late: often there is no such file

    check_lines(path, text)
    found = {n: value for n, value in dotenv_values(stream=io.StringIO(text)).items() if value}
    for name, value in found.items():
        if "=" in name or "\0" in name + value or len(f"{name}={value}".encode()) > LONGEST:
            die(f"{path} sets {name[:99]!r} to a value that no environment variable can hold")
    if state.st_mode & 0o044 and any(map(SECRETS.search, found)):
        say(f"{path} holds a secret and others may read it: chmod 600 {path}")
    return found


def check_lines(path: Path, text: str) -> None:
    """Usage error for a line that sets nothing. Its value is not shown: it may be a secret."""
    from dotenv.parser import parse_stream

    for each in parse_stream(io.StringIO(text)):
        if each.error or (each.key and each.value is None):
            begins, words = each.original.line, each.original.string
            line = begins + len(words) - len(words.lstrip("\r\n"))
            name = re.findall(r"[\w-]+", words)[:1] or ["it"]
            misused(f"{path}, line {line}: {name[0]} is not set there; a line is NAME=VALUE")


def say_useless(path: Path, names: Iterable[str]) -> None:
    """Warn about each variable that nothing reads: a typo, or one that belongs elsewhere."""
    ours = [each.name for each in SETTINGS]
    for name in names:
        heeded = name in ours or name in OLDER or name.startswith(PASSED_ON)
        if heeded or OTHERS.fullmatch(name):
            continue
        near = get_close_matches(name.upper(), ours, 1, 0.8)
        what = f"did you mean {near[0]}?" if near else "the engine's container does not see it"
        what = f"it is for make's command line (make ... {name}=)" if name in OF_MAKE else what
        say(f"{path}: {name} is not a setting, so it does nothing; {what}")


def load_env_files() -> None:
    """Read .env in the current directory, then the one beside the scripts.

    The path is explicit: under sbatch the running script is a copy in a spool directory.
    """
    try:
        here = Path.cwd()
    except FileNotFoundError:
        die("the current directory is gone", hint='if it was created again: cd "$PWD"')
    for directory in dict.fromkeys((here, Path(__file__).resolve().parents[1])):
        found = read_env_file(directory / ".env")
        say_useless(directory / ".env", found)
        os.environ.update({n: v for n, v in found.items() if not os.environ.get(n)})
    heed_older(os.environ)


def heed_older(environ: MutableMapping[str, str]) -> None:
    """Copy Hugging Face's cache and token from older variable names to those that we pass on."""
    for name, newer in OLDER.items():
        if environ.get(name) and not environ.get(newer):
            environ[newer] = environ[name]
    cache = Path(environ.get("XDG_CACHE_HOME", ""), "huggingface")
    if cache.is_absolute() and cache.is_dir() and not environ.get("HF_HOME"):
        environ["HF_HOME"] = str(cache)


def setting(name: str, environ: Mapping[str, str] | None = None) -> str:
    """A setting's value where no flag gives it. An empty variable counts as unset."""
    environ = os.environ if environ is None else environ
    return environ.get(name) or default_of(name)


def default_of(name: str) -> str:
    return next(each.default for each in SETTINGS if each.name == name)
