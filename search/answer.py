"""The answer: table, tune.json and page. Which is best, by how much, and how to serve it."""

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

from common.talk import clean, counted, whole_file, write_json
from launch.arguments import given
from report import page
from report.charts import Chart
from report.charts import Point as Dot
from report.draw import draw
from report.results import Group, columns_of
from search import race
from search.candidates import Candidate, LeftOut

Record = dict[str, Any]
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2EL"}


@dataclass
class Outcome:
    """All that is known so far about the candidates."""

    model: str
    command: Sequence[str]  # the launcher's arguments for all, with MODEL and the engine's own
    limits: Mapping[str, float]  # ms, which 99 % of the requests have to keep
    candidates: Sequence[Candidate]
    left_out: Sequence[LeftOut]
    bench: Sequence[str] = ()  # what bench.py is given for every load
    groups: dict[str, dict[int, Group]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # why a candidate did not serve
    unfinished: str = ""  # why the search has ended early
    starts: list[float] = field(default_factory=list)  # seconds that each took
    runs: list[float] = field(default_factory=list)

    @property
    def measured(self) -> dict[str, dict[int, race.Point]]:
        return {name: points_of(found) for name, found in self.groups.items()}

    def candidate(self, name: str) -> Candidate:
        return next(each for each in self.candidates if each.name == name)

    def command_of(self, name: str) -> str:
        """A candidate's command, ready to paste; API keys are masked."""
        words = self.candidate(name).words(self.command)
        for key in filter(None, (given(words, flag) for flag in ("--api-key", "--admin-api-key"))):
            words = [re.sub(f"^(-[^=]+=)?{re.escape(key)}$", r"\1***", word) for word in words]
        return shlex.join([".venv/bin/python", "run_sbatch.py", *words])


def points_of(found: Mapping[int, Group]) -> dict[int, race.Point]:
    return {load: point_of(group) for load, group in found.items()}


def point_of(group: Group) -> race.Point:
    def value(key: str, otherwise: float = 0.0) -> float:
        found = group.value(key)
        return otherwise if found is None else found

    p99 = {name: value(f"p99_{name}_ms", math.nan) for name in NAMES}
    return race.Point(value("user_throughput"), value("gpu_throughput"), p99, group.valid)


def ms(point: race.Point, name: str, digits: int = 1) -> str:
    """A p99 in ms; `-` if there is none, as for the TPOT of answers of one token."""
    value = point.p99[name]
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"


@dataclass(frozen=True)
class Best:
    """The best candidate within some limits; `name` is '' if none keeps them."""

    limits: Mapping[str, float]
    name: str = ""
    load: int = 0
    ties: tuple[str, ...] = ()  # others that are no worse, as far as the repeats can tell
    margin: Mapping[str, float] = field(default_factory=dict)  # the share left of each limit


def answers(outcome: Outcome) -> list[Best]:
    """The best for each limit, and for all of them; without limits, that of the most throughput."""
    return [best_of(outcome, limits) for limits in race.objectives(outcome.limits) or [{}]]


def best_of(outcome: Outcome, limits: Mapping[str, float]) -> Best:
    measured = outcome.measured
    found = race.best(measured, limits)
    if not found:
        return Best(limits)
    name, load = found
    point, around = measured[name][load], spread(outcome, name, load)
    ties = []
    for other in measured:
        rival = race.best({other: measured[other]}, limits) if other != name else None
        if rival:
            apart = 1 - measured[other][rival[1]].gpu / point.gpu
            if apart <= max(around, spread(outcome, *rival)):
                ties.append(other)
    margin = {each: 1 - point.p99[each] / most for each, most in limits.items()}
    return Best(limits, name, load, tuple(ties), margin)


def spread(outcome: Outcome, name: str, load: int) -> float:
    """The spread between the repeats, as a share; 0 for a single run."""
    return outcome.groups[name][load].spread("gpu_throughput")


def number(value: float) -> str:
    """A GPU's throughput in at least three digits: 2.31 of a large model, 12,345 of a small one."""
    return f"{value:,.{max(0, 2 - int(math.log10(max(value, 1))))}f}"


def in_words(limits: Mapping[str, float]) -> str:
    """`TTFT <= 500 ms, TPOT <= 30 ms`"""
    return ", ".join(f"{NAMES[name]} <= {most:g} ms" for name, most in limits.items())


# --- the terminal ---------------------------------------------------------------------------------


def text(outcome: Outcome) -> str:
    lines = [
        *table(outcome),
        "",
        *(line for best in answers(outcome) for line in say(outcome, best)),
    ]
    lines += [f"left out: {each.name}: {each.why}" for each in outcome.left_out]
    if outcome.unfinished:
        lines.append(f"not finished: {outcome.unfinished}")
    return "\n".join(lines)


def table(outcome: Outcome) -> list[str]:
    """A row for each point of the front, then one for each other candidate at its best."""
    front = race.front(outcome.measured)
    others = [c.name for c in outcome.candidates if c.name not in {name for name, _ in front}]
    heads = ["", "GPUs", "streams", "tok/s per GPU", "tok/s per user", "TTFT p99", "TPOT p99", ""]
    rows = [row(outcome, name, load, "on the front") for name, load in front]
    for name in others:
        at = race.best({name: outcome.measured.get(name, {})}, {})
        if at:
            rows.append(row(outcome, name, at[1], ""))
        else:
            gpus = outcome.candidate(name).gpus
            rows.append([name, str(gpus), *["-"] * 5, "failed" if name in outcome.failed else "-"])
    reasons = [f"{name}: {why}" for name, why in outcome.failed.items()]
    return [*columns_of([heads, *rows]), *reasons]


def row(outcome: Outcome, name: str, load: int, mark: str) -> list[str]:
    group, gpus = outcome.groups[name][load], outcome.candidate(name).gpus
    point = point_of(group)
    around = group.spread("gpu_throughput")
    per_gpu = number(point.gpu) + (f" ±{around:.1%}" if len(group.records) > 1 else "")
    latencies = [ms(point, metric) for metric in ("ttft", "tpot")]
    return [name, str(gpus), str(load), per_gpu, f"{point.user:,.1f}", *latencies, mark]


def say(outcome: Outcome, best: Best) -> list[str]:
    """What is best, by how much, and the command line for it."""
    goal = f"within {in_words(best.limits)}" if best.limits else "most throughput a GPU"
    if not best.name:
        found = [p for by_load in outcome.measured.values() for p in by_load.values()]
        if any(point.valid for point in found):
            return [f"{goal}: no candidate stays within that at any load"]
        return [f"{goal}: {'every load was invalid' if found else 'nothing was measured'}"]
    point = outcome.measured[best.name][best.load]
    left = ", ".join(f"{share:.0%} of {NAMES[name]} left" for name, share in best.margin.items())
    words = [f"{number(point.gpu)} tokens/s per GPU at {counted(best.load, 'stream')}", left]
    lines = [f"{goal}: {best.name}, {', '.join(filter(None, words))}"]
    if best.ties:
        others = ", ".join(best.ties)
        lines.append(f"  a tie with {others}: the repeats differ by more than they do")
    if len(outcome.groups[best.name][best.load].records) < 2:
        lines.append("  measured once, so nobody knows how much runs differ, or what is a tie")
    return [*lines, f"  serve it: {outcome.command_of(best.name)}"]


# --- files ----------------------------------------------------------------------------------------


def write(outcome: Outcome, folder: Path) -> None:
    """tune.json for programs, tune.html for people."""
    write_json(folder / "tune.json", document(outcome))
    with whole_file(folder / "tune.html") as file:
        file.write(html(outcome))


def document(outcome: Outcome) -> Record:
    measured, front = outcome.measured, race.front(outcome.measured)
    return {
        "model": outcome.model,
        "limits_ms": dict(outcome.limits),
        "unfinished": outcome.unfinished or None,
        "bench": list(outcome.bench),
        "seconds": {"start": mean(outcome.starts), "run": mean(outcome.runs)},
        "best": [
            {
                "limits_ms": dict(best.limits),
                "name": best.name or None,
                "streams": best.load or None,
                "ties": list(best.ties),
                "margin": dict(best.margin),
                "command": outcome.command_of(best.name) if best.name else None,
            }
            for best in answers(outcome)
        ],
        "front": [{"name": name, "streams": load} for name, load in front],
        "candidates": [
            {
                "name": each.name,
                "shape": each.shape,
                "gpus": each.gpus,
                "replicas": each.replicas,
                "arguments": list(each.args),
                "failed": outcome.failed.get(each.name),
                "loads": [
                    {
                        "streams": load,
                        "valid": point.valid,
                        "user_throughput": point.user,
                        "gpu_throughput": point.gpu,
                        "spread": spread(outcome, each.name, load),
                        **{f"p99_{metric}_ms": clean(value) for metric, value in point.p99.items()},
                    }
                    for load, point in sorted(measured.get(each.name, {}).items())
                ],
            }
            for each in outcome.candidates
        ],
        "left_out": [{"name": each.name, "why": each.why} for each in outcome.left_out],
    }


def mean(seconds: Sequence[float]) -> float | None:
    return sum(seconds) / len(seconds) if seconds else None


def html(outcome: Outcome) -> str:
    best = answers(outcome)
    found = [line for each in best for line in say(outcome, each)]
    front = race.front(outcome.measured)
    marks = {(name, load): mark_of(group, (name, load) in front)
             for name, by_load in outcome.groups.items()
             for load, group in sorted(by_load.items())}  # fmt: skip
    rows = [[escape(cell) for cell in row(outcome, *at, mark)] for at, mark in marks.items()]
    heads = ["candidate", "GPUs", "streams", "tok/s per GPU", "tok/s per user", "TTFT p99",
             "TPOT p99", ""]  # fmt: skip
    failed = [f"{name}: {why}" for name, why in outcome.failed.items()]
    left_out = [f"{each.name}: {each.why}" for each in outcome.left_out]
    parts = [
        page.section("The answer", page.listed(found)),
        page.section("Not finished", escape(outcome.unfinished)),
        page.charts(draw(list(charts(outcome)))),
        page.section("Every load", page.table(heads, rows) if rows else ""),
        page.section("Did not serve", page.listed(failed)),
        page.section("Left out", page.listed(left_out)),
    ]
    return page.document(f"Configurations of {outcome.model}", parts)


def mark_of(group: Group, on_front: bool) -> str:
    if not group.valid:
        return "INVALID: " + "; ".join(group.problems)
    return "on the front" if on_front else ""


def charts(outcome: Outcome) -> Iterable[Chart]:
    """Throughput per user, and TTFT, against throughput per GPU; a line per candidate."""
    measured = {n: f for n, f in outcome.measured.items() if any(p.valid for p in f.values())}
    if not measured:
        return
    shown = {name for name, _ in race.front(measured)} | {b.name for b in answers(outcome)}
    pale = frozenset(name for name in measured if name not in shown)
    y = "output tokens/s per GPU"
    users = Chart("front", "For one user, and for a GPU", "output tokens/s per user", y, pale=pale)
    waits = Chart("ttft", "Waiting for the first token", "TTFT p99, ms", y, pale=pale)
    for name, found in measured.items():
        valid = [(load, point) for load, point in sorted(found.items()) if point.valid]
        tips = [f"{name}, {counted(load, 'stream')}: {number(p.gpu)} per GPU, "
                f"{p.user:,.1f} per user, p99 of TTFT {ms(p, 'ttft')} ms, "
                f"of TPOT {ms(p, 'tpot', 2)} ms"
                for load, p in valid]  # fmt: skip
        ys = [point.gpu for _, point in valid]
        for chart, xs in (
            (users, [point.user for _, point in valid]),
            (waits, [point.p99["ttft"] for _, point in valid]),
        ):
            chart.series[name] = list(map(Dot, xs, ys, tips))
    yield with_region(users, 1000 / outcome.limits["tpot"] if "tpot" in outcome.limits else None)
    yield with_region(waits, None, outcome.limits.get("ttft"))


def with_region(chart: Chart, low: float | None, high: float | None = None) -> Chart:
    """The chart, with the part marked that is within the limits."""
    return chart if low is None and high is None else replace(chart, within=(low, high))
