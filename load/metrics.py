"""Turns the results of requests into the figures of a run, and says whether they are valid.

The names are those of benchmark_serving's result files, so that whatever reads those reads ours.
"""

from __future__ import annotations

import math
import operator
import statistics
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from load.answer import Outcome
from load.streams import Judgement, judge
from load.target import Load, Result

PERCENTILES = (90, 95, 99)
METRICS = ("ttft", "tpot", "itl", "e2el")
DETAILS = ("input_lens", "output_lens", "ttfts", "itls", "e2els", "errors")  # one value per request
SHOWN = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)  # percentiles in the report
KINDS = ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES))
SLOW_CLIENT = 0.05  # share of the requests' time that the client itself may add
BLURRED = 0.005  # share of events with another's time; above it the p99 of the gaps is off
CLOCK_STEP_MS = 1.0
BUSY = 0.9  # of a core
CUT_OFF = ("", "length", "max_tokens", "content_filter")  # reasons that are not the model's own
FRESH = 0.05  # share of requests on new connections that is worth a note


@dataclass(frozen=True)
class Wanted:
    """What a run's answers must be like for it to be valid."""

    model: str
    output_len: int | None  # None: each request has its own
    input_len: int | None = None  # None: only the server knows
    asked: str = ""  # the name that was asked for, if answers have another
    exact: bool = True  # ignore_eos was accepted, so outputs cannot end early
    output_lens: Callable[[int], int] | None = None  # by request, when each has its own


@dataclass(frozen=True)
class Timing:
    """One request's latencies in ms, from when it was sent (or, in an open loop, due)."""

    ttft: float
    e2el: float
    tokens: int

    @property
    def tpot(self) -> float | None:
        return (self.e2el - self.ttft) / (self.tokens - 1) if self.tokens > 1 else None


def timing(outcome: Outcome, open_loop: bool) -> Timing:
    start = outcome.intended if open_loop else outcome.sent
    ttft, e2el = (outcome.first - start) / 1e6, (outcome.last - start) / 1e6
    return Timing(ttft, e2el, outcome.output_tokens or 0)


def summarise(
    load: Load, result: Result, wanted: Wanted, goodput: Mapping[str, float]
) -> dict[str, Any]:
    """The numbers of a run. Failed requests make it invalid and are in none of its latencies."""
    good = [o for o in result.outcomes if not o.error]
    timings = [timing(o, load.open_loop) for o in good]
    duration = span(good)
    tokens_in = sum(o.prompt_tokens or 0 for o in good)
    tokens_out = sum(o.output_tokens or 0 for o in good)
    itl = describe("itl", (round(gap, 3) for o in good for gap in o.gaps))
    client = client_facts(load, result, itl["mean_itl_ms"] or 0.0)
    streams = Judgement() if client["problems"] else judge(good)
    problems = [*cut_short(load, result), *find_problems(load, result.outcomes, wanted)]
    problems += [*client["problems"], *streams.problems]
    in_limits = goodput_of(timings, goodput)

    def per_second(count: float) -> float:
        return count / duration if duration else 0.0

    return {
        "num_prompts": load.count,
        "completed": len(good),
        "valid": not problems,
        "problems": problems,
        "invalid_metrics": streams.wrong,
        "notes": [*streams.notes, *connections(load, good)],
        "duration": duration,
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": per_second(len(good)),
        "request_goodput": per_second(in_limits) if goodput else None,
        "goodput_share": in_limits / load.count if goodput else None,
        **cached_prompts(good, tokens_in),
        "output_throughput": per_second(tokens_out),
        "total_token_throughput": per_second(tokens_in + tokens_out),
        "user_throughput": mean(t.tokens / t.e2el * 1e3 for t in timings if t.e2el > 0),
        **describe("ttft", (t.ttft for t in timings)),
        **describe("tpot", (t.tpot for t in timings if t.tpot is not None)),
        **itl,
        **describe("e2el", (t.e2el for t in timings)),
        "e2el_growth": growth(
            ((o.intended - good[0].intended) / 1e9 for o in good), (t.e2el / 1e3 for t in timings)
        )
        if load.open_loop
        else None,
        "client": client,
        **({"stopped": result.stopped} if result.stopped else {}),
    }


def cached_prompts(good: Sequence[Outcome], tokens_in: int) -> dict[str, Any]:
    """The cached share by the answers' usage. vLLM leaves it out if it is 0, or altogether."""
    said = [o.cached_tokens for o in good if o.cached_tokens is not None]
    if not said or not 0 < tokens_in >= sum(said):  # some do not count cached ones as the prompt's
        return {"cached_share": None, "cached_source": None}
    return {"cached_share": sum(said) / tokens_in, "cached_source": "usage in the answers"}


def span(good: Sequence[Outcome]) -> float:
    """Seconds from the first request to the last token."""
    if not good:
        return 0.0
    return (max(o.last for o in good) - min(o.sent for o in good)) / 1e9


