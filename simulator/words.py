"""A language model in miniature: splits prompts into tokens and continues them, deterministically.

A token is a word, a number or a punctuation mark. The prose is made so that the stop strings people
try ("the", ".", a line break) turn up within a few dozen tokens, and counting prompts count on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count
from random import Random
from zlib import crc32

TOKEN = re.compile(r"\w+|[^\w\s]")
GENERATED = re.compile(r" ?\w+|[^\w\s]|\n+|\s")  # as the tokens of an answer are
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
    rng = Random(seed)
    if sequence := SEQUENCE.search(prompt[-200:]):
        yield from _next_numbers(int(sequence[1]), int(sequence[2]), not sequence[3])
    if asked := COUNT_TO.search(prompt[-2000:]):
        yield from _numbers(int(asked[1]), int(asked[2]), opening)
        opening = " "
    yield from _prose(rng, opening)


def _next_numbers(before: int, last: int, comma_first: bool) -> Iterator[str]:
    step = last - before or 1
    if comma_first:
        yield ","
    for number in count(last + step, step):
        yield f" {number}"
        yield ","


def _numbers(first: int, last: int, opening: str) -> Iterator[str]:
    step = 1 if last >= first else -1
    for number in range(first, last, step):
        yield f"{opening}{number}"
        yield ","
        opening = " "
    yield f"{opening}{last}"
    yield "."


def _prose(rng: Random, opening: str) -> Iterator[str]:
    for number in count():
        words = _sentence(rng)
        yield opening + next(words)
        yield from (f" {word}" for word in words)
        yield "."
        opening = " "
        if number % 3 == 0:
            yield "\n\n"
            opening = ""


def _sentence(rng: Random) -> Iterator[str]:
    pick = rng.choice
    yield from ("The", pick(ADJECTIVES), pick(NOUNS), "of", pick(PLACES), "is", "a", pick(NOUNS))
    yield from ("and", "it", pick(VERBS), "the", pick(NOUNS))
