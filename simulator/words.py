"""A language model in miniature: takes prompts from requests, and continues them predictably.

A token is a word, a number or a punctuation mark. The prose is made so that the stop strings people
try ("the", ".", a line break) turn up within a few dozen tokens, and counting prompts count on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from random import Random
from typing import Any, NamedTuple
from zlib import crc32

from protocol import AnyRequest, ChatCompletionRequest

TOKEN = re.compile(r"\w+|[^\w\s]")
GENERATED = re.compile(r" ?\w+|[^\w\s]|\n+|\s")  # the tokens of an answer
SEQUENCE = re.compile(r"(-?\d{1,9})\s*,\s*(-?\d{1,9})\s*(,?)\s*$")
COUNT_TO = re.compile(r"count\D{0,40}?(\d{1,9})\s*(?:to|through|-)\s*(\d{1,9})", re.IGNORECASE)
VOCABULARY = 32000

ADJECTIVES = "small large quiet bright old new simple careful early".split()
NOUNS = "river city model engine garden library answer question machine".split()
VERBS = "holds follows carries explains crosses measures keeps finds shows".split()
PLACES = "Paris Lisbon Nairobi Kyoto Oslo Quito Hanoi Tunis".split()


def count_tokens(text: str) -> int:
    return max(1, len(TOKEN.findall(text)))  # a real tokenizer adds at least its BOS token


def token_id(text: str) -> int:
    return crc32(text.encode()) % VOCABULARY


def fingerprint(text: str) -> int:
    return crc32(text.encode("utf-8", "surrogatepass"))


def continue_text(prompt: str, seed: int, opening: str) -> Iterator[str]:
    """Yield tokens for ever; `opening` is put before the first word (a space after a prompt)."""
    if sequence := SEQUENCE.search(prompt[-200:]):
        before, last = int(sequence[1]), int(sequence[2])
        step = last - before or 1
        if not sequence[3]:
            yield ","
        yield from _numbers(count(last + step, step), None, " ")
    if asked := COUNT_TO.search(prompt[-2000:]):
        first, last = int(asked[1]), int(asked[2])
        step = 1 if last >= first else -1
        yield from _numbers(range(first, last + step, step), last, opening)
        opening = " "
    yield from _prose(Random(seed), opening)


def _numbers(numbers: Iterable[int], last: int | None, opening: str) -> Iterator[str]:
    for number in numbers:
        yield f"{opening}{number}"
        yield "." if number == last else ","
        opening = " "


def _prose(rng: Random, opening: str) -> Iterator[str]:
    pick = rng.choice
    for number in count():
        subject = f"{opening}The {pick(ADJECTIVES)} {pick(NOUNS)} of {pick(PLACES)}"
        does = f"is a {pick(NOUNS)} and it {pick(VERBS)} the {pick(NOUNS)}"
        opening, end = ("", ".\n\n") if number % 3 == 0 else (" ", ".")
        yield from GENERATED.findall(f"{subject} {does}{end}")


# -- prompts out of requests --


class Prompt(NamedTuple):
    text: str  # what the answer follows from; token ids are written out
    tokens: int
    opening: str  # put before the first word of the answer
    echo: Any = ""  # put before the answer when asked for: ids cannot be, as in the real server
    ids: Sequence[int] = ()  # where it was given as such


def prompts_of(request: AnyRequest) -> list[Prompt]:
    """A request's prompts. A completion has four forms: a text, token ids, or a list of either."""
    if isinstance(request, ChatCompletionRequest):
        return [_chat_prompt(request)]
    prompt: Any = request.prompt
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    return [_prompt(each) for each in ([prompt] if is_one else prompt)]


def _prompt(prompt: str | list[int]) -> Prompt:
    if isinstance(prompt, str):
        opening = "" if not prompt or prompt[-1].isspace() else " "
        return Prompt(prompt, count_tokens(prompt), opening, prompt)
    if not prompt:
        raise ValueError("prompt token ids must not be empty")
    return Prompt(" ".join(map(str, prompt)) + " #", len(prompt), " ", prompt, prompt)


def chat_role(request: ChatCompletionRequest) -> str:
    """Whose words the answer is: without an assistant's opening, the last message goes on."""
    return "assistant" if request.add_generation_prompt else str(request.messages[-1]["role"])


def _chat_prompt(request: ChatCompletionRequest) -> Prompt:
    role, texts = chat_role(request), [_message_text(message) for message in request.messages]
    echo = texts[-1] if texts and request.messages[-1]["role"] == role else ""
    if (ids := request.prompt_token_ids) is not None:
        return _prompt(ids)._replace(opening="", echo=echo)
    if not texts:
        raise ValueError("messages must not be empty without prompt_token_ids")
    template = 4 * len(texts) + 3  # the marks that a chat template puts around the messages
    return Prompt("\n".join(texts), template + sum(map(count_tokens, texts)), "", echo)


def _message_text(message: Any) -> str:  # noqa: ANN401 (one of nine TypedDicts)
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = [_part_text(part) for part in content or ()]  # pydantic checks them here, not before
    return "\n".join(filter(None, parts))


def _part_text(part: dict[str, Any]) -> str | None:
    """Return a text, or None for a part that says nothing; it is skipped."""
    kind = part.get("type")
    if kind == "text":
        return part.get("text")
    if kind not in ("image_url", "video_url", "audio_url"):
        raise NotImplementedError(f"Unknown part type: {kind}")
    if (part.get(kind) or {}).get("url") is None:
        return None
    raise ValueError("only text parts are supported: the model is not multimodal")
