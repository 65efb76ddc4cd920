#!/usr/bin/env python3
"""Results of bench.py: a table, summary.json and .csv, report.html, plots.

Examples:
    python report.py results/20261124-101500         # write its report again
    python report.py compare results/A results/B     # better or worse?
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import charts
import page
from bench_place import exit_code
from clients import DETAILS
from live import colour
from metrics import KINDS, METRICS, spread
from nodes import die, say, whole_file, write_json

Record = dict[str, Any]
SUMMARY = ("summary.json", "summary.csv")
REPEATED = 2.0  # a change has to be so many times the spread between repeats to mean something
NOTICED = 0.03  # and at least this much


@dataclass(frozen=True)
class Column:
    key: str
    title: str
    digits: int = 1
    more_is_better: bool = False


COLUMNS = (
    Column("request_throughput", "req/s", 2, more_is_better=True),
    Column("output_throughput", "out tok/s", 0, more_is_better=True),
    Column("mean_ttft_ms", "TTFT ms"),
    Column("p99_ttft_ms", "p99"),
    Column("mean_tpot_ms", "TPOT ms", 2),
    Column("mean_itl_ms", "ITL ms", 2),
    Column("p99_itl_ms", "p99", 2),
    Column("mean_e2el_ms", "E2EL ms", 0),
)
GOODPUT = Column("request_goodput", "good req/s", 2, more_is_better=True)
CSV_FIELDS = (
    "name", "type", "input_len", "output_len", "concurrency", "request_rate", "repeat",
    "num_prompts", "completed", "valid", "duration",
    "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput",
    "output_throughput", "total_token_throughput", "user_throughput",
    *(f"{kind}_{name}_ms" for name in METRICS for kind in KINDS),
    "problems",
)  # fmt: skip


# --- groups: a load and its repeats ---------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    label: str
    records: tuple[Record, ...]

    @property
    def valid(self) -> bool:
        return all(r["valid"] for r in self.records)

    def values(self, key: str) -> list[float]:
        return [float(r[key]) for r in self.records if r.get(key) is not None]

    def value(self, key: str) -> float | None:
        values = self.values(key)
        return statistics.fmean(values) if values else None

    def spread(self, key: str) -> float:
        return spread(self.values(key))

    @property
    def case(self) -> Record:
        found: Record = self.records[0]["case"]
        return found

    @property
    def problems(self) -> list[str]:
        return list(dict.fromkeys(p for r in self.records for p in r["problems"]))


def groups(records: Iterable[Record]) -> list[Group]:
    """A load's repeats together; what another client left in the folder is no repeat."""
    together: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        known, case = record.get("metadata", {}), record["case"]
        how = f"{known.get('client')}, {record['model_id']}, {case['num_prompts']} requests"
        together.setdefault((case["label"], how), []).append(record)
    ways = Counter(label for label, _ in together)
    return [Group(label if ways[label] == 1 else f"{label} ({how})", tuple(found))
            for (label, how), found in together.items()]  # fmt: skip


# --- text -----------------------------------------------------------------------------------------


def table(records: Sequence[Record]) -> str:
    """A row a load; repeats are averaged, with their spread."""
    found, columns = groups(records), columns_for(records)
    rows = [[g.label, *(cell(g, c) for c in columns), "" if g.valid else "INVALID"] for g in found]
    lines = columns_of([["", *(c.title for c in columns), ""], *rows])
    lines += [f"INVALID {g.label}: {problem}" for g in found for problem in g.problems]
    return "\n".join([*lines, *(f"note: {note}" for note in notes(records))])


def columns_for(records: Iterable[Record]) -> tuple[Column, ...]:
    limited = any(r.get(GOODPUT.key) is not None for r in records)
    return (*COLUMNS, GOODPUT) if limited else COLUMNS


