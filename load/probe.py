"""Finds out with a few short requests what a server understands; measured requests keep to that.

Servers report a refused field in words of their own, or not at all. So a refused request is built
up again field by field, and the fields that the server refuses are left out.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from common.response import ERROR_LENGTH, shown
from common.talk import Failure, say
from load.answer import Outcome
from load.endpoint import Endpoint, at, models
from load.loadgen import measure
from load.payload import Dialect, RandomPrompts, Requests
from load.target import Load, LoadError

PROMPT = 16  # tokens
OUTPUTS = (8, 16)  # the first is below any limit; OpenRouter may refuse less than the second
SECONDS = 60.0
ROOM = 1 << 18  # bytes of an answer; an event takes a few hundred
BUSY = re.compile("HTTP (429|50[234]|52[0-9])")  # the last are Cloudflare's
# Statuses that are not about the fields of the request.
OTHERWISE = re.compile(f"HTTP (401|403|404|405|408|413)|{BUSY.pattern}")
RETRY_AFTER = re.compile(r"\(Retry-After: (\d{1,4})\)$")
PAUSES, LONGEST = (1, 2, 4), 60.0  # s before a server with a rate limit is asked again
NOTICED = 3.0  # s after which somebody at a terminal would wonder
NOBODY = re.compile("cannot (connect|resolve)|no (connection|whole answer) within|HTTP 429")
REFUSED = re.compile("HTTP [45]|error from the server")

WITHOUT = {  # the least important first
    "token_ids": ("token ids as a prompt", "prompts are text, and only the server knows their "
                  "length"),
    "stream_options": ("stream_options", "it may not count its tokens"),
    "temperature": ("temperature 0", "it picks its tokens as it likes"),
    "ignore_eos": ("ignore_eos", "outputs may end early"),
}  # fmt: skip
PLAINEST = Dialect(token_ids=False, stream_options=False, temperature=False, ignore_eos=False)
LENGTHS = ("max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Found:
    """What was found out about a server; `error` if it does not answer at all."""

    dialect: Dialect
    model: str  # as its answers name it
    probes: int
    notes: tuple[str, ...] = ()
    error: str = ""
    hint: str = ""


@dataclass
class Prober:
    """Sends short requests, one after the other, and collects the model names in the answers."""

    endpoint: Endpoint
    timeout: float
    output: int = OUTPUTS[0]
    sent: int = 0
    names: set[str] = field(default_factory=set)

    def __call__(self, dialect: Dialect) -> Outcome:
        """The answer; if the server asks us to come back later, the later answer."""
        answer = self.once(dialect)
        for pause in PAUSES:
            later = RETRY_AFTER.search(answer.error)
            if not (later or answer.error.startswith("HTTP 429")):
                break
            wanted = (float(later[1]) if later else 0) or pause
            if wanted > LONGEST:
                break  # not a queue that empties, but a quota that is used up
            if wanted >= NOTICED:
                status = answer.error[: len("HTTP 429")]
                say(f"the server is too busy to answer ({status}): asking again in {wanted:g} s")
            time.sleep(wanted)
            answer = self.once(dialect)
        return answer

    def once(self, dialect: Dialect) -> Outcome:
        prompts = RandomPrompts(PROMPT, self.output, f"probe {self.sent}", dialect.text)
        self.sent += 1
        load = Load(
            self.endpoint.target,
            at(self.endpoint.prefix, dialect.path),
            Requests(self.endpoint.model, prompts, dialect),
            count=1,
            timeout=min(self.timeout, SECONDS),
            chat=dialect.chat,
            largest=ROOM,
        )
        try:
            (outcome,) = measure(load).outcomes
        except LoadError as e:
            return Outcome(0, 0, 0, error=str(e))
        self.names |= {outcome.model} if outcome.model and not outcome.error else set()
        return outcome


def explore(endpoint: Endpoint, chat: bool, timeout: float) -> Found:
    """Two or three requests for most servers, a dozen or so for the strictest."""
    ask = Prober(endpoint, timeout)
    dialect, notes = Dialect(chat), [endpoint.unlisted] if endpoint.unlisted else []
    answer = ask(dialect)
    if BUSY.match(answer.error):
        time.sleep(1)
        answer = ask(dialect)
    if refused(answer):
        dialect, answer, refusals = pieced_together(ask, dialect, answer)
        notes += refusals
    if answer.error and not too_long(answer, ask.output):
        return Found(dialect, endpoint.model, ask.sent, (), answer.error, hint(ask, chat, answer))
    if too_long(answer, ask.output):
        dialect, ignored = with_the_other_length(ask, dialect)
        notes += ignored
    asked = shown(endpoint.model)
    name = ask.names.pop() if len(ask.names) == 1 else asked
    if name != asked:
        notes.append(f"the answers name {name}, not {asked} as asked: taken as the "
                     "model behind that name")  # fmt: skip
    return Found(dialect, name, ask.sent, tuple(notes))


def refused(answer: Outcome) -> bool:
    """Was the request itself refused, rather than its moment or its address?"""
    return bool(REFUSED.match(answer.error)) and not OTHERWISE.match(answer.error)


def too_long(answer: Outcome, wanted: int) -> bool:
    """Longer than asked: the field for the length was ignored."""
    if answer.error:
        return "does not end" in answer.error
    return (answer.output_tokens or answer.events) > wanted


def pieced_together(
    ask: Prober, full: Dialect, refusal: Outcome
) -> tuple[Dialect, Outcome, Sequence[str]]:
    """Start from the plainest request that is accepted, and add all that is accepted, too."""
    for ask.output, length in itertools.product(OUTPUTS, LENGTHS):
        plain = replace(PLAINEST, chat=full.chat, length=length)
        if not refused(answer := ask(plain)):
            break
    else:
        return full, refusal, []
    notes = [f"the server refuses {full.length}: {length} is sent"] * (length != full.length)
    for name, (what, so) in WITHOUT.items():
        if full.chat and name == "token_ids":
            continue
        richer: Dialect = replace(plain, **{name: True})  # type: ignore[arg-type]
        if refused(again := ask(richer)):
            notes.append(f"the server refuses {what}: {so} ({again.error})")
        elif not BUSY.match(again.error):
            plain, answer = richer, again
    return plain, answer, notes


def with_the_other_length(ask: Prober, dialect: Dialect) -> tuple[Dialect, list[str]]:
    (other,) = set(LENGTHS) - {dialect.length}
    changed = replace(dialect, length=other)
    answer = ask(changed)
    if answer.error or too_long(answer, ask.output):
        return dialect, [f"the server writes more than {dialect.length} allows"]
    return changed, [f"the server ignores {dialect.length}: {other} is sent"]


def hint(ask: Prober, chat: bool, answer: Outcome) -> str:
    """Which flag helps, if no request of this kind is answered."""
    if answer.error.startswith("HTTP 401"):
        return ask.endpoint.key_hint
    if NOBODY.match(answer.error):
        return ""
    other = replace(PLAINEST, chat=not chat)
    if any(not ask(replace(other, length=length)).error for length in LENGTHS):
        name = "openai-chat" if other.chat else "openai"
        return f"use --backend {name}: the server answers {other.path}"
    if answer.error.startswith("HTTP 403"):
        return ask.endpoint.key_hint
    if ask.endpoint.unlisted:
        return f"-m: is {ask.endpoint.model} what the server calls its model?"
    with suppress(Failure):
        rest = [name for name in models(ask.endpoint) if name != ask.endpoint.model]
        return f"-m: it also serves {', '.join(rest)[:ERROR_LENGTH]}" if rest else ""
    return ""
