"""--status: what runs from a workspace, with a row for each replica of a fleet."""

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from common.ask import ask
from common.prometheus import MADE, RUNNING, WAITING, of_engine, total
from common.response import Malformed
from common.talk import aligned, counted, say, visible
from launch.busy import NAMES as ENGINES
from launch.front import PAGE, has_found, in_flight
from launch.records import records, states_of

TIMEOUT = 5.0
LOOK = 1.0  # seconds between two looks at the tokens that a replica has made
LOADS = (("running", "running"), ("waiting", "waiting"), ("tokens_per_second", "tok/s"))
Row = dict[str, Any]


def status(logs: Path, as_json: bool = False) -> int:
    """Print a line for each launch (job, state, URL, model). Exit code 1 if there is none."""
    launches = [described(record) for record in records(logs)]
    if as_json:
        print(json.dumps(launches, indent=2))
    for each in [] if as_json else launches:
        words = each["job"], each["state"], each["url"], each["model"]
        print("\t".join(map(visible, words)))
        for line in lines(each.get("replicas", [])):
            print(visible(f"  {line}"))
    if not launches:
        say(f"nothing runs from {logs.parent}")
    return 0 if launches else 1


def described(record: Mapping[str, Any]) -> Row:
    found: Row = {name: record[name] for name in ("job", "url", "model")}
    found["state"] = health(record["url"])
    if rows := states_of(record["path"]):
        front = page(record["url"] + PAGE)
        with ThreadPoolExecutor(len(rows)) as pool:
            found["replicas"] = list(pool.map(lambda row: measured(row, front), rows))
    return found


def health(url: str) -> str:
    try:
        code = ask(f"{url}/health", TIMEOUT, whole=False).status
    except (OSError, ValueError, Malformed):
        return "not ready"
    return "ready" if code == 200 else f"unhealthy ({code})"


def measured(row: Row, front: str) -> Row:
    """The row, with what the replica's and the front's metrics say; None for what neither says."""
    if row["state"] != "ready":
        return {**row, "running": None, "waiting": None, "tokens_per_second": None}
    before, began, made = of_engine(ENGINES, page(row["metrics"])), time.monotonic(), None
    if (already := total(before, MADE)) is not None:
        time.sleep(LOOK)
        now = total(of_engine(ENGINES, page(row["metrics"])), MADE)
        took = time.monotonic() - began
        made = None if now is None else max(now - already, 0) / took
    running, state = total(before, RUNNING), health(row["url"])
    if state == "ready" and front and not has_found(front, row["name"]):
        state = "not reached by the front"
    return {
        **row,
        "state": state,
        "running": in_flight(front).get(row["name"]) if running is None else running,
        "waiting": total(before, WAITING),
        "tokens_per_second": made,
    }


def page(url: str) -> str:
    """The page's text; '' if there is none."""
    try:
        answer = ask(url, TIMEOUT)
    except (OSError, ValueError, Malformed):
        return ""
    return answer.body.decode(errors="replace") if answer.status == 200 else ""


def lines(rows: Sequence[Row]) -> list[str]:
    """What people read: a line for each replica, without the figures that none of them tells."""
    told = [each for each in LOADS if any(row[each[0]] is not None for row in rows)]
    return aligned([[*cells(row), *(load(row[name], unit) for name, unit in told)] for row in rows])


def cells(row: Row) -> list[str]:
    port = str(row["url"]).rpartition(":")[2]
    gpus = f"GPUs {','.join(map(str, row['gpus']))}" if row["gpus"] else "no GPU"
    where = ",".join(map(str, row["nodes"]))
    restarts = counted(int(row["restarts"]), "restart")
    return [row["name"], row["state"], where, gpus, f"port {port}", since(row), restarts]


def load(value: float | None, unit: str) -> str:
    return f"- {unit}" if value is None else f"{value:.0f} {unit}"


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
