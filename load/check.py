"""`bench.py --check`: what would be sent, and what a few short requests tell about the server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from load import endpoint, same
from load.clients import Options, warm_up_count
from load.endpoint import Endpoint
from load.matrix import SWEEP, Case, Overrides, cases, surprises
from load.probe import Found, explore


def check(
    server: Endpoint, client: str, options: Options, types: Sequence[str], change: Overrides
) -> int:
    """Print the findings, and a JSON document as the last line; 1 if no answer came."""
    found, planned = explore(server, options.chat, options.timeout), list(cases(types, change))
    warm_up = {c.name: warm_up_count(c, options) if client == "builtin" else 0 for c in planned}
    facts = {
        "check": True,
        "valid": not found.error,
        "url": server.url,
        "model": server.asked,
        "answers_name": found.model,
        "server_version": endpoint.version(server),
        "replicas": dict(server.replicas),
        "processes": len(server.replicas) or processes(server),
        "probes": found.probes,
        "client": client,
        **understood(found),
        "notes": [
            *endpoint.not_up(server),
            *found.notes,
            *surprises(planned, change),
            *missing(planned, options),
        ],
        "error": found.error,
        "hint": found.hint,
        "requests": sum(case.num_prompts + warm_up[case.name] for case in planned),
        "runs": [{**case.facts(), "warm_up": warm_up[case.name]} for case in planned],
        "sweep": SWEEP.type in types,
    }
    print("\n".join([*about_the_server(facts), *would_send(facts)]))
    print(json.dumps(facts))
    return 1 if found.error else 0


def processes(server: Endpoint) -> int:
    return 0 if server.trtllm else len(same.starts(server, same.LOOKS))


def missing(planned: Sequence[Case], options: Options) -> Iterator[str]:
    if any(case.input_len is None for case in planned) and not options.sharegpt.exists():
        yield f"{options.sharegpt} is missing: it would be downloaded first"


def understood(found: Found) -> dict[str, Any]:
    """How the requests would be written."""
    dialect = found.dialect
    return {
        "path": dialect.path,
        "prompts": "text" if dialect.text else "token ids",
        "output_length": dialect.length,
        **{
            name: getattr(dialect, name) for name in ("ignore_eos", "temperature", "stream_options")
        },
    }


def about_the_server(facts: dict[str, Any]) -> Iterator[str]:
    version = f", version {facts['server_version']}" if facts["server_version"] else ""
    yield f"{facts['url']} serves {facts['model']}{version}"
    if facts["error"]:
        yield f"it does not answer a short request: {facts['error']}"
        yield f"next: {facts['hint'] or 'its log says why'}"
        return
    sent = [facts["output_length"], *(n for n in ("ignore_eos", "stream_options") if facts[n])]
    several = "s" if facts["probes"] > 1 else ""
    yield (f"{facts['probes']} short request{several} found out how to ask it: {facts['path']}, "
           f"{facts['prompts']} as prompts, {', '.join(sent)}")  # fmt: skip
    if each := facts["replicas"]:
        named = ", ".join(f"{name} {url}" for name, url in each.items())
        yield f"a fleet of {len(each)} behind one address: {named}"
    elif facts["processes"] > 1:
        yield f"{facts['processes']} processes or more share this address"


def would_send(facts: dict[str, Any]) -> Iterator[str]:
    yield f"without --check, {facts['client']} sends {facts['requests']:,} requests:"
    for run in facts["runs"]:
        warm_up = f", after {run['warm_up']} of warm-up" if run["warm_up"] else ""
        yield f"  {run['name']}: {run['num_prompts']:,}{warm_up}"
    if facts["sweep"]:
        yield "  and a sweep, until more load brings no more throughput"
    yield from (f"note: {note}" for note in facts["notes"])
