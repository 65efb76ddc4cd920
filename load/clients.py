"""The interface of measuring clients, and our own client. NVIDIA's is in nvidia.py.

A case goes in, a record comes out: the fields of benchmark_serving's result files, plus `valid` and
`problems`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from common.live import LiveLine
from common.talk import die, say
from load import sharegpt
from load.connection import TOO_LATE
from load.counters import Counters
from load.endpoint import Endpoint, at
from load.loadgen import measure
from load.matrix import Case, too_few
from load.metrics import (
    Wanted,
    ended_early,
    mean,
    summarise,
)
from load.payload import Conversations, Dialect, Prompts, RandomPrompts, Requests
from load.probe import Found, explore
from load.target import CutShort, Load, LoadError, Result

WAITED = 0.05  # share of its time that a request waited for a stream: worth a note
ATTEMPTS = 3  # at a run, if only our own client could not keep up
WARM_UP_TOKENS = 32
WARM_UP_STREAMS = 16
LONGEST = 2048  # tokens of a conversation's answer
ROOM, ROOM_A_TOKEN = 1 << 18, 1 << 12  # bytes of an answer; an event takes a few hundred


Record = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """The options that all runs share."""

    sharegpt: Path
    backend: str = "openai"  # or openai-chat, as in benchmark_serving
    seed: int = 0
    warmup: int | None = None
    burstiness: float = 1.0
    timeout: float = 600.0
    goodput: Mapping[str, float] = field(default_factory=dict)
    shards: int = 0
    detailed: bool = False
    image: str = ""
    tokenizer: str = ""
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def chat(self) -> bool:
        return self.backend == "openai-chat"


class Client(Protocol):
    name: str
    options: Options

    def __call__(self, case: Case, folder: Path) -> Record: ...


def die_if_silent(endpoint: Endpoint, options: Options) -> None:
    """Failure if not even a short request is answered: no run would succeed either."""
    found = explore(endpoint, options.chat, options.timeout)
    if found.error:
        die(
            f"{endpoint.url} does not answer even one short request: {found.error}; "
            "the rest is left out",
            hint=found.hint or "its log says why; --resume goes on from here",
        )


def nothing(case: Case, why: str) -> Record:
    """The record of a run that measured nothing."""
    return {"num_prompts": case.num_prompts, "completed": 0, "valid": False, "problems": [why],
            "notes": [], "client": {}}  # fmt: skip


# --- ours -----------------------------------------------------------------------------------------


class Builtin:
    """Our own client, on loadgen.py: it needs no container, tokenizer or GPU."""

    name = "builtin"

    def __init__(self, endpoint: Endpoint, options: Options) -> None:
        self.endpoint, self.options = endpoint, options
        self.counters = Counters(endpoint)
        self.server = Found(Dialect(options.chat), endpoint.model, 0, error="not asked yet")

    def __call__(self, case: Case, folder: Path) -> Record:
        for attempt in range(1, ATTEMPTS + 1):
            record = self.measure(case, attempt)
            own = record["client"].get("problems")
            spoilt_by_us_alone = own and record["problems"] == own
            if not spoilt_by_us_alone or attempt == ATTEMPTS:
                break
            say(f"{case.name}: measured again: {own[0]}")
        if attempt > 1:
            record["notes"].append(f"{case.name} was measured {attempt} times: others kept the "
                                   "client's machine busy")  # fmt: skip
        return record

    def measure(self, case: Case, attempt: int) -> Record:
        probes = self.acquaint()
        if self.server.error:
            return nothing(case, f"no answer to a short request: {self.server.error}")
        load = self.load_for(case, attempt)
        try:
            warmed = self.warm_up(case, load)
            with self.counters.watching():
                result = watched(load, case)
        except LoadError as e:
            return nothing(case, str(e))
        assert isinstance(load.body, Requests)
        wanted = self.wanted(case, load.body.prompts)
        record = summarise(load, result, wanted, self.options.goodput)
        record["notes"] += [
            *self.server.notes,
            *unmeasured(probes, warmed),
            *notes_for(case, record, load.body.dialect),
            *early_ends(load.body.dialect, result, wanted),
            *unlike_its_name(load, case, record),
            *repeats(load.body.prompts, case.num_prompts, warmed),
        ]
        self.counters.add_to(record, case.name)
        return record | (details(load, result) if self.options.detailed else {})

    def acquaint(self) -> int:
        """Find out once what the server understands; returns how many requests it took."""
        if not self.server.error:
            return 0
        self.server = explore(self.endpoint, self.options.chat, self.options.timeout)
        for note in self.server.notes:
            say(note)
        return self.server.probes

    def load_for(self, case: Case, attempt: int) -> Load:
        options, dialect = self.options, self.server.dialect
        return Load(
            self.endpoint.target,
            at(self.endpoint.prefix, dialect.path),
            Requests(self.endpoint.model, self.prompts(case, attempt), dialect),
            case.num_prompts,
            case.concurrency,
            rate=case.rate,
            burstiness=options.burstiness,
            timeout=options.timeout,
            seed=options.seed,
            chat=dialect.chat,
            shards=options.shards,
            largest=ROOM + ROOM_A_TOKEN * (case.output_len or LONGEST),
        )

    def prompts(self, case: Case, attempt: int) -> Prompts:
        options = self.options
        # No run may benefit from the prefix cache of an earlier run, repeat or attempt.
        seed = f"{options.seed}/{case.name}/{attempt}"
        if case.input_len is None or case.output_len is None:
            count = case.num_prompts + WARM_UP_STREAMS
            return sharegpt.pick(options.sharegpt, count, seed)
        return RandomPrompts(case.input_len, case.output_len, seed, self.server.dialect.text)

    def wanted(self, case: Case, prompts: Prompts) -> Wanted:
        """What valid answers look like, given what the server understands."""
        dialect = self.server.dialect
        input_len = None if dialect.text else case.input_len
        name, asked = self.server.model, self.endpoint.model
        wanted = Wanted(name, case.output_len, input_len, asked, exact=dialect.ignore_eos)
        if case.output_len is None:
            wanted = replace(wanted, output_lens=lambda index: prompts(index)[1])
        return wanted

    def warm_up(self, case: Case, load: Load) -> int:
        """Send unmeasured requests with prompts of their own; returns how many."""
        count = warm_up_count(case, self.options)
        done = measure(self.warm_up_load(load, count)).outcomes if count else []
        if count and all(o.error.startswith(TOO_LATE) for o in done):
            raise LoadError(f"no warm-up request had its answer within {load.timeout:g} s")
        return count

    def warm_up_load(self, load: Load, count: int) -> Load:
        assert isinstance(load.body, Requests)
        prompts = load.body.prompts
        if isinstance(prompts, RandomPrompts):
            prompts = replace(prompts, seed=f"warm-up {prompts.seed}")
        if isinstance(prompts, Conversations):
            prompts = Conversations(prompts.turns[load.count :] or prompts.turns)
        body = replace(load.body, prompts=prompts, longest=WARM_UP_TOKENS)
        streams = min(count, load.width, WARM_UP_STREAMS)
        return replace(load, body=body, count=count, streams=streams, rate=math.inf, shards=1)


def warm_up_count(case: Case, options: Options) -> int:
    """How many unmeasured requests precede a run."""
    if options.warmup is not None:
        return options.warmup
    return min(case.concurrency or case.num_prompts, case.num_prompts, WARM_UP_STREAMS)


def watched(load: Load, case: Case) -> Result:
    """Measure a load, with a progress line on a terminal."""
    line = LiveLine(case.name, case.num_prompts)
    try:
        return measure(load, line)
    except CutShort as cut:
        return cut.result
    finally:
        line.clear()


def unmeasured(probes: int, warmed: int) -> list[str]:
    parts = [f"{probes} to find out what the server understands"] * bool(probes)
    parts += [f"{warmed} of warm-up"] * bool(warmed)
    return [f"unmeasured requests before a run: {', '.join(parts)}"] if parts else []


def early_ends(dialect: Dialect, result: Result, wanted: Wanted) -> list[str]:
    """A note if the server accepts ignore_eos but does not obey it."""
    early = [o for o in result.outcomes if not o.error and ended_early(o, wanted)]
    if not early or not dialect.ignore_eos:
        return []
    return [f"the server ignores ignore_eos: {len(early)} of {len(result.outcomes)} outputs ended "
            f"early, after {mean(o.output_tokens or 0 for o in early):.0f} tokens on average"
            ]  # fmt: skip


def unlike_its_name(load: Load, case: Case, record: Record) -> list[str]:
    """A note if the load was less than the run's name says."""
    streams, client = case.concurrency, record["client"]
    if load.open_loop:  # a stream can be busy when the next request is due
        waited = client["mean_late_ms"]
        if not streams or client["late_share"] < WAITED:
            return []
        return [f"requests waited {waited:,.0f} ms on average for one of the {streams} streams: "
                f"the server did not get {case.rate:g} requests/s"]  # fmt: skip
    return [words] if (words := too_few(case)) else []


