"""The plots of a report: which there are, and how matplotlib draws them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from console import say

Points = list[tuple[float, float]]
COLOURS = ("#2f6fb2", "#d1603d", "#3d9970")


class Group(Protocol):
    """A load, averaged over its repeats (report.Group)."""

    @property
    def case(self) -> dict[str, Any]: ...
    @property
    def valid(self) -> bool: ...
    def value(self, key: str) -> float | None: ...


@dataclass(frozen=True)
class Chart:
    name: str
    title: str
    x: str
    y: str
    series: dict[str, Points] = field(default_factory=dict)
    labels: tuple[str, ...] = ()  # of the first series' points


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
    """A latency over a length: mean, median and p99."""
    mine = sorted((g for g in groups if usable(g, type_)), key=lambda g: g.case[length])
    series = {
        kind: points(mine, lambda g: g.case[length], lambda g, k=kind: g.value(f"{k}_{metric}_ms"))
        for kind in ("mean", "median", "p99")
    }
    series = {kind: found for kind, found in series.items() if found}
    return Chart(name, title, x, f"{metric.upper()}, ms", series)


def load_curve(name: str, title: str, groups: Sequence[Group], type_: str) -> Chart:
    mine = [g for g in groups if usable(g, type_)]
    found = points(mine, lambda g: g.value("mean_e2el_ms"), lambda g: g.value("output_throughput"))
    labels = tuple(step_of(g) for g in mine)
    series = {"output tokens/s": found} if found else {}
    return Chart(name, title, "mean end-to-end latency, ms", "output tokens/s", series, labels)


def step_of(group: Group) -> str:
    streams = group.case["concurrency"]
    return (
        f"c={streams}" if streams else str(group.case["label"].rpartition("rate")[2].split("-")[0])
    )


def usable(group: Group, type_: str) -> bool:
    """An invalid run is in no plot."""
    return group.valid and group.case["type"] == type_


def points(groups: Sequence[Group], x: Any, y: Any) -> Points:  # noqa: ANN401
    pairs = [(x(g), y(g)) for g in groups]
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def draw(charts: Sequence[Chart]) -> list[Picture]:
    """Nothing without matplotlib: numbers are there without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no plots: matplotlib is not installed (`pip install matplotlib`)")
        return []
    return [render(chart, Figure(figsize=(7, 4.2), layout="constrained")) for chart in charts]


def render(chart: Chart, figure: Any) -> Picture:  # noqa: ANN401
    axes = figure.subplots()
    for (label, found), colour in zip(chart.series.items(), COLOURS, strict=False):
        axes.plot(*zip(*found, strict=True), marker="o", label=label, color=colour)
    first = next(iter(chart.series.values()))
    for label, point in zip(chart.labels, first, strict=False):
        axes.annotate(label, point, textcoords="offset points", xytext=(6, -12), fontsize=9)
    axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    axes.set_ylim(bottom=0)
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
