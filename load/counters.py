"""What the server itself counted during a run, and how that agrees with the client.

/metrics is read before a run, a few times during it, and after it: Prometheus text of vLLM, SGLang,
TensorRT-LLM (/prometheus/metrics), LMDeploy and TGI; and TensorRT-LLM's own /metrics, a list of
iterations that each reading empties. During a run the bytes are only kept, not parsed.

    counters = Counters(endpoint)
    with counters.watching():
        ...                     # the run
    counters.add_to(record)     # server_mean_ttft_ms, ttft_beyond_server_ms, cached_share, ...
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import starmap
from statistics import fmean
from typing import Any

from common.prometheus import RUNNING, WAITING, Page, of_engine
from common.talk import Failure
from load.endpoint import Endpoint, fetch

PATHS = ("/metrics", "/prometheus/metrics")
FIRST, EVERY = 0.25, 5.0  # s to the first look in a run; each wait is twice the last, up to EVERY
ENGINES = "vllm|sglang|trtllm|lmdeploy|tgi|dynamo_frontend"
SETTLES = 0.1  # s after its last token until a request is in the counters
CAME = "of the prompt tokens came from the server's cache"
CACHE_HIT = 0.01  # share of cached prompt tokens above which a run is marked

# Names without the engine's prefix; if there are several, the first that is present counts.
HISTOGRAMS = {
    "ttft": ("time_to_first_token_seconds",),
    "queue": ("request_queue_time_seconds", "queue_time_seconds", "request_queue_duration"),
    "prefill": ("request_prefill_time_seconds",),
    "itl": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "e2el": ("e2e_request_latency_seconds", "request_duration", "request_duration_seconds"),
}
KV_USE = ("kv_cache_usage_perc", "gpu_cache_usage_perc", "token_usage", "kv_cache_utilization")
# Cached prompt tokens (or blocks), and the counters that add up to their total.
CACHE = (
    ("prefix_cache_hits", ("prefix_cache_queries",)),
    ("gpu_prefix_cache_hits", ("gpu_prefix_cache_queries",)),
    ("cached_tokens", ("prompt_tokens",)),
    ("prompt_cached_tokens", ("prompt_tokens",)),
    ("kv_cache_reused_blocks", ("kv_cache_reused_blocks", "kv_cache_missed_blocks")),
)
COUNTERS = {
    *(
        f"{name}_{part}"
        for names in HISTOGRAMS.values()
        for name in names
        for part in ("sum", "count")
    ),
    *(name for hits, parts in CACHE for name in (hits, *parts)),
}

Record = dict[str, Any]
Raw = list[bytes]
Look = tuple[float, Page]  # the seconds that it stands for, and its values


class Counters:
    """A server's counters, run after run; `extra` requests of each run are not in its results."""

    def __init__(self, endpoint: Endpoint, extra: int = 0) -> None:
        self.extra = extra
        # A fleet's own address would answer with the page of a random replica.
        self.sources = [(each, path) for each in endpoint.each for path in PATHS]
        self.before: Raw = []
        self.during: list[tuple[float, Raw]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        if self.sources:
            time.sleep(SETTLES)
        told = [(source, body) for source in self.sources if tells(body := read(*source))]
        self.sources, self.before = [source for source, _ in told], [body for _, body in told]
        self.during = []
        over = threading.Event()
        watcher = threading.Thread(target=self.look, args=(over,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join(1)

    def look(self, over: threading.Event) -> None:
        pause = FIRST
        while self.sources and not over.wait(pause):
            self.during.append((pause, self.read_all()))
            pause = min(2 * pause, EVERY)

    def read_all(self) -> Raw:
        return [read(*source) for source in self.sources]

    def add_to(self, record: Record, name: str) -> None:
        """Add the server's figures to the client's record, and notes on what is odd in the run."""
        notes: list[str] = []
        if self.sources and not record.get("stopped"):
            time.sleep(SETTLES)
            told, notes = self.told(record, self.read_all())
            said = record.get("cached_share")
            if said is None or told.get("cached_share", 0) > said:  # some gateways write zeros
                record |= {"cached_share": None, "cached_source": None}
            record |= {key: v for key, v in told.items() if record.get(key) is None}
        record["notes"] += [f"{name}: {note}" for note in (*notes, *cache_note(record))]

    def told(self, record: Record, after: Raw) -> tuple[Record, list[str]]:
        looks = [(seconds, page(raw)) for seconds, raw in self.during]
        raws = [*(raw for _, raw in self.during), after]
        own = of_iterations([
            (iterations(self.before[i : i + 1]), iterations(*(raw[i : i + 1] for raw in raws)))
            for i in range(len(after))
        ])  # fmt: skip
        facts, notes = compare(record, page(self.before), looks, page(after), self.extra)
        return facts | own, notes


def read(endpoint: Endpoint, path: str) -> bytes:
    try:
        return fetch(endpoint, path).body
    except Failure:  # not there, or too busy this time
        return b""


def tells(body: bytes) -> bool:
    return bool(iterations([body]) or page([body]))


def page(raw: Raw) -> Page:
    return of_engine(ENGINES, *(body.decode(errors="replace") for body in raw))


def iterations(*raws: Raw) -> list[Record]:
    """TensorRT-LLM's list of what each of its iterations did."""
    found = []
    for body in (body for raw in raws for body in raw if body[:1] == b"["):
        try:
            found += [step for step in json.loads(body) if isinstance(step, dict)]
        except (ValueError, RecursionError):
            continue
    return found


# --- what they say --------------------------------------------------------------------------------


def compare(
    record: Record, before: Page, looks: Sequence[Look], after: Page, extra: int
) -> tuple[Record, list[str]]:
    """The server's means for the run, the client's means minus those, and notes."""
    passed = {k: sum(after[k]) - sum(before.get(k, ())) for k in COUNTERS if k in after}
    if any(value < 0 for value in passed.values()):
        return {}, ["the server's counters went back, so they are left out: it was restarted, or "
                    "replicas answer in turn"]  # fmt: skip
    facts = {**means(passed), **levels(looks), **cached(passed)}
    requests = facts.get("server_requests")
    if requests is None or record["completed"] <= requests <= record["num_prompts"] + extra:
        return facts | beyond(record, facts), []
    return facts, [f"the server counted {requests} requests, the client {record['completed']}: the "
                   "server's own figures hold others' requests, or one replica's only"]  # fmt: skip


def means(passed: Mapping[str, float]) -> Record:
    """Means of the histograms, in ms."""
    facts: Record = {}
    for metric, names in HISTOGRAMS.items():
        name = next((n for n in names if passed.get(f"{n}_count")), None)
        if name:
            count = passed[f"{name}_count"]
            facts[f"server_mean_{metric}_ms"] = passed.get(f"{name}_sum", 0.0) / count * 1e3
            if metric in ("ttft", "e2el"):
                facts.setdefault("server_requests", round(count))
    return facts


def levels(looks: Sequence[Look]) -> Record:
    """Time-weighted means of gauges: summed over replicas, but averaged for KV use."""
    facts = {}
    for metric, names in (("running", RUNNING), ("waiting", WAITING), ("kv_use", KV_USE)):
        together = fmean if metric == "kv_use" else sum
        seen = [(seconds, together(page[name])) for seconds, page in looks
                for name in names if name in page]  # fmt: skip
        if seen:
            total = sum(seconds * level for seconds, level in seen)
            facts[f"server_mean_{metric}"] = total / sum(seconds for seconds, _ in seen)
    return facts


def cached(passed: Mapping[str, float]) -> Record:
    for hits, parts in CACHE:
        total = sum(passed.get(part, 0.0) for part in parts)
        if hits in passed and total > 0:
            return from_cache(passed[hits], total)
    return {}


def from_cache(hits: float, total: float) -> Record:
    return {"cached_share": hits / total, "cached_source": "the server's counters"}


def of_iterations(servers: Sequence[tuple[Sequence[Record], Sequence[Record]]]) -> Record:
    """The same figures from TensorRT-LLM's iterations, as far as it reports them.

    `servers` has each replica's iterations before and during the run, combined as in `levels`.
    """
    each = [levels_of(steps) for _, steps in servers]
    facts: Record = {}
    for key in ("running", "waiting", "kv_use"):
        if means := [fmean(levels[key]) for levels in each if levels[key]]:
            facts[f"server_mean_{key}"] = fmean(means) if key == "kv_use" else sum(means)
    hits, misses = (sum(counts) for counts in zip((0, 0), *starmap(reuse, servers), strict=True))
    return facts | (from_cache(hits, hits + misses) if hits + misses else {})


def levels_of(steps: Sequence[Record]) -> dict[str, list[float]]:
    """One server's running and waiting requests and its KV cache use (0 to 1), per iteration."""
    stats = stats_of(steps)
    used, most = (numbers(kv.get(key) for kv in stats) for key in ("usedNumBlocks", "maxNumBlocks"))
    return {
        "running": numbers(step.get("numActiveRequests") for step in steps),
        "waiting": numbers(step.get("numQueuedRequests") for step in steps),
        "kv_use": [a / b for a, b in zip(used, most, strict=False) if b],
    }


def reuse(before: Sequence[Record], steps: Sequence[Record]) -> tuple[float, float]:
    """Prompt blocks that hit and missed one server's cache; it counts both from its start."""
    stats = stats_of([*before[-1:], *steps])
    reused, missed = (
        numbers(kv.get(f"{key}Blocks") for kv in stats) for key in ("reused", "missed")
    )
    if not (reused and missed):
        return 0, 0
    hits, misses = reused[-1] - reused[0], missed[-1] - missed[0]
    return (hits, misses) if min(hits, misses) >= 0 else (0, 0)


def stats_of(steps: Sequence[Record]) -> list[Record]:
    return [kv for step in steps if isinstance(kv := step.get("kvCacheStats"), dict)]


def numbers(values: Iterable[Any]) -> list[float]:
    return [float(v) for v in values if type(v) in (int, float) and math.isfinite(v)]


def beyond(record: Record, facts: Record) -> Record:
    """How much higher the client's means are: the network, or a mistake on either side."""
    found = {}
    means = {k: record.get(f"mean_{k}_ms") for k in ("ttft", "e2el")} | {"itl": per_token(record)}
    for metric, ours in means.items():
        theirs = facts.get(f"server_mean_{metric}_ms")
        if ours is not None and theirs is not None:
            found[f"{metric}_beyond_server_ms"] = ours - theirs
    return found


def per_token(record: Record) -> float | None:
    """The client's mean ITL in ms per token, as servers count it, even if an event has several."""
    itl, each = record.get("mean_itl_ms"), record.get("client", {}).get("tokens_per_event")
    tokens, count = record.get("total_output_tokens", 0), record["completed"]
    if itl is None or not each or tokens <= count:
        return None if itl is None else float(itl)
    return float(itl * (tokens / each - count) / (tokens - count))


def cache_note(record: Record) -> list[str]:
    share = record.get("cached_share")
    if share is None or share <= CACHE_HIT:
        return []
    return [f"{share:.0%} {CAME} (by {record['cached_source']}): the TTFT is that of the rest"]
