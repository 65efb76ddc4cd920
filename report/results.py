"""Reads results: the runs of a folder, the repeats of a load, and the columns that are shown."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.talk import clean, die, read_json
from load.metrics import DETAILS

Record = dict[str, Any]
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Column:
    key: str
    title: str  # no two columns have the same
    digits: int = 1
    more_is_better: bool = False
    total: bool = False  # of repeats: the sum, not the mean
    share: bool = False  # shown in %


COUNTS = (
    Column("num_prompts", "asked", 0, total=True),
    Column("completed", "done", 0, total=True),
    Column("failed", "failed", 0, total=True),
)
COLUMNS = (
    Column("request_throughput", "req/s", 2, more_is_better=True),
    Column("output_throughput", "out tok/s", 0, more_is_better=True),
    Column("mean_ttft_ms", "TTFT ms"),
    Column("p99_ttft_ms", "TTFT p99"),
    Column("mean_tpot_ms", "TPOT ms", 2),
    Column("mean_itl_ms", "ITL ms", 2),
    Column("p99_itl_ms", "ITL p99", 2),
    Column("mean_e2el_ms", "E2EL ms", 0),
)
GOODPUT = Column("request_goodput", "good req/s", 2, more_is_better=True)
CACHED = Column("cached_share", "cached", 1, share=True)
PER_USER = Column("user_throughput", "tok/s per user", 1, more_is_better=True)
PER_GPU = Column("gpu_throughput", "tok/s per GPU", 0, more_is_better=True)
COMPARED = (*COLUMNS, GOODPUT)
# The server's own means of the same requests, and the client's minus those.
SERVER = (
    Column("server_mean_ttft_ms", "TTFT ms"),
    Column("ttft_beyond_server_ms", "TTFT +ms"),
    Column("server_mean_queue_ms", "queue ms"),
    Column("server_mean_prefill_ms", "prefill ms"),
    Column("server_mean_itl_ms", "ITL ms", 2),
    Column("itl_beyond_server_ms", "ITL +ms", 2),
    Column("server_mean_e2el_ms", "E2EL ms", 0),
    Column("e2el_beyond_server_ms", "E2EL +ms", 0),
    Column("server_mean_running", "running"),
    Column("server_mean_waiting", "waiting"),
    Column("server_mean_kv_use", "KV use", 1, share=True),
)
ALL = (*COUNTS, *COMPARED, CACHED, PER_USER, PER_GPU, *SERVER)


def known(columns: Iterable[Column], records: Iterable[Record]) -> tuple[Column, ...]:
    """The columns that any run has a value for."""
    records = list(records)
    return tuple(c for c in columns if any(value_of(r, c.key) is not None for r in records))


def columns_for(records: Iterable[Record]) -> tuple[Column, ...]:
    return (*COLUMNS, *known((GOODPUT, CACHED), records))


def failed(record: Record) -> float:
    return float(record["case"]["num_prompts"] or 0) - float(record.get("completed") or 0)


def gpu_throughput(record: Record) -> float | None:
    gpus, rate = record.get("metadata", {}).get("world_size"), record.get("output_throughput")
    return rate / gpus if gpus and rate is not None else None


DERIVED: dict[str, Callable[[Record], float | None]] = {
    "num_prompts": lambda r: r["case"]["num_prompts"],
    "completed": lambda r: r.get("completed") or 0,
    "failed": failed,
    "gpu_throughput": gpu_throughput,
}


def value_of(record: Record, key: str) -> float | None:
    value = DERIVED[key](record) if key in DERIVED else record.get(key)
    return None if value is None else float(value)


@dataclass(frozen=True)
class Group:
    label: str
    records: tuple[Record, ...]

    @property
    def valid(self) -> bool:
        return all(r["valid"] for r in self.records)

    def values(self, key: str) -> list[float]:
        return [v for r in self.records if (v := value_of(r, key)) is not None]

    def value(self, key: str) -> float | None:
        values = self.values(key)
        return statistics.fmean(values) if values else None

    def spread(self, key: str) -> float:
        """Standard deviation between the repeats, as a share of their mean."""
        values = self.values(key)
        middle = statistics.fmean(values) if values else 0.0
        return statistics.stdev(values) / middle if len(values) > 1 and middle else 0.0

    def percentiles(self, metric: str) -> dict[float, float]:
        """A metric's percentiles in ms, averaged over the repeats; {} if none were kept."""
        found = [p for r in self.records if (p := r.get(f"{metric}_percentiles_ms"))]
        shared = [p for p in found[0] if all(p in each for each in found)] if found else []
        return {float(p): statistics.fmean(each[p] for each in found) for p in shared}

    def shown(self, column: Column) -> tuple[str, str]:
        """A value in words, and its spread if there were repeats."""
        value = self.value(column.key)
        if value is None:
            return "-", ""
        if column.total:
            return f"{sum(self.values(column.key)):,.0f}", ""
        repeated = len(self.records) > 1 and not column.share
        around = f"±{self.spread(column.key):.1%}" if repeated else ""
        return in_words(value, column), around

    @property
    def case(self) -> Record:
        found: Record = self.records[0]["case"]
        return found

    @property
    def problems(self) -> list[str]:
        return list(dict.fromkeys(p for r in self.records for p in r["problems"]))


