"""Results of bench.py as text and files: table, summary.json and .csv, report.html, plots."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from common.live import colour
from common.talk import whole_file, write_json
from load.metrics import KINDS, METRICS
from report import charts, page
from report.results import (
    COLUMNS,
    GOODPUT,
    SUMMARY,
    Group,
    Record,
    columns_for,
    columns_of,
    groups,
)

CSV_FIELDS = (
    "name", "type", "input_len", "output_len", "concurrency", "request_rate", "repeat",
    "num_prompts", "completed", "valid", "duration",
    "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput",
    "output_throughput", "total_token_throughput", "user_throughput",
    *(f"{kind}_{name}_ms" for name in METRICS for kind in KINDS),
    "problems",
)  # fmt: skip


# --- text -----------------------------------------------------------------------------------------


def table(records: Sequence[Record]) -> str:
    """A row a load; repeats are averaged, with their spread."""
    found, columns = groups(records), columns_for(records)
    rows = [[g.label, *(" ".join(filter(None, g.shown(c))) for c in columns),
             "" if g.valid else "INVALID"] for g in found]  # fmt: skip
    lines = columns_of([["", *(c.title for c in columns), ""], *rows])
    lines += [f"INVALID {g.label}: {problem}" for g in found for problem in g.problems]
    return "\n".join([*lines, *(f"note: {note}" for note in notes(records))])


def notes(records: Sequence[Record]) -> list[str]:
    """What every reader should know, and once is enough."""
    found = list(dict.fromkeys(note for r in records for note in r.get("notes", ())))
    clients = [r["client"] for r in records if r.get("client")]
    if clients:
        held, lag = (max(c[k] for c in clients) for k in ("late_share", "p99_read_lag_ms"))
        kernel = all(c.get("stamps") == "kernel" for c in clients)
        found.append(f"the client's own delay: requests held back for at most {held:.1%} of their "
                     "time" + (f"; p99 of reads at most {lag:.1f} ms late (kernel stamps undo that)"
                               if kernel else "")
                     )  # fmt: skip
    return found


def one_line(record: Record) -> str:
    """For the terminal, when a run is done."""
    group = Group(record["case"]["name"], (record,))
    facts = ", ".join(f"{c.title} {group.shown(c)[0]}" for c in COLUMNS if c.title != "p99")
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
    write_json(folder / SUMMARY, records)
    with whole_file(folder / "summary.csv") as file:
        write_csv(file, records)
    drawn = [chart for chart in charts.all_charts(groups(records)) if chart.series]
    pictures = charts.draw(drawn)
    for chart, picture in zip(drawn, pictures, strict=False):
        (folder / f"{chart.name}.png").write_bytes(picture.png)
    with whole_file(folder / "report.html") as file:
        columns = columns_for(records)
        file.write(page.html(groups(records), columns, drawn, pictures, notes(records)))


def write_csv(file: IO[str], records: Iterable[Record]) -> None:
    writer = csv.DictWriter(file, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({**record, **record["case"], "problems": "; ".join(record["problems"])})
