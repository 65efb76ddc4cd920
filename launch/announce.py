"""Says that the server is ready and where: in words for people, in endpoint.json for programs."""

import json
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from common.talk import say, write_json
from launch.findings import Node
from launch.identity import launcher
from launch.plan import is_directory
from launch.server import Server

PROXIES = ("http_proxy", "all_proxy", "ALL_PROXY")  # those that curl heeds for http


def announce(server: Server, nodes: Sequence[Node], path: Path) -> dict[str, object]:
    """Say where the server is: first in the file at `path`, as some wait for READY on screen."""
    container = server.runtime.container(server.plan, server.replica, server.node)
    endpoint = facts(server, nodes, server.url, server.main_log.path, server.age)
    endpoint["container"] = container
    write(path, endpoint)
    say_ready(server.age, server.url, f"{server.health.model}, {server.plan.title}")
    return endpoint


def say_ready(took: float, url: str, what: str) -> None:
    say(f"READY after {took:.1f} s: {url} serves {what}")


def facts(
    server: Server, nodes: Sequence[Node], url: str, log: Path, took: float
) -> dict[str, object]:
    """What endpoint.json says of every launch."""
    return {
        "url": url,
        "model": server.health.model,
        "model_argument": model_argument(server.replica.model),
        "job": server.plan.place.job,
        "nodes": [node.name for node in nodes],
        "log": str(log),
        "ready_seconds": round(took, 2),
        "started": iso(time.time() - took),
        "ready": iso(time.time()),
        "launcher": launcher(),
    }


def write(path: Path, endpoint: dict[str, object]) -> dict[str, object]:
    try:
        write_json(path, endpoint)
    except OSError as error:  # a full disk is no reason to throw away what took so long to load
        say(f"{error.filename} could not be written: {error.strerror}; test and bench need HOST=")
    return endpoint


def model_argument(model: str) -> str:
    """What the engine was given; the served name may be only a directory's last part."""
    return str(Path(model).absolute()) if is_directory(model) else model


def iso(when: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))


def say_how_to_use(endpoint: dict[str, object], how_to_stop: str) -> None:
    url, model = str(endpoint["url"]), str(endpoint["model"])
    body = json.dumps({"model": model, "prompt": "The capital of France is", "max_tokens": 20})
    host, _, port = url.removeprefix("http://").rpartition(":")
    past_proxy = "--noproxy '*' " if any(os.environ.get(name) for name in PROXIES) else ""
    header = "-H 'Content-Type: application/json'"
    say(f"  curl {past_proxy}{url}/v1/completions {header} \\\n      -d {shlex.quote(body)}")
    say(f"  make test HOST={host} PORT={port}")
    say(f"  make bench HOST={host} PORT={port}")
    say(how_to_stop)