def in_words(value: float, column: Column) -> str:
    return f"{value:.{column.digits}%}" if column.share else f"{value:,.{column.digits}f}"


FIGURES = {
    "output_throughput": "{:,.0f} output tokens/s",
    "gpu_throughput": "{:,.0f} per GPU",
    "user_throughput": "{:,.1f} per user",
    "mean_ttft_ms": "TTFT {:,.1f} ms",
    "mean_itl_ms": "ITL {:,.2f} ms",
    "mean_e2el_ms": "E2EL {:,.0f} ms",
}


def figures(group: Group, *keys: str) -> str:
    """These of a load's figures in words, or all of them."""
    found = ((FIGURES[key], group.value(key)) for key in keys or FIGURES)
    return ", ".join(form.format(value) for form, value in found if value is not None)


def load_of(group: Group) -> tuple[float, float]:
    """The order of loads: by rate, then by streams."""
    return float(group.case["rate"]), float(group.case["concurrency"] or math.inf)


def groups(records: Iterable[Record]) -> list[Group]:
    """Records grouped by load; those measured in another way are not repeats."""
    together: dict[str, dict[tuple[str, ...], list[Record]]] = {}
    for record in records:
        ways = together.setdefault(record["case"]["label"], {})
        ways.setdefault(words_for(how(record)), []).append(record)
    return [Group(named(label, way, ways), tuple(found))
            for label, ways in together.items() for way, found in ways.items()]  # fmt: skip


def how(record: Record) -> Record:
    """What repeats of a load have in common, besides the load."""
    known, data_set = record.get("metadata", {}), record.get("data_set")
    return {
        "client": known.get("client"),
        "model": record["model_id"],
        "requests": record["case"]["num_prompts"],
        "API": known.get("backend"),
        "version": known.get("server_version"),
        "GPUs": known.get("world_size"),
        "replicas": known.get("replicas"),
        "burstiness": known.get("burstiness"),
        "goodput limits": known.get("goodput"),
        "data set": str(data_set.get("sha256"))[:8] if isinstance(data_set, dict) else None,
    }


def named(label: str, way: tuple[str, ...], ways: Collection[tuple[str, ...]]) -> str:
    """A load's label; where it was measured in several ways, with what is special about this."""
    shared = set(way).intersection(*ways)
    special = [*way[:3], *(part for part in way[3:] if part not in shared)]
    return label if len(ways) == 1 else f"{label} ({', '.join(special)})"


def words_for(way: Record) -> tuple[str, ...]:
    forms = {"client": "{}", "model": "{}", "requests": "{} requests"}
    return tuple(forms.get(name, f"{name} {{}}").format(plain(way[name])) for name in way)


