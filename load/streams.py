"""Did the answers really stream, or did something on the way hold tokens back?

A proxy may collect a whole answer, or pass it on every 4 KB or 100 ms. Tokens then arrive together,
at times that are the proxy's. (A client that reads late is another matter: metrics.slow_client.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from load.answer import TOGETHER, Outcome

FEWEST = 8  # tokens; fewer may be one step of an engine that speculates
PAIRS = 1.5
HURRY = 2.0  # ms a token
CLUMP = 3.0  # tokens at a time, on average; a busy server sends two together now and then
HEAD_CLUMP = 5  # the same, for the beginning only
SPOILT, ODD = 0.5, 0.05  # shares of the answers: a problem (a server may just stall), a note
BUFFERED = "something on the way (a proxy or gateway; nginx: proxy_buffering off) holds them back"


@dataclass
class Judgement:
    """What the streams were like; `wrong` are the metrics that a problem spoils."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def spoilt(self, problem: str, wrong: Sequence[str], holds: str) -> None:
        names = ", ".join(wrong[:-1]) + " and " * (len(wrong) > 1) + wrong[-1]
        verb = "mean" if len(wrong) > 1 else "means"
        self.problems.append(f"{problem}: {BUFFERED}. {names} {verb} nothing; {holds} hold")
        self.wrong += [name.lower() for name in wrong]


@dataclass(frozen=True)
class Shape:
    """How the tokens of one answer came."""

    tokens: int  # or events, if fewer: one event may hold several tokens
    bursts: int  # groups in which they came
    first: int  # events in the first burst
    collected: bool
    waited: float = 0.0  # ms until the first
    lasted: float = 0.0  # ms from the first to the last

    @property
    def replayed(self) -> bool:
        """Whether they came one by one, yet faster than nearly any engine writes."""
        return self.lasted < min(self.waited / 10, (self.tokens - 1) * HURRY)

    @property
    def whole(self) -> bool:
        return self.collected or self.bursts == 1

    @property
    def size(self) -> float:
        return self.tokens / self.bursts


def shape(
    gaps: Sequence[float], tokens: int | None, collected: bool = False, waited: float = 0.0
) -> Shape:
    """An answer's shape, from the gaps between its events in ms and the server's token count."""
    events = len(gaps) + 1
    apart = [i for i, gap in enumerate(gaps, 1) if gap > TOGETHER]
    count, first = min(events, tokens or events), (*apart, events)[0]
    return Shape(count, 1 + len(apart), first, collected, waited, sum(gaps))


def judge(good: Sequence[Outcome]) -> Judgement:
    """Which metrics these answers can support."""
    found = judge_shapes(
        [shape(o.gaps, o.output_tokens, o.collected, (o.first - o.sent) / 1e6) for o in good]
    )
    found.notes += [*pieces(good), *quirks(good)]
    return found


def judge_shapes(shapes: Sequence[Shape]) -> Judgement:
    found = Judgement()
    many = [s for s in shapes if s.tokens >= FEWEST]
    whole = [s for s in many if s.whole]
    clumps = [s for s in many if s.size >= CLUMP]
    late = [s for s in many if s.first >= HEAD_CLUMP]
    limit = SPOILT * len(shapes)
    if len(whole) > limit:
        found.spoilt(f"{len(whole)} of {len(shapes)} answers came in one piece, not as a stream",
                     ("TTFT", "ITL", "TPOT"), "E2EL and throughput")  # fmt: skip
    elif len(clumps) > limit:
        found.spoilt(f"{len(clumps)} of {len(shapes)} answers came in clumps, "
                     f"{average(clumps):.0f} tokens together", ("TTFT", "ITL"),
                     "TPOT, E2EL and throughput")  # fmt: skip
    elif len(late) > limit:
        size = sum(s.first for s in late) / len(late)
        found.spoilt(f"the first {size:.0f} tokens came together in {len(late)} of {len(shapes)} "
                     "answers", ("TTFT",), "E2EL and throughput")  # fmt: skip
    elif len(clumps) > ODD * len(shapes):
        found.notes = [f"{len(clumps)} of {len(shapes)} answers came in clumps of tokens: a part "
                       "of TTFT and ITL is a delay on their way"]  # fmt: skip
    else:
        found.notes = replays([s for s in many if s.replayed], shapes)
    found.notes += [*together(shapes), *in_pairs(many)]
    return found


def replays(hurried: Sequence[Shape], shapes: Sequence[Shape]) -> list[str]:
    """A note on answers that a proxy may have replayed; a small model can be as fast."""
    if len(hurried) <= SPOILT * len(shapes):
        return []
    return [f"{len(hurried)} of {len(shapes)} answers came whole in less than a tenth of the time "
            "to their first token: a fast engine, or a proxy that collects them and sends them on "
            "piece by piece; then TTFT, ITL and TPOT mean nothing"]  # fmt: skip


def average(shapes: Sequence[Shape]) -> float:
    """Mean tokens per burst."""
    return sum(s.tokens for s in shapes) / (sum(s.bursts for s in shapes) or 1)


def together(shapes: Sequence[Shape]) -> list[str]:
    """A note on answers that came at once, but are too short to judge."""
    short = [s for s in shapes if 1 < s.tokens < FEWEST and s.whole]
    if len(short) <= ODD * len(shapes):
        return []
    return [f"{len(short)} of {len(shapes)} answers came all at once: too short to tell whether "
            "they were buffered on their way; if so, TTFT and ITL mean nothing"]  # fmt: skip


def in_pairs(many: Sequence[Shape]) -> list[str]:
    """A note if tokens came in groups that are smaller than clumps."""
    size = average(many)
    if not PAIRS <= size < CLUMP:
        return []
    return [f"tokens came {size:.1f} at a time on average: half of ITL or more is 0, the rest the "
            "time between such groups"]  # fmt: skip


def pieces(good: Sequence[Outcome]) -> list[str]:
    events, counted = sum(o.events for o in good), sum(o.output_tokens or 0 for o in good)
    if not counted or 0.95 <= (each := counted / events) <= 1.05:
        return []
    return [f"an event carried {each:.{1 + (each < 1)}f} tokens on average: ITL is the time "
            "between events, not between tokens; TPOT is per token"]  # fmt: skip


def quirks(good: Sequence[Outcome]) -> list[str]:
    seen = Counter(quirk for o in good for quirk in o.quirks)
    return [f"{count} of {len(good)} answers {quirk}" for quirk, count in seen.items()]