class Distribution:
    """Sorted values, equal ones kept once: a run has millions of gaps, but few different ones."""

    def __init__(self, values: Iterable[float]) -> None:
        counts = Counter(values)
        self.values = sorted(counts)
        self.counts = [counts[value] for value in self.values]
        self.upto = list(accumulate(self.counts))

    def __len__(self) -> int:
        return self.upto[-1] if self.upto else 0

    def mean(self) -> float:
        return math.fsum(map(operator.mul, self.values, self.counts)) / (len(self) or 1)

    def deviation(self) -> float:
        middle = self.mean()
        squares = ((v - middle) ** 2 * n for v, n in zip(self.values, self.counts, strict=True))
        return math.sqrt(math.fsum(squares) / (len(self) or 1))

    def percentile(self, p: float) -> float:
        """Interpolated between the two nearest values, as numpy does."""
        position = (len(self) - 1) * p / 100
        low, high = self.at(math.floor(position)), self.at(math.ceil(position))
        return low + (high - low) * (position % 1)

    def at(self, position: int) -> float:
        return self.values[bisect_right(self.upto, position)]


def describe(name: str, values: Iterable[float]) -> dict[str, Any]:
    found = Distribution(values)
    if not found:
        return {f"{kind}_{name}_ms": None for kind in KINDS}
    numbers = (found.mean(), found.percentile(50), found.deviation(),
               *map(found.percentile, PERCENTILES))  # fmt: skip
    facts: dict[str, Any] = {f"{k}_{name}_ms": n for k, n in zip(KINDS, numbers, strict=True)}
    return facts | {f"{name}_percentiles_ms": percentiles(found)}


def percentiles(found: Distribution) -> dict[str, float]:
    return {f"{p:g}": round(found.percentile(p), 3) for p in SHOWN}


def mean(values: Iterable[float]) -> float:
    found = array("d", values)  # a list of millions would take four times the memory
    return math.fsum(found) / len(found) if found else 0.0