def repeats(prompts: Prompts, count: int, warmed: int) -> list[str]:
    """A note if the data set was too small for these requests and the warm-up."""
    if not isinstance(prompts, Conversations) or len(prompts.turns) > count:
        return []
    if len(prompts.turns) == count:
        return ["the data set has no conversation to spare: those of the warm-up were measured, "
                "too, and a prefix cache knows them"] if warmed else []  # fmt: skip
    return [f"the data set has only {len(prompts.turns)} conversations for {count} requests: a "
            "prefix cache knows the repeated ones"]  # fmt: skip


def notes_for(case: Case, record: Record, dialect: Dialect) -> list[str]:
    notes, client = [], record["client"]
    if dialect.chat and case.input_len is not None:
        notes.append("a chat's prompt has as many words as tokens were asked for; only the server "
                     "knows its exact length")  # fmt: skip
    counted = record["total_input_tokens"] / max(record["completed"], 1)
    if dialect.text and 0 < counted < (case.input_len or 0):  # a word is a token, if not more
        notes.append(f"the server counts {counted:,.0f} tokens in a prompt of {case.input_len:,} "
                     "words: it cuts prompts, or does not count all of their tokens")  # fmt: skip
    if case.input_len is None:
        notes.append("conversations were picked by estimated lengths (no tokenizer on the client); "
                     "token counts are the server's")  # fmt: skip
    if client["stamps"] != "kernel":
        notes.append("times were taken by the client, not by the kernel: https, or a kernel "
                     "without SO_TIMESTAMPING")  # fmt: skip
    if client["retried"]:
        notes.append(f"{client['retried']} requests were sent again: the server had closed the "
                     "idle connection")  # fmt: skip
    return notes


def details(load: Load, result: Result) -> Record:
    """One value per request, as benchmark_serving's --save-detailed has it; times in seconds."""
    outcomes = result.outcomes
    start = [o.intended if load.open_loop else o.sent for o in outcomes]
    return {
        "input_lens": [o.prompt_tokens or 0 for o in outcomes],
        "output_lens": [o.output_tokens or 0 for o in outcomes],
        "ttfts": [
            (o.first - t) / 1e9 if o.first else 0.0 for o, t in zip(outcomes, start, strict=True)
        ],
        "e2els": [
            (o.last - t) / 1e9 if o.last else 0.0 for o, t in zip(outcomes, start, strict=True)
        ],
        "itls": [[round(g / 1e3, 7) for g in o.gaps] for o in outcomes],
        "errors": [o.error for o in outcomes],
    }
