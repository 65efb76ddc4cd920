"""Server-sent events as servers and gateways write them, and which ones are tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from common.response import Malformed, error_message

COMPACT, SPACED = b'"choices":[{', b'"choices": [{'  # never in a JSON string: it escapes quotes
BLANK_LINES = re.compile(  # or one line end after an object: some leave the blank line out
    rb"(?:\r\n|\n|\r(?!\n)){2,}|(?<=\})(?:\r\n|\n|\r)(?=data: ?(?:\{\"|\[DONE\]))"
)
BOM = b"\xef\xbb\xbf"
BEAT = re.compile(rb"data:[ \t]*(?!\[DONE\]|data:)[^{\s][^\r\n]*\s*\Z")
STREAM = re.compile(rb"\s*(?:data|event|id|retry)?:")
USAGE = re.compile(rb'"usage"\s*:\s*\{')
FINISH = re.compile(rb'"finish_reason"\s*:\s*"([\w .:-]+)"')
EMPTY = re.compile(rb'"delta"\s*:\s*\{\s*\}')
FIELDS = (b"id", b"retry")  # say nothing; data, event and comments are read
TEXT_KEYS = (
    "text content reasoning_content reasoning reasoning_details thinking refusal "
    "tool_calls function_call token_ids"
).split()

Json = Any


class Event(NamedTuple):
    """One server-sent event: where it ends in the body, and its unparsed text."""

    end: int
    text: bytes

    def read(self) -> Json:
        """Its JSON document; None for [DONE] and for events without one, such as heartbeats."""
        data, name, strays, comments = [], b"", [], []
        for line in self.text.removeprefix(BOM).replace(b"\r", b"\n").split(b"\n"):
            field, _, value = line.partition(b":")
            if field == b"data":
                data.append(value.strip().removeprefix(b"data:"))  # some gateways wrap it twice
            elif field == b"event":
                name = value.strip()
            elif not field:
                comments.append(value)
            elif field not in FIELDS:
                strays.append(line)
        said = b"\n".join(data).strip()
        if name == b"error" or (strays and not said):  # its text may lack `data:`
            words = said or b" ".join(strays or comments)  # Dynamo's is in a comment
            raise Malformed(f"error from the server: {error_message(words)}")
        if not said or said == b"[DONE]" or (name and said[:1] != b"{"):  # such as `event: ping`
            return None
        try:
            return json.loads(said)
        except ValueError as e:
            raise ValueError(f"{e}: {error_message(said)}") from None


def is_stream(data: bytes, kind: str) -> bool:
    """Is a body an event stream? Its content type may be wrong either way."""
    start = data.removeprefix(BOM).lstrip()[:1]
    return bool(STREAM.match(data.removeprefix(BOM))) or (
        kind == "text/event-stream" and start not in (b"{", b"<")
    )


def split_events(data: bytes) -> tuple[list[Event], list[Event]]:
    """The events that carry choices, and the others, told apart without decoding them.

    Data that is not an object is a heartbeat if an event with an object follows, else an error.
    """
    tokens, others, last = [], [], 0
    for end, text in pieces(data):
        if COMPACT in text or SPACED in text:
            tokens.append(Event(end, text))
        elif text:
            others.append(Event(end, text))
        last = end if b"{" in text else last
    return tokens, [event for event in others if event.end > last or not BEAT.match(event.text)]


def pieces(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The pieces between blank lines, and where each ends. A line ends in \\n, \\r\\n or \\r."""
    lines, returns = data.count(b"\n"), data.count(b"\r")
    stuck = b"}\ndata:" in data or b"}\r\ndata:" in data
    if stuck or (returns and not lines == returns == data.count(b"\r\n")):
        yield from mixed_pieces(data)
        return
    separator, end = b"\r\n\r\n" if returns else b"\n\n", 0
    for text in data.split(separator):
        end += len(text)
        yield end, text
        end += len(separator)


