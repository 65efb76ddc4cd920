"""How a chart is drawn: once, by matplotlib, as a PNG and as the SVG that the page holds.

The SVG is text in the page itself: it takes the page's fonts and colours, dark or light, and its
points have titles, which a browser shows when they are pointed at.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import product
from typing import Any

from common.talk import say
from report.charts import Band, Bands, Chart, Point

INK = "#202124"  # in the page: the colour of its text
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#64748b", "#eab308", "#06b6d4")
WIDTH, HEIGHT = 5.4, 3.5  # inches: as wide as half of the page, or a telephone
FAR_APART = 30  # from the smallest to the largest: then the axis is logarithmic
OFFSETS = tuple(product((5, -5), (5, -5))) + tuple(product((14, -14), (14, -14)))  # points
LIKE_PAGE: Any = {  # matplotlib's own type names each of its 300 settings
    "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 10, "text.color": INK,
    "text.parse_math": False,  # a folder's name may have two dollar signs
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    name: str
    svg: str  # for the inside of a page
    png: bytes  # b"" where only a page is made


def draw(charts: Sequence[Chart | Bands], *, files: bool = False) -> list[Picture]:
    """Nothing without matplotlib: numbers are there without it."""
    if not charts:
        return []
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        say("no plots: matplotlib is not installed (`pip install matplotlib`)")
        return []
    with matplotlib.rc_context(LIKE_PAGE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in letters that its font lacks: the page has them
        return [picture(chart, Figure(layout="constrained"), files) for chart in charts]


def picture(chart: Chart | Bands, figure: Any, file: bool) -> Picture:  # noqa: ANN401
    tips = draw_bands(chart, figure) if isinstance(chart, Bands) else draw_lines(chart, figure)
    svg = inline(saved(figure, "svg").decode(), tips)
    return Picture(chart.name, svg, saved(figure, "png") if file else b"")


def draw_lines(chart: Chart, figure: Any) -> list[str]:  # noqa: ANN401
    figure.set_size_inches(WIDTH, HEIGHT)
    points = [point for found in chart.series.values() for point in found]
    axes, tips = figure.subplots(), list[str]()
    for colour, (label, found) in zip(colours(), chart.series.items(), strict=False):
        alpha = 0.3 if label in chart.pale else 1.0
        line = [p.x for p in found], [p.y for p in found]
        axes.plot(*line, color=colour, label=label, alpha=alpha)
        for point in found:  # each a group of its own in the SVG, to hold its title
            axes.plot(point.x, point.y, "o", color=colour, alpha=alpha, gid=f"tip-{len(tips)}")
            tips.append(point.tip)
    axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    scale(axes, [p.x for p in points])
    if chart.within:
        ends = (given if given is not None else end
                for given, end in zip(chart.within, axes.get_xlim(), strict=True))  # fmt: skip
        axes.axvspan(*ends, color="#10b981", alpha=0.12, linewidth=0)
    axes.set_ylim(0, 1.15 * max(p.y for p in points) or 1)
    axes.grid(alpha=0.25)
    if len(chart.series) > 1:
        axes.legend(fontsize=8)
    lay_out(figure)
    name_points(axes, [p for p in points if p.label])
    return tips


def lay_out(figure: Any) -> None:  # noqa: ANN401
    """Where things are is found out once, not once a format: it takes most of the time."""
    figure.draw_without_rendering()
    figure.set_layout_engine(None)  # not "none", whose place-holder has each format drawn twice


def scale(axes: Any, values: Sequence[float]) -> None:  # noqa: ANN401
    low, high = min(values), max(values)
    if low > 0 and high / low > FAR_APART:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, 1.12 * high or 1)


def name_points(axes: Any, points: Sequence[Point]) -> None:  # noqa: ANN401
    """A label beside each point where there is room; at saturation they lie on each other."""
    taken = [dot(axes, point) for point in points]
    for point in points:
        for x, y in OFFSETS:
            text = axes.annotate(
                point.label, point[:2], xytext=(x, y), textcoords="offset points", fontsize=8,
                ha="left" if x > 0 else "right", va="bottom" if y > 0 else "top",
            )  # fmt: skip
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken) and inside(axes, box):
                taken.append(box)
                break
            text.remove()


def dot(axes: Any, point: Point) -> Any:  # noqa: ANN401
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform(point[:2])
    return Bbox.from_extents(x - 4, y - 4, x + 4, y + 4)


def inside(axes: Any, box: Any) -> bool:  # noqa: ANN401
    whole, plot = axes.figure.bbox, axes.bbox
    return bool(plot.x0 <= box.x0 and box.x1 <= whole.x1 and plot.y0 <= box.y0)


def draw_bands(chart: Bands, figure: Any) -> list[str]:  # noqa: ANN401
    """A row a load: thin p5 to p95, thick p25 to p75, a dot at the median, a tick at p99."""
    figure.set_size_inches(WIDTH, 1.1 + 0.24 * len(chart.rows))
    axes = figure.subplots()
    sides = list(dict.fromkeys(row.side for row in chart.rows))
    for at, row in enumerate(chart.rows):
        draw_band(axes, at, row, COLOURS[sides.index(row.side)])
    axes.set(title=chart.title, xlabel=f"{chart.x} (p5 to p95, p25 to p75, median, | p99)")
    labels = [" ".join(filter(None, (row.label, row.side))) for row in chart.rows]
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    scale(axes, [v for row in chart.rows for p, v in row.values.items() if 5 <= p <= 99])
    axes.grid(axis="x", alpha=0.25)
    lay_out(figure)
    return [row.tip for row in chart.rows]


def draw_band(axes: Any, at: int, row: Band, colour: str) -> None:  # noqa: ANN401
    value = row.values
    for low, high, width in ((5, 95, 2), (25, 75, 7)):
        if low in value and high in value:
            axes.plot([value[low], value[high]], [at, at], color=colour, linewidth=width, alpha=0.5,
                      solid_capstyle="butt", gid=f"tip-{at}")  # fmt: skip
    for p, sign in ((50, "o"), (99, "|")):
        if p in value:
            axes.plot(value[p], at, sign, color=colour, markersize=6, gid=f"tip-{at}")


def colours() -> Iterator[str]:
    while True:
        yield from COLOURS


def saved(figure: Any, kind: str) -> bytes:  # noqa: ANN401
    out, svg = io.BytesIO(), kind == "svg"
    dateless = {"Date": None} if svg else None
    figure.savefig(out, format=kind, dpi=150, transparent=svg, metadata=dateless)
    return out.getvalue()


def inline(svg: str, tips: Sequence[str]) -> str:
    """For the inside of a page: as wide as there is room, and titles on the points."""

    def titled(found: re.Match[str]) -> str:
        return f'<g class="tip"><title>{escape(tips[int(found[1])])}</title>'

    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    rest = re.sub(r'<g id="tip-(\d+)">', titled, rest)
    return head + ">" + re.sub(r'<g id="[^"]*">', "<g>", rest).replace(INK, "currentColor")
