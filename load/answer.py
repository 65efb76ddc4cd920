"""Reads a finished answer from its raw bytes and their arrival times."""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from common.response import (
    BROKEN_OFF,
    ERROR_LENGTH,
    NO_ANSWER,
    Body,
    Malformed,
    Reply,
    error_message,
    read_body,
    shown,
)
from load.events import (
    USAGE,
    Event,
    Json,
    counted,
    finish_reason,
    is_stream,
    says,
    split_events,
    token_events,
    usage,
    usage_of,
    written,
)

LATE = 1.5  # times the usual pace
TOGETHER = 0.2  # ms: faster than any engine makes tokens for one request
# Finish reasons of a server that gave up, such as DeepSeek's insufficient_system_resource.
ABORTED = re.compile("error|abort|cancel|timeout|fail|insufficient", re.IGNORECASE)
# What was odd about a complete answer, phrased to follow `N answers`.
NO_DONE = "ended without [DONE]; the finish reason and the transfer's end show they are complete"
NO_END = "ended with [DONE], but without the end of the transfer: the connection closed before it"
HELD_OPEN = "ended with [DONE], but the transfer stayed open: each kept its stream from the next "
HELD_OPEN += "request for up to half a second, which throughput includes"


@dataclass(slots=True)
class Outcome:
    """The result of one request. Times are ns since 1970, by the client's clock."""

    index: int
    intended: int
    sent: int
    first: int = 0
    last: int = 0
    gaps: array[float] = field(default_factory=lambda: array("f"))  # ms between token events
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None  # prompt tokens; None: the server does not say
    events: int = 0
    merged: int = 0  # events read together with an earlier one, so their times are the same
    blurred: int = 0  # those of them in late reads, so their true times are unknown
    first_blurred: bool = False  # the first event came with others and was read late
    has_text: bool = False
    streamed: bool = True
    model: str = ""
    finish: str = ""  # why the output ended: stop, length, ...
    collected: bool = False  # a stream whose length was known before it began
    connect: int = 0  # ns to open a new connection, as the server had closed the last one
    quirks: tuple[str, ...] = ()  # what was odd about a complete answer
    error: str = ""
    retried: bool = False


class Told(Malformed):
    """The server's own error, which says more than that the connection broke afterwards."""


def read_reply(reply: Reply, outcome: Outcome, chat: bool) -> Outcome:
    """Fill in what the server answered; a problem becomes `outcome.error`."""
    try:
        _read(reply, outcome, chat)
    except Told as e:
        outcome.error = str(e)
    except Malformed as e:
        outcome.error = outcome.error or str(e)
    except ValueError as e:
        outcome.error = outcome.error or shown(f"unreadable answer: {e}")
    except (LookupError, TypeError, AttributeError, RecursionError) as e:
        outcome.error = outcome.error or shown(f"unreadable answer: {e!r}")
    return outcome


def _read(reply: Reply, outcome: Outcome, chat: bool) -> None:
    head = reply.head
    if head is None:
        raise Malformed(BROKEN_OFF if reply.raw else NO_ANSWER)
    body = read_body(reply.raw, head)
    if head.status not in range(200, 204):  # some answer 201 Created to any POST
        words = f"HTTP {head.status}: {head.moved or error_message(body.data)}"
        raise Told(f"{words} (Retry-After: {head.retry_after})" if head.retry_after else words)
    read = _read_stream if is_stream(body.data, head.kind) else _read_document
    try:
        read(reply, body, outcome, chat)
    except ValueError:
        if body.whole:
            raise
        raise Malformed(BROKEN_OFF) from None


def _read_document(reply: Reply, body: Body, outcome: Outcome, chat: bool) -> None:
    """The server did not stream: all tokens arrive at the end."""
    try:
        document = json.loads(body.data)
    except ValueError as e:
        if not body.whole:
            raise
        words = f"unreadable answer ({kind_of(reply)}): {e}: {error_message(body.data)}"
        raise Malformed(shown(words)) from None
    outcome.streamed = False
    outcome.events = 1
    _note(document, outcome)
    if not body.whole:
        raise Malformed(BROKEN_OFF)
    if not (isinstance(document, dict) and document.get("choices")):
        raise Malformed(f"the answer holds no choices: {error_message(body.data)}")
    outcome.has_text = says(document, whole=True)
    outcome.first = outcome.last = reply.stamps[-1]
    said = usage_of(document)
    outcome.prompt_tokens = counted(said.get("prompt_tokens"))
    outcome.output_tokens = written(said)
    for choice in document.get("choices") or ():
        outcome.finish = str(choice.get("finish_reason") or "")[:ERROR_LENGTH]


def kind_of(reply: Reply) -> str:
    return (reply.head and reply.head.kind) or "no content type"