def mixed_pieces(data: bytes) -> Iterator[tuple[int, bytes]]:
    start = 0
    for blank in BLANK_LINES.finditer(data):
        yield blank.start(), data[start : blank.start()]
        start = blank.end()
    yield len(data), data[start:]


# --- which of them are tokens ---------------------------------------------------------------------


def says(document: Json, *, whole: bool = False) -> bool:
    """Does this piece of an answer, or a `whole` one, carry any output?"""
    names = ("message", "delta") if whole else ("delta", "message")  # some pieces have both
    for choice in document.get("choices") or ():
        held = map(choice.get, names)
        holder = next((each for each in held if isinstance(each, dict)), choice)
        if choice.get("text") or any(holder.get(key) for key in TEXT_KEYS):
            return True
    return False


def token_events(events: Sequence[Event], chat: bool, wanted: int | None) -> list[Event]:
    """The events that are tokens, in a stream for which the server counts `wanted` tokens.

    A chat begins with only the role, some completions with an empty text; a stream ends with the
    finish reason or the usage. None of these is a token. Half a character or a special token is
    one, though it has no text either: only the count tells these apart.
    """
    spoken = (i for i, event in enumerate(events) if says(event.read()))
    first = next(spoken, None)
    if first is None:
        silent = list(events[1:] if chat and len(events) > 1 else events)
        return silent[: wanted or None]
    last = next(i for i in reversed(range(len(events))) if says(events[i].read()))
    found = list(events[first : last + 1])
    before, after = list(events[: 0 if chat else first]), list(events[last + 1 :])
    missing = (wanted or 0) - len(found)
    if missing < 0 and wanted:
        return [event for event in found if says(event.read())]
    if missing and after and missing in (1, len(before) + 1):  # the last one, a special token
        found, missing = [*found, after[0]], missing - 1
    if 0 < missing <= len(before):
        return [*before[-missing:], *found]
    if missing > 0:  # an event holds several tokens, and one that holds nothing is a heartbeat
        return [event for event in found if not EMPTY.search(event.text)]
    return found


def usage(events: Sequence[Event]) -> tuple[int | None, int | None, int | None]:
    """Tokens of the prompt, of the output, and of the prompt from a cache: the last real values.

    Some servers send running counts in each event, some zeros or null in all but the last one.
    """
    prompt = output = cached = None
    for event in sorted(events, reverse=True):
        if prompt and output:
            break
        if USAGE.search(event.text):
            said = usage_of(event.read())
            prompt = prompt or counted(said.get("prompt_tokens"))
            output = output or written(said)
            cached = from_cache(said) if cached is None else cached
    return prompt, output, cached


def usage_of(document: Json) -> Json:
    """The usage: at the top (OpenAI), in a choice (Moonshot) or under `x_groq`; {} if none."""
    if not isinstance(document, dict):
        return {}
    holders = (document, *(document.get("choices") or ()), document.get("x_groq"))
    found = (holder.get("usage") for holder in holders if isinstance(holder, dict))
    return next((said for said in found if isinstance(said, dict)), {})


def written(usage: Json) -> int | None:
    """Tokens of the output. xAI and Google count reasoning tokens only in the total."""
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    prompt, output, total = (counted(usage.get(name)) for name in names)
    return output if output is None else max(output, (total or 0) - (prompt or total or 0))


def from_cache(usage: Json) -> int | None:
    """Cached prompt tokens, as OpenAI and most others write them, or DeepSeek; None if unsaid."""
    details = usage.get("prompt_tokens_details")
    said = details.get("cached_tokens") if isinstance(details, dict) else None
    return counted(usage.get("prompt_cache_hit_tokens") if said is None else said)


def counted(value: Json) -> int | None:
    """A number of tokens (some servers write 8.0); None if it cannot be one."""
    whole = type(value) is int or (type(value) is float and value.is_integer())
    return int(value) if whole and 0 <= value < 1 << 32 else None


def finish_reason(events: Sequence[Event]) -> str:
    """Why the output ended; '' if no event says."""
    found = (FINISH.search(event.text) for event in reversed(events))
    return next((match[1].decode() for match in found if match), "")
