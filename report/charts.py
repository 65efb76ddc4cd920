"""The charts of a report: which there are, and what their points say when they are pointed at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from report.results import Group, figures, load_of

SHORT = {"input_len": "in", "output_len": "out", "concurrency": "c", "rate": "rate"}
BANDS = ("ttft", "itl", "e2el")
Side = tuple[str, Sequence[Group]]  # of a comparison: `before` or `after`, and its loads


class Point(NamedTuple):
    x: float
    y: float
    tip: str
    label: str = ""


@dataclass(frozen=True)
class Chart:
    name: str
    title: str
    x: str
    y: str
    series: dict[str, list[Point]] = field(default_factory=dict)
    pale: frozenset[str] = frozenset()  # series that do not matter so much
    within: tuple[float | None, float | None] | None = None  # the part of the x axis that is marked


class Band(NamedTuple):
    """One load's latencies: percentile -> ms."""

    label: str
    side: str
    values: dict[float, float]
    tip: str


@dataclass(frozen=True)
class Bands:
    name: str
    title: str
    x: str
    rows: list[Band] = field(default_factory=list)


def all_charts(sides: Sequence[Side]) -> list[Chart | Bands]:
    """Those that have anything to show."""
    charts = [
        against("ttft_input", "Time to first token against input length", sides, "prefill",
                "input_len", "input tokens", "ttft"),
        against("itl_output", "Inter-token latency against output length", sides, "decode",
                "output_len", "output tokens", "itl"),
        load_curve("throughput_latency", "Throughput against latency over concurrency", sides,
                   "concurrency"),
        load_curve("sweep", "The sweep: throughput against latency", sides, "sweep"),
        per_user(sides),
    ]  # fmt: skip
    spread = [bands(metric, sides) for metric in BANDS]
    return [*(c for c in charts if any(c.series.values())), *(b for b in spread if b.rows)]


def against(
    name: str, title: str, sides: Sequence[Side], type_: str, length: str, x: str, metric: str
) -> Chart:
    """A latency over a length, mean and p99."""
    chart = Chart(name, title, x, f"{metric.upper()}, ms")
    for label, found in families(sides, [type_], length):
        mine = sorted((g for g in found if g.case[length]), key=lambda g: g.case[length])
        for kind in ("mean", "p99"):
            points = [
                Point(g.case[length], y, f"{g.label}: {kind} {metric.upper()} {y:,.2f} ms")
                for g in mine
                if (y := g.value(f"{kind}_{metric}_ms")) is not None
            ]
            chart.series[kind + label] = points
    return chart


def load_curve(name: str, title: str, sides: Sequence[Side], type_: str) -> Chart:
    """Each point a step of load: further up more work done, further right a longer wait."""
    chart = Chart(name, title, "mean end-to-end latency, ms", "output tokens/s")
    for label, found in families(sides, [type_], "concurrency", "rate"):
        chart.series["throughput" + label] = steps(
            found, lambda g: g.value("mean_e2el_ms"), lambda g: g.value("output_throughput")
        )
    return chart


def per_user(sides: Sequence[Side]) -> Chart:
    """What one user gets against what the GPUs do for all: the choice of a load is one of these."""
    everything = [g for _, found in sides for g in found]
    key, y = "gpu_throughput", "output tokens/s per GPU"
    if not all(g.value(key) for g in everything):
        key, y = "output_throughput", "output tokens/s"
    chart = Chart("per_user", "For one user, and for all", "output tokens/s per user", y)
    for type_ in ("concurrency", "sweep"):
        for label, found in families(sides, [type_], "concurrency", "rate"):
            chart.series[type_ + label] = steps(
                found, lambda g: g.value("user_throughput"), lambda g: g.value(key)
            )
    return chart


Value = Callable[[Group], float | None]


def steps(found: Iterable[Group], x: Value, y: Value) -> list[Point]:
    """Points from load to load, and not as they were measured."""
    return [
        Point(a, b, f"{g.label}: {figures(g)}", step_of(g))
        for g in sorted(found, key=load_of)
        if (a := x(g)) is not None and (b := y(g)) is not None
    ]


def bands(metric: str, sides: Sequence[Side]) -> Bands:
    """How a latency is spread over the requests of each load."""
    name = metric.upper()
    chart = Bands(f"{metric}_spread", f"{name}: how it is spread", f"{name}, ms")
    pairs = [(g, side) for side, found in sides for g in found if g.valid]
    order = {label: at for at, label in enumerate(dict.fromkeys(g.label for g, _ in pairs))}
    rows = [(g.label, side, g.percentiles(metric)) for g, side in pairs]
    rows.sort(key=lambda row: order[row[0]])  # the sides of a load next to each other
    for label, side, values in rows:
        if any(5 <= p <= 99 for p in values):
            said = ", ".join(f"p{p:g} {ms:,.2f}" for p, ms in values.items() if p not in (0, 100))
            tip = f"{' '.join(filter(None, (label, side)))}: {said} ms"
            chart.rows.append(Band(label, side, values, tip))
    return chart


def families(
    sides: Sequence[Side], types: Sequence[str], *running: str
) -> list[tuple[str, list[Group]]]:
    """The valid loads of a type, a family for all that differ only in what runs along the axis."""
    mine = [(s, g) for s, found in sides for g in found if g.valid and g.case["type"] in types]
    rest = [k for k in ("input_len", "output_len", "concurrency", "rate") if k not in running]
    differing = [k for k in rest if len({g.case[k] for _, g in mine}) > 1]
    found: dict[str, list[Group]] = {}
    for side, group in mine:
        words = [side] if side else []
        words += [f"{SHORT[k]} {group.case[k] or 'unlimited'}" for k in differing]
        found.setdefault("".join(f", {word}" for word in words), []).append(group)
    return list(found.items())


def step_of(group: Group) -> str:
    streams, rate = group.case["concurrency"], group.case["rate"]
    return f"{rate:g}/s" if rate != "inf" and not streams else f"c={streams or 'unlimited'}"