def _read_stream(reply: Reply, body: Body, outcome: Outcome, chat: bool) -> None:
    head = reply.head
    outcome.collected = head is not None and head.length is not None and not head.chunked
    if (kind := kind_of(reply)) != "text/event-stream":
        outcome.quirks += (f"were event streams, though sent as {kind}",)
    tokens, others = split_events(body.data)
    end = tokens[-1].end if tokens else 0
    done = next((event.end for event in others if b"[DONE]" in event.text), len(body.data))
    for event in others:
        _note(event.read(), outcome, aside=event.end < end or event.end > done)
    for event in tokens if b'"error"' in body.data else ():  # from a gateway that lost its server
        if b'"error"' in event.text:
            _note(event.read(), outcome)
    tokens = tokens or [e for e in others if (e.read() or {}).get("choices")]  # written oddly
    outcome.finish = finish_reason(tokens)
    _check_end(body, others, outcome)
    if not tokens:
        raise Malformed("the stream held no token")
    _note(tokens[-1].read(), outcome)
    told = usage([*tokens, *others])
    outcome.prompt_tokens, outcome.output_tokens, outcome.cached_tokens = told
    found = token_events(tokens, chat, outcome.output_tokens)
    outcome.has_text = any(says(e.read()) for e in found)
    _time(reply, [body.raw_offset(e.end) for e in found], outcome)


def _check_end(body: Body, others: Sequence[Event], outcome: Outcome) -> None:
    """Check that the answer is complete: [DONE], or a finish reason and the end of the transfer."""
    done = any(b"[DONE]" in event.text for event in others)
    if ABORTED.search(outcome.finish):
        raise Told(f"the server ended the answer: finish_reason {outcome.finish!r}")
    if not done and not body.whole:
        raise Malformed(BROKEN_OFF)
    if not done and not outcome.finish:
        raise Malformed("the stream ended without [DONE] and without a finish_reason")
    if not done and any(USAGE.search(event.text) for event in others):
        # Servers that send usage in its own event, as OpenAI does, send [DONE] after it.
        raise Malformed(
            "the stream ended without [DONE], which follows usage in an event of its own"
        )
    if not done:
        outcome.quirks += (NO_DONE,)
    elif not body.whole and HELD_OPEN not in outcome.quirks:
        outcome.quirks += (NO_END,)


def _time(reply: Reply, offsets: list[int], outcome: Outcome) -> None:
    """Set the times of the token events, which end at these offsets of the raw bytes."""
    reads = [bisect_left(reply.ends, offset) for offset in offsets]
    reads = one_for_each(reads, reply.stamps, outcome.output_tokens)
    times = [reply.stamps[read] for read in reads]
    outcome.first, outcome.last = times[0], times[-1]
    outcome.gaps.extend((b - a) / 1e6 for a, b in pairwise(times))
    outcome.events = len(times)
    brought = Counter(reads)  # events per read
    outcome.merged = len(times) - len(brought)
    if outcome.merged:
        outcome.blurred = count_blurred(brought, reply.stamps)
    # A server may really send its first tokens together; then they are read as they arrive.
    at, pace = reads[0], (times[-1] - times[0]) / max(len(times) - 1, 1)
    late = reply.seen[at] - reply.stamps[at] > max(pace / 2, TOGETHER * 1e6)
    outcome.first_blurred = brought[at] > 1 and pace > 0 and late


def one_for_each(reads: list[int], stamps: Sequence[int], tokens: int | None) -> list[int]:
    """If tokens came as several events at once, keep the first of each if the count then fits."""
    if not tokens or len(reads) <= tokens:
        return reads
    apart = TOGETHER * 1e6
    found = [*reads[:1], *(b for a, b in pairwise(reads) if stamps[b] - stamps[a] > apart)]
    return found if 0.9 * tokens <= len(found) <= tokens else reads


def count_blurred(brought: Counter[int], stamps: Sequence[int]) -> int:
    """How many events came with another after an unusually long gap.

    A server that sends its events in pairs does so at its usual pace. If several came at once *and*
    after a longer gap, they were sent one by one, and only the last one's time is known.
    """
    steps = [(stamps[b] - stamps[a], brought[b]) for a, b in pairwise(sorted(brought))]
    usual = sorted(wait for wait, _ in steps)[len(steps) // 2] if steps else 0
    return sum(events - 1 for wait, events in steps if wait > LATE * usual)


def _note(document: Json, outcome: Outcome, aside: bool = False) -> None:
    """Keep the model's name from a document or event; Told if it holds an error.

    A message alone is no error before a token (a heartbeat) and after [DONE] (a farewell).
    """
    if not isinstance(document, dict):
        return
    # FastChat sends `error_code`; a document with only a message is an error, too.
    kinds = (document.get("error"), document.get("error_code"), document.get("object") == "error")
    words = document.get("message") or document.get("detail")
    if any(kinds) or (words and not aside and not document.get("choices")):
        raise Told(f"error from the server: {error_message(json.dumps(document).encode())}")
    outcome.model = shown(str(document.get("model") or outcome.model))
