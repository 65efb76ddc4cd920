"""A benchmark's findings in sentences: where the knee is, and how much load keeps the limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from load.sweep import GOOD, knee, middle, stop_reason
from report.results import Group, Record, figures, load_of

AT_THE_KNEE = (
    "output_throughput", "gpu_throughput", "user_throughput", "mean_ttft_ms", "mean_itl_ms"
)  # fmt: skip


def in_short(groups: Sequence[Group]) -> list[str]:
    """The main findings, from valid runs only except for how a sweep ended."""
    valid = [g for g in groups if g.valid]
    return [*most(valid), *knees(groups), *goodput(valid)]


def most(valid: Sequence[Group]) -> Iterator[str]:
    best = max(valid, key=lambda g: g.value("output_throughput") or 0, default=None)
    if best and best.value("output_throughput"):
        said = figures(best, "output_throughput", "gpu_throughput")
        yield f"Most output: {said}, at {best.label}."


def knees(groups: Sequence[Group]) -> Iterator[str]:
    """For each sweep: how far more load brought more, and what ended it."""
    sweeps: dict[tuple[object, ...], list[Group]] = {}
    for group in sorted((g for g in groups if g.case["type"] == "sweep"), key=load_of):
        case = group.case
        key = (case["input_len"], case["output_len"], case["rate"] == "inf")
        sweeps.setdefault(key, []).append(group)
    for found in sweeps.values():
        try:
            yield knee_of(found)
        except (LookupError, TypeError, ZeroDivisionError):  # another version's records
            continue


def knee_of(found: Sequence[Group]) -> str:
    steps: list[Record] = []
    why, by_rate = "", found[0].case["rate"] != "inf"
    for group in found:
        steps.append(middle(group.records))
        if why := stop_reason(steps, by_rate):
            break
    best = knee(steps, by_rate)
    if not best:
        return f"The sweep has no knee: at its first step, {found[0].label}, {why}."
    group = found[steps.index(best)]
    after = f"At the next step {why}." if why else "More load than that was not tried."
    return f"The knee of the sweep: {group.label}, with {figures(group, *AT_THE_KNEE)}. {after}"


def goodput(valid: Sequence[Group]) -> Iterator[str]:
    """If --goodput set limits: for each type, the load with the most requests within them."""
    limited = [g for g in valid if g.value("request_goodput") is not None]
    if not limited:
        return
    best = {t: max((g for g in limited if g.case["type"] == t), key=in_limits)
            for t in dict.fromkeys(g.case["type"] for g in limited)}  # fmt: skip
    told = "; ".join(f"{in_limits(g):.2f} at {g.label} ({share(g):.0%} keep them)"
                     for g in best.values())  # fmt: skip
    keep = sum(share(g) >= GOOD for g in limited)
    yield (f"Goodput ({limits(limited[0])}): {keep} of {len(limited)} loads keep the limits for "
           f"{GOOD:.0%} of the requests. The most requests/s within them: {told}.")  # fmt: skip


def in_limits(group: Group) -> float:
    return group.value("request_goodput") or 0.0


def share(group: Group) -> float:
    return group.value("goodput_share") or 0.0


def limits(group: Group) -> str:
    said = group.records[0].get("metadata", {}).get("goodput")
    if not isinstance(said, dict):
        return "limits unknown"
    return ", ".join(f"{name.upper()} up to {number(ms)} ms" for name, ms in said.items())


def number(value: Any) -> str:  # noqa: ANN401
    return f"{value:g}" if isinstance(value, int | float) else str(value)
