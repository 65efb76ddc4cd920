"""One launch, supervised: launched, ready, announced, held; after a failure, once more."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import manage
import server
from nodes import Failure, say
from plan import Plan
from preflight import Node
from signals import Stopped, postponed, turn_deaf
from timelimit import TimeLimit

LONGEST_PAUSE = 60  # seconds; the first is 2, each further one twice as long
FORGIVEN_AFTER = 3600.0  # seconds of serving, after which the restarts are counted anew


def serve(plan: Plan, nodes: Sequence[Node], url: str, args: argparse.Namespace) -> None:
    """Until somebody stops us, or a Failure that is final. Whatever happens, clean up."""
    logs, log = args.workspace / "logs", log_path(plan, args.workspace)
    record, endpoint = logs / f"run_{plan.place.job}.json", logs / "endpoint.json"
    running, tries, limit = None, 0, TimeLimit(plan.place)
    try:
        manage.sweep(logs)
        manage.write_record(record, plan, url, log)
        limit.begin()
        while True:
            try:
                running = server.launch(plan, nodes, url, log, args.probe_seconds)
                server.await_ready(running, args.ready_timeout)
                say_how_to_use(server.announce(running, endpoint))
                server.hold(running)
            except Failure as failure:
                tries = 1 if running and running.served > FORGIVEN_AFTER else tries + 1
                check_restart(failure, tries, args.restart)
                with postponed():
                    if running:
                        server.stop(running)
                    running = None
                    manage.remove_records(endpoint)
                pause(failure, tries, args.restart)
                mark(log, f"restart {tries} of {args.restart}")
    except Stopped:
        if limit.is_reached():
            say(f"Slurm ended the server: job {plan.place.job} has reached its time limit")
        raise
    finally:
        turn_deaf()
        limit.end()
        if running:
            server.stop(running)
        manage.remove_records(record, endpoint)


def check_restart(failure: Failure, tries: int, allowed: int) -> None:
    """Raise the failure where another start would not help, or there were enough of them."""
    if failure.passing and tries <= allowed:
        return
    if failure.passing and allowed:
        failure.message += f" (given up after {allowed} restart(s))"
    raise failure


def pause(failure: Failure, tries: int, allowed: int) -> None:
    seconds = min(2**tries, LONGEST_PAUSE)
    say(f"{failure.message}; restarting ({tries} of {allowed}) in {seconds} s")
    time.sleep(seconds)


def mark(log: Path, what: str) -> None:
    """A line in every log of the launch: what follows is another server's."""
    for path in (log, *log.parent.glob(f"{log.stem}_rank*.log")):
        with path.open("a") as file:
            file.write(f"===== run_sbatch.py: {what}, {server.iso(time.time())} =====\n")


def log_path(plan: Plan, workspace: Path) -> Path:
    return workspace / f"logs/trtllm_server_{plan.place.job}.log"


def say_how_to_use(endpoint: dict[str, object]) -> None:
    url, model = str(endpoint["url"]), str(endpoint["model"])
    body = json.dumps({"model": model, "prompt": "The capital of France is", "max_tokens": 20})
    host, _, port = url.removeprefix("http://").rpartition(":")
    say(f"  curl {url}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}")
    say(f"  make test HOST={host} PORT={port}")
    say(f"  make bench HOST={host} PORT={port}")
    job = str(endpoint["job"])
    say("stop it with ^C, make stop" + (f" or scancel {job}" if job.isdecimal() else ""))