def plain(value: Any) -> str:  # noqa: ANN401
    """A value of any kind, without brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {part}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# --- from files -----------------------------------------------------------------------------------


class Found(NamedTuple):
    """What a folder holds: sound runs in the order they were made, and why others are left out."""

    records: list[Record]
    left_out: list[str]


def load(folder: Path) -> Found:
    """The results in a folder. A file that is broken or not ours is left out, with a reason."""
    if not folder.is_dir():
        die(f"{folder}: no such folder")
    records, left_out = [], []
    # `NAME (1).json` is the copy, and not NAME.json.
    for path in sorted(folder.glob("[!.]*.json"), key=lambda path: (len(path.name), path.name)):
        if path.name == SUMMARY:
            continue
        try:
            record = without_details(sound(read_json(path)))
            if record in records:
                raise ValueError("a copy of another file here, and no repeat of it")
            records.append(record)
        except (OSError, ValueError) as e:
            left_out.append(f"{clean(path.name)} is left out: {clean(reason(e))}")
    if not records:
        die("; ".join([f"{folder}: no results in it", *left_out]))
    return Found(sorted(records, key=lambda r: (r["date"], natural(r["case"]["name"]))), left_out)


def reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    odd = type(error) is ValueError  # our own words
    return str(error) if odd else f"not JSON, or not all of it ({error})"


def natural(name: str) -> list[tuple[int, str]]:
    """For sorting: prefill-in512 comes before prefill-in1024."""
    return [(len(word) if word.isdecimal() else 0, word) for word in re.split(r"(\d+)", name)]


def sound(record: Any) -> Record:  # noqa: ANN401
    """A result of bench.py that is safe to show; ValueError if it is not one."""
    if not (isinstance(record, dict) and isinstance(record.get("case"), dict)):
        raise ValueError("not a result of bench.py")
    if not is_sound(record):
        raise ValueError("a result of bench.py that is damaged")
    return dict(clean(record))


def is_sound(record: Record) -> bool:
    """Whether a record has all that reports need, each with the right type."""
    case, client = record["case"], record.get("client", {})
    metadata = record.get("metadata", {})
    lists = [record.get("problems"), record.get("notes", [])]
    if not all(isinstance(part, dict) for part in (case, client, metadata)):
        return False
    if not all(isinstance(part, list) for part in lists) or type(record.get("valid")) is not bool:
        return False
    texts = [record.get("date"), record.get("model_id"), *(t for part in lists for t in part)]
    texts += [case.get(key) for key in ("name", "label", "type")]
    tables = [record[key] or {} for key in record if key.endswith("_percentiles_ms")]
    if not all(isinstance(table, dict) for table in tables):
        return False
    numbers = [record.get(column.key) for column in ALL]
    numbers += [
        case.get(key, "") for key in ("input_len", "output_len", "concurrency", "num_prompts")
    ]
    numbers += [record.get("total_input_tokens"), record.get("total_output_tokens")]
    numbers += [record.get("e2el_growth"), record.get("goodput_share"), metadata.get("world_size")]
    numbers += [client.get(key, "") for key in ("late_share", "p99_read_lag_ms") if client]
    numbers += [client.get("offered_rate")]
    numbers += [] if case.get("rate") == "inf" else [case.get("rate") or ""]
    values = [(p, v) for table in tables for p, v in table.items()]
    return (all(isinstance(text, str) for text in texts) and all(map(is_number, numbers))
            and all(map(is_percentile, values)))  # fmt: skip


def is_percentile(pair: tuple[str, Any]) -> bool:
    p, value = pair
    return bool(re.fullmatch(r"\d{1,3}(\.\d{1,3})?", p)) and value is not None and is_number(value)


def is_number(value: Any) -> bool:  # noqa: ANN401
    return value is None or (type(value) in (int, float) and abs(value) < 1e15)


def without_details(record: Record) -> Record:
    return {key: value for key, value in record.items() if key not in DETAILS}


def columns_of(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines in columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            word.rjust(width) if position else word.ljust(width)
            for position, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
