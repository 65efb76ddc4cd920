"""Which engine an image holds, and its version: by its label, or else by asking it once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time

from launch.node.base import TIMED_OUT, ask

TITLE_LABEL, OUR_TITLE = "org.opencontainers.image.title", "tensorrt-llm-serve"  # our Dockerfile's
VERSION_LABEL = "org.opencontainers.image.version"  # base images have it, too, such as Ubuntu's
QUESTION = "import sys, importlib.metadata as m; " + (
    "[print(n, d.version) for n in sys.argv[1:] for d in m.distributions(name=n)]"
)
# No GPU, no network, and not the image's own entry point, which would say more than the answer.
# `void`: NVIDIA's runtime, if it is Docker's default, would look for a driver.
ASK = "--rm --pull=never --net=none --env=NVIDIA_VISIBLE_DEVICES=void --entrypoint=python3".split()
NO_ENGINE = "none 0"  # remembered for an image that has none
ASK_PATIENCE = 20.0  # seconds; a cold disk may take some of them


def release_of(image: str, packages: list[str]) -> str:
    """Engine and version, `package 1.2.1`, of the image with this id; '' if it does not say.

    `packages` are the engines', our own image's first.
    """
    inspect = ("docker", "image", "inspect", "--format", "{{json .Config.Labels}}", image)
    with contextlib.suppress(ValueError, AttributeError):
        labels = json.loads(ask(*inspect)[1])
        if labels.get(TITLE_LABEL) == OUR_TITLE and labels.get(VERSION_LABEL):
            return f"{packages[0]} {labels[VERSION_LABEL]}"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = os.path.join(cache, "tensorrt-llm-serve", "releases", image.replace("/", "-"))
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        if (said := file.read(200)) and said == first_release(said):
            return "" if said == NO_ENGINE else said
    name = f"tensorrt-llm-serve-asks-{os.getpid()}-{time.time_ns()}"
    code, said = ask_python(packages, "docker", "run", "--name", name, *ASK, image)
    if code == TIMED_OUT:
        ask("docker", "rm", "--force", name)
    found = "" if code else first_release(said)
    if not code:
        remember(path, found or NO_ENGINE)
    return found


def release_here(program: str, packages: list[str]) -> str:
    """The same for a program on this node: a Python, or one whose first line names its Python."""
    if os.path.basename(program).startswith("python"):
        return first_release(ask_python(packages, program)[1])
    with contextlib.suppress(OSError, ValueError), open(program, encoding="utf-8") as file:
        line = file.readline(1000)
        if line.startswith("#!") and "python" in line:
            return first_release(ask_python(packages, *line[2:].split())[1])
    return ""


def ask_python(packages: list[str], *command: str) -> tuple[int, str]:
    null = subprocess.DEVNULL
    return ask(*command, "-c", QUESTION, *packages, timeout=ASK_PATIENCE, stderr=null)


def first_release(said: str) -> str:
    found = re.search(r"^\w+ \d[\w.+!-]{0,98}$", said, re.M)
    return found[0] if found else ""


def remember(path: str, text: str) -> None:
    """Keep it for the next launch: an image never changes its id. Without a home, ask again."""
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        draft = f"{path}.{os.getpid()}"
        with open(draft, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(draft, path)
