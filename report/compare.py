"""Compares folders of results: what became better or worse, and are the runs comparable?"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from report.results import COMPARED, Column, Group, Record, columns_of, groups, how, in_words

NOTICED = 0.03  # a smaller change means nothing, however certain it is
# Student's t, two-sided, 99 %, for 1, 2, ... degrees of freedom: how many standard errors apart two
# means have to be. Twenty loads have 180 figures: at 95 % nine of them would change by chance.
STUDENT = (63.7, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25, 3.17, 3.11, 3.05, 3.01, 2.98)
ONE_RUN, UNKNOWN = "one run", "unknown"


@dataclass(frozen=True)
class Change:
    """How one figure of one load changed."""

    label: str
    column: Column
    before: tuple[float, ...]  # one value per run
    after: tuple[float, ...]

    @property
    def means(self) -> tuple[float, float]:
        return statistics.fmean(self.before), statistics.fmean(self.after)

    @property
    def relative(self) -> float | None:
        """The change as a share; None if the mean was 0 before."""
        before, after = self.means
        return after / before - 1 if before else None

    @property
    def noise(self) -> float | None:
        """How far apart two such means may be by chance; None if a side has only one run."""
        sides = (self.before, self.after)
        if min(map(len, sides)) < 2:
            return None
        freedom = sum(len(side) - 1 for side in sides)
        squares = sum(statistics.variance(side) * (len(side) - 1) for side in sides)
        error = math.sqrt(squares / freedom * sum(1 / len(side) for side in sides))
        return error * STUDENT[min(freedom, len(STUDENT)) - 1]

    @property
    def noise_in_words(self) -> str:
        if self.noise is None:
            return "one run a side: chance cannot be judged"
        return f"by chance {in_words(self.noise, self.column)} more or less"

    @property
    def verdict(self) -> str:
        before, after = self.means
        if self.noise is None:
            return ONE_RUN if before != after else ""
        if abs(after - before) <= max(self.noise, NOTICED * abs(before)):
            return ""
        return "better" if (after > before) == self.column.more_is_better else "WORSE"

    @property
    def row(self) -> list[str]:
        sides = (in_words(side, self.column) for side in self.means)
        change = "-" if self.relative is None else f"{self.relative:+.1%}"
        around = f"±{self.noise / self.means[0]:.1%}" if self.noise and self.means[0] else "-"
        return [self.label, self.column.title, *sides, change, around, self.verdict]


HEAD = ("load", "", "before", "after", "change", "by chance", "")


def pairs(before: Sequence[Record], after: Sequence[Record]) -> list[tuple[Group, Group]]:
    """The loads that are valid in both."""
    left, right = ({g.label: g for g in groups(r) if g.valid} for r in (before, after))
    return [(left[label], right[label]) for label in left if label in right]


def compare(before: Sequence[Record], after: Sequence[Record]) -> list[Change]:
    return [
        Change(left.label, column, tuple(a), tuple(b))
        for left, right in pairs(before, after)
        for column in COMPARED
        if (a := left.values(column.key)) and (b := right.values(column.key))
    ]


def comparison(before: Sequence[Record], after: Sequence[Record]) -> str:
    changes = compare(before, after)
    rows = [HEAD, *(change.row for change in changes)]
    return "\n".join([*columns_of(rows), *outcome(changes), *remarks(before, after)])


def several(names: Sequence[str], folders: Sequence[Sequence[Record]]) -> str:
    """A row per figure: the first folder's value, then each other one's with its change."""
    first, *others = folders
    rows = [("load", "", *names), *rows_of([compare(first, other) for other in others])]
    lines = columns_of(rows) if rows[1:] else []
    for name, other in zip(names[1:], others, strict=True):
        said = [*outcome(compare(first, other)), *remarks(first, other)]
        lines += [f"{names[0]} before, {name} after:", *(f"  {line}" for line in said)]
    return "\n".join(lines)


def rows_of(changes: Sequence[Sequence[Change]]) -> Iterator[tuple[str, ...]]:
    sides = [{(each.label, each.column): each for each in side} for side in changes]
    for key in dict.fromkeys(key for side in sides for key in side):
        found = [side.get(key) for side in sides]
        before = next(each.row[2] for each in found if each)
        cells = (" ".join(filter(None, (*each.row[3:5], each.row[6]))) if each else "-"
                 for each in found)  # fmt: skip
        yield key[0], key[1].title, before, *cells


def outcome(changes: Sequence[Change]) -> list[str]:
    """The verdict in a sentence or two."""
    if not changes:
        return ["nothing to compare: the folders have no valid load in common"]
    found = Counter(change.verdict for change in changes)
    lines = []
    if unknown := sum(change.noise is None for change in changes):
        lines.append(f"no verdict on {unknown} figures: with one run a side nobody knows how much "
                     "two runs differ by chance; --repeat 3 on both sides tells")  # fmt: skip
    if judged := len(changes) - unknown:
        lines.append(f"of {judged} figures {found['better']} are better and {found['WORSE']} "
                     f"WORSE, by {NOTICED:.0%} or more and by more than repeats differ (Student's "
                     "t, 99 %)")  # fmt: skip
    return lines


def remarks(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    return [*differences(before, after), *left_out(before, after)]


def differences(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    """What makes a comparison unfair, e.g. another client. One line for all loads that share it."""
    found: dict[str, list[str]] = {}
    for left, right in pairs(before, after):
        one, other = conditions(left), conditions(right)
        for name in one:
            if one[name] != other[name] and UNKNOWN not in (one[name], other[name]):
                line = f"{name}: {one[name]} before, {other[name]} after"
                found.setdefault(line, []).append(left.label)
    every = len(pairs(before, after))
    return [f"UNLIKE {line} ({'every load' if len(labels) == every else ', '.join(labels)})"
            for line, labels in found.items()]  # fmt: skip


def conditions(group: Group) -> Record:
    """What two measurements should have in common, besides the load."""
    record = group.records[0]
    alike = {name: value for name, value in how(record).items() if name != "version"}
    requests = record.get("completed") or 1
    return {
        **alike,
        "model": record.get("metadata", {}).get("served_model") or record["model_id"],
        "prompts from the cache": cached(group),
        "input tokens a request": round((record.get("total_input_tokens") or 0) / requests),
        "output tokens a request": round((record.get("total_output_tokens") or 0) / requests),
    }


def cached(group: Group) -> str:
    """The cached share to a tenth: a cache that is a little warmer makes no difference."""
    share = group.value("cached_share")
    return UNKNOWN if share is None else f"{round(share, 1):.0%}"


def left_out(before: Sequence[Record], after: Sequence[Record]) -> Iterator[str]:
    """The loads that were not compared, so that they do not look unchanged."""
    for side, mine, others in (("before", before, after), ("after", after, before)):
        labels = {g.label for g in groups(others)}
        yield from (f"only {side}: {g.label}" for g in groups(mine) if g.label not in labels)
        yield from (f"INVALID {side}, not compared: {g.label}" for g in groups(mine) if not g.valid)
