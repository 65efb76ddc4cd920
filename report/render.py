"""Results of bench.py as text and files: table, summary.json and .csv, report.html, plots."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from common.talk import whole_file, write_json
from load.counters import CACHE_HIT, CAME
from load.metrics import KINDS, METRICS
from report import page
from report.charts import all_charts
from report.draw import draw
from report.results import (
    CACHED,
    COMPARED,
    COUNTS,
    SERVER,
    SUMMARY,
    Column,
    Group,
    Record,
    columns_for,
    columns_of,
    groups,
    known,
    value_of,
)

CSV_FIELDS = (
    "name", "type", "input_len", "output_len", "concurrency", "request_rate", "repeat",
    "num_prompts", "completed", "valid", "duration",
    "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput",
    "output_throughput", "total_token_throughput", "user_throughput", "gpu_throughput",
    *(f"{kind}_{name}_ms" for name in METRICS for kind in KINDS),
    "cached_share", "cached_source", "server_requests", *(column.key for column in SERVER),
    "problems",
)  # fmt: skip


OWN = "\nThe server's own means of the same requests, and by how much the client's are above them:"

# --- text -----------------------------------------------------------------------------------------


def table(records: Sequence[Record], left_out: Sequence[str] = ()) -> str:
    """A row a load; repeats are averaged, with their spread."""
    found = groups(records)
    lines = [*rows(found, columns_for(records)), *servers_own(found, records)]
    lines += [f"INVALID {g.label}: {problem}" for g in found for problem in g.problems]
    return "\n".join([*lines, *(f"note: {note}" for note in (*notes(records), *left_out))])


def rows(found: Sequence[Group], columns: Sequence[Column], spread: bool = True) -> list[str]:
    lines = [[g.label, *(" ".join(filter(None, g.shown(c)[: 1 + spread])) for c in columns),
              "" if g.valid else "INVALID"] for g in found]  # fmt: skip
    return columns_of([["", *(c.title for c in columns), ""], *lines])


def servers_own(found: Sequence[Group], records: Sequence[Record]) -> list[str]:
    """A second table, where a server told of the same requests."""
    columns = known(SERVER, records)
    told = [g for g in found if known(columns, g.records)]
    return [OWN, *rows(told, columns, spread=False)] if told else []


def notes(records: Sequence[Record]) -> list[str]:
    """What every reader should know, and once is enough."""
    found = list(dict.fromkeys(note for r in records for note in r.get("notes", ())
                               if CAME not in note))  # fmt: skip
    found += cached_loads(records)
    clients = [r["client"] for r in records if r.get("client")]
    if clients:
        held, lag = (max(c.get(k) or 0 for c in clients) for k in ("late_share", "p99_read_lag_ms"))
        kernel = all(c.get("stamps") == "kernel" for c in clients)
        found.append(f"the client's own delay: requests held back for at most {held:.1%} of their "
                     "time" + (f"; p99 of reads at most {lag:.1f} ms late (kernel stamps undo that)"
                               if kernel else "")
                     )  # fmt: skip
    return found


def cached_loads(records: Sequence[Record]) -> list[str]:
    """One line for all that say it; each load's own share is in its column."""
    shares = [s for g in groups(records) if (s := g.value(CACHED.key) or 0) > CACHE_HIT]
    if not shares:
        return []
    loads = f"{len(shares)} load{'s' if len(shares) > 1 else ''}"
    return [f"in {loads}, {max(shares):.0%} or less {CAME} (column `{CACHED.title}`): their TTFT "
            "is that of the rest of the prompt"]  # fmt: skip


def one_line(record: Record) -> str:
    """For the terminal, when a run is done."""
    group = Group(record["case"]["name"], (record,))
    told = [c for c in columns_for([record]) if "p99" not in c.title]
    facts = ", ".join(f"{c.title} {group.shown(c)[0]}" for c in told)
    if record["valid"]:
        return f"{group.label}: {facts}"
    return f"{group.label}: INVALID: {'; '.join(record['problems'])}"


def brief(record: Record) -> Record:
    """A run in the one document that bench.py prints."""
    return {"name": record["case"]["name"], "valid": record["valid"],
            "problems": record["problems"],
            **{c.key: rounded(value_of(record, c.key))
               for c in (*COUNTS, *COMPARED, CACHED)}}  # fmt: skip


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


# --- files ----------------------------------------------------------------------------------------


def write(folder: Path, records: Sequence[Record], left_out: Sequence[str] = ()) -> None:
    """Everything that is made from the runs' own files."""
    write_json(folder / SUMMARY, records)
    with whole_file(folder / "summary.csv") as file:
        write_csv(file, records)
    pictures = draw(all_charts([("", groups(records))]), files=True)
    for picture in pictures:
        (folder / f"{picture.name}.png").write_bytes(picture.png)
    with whole_file(folder / "report.html") as file:
        file.write(page.html(records, pictures, [*notes(records), *left_out]))


def write_csv(file: IO[str], records: Iterable[Record]) -> None:
    writer = csv.DictWriter(file, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in records:
        row = {**record, **record["case"], "problems": "; ".join(record["problems"])}
        writer.writerow({**row, "gpu_throughput": value_of(record, "gpu_throughput")})