def growth(times: Iterable[float], latencies: Iterable[float]) -> float | None:
    """By how many seconds latency grew per second of load; 0 if the server keeps up.

    Only the second half counts: at first latency grows because the batch fills up.
    """
    points = sorted(zip(times, latencies, strict=True))
    points = points[len(points) // 2 :]
    if len({at for at, _ in points}) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def goodput_of(timings: Iterable[Timing], limits: Mapping[str, float]) -> int:
    """How many requests were within every limit."""
    return sum(all((getattr(t, k) or 0.0) <= ms for k, ms in limits.items()) for t in timings)


# --- can it be believed? --------------------------------------------------------------------------


def find_problems(load: Load, outcomes: Sequence[Outcome], wanted: Wanted) -> list[str]:
    good = [o for o in outcomes if not o.error]
    return [
        *failures(load, outcomes),
        *odd_outputs(good, wanted),
        *other_models(good, wanted),
    ]


def cut_short(load: Load, result: Result) -> list[str]:
    if not result.cut:
        return []
    return [f"ended after {len(result.outcomes)} of {load.count} requests: {result.cut}"]


def failures(load: Load, outcomes: Sequence[Outcome]) -> list[str]:
    errors = Counter(o.error for o in outcomes if o.error)
    if not errors:
        return []
    cause, _ = errors.most_common(1)[0]
    return [f"{errors.total()} of {load.count} requests failed: {cause}"]


def odd_outputs(good: Sequence[Outcome], wanted: Wanted) -> list[str]:
    full = [o for o in good if not ended_early(o, wanted)]
    return [
        # A single token may be a special one, which decodes to nothing.
        *count("have no text", [o for o in good if not o.has_text and o.output_tokens != 1]),
        *count("came without usage", [o for o in good if lacks_usage(o, wanted)]),
        *count("came in one piece, not streamed", [o for o in good if not o.streamed]),
        *wrong_length("output", [o.output_tokens for o in full], wanted.output_len, wanted.exact),
        *unlike_asked(full, wanted),
        *wrong_length("prompt", [o.prompt_tokens for o in good], wanted.input_len, True),
    ]


def ended_early(outcome: Outcome, wanted: Wanted) -> bool:
    """Whether the model itself ended the output early, and nothing cut it short."""
    asked = wanted.output_lens(outcome.index) if wanted.output_lens else wanted.output_len or 0
    its_own = outcome.finish.lower() not in CUT_OFF  # stop, eos, eos_token, end_turn, ...
    return its_own and (outcome.output_tokens or 0) < asked


def lacks_usage(outcome: Outcome, wanted: Wanted) -> bool:
    counts = (outcome.output_tokens, outcome.prompt_tokens if wanted.input_len else 0)
    return None in counts or (outcome.has_text and not outcome.output_tokens)


def count(what: str, outcomes: Sequence[Outcome]) -> list[str]:
    return [f"{len(outcomes)} answers {what}"] if outcomes else []


def wrong_length(
    what: str, lengths: Iterable[int | None], wanted: int | None, exact: bool
) -> list[str]:
    if wanted is None:
        return []
    wrong = [n for n in lengths if n is not None and (n != wanted if exact else n > wanted)]
    if not wrong:
        return []
    return [f"{len(wrong)} {what}s are not {wanted} tokens long (one has {wrong[0]})"]


def unlike_asked(good: Sequence[Outcome], wanted: Wanted) -> list[str]:
    if not wanted.output_lens or not wanted.exact:
        return []
    pairs = [(o.output_tokens, wanted.output_lens(o.index)) for o in good]
    wrong = [(n, asked) for n, asked in pairs if n is not None and n != asked]
    if not wrong:
        return []
    return [f"{len(wrong)} outputs are not as long as asked (one has {wrong[0][0]} tokens, "
            f"not {wrong[0][1]})"]  # fmt: skip


def other_models(good: Sequence[Outcome], wanted: Wanted) -> list[str]:
    others = sorted({o.model for o in good if o.model and o.model != wanted.model})
    if not others:
        return []
    alias = wanted.asked not in ("", wanted.model)  # a name for several models, or with a fallback
    first = f", which answered for {wanted.asked} at first" if alias else ""
    return [f"answers came from {', '.join(others)}, not from {wanted.model}{first}"]


def client_facts(load: Load, result: Result, itl: float) -> dict[str, Any]:
    """What the load generator knows of itself, and whether it kept up; `itl` is the mean in ms."""
    good = [o for o in result.outcomes if not o.error]
    events = sum(o.events for o in good)
    late = [max(o.sent - o.intended - o.connect, 0) / 1e6 for o in good]
    served = math.fsum(timing(o, False).e2el for o in good)
    tokens = sum(o.output_tokens or 0 for o in good)
    facts = {
        "offered_rate": offered_rate(load, result.outcomes),
        "stamps": "kernel" if result.kernel_stamps else "user space",
        "shards": result.shards,
        "cpu": round(result.cpu, 3),
        "mean_late_ms": mean(late),
        "max_late_ms": max(late, default=0.0),
        "late_share": math.fsum(late) / served if served else 0.0,
        "p99_read_lag_ms": lag(result.lags, 0.99),
        "max_read_lag_ms": max(result.lags, default=0) / 10,
        "waited_for_core_ms": round(result.waited, 3),
        "merged_share": sum(o.merged for o in good) / events if events else 0.0,
        "blurred_share": sum(o.blurred for o in good) / events if events else 0.0,
        "blurred_firsts": sum(o.first_blurred for o in good) / len(good) if good else 0.0,
        "tokens_per_event": tokens / events if events else 0.0,
        "retried": sum(o.retried for o in result.outcomes),
        "clock_step_ms": round(result.clock_step, 3),
    }
    return {**facts, "problems": slow_client(load, result, facts, itl)}


def connections(load: Load, good: Sequence[Outcome]) -> list[str]:
    """A note if many requests needed a new connection: a server's users wait for that, too."""
    new = [o.connect / 1e6 for o in good if o.connect and not o.retried]
    if len(new) <= FRESH * len(good):
        return []
    where = "TTFT and E2EL include it" if load.open_loop else "no latency includes it"
    return [f"the server closes its connections: {len(new)} of {len(good)} requests waited for a "
            f"new one, {mean(new):.1f} ms on average; {where}"]  # fmt: skip


def slow_client(load: Load, result: Result, facts: Mapping[str, Any], itl: float) -> list[str]:
    """Signs that the client could not keep up, in which case it measured itself."""
    found = []
    queueing = load.open_loop and load.streams is not None  # then waiting was asked for
    if facts["late_share"] > SLOW_CLIENT and not queueing:
        found.append(f"the client held requests back for {facts['late_share']:.0%} of their time")
    good = [o for o in result.outcomes if not o.error]
    behind = facts["merged_share"] > BLURRED and facts["p99_read_lag_ms"] > itl / 2 > 0
    held_up = facts["blurred_share"] > BLURRED and result.waited > itl
    if (behind or held_up) and judge(good).problems:  # it counts only if it was late nearly always
        behind, held_up = result.cpu > BUSY, result.waited > 500 * span(good)
    if behind or held_up:
        share = facts["merged_share"] if behind else facts["blurred_share"]
        found.append(f"the client read so late that {share:.0%} of the events got too late a time")
    if facts["blurred_firsts"] > BLURRED:
        share = facts["blurred_firsts"]
        found.append(
            f"the client read so late that {share:.0%} of first tokens got too late a time"
        )
    if not result.kernel_stamps and result.cpu > BUSY:
        found.append(f"the client used {result.cpu:.0%} of a core, and it took the times itself")
    if abs(result.clock_step) > CLOCK_STEP_MS:
        found.append(f"the clock was set by {result.clock_step:.1f} ms during the run")
    return found


def offered_rate(load: Load, outcomes: Sequence[Outcome]) -> float | None:
    if not load.open_loop or len(outcomes) < 2:
        return None
    due = [o.intended for o in outcomes]
    return (len(due) - 1) * 1e9 / max(max(due) - min(due), 1)


def lag(lags: Counter[int], share: float) -> float:
    """How late the client read in ms, at this quantile; 0 if packets came while it was reading."""
    wanted, seen = share * lags.total(), 0
    for step in sorted(lags):
        seen += lags[step]
        if seen >= wanted:
            return max(step, 0) / 10
    return 0.0
