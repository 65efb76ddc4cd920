"""Checks after a run that the server, or each server of a fleet, is still the same one."""

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

LOOKS = 4  # at /metrics before a run; a balancer may lead each to another replica
LOOKS_AFTER = 8  # at most, until we meet a process that was there before
LISTINGS, PAUSE = 3, 0.3  # a replica may be a moment behind with its models

STARTED = re.compile(
    r"^process_start_time_seconds(?:\{.*\})? (\d+(?:\.\d+)?(?:e\+?\d+)?)\s*$", re.MULTILINE
)
RESTARTED = "the server was restarted during the run"


def identity(endpoint: Endpoint) -> dict[str, Any]:
    """What must not change during a run."""
    launched = launches(endpoint)
    # TensorRT-LLM's /metrics is no Prometheus page, and reading it empties it.
    told = endpoint.trtllm or launched
    return {"launched": launched, "started": set() if told else starts(endpoint, LOOKS)}


def launches(endpoint: Endpoint) -> dict[str, Any]:
    """When the launcher started the server, and each replica by name; {} if it did not."""
    record = read_record(endpoint.record)
    if not record.get("started"):
        return {}
    each = {str(r.get("name")): (r.get("restarts"), r.get("started")) for r in up(record)}
    return {"": record["started"], **each}


def starts(endpoint: Endpoint, looks: int, known: Collection[str] = ()) -> set[str]:
    """The start times of the processes met in so many looks, up to the first known one.

    They come from Prometheus metrics, which vLLM has. `created` in a list of models is not one.
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
    """Problems if the server changed during a run, and notes.

    `ended` are replicas that are known to have ended during the run.
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
    """Whether a younger process has replaced the only one. Two at a time are replicas."""
    return len(before) == len(now) == 1 and float(*now) > float(*before)


def served_now(endpoint: Endpoint) -> tuple[list[str], list[str]]:
    """A problem if the model or the server is gone; only a note if it does not list its models."""
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
    """An idle connection that is held during a run: if it closes, the server may have restarted.

    Only for uvicorn (TensorRT-LLM, vLLM, SGLang), which keeps it open as long as it lives, at no
    cost. A server with one worker per connection would have one less for the load.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        target, self.name, self.sock = endpoint.target, endpoint.name, None
        if not target.tls:  # a server does not wait long for a handshake
            with suppress(OSError, Failure):
                if fetch(endpoint, "/v1/models").server == "uvicorn":
                    self.sock = socket.create_connection((target.host, target.port), TIMEOUT)

    def notes(self) -> list[str]:
        """A note if it was closed. To be called once, at the end."""
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
