"""More and more load, until more does not pay: where is the knee?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matrix import SWEEP, Case, Overrides, apply, requests_for

WORTH = 1.05  # twice the load has to bring at least this much throughput
KEPT_UP = 0.95  # of the requested rate
GOOD = 0.99  # of the requests have to keep the --goodput limits
MOST_STREAMS = 4096
RATE_SECONDS = 10  # a rate is held for so long

Record = dict[str, Any]
Measure = Callable[[Case], Record]


def sweep(change: Overrides, measure: Measure, by_rate: bool) -> tuple[list[Record], Record | None]:
    """Measure at 1, 2, 4, ... streams (or requests a second); every run, and the best of them."""
    found: list[Record] = []
    load = next((float(c) for c in change.concurrency if c), 1.0)
    if by_rate:
        load = next((r for r in change.rates if math.isfinite(r)), 1.0)
    while load <= MOST_STREAMS:
        found.append(measure(case_for(load, change, by_rate)))
        if stop_reason(found, by_rate):
            break
        load *= 2
    return found, knee(found, by_rate)


def case_for(load: float, change: Overrides, by_rate: bool) -> Case:
    row = apply(SWEEP, change)
    inputs, outputs = row.lengths[0]
    if by_rate:
        count = change.num_prompts or max(row.requests, int(load * RATE_SECONDS))
        return Case(row.type, inputs, outputs, count, None, load)
    return Case(row.type, inputs, outputs, requests_for(row, int(load), change), int(load))


def stop_reason(found: Sequence[Record], by_rate: bool) -> str:
    """Why the last step was one too many; empty while it was not."""
    last = found[-1]
    if not last["valid"]:
        return "the run is invalid"
    share = last.get("goodput_share")
    if share is not None and share < GOOD:
        return f"only {share:.0%} of the requests kept the limits"
    if by_rate and steady_rate(last) < KEPT_UP * offered_rate(last):
        return f"the server does {steady_rate(last):.1f} requests/s and no more"
    if not by_rate and len(found) > 1:
        growth = last["output_throughput"] / found[-2]["output_throughput"]
        if growth < WORTH:
            return f"twice the streams brought {growth - 1:+.0%} throughput"
    return ""


def steady_rate(record: Record) -> float:
    """Requests a second once the first has come back: the last one's own time is no slowness."""
    seconds = record["duration"] - record["mean_e2el_ms"] / 1e3
    return float(record["completed"] / seconds) if seconds > 0 else math.inf


def offered_rate(record: Record) -> float:
    """What the dice gave, not what was asked for: few requests are seldom Poisson's mean."""
    return float(record.get("client", {}).get("offered_rate") or record["request_rate"])


def knee(found: Sequence[Record], by_rate: bool) -> Record | None:
    """The last step that was worth it."""
    worth = [r for n, r in enumerate(found) if not stop_reason(found[: n + 1], by_rate)]
    return worth[-1] if worth else None
