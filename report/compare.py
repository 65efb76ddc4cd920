"""Two folders of results side by side: what became better or worse, and is it the same thing?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from report.results import COLUMNS, GOODPUT, Column, Group, Record, columns_of, groups

REPEATED = 2.0  # a change has to be so many times the spread between repeats to mean something
NOTICED = 0.03  # and at least this much


@dataclass(frozen=True)
class Change:
    label: str
    column: Column
    before: float
    after: float
    spread: float

    @property
    def relative(self) -> float:
        if not self.before:
            return math.inf if self.after else 0.0
        return self.after / self.before - 1

    @property
    def verdict(self) -> str:
        if abs(self.relative) < max(REPEATED * self.spread, NOTICED):
            return ""
        return "better" if (self.relative > 0) == self.column.more_is_better else "WORSE"

    @property
    def row(self) -> list[str]:
        sides = (f"{side:,.{self.column.digits}f}" for side in (self.before, self.after))
        around = f"±{self.spread:.1%}" if self.spread else "-"
        return [self.label, self.column.key, *sides, f"{self.relative:+.1%}", around, self.verdict]


def pairs(before: Sequence[Record], after: Sequence[Record]) -> list[tuple[Group, Group]]:
    """The loads that both measured, and measured validly."""
    left, right = ({g.label: g for g in groups(r) if g.valid} for r in (before, after))
    return [(left[label], right[label]) for label in left if label in right]


def compare(before: Sequence[Record], after: Sequence[Record]) -> list[Change]:
    return [
        Change(left.label, column, a, b, max(left.spread(column.key), right.spread(column.key)))
        for left, right in pairs(before, after)
        for column in (*COLUMNS, GOODPUT)
        if (a := left.value(column.key)) is not None and (b := right.value(column.key)) is not None
    ]


def comparison(before: Sequence[Record], after: Sequence[Record]) -> str:
    head = ["load", "", "before", "after", "change", "spread", ""]
    rows = [change.row for change in compare(before, after)]
    lines = [*differences(before, after), *left_out(before, after)]
    return "\n".join([*columns_of([head, *rows]), *lines])


def differences(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    """What makes a comparison lame: another client, say. One line for all loads that share it."""
    found: dict[str, list[str]] = {}
    for left, right in pairs(before, after):
        one, other = conditions(left), conditions(right)
        for name in one:
            if one[name] != other[name]:
                line = f"{name}: {one[name]} before, {other[name]} after"
                found.setdefault(line, []).append(left.label)
    every = len(pairs(before, after))
    return [f"UNLIKE {line} ({'every load' if len(labels) == every else ', '.join(labels)})"
            for line, labels in found.items()]  # fmt: skip


def conditions(group: Group) -> Record:
    """What two measurements should have in common, besides the load."""
    record = group.records[0]
    known = record.get("metadata", {})
    requests = record.get("completed") or 1
    return {
        "client": known.get("client"),
        "API": known.get("backend"),
        "model": known.get("served_model") or record["model_id"],
        "burstiness": known.get("burstiness"),
        "goodput limits": known.get("goodput"),
        "requests": record["case"]["num_prompts"],
        "input tokens a request": round(record.get("total_input_tokens", 0) / requests),
        "output tokens a request": round(record.get("total_output_tokens", 0) / requests),
    }


def left_out(before: Sequence[Record], after: Sequence[Record]) -> Iterator[str]:
    """What could not be compared must not look as if nothing had changed."""
    for side, mine, others in (("before", before, after), ("after", after, before)):
        labels = {g.label for g in groups(others)}
        yield from (f"only {side}: {g.label}" for g in groups(mine) if g.label not in labels)
        yield from (f"INVALID {side}, not compared: {g.label}" for g in groups(mine) if not g.valid)