def notes(records: Sequence[Record]) -> list[str]:
    """What every reader should know, and once is enough."""
    found = list(dict.fromkeys(note for r in records for note in r.get("notes", ())))
    clients = [r["client"] for r in records if r.get("client")]
    if clients:
        held, lag = (max(c[k] for c in clients) for k in ("late_share", "p99_read_lag_ms"))
        kernel = all(c.get("stamps") == "kernel" for c in clients)
        found.append(f"the client's own delay: requests held back for at most {held:.1%} of their "
                     f"time; p99 of reads at most {lag:.1f} ms late"
                     + (" (kernel stamps undo that)" if kernel else "")
                     )  # fmt: skip
    return found


def cell(group: Group, column: Column) -> str:
    value = group.value(column.key)
    if value is None:
        return "-"
    text = f"{value:,.{column.digits}f}"
    return f"{text} ±{group.spread(column.key):.1%}" if len(group.records) > 1 else text


def columns_of(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            word.rjust(width) if position else word.ljust(width)
            for position, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def one_line(record: Record) -> str:
    """For the terminal, when a run is done."""
    group = Group(record["case"]["name"], (record,))
    facts = ", ".join(f"{c.title} {cell(group, c)}" for c in COLUMNS if c.title != "p99")
    if record["valid"]:
        return f"{group.label}: {facts}"
    return colour(f"{group.label}: INVALID: {'; '.join(record['problems'])}", "31", sys.stderr)


def brief(record: Record) -> Record:
    """A run in the one document that bench.py prints."""
    return {"name": record["case"]["name"], "valid": record["valid"],
            "problems": record["problems"],
            **{c.key: rounded(record.get(c.key)) for c in (*COLUMNS, GOODPUT)}}  # fmt: skip


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


# --- files ----------------------------------------------------------------------------------------


def write(folder: Path, records: Sequence[Record]) -> None:
    """Everything that is made from the runs' own files."""
    write_json(folder / "summary.json", list(map(without_details, records)))
    with whole_file(folder / "summary.csv") as file:
        write_csv(file, records)
    drawn = [chart for chart in charts.all_charts(groups(records)) if chart.series]
    pictures = charts.draw(drawn)
    for chart, picture in zip(drawn, pictures, strict=False):
        (folder / f"{chart.name}.png").write_bytes(picture.png)
    with whole_file(folder / "report.html") as file:
        columns = columns_for(records)
        file.write(page.html(groups(records), columns, drawn, pictures, notes(records)))


def without_details(record: Record) -> Record:
    return {key: value for key, value in record.items() if key not in DETAILS}


def write_csv(file: IO[str], records: Iterable[Record]) -> None:
    writer = csv.DictWriter(file, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({**record, **record["case"], "problems": "; ".join(record["problems"])})


def load(folder: Path) -> list[Record]:
    """The runs of a folder, in the order they were made."""
    if not folder.is_dir():
        die(f"{folder}: no such folder")
    found = []
    for path in folder.glob("*.json"):
        if path.name in SUMMARY or path.name.startswith("."):
            continue
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            die(f"{path} is not JSON: {e}")
        if isinstance(record, dict) and "case" in record:
            found.append(record)
    return sorted(found, key=lambda r: (r["date"], r["case"]["name"])) or die(
        f"{folder}: no results in it"
    )


# --- two folders ----------------------------------------------------------------------------------


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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="report.py FOLDER | report.py compare BEFORE AFTER",
    )
    parser.add_argument("words", nargs="+", metavar="FOLDER")
    args = parser.parse_args(argv)
    wanted = 3 if args.words[0] == "compare" else 1
    if len(args.words) != wanted:
        parser.error("one folder, or `compare` and two")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return exit_code(lambda: report(*map(Path, args.words)))


def report(first: Path, *others: Path) -> int:
    """Of one folder; or, after the word `compare`, of two side by side."""
    if others:
        print(comparison(*map(load, others)))
        return 0
    records = load(first)
    write(first, records)
    print(table(records))
    say(f"{first}/report.html")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
