"""Results as they are read: the runs of a folder, a load's repeats together, the columns shown."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.talk import die
from load.metrics import DETAILS

Record = dict[str, Any]
SUMMARY = "summary.json"


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


def columns_for(records: Iterable[Record]) -> tuple[Column, ...]:
    limited = any(r.get(GOODPUT.key) is not None for r in records)
    return (*COLUMNS, GOODPUT) if limited else COLUMNS


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
        """Standard deviation between the repeats, as a share of their mean."""
        values = self.values(key)
        middle = statistics.fmean(values) if values else 0.0
        return statistics.stdev(values) / middle if len(values) > 1 and middle else 0.0

    def shown(self, column: Column) -> tuple[str, str]:
        """A value in words, and its spread where there were repeats."""
        value = self.value(column.key)
        if value is None:
            return "-", ""
        around = f"±{self.spread(column.key):.1%}" if len(self.records) > 1 else ""
        return f"{value:,.{column.digits}f}", around

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


def load(folder: Path) -> list[Record]:
    """The runs of a folder, in the order they were made."""
    if not folder.is_dir():
        die(f"{folder}: no such folder")
    found = []
    for path in folder.glob("*.json"):
        if path.name == SUMMARY or path.name.startswith("."):
            continue
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as e:
            die(f"{path} is not JSON: {e}")
        if isinstance(record, dict) and "case" in record:
            if not is_sound(record):
                die(f"{path} is no result of bench.py")
            found.append(without_details(record))
    return sorted(found, key=lambda r: (r["date"], natural(r["case"]["name"]))) or die(
        f"{folder}: no results in it"
    )


def natural(name: str) -> list[tuple[int, str]]:
    """For sorting: prefill-in512 comes before prefill-in1024."""
    return [(len(word) if word.isdecimal() else 0, word) for word in re.split(r"(\d+)", name)]


def is_sound(record: Record) -> bool:
    """Whether a document has what reports are made of, each of its kind."""
    case, client = record["case"], record.get("client", {})
    lists = [record.get("problems"), record.get("notes", [])]
    if not all(isinstance(part, dict) for part in (case, client, record.get("metadata", {}))):
        return False
    if not all(isinstance(part, list) for part in lists) or type(record.get("valid")) is not bool:
        return False
    texts = [record.get("date"), record.get("model_id"), *(t for part in lists for t in part)]
    texts += [case.get(key) for key in ("name", "label", "type")]
    numbers = [record.get(column.key) for column in (*COLUMNS, GOODPUT)]
    numbers += [
        case.get(key, "") for key in ("input_len", "output_len", "concurrency", "num_prompts")
    ]
    numbers += [client.get(key, "") for key in ("late_share", "p99_read_lag_ms") if client]
    numbers += [] if case.get("rate") == "inf" else [case.get("rate", "")]
    return all(isinstance(text, str) for text in texts) and all(map(is_number, numbers))


def is_number(value: Any) -> bool:  # noqa: ANN401
    return value is None or (type(value) in (int, float) and abs(value) < 1e15)


def without_details(record: Record) -> Record:
    return {key: value for key, value in record.items() if key not in DETAILS}


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
