"""Doubles the load until more does not pay, to find the knee."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from load.matrix import SWEEP, Case, Overrides, apply, requests_for

WORTH = 1.05  # twice the load has to bring at least this much throughput
KEPT_UP = 0.95  # of the offered rate
GOOD = 0.99  # of the requests have to keep the --goodput limits
MOST_STREAMS = 4096
RATE_SECONDS = 30  # a rate is held for at least this long, and for
SETTLED = 4  # this many times as long as a request took at the rate before

Record = dict[str, Any]
Measure = Callable[[Case], Record]


def conflicts(types: Sequence[str], change: Overrides, by: str | None) -> Iterator[str]:
    """Flags that a sweep would have to ignore."""
    if SWEEP.type not in types:
        if by:
            yield "--sweep-by is for -t sweep"
        return
    lists = {"--input-len": change.input_len, "--output-len": change.output_len,
             "--concurrency": change.concurrency, "--request-rate": change.rates}  # fmt: skip
    for flag, given in lists.items():
        if len(given) > 1:
            yield f"a sweep takes one {flag}, not a list: run it by itself"
    if by == "rate" and change.concurrency:
        yield "--sweep-by rate has no --concurrency: requests go out at their own times"
    if None in change.concurrency:
        yield "a sweep begins at a number of streams, not at unlimited"
    if by == "rate" and change.num_prompts:
        yield f"--sweep-by rate has no --num-prompts: a rate is held for {RATE_SECONDS} s and more"
    if first_step(change, by == "rate") > MOST_STREAMS:
        yield f"a sweep ends at {MOST_STREAMS:,}: let it begin below"
    if by != "rate" and math.isfinite(change.rates[0]):
        yield "a sweep of the concurrency has no --request-rate; use --sweep-by rate"


def sweep(change: Overrides, measure: Measure, by_rate: bool) -> tuple[list[Record], Record | None]:
    """Measure at 1, 2, 4, ... streams (or requests a second); returns a run per step, and the knee.

    With --repeat, a step's run is the one of median throughput, or an invalid one if there is any.
    """
    found: list[Record] = []
    load = first_step(change, by_rate)
    while load <= MOST_STREAMS:
        case = case_for(load, change, by_rate, found[-1] if found else None)
        found.append(middle([measure(replace(case, repeat=n + 1)) for n in range(change.repeat)]))
        if stop_reason(found, by_rate):
            break
        load *= 2
    return found, knee(found, by_rate)


def first_step(change: Overrides, by_rate: bool) -> float:
    asked = change.rates if by_rate else filter(None, change.concurrency)
    return next((float(load) for load in asked if math.isfinite(load)), 1.0)


def verdict(found: Sequence[Record], best: Record | None, by_rate: bool) -> str:
    """Where the knee is and why the sweep ended there, in a sentence."""
    why = stop_reason(found, by_rate)
    if not best:
        return f"sweep: no knee: at the first step {why}"
    if why and found[-1]["valid"]:
        return f"sweep: {why}; the knee: {best['case']['name']}"
    why = why or f"{MOST_STREAMS:,} is the end of the range"
    return f"sweep: no knee found, since {why}; the last good step: {best['case']['name']}"


def case_for(load: float, change: Overrides, by_rate: bool, before: Record | None) -> Case:
    row = apply(SWEEP, change)
    inputs, outputs = row.lengths[0]
    if by_rate:
        seconds = max(RATE_SECONDS, SETTLED * before["mean_e2el_ms"] / 1e3 if before else 0)
        count = max(row.requests, math.ceil(load * seconds))
        return Case(row.type, inputs, outputs, count, None, load)
    # Fewer would not fill the streams, and the knee would not be the server's.
    count = max(requests_for(row, int(load), change), row.per_stream * int(load))
    return Case(row.type, inputs, outputs, count, int(load))


def middle(repeats: Sequence[Record]) -> Record:
    if wrong := next((r for r in repeats if not r["valid"]), None):
        return wrong
    return sorted(repeats, key=lambda r: float(r["output_throughput"]))[len(repeats) // 2]


def stop_reason(found: Sequence[Record], by_rate: bool) -> str:
    """Why the last step was one too many; '' if it was not."""
    last = found[-1]
    if not last["valid"]:
        return f"the run is invalid ({'; '.join(last.get('problems', ()))})"
    share = last.get("goodput_share")
    if share is not None and share < GOOD:
        return f"only {share:.0%} of the requests kept the limits"
    if by_rate and (rate := sustained_rate(last)) < KEPT_UP * offered_rate(last):
        return f"the server does {rate:.1f} requests/s and no more"
    if not by_rate and len(found) > 1:
        growth = last["output_throughput"] / found[-2]["output_throughput"]
        if growth < WORTH:
            return f"twice the streams brought {growth - 1:+.0%} throughput"
    return ""


def sustained_rate(record: Record) -> float:
    """Requests a second that the server sustains: fewer than offered if latency keeps growing.

    If latency grows by 0.1 s every second, a tenth too much is offered.
    """
    return offered_rate(record) / (1 + max(record["e2el_growth"] or 0.0, 0.0))


def offered_rate(record: Record) -> float:
    """The rate that was really offered: few Poisson arrivals seldom average what was asked for."""
    return float(record.get("client", {}).get("offered_rate") or record["request_rate"])


def knee(found: Sequence[Record], by_rate: bool) -> Record | None:
    """The last step that was worth it."""
    worth = [r for n, r in enumerate(found) if not stop_reason(found[: n + 1], by_rate)]
    return worth[-1] if worth else None
