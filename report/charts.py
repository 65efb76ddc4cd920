"""The plots of a report: which there are, and how matplotlib draws them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.talk import say
from report.results import Group

Points = list[tuple[float, float]]
SHORT = {"input_len": "in", "output_len": "out", "concurrency": "c", "rate": "rate"}


@dataclass(frozen=True)
class Chart:
    name: str
    title: str
    x: str
    y: str
    series: dict[str, Points] = field(default_factory=dict)
    labels: tuple[str, ...] = ()  # of all points, in order


@dataclass(frozen=True)
class Picture:
    png: bytes
    svg: bytes


def all_charts(groups: Sequence[Group]) -> list[Chart]:
    return [
        against("ttft_input", "Time to first token against input length", groups, "prefill",
                "input_len", "input tokens", "ttft"),
        against("itl_output", "Inter-token latency against output length", groups, "decode",
                "output_len", "output tokens", "itl"),
        load_curve("throughput_latency", "Throughput against latency over concurrency", groups,
                   "concurrency"),
        load_curve("sweep", "The sweep: throughput against latency", groups, "sweep"),
    ]  # fmt: skip


def against(
    name: str, title: str, groups: Sequence[Group], type_: str, length: str, x: str, metric: str
) -> Chart:
    """A latency over a length, mean and p99."""
    series: dict[str, Points] = {}
    for label, mine in families(groups, type_, length).items():
        mine.sort(key=lambda g: g.case[length])
        for kind in ("mean", "p99"):
            key = f"{kind}_{metric}_ms"
            found = points(mine, lambda g: g.case[length], lambda g, key=key: g.value(key))
            if found:
                series[f"{kind}{label}"] = found
    return Chart(name, title, x, f"{metric.upper()}, ms", series)


def load_curve(name: str, title: str, groups: Sequence[Group], type_: str) -> Chart:
    """Each point a step of load: further up more work done, further right a longer wait."""
    series, labels = {}, []
    for label, family in families(groups, type_, "concurrency", "rate").items():
        mine = sorted(family, key=load_of)  # not as they were measured
        latency, work = (
            (lambda g: g.value("mean_e2el_ms")),
            (lambda g: g.value("output_throughput")),
        )
        if found := points(mine, latency, work):
            series[f"throughput{label}"] = found
            labels += [step_of(g) for g in mine]
    return Chart(
        name, title, "mean end-to-end latency, ms", "output tokens/s", series, tuple(labels)
    )


def load_of(group: Group) -> tuple[float, float]:
    """What orders the steps: the rate, then the streams."""
    return float(group.case["rate"]), float(group.case["concurrency"] or math.inf)


def families(groups: Sequence[Group], type_: str, *running: str) -> dict[str, list[Group]]:
    """The valid loads of a type, a family for all that differ only in what runs along the axis."""
    mine = [g for g in groups if g.valid and g.case["type"] == type_]
    rest = [k for k in ("input_len", "output_len", "concurrency", "rate") if k not in running]
    differing = [k for k in rest if len({g.case[k] for g in mine}) > 1]
    found: dict[str, list[Group]] = {}
    for group in mine:
        label = "".join(f", {SHORT[k]} {group.case[k] or 'unlimited'}" for k in differing)
        found.setdefault(label, []).append(group)
    return found


def step_of(group: Group) -> str:
    streams, rate = group.case["concurrency"], group.case["rate"]
    return f"{rate:g}/s" if rate != "inf" and not streams else f"c={streams or 'unlimited'}"


def points(groups: Sequence[Group], x: Any, y: Any) -> Points:  # noqa: ANN401
    pairs = [(x(g), y(g)) for g in groups]
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def draw(charts: Sequence[Chart]) -> list[Picture]:
    """Nothing without matplotlib: numbers are there without it."""
    if not charts:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no plots: matplotlib is not installed (`pip install matplotlib`)")
        return []
    return [render(chart, Figure(figsize=(6, 3.8), layout="constrained")) for chart in charts]


def render(chart: Chart, figure: Any) -> Picture:  # noqa: ANN401
    axes = figure.subplots()
    everything = [point for found in chart.series.values() for point in found]
    for label, found in chart.series.items():
        axes.plot(*zip(*found, strict=True), marker="o", label=label)
    for text, point in zip(chart.labels, everything, strict=False):
        axes.annotate(text, point, textcoords="offset points", xytext=(6, -12), fontsize=9)
    axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    axes.set_xlim(0, 1.1 * max(x for x, _ in everything) or 1)
    axes.set_ylim(0, 1.1 * max(y for _, y in everything) or 1)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(chart.series) > 1:
        axes.legend(frameon=False)
    return Picture(saved(figure, "png"), saved(figure, "svg"))


def saved(figure: Any, kind: str) -> bytes:  # noqa: ANN401
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()
