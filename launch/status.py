"""--status: what runs from a workspace; of a fleet also a row a replica."""

import json
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from common.ask import ask
from common.response import Malformed
from common.talk import aligned, counted, say, visible
from launch.records import records, states_of

TIMEOUT = 5.0
LOOK = 1.0  # seconds between two looks at the tokens that a replica has made
ONCE_MADE = re.compile(r"\w+[:_]generation_tokens_total")
RUNNING, WAITING = (
    re.compile(rf"\w+[:_]num_(?:{names})")
    for names in ("requests_running|running_reqs", "requests_waiting|queue_reqs")
)
IN_FLIGHT = re.compile(r'haproxy_server_current_sessions\{.*proxy="replicas",server="([^"]+)".*\}')
SAMPLE = re.compile(r"^([^#\s{]+(?:\{.*\})?) (\S+)", re.M)
Row = dict[str, Any]


def status(logs: Path, as_json: bool = False) -> int:
    """On stdout: a line a launch (job, state, URL, model). Exit code 1 when there is none."""
    launches = [described(record) for record in records(logs)]
    if as_json:
        print(json.dumps(launches, indent=2))
    for each in [] if as_json else launches:
        words = each["job"], each["state"], each["url"], each["model"]
        print("\t".join(map(visible, words)))
        for line in aligned([cells(row) for row in each.get("replicas", ())]):
            print(visible(f"  {line}"))
    if not launches:
        say(f"nothing runs from {logs.parent}")
    return 0 if launches else 1


def described(record: Mapping[str, Any]) -> Row:
    found: Row = {name: record[name] for name in ("job", "url", "model")}
    found["state"] = health(record["url"])
    if rows := states_of(record["path"]):
        sessions = samples(page(f"{record['url']}/router/metrics"))
        with ThreadPoolExecutor(len(rows)) as pool:
            found["replicas"] = list(pool.map(lambda row: measured(row, sessions), rows))
    return found


def health(url: str) -> str:
    try:
        code = ask(f"{url}/health", TIMEOUT, whole=False).status
    except (OSError, ValueError, Malformed):
        return "not ready"
    return "ready" if code == 200 else f"unhealthy ({code})"


def measured(row: Row, sessions: Mapping[str, float]) -> Row:
    """The row with what the replica itself says, and the front: None where nobody does."""
    if row["state"] != "ready":
        return {**row, "running": None, "waiting": None, "tokens_per_second": None}
    before, began = samples(page(row["metrics"])), time.monotonic()
    made = None
    if total(before, ONCE_MADE) is not None:
        time.sleep(LOOK)
        after = total(samples(page(row["metrics"])), ONCE_MADE)
        made = per_second(total(before, ONCE_MADE), after, time.monotonic() - began)
    running = total(before, RUNNING)
    if running is None:  # requests that the front has passed on to it, and that wait
        ours = (n for name, n in sessions.items() if row["name"] in IN_FLIGHT.findall(name))
        running = next(ours, None)
    state = health(row["url"])
    counts = {"running": running, "waiting": total(before, WAITING), "tokens_per_second": made}
    return {**row, **counts, "state": state}


def page(url: str) -> str:
    """'' where there is none."""
    try:
        answer = ask(url, TIMEOUT)
    except (OSError, ValueError, Malformed):
        return ""
    return answer.body.decode(errors="replace") if answer.status == 200 else ""


def samples(text: str) -> dict[str, float]:
    """A page of Prometheus's: each name, with its labels, and its value."""
    found = {}
    for name, value in SAMPLE.findall(text):
        try:
            found[name] = float(value)
        except ValueError:
            continue
    return found


def total(values: Mapping[str, float], name: re.Pattern[str]) -> float | None:
    """Of all that go by that name, whatever their labels; None where none does."""
    found = [value for each, value in values.items() if name.fullmatch(each.partition("{")[0])]
    return sum(found) if found else None


def per_second(before: float | None, after: float | None, seconds: float) -> float | None:
    return None if before is None or after is None else max(after - before, 0) / seconds


def cells(row: Row) -> list[str]:
    """What people read of a replica."""
    port = str(row["url"]).rpartition(":")[2]
    gpus = f"GPUs {','.join(map(str, row['gpus']))}" if row["gpus"] else "no GPU"
    loads = [
        f"{row[name]:.0f} {unit}" if row[name] is not None else f"- {unit}"
        for name, unit in (
            ("running", "running"), ("waiting", "waiting"), ("tokens_per_second", "tok/s"),
        )
    ]  # fmt: skip
    where = ",".join(map(str, row["nodes"]))
    restarts = counted(int(row["restarts"]), "restart")
    return [row["name"], row["state"], where, gpus, f"port {port}", since(row), restarts, *loads]


def since(row: Row) -> str:
    """How long it has been ready."""
    try:
        ready = datetime.fromisoformat(str(row["ready"]).replace("Z", "+00:00"))
    except (KeyError, ValueError):
        return "-"
    seconds = time.time() - ready.timestamp()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"up {seconds / size:.1f} {unit}"
    return f"up {max(seconds, 0):.0f} s"
