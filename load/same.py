"""Is the server under test still the same one after a run, and each server of a fleet?"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

from common.response import ERROR_LENGTH
from common.talk import Failure
from load.endpoint import (
    TIMEOUT,
    Endpoint,
    Unanswered,
    fetch,
    models,
    read_record,
    replicas_of,
    up,
)

LOOKS = 4  # at /metrics before a run, on connections that a balancer may lead to other replicas
LOOKS_AFTER = 8  # until a process shows that was there before
LISTINGS, PAUSE = 3, 0.3  # a replica may be a moment behind with its models

STARTED = re.compile(
    r"^process_start_time_seconds(?:\{.*\})? (\d+(?:\.\d+)?(?:e\+?\d+)?)\s*$", re.MULTILINE
)
RESTARTED = "the server was restarted during the run"


def identity(endpoint: Endpoint) -> dict[str, Any]:
    """What must not change while it is measured."""
    launched = launches(endpoint)
    # TensorRT-LLM's /metrics is no Prometheus page, and to read it empties it.
    told = endpoint.trtllm or launched
    return {"launched": launched, "started": set() if told else starts(endpoint, LOOKS)}


def launches(endpoint: Endpoint) -> dict[str, Any]:
    """When the launcher started it, and each replica, by name; {} where it has not."""
    record = read_record(endpoint.record)
    if not record.get("started"):
        return {}
    each = {str(r.get("name")): (r.get("restarts"), r.get("started")) for r in up(record)}
    return {"": record["started"], **each}


def starts(endpoint: Endpoint, looks: int, known: Collection[str] = ()) -> set[str]:
    """When its processes started, of those met in so many looks, or up to one that is known.

    By the Prometheus metrics, which vLLM has. `created` in a list of models is no start.
    """
    found: set[str] = set()
    for _ in range(looks):
        new = set(process_starts(endpoint))
        found |= new
        if not new or new & set(known):
            break
    return found


def process_starts(endpoint: Endpoint) -> Iterator[str]:
    with suppress(Failure):
        page = fetch(endpoint, "/metrics").body.decode(errors="replace")
        yield from STARTED.findall(page)


def changes(
    endpoint: Endpoint, before: Mapping[str, Any], ended: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Why a run that began with this server did not end with it; and what else is worth a note.

    `ended` are replicas that are known not to have lived through it.
    """
    problems, notes = served_now(endpoint)
    known = before.get("started", set())
    now = starts(endpoint, LOOKS_AFTER, known) if known and not problems else set()
    if len(known | now) > 1 and not restarted(known, now):
        notes.append("several processes answer at this address (by their start times): the figures "
                     "are of all of them")  # fmt: skip
    was, launched = before.get("launched", {}), launches(endpoint)
    gone = {*ended, *(name for name in {"", *was} if was.get(name) != launched.get(name))}
    if not problems and (gone or restarted(known, now)):
        names = ", ".join(sorted(filter(None, gone)))
        problems = [f"{names} ended, or was restarted, during the run" if names else RESTARTED]
    other = set(endpoint.replicas) ^ set(replicas_of(read_record(endpoint.record)))
    if other and not problems:
        names = ", ".join(sorted(name for name, _ in other))
        problems = [f"{names} came up or went down after bench.py began: its GPU count is wrong"]
    return problems, notes


def restarted(before: Collection[str], now: Collection[str]) -> bool:
    """One process was there, and now it is another, younger one. Two at a time are replicas."""
    return len(before) == len(now) == 1 and float(*now) > float(*before)


def served_now(endpoint: Endpoint) -> tuple[list[str], list[str]]:
    """A problem where the model, or the server, is gone; only a note where it does not say."""
    problem = ""
    for attempt in range(0 if endpoint.unlisted else LISTINGS):
        time.sleep(PAUSE if attempt else 0)
        try:
            names = models(endpoint)
        except Unanswered as e:
            return [], [f"after the run the server did not list its models: {e.message}"]
        except Failure as e:
            problem = f"the server is gone: {e.message}"
            continue
        if endpoint.model in names:
            return [], []
        problem = f"the server now serves {', '.join(names)[:ERROR_LENGTH]}, not {endpoint.model}"
    return [problem] if problem else [], []


class Witness:
    """A connection on which nothing is said, for as long as a run lasts.

    Only at uvicorn (TensorRT-LLM, vLLM, SGLang), which keeps it while it lives, and which it costs
    nothing: a server with a worker for each connection would have one less for the load.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        target, self.name, self.sock = endpoint.target, endpoint.name, None
        if not target.tls:  # a server waits for a handshake for so long only
            with suppress(OSError, Failure):
                if fetch(endpoint, "/v1/models").server == "uvicorn":
                    self.sock = socket.create_connection((target.host, target.port), TIMEOUT)

    def notes(self) -> list[str]:
        """To be asked once, at the end."""
        if self.sock is None:
            return []
        with self.sock:
            self.sock.setblocking(False)
            try:
                self.sock.recv(1)
            except BlockingIOError:
                return []
            except OSError:
                pass
        return ["an idle connection was closed during the run: by a proxy, or because the server "
                "was restarted"]  # fmt: skip
